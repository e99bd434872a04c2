"""Options of a role's training, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from pydantic import ConfigDict, Field, field_validator

from spmdrl.config.training import TrainSection
from spmdrl.memory.host_state import HostState


class TrainOptions(TrainSection):
    """A role's `train` section with what the run adds to it.

    Args:
        attention: the key `model.attention`, see `models.attention`.
        total_steps: optimizer steps, at the last of which `schedule` ends.
        param_dtype: dtype in which the model computes; the optimizer's weights are always float32.
        frozen: Hugging Face names of parameters that do not change.
        blocks: number of blocks of fused projections, see `models.sharding.all_slices`.
        seed: the run's seed, for an adapter's dropout.
        host_state: what holds masters and moments on the host, where they do not fit on the device;
            None: they are there.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    attention: str = "auto"
    total_steps: int = Field(1, ge=1)
    param_dtype: torch.dtype = torch.float32
    frozen: frozenset[str] = frozenset()
    blocks: int = 1
    seed: int = 0
    host_state: HostState | None = None

    @field_validator("param_dtype")
    @classmethod
    def _is_supported(cls, value: torch.dtype) -> torch.dtype:
        if value not in (torch.float32, torch.bfloat16):
            raise ValueError("it must be float32 or bfloat16")
        return value


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
