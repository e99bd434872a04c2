"""`StepLoop`: the steps of one call, from the first plan to the last token.

A step's work on the host does not grow with its rows: their state is in tensors (`RowState`), their
results are written together (`Ledger`), and only rows that may end are looked at (`Endings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spmdrl.keyed_random import key_tensor
from spmdrl.memory.host_copies import to_device, to_host
from spmdrl.models.blocks.moe import serve_experts
from spmdrl.models.decoder import Decoder
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.native.endings import Endings
from spmdrl.rollout.native.ledger import Ledger
from spmdrl.rollout.native.recording import ExpertRecord
from spmdrl.rollout.native.rows import RowState
from spmdrl.rollout.native.runner import Runner
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.sampler import Asked, Draws, Sampler, rows_of
from spmdrl.rollout.native.scheduler import Scheduler, joining
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.native.turns import TurnTaking
from spmdrl.rollout.protocol import Finish, Progress

_HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """A step that was given to the device.

    Args:
        joined: samples that get their first token after those that the step has computed.
        draws: tokens of the plan's decodes, then of `joined`; None if there are neither.
        first_row: see `Ledger.write`.
    """

    plan: StepPlan
    joined: list[Sample]
    draws: Draws | None
    first_row: int | None


class StepLoop:
    """The loop of one call.

    Args:
        release: function that frees the cache, whose values are not to be used again.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        group: Lockstep,
        runner: Runner,
        scheduler: Scheduler,
        rows: RowState,
        ledger: Ledger,
        sampler: Sampler,
        endings: Endings,
        taking: TurnTaking,
        record: ExpertRecord | None,
        device: torch.device,
        release: Callable[[], None],
    ) -> None:
        self._decoder, self._group, self._runner = decoder, group, runner
        self._scheduler, self._rows, self._ledger = scheduler, rows, ledger
        self._sampler, self._endings, self._taking = sampler, endings, taking
        self._record, self._device, self._release = record, device, release
        # of the newest step: its draws, and where those are of samples that do not decode yet
        self._drawn: Tensor | None = None
        self._place: dict[Sample, int] = {}
        # what the decodes of the newest steps ask for, while they are the same
        self._asked: tuple[list[Sample], Asked] | None = None
        self._asking: tuple[Sequence[Sample], list[int]] = ((), [])
        self._tokens_done = self._samples_done = 0

    def run(self, progress: Progress | None, should_stop: Callable[[], bool] | None) -> bool:
        """Run steps until all samples are done; True if they were stopped before that."""
        stop, scheduler = False, self._scheduler
        while self._group.has_step(scheduler.has_work, stop):
            if scheduler.has_step:
                stop = self._digest(self._launch(), should_stop)
            else:
                if self._group.shares_experts:
                    serve_experts(self._decoder)
                if scheduler.has_work:
                    stop, ended = self._taking.wait(should_stop)
                    self._samples_done += ended
            if progress is not None:
                progress(self._tokens_done, self._samples_done)
        scheduler.running.settle_all()
        return scheduler.has_work

    def _launch(self) -> _Step:
        """Plan a step and give it to the device, without waiting for its results."""
        plan = self._scheduler.plan()
        record = self._record
        first_row = None if record is None else record.note(plan)
        joined, rows = joining(plan, self._scheduler)
        self._rows.update(plan, self._drawn, self._place)
        logits, experts = self._runner.run(plan, self._rows)
        if record is not None and experts is not None:
            record.keep(experts)
        draws = self._draw(plan, joined, rows, logits)
        self._drawn = None if draws is None else draws.tokens
        count = len(plan.decodes)
        self._place = {sample: count + i for i, sample in enumerate(joined)}
        return _Step(plan=plan, joined=joined, draws=draws, first_row=first_row)

    def _draw(
        self, plan: StepPlan, joined: list[Sample], rows: list[int], logits: Tensor
    ) -> Draws | None:
        """Draw a token for each of the decodes and of `joined`.

        Args:
            rows: row of logits of each of `joined`.
        """
        decodes = plan.decodes
        if not decodes and not joined:
            return None
        if not joined:
            if self._asked is None or self._asked[0] is not decodes:
                params = [sample.request.sampling for sample in decodes]
                self._asked = decodes, self._sampler.ask(params, None, len(params))
            return self._sampler.draw(logits, self._asked[1], self._rows.keys())
        params = [sample.request.sampling for sample in (*decodes, *joined)]
        asked = self._sampler.ask(params, [*range(len(decodes)), *rows], logits.shape[0])
        [keys] = to_device([key_tensor((s.next_key() for s in joined), _HOST)], self._device)
        if decodes:
            keys = torch.cat((self._rows.keys(), keys))
        return self._sampler.draw(logits, asked, keys)

    def _digest(self, step: _Step, should_stop: Callable[[], bool] | None) -> bool:
        """Take a step's tokens, and end the turns of samples that end with them; returns whether to
        stop.
        """
        stop = should_stop is not None and self._group.is_leader and should_stop()
        decodes, joined, draws = step.plan.decodes, step.joined, step.draws
        tokens = np.zeros(0, np.int64)
        if draws is not None:
            found = to_host([draws.tokens, draws.logprobs, draws.margins])
            tokens, logprobs, margins = (column.numpy() for column in found)
        # the group's per-step message
        stopped, tokens, ended = self._taking.step(stop, tokens)
        self._samples_done += ended
        if draws is None:
            self._endings.find(decodes, tokens)
            return stopped
        count = len(decodes)
        self._check(step, logprobs)
        first = tokens[:count], logprobs[:count], margins[:count]
        self._ledger.write(decodes, *first, step.first_row)
        for i, sample in enumerate(joined, count):
            sample.tokens.append(int(tokens[i]))
            sample.logprobs.append(float(logprobs[i]))
            if sample.request.sampling.margins:
                sample.margins.append(float(margins[i]))
        self._keep_support(step)
        finished = self._ended(decodes, tokens[:count])
        for sample in joined:
            finish = self._endings.check(sample)
            if finish is not None:
                finished.append((sample, finish))
        self._tokens_done += len(tokens)
        self._samples_done += sum(self._taking.end(*turn) for turn in finished)
        return stopped

    def _ended(
        self, decodes: list[Sample], tokens: NDArray[np.int64]
    ) -> list[tuple[Sample, Finish]]:
        """Find the decodes whose turn ends with their new token."""
        finished = []
        for i in self._endings.find(decodes, tokens):
            self._ledger.settle(decodes[i])
            finish = self._endings.check(decodes[i])
            if finish is not None:
                finished.append((decodes[i], finish))
        return finished

    def _check(self, step: _Step, logprobs: NDArray[np.float32]) -> None:
        """Raise ValueError if some logits were not finite."""
        lacking = np.isnan(logprobs)
        if lacking.any():
            sample = [*step.plan.decodes, *step.joined][int(lacking.argmax())]
            self._release()
            raise ValueError(
                f"the logits of prompt {sample.request.prompt_id} are not finite: the policy's "
                "weights hold NaN or infinity, or a weight sync has never brought any"
            )

    def _keep_support(self, step: _Step) -> None:
        """Keep the ids that tokens were drawn from, for samples that ask for them."""
        decodes, draws = step.plan.decodes, step.draws
        if self._asking[0] is not decodes:
            asking = [i for i, one in enumerate(decodes) if one.request.sampling.support]
            self._asking = decodes, asking
        asking = self._asking[1]
        if step.joined:
            joined = enumerate(step.joined, len(decodes))
            asking = [*asking, *(i for i, one in joined if one.request.sampling.support)]
        if not asking:
            return
        assert draws is not None
        support = None if draws.support is None else rows_of(draws.support)
        for i in asking:
            sample = decodes[i] if i < len(decodes) else step.joined[i - len(decodes)]
            # if no row of the step is truncated, all were drawn from all tokens
            sample.support.append(b"" if support is None else support[i])
