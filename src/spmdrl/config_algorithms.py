"""The sections of the configuration that say what is computed: policy gradients, preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class AlgorithmSection(Section):
    advantage: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = Field(
        "grpo", description="how flow grpo makes advantages of rewards"
    )
    advantage_std: bool = Field(True, description="grpo: divide by the group's std or not")
    policy_loss: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo", description="clipped ratios of tokens, of responses (GSPO), or as weights (CISPO)"
    )
    teacher_coef: float = Field(
        0.0, ge=0, description="adds log teacher/policy of each token to its advantage (distilling)"
    )
    loss_mean: Literal["token_mean", "sequence_mean", "fixed_length"] = Field(
        "token_mean", description="what the loss is averaged over"
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="ratio is clipped to 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="ratio is clipped to 1 + clip_high")
    dual_clip: float | None = Field(
        None, gt=1, description="bound c of the loss for negative advantages"
    )
    kl_coef: float = Field(0.0, ge=0, description="KL to the reference; 0: none")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="per token")
    kl_in: Literal["loss", "reward"] = Field("loss", description="where the KL goes (GRPO)")
    kl_target: float | None = Field(
        None, gt=0, description="PPO: KL per response that an adaptive coefficient aims at"
    )
    kl_horizon: int = Field(10_000, ge=1, description="samples over which the coefficient adapts")
    old_logprobs: Literal["auto", "trainer", "rollout"] = Field(
        "auto",
        description="where the old log-probabilities come from; auto: the trainer, where the "
        "policy moves between sampling and an update",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="PPO: discount per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="PPO: of the advantage estimator")
    whiten_advantages: bool = Field(True, description="PPO: over all tokens of the step")
    value_clip: float | None = Field(0.2, gt=0, description="PPO: of the value's move; null: off")
    value_warmup_steps: int = Field(0, ge=0, description="PPO: steps that train the value alone")
    score_scaling: Literal["none", "scale", "whiten"] = Field(
        "none", description="PPO: divide scores by their running std, or whiten them"
    )
    score_clip: float | None = Field(None, gt=0, description="PPO: bound of a score; null: off")
    cut_penalty: float = Field(
        0.0, ge=0, description="PPO: taken from the score of a response without end"
    )
    entropy_coef: float = Field(0.0, description="entropy bonus")
    centre_coef: float = Field(0.0, ge=0, description="reward models: keeps scores around 0")
    routing_replay: bool = Field(
        False, description="a MoE's update sends every token to the experts it had in the rollout"
    )
    importance_cap: float | None = Field(
        None, gt=0, description="truncated importance sampling between rollout and trainer"
    )
    refill_attempts: int = Field(0, ge=0, description="dynamic sampling: draws for dead groups")
    overlong_buffer: int = Field(0, ge=0, description="tokens before max_tokens that cost")
    overlong_penalty: float = Field(1.0, ge=0, description="reward lost at max_tokens")


class PreferenceSection(Section):
    loss: Literal["dpo", "ipo", "simpo", "kto", "orpo"] = Field(
        "dpo", description="of flows dpo and online_dpo (dpo or ipo there)"
    )
    beta: float = Field(0.1, gt=0, description="strength of the KL to the reference; IPO: tau")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="chance that a label is wrong (cDPO)"
    )
    margin: float = Field(0.0, ge=0, description="SimPO: gamma")
    nll_coef: float = Field(0.0, ge=0, description="of the chosen answer's likelihood per token")
    length_normalise: bool | None = Field(
        None, description="compare log-probabilities per token; default: IPO, SimPO and ORPO do"
    )
    kto_weights: tuple[float, float] = Field(
        (1.0, 1.0), description="KTO: of chosen and rejected answers"
    )
    reference: Literal["step", "cache"] = Field(
        "step",
        description="the reference's log-probabilities: in every step, or once, kept on disk "
        "(without roles.reference: those of the policy before its first step)",
    )
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="online_dpo: which samples of a prompt are compared"
    )
