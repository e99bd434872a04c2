"""Errors as users see them: said by one rank, and with the frames of their own code alone."""

from __future__ import annotations

import traceback
from pathlib import Path

MAX_STORY = 4000
"""Letters of an error's story; what is longer is cut at its end."""

_PACKAGE = f"{Path(__file__).resolve().parent}/"


class AgreedError(ValueError):
    """Bad input that every rank of the world raises alike: the first rank says it."""


def own_story(error: BaseException) -> str:
    """An error that a user's code has raised: its type and text, then the frames of that code, and
    the errors that it came from.

    The frames above the user's code, of this package and of imports, are left out.
    """
    return told(headline(error), error)


def told(text: str, error: BaseException) -> str:
    """`text`, which says what happened, and under it where in the user's code it did."""
    parts = [text]
    seen: BaseException | None = error
    while seen is not None:
        parts += [f"from {headline(seen)}"] if seen is not error else []
        parts += [frame.rstrip("\n") for frame in own_frames(seen).format()]
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    story = "\n".join(parts)
    return story if len(story) <= MAX_STORY else f"{story[:MAX_STORY]} ..."


def headline(error: BaseException) -> str:
    """`KeyError: 'x'`; only the type where there is no text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_frames(error: BaseException) -> traceback.StackSummary:
    """The frames from the user's first one on; none where the error comes from this package."""
    frames: list[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    while frames and _is_ours(frames[0]):
        frames = frames[1:]
    return traceback.StackSummary.from_list(frames)


def _is_ours(frame: traceback.FrameSummary) -> bool:
    name = frame.filename
    return name.startswith(("<frozen ", _PACKAGE)) or "/importlib/" in name
