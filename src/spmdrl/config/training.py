"""Configuration section of updates: `train`, and what its backends have of their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from spmdrl.config.algorithms import Basic, Section
from spmdrl.config.data import Place

Decay = Annotated[float, Field(ge=0, lt=1)]


class DeepspeedSection(Section):
    """DeepSpeed's ZeRO (https://arxiv.org/abs/1910.02054) for train.backend=deepspeed."""

    stage: Literal[1, 2, 3] = Field(
        2,
        description="Divide the optimizer's state over all ranks of the role (1), the gradients "
        "too (2), the weights too (3).",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="Let DeepSpeed hold the optimizer's state on the host and update it there, or "
        "(all, stage 3) the weights too.",
    )
    config: Place | None = Field(
        None,
        description="Read further settings from this DeepSpeed JSON; those that the run decides "
        "are refused by name.",
    )


BACKENDS = ("torch", "megatron", "deepspeed")
"""Names of `train.backend`; others are a user's `module:Class`."""


class TrainSection(Section):
    backend: Place = Field(
        "torch",
        description="Train with this backend: torch | megatron | deepspeed | module:Class; the "
        "second and third need their packages.",
    )
    backend_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Pass these keyword arguments to a module:Class of backend.",
    )
    deepspeed: DeepspeedSection = DeepspeedSection()
    epochs: Basic[int] = Field(
        1, ge=1, description="Pass over one step's samples this many times, at least 1."
    )
    num_minibatches: Basic[int] = Field(
        1, ge=1, description="Take this many optimizer steps per epoch, at least 1."
    )
    microbatch_tokens: Basic[int] = Field(
        8192, ge=1, description="Compute this many packed tokens at once on a replica, at least 1."
    )
    share_prompts: bool = Field(True, description="Compute a group's prompt once per microbatch.")
    recompute: Basic[Literal["none", "layer"]] = Field(
        "none",
        description="Recompute activations in the backward pass; layer keeps only the inputs of "
        "layers.",
    )
    compile: Literal["none", "blocks"] = Field(
        "none",
        description="Let torch's compiler fuse what decoder layers compute before and after "
        "attention (blocks), for a minute or two at the start.",
    )
    lr: Basic[float] = Field(
        1e-6, gt=0, description="Set AdamW's learning rate after warm-up, above 0."
    )
    schedule: Basic[Literal["constant", "linear", "cosine"]] = Field(
        "constant", description="Give the learning rate this shape after warm-up."
    )
    warmup_steps: Basic[int] = Field(
        0,
        ge=0,
        description="Warm the learning rate up linearly over this many optimizer steps, at least "
        "0.",
    )
    min_lr_ratio: Basic[float] = Field(
        0.0, ge=0, le=1, description="End linear and cosine schedules at this share of lr, 0 to 1."
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="Set AdamW's two betas, each at least 0 and below 1."
    )
    eps: float = Field(1e-8, gt=0, description="Set AdamW's epsilon, above 0.")
    weight_decay: Basic[float] = Field(
        0.0, ge=0, description="Set AdamW's weight decay, at least 0; it spares norms and biases."
    )
    clip_norm: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,
        description="Clip the norm of the whole gradient to this, above 0; .inf never clips.",
    )
    head_chunk: int = Field(
        1024, ge=1, description="Hold the logits of this many tokens at once, at least 1."
    )
    balance_coef: float = Field(
        0.0,
        ge=0,
        description="Weight a MoE's load-balancing loss, taken per response, by this, at least "
        "0; 0 turns it off.",
    )
