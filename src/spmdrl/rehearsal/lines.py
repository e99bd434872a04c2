"""Source lines of a call, without those of torch and of the rehearsal itself."""

from __future__ import annotations

import sys
import threading
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType

import torch

Line = tuple[str, int, str]
"""File, line number, function."""

Stack = tuple[Line, ...]
"""Lines from the innermost call to the outermost."""

_HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), threading.__file__)


@cache
def _is_hidden(file: str) -> bool:
    return file.startswith(_HIDDEN) or file.startswith("<")


def stack_here() -> Stack:
    """Return the lines of this thread."""
    return stack_of_frame(sys._getframe(1))


def stack_of(error: BaseException) -> Stack:
    """Return the lines at which an error was raised."""
    found: list[Line] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not _is_hidden(code.co_filename):
            found.append((code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return tuple(reversed(found))


def stack_of_frame(frame: FrameType | None) -> Stack:
    """Return the lines of a thread whose innermost frame this is."""
    found: list[Line] = []
    while frame is not None:
        code = frame.f_code
        if not _is_hidden(code.co_filename):
            found.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return tuple(found)


def describe(stack: Stack, start: int = 0, kept: int = 0) -> str:
    """Show lines from the outermost to the innermost, without those in between.

    Args:
        start: number of outermost lines to leave out.
        kept: number of the outermost lines that are shown even if there are many, from `start` on.
    """
    shown = [f"{_short(file)}:{line} ({name})" for file, line, name in reversed(stack)][start:]
    first = max(kept - start, 1)
    if len(shown) > first + 2:
        shown = [*shown[:first], "...", shown[-1]]
    return " > ".join(shown) or "(no line outside torch)"


def common_start(stacks: list[Stack]) -> int:
    """Count the outermost lines that all stacks share."""
    shared = 0
    for lines in zip(*(reversed(stack) for stack in stacks), strict=False):
        if len(set(lines)) > 1:
            break
        shared += 1
    return shared


def _short(file: str) -> str:
    """The path from here or, of the package's own files, from the package."""
    path, package = Path(file), Path(__file__).parents[1]
    for root in (package.parent, Path.cwd()):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return file
