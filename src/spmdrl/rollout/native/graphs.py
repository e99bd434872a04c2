"""CUDA graphs of whole decode steps, one for each batch-size bucket, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scheduler import StepPlan
from .varlen import VarlenAttention

Forward = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes to capture: 1, 2, 4, 8, then steps of 8, and of 16 above 128; up to `largest`."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, largest + 16, 16)]
    return (*(n for n in sizes if n < largest), largest)


class DecodeGraphs:
    """Replays `forward(tokens [n], positions [n]) -> tensors [n, ...]` at padded batch sizes.

    A graph holds addresses: weights and cache must stay where they were at capture (their values
    may change), or `drop` must be called. All graphs share one memory pool.
    """

    def __init__(self, forward: Forward, attention: VarlenAttention, max_running: int) -> None:
        self._forward, self._attention = forward, attention
        self._sizes = buckets(max_running)
        device = torch.device("cuda", torch.cuda.current_device())
        self._tokens = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.pool_bytes = 0

    def run(self, plan: StepPlan, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What `forward` gives for a plan without chunks; overwritten by the next run."""
        n = len(plan.decodes)
        size = next(s for s in self._sizes if s >= n)
        self._tokens[:n].copy_(tokens, non_blocking=True)
        self._positions[:n].copy_(positions, non_blocking=True)
        self._attention.prepare(plan, pad_to=size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, results = self._graphs[size]
        graph.replay()
        return tuple(result[:n] for result in results)

    def drop(self) -> None:
        self._graphs.clear()
        self.pool_bytes = 0

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        tokens, positions = self._tokens[:size], self._positions[:size]
        side = torch.cuda.Stream(tokens.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazily made handles and tables may not be made in capture
            self._forward(tokens, positions)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as a capture does: what it frees is not the pool's
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        pool = next((held.pool() for held, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            results = self._forward(tokens, positions)
        self.pool_bytes += torch.cuda.memory_reserved() - before
        return graph, results
