"""The configuration: typed sections, and how a YAML file becomes them.

Reading order: `includes` (earlier first, the file itself last), `key=value` overrides, then
`${NAME:default}` from the environment (names in capitals) and `${section.key}` from the
configuration itself. Every key is checked: an unknown one is an error that suggests the nearest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

# pydantic asks for this one before Python 3.12
from typing_extensions import TypedDict

from spmdrl.config.algorithms import AlgorithmSection, PreferenceSection, Section
from spmdrl.config.data import DataKind, DataSection, EvaluationSection, Place, without_null
from spmdrl.config.shipped_flows import ShippedFlow, flow_row


class ModelSection(Section):
    path: Place = Field(description="Hugging Face directory: config.json, safetensors, tokenizer.")
    tiny: bool = Field(False, description="Use random weights at a toy size of the architecture.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Dtype of the computation; auto is float32 on a CPU, bfloat16 on a GPU."
    )
    attention: Literal["auto", "blocked", "sdpa", "varlen", "flash", "flex"] = Field(
        "auto", description="Attention kernel of the trainer; auto takes the fastest that fits."
    )


PartName = Literal["weights", "optimizer", "kv_cache", "graphs"]
PartResidency = Literal["keep", "host", "drop", "auto"]


class MegatronSettings(TypedDict, total=False):
    """Megatron's ways to split a role's model, in addition to the mesh."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    vpp: Annotated[int, Field(ge=1)]
    sp: bool


class RoleSection(Section):
    kind: Place | None = Field(
        None,
        description="Kind of role: policy | reference | teacher | reward | value | rollout | "
        "module:Class; by default the role's name.",
    )
    model: Place | None = Field(None, description="Hugging Face directory; default: model.path.")
    head: Literal["file", "normal", "zero"] = Field(
        "file", description="Scalar head of a reward or value model: its file's, or a new one."
    )
    trained: bool | None = Field(
        None, description="Train the role; by default policy and value are trained, others not."
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `train` that differ for this role."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="Hugging Face names of a trained role's parameters that stay fixed; * "
        "matches any text.",
    )
    memory: dict[PartName, PartResidency] = Field(
        default_factory=dict,
        description="Residency of weights, optimizer, kv_cache and graphs between the role's "
        "calls: keep, host, drop or auto (default).",
    )
    retokenize: bool = Field(
        False, description="Let a reward model with another tokenizer read texts instead of tokens."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of a module:Class."
    )
    ranks: str | int = Field(
        "all", description="Ranks of the role: all | 0-3 | 0,2 | nodes 0-1 | same as ROLE."
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="Device of the role; auto: its ranks' GPUs, or the host if none has."
    )
    dp_replicate: int | None = Field(
        None, ge=1, description="Replicas, at least 1; by default what the other degrees leave."
    )
    dp_shard: int | Literal["all"] = Field(
        1, description="Ranks per copy of the weights (FSDP2), at least 1; all: as many as fit."
    )
    cp: int = Field(1, ge=1, description="Context-parallel ranks, at least 1.")
    tp: int = Field(1, ge=1, description="Tensor-parallel ranks, at least 1.")
    ep: int = Field(
        1, ge=1, description="Expert-parallel degree of a MoE, at least 1, within tp, cp and dp."
    )
    pp: int = Field(1, ge=1, description="Pipeline stages, at least 1 (train.backend=megatron).")
    megatron: MegatronSettings = Field(
        default_factory=MegatronSettings,
        description="Megatron's options: vpp, runs of layers per pipeline rank (interleaved "
        "schedule); sp, split norms and residuals over the tp ranks.",
    )
    tp_across_nodes: bool = Field(
        False, description="Allow a tensor-parallel group to span several nodes."
    )


Decay = Annotated[float, Field(ge=0, lt=1)]
TokenId = Annotated[int, Field(ge=0)]


class TrainSection(Section):
    backend: Literal["torch", "megatron"] = Field(
        "torch", description="Train backend; megatron needs megatron-core."
    )
    epochs: int = Field(1, ge=1, description="Passes over one step's samples, at least 1.")
    num_minibatches: int = Field(1, ge=1, description="Optimizer steps per epoch, at least 1.")
    microbatch_tokens: int = Field(
        8192, ge=1, description="Packed tokens that a replica computes at once, at least 1."
    )
    share_prompts: bool = Field(True, description="Compute a group's prompt once per microbatch.")
    recompute: Literal["none", "layer"] = Field(
        "none", description="Activation recomputation; layer: keep only the inputs of layers."
    )
    lr: float = Field(1e-6, gt=0, description="AdamW learning rate after warm-up, above 0.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape of the learning rate after warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up, at least 0.")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="End of linear and cosine as a share of lr, 0 to 1."
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW betas, each in [0, 1).")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon, above 0.")
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW decay, at least 0; spares norms and biases."
    )
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Largest norm of the whole gradient; .inf: any."
    )
    head_chunk: int = Field(1024, ge=1, description="Tokens of logits held at once, at least 1.")
    balance_coef: float = Field(
        0.0, ge=0, description="Weight of a MoE's load-balancing loss, taken per response; 0: off."
    )


class RolloutSection(Section):
    engine: Literal["native", "vllm"] = Field(
        "native", description="Rollout engine; vllm runs in the same processes, on all ranks."
    )
    kv_cache_gb: float | Literal["auto"] = Field(
        "auto", description="KV cache per rank, GB; auto: what the call needs, within what is free."
    )
    block_size: int = Field(32, ge=1, description="Tokens per cache block, at least 1.")
    max_running: int = Field(
        256, ge=1, description="Samples decoded together on one replica, at least 1."
    )
    prefill_tokens: int = Field(
        2048, ge=1, description="Most prompt tokens per engine step, at least 1."
    )
    cuda_graphs: bool = Field(True, description="Replay decode steps as CUDA graphs.")
    sync_bucket_mb: int = Field(
        256, ge=1, description="Bucket of a weight sync, in MB; a rank stages two at most."
    )
    sync_check_every: int = Field(
        20,
        ge=0,
        description="Compare full checksums after the first sync and then every N syncs; "
        "cheaper checks (tensor sums, log-probabilities of fixed rows) run after every sync; 0: "
        "none.",
    )


class SamplingSection(Section):
    temperature: float = Field(
        1.0, ge=0, le=1000, description="Temperature, 0.001 to 1000; 0: greedy (evaluation only)."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus probability, above 0; 1: off.")
    top_k: int = Field(0, ge=0, description="Most likely tokens to choose from; 0: off.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Least probability as a share of the best, below 1; 0: off."
    )
    max_tokens: int = Field(256, ge=1, description="Most tokens of a response, at least 1.")
    stop: tuple[str, ...] = Field((), description="Texts that end a response.")
    stop_token_ids: tuple[TokenId, ...] = Field(
        (), description="Token ids that end a response, as well as the end of text."
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
    function: Place | None = Field(
        None, description="Function: math | reasoning_gym | exact | number | format | module:f."
    )
    role: str | None = Field(
        None, description="Role that scores instead: a reward model or your own."
    )
    weight: float = Field(1.0, description="Factor of this reward in the sum.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of a built-in; keyword arguments of a function."
    )


class RewardPoolSection(Section):
    num_workers: int = Field(1, ge=1, description="Subprocesses per rank, at least 1.")
    timeout_s: float = Field(10.0, gt=0, description="Limit of one call of a function, in seconds.")
    memory_gb: float = Field(4.0, gt=0, description="Memory that calls add to a subprocess, in GB.")
    failed_reward: float = Field(0.0, description="Reward of a sample whose function failed.")
    max_failed_share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of failed calls, above 0 and at most 1, that ends the run: among a "
        "function's last calls on a rank, at least 8.",
    )
    environment: tuple[str, ...] = Field(
        (),
        description="Environment variables that functions see in addition to the usual ones, "
        "e.g. a judge's token; * matches any text.",
    )


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints to keep, at least 1.")
    keep_every: int = Field(0, ge=0, description="Keep those of every N-th step as well; 0: none.")
    resume: bool = Field(True, description="Resume from run_dir's latest checkpoint.")
    export: bool | int = Field(
        True, description="Write run_dir/model at the end; N: also a model_step_* every N steps."
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the exported weights; auto: that of the files the model came from.",
    )
    journal_kv: bool | Literal["auto"] = Field(
        "auto",
        description="Save the key-value cache at a stop in generation, which then resumes bit "
        "for bit; auto: on a CPU.",
    )


class LogSection(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard files.")
    text_samples: int = Field(2, ge=0, description="Prompts and responses logged per step.")
    progress: bool = Field(
        True, description="Show long phases as bars on a terminal, or as occasional lines in a log."
    )


class Config(Section):
    """The whole configuration of a run."""

    flow: Place = Field("grpo", description="Shipped flow, or path/to/my_flow.py:function.")
    environment: Place | None = Field(
        None, description="module:Class in place of the flow's own environment."
    )
    trainer: Place | None = Field(
        None, description="module:Class in place of the flow's own trainer."
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of all random numbers.")
    steps: int = Field(
        ge=1, description="Training steps, at least 1; each draws its data and then updates."
    )
    run_dir: Place = Field(
        min_length=1, description="Directory of metrics, checkpoints, report and exported model."
    )
    lag: Literal[0, 1] = Field(
        0, description="1: sample the next step during the update; 0: after it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of the ranks; auto takes GPUs if there are any."
    )
    memory_gb: float | None = Field(
        None, gt=0, description="Device memory of a rank for all roles, in GB; default: all it has."
    )
    timeout_s: float = Field(1800.0, gt=0, description="Timeout of one collective, in seconds.")
    limits: dict[str, float] = Field(
        default_factory=dict,
        description="Seconds without progress, by phase, after which the run ends as hung; "
        "`default` is for all other phases (0.9 of timeout_s).",
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

    def data_kind(self) -> DataKind:
        """Kind of the rows of the data; a user's own flow has prompts unless it says otherwise."""
        return self.data.kind or self.flow_row.data

    def is_trained(self, name: str) -> bool:
        trained = self.roles[name].trained
        return self.role_kind(name) in ("policy", "value") if trained is None else trained

    def train_section(self, name: str) -> TrainSection:
        """`train`, overridden by the keys of `roles.NAME.train`."""
        own = self.roles[name].train
        return (
            TrainSection.model_validate({**self.train.model_dump(), **own}) if own else self.train
        )

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
