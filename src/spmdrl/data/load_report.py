"""Reports on loading a source: rows used, rows left out by reason, and one line in the log for each
kind of odd row that is no reason to refuse it.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spmdrl.config.amounts import share_of
from spmdrl.data.rows import TOOLS, Row, is_conversation
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)

REPEATED = "with a prompt that an earlier row has"
MALFORMED = "malformed"


class Limits(Protocol):
    """Settings of a source by which rows are left out for their length."""

    @property
    def key(self) -> str: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def keep_shortest(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """Args:
    tokens: maximum length of a row that is kept.
    setting: the setting that causes the limit, as part of a sentence.
    """

    tokens: int
    setting: str

    @property
    def reason(self) -> str:
        """Reason for which a longer row is left out."""
        return f"longer than {self.setting}"


def length_limit(lengths: Sequence[int], source: Limits) -> LengthLimit:
    """Limit by the smaller of `max_tokens` and the longest length within `keep_shortest`.

    Args:
        lengths: lengths in tokens of all rows that may be used.
    """
    setting = f"{source.key}.max_tokens={source.max_tokens}"
    found = LengthLimit(tokens=source.max_tokens, setting=setting)
    share = share_of(source.keep_shortest)
    if share == 1 or not lengths:
        return found
    # 0.07 * 100 is a little more than 7
    place = max(1, math.ceil(share * len(lengths) - 1e-9))
    longest = int(sorted(lengths)[place - 1])
    if found.tokens <= longest:
        return found
    setting = f"{longest} tokens ({source.key}.keep_shortest={source.keep_shortest})"
    return LengthLimit(tokens=longest, setting=setting)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Counts of one load: rows read; rows left out as bad, too long, repeated or elsewhere (in
    another share); and the tokens of the longest row.
    """

    num_rows: int
    num_bad: int
    num_long: int
    longest: int
    num_repeated: int = 0
    num_elsewhere: int = 0

    def left_out(self, share: str, limit: LengthLimit) -> dict[str, int]:
        """Number of rows left out, by reason."""
        counts = {
            MALFORMED: self.num_bad,
            not_in(share): self.num_elsewhere,
            REPEATED: self.num_repeated,
            limit.reason: self.num_long,
        }
        return {why: count for why, count in counts.items() if count}


def joined(reports: Sequence[LoadReport]) -> LoadReport:
    """Join the reports of several sources."""
    return LoadReport(
        num_rows=sum(r.num_rows for r in reports),
        num_bad=sum(r.num_bad for r in reports),
        num_long=sum(r.num_long for r in reports),
        longest=max((r.longest for r in reports), default=0),
        num_repeated=sum(r.num_repeated for r in reports),
        num_elsewhere=sum(r.num_elsewhere for r in reports),
    )


ROWS_READ = "rows_read"
"""Attribute of the log record on a source: its counts, for programs."""


def not_in(share: str) -> str:
    return f"not in share {share}"


def tell(
    source: str,
    key: str,
    *,
    num_rows: int,
    num_used: int,
    left_out: Mapping[str, int],
    longest: int,
    malformed: str | None,
) -> None:
    """Log in one line how many rows of a source are used, and how many are left out and why.

    Args:
        key: key of the section that describes the source.
        longest: tokens of the longest row, used or not.
        malformed: place of the first malformed row and what is wrong with it; None without one.

    Raises:
        ValueError: no row is used.
    """
    texts = {MALFORMED: f"{MALFORMED} ({malformed})"}
    reasons = ", ".join(f"{n} {texts.get(why, why)}" for why, n in sorted(left_out.items()))
    if any(why.startswith("longer") for why in left_out):
        reasons += f"; the longest has {longest} tokens"
    if not num_used:
        raise ValueError(
            f"data source {source!r} ({key}) leaves no example of {num_rows} rows"
            + (f": {reasons}" if reasons else "")
        )
    line = f"{source} ({key}): {num_used} of {num_rows} rows are used"
    if left_out:
        line += f" (left out: {reasons})"
    is_usual = all(why.startswith("not in") for why in left_out)
    counts = {"key": key, "source": source, "rows": num_rows, "used": num_used}
    rows_read = {**counts, "longest_tokens": longest, "left_out": dict(left_out)}
    level = logging.INFO if is_usual else logging.WARNING
    log.log(level, "%s", line, extra={**ALIKE, ROWS_READ: rows_read})


def tell_of_tools(source: str, rows: Sequence[Row], template: str | None) -> None:
    """Warn once if rows have tools that no chat template writes.

    Args:
        template: text of the chat templates in use; None if none is.
    """
    if names(template or "", TOOLS):
        return
    if any(row.values.get(TOOLS) for row in rows):
        log.warning(
            "%s: the prompts do not name the tools of column %r: the chat template has no place "
            "for them",
            *(source, TOOLS),
            extra=ALIKE,
        )


def tell_of_options(source: str, key: str, options: Collection[str], template: str | None) -> None:
    """Warn once of each variable given to a chat template that does not know it.

    Args:
        key: key of the section that describes the source.
    """
    for name in sorted(options):
        if not names(template or "", name):
            log.warning(
                "%s: %s.chat_template_kwargs.%s has no effect: the chat template does not know it",
                *(source, key, name),
                extra=ALIKE,
            )


def tell_of_rewriting(source: str, counts: Sequence[int]) -> None:
    """Log how many conversations became several rows, since the chat template rewrites turns.

    Args:
        counts: number of rows of each conversation that is used.
    """
    many = [count for count in counts if count > 1]
    if many:
        log.info(
            "%s: %d of %d conversations became %d rows: the chat template writes earlier turns "
            "otherwise once another is to come, and each turn is trained as the model saw it",
            *(source, len(many), len(counts), sum(many)),
            extra=ALIKE,
        )


def tell_of_keys(
    source: str, rows: Sequence[Row], columns: Collection[str], template: str | None
) -> None:
    """Warn once of each message key that the chat template does not read, such as `weight`, which
    means something in other projects.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        for column in columns:
            messages = row.get(column)
            if is_conversation(messages):
                for message in messages:
                    given = message if isinstance(message, dict) else {}
                    counts.update(str(key) for key, part in given.items() if part is not None)
    for key, count in sorted(counts.items()):
        if key not in ("role", "content") and not names(template or "", key):
            log.warning(
                "%s: %d messages have the key %r, which the chat template does not read: it has "
                "no effect",
                *(source, count, key),
                extra=ALIKE,
            )


def tell_of_rows(source: str, doubt: str, places: Sequence[str], count: int) -> None:
    """Warn of rows that can be read but are not what they are meant to be.

    Args:
        doubt: description of these rows, which `in N of M` follows.
        places: their places.
        count: number of rows checked.
    """
    if places:
        log.warning(
            "%s: %s in %d of %d rows (%s)",
            *(source, doubt, len(places), count, places[0]),
            extra=ALIKE,
        )


def names(template: str, word: str) -> bool:
    """Whether a chat template contains this word."""
    return re.search(rf"\b{re.escape(word)}\b", template) is not None
