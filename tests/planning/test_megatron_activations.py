"""Working memory of Megatron's calls, as Korthikanti et al. 2022 count it for sequence parallelism
and the interleaved schedule (https://arxiv.org/abs/2205.05198).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.models.config import ModelConfig, parse_config, resized
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.role_spec import RoleSpec

MODEL = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 2000,
        "hidden_size": 256,
        "intermediate_size": 680,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
    }
)
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def spec_of(
    model: ModelConfig, degrees: dict[str, int], megatron: dict[str, Any], **train: object
) -> RoleSpec:
    placement = {**dict.fromkeys(AXES, 1), **degrees}
    ranks = range(placement["pp"] * placement["tp"])
    return RoleSpec(
        name="policy",
        kind="policy",
        section=RoleSection.model_validate({"megatron": megatron}),
        train=TrainSection.model_validate(train),
        placement=Placement(ranks=tuple(ranks), degrees=placement),
        path=Path("model"),
        model=model,
        device_type="cpu",
        dtype=torch.float32,
        trained=True,
        backend="megatron",
        is_tiny=False,
    )


def layer_bytes(recompute: str, degrees: dict[str, int], **megatron: object) -> float:
    """Bytes that one more layer adds to an update."""

    def work(layers: int) -> int:
        model = resized(MODEL, {"num_hidden_layers": layers})
        spec = spec_of(model, degrees, megatron, recompute=recompute)
        return working_bytes(spec, 4096, backward=True)

    return (work(32) - work(16)) / 16


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_layers_keep_what_the_paper_counts(recompute: str) -> None:
    whole = layer_bytes(recompute, {})
    # equation 4: all that a layer keeps is divided by t
    assert layer_bytes(recompute, {"tp": 8}, sp=True) == pytest.approx(whole / 8, rel=1e-6)
    assert layer_bytes(recompute, {"tp": 8}) > whole / 8 * 1.5
    # section 4.2.3: a stage has as many microbatches as there are stages, or with m runs of layers
    # 1 + (p - 1) / (p m) times that
    assert layer_bytes(recompute, {"pp": 4}) == pytest.approx(whole)
    for runs in (2, 4):
        found = layer_bytes(recompute, {"pp": 4}, vpp=runs)
        assert found == pytest.approx(whole * (1 + 3 / (4 * runs)), rel=1e-6)


def test_rows_of_experts_are_shared_with_the_tokens() -> None:
    experts = parse_config(
        {
            **MODEL.source,
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 192,
        }
    )

    def forward(ep: int, **megatron: object) -> int:
        degrees = {"tp": 4, "ep": ep}
        spec = spec_of(experts, degrees, megatron, head_chunk=16)
        return working_bytes(spec, 4096, backward=False)

    assert forward(4, sp=True) < forward(1, sp=True) < forward(1)
