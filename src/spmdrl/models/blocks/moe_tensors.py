"""The tensors of a layer's router and experts, in each form that files have them."""

from __future__ import annotations

from spmdrl.models.blocks.dense_mlp import mlp_tensors
from spmdrl.models.specs import DenseMlp, MoeMlp
from spmdrl.models.tensors import GlobalTensor, TpSplit


def moe_tensors(spec: MoeMlp, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names of a layer's router and experts to their tensors, named by
    `family.STANDARD`'s keys.
    """
    count = spec.num_experts
    table: dict[str, tuple[GlobalTensor, ...]] = {}

    def one(name: str, *shape: int, is_buffer: bool = False) -> None:
        table[name] = (GlobalTensor(name=name, shape=shape, is_buffer=is_buffer),)

    one("mlp.router.weight", count, hidden)
    if spec.router_bias:
        one("mlp.router.bias", count)
    if spec.correction:
        one("mlp.router.correction", count, is_buffer=True)
    table |= _each(spec, hidden) if spec.form == "each" else _stacked(spec, hidden)
    if spec.shared is not None:
        table |= mlp_tensors(DenseMlp(width=spec.shared.width), hidden, "mlp.shared")
        if spec.shared.gate:
            one("mlp.shared_gate.weight", 1, hidden)
    return table


def _each(spec: MoeMlp, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Tensors of experts whose files hold every matrix by itself."""
    assert not spec.expert_bias, "only stacked experts have biases"
    wide, narrow = (spec.width, hidden), (hidden, spec.width)

    def tensor(part: str, expert: int) -> GlobalTensor:
        is_down = part == "down"
        return GlobalTensor(
            name=f"mlp.experts.{part}.weight",
            shape=narrow if is_down else wide,
            split=TpSplit.COLUMNS if is_down else TpSplit.ROWS,
            expert=expert,
            num_experts=spec.num_experts,
        )

    every = range(spec.num_experts)
    return {
        "mlp.experts.gate_up": tuple(tensor(part, i) for i in every for part in ("gate", "up")),
        "mlp.experts.down": tuple(tensor("down", i) for i in every),
    }


def _stacked(spec: MoeMlp, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Tensors of experts whose files hold all matrices of a layer in one tensor."""
    width, count = spec.width, spec.num_experts

    def tensors(name: str, split: TpSplit, *sizes: int, halves: bool = False) -> None:
        regions = [(0, width), (width, 2 * width)] if halves else [None]
        table[name.replace("all_", "")] = tuple(
            GlobalTensor(
                name=name,
                shape=(count, *sizes),
                split=split,
                region=region,
                expert=expert,
                is_stacked=True,
                num_experts=count,
            )
            for expert in range(count)
            for region in regions
        )

    table: dict[str, tuple[GlobalTensor, ...]] = {}
    if spec.form == "stacked":
        tensors("mlp.experts.all_gate_up", TpSplit.ROWS, 2 * width, hidden, halves=True)
        tensors("mlp.experts.all_down", TpSplit.COLUMNS, hidden, width)
    else:
        tensors("mlp.experts.all_gate_up", TpSplit.COLUMNS, hidden, 2 * width)
        tensors("mlp.experts.all_down", TpSplit.ROWS, width, hidden)
    if spec.expert_bias:
        assert spec.form == "transposed", "a cut of gate and up side by side needs two boxes"
        tensors("mlp.experts.all_gate_up_bias", TpSplit.COLUMNS, 2 * width)
        tensors("mlp.experts.all_down_bias", TpSplit.NONE, hidden)
    return table
