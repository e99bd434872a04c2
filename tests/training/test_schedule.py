"""The learning-rate schedule and gradient sums by hand."""

from __future__ import annotations

import pytest
import torch

from spmdrl.training.optimizer import all_reduce_gradients, gradient_norm
from spmdrl.training.options import TrainOptions, lr_at


def rates(options: TrainOptions, num_steps: int) -> list[float]:
    return [lr_at(step, options) for step in range(num_steps)]


def test_schedules_by_hand() -> None:
    options = TrainOptions(lr=1.0, warmup_steps=2, total_steps=6)
    assert rates(options, 8) == [0.5, 1, 1, 1, 1, 1, 1, 1]
    linear = options.model_copy(update={"schedule": "linear"})
    assert rates(linear, 8) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0])
    floor = linear.model_copy(update={"min_lr_ratio": 0.2})
    assert rates(floor, 8) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    cosine = floor.model_copy(update={"schedule": "cosine", "min_lr_ratio": 0.0})
    assert rates(cosine, 7) == pytest.approx([0.5, 1, 1, 0.8535534, 0.5, 0.1464466, 0])


def test_a_schedule_without_warm_up_starts_at_lr() -> None:
    options = TrainOptions(lr=0.1, schedule="linear", total_steps=4)
    assert rates(options, 4) == pytest.approx([0.1, 0.075, 0.05, 0.025])
    all_warm_up = TrainOptions(lr=1.0, schedule="cosine", warmup_steps=4, total_steps=4)
    assert rates(all_warm_up, 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_bad_options_are_named() -> None:
    for changes in (
        {"microbatch_tokens": 0},
        {"clip_norm": 0.0},
        {"warmup_steps": -1},
        {"schedule": "step"},
        {"recompute": "all"},
        {"param_dtype": torch.float16},
    ):
        (name,) = changes
        with pytest.raises(ValueError, match=name):
            TrainOptions(**changes)


def test_the_norm_is_exact_where_float32_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) * 3 for n in (0, 1, 1023, 300_000)]
    exact = torch.cat(parts).double().norm().item()
    cpu = torch.device("cpu")
    assert gradient_norm(parts, [None], cpu).item() == pytest.approx(exact, rel=1e-8)
    assert gradient_norm([], [], cpu).item() == 0.0
    assert gradient_norm([torch.tensor([float("nan")])], [], cpu).isnan()
    all_reduce_gradients(parts, None)
