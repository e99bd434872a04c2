"""`AdapterNoise`: noise in the B of a policy's adapter, which is 0 when training begins.

A model with such an adapter computes what the base does, so that no comparison of log-probabilities
shows whether the adapter is applied at all. With noise in B it does. Each rank fills its own
tensors, with equal noise for equal boxes, and gets its values back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from spmdrl.distributed.reduce import world_sum
from spmdrl.keyed_random import key64, token_hash
from spmdrl.models.adapters import Adapter
from spmdrl.models.local_shards import LocalTensors, local_box
from spmdrl.models.tensors import Slice

View = Callable[[Tensor], Tensor]
"""Returns a tensor's current values, to read and to write."""

_Held = Mapping[str, Sequence[tuple[Tensor, Slice]]]

_MASK = (1 << 32) - 1


class AdapterNoise:
    """The B of an adapter's targets on this rank, with noise or with its own values.

    Every rank of the world makes it, and calls `fill` with the same arguments.

    Args:
        tensors: the policy's tensors on this rank; empty outside it.
        view: see `View`.
    """

    def __init__(self, adapter: Adapter, tensors: LocalTensors, view: View) -> None:
        self._targets, self._view = adapter.distinct, view
        self._names = {target: adapter.factors(target) for target in self._targets}
        self._a = _held(tensors, {a for a, _ in self._names.values()})
        self._b = _held(tensors, {b for _, b in self._names.values()})
        self._own: list[tuple[Tensor, Tensor]] = []
        self._units: dict[str, float] | None = None

    @torch.no_grad()
    def fill(self, size: float, targets: Collection[str]) -> None:
        """Write noise into the B of these targets, and zeros into the others'.

        Args:
            targets: some of `Adapter.distinct`.
            size: about the root mean square of a target's addition, relative to that of its input.
        """
        if self._units is None:
            self._units = self._find_units()
        if not self._own:
            held = {id(tensor): tensor for boxes in self._b.values() for tensor, _ in boxes}
            self._own = [(tensor, self._view(tensor).clone()) for tensor in held.values()]
        for target, (_, name) in self._names.items():
            for tensor, piece in self._b.get(name, ()):
                box = local_box(self._view(tensor), piece)
                if target in targets:
                    box.copy_(_noise(name, piece, box.device).mul_(size * self._units[target]))
                else:
                    box.zero_()

    @torch.no_grad()
    def restore(self) -> None:
        """Give B its own values again."""
        for tensor, values in self._own:
            self._view(tensor).copy_(values)
        self._own = []

    def _find_units(self) -> dict[str, float]:
        """Target -> the largest value of its noise at which an addition is as large as its input.

        For an input with elements of size 1, an element of A x is about rms(A) sqrt(columns), and
        one of B u about rms(B) sqrt(rank) times that; uniform noise has rms(B) = largest / sqrt(3).
        """
        targets = self._targets
        sums = torch.zeros(len(targets), 2, dtype=torch.float64)
        for number, target in enumerate(targets):
            for tensor, piece in self._a.get(self._names[target][0], ()):
                box = local_box(self._view(tensor), piece)
                sums[number, 0] += float(box.double().square().sum()) * piece.shape[1]
                sums[number, 1] += box.numel()
        units = {}
        for (target, own), (squares, count) in zip(
            targets.items(), world_sum(sums).tolist(), strict=True
        ):
            reach = abs(own.scale) * math.sqrt(squares / max(1, count) * own.rank)
            units[target] = math.sqrt(3) / reach if reach else 0.0
        return units


def _held(tensors: LocalTensors, names: Collection[str]) -> _Held:
    found: dict[str, list[tuple[Tensor, Slice]]] = {}
    for tensor, slices in tensors.values():
        for piece in slices:
            if piece.name in names:
                found.setdefault(piece.name, []).append((tensor, piece))
    return found


def _noise(name: str, piece: Slice, device: torch.device) -> Tensor:
    """Numbers between -1 and 1, float32, that depend on the name and the places in the whole."""
    rows = torch.arange(piece.start[0], piece.stop[0], device=device)[:, None]
    columns = torch.arange(piece.start[1], piece.stop[1], device=device)
    places = rows * piece.shape[1] + columns + (key64(*name.encode()) & _MASK)
    return token_hash(places & _MASK).float() / 2**31
