"""Readers of a judge's answers, for models that write no numbers."""

from __future__ import annotations


def weight(answer: str) -> float | None:
    """A number that depends on all of a text; none for one text in five."""
    total = sum(map(ord, answer))
    return None if total % 5 == 0 else 1 + total % 90 / 10


def winner(answer: str) -> str | None:
    total = sum(map(ord, answer))
    return (None, "A", "B", "C", "A", "B", "A", "B")[total % 8]


def fails(answer: str) -> float:
    raise LookupError("no such key")


def fixed(answer: str) -> float:
    return 3.0
