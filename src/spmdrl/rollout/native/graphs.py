"""CUDA graphs of whole decode steps, one per batch-size bucket, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spmdrl.rollout.native.scheduler import StepPlan
from spmdrl.rollout.native.varlen import VarlenAttention

Forward = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def buckets(largest: int) -> tuple[int, ...]:
    """List batch sizes to capture: 1, 2, 4, multiples of 8 (above 128 of 16 only), `largest`."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, largest + 16, 16)]
    return (*(n for n in sizes if n < largest), largest)


class DecodeGraphs:
    """Replays `forward(tokens [n], positions [n]) -> tensors [n, ...]` at padded batch sizes.

    A graph holds addresses: weights and cache must keep the addresses that they had at capture
    (their values may change), or `drop` must be called. All graphs share one memory pool.
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
        """Return `forward`'s result for a plan without chunks; the next run overwrites it."""
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
        with torch.cuda.stream(side):  # handles and tables made lazily must exist before capture
            self._forward(tokens, positions)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a capture does so too: memory that it frees is not the pool's
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        pool = next((held.pool() for held, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            results = self._forward(tokens, positions)
        self.pool_bytes += torch.cuda.memory_reserved() - before
        return graph, results
