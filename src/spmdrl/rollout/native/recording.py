"""Record of the experts that the engine chose for every token of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.routing import choices_dtype
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.protocol import Request


class ExpertRecord:
    """The steps' choices on the host, and the row of them for every token of every sample.

    A token that is computed again (after a preemption) keeps its first choices, with which its
    response was drawn. Tokens of a prompt that another sample computed have that sample's choices.

    Args:
        first: the sample that computes the common prefix of all prompts.
        missing: value that marks a token without choices.
    """

    def __init__(self, first: Sample, missing: int) -> None:
        self.first, self._missing = first, missing
        self._steps: list[Tensor] = []
        self._num_rows = 0

    def begin(self, samples: Iterable[Sample]) -> None:
        """Take over the choices with which resumed samples were drawn."""
        for sample in samples:
            begun = sample.begun_experts()
            if begun is not None:
                known = self._computed(begun[: len(sample.tokens) - 1])
                sample.expert_rows = list(range(self._num_rows, self._num_rows + len(known)))
                self._steps.append(known)
                self._num_rows += len(known)

    def _computed(self, experts: Tensor) -> Tensor:  # [n, L, K]
        """Return the rows before the first token that the stopped call had not reached."""
        lacks = (experts.flatten(1) == self._missing).any(1).nonzero()
        return experts[: int(lacks[0])] if len(lacks) else experts

    def table(self) -> Tensor:
        """Return the choices of all rows so far, [rows, L, K]."""
        return torch.cat(self._steps)

    def restore(self, table: Tensor, first: Sample) -> None:
        """Adopt another record's table and first sample."""
        self.first, self._steps, self._num_rows = first, [table], len(table)

    def note(self, plan: StepPlan) -> int:
        """Note the token of each row of a step's chunks, before prompts are shared with followers;
        returns the first of the step's rows, which are one for each of its decodes, then those.
        """
        first = self._num_rows
        row = first + len(plan.decodes)
        for chunk in plan.chunks:
            self._assign(chunk.sample, chunk.start, chunk.stop, row)
            row += chunk.stop - chunk.start
        self._num_rows = row
        return first

    def keep(self, experts: Tensor) -> None:
        """Keep the choices of the step that was noted last, [rows, L, K]."""
        self._steps.append(experts.to("cpu"))

    def _assign(self, sample: Sample, start: int, stop: int, row: int) -> None:
        known = len(sample.expert_rows)
        if known < start:
            sample.expert_rows += self.first.expert_rows[known:start]
            known = start
        sample.expert_rows += range(row + known - start, row + stop - start)

    def of(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return every sample's choices, [n, L, K], one row per token; `missing` for tokens that
        were not computed, as the last one never is.
        """
        table = self.table()
        found = []
        for sample in samples:
            rows = sample.expert_rows[: len(sample.tokens)]
            experts = table.new_full((len(sample.tokens), *table.shape[1:]), self._missing)
            experts[: len(rows)] = table[torch.tensor(rows, dtype=torch.int64)]
            found.append(experts)
        return found


def record_for(
    model: ModelConfig, samples: Sequence[Sample], requests: Sequence[Request]
) -> ExpertRecord | None:
    """Return the record of a call that begins with these samples, or None if no request asks for
    its experts.
    """
    moe = model.moe
    if moe is None or not samples or not any(r.sampling.experts for r in requests):
        return None
    return ExpertRecord(samples[0], torch.iinfo(choices_dtype(moe.num_experts)).max)
