"""What loading prompts did, and how it is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger(__name__)


class Limits(Protocol):
    """The settings of a source that leave prompts out."""

    @property
    def source(self) -> str: ...

    @property
    def max_prompt_tokens(self) -> int | None: ...

    @property
    def part(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading did: rows read; left out: bad rows, prompts that were there before, those of
    other parts, long ones; tokens of the longest.
    """

    num_rows: int
    num_bad: int
    num_long: int
    longest: int
    num_repeated: int = 0
    num_elsewhere: int = 0


def tell(report: LoadReport, source: Limits, *, num_left: int) -> None:
    """Log what was left out; ValueError when nothing is left."""
    limit = source.max_prompt_tokens
    if not num_left:
        raise ValueError(
            f"data source {source.source!r} leaves no prompt: of {report.num_rows} rows "
            f"{report.num_bad} are bad and {report.num_long} longer than "
            f"data.train.max_tokens={limit} (the longest has {report.longest}); "
            f"{report.num_elsewhere} are not in part {source.part}"
        )
    if report.num_long:
        log.warning(
            "%s: %d of %d prompts are longer than data.train.max_tokens=%d (the longest has %d); "
            "left out",
            *(source.source, report.num_long, report.num_long + num_left, limit, report.longest),
        )
    if report.num_repeated:
        log.warning(
            "%s: %d prompts were there before; left out", source.source, report.num_repeated
        )
