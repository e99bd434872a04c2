"""`TurnTaking`: the turns of one call on all ranks that generate in lockstep.

Answers arrive at the leader at any time. It sends them along with its message of a step, so that
all ranks of the group continue a sample in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spmdrl.rollout.lockstep import Lockstep, Posted
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.protocol import Answer, Finish, Turn, Turns
from spmdrl.rollout.turn_messages import answers_of, written

_WAIT_S = 0.05
"""Seconds that the leader waits for an answer, if there is nothing else to do, before it looks for
a request to stop."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """The leader's message of a step.

    Args:
        arrived: the leader's answers; none on other ranks.
        checksum: checksum of this rank's tokens.
    """

    posted: Posted
    arrived: Sequence[int]
    checksum: int


class TurnTaking:
    """Turns of one call.

    Args:
        turns: answers of the call; None: a sample ends with its first turn.
        samples: all samples of the call.
    """

    def __init__(
        self, turns: Turns | None, group: Lockstep, scheduler: Scheduler, samples: Sequence[Sample]
    ) -> None:
        self._turns, self._group, self._scheduler = turns, group, scheduler
        self._samples = {(s.index, s.request.samples[s.place]): s for s in samples}
        if turns is None:
            return
        for sample in samples:  # of a stopped call
            if sample.waits is not None:
                if sample not in scheduler.parked:
                    scheduler.park(sample)
                self._tell(sample, sample.waits)

    def end(self, sample: Sample, finish: Finish) -> bool:
        """End a sample's turn; returns whether the sample ends with it."""
        if self._turns is None:
            sample.finish = finish
            self._scheduler.finish(sample)
            return True
        sample.waits = finish
        self._scheduler.park(sample)
        self._tell(sample, finish)
        return False

    def post(self, stop: bool, checksum: int) -> Message:
        """Post the leader's message of a step: whether to stop, and the answers that have arrived.

        Args:
            checksum: checksum of all tokens so far, for `take` to compare.
        """
        arrived = [] if self._turns is None else self._arrived(0.0)
        posted = self._group.post([int(stop), len(arrived), checksum])
        return Message(posted=posted, arrived=arrived, checksum=checksum)

    def take(self, message: Message) -> tuple[bool, int]:
        """Receive the message of a step, and apply its answers; returns whether to stop, and the
        number of samples that an answer ended.

        Raises:
            RuntimeError: the leader has drawn other tokens than this rank.
        """
        stop, length, checksum = message.posted.receive()
        if checksum != message.checksum:
            raise RuntimeError(
                "the ranks of a tensor-parallel group have drawn other tokens from the same "
                "logits: they differ in hardware, in software or in their weights"
            )
        return bool(stop), self._apply(message.arrived, length)

    def wait(self, should_stop: Callable[[], bool] | None) -> tuple[bool, int]:
        """Wait a moment for an answer while no sample can be computed; returns whether to stop, and
        the number of samples that an answer ended.
        """
        arrived = self._arrived(0.0 if self._group.shares_experts else _WAIT_S)
        stop = should_stop is not None and self._group.is_leader and should_stop()
        stopped, length = self._group.from_leader([int(stop), len(arrived)])
        return bool(stopped), self._apply(arrived, length)

    def _tell(self, sample: Sample, finish: Finish) -> None:
        if self._turns is None or not self._group.is_leader:
            return
        count = sample.turn_length
        turn = Turn(
            request=sample.index,
            sample=sample.request.samples[sample.place],
            number=len(sample.given),
            tokens=tuple(sample.tokens[len(sample.tokens) - count :]),
            finish=finish,
        )
        self._turns.ended(turn)

    def _arrived(self, wait_s: float) -> list[int]:
        """Return the leader's answers as numbers; none on other ranks."""
        if self._turns is None or not self._group.is_leader:
            return []
        answers = self._turns.answers(wait_s)
        for answer in answers:
            self._check(answer)
        return written(answers)

    def _check(self, answer: Answer) -> None:
        """Refuse what an engine cannot continue with: a fault of whoever answers."""
        sample = self._samples[answer.request, answer.sample]
        assert sample.waits is not None, answer
        if answer.max_tokens == 0:
            assert not answer.tokens, answer
            return
        most = sample.request.longest - sample.num_generated
        assert 0 < len(answer.tokens) <= most - answer.max_tokens, (answer, most)

    def _apply(self, values: Sequence[int], length: int) -> int:
        """Apply the leader's answers of a step on every rank."""
        if length == 0:
            return 0
        ended = 0
        for answer in answers_of(self._group.from_leader(values or [0] * length)):
            sample = self._samples[answer.request, answer.sample]
            if answer.restarts:
                sample.restart()
                self._scheduler.restart(sample)
                continue
            sample.rewards.append(answer.reward)
            if answer.max_tokens == 0:
                sample.finish, sample.ending = answer.ending.finish, answer.ending
                sample.waits = None
                self._scheduler.finish(sample)
                ended += 1
                continue
            sample.answer(answer.tokens, answer.max_tokens, begins_part=answer.begins_part)
            if answer.begins_part:  # its blocks are of another context
                self._scheduler.restart(sample)
            else:
                self._scheduler.resume(sample)
        return ended
