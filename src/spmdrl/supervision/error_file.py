"""A rank's error file for its launcher, in torchrun's own format. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

LAUNCH = "SPMDRL_LAUNCH"
"""Variable that names the ranks' launcher: `launch` (`spmdrl launch`), `srun`, or torchrun."""

LOST_PEER, EXIT_CODE = "lost_peer", "exit_code"
"""Keys of the file besides torchrun's own: whether another rank's end caused the error, and the
exit code that the rank was about to end with when its launcher ended it.
"""


def one_line(error: BaseException) -> str:
    """The first cause of an error: its type and the first line of its message."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"


def write_error_file(
    error: BaseException, line: str | None = None, *, code: int = 1, lost: bool = False
) -> None:
    """Tell the launcher of an error, if it asks for such a file.

    torchrun's summary names the rank and shows the text. (Its own handler,
    `torch.distributed.elastic.multiprocessing.errors.record`, does the same, but shows a traceback
    for bad input, too.)

    Args:
        line: message on bad input for users; None: the error's own.
        code: exit code of the process.
        lost: another rank's end caused the error.
    """
    where = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not where:
        return
    trace = "".join(traceback.format_exception(error))
    shown = str(error) if isinstance(error, ValueError | OSError) else trace
    information = {
        "py_callstack": shown,
        "timestamp": str(int(time.time())),
        LOST_PEER: lost,
        EXIT_CODE: code,
    }
    content = {"message": {"message": line or one_line(error), "extraInfo": information}}
    Path(where).write_text(json.dumps(content), encoding="utf-8")


def launcher_shows_errors() -> bool:
    """Whether this is a rank of `spmdrl launch`, which shows one rank's error, once."""
    return os.environ.get(LAUNCH) == "launch" and bool(os.environ.get("TORCHELASTIC_ERROR_FILE"))
