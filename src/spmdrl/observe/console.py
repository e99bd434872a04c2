"""One line per step on rank 0's console, in columns whose place does not change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from spmdrl.observe import names
from spmdrl.observe.log import write_line

WIDTH = 120
LINES_PER_HEADER = 25


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, width in characters, metric, digits after the point, a factor on it."""

    title: str
    width: int
    metric: str
    decimals: int
    factor: float = 1.0

    def text(self, record: Mapping[str, float]) -> str:
        value = record.get(self.metric)
        shown = "-" if value is None else number(value * self.factor, self.width, self.decimals)
        return shown.rjust(self.width)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a run, by section; made from its first record so that they do not change."""

    num_steps: int
    sections: tuple[tuple[str, tuple[Column, ...]], ...]
    folded: tuple[str, ...]

    def header(self) -> str:
        """Two lines: the titles of the sections, and those of the columns."""
        step_width = _step_width(self.num_steps)
        above, below = [" " * step_width], ["step".rjust(step_width)]
        for title, columns in self.sections:
            titles = " ".join(column.title.rjust(column.width) for column in columns)
            above.append(title.center(len(titles)))
            below.append(titles)
        return f"{' | '.join(above).rstrip()}\n{' | '.join(below)}"

    def line(self, record: Mapping[str, float]) -> str:
        """The line of a record, with "-" for missing metrics."""
        folded = sum(record.get(names.SECONDS + name, 0.0) for name in self.folded)
        other = names.SECONDS + names.OTHER
        record = {**record, other: record.get(other, 0.0) + folded}
        cells = [f"{int(record['step'])}/{self.num_steps}".rjust(_step_width(self.num_steps))]
        for _, columns in self.sections:
            cells.append(" ".join(column.text(record) for column in columns))
        return " | ".join(cells)


SUPERVISED = (
    Column(title="loss", width=8, metric="loss", decimals=4),
    Column(title="nll", width=7, metric="nll", decimals=3),
    Column(title="accuracy", width=8, metric="accuracy", decimals=3),
    Column(title="margin", width=7, metric="margin", decimals=3),
    Column(title="grad", width=7, metric="grad_norm", decimals=2),
)
"""Columns of flows that sample nothing; each is shown if its metric is recorded."""


def make_layout(record: Mapping[str, float], num_steps: int, *, width: int = WIDTH) -> Layout:
    """The layout for records like this one, within `width` characters.

    The KL shown is that to the reference if it is recorded, else that of the policy's move. If not
    all phases fit, the shortest are added to `other`.
    """
    kl = names.REF_KL if names.REF_KL in record else names.KL
    policy: tuple[Column, ...] = (
        Column(title="reward", width=7, metric=names.REWARD, decimals=3),
        Column(title="length", width=6, metric=names.LENGTH, decimals=1),
        Column(title=kl, width=8, metric=kl, decimals=4),
        Column(title="entropy", width=7, metric=names.ENTROPY, decimals=3),
        Column(title="clip%", width=5, metric=names.CLIP_FRACTION, decimals=2, factor=100.0),
    )
    phases_with_tokens: tuple[tuple[str, str], ...] = (
        ("rollout", names.ROLLOUT),
        ("train", names.UPDATE),
    )
    supervised = tuple(column for column in SUPERVISED if column.metric in record)
    if supervised and names.LENGTH not in record:  # nothing was sampled
        policy, phases_with_tokens = supervised, phases_with_tokens[1:]
    elif "pairs" in record:  # the samples are compared
        policy = (*policy[:2], *(column for column in supervised if column.metric != "nll"))
    elif supervised and not any(column.metric in record for column in policy[2:]):
        policy = (*policy[:2], *supervised)  # the samples are imitated, say
    speed = tuple(
        Column(title=title, width=7, metric=names.TOKENS_PER_S + phase, decimals=0)
        for title, phase in phases_with_tokens
    )
    total = Column(title="total", width=6, metric=names.STEP_SECONDS, decimals=1)
    other = _phase_column(names.OTHER)
    memory = (Column(title="peak", width=5, metric=names.PEAK_MEMORY, decimals=2),)

    def sections(phases: Sequence[Column]) -> tuple[tuple[str, tuple[Column, ...]], ...]:
        seconds = (total, *phases, other)
        return (("policy", policy), ("tokens/s", speed), ("seconds", seconds), ("GB", memory))

    fixed = Layout(num_steps=num_steps, sections=sections(()), folded=())
    room = width - len(fixed.header().splitlines()[1])
    phases = [name for name in names.phases(record) if name != names.OTHER]
    shown: list[str] = []
    for name in sorted(phases, key=lambda name: -record[names.SECONDS + name]):
        needed = _phase_column(name).width + 1
        if needed <= room:
            shown.append(name)
            room -= needed
    return Layout(
        num_steps=num_steps,
        sections=sections([_phase_column(name) for name in phases if name in shown]),
        folded=tuple(name for name in phases if name not in shown),
    )


class Console:
    """Prints a line per step on the first rank, with the header every `LINES_PER_HEADER` lines.

    Args:
        is_first: whether this rank prints.
        num_steps: number of steps of the whole run.
        stream: stream to print to, stdout by default.
    """

    def __init__(self, *, is_first: bool, num_steps: int, stream: TextIO | None = None) -> None:
        self._is_first = is_first
        self._num_steps = num_steps
        self._stream = stream
        self._layout: Layout | None = None
        self._lines = 0

    def step(self, record: Mapping[str, float]) -> None:
        """Print the line of a record, which has `step` and metrics named by `observe.names`."""
        if not self._is_first:
            return
        if self._layout is None:
            self._layout = make_layout(record, self._num_steps)
        if self._lines % LINES_PER_HEADER == 0:
            write_line(self._layout.header(), self._stream)
        self._lines += 1
        write_line(self._layout.line(record), self._stream)


def number(value: float, width: int, decimals: int) -> str:
    """`value` in `width` >= 5 characters: fewer decimals, k, M or G if large, 1.0e-05 if small."""
    if not math.isfinite(value):
        return str(value)
    if decimals > 3 and 0 < abs(value) < 10.0 ** (2 - decimals) and width >= 8:
        return f"{value:.1e}"
    for digits in range(decimals, -1, -1):
        text = f"{value:.{digits}f}"
        if len(text) <= width:
            return text
    for suffix in ("k", "M", "G"):
        value /= 1000
        if len(text := f"{value:.0f}{suffix}") <= width:
            return text
    return f"{value * 1e9:.0e}"


def _phase_column(name: str) -> Column:
    title = name[:9]
    return Column(title=title, width=max(len(title), 5), metric=names.SECONDS + name, decimals=1)


def _step_width(num_steps: int) -> int:
    return max(2 * len(str(num_steps)) + 1, len("step"))
