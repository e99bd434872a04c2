"""Small tensors between the host and a device, side by side in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy host tensors to the device. On CUDA it is one copy, for which the host does not wait,
    and the results share one buffer, which lives as long as any of them.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return unpack(pack(tensors).to(device, non_blocking=True), tensors)


class Arriving:
    """Tensors of one device on their way to the host: on CUDA in one copy, which follows the work
    that was asked of the device so far, and nothing that is asked of it later.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        if self._tensors and self._tensors[0].is_cuda:
            packed = torch.cat(_as_bytes(tensors))
            self._host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[Tensor]:
        """Return the tensors on the host, when they are there."""
        if self._event is None:
            return [tensor.cpu() for tensor in self._tensors]
        self._event.synchronize()
        return unpack(self._host, self._tensors)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the host: on CUDA in one copy, for which the host waits."""
    return Arriving(tensors).wait()


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Copy host tensors into one buffer of bytes, which is pinned."""
    packed = torch.empty(sum(t.nbytes for t in tensors), dtype=torch.uint8, pin_memory=True)
    return torch.cat(_as_bytes(tensors), out=packed)


def unpack(packed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors over a buffer, with the dtypes and shapes of those that were packed in it."""
    found: dict[int, Tensor] = {}
    start = 0
    for i in _wide_first(tensors):
        stop = start + tensors[i].nbytes
        # `data`: for autograd a write to one of them is no change of the others, as of views
        found[i] = packed[start:stop].view(tensors[i].dtype).view(tensors[i].shape).data
        start = stop
    return [found[i] for i in range(len(tensors))]


def _as_bytes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors' bytes in a buffer's order."""
    bytes_of = [
        # an empty tensor may have any strides
        tensor.contiguous().view(-1).view(torch.uint8)
        if tensor.numel()
        else tensor.new_empty(0, dtype=torch.uint8)
        for tensor in tensors
    ]
    return [bytes_of[i] for i in _wide_first(tensors)]


def _wide_first(tensors: Sequence[Tensor]) -> list[int]:
    """Order in a buffer: each tensor then begins at a multiple of its elements' size."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
