"""Errors for users: printed by one rank, with only the frames of the user's own code."""

from __future__ import annotations

import traceback
from pathlib import Path

MAX_STORY = 4000
"""Most characters of an error's text; the rest is cut off."""

_PACKAGE = f"{Path(__file__).resolve().parents[1]}/"


class AgreedError(ValueError):
    """Bad input on which every rank of the world raises the same error: rank 0 prints it."""


def own_story(error: BaseException) -> str:
    """Text of an error in a user's code: its type and message, the frames of that code, and the
    errors that caused it.

    Frames above the user's code, of this package and of imports, are left out.
    """
    return told(headline(error), error)


def told(text: str, error: BaseException) -> str:
    """`text`, which says what happened, followed by the place in the user's code."""
    parts = [text]
    seen: BaseException | None = error
    while seen is not None:
        parts += [f"from {headline(seen)}"] if seen is not error else []
        parts += [frame.rstrip("\n") for frame in own_frames(seen).format()]
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    story = "\n".join(parts)
    return story if len(story) <= MAX_STORY else f"{story[:MAX_STORY]} ..."


def headline(error: BaseException) -> str:
    """Type and message of an error, `KeyError: 'x'`; only the type if it has no message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_frames(error: BaseException) -> traceback.StackSummary:
    """Frames from the user's first one on; none if the error comes from this package."""
    frames: list[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    while frames and is_ours(frames[0]):
        frames = frames[1:]
    return traceback.StackSummary.from_list(frames)


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is of this package or of an import."""
    name = frame.filename
    return name.startswith(("<frozen ", _PACKAGE)) or "/importlib/" in name
