"""Warnings about odd rows of a source that are no reason to refuse it: one line in the log each."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence

from spmdrl.data.rows import TOOLS, Row, is_conversation
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)


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


def tell_of_questions(source: str, places: Sequence[str], count: int) -> None:
    """Warn if the chat template does not write the user's question as it is.

    Args:
        places: places of the rows whose question it does not write.
        count: number of prompts checked.
    """
    if places:
        log.warning(
            "%s: the chat template does not write the question as it is in %d of %d prompts (%s)",
            *(source, len(places), count, places[0]),
            extra=ALIKE,
        )


def tell_of_answers(source: str, places: Sequence[str], count: int) -> None:
    """Warn if reference answers are empty: an empty response would then be right.

    Args:
        places: places of the rows with an empty answer.
        count: number of rows checked.
    """
    if places:
        log.warning(
            "%s: the answer is empty in %d of %d rows (%s)",
            *(source, len(places), count, places[0]),
            extra=ALIKE,
        )


def names(template: str, word: str) -> bool:
    """Whether a chat template contains this word."""
    return re.search(rf"\b{re.escape(word)}\b", template) is not None
