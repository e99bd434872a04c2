"""What a failure is: this rank's own, or that of a peer seen in a collective."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

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
