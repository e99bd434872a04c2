"""`Runner`: one engine step on the device, from a plan to logits (and to the chosen experts).

CUDA graphs of whole decode steps, one per batch-size bucket, captured when first needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.decoder import Decoder
from spmdrl.models.linear import linear
from spmdrl.models.routing import Routing, pack_choices
from spmdrl.rollout.native.attention import PagedAttention
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


class Runner:
    """Runs the decoder over a step's tokens.

    Args:
        graph_sequences: most samples of a decode step that is captured as a CUDA graph; 0: never.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        device: torch.device,
        *,
        graph_sequences: int = 0,
    ) -> None:
        self._decoder, self._attention, self._device = decoder, attention, device
        self.graphs: DecodeGraphs | None = None
        if graph_sequences:
            assert isinstance(attention, VarlenAttention)
            self.graphs = DecodeGraphs(self._forward_all, attention, graph_sequences)

    def run(self, plan: StepPlan, *, all_rows: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute float32 logits `[R, V]` of the rows that are sampled: decodes, then last chunks;
        for a mixture of experts also the packed choices `[rows, L, K]` of all rows.

        The caller may overwrite them, and the next step does.

        Args:
            all_rows: compute logits of every row of the step instead.
        """
        tokens, positions, rows = flatten(plan)
        token_ids = torch.tensor(tokens, device=self._device)
        places = torch.tensor(positions, device=self._device)
        if self.graphs is not None and not plan.chunks:
            logits, *chosen = self.graphs.run(plan, token_ids, places)
            return logits.float(), next(iter(chosen), None)
        self._attention.prepare(plan)
        hidden, *chosen = self._decode(token_ids, places)
        if len(rows) < len(tokens) and not all_rows:
            hidden = hidden[torch.tensor(rows, device=self._device, dtype=torch.int64)]
        return self._project(hidden).float(), next(iter(chosen), None)

    def _forward_all(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        hidden, *chosen = self._decode(tokens, positions)
        return (self._project(hidden), *chosen)

    def _decode(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Compute hidden states, and for a mixture of experts its packed choices."""
        moe = self._decoder.model.moe
        if moe is None:
            return (self._decoder(tokens, positions, self._attention),)
        routing = Routing(moe)
        hidden = self._decoder(tokens, positions, self._attention, routing=routing)
        return hidden, pack_choices(routing.chosen(), moe.num_experts)

    def _project(self, hidden: Tensor) -> Tensor:  # [R, D] -> [R, V]
        head = self._decoder.head_holder
        logits = linear(hidden, head.weight, blocked=head.blocked)
        tp = self._decoder.tp
        if tp.group is None:
            return logits
        parts = [torch.empty_like(logits) for _ in range(tp.size)]
        dist.all_gather(parts, logits, group=tp.group)
        return torch.cat(parts, dim=1)


def flatten(plan: StepPlan) -> tuple[list[int], list[int], list[int]]:
    """List tokens and positions of all rows of a step, and the rows whose next token is drawn."""
    tokens = [s.tokens[s.cached - 1] for s in plan.decodes]
    positions = [s.cached - 1 for s in plan.decodes]
    rows = list(range(len(tokens)))
    for chunk in plan.chunks:
        tokens += chunk.sample.tokens[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        if chunk.is_last:
            rows.append(len(tokens) - 1)
    return tokens, positions, rows
