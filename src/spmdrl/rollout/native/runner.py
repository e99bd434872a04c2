"""`Runner`: one engine step on the device, from a plan to logits (and to the chosen experts)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.decoder import Decoder
from spmdrl.models.linear import wide_linear
from spmdrl.models.routing import Routing, pack_choices
from spmdrl.models.softcap import cap_logits
from spmdrl.rollout.native.adapters import NO_ADAPTERS, CallAdapters
from spmdrl.rollout.native.attention import PagedAttention, copy_blocks
from spmdrl.rollout.native.graphs import DecodeGraphs
from spmdrl.rollout.native.recurrent import MixedAttention
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.native.varlen import VarlenAttention


class Runner:
    """Runs the decoder over a step's tokens.

    Args:
        graphs: replays steps that only decode, as CUDA graphs, if given.
        adapters: adapters that apply, by the samples' requests.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        device: torch.device,
        *,
        graphs: DecodeGraphs | None = None,
        adapters: CallAdapters = NO_ADAPTERS,
    ) -> None:
        self._decoder, self._attention, self._device = decoder, attention, device
        self._graphs, self._adapters = graphs, adapters

    def applying(self, adapters: CallAdapters) -> Runner:
        """Return a runner over the same cache and graphs that applies these adapters."""
        return Runner(
            self._decoder, self._attention, self._device, graphs=self._graphs, adapters=adapters
        )

    def run(self, plan: StepPlan, *, all_rows: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute float32 logits `[R, V]` of the rows that are sampled: decodes, then last chunks;
        for a mixture of experts also the packed choices `[rows, L, K]` of all rows.

        The caller may overwrite the logits; the next step overwrites the choices.

        Args:
            all_rows: compute logits of every row of the step instead.
        """
        copy_blocks(plan.copies, self._attention.caches())
        if isinstance(self._attention, MixedAttention):
            copy_blocks(plan.slot_copies, self._attention.states.caches())
        if self._graphs is not None and not plan.chunks:
            hidden, *chosen = self._replay(plan, self._graphs)
            return self._project(hidden), next(iter(chosen), None)
        tokens, positions, rows = (torch.tensor(x, dtype=torch.int64) for x in flatten(plan))
        factors = self._adapters.factors(plan)
        inputs = [rows, tokens, positions, *factors, *self._attention.indices(plan)]
        read, *inputs = to_device(inputs, self._device)
        hidden, *chosen = self._compute(plan, *inputs)
        if len(rows) < len(tokens) and not all_rows:
            hidden = hidden[read]
        return self._project(hidden), next(iter(chosen), None)

    def _replay(self, plan: StepPlan, graphs: DecodeGraphs) -> Sequence[Tensor]:
        """Compute hidden states (and choices) of a step without chunks."""
        size = graphs.size_for(len(plan.decodes))
        results = graphs.run(
            size,
            self._padded(plan, size),
            partial(self._compute, plan),
            self._adapters.variant,
            idle=partial(self._padded, StepPlan(copies=[], decodes=[], chunks=[]), size),
        )
        return [result[: len(plan.decodes)] for result in results]

    def _padded(self, plan: StepPlan, size: int) -> list[Tensor]:
        """Build on the host the inputs of a step without chunks, with idle rows up to `size`."""
        assert isinstance(self._attention, VarlenAttention | MixedAttention)
        tokens, positions, rows = flatten(plan)
        idle = [0] * (size - len(rows))
        return [
            torch.tensor(tokens + idle),
            torch.tensor(positions + idle),
            *self._adapters.factors(plan, pad_to=size),
            *self._attention.indices(plan, pad_to=size),
        ]

    def _compute(
        self, plan: StepPlan, tokens: Tensor, positions: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute hidden states, and for a mixture of experts its packed choices.

        Args:
            rest: the factors of the adapters, then the indices of attention.
        """
        count = self._adapters.num_factors
        self._attention.prepare(plan, rest[count:])
        adapters = self._adapters.applied(rest[:count])
        moe = self._decoder.model.moe
        if moe is None:
            return (self._decoder(tokens, positions, self._attention, adapters=adapters),)
        routing = Routing(self._decoder.model)
        hidden = self._decoder(
            tokens, positions, self._attention, routing=routing, adapters=adapters
        )
        return hidden, pack_choices(routing.chosen(), moe.num_experts)

    def _project(self, hidden: Tensor) -> Tensor:  # [R, D] -> [R, V]
        head = self._decoder.head_holder
        logits = wide_linear(hidden, head.weight, blocked=head.blocked).float()
        logits = cap_logits(logits, self._decoder.model.logit_softcap)
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
