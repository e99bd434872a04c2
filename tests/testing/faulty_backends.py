"""Backends that break one thing each, over the torch backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from spmdrl.batch import Batch
from spmdrl.models.local_shards import LocalTensors
from spmdrl.run.assembly.make_backend import make_backend
from spmdrl.training.backend_steps import pack_rows


class NormalisesPerRank:
    """Divides by the tokens that this rank has, so that ranks with few count as much."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward_backward(self, batch: Batch, *rest: Any, normaliser: float, **more: Any) -> Any:
        own = normaliser * max(batch.num_tokens, 1) / 100
        return self.inner.forward_backward(batch, *rest, normaliser=own, **more)


class ForgetsAMicrobatch:
    """Leaves out the rows of the last of several microbatches."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward_backward(self, batch: Batch, loss: Any, readout: Any, **more: Any) -> Any:
        packed = pack_rows(batch, self.inner.options, readout)
        if len(packed) > 1:
            forgotten = set(packed[-1].rows.tolist())
            batch = batch.select([i for i in range(len(batch)) if i not in forgotten])
        return self.inner.forward_backward(batch, loss, readout, **more)


class KeepsItsPart:
    """Hands out copies of the optimizer's tensors to be moved, and keeps its own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def parts(self) -> Any:
        found = self.inner.parts()
        if "optimizer" in found:
            found["optimizer"] = [tensor.clone() for tensor in found["optimizer"]]
        return found


class ShiftsSlices:
    """Says that a cut tensor starts one row further down than it does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def local_tensors(self) -> LocalTensors:
        return {
            name: (tensor, tuple(self._shifted(piece) for piece in slices))
            for name, (tensor, slices) in self.inner.local_tensors().items()
        }

    def _shifted(self, piece: Any) -> Any:
        if piece.stop[0] >= piece.shape[0]:
            return piece
        start, stop = ((at[0] + 1, *at[1:]) for at in (piece.start, piece.stop))
        return replace(piece, start=start, stop=stop)


class GroupsTheWorld:
    """Makes a process group of all ranks of the world, which those outside of its role lack."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.group = dist.new_group(list(range(dist.get_world_size())))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def make_faulty(fault: type, *made_from: Any) -> Any:
    inner = make_backend(*made_from)
    return None if inner is None else fault(inner)
