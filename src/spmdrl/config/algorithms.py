"""Configuration sections that define the computation: policy gradients and preferences."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossMean = Literal["token_mean", "sequence_mean", "fixed_length"]
KlEstimator = Literal["k1", "k2", "k3"]

Value = TypeVar("Value")
Basic = Annotated[Value, Field(json_schema_extra={"basic": True})]
"""A key that README, quickstart and recipes set; all others are advanced."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class AlgorithmSection(Section):
    advantage: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = Field(
        "grpo", description="Estimate the advantages of flow grpo in this way."
    )
    advantage_std: bool = Field(
        True, description="Divide grpo's advantages by their group's standard deviation."
    )
    credit: Literal["trajectory", "turn"] = Field(
        "trajectory",
        description="Credit all turns of a sample with its whole reward (trajectory), or each turn "
        "with the rewards from it on (turn).",
    )
    policy_loss: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo",
        description="Use ratios clipped per token (ppo), clipped per response (gspo), or as "
        "weights (cispo).",
    )
    teacher_coef: float = Field(
        0.0,
        ge=0,
        description="Add log(teacher/policy) to a token's advantage with this weight, at least "
        "0; 0 turns it off.",
    )
    loss_mean: LossMean = Field(
        "token_mean",
        description="Average the loss over tokens, over the responses' means, or over sums / "
        "max_tokens.",
    )
    clip_low: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Clip the ratio from below at 1 - clip_low, above 0 and at most 1.",
    )
    clip_high: float = Field(
        0.2, gt=0, description="Clip the ratio from above at 1 + clip_high, above 0."
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Bound the loss of negative advantages by this factor, above 1; null sets no "
        "bound.",
    )
    kl_coef: Basic[float] = Field(
        0.0, ge=0, description="Weight the KL to the reference by this, at least 0; 0 turns it off."
    )
    kl_estimator: KlEstimator = Field("k3", description="Estimate a token's KL in this way.")
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="Put the KL of flow grpo into the loss or into the reward."
    )
    kl_target: float | None = Field(
        None,
        gt=0,
        description="Adapt PPO's kl_coef to this KL per response, in nats, above 0; null keeps "
        "it fixed.",
    )
    kl_horizon: int = Field(
        10_000,
        ge=1,
        description="Change kl_coef by a factor of about 1.2 over this many samples, at least 1.",
    )
    old_logprobs: Literal["auto", "trainer", "rollout"] = Field(
        "auto",
        description="Take the old log-probabilities from the trainer, which computes them before "
        "the update, or the rollout; auto computes them where something reads them: several "
        "optimizer steps in an update, a KL in the reward, a teacher.",
    )
    gamma: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Discount PPO's rewards by this per token, above 0 and at most 1.",
    )
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="Set the lambda of PPO's advantage estimator, 0 to 1."
    )
    whiten_advantages: bool = Field(
        True, description="Whiten PPO's advantages over all tokens of the step."
    )
    value_clip: float | None = Field(
        0.2,
        gt=0,
        description="Bound how far an update moves PPO's values, above 0; null sets no bound.",
    )
    value_warmup_steps: int = Field(
        0, ge=0, description="Train only PPO's value in this many first steps, at least 0."
    )
    score_scaling: Literal["none", "scale", "whiten"] = Field(
        "none",
        description="Divide PPO's scores by their running standard deviation, or whiten them.",
    )
    score_clip: float | None = Field(
        None, gt=0, description="Bound the size of PPO's scores, above 0; null sets no bound."
    )
    cut_penalty: float = Field(
        0.0,
        ge=0,
        description="Take this from PPO's score of a response that is cut off, at least 0.",
    )
    entropy_coef: float = Field(
        0.0,
        description="Add the entropy to the objective with this weight, any number; 0 adds none.",
    )
    centre_coef: float = Field(
        0.0,
        ge=0,
        description="Weight the centring of a reward model's scores by this, at least 0; 0 turns "
        "it off.",
    )
    routing_replay: bool = Field(
        False,
        description="Send a MoE's tokens in updates to the experts that they had in the rollout.",
    )
    importance_cap: Basic[float | None] = Field(
        None,
        gt=0,
        description="Cap the weights trainer/rollout of truncated importance sampling, above 0; "
        "null turns it off.",
    )
    refill_attempts: int = Field(
        0,
        ge=0,
        description="Replace groups of equal rewards in up to this many further draws (dynamic "
        "sampling), at least 0; 0 turns it off.",
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="Lower the reward over this many tokens before max_tokens, at least 0; 0 "
        "turns it off.",
    )
    overlong_penalty: float = Field(
        1.0, ge=0, description="Take this much reward away at max_tokens, at least 0."
    )

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            raise ValueError(
                f"policy_loss=cispo with dual_clip={self.dual_clip}: CISPO's weights are bounded "
                "already, so set dual_clip=null"
            )
        if self.old_logprobs == "rollout" and self.importance_cap is not None:
            raise ValueError(
                f"old_logprobs=rollout with importance_cap={self.importance_cap}: the loss's ratio "
                "is to the rollout already, so nothing is left to correct: set importance_cap=null "
                "or old_logprobs=trainer"
            )
        return self

    @property
    def loss_kl_coef(self) -> float:
        """Coefficient of the KL as a term of the loss."""
        return self.kl_coef if self.kl_in == "loss" else 0.0


NORMALISED = ("ipo", "simpo", "orpo")
"""Losses that compare log-probabilities per token unless `length_normalise` is set."""

WITHOUT_REFERENCE = ("simpo", "orpo")

Weight = Annotated[float, Field(ge=0)]


class PreferenceSection(Section):
    loss: Basic[Literal["dpo", "ipo", "simpo", "kto", "orpo"]] = Field(
        "dpo", description="Use this loss in flow dpo; online_dpo takes dpo or ipo."
    )
    beta: Basic[float] = Field(
        0.1, gt=0, description="Weight the KL to the reference by this (IPO: tau), above 0."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assume that a label is wrong with this chance (cDPO), at least 0 and below "
        "0.5.",
    )
    margin: float = Field(
        0.0,
        ge=0,
        description="Ask for this margin between chosen and rejected in SimPO (gamma), at least 0.",
    )
    nll_coef: float = Field(
        0.0,
        ge=0,
        description="Add the chosen response's -log likelihood per token with this weight, at "
        "least 0; 0 turns it off.",
    )
    length_normalise: bool | None = Field(
        None,
        description="Compare log-probabilities per token; null does so in IPO, SimPO and ORPO.",
    )
    kto_weights: tuple[Weight, Weight] = Field(
        (1.0, 1.0),
        description="Weight chosen and rejected responses in KTO by these two, each at least 0.",
    )
    reference: Basic[Literal["step", "cache"]] = Field(
        "step",
        description="Compute the reference's log-probabilities in every step, or once and keep "
        "them on disk (without roles.reference: those of the policy before its first step).",
    )
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst",
        description="Compare a prompt's best and worst samples in online_dpo, or all of them.",
    )
    judge: str | None = Field(
        None,
        description="Let this judge compare the pairs of online_dpo, in both orders; null leaves "
        "the rewards' order.",
    )
    ties: Literal["drop", "reward"] = Field(
        "drop",
        description="Leave pairs out of which the judge prefers neither, or keep the rewards' "
        "order of them.",
    )

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} with loss={self.loss}: only dpo and simpo "
                "have it, so set it to 0"
            )
        if self.margin and self.loss != "simpo":
            raise ValueError(
                f"margin={self.margin} with loss={self.loss}: only simpo has it, so set it to 0"
            )
        return self

    @property
    def normalises(self) -> bool:
        """Whether the loss compares log-probabilities per token."""
        own = self.length_normalise
        return self.loss in NORMALISED if own is None else own

    @property
    def needs_reference(self) -> bool:
        return self.loss not in WITHOUT_REFERENCE
