"""Stacks of all Python threads of this process, and NCCL's last operations."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist


class Stacks:
    """Writer of `attempt/stacks/rank_N.txt`; SIGUSR2 dumps stacks at any time, even in a hang.

    Only the main thread may make it.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._flight = directory / f"rank_{rank:05d}.nccl"
        self._file: io.TextIOWrapper = (directory / f"rank_{rank:05d}.txt").open("a")
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)

    def dump(self, title: str) -> None:
        """Write all Python stacks, and NCCL's flight recorder if there is NCCL."""
        self._file.write(f"--- {time.strftime('%F %T')} {title}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        if torch.cuda.is_available() and dist.is_nccl_available():
            # empty if TORCH_FR_BUFFER_SIZE is 0
            record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            self._flight.write_bytes(record)

    def arm(self, seconds: float) -> None:
        """Dump and end the process unless this is called again within `seconds`.

        A C thread does it without the interpreter's lock, so it also ends a process in which an
        extension holds that lock forever.
        """
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(RuntimeError):
            faulthandler.unregister(signal.SIGUSR2)
        # a late SIGUSR2 must not kill a process that is ending
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._file.close()
