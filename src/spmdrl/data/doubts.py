"""What is odd about a source's rows, and no reason to refuse one: a line in the log for each."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence

from spmdrl.data.rows import TOOLS, Row, is_conversation
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)


def tell_of_tools(source: str, rows: Sequence[Row], template: str | None) -> None:
    """Warn once where rows have tools that no chat template writes.

    Args:
        template: the text of the chat templates that are used; None: none.
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
    """Warn once of each key of messages that the chat template does not read: `weight`, say, which
    has a meaning elsewhere.
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
    """Warn where the chat template does not write what the user says.

    Args:
        places: of the rows whose question it does not write.
        count: rows in all.
    """
    if places:
        log.warning(
            "%s: the chat template does not write the question as it is in %d of %d prompts (%s)",
            *(source, len(places), count, places[0]),
            extra=ALIKE,
        )


def tell_of_answers(source: str, places: Sequence[str], count: int) -> None:
    """Warn where reference answers are empty: an empty response would be right.

    Args:
        places: of those rows.
        count: rows in all.
    """
    if places:
        log.warning(
            "%s: the answer is empty in %d of %d rows (%s)",
            *(source, len(places), count, places[0]),
            extra=ALIKE,
        )


def names(template: str, word: str) -> bool:
    """Whether a chat template has this word."""
    return re.search(rf"\b{re.escape(word)}\b", template) is not None
