"""`DecodeGraphs`: decode steps as CUDA graphs, for a few batch sizes to which steps are padded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[..., tuple[Tensor, ...]]


def buckets(largest: int) -> tuple[int, ...]:
    """List batch sizes to capture: 1, 4, 8, 16, 32, 64, then twice per doubling, and `largest`.

    A decode step of few samples takes the time of reading the weights, so padding costs little.
    """
    sizes, size = [1, 4, 8, 16, 32], 64
    while size < largest:
        sizes += [size, size * 3 // 2]
        size *= 2
    return (*(n for n in sizes if n < largest), largest)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Captured:
    """A graph, the tensors that it reads in place, and the results that it overwrites."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    results: tuple[Tensor, ...]


class DecodeGraphs:
    """Graphs by batch size (and variant of the step), captured when first needed.

    A graph holds addresses: weights and cache must keep the addresses that they had at capture
    (their values may change), or `drop` must be called. All graphs share one memory pool, which the
    largest fills: a call decodes most samples at its beginning.

    Args:
        max_running: most samples of a step.
    """

    def __init__(self, max_running: int, device: torch.device) -> None:
        self._sizes, self._device = buckets(max_running), device
        # One for all captures, because cuBLAS keeps a workspace for each stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: dict[tuple[int, Hashable], _Captured] = {}
        self.pool_bytes = 0

    def size_for(self, num_samples: int) -> int:
        """Return the batch size to which a step must be padded."""
        return next(size for size in self._sizes if size >= num_samples)

    def run(
        self,
        size: int,
        inputs: Sequence[Tensor],
        forward: Forward,
        variant: Hashable = None,
        *,
        idle: Callable[[], Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        """Return `forward(*inputs)`; the next run overwrites it.

        Args:
            inputs: tensors on the device, the same ones whenever `size` and `variant` are the same:
                the graph reads them where they lie.
            forward: function of them that only launches kernels, the same for one variant.
            idle: makes other inputs of these shapes with which `forward` changes nothing that
                counts: it runs once before its capture, and states may advance once only.
        """
        key = (size, variant)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs, idle(), forward)
        captured = self._captured[key]
        assert all(
            a.data_ptr() == b.data_ptr() for a, b in zip(captured.inputs, inputs, strict=True)
        )
        captured.graph.replay()
        return captured.results

    def drop(self) -> None:
        """Free the graphs and their memory pool."""
        self._captured.clear()
        self.pool_bytes = 0

    def _capture(
        self, inputs: Sequence[Tensor], idle: Sequence[Tensor], forward: Forward
    ) -> _Captured:
        pool = next((other.graph.pool() for other in self._captured.values()), None)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # Not by `torch.cuda.graph`, which waits for the device and empties the allocator's caches.
        with torch.cuda.stream(self._stream), _no_collection():
            forward(*idle)  # kernels and tables that are made lazily must exist before capture
            before = torch.cuda.memory_reserved(self._device)
            graph.capture_begin(pool=pool)
            try:
                results = forward(*inputs)
            finally:
                graph.capture_end()
            self.pool_bytes += torch.cuda.memory_reserved(self._device) - before
        current.wait_stream(self._stream)
        return _Captured(graph=graph, inputs=inputs, results=results)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let no finaliser of garbage run inside: one that unpins memory would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
