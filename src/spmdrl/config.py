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

from spmdrl.config_algorithms import AlgorithmSection, PreferenceSection, Section
from spmdrl.config_data import (
    FLOW_DATA,
    DataKind,
    DataSection,
    EvaluationSection,
    Place,
    without_null,
)


class ModelSection(Section):
    path: Place = Field(description="Hugging Face directory: config.json, safetensors, tokenizer")
    tiny: bool = Field(False, description="random weights at a toy size of the same architecture")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 on a GPU"
    )
    attention: Literal["auto", "blocked", "sdpa", "varlen", "flash", "flex"] = Field(
        "auto", description="kernel of the trainer; auto: the fastest that fits"
    )


Part = Literal["weights", "optimizer", "kv_cache", "graphs"]
MemoryPolicy = Literal["keep", "host", "drop", "auto"]


class MegatronSettings(TypedDict, total=False):
    """How Megatron cuts a role's model, beside the mesh."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    vpp: Annotated[int, Field(ge=1)]
    sp: bool


class RoleSection(Section):
    kind: Place | None = Field(
        None,
        description="policy | reference | teacher | reward | value | rollout | module:Class; "
        "default: its name",
    )
    model: Place | None = Field(None, description="Hugging Face directory; default: model.path")
    head: Literal["file", "normal", "zero"] = Field(
        "file", description="scalar head of a reward or value model: its file's, or a new one"
    )
    trained: bool | None = Field(None, description="default: policy and value are, others not")
    train: dict[str, Any] = Field(
        default_factory=dict, description="keys of `train` that differ for this role"
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="of a trained role, Hugging Face names that stay as they are; * stands for "
        "any text",
    )
    memory: dict[Part, MemoryPolicy] = Field(
        default_factory=dict,
        description="what of weights, optimizer, kv_cache and graphs is kept, moved to the host or "
        "dropped between its calls; default: auto",
    )
    retokenize: bool = Field(
        False, description="a reward model of another tokenizer reads texts instead of tokens"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of a module:Class"
    )
    ranks: str | int = Field("all", description="all | 0-3 | 0,2 | nodes 0-1 | same as ROLE")
    device: Literal["auto", "cpu"] = Field(
        "auto", description="auto: the GPUs of its ranks, or the host where none has one"
    )
    dp_replicate: int | None = Field(None, ge=1, description="default: what the others leave")
    dp_shard: int | Literal["all"] = Field(
        1, description="ranks that share one copy of the weights (FSDP2); all: as many as fit"
    )
    cp: int = Field(1, ge=1, description="context-parallel ranks")
    tp: int = Field(1, ge=1, description="tensor-parallel ranks")
    ep: int = Field(
        1, ge=1, description="parts of a MoE's experts, on the ranks of tp, cp and dp; adds none"
    )
    pp: int = Field(1, ge=1, description="pipeline stages (train.backend: megatron)")
    megatron: MegatronSettings = Field(
        default_factory=MegatronSettings,
        description="vpp: runs of layers on each pipeline rank (interleaved schedule); sp: split "
        "norms and residuals over the tp ranks",
    )
    tp_across_nodes: bool = Field(
        False, description="a tensor-parallel group may lie on several nodes"
    )


Decay = Annotated[float, Field(ge=0, lt=1)]
TokenId = Annotated[int, Field(ge=0)]


class TrainSection(Section):
    backend: Literal["torch", "megatron"] = Field(
        "torch", description="train backend; megatron needs megatron-core"
    )
    epochs: int = Field(1, ge=1, description="passes over one step's samples")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per epoch")
    microbatch_tokens: int = Field(
        8192, ge=1, description="packed tokens computed at once on a replica"
    )
    share_prompts: bool = Field(True, description="compute a group's prompt once per microbatch")
    recompute: Literal["none", "layer"] = Field(
        "none", description="layer: keep only layer inputs for the backward pass"
    )
    lr: float = Field(1e-6, gt=0, description="AdamW learning rate after warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer steps")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="where linear and cosine end, as a share of lr"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW, each below 1")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW, not on norms and biases")
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="largest norm of the whole gradient; .inf: none"
    )
    head_chunk: int = Field(1024, ge=1, description="tokens of logits held at once")
    balance_coef: float = Field(
        0.0, ge=0, description="of a MoE's load-balancing loss, for each response by itself; 0: off"
    )


class RolloutSection(Section):
    engine: Literal["native", "vllm"] = Field(
        "native", description="rollout engine; vllm: in the same processes, on all ranks"
    )
    kv_cache_gb: float | Literal["auto"] = Field(
        "auto", description="of one rank; auto: what the call needs, within what is free"
    )
    block_size: int = Field(32, ge=1, description="tokens of a cache block")
    max_running: int = Field(256, ge=1, description="sequences decoded together on one replica")
    prefill_tokens: int = Field(2048, ge=1, description="prompt tokens per engine step")
    cuda_graphs: bool = Field(True, description="replay decode steps as CUDA graphs")
    sync_bucket_mb: int = Field(
        256, ge=1, description="a weight sync stages two of these on a rank, at most"
    )
    sync_check_every: int = Field(
        20,
        ge=0,
        description="syncs; compare all checksums after the first and every so many; sums of "
        "tensors and log-probabilities of fixed rows after each; 0: nothing",
    )


class SamplingSection(Section):
    temperature: float = Field(
        1.0, ge=0, le=1000, description="0: greedy (evaluation only), else 0.001 to 1000"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1: off")
    top_k: int = Field(0, ge=0, description="0: off")
    min_p: float = Field(0.0, ge=0, lt=1, description="share of the best probability; 0: off")
    max_tokens: int = Field(256, ge=1, description="of a response")
    stop: tuple[str, ...] = Field((), description="texts that end a response")
    stop_token_ids: tuple[TokenId, ...] = Field(
        (), description="tokens that end a response, beside the end of text"
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
        None, description="math | reasoning_gym | exact | number | format | module:f"
    )
    role: str | None = Field(None, description="or: a reward model, or a role of your own")
    weight: float = Field(1.0, description="factor in the sum")
    options: dict[str, Any] = Field(
        default_factory=dict, description="of a built-in; keyword arguments of a function"
    )


class RewardPoolSection(Section):
    num_workers: int = Field(1, ge=1, description="subprocesses per rank")
    timeout_s: float = Field(10.0, gt=0, description="per sample")
    memory_gb: float = Field(4.0, gt=0, description="per subprocess")
    failed_reward: float = Field(0.0, description="of a sample whose reward function failed")
    max_failed_share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="share of a function's last calls (8 at least) on a rank that have failed, "
        "from which on the run ends",
    )
    environment: tuple[str, ...] = Field(
        (),
        description="names of environment variables that functions see beside the usual ones, "
        "e.g. a judge's token; * stands for any text",
    )


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="steps; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="and those of every so many steps; 0: none")
    resume: bool = Field(True, description="continue from run_dir's latest checkpoint")
    export: bool | int = Field(
        True, description="write run_dir/model at the end; a number: and every so many steps"
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the exported weights; auto: that of the files that the model was read from",
    )
    journal_kv: bool | Literal["auto"] = Field(
        "auto",
        description="a stop in generation saves the key-value cache, so that it goes on bit for "
        "bit; auto: on a CPU",
    )


class LogSection(Section):
    tensorboard: bool = Field(True, description="write TensorBoard files")
    text_samples: int = Field(2, ge=0, description="prompt and response texts per step")
    progress: bool = Field(
        True, description="bars within long phases on a terminal, lines now and then in a log"
    )


class Config(Section):
    """The whole configuration of a run."""

    flow: Place = Field("grpo", description="shipped flow, or path/to/my_flow.py:function")
    environment: Place | None = Field(None, description="module:Class in place of the flow's own")
    trainer: Place | None = Field(None, description="module:Class in place of the flow's own")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="of all random numbers")
    steps: int = Field(ge=1, description="rollouts, each with its updates")
    run_dir: Place = Field(min_length=1, description="metrics, checkpoints, report, model")
    lag: Literal[0, 1] = Field(
        0, description="1: the next step's samples are drawn while the policy is updated"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where ranks compute")
    memory_gb: float | None = Field(
        None, gt=0, description="of a rank's device, for all roles; default: what it has"
    )
    timeout_s: float = Field(1800.0, gt=0, description="of a collective")
    limits: dict[str, float] = Field(
        default_factory=dict,
        description="seconds without progress, by phase, that end a run as hung; `default` for the "
        "others: 0.9 of timeout_s",
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
        """`roles.reference: null` takes away a role that an included file has."""
        return without_null(roles)

    def role_kind(self, name: str) -> str:
        return self.roles[name].kind or name

    def data_kind(self) -> DataKind:
        """What a row of the data is; a flow of the user's own has prompts where it says nothing."""
        return self.data.kind or FLOW_DATA.get(self.flow, "prompts")

    def is_trained(self, name: str) -> bool:
        trained = self.roles[name].trained
        return self.role_kind(name) in ("policy", "value") if trained is None else trained

    def train_section(self, name: str) -> TrainSection:
        """`train`, with what `roles.NAME.train` says otherwise."""
        own = self.roles[name].train
        return (
            TrainSection.model_validate({**self.train.model_dump(), **own}) if own else self.train
        )

    def model_path(self, role: str) -> Path:
        return Path(self.roles[role].model or self.model.path)

    def value_warmup(self, name: str) -> int:
        """The run's first steps that do not train the role `name`: PPO's policy may wait."""
        waits = self.flow == "ppo" and self.role_kind(name) == "policy"
        return min(self.algorithm.value_warmup_steps, self.steps) if waits else 0

    def num_optimizer_steps(self, name: str) -> int:
        """Optimizer steps of the role in the whole run, if every minibatch moves it."""
        train = self.train_section(name)
        return (self.steps - self.value_warmup(name)) * train.epochs * train.num_minibatches
