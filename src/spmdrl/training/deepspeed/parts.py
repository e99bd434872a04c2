"""`Parts`: what ZeRO updates on this rank, as boxes of the name space.

Norm and clipping are this project's: DeepSpeed's clip to the norm plus 1e-6, and neither leaves the
weights alone when the gradient is zero. So its own clipping is off, and gradients are scaled before
it steps; what shall not step is thrown away as it does at an overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.storages import storage_key
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.zero_layout import (
    FlatRange,
    Stage,
    ZeroParameter,
    named_pieces,
    shard_ranges,
)
from spmdrl.training.deepspeed.zero_optimizers import adapted
from spmdrl.training.optimizer import MOMENTS, average_gradients, fresh_state, gradient_norm
from spmdrl.training.weights import Leaf


class Parts:
    """This rank's float32 parts, their moments, and the gradients that reach them.

    Args:
        optimizer: DeepSpeed's, made from `parameter_groups(leaves)`.
        leaves: those that are trained, in order.
        parameters: what layouts say of each of them.
    """

    def __init__(
        self,
        optimizer: Any,
        leaves: Sequence[Leaf],
        parameters: Sequence[ZeroParameter],
        stage: Stage,
        mesh: Mesh,
    ) -> None:
        self._optimizer, self._mesh = optimizer, mesh
        shard, count = mesh.coordinate("reduce"), mesh.size("reduce")
        ranges = shard_ranges(parameters, stage, shard, count)
        self._zero = adapted(optimizer, [(leaf.parameter, ranges[leaf.name]) for leaf in leaves])
        self._leaves = {id(leaf.parameter): leaf for leaf in leaves}
        self._adamw: torch.optim.Optimizer = optimizer.optimizer
        self._state = {master: fresh_state(master.detach()) for master in self._zero.masters}
        self._adamw.state.update(self._state)
        self.tensors = self._boxes(parameters, ranges)
        """Masters (`weights/NAME`) and moments as boxes of the name space: the storage itself."""

    def _boxes(
        self, parameters: Sequence[ZeroParameter], ranges: dict[str, FlatRange]
    ) -> LocalTensors:
        """Make all boxes at once, because no view can be made of a storage that is away."""
        found: LocalTensors = {}
        for kind in ("weights", *MOMENTS):
            flats = [self._kind(master, kind) for master in self._zero.masters]
            for parameter in parameters:
                held = ranges[parameter.name]
                own = flats[held.group][held.offset : held.offset + held.stop - held.start]
                boxes = cut(parameter, own, held.start)
                found |= {f"{kind}/{name}": box for name, box in boxes.items()}
        return found

    def _kind(self, master: Tensor, kind: str) -> Tensor:
        return master.detach() if kind == "weights" else self._state[master][kind]

    @torch.no_grad()
    def fill(self, checkpoint: TensorSource) -> None:
        """Take the masters over from weights that are filled; read those of narrower weights, so
        that a float32 file loses nothing.
        """
        self._zero.refresh_masters()
        if self._zero.dtype != torch.float32:
            own = (box for name, box in self.tensors.items() if name.startswith("weights/"))
            fill(own, checkpoint)

    def hold(self) -> None:
        """Allocate what gradients are summed in, unless it is allocated already."""
        self._zero.hold()

    def complete(self) -> None:
        """Prepare the parameters for `Engine.reduce`."""
        self._zero.complete()

    @torch.no_grad()
    def norm(self, device: torch.device) -> Tensor:  # [] float64
        """Compute the norm of the whole gradient, equal on all ranks; call it after `reduce`."""
        self._zero.reduced()
        gradients = [(self._leaves[id(p)], own) for p, own in self._zero.gradients()]
        # tensor-parallel copies must not drift apart, see `average_gradients`
        copies = [own for leaf, own in gradients if leaf.copied_over == "tp"]
        average_gradients(copies, self._mesh.group("tp"))
        is_first = self._mesh.coordinate("tp") == 0
        counted = [own for leaf, own in gradients if is_first or leaf.copied_over is None]
        on_device = [own.to(device) for own in counted]
        return gradient_norm(on_device, [self._mesh.group("all")], device)

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """Update the parts with `scale` times the gradient, and the weights from them."""
        if scale != 1.0:
            gradients = [own for _, own in self._zero.gradients()]
            if gradients:
                torch._foreach_mul_(gradients, scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._clear()

    def discard(self) -> None:
        """Throw the gradient away."""
        self._zero.discard()
        self._clear()

    def _clear(self) -> None:
        self._optimizer.zero_grad()
        self._zero.clear()

    def parts(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Return the moments, and the masters that are not the weights themselves."""
        masters = self._zero.masters
        moments = [self._state[master][name] for master in masters for name in MOMENTS]
        shared = {storage_key(tensor.untyped_storage()) for tensor in weights}
        own = [m.detach() for m in masters if storage_key(m.untyped_storage()) not in shared]
        return [*own, *moments]

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Round the masters into the weights, and gather the weights over the ranks."""
        self._zero.refresh_weights()

    def set_step_count(self, count: int) -> None:
        """Tell AdamW's bias correction how many updates the moments have seen."""
        for state in self._state.values():
            state["step"].fill_(count)


def cut(
    parameter: ZeroParameter,
    flat: Tensor,  # values of the flattened parameter from `start` on
    start: int,
) -> LocalTensors:
    """Cut a flat part of a parameter into boxes, by their local names; none if it is empty."""
    return {
        name: (
            flat[piece.start - start : piece.stop - start].view(piece.shape),
            piece.slices,
        )
        for name, piece in named_pieces(parameter, start, start + len(flat))
    }


def zero_parameter(leaf: Leaf) -> ZeroParameter:
    """Return what layouts say of a leaf that is whole."""
    return ZeroParameter(
        name=leaf.name,
        shape=tuple(leaf.weight.shape),
        slices=leaf.slices,
        trained=leaf.trained,
        decay=leaf.decay,
    )


def parameter_groups(leaves: Iterable[Leaf], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups over leaves that are trained: with weight decay, and without."""
    held = list(leaves)
    groups = [
        {
            "params": [leaf.parameter for leaf in held if leaf.decay is decay],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return [group for group in groups if group["params"]]
