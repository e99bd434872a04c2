"""Refusals: errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Callable

from spmdrl.testing.clause import Finding, Findings


def refusal(what: str, call: Callable[[], object], *words: str) -> Findings:
    """Find a call that raises no ValueError, or one whose message lacks a word."""
    try:
        call()
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        if missing:
            yield Finding(expected=f"{what}: an error that names {missing[0]}", seen=str(error))
        return
    yield Finding(expected=f"{what}: a ValueError that names {', '.join(words)}", seen="none")
