"""A gated MLP: gate and up in one projection, an activation, down."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spmdrl.distributed.parallel import copy_to
from spmdrl.models.blocks.activations import gated
from spmdrl.models.blocks.projections import Build
from spmdrl.models.low_rank import Added, Applied, added_to
from spmdrl.models.specs import DenseMlp
from spmdrl.models.tensors import GlobalTensor, TpSplit


class Mlp(nn.Module):
    """The module of a `DenseMlp`."""

    def __init__(self, spec: DenseMlp, hidden: int, build: Build) -> None:
        super().__init__()
        self.spec, self.tp, self.blocks = spec, build.tp, build.blocks
        width = spec.width // build.tp.size
        self.gate_up = build.projection(2 * width, hidden, bias=spec.bias)
        self.down = build.projection(hidden, width, bias=spec.bias)

    def forward(self, x: Tensor, layer: int, adapters: Sequence[Applied] = ()) -> Tensor:
        to_gate_up = added_to(adapters, f"layers.{layer}.mlp.gate_up")
        return self.of(x, to_gate_up, added_to(adapters, f"layers.{layer}.mlp.down"))

    def of(self, x: Tensor, to_gate_up: Added, to_down: Added) -> Tensor:
        gate_up = self.gate_up(copy_to(x, self.tp.group), to_gate_up)
        # a block's gate and up each
        parts = gated(gate_up.view(len(gate_up) * self.blocks, -1), self.spec.activation)
        return self.down.reduced(parts.view(len(gate_up), -1), self.tp, to_down)


def mlp_tensors(
    spec: DenseMlp, hidden: int, prefix: str = "mlp"
) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names of an MLP to its tensors, named by `family.STANDARD`'s keys."""

    def fused(kind: str, *columns: int) -> tuple[GlobalTensor, ...]:
        return tuple(
            GlobalTensor(
                name=f"{prefix}.{part}.{kind}", shape=(spec.width, *columns), split=TpSplit.ROWS
            )
            for part in ("gate", "up")
        )

    table = {f"{prefix}.gate_up.weight": fused("weight", hidden)}
    if spec.bias:
        table[f"{prefix}.gate_up.bias"] = fused("bias")
    name = f"{prefix}.down.weight"
    table[name] = (GlobalTensor(name=name, shape=(hidden, spec.width), split=TpSplit.COLUMNS),)
    if spec.bias:
        name = f"{prefix}.down.bias"
        table[name] = (GlobalTensor(name=name, shape=(hidden,)),)
    return table
