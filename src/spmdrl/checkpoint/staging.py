"""Copies of tensors on the host, from which a thread writes a checkpoint behind the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spmdrl.memory.arena import ALIGNMENT, HostArena

PURPOSE = "the copies that a checkpoint is written from"


class Staging:
    """Arenas that are used again for the next checkpoint: a page-locked one for what comes from a
    device, and another one for tensors of the host.
    """

    def __init__(self) -> None:
        self._arenas: dict[bool, HostArena] = {}

    @torch.no_grad()
    def copies(
        self, tensors: Mapping[str, Tensor], progress: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Copy the tensors; the copies are valid until the next call.

        Args:
            progress: called after each tensor.

        Raises:
            ValueError: the host refuses the memory.
        """
        offsets, totals = {}, {True: 0, False: 0}
        for name, tensor in tensors.items():
            offsets[name] = totals[tensor.is_cuda]
            totals[tensor.is_cuda] += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        for pinned, total in totals.items():
            if pinned in self._arenas and self._arenas[pinned].bytes.numel() >= total:
                continue
            self._arenas.pop(pinned, None)  # frees the smaller one first
            if total:
                self._arenas[pinned] = HostArena(total, pinned=pinned, purpose=PURPOSE)
        staged = {}
        for name, tensor in tensors.items():
            if tensor.nbytes == 0:
                staged[name] = torch.empty_like(tensor, device="cpu")
                continue
            start = offsets[name]
            place = self._arenas[tensor.is_cuda].bytes[start : start + tensor.nbytes]
            staged[name] = place.view(tensor.dtype).view(tensor.shape)
            staged[name].copy_(tensor, non_blocking=True)
            progress()
        if totals[True]:
            torch.cuda.synchronize()
        return staged
