"""The configuration: typed sections, and how a YAML file becomes them.

Reading order: `includes` (earlier first, the file itself last), `key=value` overrides, then
`${NAME:default}` from the environment (names in capitals) and `${section.key}` from the
configuration itself. Every key is checked: an unknown one is an error that suggests the nearest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    path: str = Field(description="Hugging Face directory: config.json, safetensors, tokenizer")
    tiny: bool = Field(False, description="random weights at a toy size of the same architecture")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "sdpa", "varlen", "flash", "flex"] = "auto"


class RoleSection(Section):
    kind: str | None = Field(None, description="policy | reference | rollout; default: its name")
    model: str | None = Field(None, description="Hugging Face directory; default: model.path")
    ranks: str | int = Field("all", description="all | 0-3 | 0,2 | same as ROLE")
    dp_replicate: int | None = Field(None, ge=1, description="default: what the others leave")
    dp_shard: int | Literal["all"] = 1
    cp: int = Field(1, ge=1)
    tp: int = Field(1, ge=1)


class TrainSection(Section):
    backend: Literal["torch"] = "torch"
    epochs: int = Field(1, ge=1, description="passes over one step's samples")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per epoch")
    microbatch_tokens: int = Field(8192, ge=1)
    share_prompts: bool = Field(True, description="compute a group's prompt once per microbatch")
    recompute: Literal["none", "layer"] = "none"
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="optimizer steps")
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    head_chunk: int = Field(1024, ge=1, description="tokens of logits held at once")


class RolloutSection(Section):
    engine: Literal["native"] = "native"
    kv_cache_gb: float | Literal["auto"] = "auto"
    block_size: int = Field(32, ge=1)
    max_running: int = Field(256, ge=1, description="sequences decoded together on one replica")
    prefill_tokens: int = Field(2048, ge=1, description="prompt tokens per engine step")
    cuda_graphs: bool = True


class SamplingSection(Section):
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, lt=1)
    max_tokens: int = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class AlgorithmSection(Section):
    advantage_std: bool = Field(True, description="divide by the group's std (GRPO) or not")
    loss_mean: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    kl_coef: float = Field(0.0, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: float = 0.0
    importance_cap: float | None = Field(
        None, gt=0, description="truncated importance sampling between rollout and trainer"
    )
    refill_attempts: int = Field(0, ge=0, description="dynamic sampling: draws for dead groups")
    overlong_buffer: int = Field(0, ge=0, description="tokens before max_tokens that cost")
    overlong_penalty: float = Field(1.0, ge=0)


class PromptsSection(Section):
    source: str = Field(description="reasoning_gym:TASK | FILE.jsonl | FILE.parquet | hub:NAME")
    task: dict[str, Any] = Field(default_factory=dict, description="reasoning-gym parameters")
    size: int | None = Field(None, ge=1, description="rows to use")
    split: str = Field("train", description="split of a hub data set")
    seed: int = 0
    prompt_column: str = "question"
    answer_column: str | None = "answer"
    answer_pattern: str | None = Field(None, description="regex, group 1 is the answer")
    template: str = "{prompt}"
    system: str | None = None
    chat: bool = True
    max_tokens: int = Field(1024, ge=1, description="longer prompts are skipped and counted")
    on_bad_row: Literal["error", "skip"] = "error"


class DataSection(Section):
    train: PromptsSection
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(8, ge=1, description="samples per prompt")


class RewardSection(Section):
    function: str = Field(description="math | reasoning_gym | exact | number | format | module:f")
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)


class RewardPoolSection(Section):
    num_workers: int = Field(1, ge=1, description="subprocesses per rank")
    timeout_s: float = Field(10.0, gt=0, description="per sample")
    memory_gb: float = Field(4.0, gt=0, description="per subprocess")
    failed_reward: float = 0.0


class EvaluationSection(Section):
    data: PromptsSection | None = Field(None, description="a held-out set of its own")
    held_out: int = Field(0, ge=0, description="or: questions kept out of data.train")
    threshold: float = Field(1.0, description="reward from which on an answer counts as right")
    every: int = Field(0, ge=0, description="steps; 0: only before and after")
    before: bool = True
    after: bool = True
    num_samples: int = Field(1, ge=1, description="answers per prompt")
    k: tuple[int, ...] = Field((1,), description="pass@k")
    temperature: float | None = Field(None, ge=0, description="default: sampling.temperature")
    max_tokens: int | None = Field(None, ge=1, description="default: sampling.max_tokens")


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="steps; 0: only at the end")
    keep_last: int = Field(2, ge=1)
    resume: bool = Field(True, description="continue from run_dir's latest checkpoint")
    export: bool = Field(True, description="write run_dir/model at the end")


class LogSection(Section):
    tensorboard: bool = True
    text_samples: int = Field(2, ge=0, description="prompt and response texts per step")
    progress: bool = True


class Config(Section):
    """The whole configuration of a run."""

    flow: str = "grpo"
    environment: str | None = Field(None, description="module:Class in place of the flow's own")
    trainer: str | None = Field(None, description="module:Class in place of the flow's own")
    seed: int = 0
    steps: int = Field(ge=1)
    run_dir: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = Field(1800.0, gt=0, description="of a collective")
    model: ModelSection
    roles: dict[str, RoleSection]
    train: TrainSection = TrainSection()
    rollout: RolloutSection = RolloutSection()
    sampling: SamplingSection = SamplingSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    data: DataSection
    rewards: tuple[RewardSection, ...] = ()
    reward_pool: RewardPoolSection = RewardPoolSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    def role_kind(self, name: str) -> str:
        return self.roles[name].kind or name

    def model_path(self, role: str) -> Path:
        return Path(self.roles[role].model or self.model.path)


def check_crossed(config: Config) -> None:
    """The rules that name two keys.

    Raises:
        ValueError: naming both keys and both values.
    """
    data, train = config.data, config.train
    samples = data.prompts_per_step * data.group_size
    if train.num_minibatches > data.prompts_per_step:
        raise ValueError(
            f"train.num_minibatches={train.num_minibatches} is more than data.prompts_per_step="
            f"{data.prompts_per_step}: a minibatch holds whole groups, so lower the first"
        )
    if config.algorithm.overlong_buffer >= config.sampling.max_tokens:
        raise ValueError(
            f"algorithm.overlong_buffer={config.algorithm.overlong_buffer} must be below "
            f"sampling.max_tokens={config.sampling.max_tokens}"
        )
    if config.algorithm.kl_coef > 0 and "reference" not in {
        config.role_kind(name) for name in config.roles
    }:
        raise ValueError(
            f"algorithm.kl_coef={config.algorithm.kl_coef} needs a reference, but roles="
            f"{sorted(config.roles)} has none: add roles.reference or set the coefficient to 0"
        )
    if samples < 2 and config.flow == "grpo":
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} x data.group_size={data.group_size} "
            "make one sample: GRPO compares the samples of a group"
        )
    if config.flow == "grpo" and data.group_size < 2:
        raise ValueError(
            f"flow={config.flow} with data.group_size={data.group_size}: GRPO compares the "
            "samples of a group, so it needs at least 2"
        )
    if config.evaluation.data is not None and config.evaluation.held_out > 0:
        raise ValueError(
            f"evaluation.data is set and evaluation.held_out={config.evaluation.held_out}: "
            "give a set of its own or a number of questions to keep out of data.train, not both"
        )
    too_large = [k for k in config.evaluation.k if k > config.evaluation.num_samples]
    if too_large:
        raise ValueError(
            f"evaluation.k={too_large[0]} is more than evaluation.num_samples="
            f"{config.evaluation.num_samples}: pass@k needs at least k samples"
        )
    if config.train.warmup_steps >= (total := num_optimizer_steps(config)) and total > 1:
        raise ValueError(
            f"train.warmup_steps={train.warmup_steps} is not below the run's {total} optimizer "
            f"steps (steps={config.steps} x train.epochs={train.epochs} x "
            f"train.num_minibatches={train.num_minibatches})"
        )


def num_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run."""
    return config.steps * config.train.epochs * config.train.num_minibatches
