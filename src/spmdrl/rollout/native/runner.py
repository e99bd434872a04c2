"""`Runner`: one engine step on the device, from a plan to logits (and to the chosen experts)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.decoder import Decoder
from spmdrl.models.linear import linear
from spmdrl.models.routing import Routing, pack_choices
from spmdrl.rollout.native.attention import PagedAttention
from spmdrl.rollout.native.graphs import DecodeGraphs
from spmdrl.rollout.native.scheduler import StepPlan
from spmdrl.rollout.native.varlen import VarlenAttention


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
