"""The engine's loop in its plainest form: every step looks at every sample, which keeps its own
lists. What `StepLoop` must equal, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest

from spmdrl.rollout.native import engine as engine_module
from spmdrl.rollout.native import scheduler as scheduler_module
from spmdrl.rollout.native.loop import joining
from spmdrl.rollout.native.running import Running
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.native.support import rows_of
from spmdrl.rollout.protocol import Finish


def sampled(plan: StepPlan, scheduler: Scheduler) -> tuple[list[Sample], list[int]]:
    """All samples that get a token from a step, and the row of logits of each."""
    joined, rows = joining(plan, scheduler)
    return [*plan.decodes, *joined], [*range(len(plan.decodes)), *rows]


class PlainRunning(Running):
    """Nobody is seated: every decoding sample is due in every step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._decoding: list[Sample] = []

    def enter(self, sample: Sample) -> None:
        self.samples.append(sample)
        sample.order = 0

    def leave(self, sample: Sample) -> None:
        self.samples.remove(sample)
        sample.order = -1

    @property
    def computing(self) -> list[Sample]:  # type: ignore[override]
        return [sample for sample in self.samples if not sample.is_decoding]

    @computing.setter
    def computing(self, samples: list[Sample]) -> None:
        assert not samples

    def due(self) -> list[Sample]:
        self._decoding = []
        return [sample for sample in self.samples if sample.is_decoding]

    def decode(self, sample: Sample) -> None:
        self._decoding.append(sample)

    def seated(self) -> list[Sample]:
        return list(self._decoding)

    def settle_all(self) -> None:
        pass


class PlainScheduler(Scheduler):
    def plan(self) -> StepPlan:
        plan = super().plan()
        for sample in plan.decodes:
            sample.cached += 1
        return plan


class PlainLoop:
    """Runs each step's samples one by one."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    def run(self, progress: Any, should_stop: Any) -> bool:
        scheduler, group, taking = (self.parts[n] for n in ("scheduler", "group", "taking"))
        tokens_done = samples_done = 0
        stop = False
        while group.has_step(scheduler.has_work, stop):
            if scheduler.has_step:
                finished, stop, ended, count = self.step(should_stop)
                tokens_done += count
                samples_done += ended + sum(taking.end(*turn) for turn in finished)
            else:
                stop, ended = taking.wait(should_stop)
                samples_done += ended
            if progress is not None:
                progress(tokens_done, samples_done)
        return bool(scheduler.has_work)

    def step(self, should_stop: Any) -> tuple[list[tuple[Sample, Finish]], bool, int, int]:
        parts = self.parts
        scheduler, record, rules = parts["scheduler"], parts["record"], parts["endings"]._rules
        plan = scheduler.plan()
        if record is not None:
            first = record.note(plan)
            for i, sample in enumerate(plan.decodes):
                sample.expert_rows.append(first + i)
        samples, rows = sampled(plan, scheduler)
        logits, experts = parts["runner"].run(plan)
        if record is not None and experts is not None:
            record.keep(experts)
        stop = should_stop is not None and parts["group"].is_leader and should_stop()
        if samples:
            params, keys = [s.request.sampling for s in samples], [s.next_key() for s in samples]
            draws = parts["sampler"].sample(logits, params, keys, rows)
            tokens, logprobs, margins = (
                column.tolist() for column in (draws.tokens, draws.logprobs, draws.margins)
            )
            support = None if draws.support is None else rows_of(draws.support)
        stop, ended = self.message(stop)
        finished = []
        for i, sample in enumerate(samples):
            sample.tokens.append(tokens[i])
            sample.logprobs.append(logprobs[i])
            if sample.request.sampling.margins:
                sample.margins.append(margins[i])
            if sample.request.sampling.support:
                sample.support.append(b"" if support is None else support[i])
            rule = rules[sample.index]
            finish = rule.check(sample.tokens, sample.turn_length, sample.turn_limit)
            if finish is not None:
                finished.append((sample, finish))
        return finished, stop, ended, len(samples)

    def message(self, stop: bool) -> tuple[bool, int]:
        """The leader's message of a step, without tokens: the ranks draw alike."""
        taking, group = self.parts["taking"], self.parts["group"]
        arrived = taking._arrived(0.0)
        stopped, length = group.from_leader([int(stop), len(arrived)])
        return bool(stopped), taking._apply(arrived, length)


def make_plain(patch: pytest.MonkeyPatch) -> None:
    """Let engines run this loop."""
    patch.setattr(engine_module, "StepLoop", PlainLoop)
    patch.setattr(engine_module, "Scheduler", PlainScheduler)
    patch.setattr(scheduler_module, "Running", PlainRunning)
