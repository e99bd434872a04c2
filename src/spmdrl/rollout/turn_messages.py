"""Answers to turns as whole numbers, for the leader's message to the ranks of its group."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import islice

from spmdrl.rollout.protocol import Answer, Ending


def written(answers: Sequence[Answer]) -> list[int]:
    """Write answers, for `answers_of`."""
    values: list[int] = []
    for answer in answers:
        values += (answer.request, answer.sample, answer.max_tokens, answer.ending)
        values += (_bits(answer.reward), answer.restarts, answer.begins_part)
        values += (len(answer.tokens), *answer.tokens)
    return [int(value) for value in values]


def answers_of(values: Sequence[int]) -> Iterator[Answer]:
    """Read what `written` wrote."""
    rest = iter(values)
    while head := tuple(islice(rest, 8)):
        request, sample, max_tokens, ending, reward, restarts, begins_part, count = head
        yield Answer(
            request=request,
            sample=sample,
            tokens=tuple(islice(rest, count)),
            max_tokens=max_tokens,
            ending=Ending(ending),
            reward=_number(reward),
            restarts=bool(restarts),
            begins_part=bool(begins_part),
        )


def _bits(number: float) -> int:
    """Return the bits of a float."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
