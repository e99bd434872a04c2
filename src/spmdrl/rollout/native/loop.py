"""`StepLoop`: the steps of one call, from the first plan to the last token.

A step's work on the host does not grow with its rows: their state is in tensors (`RowState`), their
results are written together (`Ledger`), and only rows that may end are looked at (`Endings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spmdrl.keyed_random import key_tensor
from spmdrl.memory.host_copies import Arriving, to_device
from spmdrl.models.blocks.moe import serve_experts
from spmdrl.models.decoder import Decoder
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.native.endings import Endings
from spmdrl.rollout.native.ledger import Ledger
from spmdrl.rollout.native.recording import ExpertRecord
from spmdrl.rollout.native.rows import RowState
from spmdrl.rollout.native.runner import Runner
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.sampler import Asked, Draws, Sampler
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.native.support import rows_of
from spmdrl.rollout.native.turns import Message, TurnTaking
from spmdrl.rollout.protocol import Finish, Progress

_HOST = torch.device("cpu")
_COMES = -1
"""A token that the device has not given yet; its step's digest puts it in its place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """A step that was given to the device.

    Args:
        joined: samples that get their first token after those that the step has computed.
        draws: tokens of the plan's decodes, then of `joined`; None if there are neither.
        first_row: see `Ledger.write`.
        arriving: the draws' tokens, log-probabilities and margins, and the experts if they are
            recorded.
        message: that of the group's leader.
    """

    plan: StepPlan
    joined: list[Sample]
    draws: Draws | None
    first_row: int | None
    arriving: Arriving
    message: Message


class StepLoop:
    """The loop of one call.

    On a device that computes by itself the loop runs ahead: it plans a step and gives it to the
    device before it takes the tokens of the step before, which the device puts into the rows. A
    sample that ended with one of these has then drawn one token in vain, which is dropped.

    Args:
        runs_ahead: whether it does; if not, no token is drawn in vain.
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
        runs_ahead: bool,
        release: Callable[[], None],
    ) -> None:
        self._decoder, self._group, self._runner = decoder, group, runner
        self._scheduler, self._rows, self._ledger = scheduler, rows, ledger
        self._sampler, self._endings, self._taking = sampler, endings, taking
        self._record, self._device, self._release = record, device, release
        self._runs_ahead = runs_ahead
        # of the newest step: its draws, and where those are of samples that do not decode yet
        self._drawn: Tensor | None = None
        self._place: dict[Sample, int] = {}
        # what the decodes of the newest steps ask for, while they are the same
        self._asked: tuple[list[Sample], Asked] | None = None
        self._asking: tuple[Sequence[Sample], list[int]] = ((), [])
        self._tokens_done = self._samples_done = self._checksum = 0
        self._ended: list[Sample] = []  # with the newest digested step

    def run(self, progress: Progress | None, should_stop: Callable[[], bool] | None) -> bool:
        """Run steps until all samples are done; True if they were stopped before that."""
        stop, scheduler = False, self._scheduler
        pending: _Step | None = None
        while self._group.has_step(scheduler.has_work or pending is not None, stop):
            launched = None
            if scheduler.has_step and (pending is None or self._may_launch()):
                launched = self._launch(should_stop)
                if not self._runs_ahead:
                    pending, launched = launched, None
            if pending is not None:
                stop = self._digest(pending)
            elif launched is None:
                if self._group.shares_experts:
                    serve_experts(self._decoder)
                if scheduler.has_work:
                    stop, ended = self._taking.wait(should_stop)
                    self._samples_done += ended
            pending = launched
            if progress is not None:
                progress(self._tokens_done, self._samples_done)
        if pending is not None:
            self._digest(pending)
        scheduler.running.settle_all()
        return scheduler.has_work

    def _may_launch(self) -> bool:
        """Whether the next step can be planned before the tokens of the one before are here: no
        sample can lose its blocks, since it would be computed again with all its tokens.
        """
        scheduler = self._scheduler
        needed = scheduler.running.most_needed
        has_slots = scheduler.slots is None or scheduler.slots.num_free >= needed
        return bool(scheduler.running) and scheduler.pool.num_free >= needed and has_slots

    def _launch(self, should_stop: Callable[[], bool] | None) -> _Step:
        """Plan a step and give it to the device, without waiting for its results."""
        plan = self._scheduler.plan()
        record = self._record
        first_row = None if record is None else record.note(plan)
        joined, rows = joining(plan, self._scheduler)
        self._rows.update(plan, self._drawn, self._place)
        draws, experts = self._compute(plan, joined, rows)
        results = [] if draws is None else [draws.tokens, draws.logprobs, draws.margins]
        kept = [] if record is None or experts is None else [experts]
        arriving = Arriving([*kept, *results])
        self._drawn = None if draws is None else draws.tokens
        count = len(plan.decodes)
        self._place = {sample: count + i for i, sample in enumerate(joined)}
        for sample in joined:
            sample.tokens.append(_COMES)
        stop = should_stop is not None and self._group.is_leader and should_stop()
        return _Step(
            plan=plan,
            joined=joined,
            draws=draws,
            first_row=first_row,
            arriving=arriving,
            message=self._taking.post(stop, self._checksum),
        )

    def _compute(
        self, plan: StepPlan, joined: list[Sample], rows: list[int]
    ) -> tuple[Draws | None, Tensor | None]:
        """Compute a step and draw its tokens, in one graph where that can do both.

        Args:
            rows: see `_draw`.
        """
        if not plan.chunks and self._runner.captures:
            temperatures = self._asked_of(plan.decodes).direct_temperatures
            if temperatures is not None:
                return self._runner.draw(plan, self._rows, temperatures)
        logits, experts = self._runner.run(plan, self._rows)
        return self._draw(plan, joined, rows, logits), experts

    def _asked_of(self, decodes: list[Sample]) -> Asked:
        """Return what the rows of a step that only decodes ask for."""
        if self._asked is None or self._asked[0] is not decodes:
            params = [sample.request.sampling for sample in decodes]
            self._asked = decodes, self._sampler.ask(params, None, len(params))
        return self._asked[1]

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
            return self._sampler.draw(logits, self._asked_of(decodes), self._rows.keys())
        params = [sample.request.sampling for sample in (*decodes, *joined)]
        asked = self._sampler.ask(params, [*range(len(decodes)), *rows], logits.shape[0])
        [keys] = to_device([key_tensor((s.next_key() for s in joined), _HOST)], self._device)
        if decodes:
            keys = torch.cat((self._rows.keys(), keys))
        return self._sampler.draw(logits, asked, keys)

    def _digest(self, step: _Step) -> bool:
        """Take a step's tokens, and end the turns of samples that end with them; returns whether to
        stop.
        """
        decodes, joined = step.plan.decodes, step.joined
        found = step.arriving.wait()
        if self._record is not None and len(found) != (0 if step.draws is None else 3):
            self._record.keep(found.pop(0))
        vain = self._drop(step)
        stopped, ended = self._taking.take(step.message)
        self._samples_done += ended
        if not found:
            self._endings.find(decodes, np.zeros(0, np.int64))
            return stopped
        tokens, logprobs, margins = (column.numpy() for column in found)
        if not self._group.is_alone:
            self._checksum = crc32(tokens.tobytes(), self._checksum)
        count = len(decodes)
        self._check(step, logprobs)
        first = tokens[:count], logprobs[:count], margins[:count]
        self._ledger.write(decodes, *first, step.first_row)
        for i, sample in enumerate(joined, count):
            sample.tokens[-1] = int(tokens[i])
            sample.logprobs.append(float(logprobs[i]))
            if sample.request.sampling.margins:
                sample.margins.append(float(margins[i]))
        self._keep_support(step)
        self._tokens_done += len(tokens) - vain
        finished = self._find_ended(step, tokens[:count])
        if self._runs_ahead:
            self._ended = [sample for sample, _ in finished]
        self._samples_done += sum(self._taking.end(*turn) for turn in finished)
        return stopped

    def _drop(self, step: _Step) -> int:
        """Return how many tokens of a step are in vain: of samples that ended a turn in the step
        before.
        """
        decodes = step.plan.decodes
        dropped = [sample for sample in self._ended if sample in decodes]
        self._ended = []
        for sample in dropped:
            # the step has computed the last token of the turn, which the next turn follows
            if step.first_row is not None and sample.waits is not None:
                sample.expert_rows.append(step.first_row + decodes.index(sample))
        return len(dropped)

    def _find_ended(self, step: _Step, tokens: NDArray[np.int64]) -> list[tuple[Sample, Finish]]:
        """Find the samples whose turn ends with their new token, of which `tokens` are those of
        the decodes.
        """
        decodes, candidates = step.plan.decodes, []
        for i in self._endings.find(decodes, tokens):
            if decodes[i].is_seated:  # and did not end with the token before
                self._ledger.settle(decodes[i])
                candidates.append(decodes[i])
        finished = []
        for sample in (*candidates, *step.joined):
            finish = self._endings.check(sample)
            if finish is not None:
                finished.append((sample, finish))
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
            if i >= len(decodes) or sample.is_seated:  # and did not end with the token before
                # if no row of the step is truncated, all were drawn from all tokens
                sample.support.append(b"" if support is None else support[i])


def joining(plan: StepPlan, scheduler: Scheduler) -> tuple[list[Sample], list[int]]:
    """List the samples that get a token from a step's chunks, and the row of logits of each.

    A prompt's last row serves its sample and the followers, which share its blocks from now on.
    """
    samples: list[Sample] = []
    rows: list[int] = []
    row = len(plan.decodes)
    for chunk in plan.chunks:
        if not chunk.is_last:
            continue
        group = [chunk.sample, *scheduler.fork(chunk.sample)]
        samples += group
        rows += [row] * len(group)
        row += 1
    return samples, rows
