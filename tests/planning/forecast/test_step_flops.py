"""Operations of a step are the models': no layout and no recomputation changes their number."""

from __future__ import annotations

from typing import Any

import pytest

from forecast_cases import config_of, llama
from spmdrl.config.sections import Config
from spmdrl.planning.forecast.forecast import StepFlops
from spmdrl.planning.forecast.step import Lengths
from spmdrl.planning.from_shapes import plan_from_shapes

SIZES = {"layers": 4, "hidden": 1024, "mlp": 2816, "heads": 16, "kv_heads": 8, "vocab": 32000}
ITEMS = 64


def flops_of(config: Config, lengths: Lengths) -> dict[str, float]:
    models = dict.fromkeys(config.roles, llama(**SIZES))
    plan = plan_from_shapes(
        config, 8, 8, device_type="cuda", device_bytes=80 * 10**9, models=models
    )
    return StepFlops(config, plan).of(lengths)


def test_an_update_is_six_operations_per_weight_and_token() -> None:
    """Rows are short, so attention hardly counts; the last token of each is only predicted."""
    tokens = 129.0
    [(phase, found)] = flops_of(
        config_of("sft", {"policy": {}}), Lengths(prompt=0, response=tokens, longest=tokens)
    ).items()
    hidden, mlp = SIZES["hidden"], SIZES["mlp"]
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * mlp
    weights = SIZES["layers"] * layer + hidden * SIZES["vocab"]
    assert phase == "update"
    assert found == pytest.approx(6 * weights * ITEMS * (tokens - 1), rel=0.02)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp2 pp2": {"tp": 2, "pp": 2, "train": {"backend": "megatron"}},
    "cp2 recompute": {"cp": 2, "train": {"recompute": "layer"}},
}


def test_layouts_do_not_change_their_number() -> None:
    lengths = Lengths(prompt=100, response=300, longest=400)
    found = {}
    for name, layout in LAYOUTS.items():
        rollout = {"ranks": "same as policy", **({"tp": 2} if "tp" in layout else {})}
        roles = {"policy": layout, "rollout": rollout, "reference": {"ranks": "same as policy"}}
        config = config_of(
            "grpo",
            roles,
            rewards=[{"function": "math"}],
            algorithm={"kl_coef": 0.05},
            sampling={"max_tokens": 400},
        )
        found[name] = flops_of(config, lengths)
    one = found.pop("dp")
    assert one.keys() == {"rollout", "logprobs", "update"}
    for name, other in found.items():
        assert other == pytest.approx(one, rel=1e-3), name
