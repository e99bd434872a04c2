"""Spans: rows of the queries and the ranges of the keys that they see.

Packed sequences, prompts that several responses share, chunks of a prefill and the parts of a
context-parallel stream are all lists of spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Range = tuple[int, int]


class AttentionFunction(Protocol):
    """Differentiable attention of one list of spans with one `AttentionOptions`."""

    def __call__(
        self,
        q: Tensor,  # [Tq, H, d]
        k: Tensor,  # [Tk, KVH, d]
        v: Tensor,  # [Tk, KVH, e]
        sinks: Tensor | None = None,  # [H]
    ) -> Tensor:  # [Tq, H, e]
        """Attend; `sinks` are one more score per head, whose probability is dropped."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows `[q_start, q_stop)` of q and the keys that they see.

    A window counts keys in the order of `keys`: a row's own position is its last key's place there.

    Args:
        own: the range of keys that is seen causally, aligned at the end: the last row sees all
            keys of it, the row before sees all but the last, and so on.
        prefix: ranges of keys that every row sees.
    """

    q_start: int
    q_stop: int
    own: Range
    prefix: tuple[Range, ...] = ()

    def __post_init__(self) -> None:
        assert 0 <= self.q_start < self.q_stop, self
        assert self.own[1] - self.own[0] >= self.q_stop - self.q_start, self

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.keys)

    @property
    def keys(self) -> tuple[Range, ...]:
        """All ranges of keys in order; each row sees all of these keys but the last few."""
        return (*self.prefix, self.own)


def covers_rows(spans: Sequence[Span]) -> bool:
    """Whether the spans' rows follow one another without gaps from row 0."""
    stops = [0, *(span.q_stop for span in spans)]
    return all(span.q_start == stop for span, stop in zip(spans, stops, strict=False))
