"""What a failure is: this rank's own, or that of a peer seen in a collective."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection refused",
    "Timed out waiting",
    "timed out",
)
"""What gloo and the store say of a peer that is gone; they raise plain RuntimeErrors."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error says that another rank is gone, and so is not this rank's own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if type(seen) is RuntimeError and any(text in str(seen) for text in _LOST):
            return True
        seen = seen.__cause__
    return False


def one_line(error: BaseException) -> str:
    """The last error of a chain, as the first line of its text."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"


def write_error_file(error: BaseException) -> None:
    """Tell torchrun what went wrong, in the form of its own handler, where it asks for it.

    Its summary names the rank and shows the text. (`torch.distributed.elastic.multiprocessing.
    errors.record` does the same, but shows a traceback for bad input, too.)
    """
    where = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if where is None:
        return
    trace = "".join(traceback.format_exception(error))
    shown = str(error) if isinstance(error, ValueError | OSError) else trace
    information = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    content = {"message": {"message": one_line(error), "extraInfo": information}}
    Path(where).write_text(json.dumps(content), encoding="utf-8")


def end_process_in(seconds: float, code: int) -> None:
    """A process that failed ends by then, whatever its interpreter waits for while it shuts down:
    groups whose peers are gone may never be taken apart.
    """

    def end() -> None:
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)

    threading.Thread(target=end, name="spmdrl-end", daemon=True).start()
