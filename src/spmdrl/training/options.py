"""Options of a role's training, and the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from spmdrl.models.decoder import Recompute

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Args:
    microbatch_tokens: stream tokens that one replica computes at once.
    recompute: `layer` keeps only each layer's input for the backward pass.
    share_prompts: whether the prompt of a group's rows is computed once.
    attention: the key `model.attention`, see `models.attention`.
    lr: learning rate after warm-up.
    betas, eps, weight_decay: AdamW's (Loshchilov & Hutter 2019); 1-d parameters do not decay.
    schedule: course from `lr` to `lr * min_lr_ratio` between `warmup_steps` and `total_steps`.
    clip_norm: largest norm of the whole gradient.
    param_dtype: dtype in which the model computes; the optimizer's weights are always float32.
    head_chunk: tokens whose logits are held at once.
    balance_coef: weight of the experts' load-balancing loss, see `models.routing.Balance`.
    frozen: Hugging Face names of parameters that do not change.
    blocks: number of blocks of fused projections, see `models.sharding.all_slices`.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    microbatch_tokens: int = 8192
    recompute: Recompute = "none"
    share_prompts: bool = True
    attention: str = "auto"
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    min_lr_ratio: float = 0.0
    clip_norm: float = 1.0
    param_dtype: torch.dtype = torch.float32
    head_chunk: int = 1024
    balance_coef: float = 0.0
    frozen: frozenset[str] = frozenset()
    blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("microbatch_tokens", "total_steps", "head_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm}: it must be positive")
        if self.balance_coef < 0:
            raise ValueError(f"balance_coef={self.balance_coef}: it must not be negative")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: it must not be negative")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule={self.schedule!r}: one of {get_args(Schedule)}")
        if self.recompute not in get_args(Recompute):
            raise ValueError(f"recompute={self.recompute!r}: one of {get_args(Recompute)}")
        if self.param_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"param_dtype={self.param_dtype}: float32 or bfloat16")


def lr_at(step: int, options: TrainOptions) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    It rises linearly during warm-up, lr (step + 1) / warmup_steps. Then `linear` and `cosine` fall
    from lr and would reach lr * min_lr_ratio at step total_steps, one after the last.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    length = max(1, options.total_steps - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / length)
    if options.schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return options.lr * (1 - (1 - options.min_lr_ratio) * progress)
