"""The configuration: typed sections, and how a YAML file becomes them.

Reading order: `includes` (earlier first, the file itself last), `key=value` overrides, then
`${NAME:default}` from the environment (names in capitals) and `${section.key}` from the
configuration itself. Every key is checked: an unknown one is an error that suggests the nearest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from spmdrl.config.algorithms import AlgorithmSection, Basic, PreferenceSection, Section
from spmdrl.config.data import DataKind, DataSection, EvaluationSection, Place, without_null
from spmdrl.config.roles import ModelSection, RoleSection
from spmdrl.config.shipped_flows import ShippedFlow, flow_row
from spmdrl.config.training import TrainSection
from spmdrl.config.turns import TurnsSection

TokenId = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1)]


class RolloutSection(Section):
    engine: Literal["native", "vllm"] = Field(
        "native",
        description="Sample with this engine; vllm runs in the same processes, on all ranks.",
    )
    kv_cache_gb: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Reserve this much KV cache per rank, in GB, any number above 0; auto takes "
        "what a step's samples need, as far as the memory plan has room.",
    )
    block_size: int = Field(
        32, ge=1, description="Store this many tokens in a block of the KV cache, at least 1."
    )
    max_running: int = Field(
        256, ge=1, description="Decode up to this many samples together on one replica, at least 1."
    )
    prefill_tokens: int = Field(
        2048, ge=1, description="Process up to this many prompt tokens per engine step, at least 1."
    )
    cuda_graphs: bool = Field(True, description="Replay decode steps as CUDA graphs.")
    adapters: Literal["auto", "unmerged", "merged"] = Field(
        "auto",
        description="Sample with the policy's adapter beside its base (unmerged: syncs move the "
        "adapter alone), or with weights of the engine's own that it is merged into; auto chooses "
        "by memory and cost.",
    )
    sync_bucket_mb: int = Field(
        256,
        ge=1,
        description="Send weights in buckets of this size, in MB, at least 1; a rank stages two "
        "at most.",
    )
    sync_check_every: int = Field(
        20,
        ge=0,
        description="Compare full checksums after the first sync and then every N syncs, at "
        "least 0; cheaper checks (tensor sums, log-probabilities of fixed rows) run after the "
        "others that move something; 0 turns all of them off.",
    )
    turns: TurnsSection | None = Field(
        None,
        description="Let samples take several turns, which objects of a class answer; null ends a "
        "sample with its first one.",
    )


class SamplingSection(Section):
    temperature: Basic[float] = Field(
        1.0,
        ge=0,
        le=1000,
        description="Divide logits by this temperature, 0.001 to 1000; 0 is greedy (evaluation "
        "only).",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the most likely tokens that together have this probability, "
        "above 0 and at most 1; 1 turns it off.",
    )
    top_k: int = Field(
        0, ge=0, description="Sample from this many most likely tokens, at least 0; 0 turns it off."
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Leave out tokens below this share of the best one's probability, at least 0 "
        "and below 1; 0 turns it off.",
    )
    max_tokens: Basic[int] = Field(
        256, ge=1, description="End a response, or a turn, after this many tokens, at least 1."
    )
    stop: tuple[StopText, ...] = Field((), description="End a response at any of these texts.")
    stop_token_ids: tuple[TokenId, ...] = Field(
        (),
        description="End a response at any of these token ids, each at least 0, as well as at "
        "the end of text.",
    )

    @field_validator("temperature")
    @classmethod
    def _is_no_trace(cls, value: float) -> float:
        if 0 < value < 0.001:
            raise ValueError(
                "it must be 0 (greedy) or at least 0.001: logits divided by it overflow"
            )
        return value


class RewardSection(Section):
    function: Basic[Place | None] = Field(
        None,
        description="Score responses with this function: math | reasoning_gym | exact | number | "
        "format | code | module:f.",
    )
    role: Basic[str | None] = Field(
        None, description="Score responses with this role instead: a reward model or your own."
    )
    weight: Basic[float] = Field(
        1.0, description="Multiply this reward by this weight in the sum, any number."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Pass these options to a built-in, or keyword arguments to a function.",
    )

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.function is None) == (self.role is None):
            raise ValueError(
                f"function={self.function!r} and role={self.role!r}: name a function or a role"
            )
        return self


class RewardPoolSection(Section):
    num_workers: int = Field(
        1, ge=1, description="Run this many subprocesses per rank, at least 1."
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        description="End a call of a function that takes longer than this, in seconds, above 0.",
    )
    memory_gb: float = Field(
        4.0, gt=0, description="Let calls add this much memory to a subprocess, in GB, above 0."
    )
    failed_reward: float = Field(
        0.0, description="Give this reward to a sample whose function failed, any number."
    )
    max_failed_share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="End the run if this share of calls fails, above 0 and at most 1, among a "
        "function's last calls on a rank (at least 8).",
    )
    environment: tuple[str, ...] = Field(
        (),
        description="Let functions see these environment variables in addition to the usual "
        "ones, e.g. a judge's token; * matches any text.",
    )


class CheckpointSection(Section):
    every: Basic[int] = Field(
        0, ge=0, description="Save a checkpoint every N steps, at least 0; 0 saves only at the end."
    )
    keep_last: int = Field(
        2, ge=1, description="Keep this many of the newest checkpoints, at least 1."
    )
    keep_every: int = Field(
        0,
        ge=0,
        description="Keep the checkpoints of every N-th step as well, at least 0; 0 keeps none.",
    )
    keep_best: str | None = Field(
        None,
        description="Keep the checkpoint of the evaluation with the largest value of this metric "
        "as well (eval/held_out/accuracy; -eval/held_out/nll: the smallest).",
    )
    resume: bool = Field(True, description="Resume from run_dir's latest checkpoint.")
    export: bool | int = Field(
        True,
        description="Write run_dir/model at the end; a number N writes a model_step_* every N "
        "steps as well.",
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Export weights in this dtype; auto takes that of the files the model came "
        "from.",
    )
    export_as: Literal["adapter", "merged", "both"] = Field(
        "adapter",
        description="Export a role that trains an adapter as a PEFT directory, as a whole model, "
        "or as both (the model in run_dir/model, the adapter in run_dir/model_adapter).",
    )
    journal_kv: bool | Literal["auto"] = Field(
        "auto",
        description="Save the key-value cache at a stop in generation, which then resumes bit "
        "for bit; auto does so on a CPU.",
    )


class LogSection(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard files.")
    trackers: tuple[Place, ...] = Field(
        (),
        description="Show metrics in these too: wandb | mlflow | trackio | jsonl | module:Class; "
        "a tracker that fails or is slow costs a warning.",
    )
    text_samples: int = Field(
        2, ge=0, description="Log this many prompts and responses per step, at least 0."
    )
    rollouts: int = Field(
        0,
        ge=0,
        description="Write all samples of every so many steps into RUN/rollouts, at least 0; 0 "
        "writes none.",
    )
    on_detect: Literal["warn", "stop"] = Field(
        "warn",
        description="Log a warning of a run that goes wrong in a known way, or end it "
        "(docs/detectors.md): its last checkpoint and export are written, and it is done.",
    )
    progress: bool = Field(
        True, description="Show long phases as bars on a terminal, or as occasional lines in a log."
    )


class Config(Section):
    """The whole configuration of a run."""

    flow: Basic[Place] = Field(
        "grpo",
        description="Run this shipped flow (sft, reward_model, dpo, online_dpo, grpo, ppo), or "
        "path/to/my_flow.py:function.",
    )
    environment: Place | None = Field(
        None,
        description="Use this module:Class in place of the flow's own environment; null keeps "
        "the flow's.",
    )
    trainer: Place | None = Field(
        None,
        description="Use this module:Class in place of the flow's own trainer; null keeps the "
        "flow's.",
    )
    seed: Basic[int] = Field(
        0,
        ge=-(2**63),
        lt=2**63,
        description="Derive all random numbers from this seed, any signed whole number of 64 bits.",
    )
    steps: Basic[int] = Field(
        ge=1,
        description="Train for this many steps, at least 1; each draws its data and then updates.",
    )
    run_dir: Basic[Place] = Field(
        min_length=1,
        description="Write metrics, checkpoints, the report and the exported model into this "
        "directory.",
    )
    lag: Basic[Literal[0, 1]] = Field(
        0, description="Sample the next step during the update (1), or after it (0)."
    )
    fold: bool = Field(
        False,
        description="Place roles that ask for other ranks on those that there are, with smaller "
        "degrees; results stay the same.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Compute on devices of this kind; auto takes GPUs if there are any."
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="Plan with this much device memory per rank for all roles, in GB, above 0; "
        "null takes what is free on the fullest GPU at the start.",
    )
    machine: Place | None = Field(
        None,
        description="Take the rates of predicted steps from this GPU or file, as `spmdrl plan "
        "--gpu` does; null takes the known GPU's, or measures the host.",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="End the run if one collective takes longer than this, in seconds, above 0.",
    )
    limits: dict[str, float] = Field(
        default_factory=dict,
        description="Set the seconds without progress, by phase, after which the run ends as "
        "hung; `default` holds for all other phases (0.9 of timeout_s).",
    )
    model: ModelSection
    roles: dict[str, RoleSection]
    train: TrainSection = TrainSection()
    rollout: RolloutSection = RolloutSection()
    sampling: SamplingSection = SamplingSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    preference: PreferenceSection = PreferenceSection()
    data: DataSection
    rewards: tuple[RewardSection, ...] = ()
    reward_pool: RewardPoolSection = RewardPoolSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @field_validator("roles", mode="before")
    @classmethod
    def _drop_removed_roles(cls, roles: Any) -> Any:
        """Drop roles set to null: `roles.reference: null` removes an included file's role."""
        return without_null(roles)

    def role_kind(self, name: str) -> str:
        return self.roles[name].kind or name

    @property
    def flow_row(self) -> ShippedFlow:
        return flow_row(self.flow)

    def is_users(self, name: str) -> bool:
        """Whether the role is the user's own class (`kind: module:Class`)."""
        return ":" in self.role_kind(name)

    def data_kind(self) -> DataKind:
        """Kind of the rows of the data; a user's own flow has prompts unless it says otherwise."""
        return self.data.kind or self.flow_row.data

    def is_trained(self, name: str) -> bool:
        trained = self.roles[name].trained
        return self.role_kind(name) in ("policy", "value") if trained is None else trained

    def train_section(self, name: str) -> TrainSection:
        """`train`, overridden by the keys of `roles.NAME.train`."""
        own = self.roles[name].train
        if not own:
            return self.train
        values = {**self.train.model_dump(), **own}
        if isinstance(own.get("deepspeed"), dict):  # its keys too, one by one
            values["deepspeed"] = {**self.train.deepspeed.model_dump(), **own["deepspeed"]}
        return TrainSection.model_validate(values)

    def model_path(self, role: str) -> Path:
        return Path(self.roles[role].model or self.model.path)

    def value_warmup(self, name: str) -> int:
        """Number of first steps that do not train the role `name`: PPO's policy may wait."""
        waits = self.flow_row.warms_value and self.role_kind(name) == "policy"
        return min(self.algorithm.value_warmup_steps, self.steps) if waits else 0

    def num_optimizer_steps(self, name: str) -> int:
        """Optimizer steps of the role in the whole run, if every minibatch updates it."""
        train = self.train_section(name)
        return (self.steps - self.value_warmup(name)) * train.epochs * train.num_minibatches
