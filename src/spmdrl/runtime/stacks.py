"""Where every thread of this process is: Python's stacks, and what NCCL last did."""

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
    """Writes to `attempt/stacks/rank_N.txt`; SIGUSR2 does it at any time, also in a hang.

    To be made by the main thread.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._flight = directory / f"rank_{rank:05d}.nccl"
        self._file: io.TextIOWrapper = (directory / f"rank_{rank:05d}.txt").open("a")
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)

    def dump(self, title: str) -> None:
        """All Python stacks, and NCCL's flight recorder where there is NCCL."""
        self._file.write(f"--- {time.strftime('%F %T')} {title}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        if torch.cuda.is_available() and dist.is_nccl_available():
            # empty unless TORCH_FR_BUFFER_SIZE is set, see scripts/slurm/env
            record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            self._flight.write_bytes(record)

    def arm(self, seconds: float) -> None:
        """Dump and end the process if nobody calls this again for `seconds`.

        By a thread of C that needs no lock of Python's: it also ends a process in which some
        extension holds that lock for ever.
        """
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(RuntimeError):
            faulthandler.unregister(signal.SIGUSR2)
        # a late SIGUSR2 must not kill a process that is ending
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._file.close()
