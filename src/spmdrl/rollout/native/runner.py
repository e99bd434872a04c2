"""`Runner`: one engine step on the device, from a plan to logits, or to tokens where a graph draws
them (and to the chosen experts).
"""

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
from spmdrl.rollout.native.rows import DecodeRows, RowState
from spmdrl.rollout.native.sampler import DIRECT, Draws, draw_directly
from spmdrl.rollout.native.step_plan import StepPlan


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

    def run(
        self, plan: StepPlan, rows: RowState | None = None, *, all_rows: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Compute float32 logits `[R, V]` of the rows that are sampled: decodes, then last chunks;
        for a mixture of experts also the packed choices `[rows, L, K]` of all rows.

        The caller may overwrite the logits; the next step overwrites the choices.

        Args:
            rows: the plan's decodes; None: they are written anew.
            all_rows: compute logits of every row of the step instead.
        """
        self._copy(plan)
        if rows is not None and not plan.chunks:
            hidden, *chosen = self._decode(plan, rows)
            return self._project(hidden), next(iter(chosen), None)
        found = flatten(plan, with_decodes=rows is None)
        tokens, positions, sampled = (torch.tensor(x, dtype=torch.int64) for x in found)
        count, factors = self._adapters.num_factors, self._adapters.factors
        if rows is None:
            given = [tokens, positions, *factors(plan), *self._attention.indices(plan)]
            read, *inputs = to_device([sampled, *given], self._device)
        else:
            chunks = StepPlan(copies=[], decodes=[], chunks=plan.chunks)
            given = [tokens, positions, *factors(chunks), *self._attention.chunk_indices(plan)]
            read, *inputs = to_device([sampled, *given], self._device)
            inputs = _joined(rows.view(), inputs, count)
        hidden, *chosen = self._compute(plan, *inputs)
        if len(sampled) < len(hidden) and not all_rows:
            hidden = hidden[read]
        return self._project(hidden), next(iter(chosen), None)

    @property
    def captures(self) -> bool:
        """Whether steps that only decode are graphs."""
        return self._graphs is not None

    def draw(
        self, plan: StepPlan, rows: RowState, temperatures: Tensor
    ) -> tuple[Draws, Tensor | None]:
        """Compute a step that only decodes, and draw its tokens by the kernel, in one graph; for a
        mixture of experts also the packed choices. The next step overwrites all of them.

        Args:
            rows: the plan's decodes.
            temperatures: see `RowState.draw_inputs`.
        """
        assert self._graphs is not None and not plan.chunks
        self._copy(plan)
        size = self._graphs.size_for(rows.count)
        drawing = rows.draw_inputs(size, temperatures)
        results = self._graphs.run(
            size,
            [*rows.view(size).tensors(), *drawing],
            partial(self._compute_draws, plan),
            (self._adapters.variant, rows.shares, DIRECT),
            idle=lambda: [*rows.idle(size), *drawing],
        )
        tokens, logprobs, margins, *chosen = [result[: rows.count] for result in results]
        draws = Draws(tokens=tokens, logprobs=logprobs, margins=margins)
        return draws, next(iter(chosen), None)

    def _compute_draws(self, plan: StepPlan, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute tokens, log-probabilities, margins, and for a mixture of experts its choices.

        Args:
            inputs: those of `_compute`, then those of the draws.
        """
        *step, keys, temperatures, order = inputs
        hidden, *chosen = self._compute(plan, *step)
        draws = draw_directly(self._project(hidden), keys, temperatures, order)
        return draws.tokens, draws.logprobs, draws.margins, *chosen

    def _copy(self, plan: StepPlan) -> None:
        """Copy what samples that are about to write have shared."""
        copy_blocks(plan.copies, self._attention.caches())
        if isinstance(self._attention, MixedAttention):
            copy_blocks(plan.slot_copies, self._attention.states.caches())

    def _decode(self, plan: StepPlan, rows: RowState) -> Sequence[Tensor]:
        """Compute hidden states (and choices) of a step without chunks."""
        if self._graphs is None:
            return self._compute(plan, *rows.view().tensors())
        size = self._graphs.size_for(rows.count)
        results = self._graphs.run(
            size,
            rows.view(size).tensors(),
            partial(self._compute, plan),
            (self._adapters.variant, rows.shares),
            idle=partial(rows.idle, size),
        )
        return [result[: rows.count] for result in results]

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


def _joined(decodes: DecodeRows, inputs: Sequence[Tensor], num_factors: int) -> list[Tensor]:
    """Put decodes before the inputs of chunks: the tokens, the positions and the adapters' factors
    of all, then the indices of both.
    """
    both = [decodes.tokens, decodes.positions, *decodes.factors]
    count = 2 + num_factors
    joined = [torch.cat(parts) for parts in zip(both, inputs[:count], strict=True)]
    return [*joined, *decodes.indices(), *inputs[count:]]


def flatten(plan: StepPlan, *, with_decodes: bool = True) -> tuple[list[int], list[int], list[int]]:
    """List tokens and positions of all rows of a step, and the rows whose next token is drawn.

    Args:
        with_decodes: whether to list those of decodes; their rows are counted in any case.
    """
    decodes = plan.decodes if with_decodes else []
    tokens = [s.tokens[s.cached - 1] for s in decodes]
    positions = [s.cached - 1 for s in decodes]
    rows = list(range(len(plan.decodes)))
    before = len(rows) - len(tokens)
    for chunk in plan.chunks:
        tokens += chunk.sample.tokens[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        if chunk.is_last:
            rows.append(before + len(tokens) - 1)
    return tokens, positions, rows
