"""Kinds of failure: this rank's own, or that of a peer, noticed in a collective."""

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
"""Texts by which gloo and the store report a peer that is gone, as plain RuntimeErrors."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error says that another rank is gone, so that it is not this rank's own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if type(seen) is RuntimeError and any(text in str(seen) for text in _LOST):
            return True
        seen = seen.__cause__
    return False


def end_process_in(seconds: float, code: int) -> None:
    """End a failed process after `seconds`, even if its interpreter still waits in its shutdown:
    the destruction of groups whose peers are gone may never return.
    """

    def end() -> None:
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)

    threading.Thread(target=end, name="spmdrl-end", daemon=True).start()
