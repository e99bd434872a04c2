"""Configuration sections that define the computation: policy gradients and preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class AlgorithmSection(Section):
    advantage: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = Field(
        "grpo", description="Advantage estimator of flow grpo."
    )
    advantage_std: bool = Field(True, description="Divide grpo's advantages by their group's std.")
    policy_loss: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo", description="Ratios: clipped per token, per response (GSPO), or as weights (CISPO)."
    )
    teacher_coef: float = Field(
        0.0, ge=0, description="Weight of log(teacher/policy) in a token's advantage; 0: off."
    )
    loss_mean: Literal["token_mean", "sequence_mean", "fixed_length"] = Field(
        "token_mean",
        description="Mean over tokens, responses' means, or of sums / max_tokens.",
    )
    clip_low: float = Field(
        0.2, gt=0, le=1, description="Ratio is clipped to 1 - clip_low; above 0, at most 1."
    )
    clip_high: float = Field(0.2, gt=0, description="Ratio is clipped to 1 + clip_high; above 0.")
    dual_clip: float | None = Field(
        None, gt=1, description="Bound c > 1 of the loss for negative advantages; null: none."
    )
    kl_coef: float = Field(0.0, ge=0, description="Coefficient of the reference's KL; 0: none.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of a token's KL.")
    kl_in: Literal["loss", "reward"] = Field("loss", description="Place of the KL in flow grpo.")
    kl_target: float | None = Field(
        None, gt=0, description="PPO: KL per response (nats) that kl_coef adapts to; null: fixed."
    )
    kl_horizon: int = Field(
        10_000, ge=1, description="Samples over which kl_coef changes by a factor of about 1.2."
    )
    old_logprobs: Literal["auto", "trainer", "rollout"] = Field(
        "auto",
        description="Source of the old log-probabilities; auto: the trainer, where the policy "
        "moves between sampling and an update.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="PPO: discount per token, above 0, up to 1.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="PPO: lambda of the estimator, 0 to 1.")
    whiten_advantages: bool = Field(True, description="PPO: whiten over all tokens of the step.")
    value_clip: float | None = Field(0.2, gt=0, description="PPO: bound of value moves; null: off.")
    value_warmup_steps: int = Field(0, ge=0, description="PPO: initial steps for the value only.")
    score_scaling: Literal["none", "scale", "whiten"] = Field(
        "none", description="PPO: divide scores by their running std, or whiten them."
    )
    score_clip: float | None = Field(None, gt=0, description="PPO: bound of |score|; null: off.")
    cut_penalty: float = Field(
        0.0, ge=0, description="PPO: amount taken from the score of a response without end."
    )
    entropy_coef: float = Field(0.0, description="Coefficient of the entropy bonus; 0: none.")
    centre_coef: float = Field(0.0, ge=0, description="Reward models: weight of centring scores.")
    routing_replay: bool = Field(
        False, description="Send a MoE's tokens in updates to their experts of the rollout."
    )
    importance_cap: float | None = Field(
        None, gt=0, description="Cap of truncated importance sampling, trainer/rollout; null: off."
    )
    refill_attempts: int = Field(
        0, ge=0, description="Dynamic sampling: draws that replace groups of equal rewards; 0: off."
    )
    overlong_buffer: int = Field(0, ge=0, description="Tokens before max_tokens that cost; 0: off.")
    overlong_penalty: float = Field(1.0, ge=0, description="Reward lost at max_tokens, at least 0.")


class PreferenceSection(Section):
    loss: Literal["dpo", "ipo", "simpo", "kto", "orpo"] = Field(
        "dpo", description="Loss of flow dpo; online_dpo takes dpo or ipo."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the reference's KL, above 0; IPO: tau.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Chance that a label is wrong (cDPO), in [0, 0.5)."
    )
    margin: float = Field(0.0, ge=0, description="SimPO: gamma, at least 0.")
    nll_coef: float = Field(
        0.0, ge=0, description="Weight of the chosen answer's -log likelihood per token; 0: off."
    )
    length_normalise: bool | None = Field(
        None, description="Compare log-probabilities per token; default: IPO, SimPO and ORPO do."
    )
    kto_weights: tuple[float, float] = Field(
        (1.0, 1.0), description="KTO: weights of chosen and rejected answers."
    )
    reference: Literal["step", "cache"] = Field(
        "step",
        description="Compute the reference's log-probabilities in every step, or once and keep "
        "them on disk (without roles.reference: those of the policy before its first step).",
    )
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="online_dpo: compare a prompt's best and worst samples, or all."
    )
