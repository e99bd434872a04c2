"""`Attempt`: one start of a run, with its directory, its ownership of the run and its outcome.

`run_dir/attempt_NNNN` (or `$SPMDRL_ATTEMPT_DIR`) holds the files of one start: `outcome`, `stop`,
`failed`, heartbeats and stacks. `run_dir/owner` names the start that may write checkpoints: a newer
start takes it over, so that an older one that still runs on a lost node cannot overwrite the newer
one's checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from spmdrl.atomic_files import bring_back, replace_file
from spmdrl.distributed.reduce import agreed, broadcast_object
from spmdrl.world import World

log = logging.getLogger(__name__)

Outcome = Literal["done", "stopped", "crashed", "hung"]
"""End of an attempt; a missing file means `crashed`."""

DIRECTORY, OWNER, DEADLINE = "SPMDRL_ATTEMPT_DIR", "SPMDRL_OWNER", "SPMDRL_DEADLINE"
"""Variables of the launcher: the directory of the attempt's files, its token in `run_dir/owner`
(which the launcher then writes), and the end of the job in seconds since 1970."""

STOP_FILE = "stop"


class Fenced(OSError):
    """Another attempt owns the run now."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run.

    Args:
        owner: this attempt's token.
        deadline: end of the job in seconds since 1970; None: unknown.
    """

    run_dir: Path
    directory: Path
    owner: str
    deadline: float | None

    def stop_files(self) -> tuple[Path, Path]:
        """Files that ask for a stop if either exists."""
        return self.run_dir / STOP_FILE, self.directory / STOP_FILE

    def clear_stop_files(self) -> None:
        """Remove the stop files, so that the next start does not stop at once."""
        for file in self.stop_files():
            file.unlink(missing_ok=True)

    def check_owner(self) -> None:
        """Check that this attempt may still write checkpoints.

        Raises:
            Fenced: another attempt has taken the run over.
        """
        try:
            found = (self.run_dir / "owner").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            found = "nobody (the file owner is gone)"
        if found != self.owner:
            raise Fenced(
                f"{self.run_dir} belongs to attempt {found} by now, and this is {self.owner}: "
                "nothing was written; end this one"
            )

    def write_outcome(self, outcome: Outcome) -> None:
        replace_file(self.directory / "outcome", f"{outcome}\n".encode())

    def write_stopped_by(self, reason: str) -> None:
        """Write who asked for the stop, for launchers that treat requests differently."""
        replace_file(self.directory / "stopped_by", f"{reason}\n".encode())

    def write_progress(self, steps_done: int) -> None:
        """Write `run_dir/last_step`, by which a launcher sees whether an attempt made progress."""
        replace_file(self.run_dir / "last_step", f"{steps_done}\n".encode())

    def write_failed(self, text: str) -> None:
        """Write the cause of the attempt's end, naming the rank, unless another rank has."""
        with contextlib.suppress(FileExistsError), (self.directory / "failed").open("x") as file:
            file.write(text.rstrip() + "\n")

    def read_failed(self) -> str | None:
        with contextlib.suppress(OSError):  # a file that cannot be read counts as missing
            return (self.directory / "failed").read_text(encoding="utf-8").strip()
        return None


def begin_attempt(run_dir: Path, world: World) -> Attempt:
    """Begin an attempt, the same on every rank; rank 0 makes its directory and takes the run over.

    Raises:
        OSError: the directory cannot be written, or the launcher's token is not (or no longer) the
            owner's; on every rank.
    """

    def begin() -> Attempt | None:
        return _begin(run_dir) if world.is_first else None

    attempt: Attempt = broadcast_object(agreed(OSError, begin), 0)
    return attempt


def _begin(run_dir: Path) -> Attempt:
    run_dir.mkdir(parents=True, exist_ok=True)
    given, owner = os.environ.get(DIRECTORY), os.environ.get(OWNER)
    if given is not None:
        directory = Path(given)
    else:
        names = (run_dir / f"attempt_{number:04d}" for number in count())
        directory = next(path for path in names if not path.exists())
    for part in ("heartbeats", "stacks"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    if owner is None:
        owner = f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        replace_file(run_dir / "owner", f"{owner}\n".encode())
    deadline = os.environ.get(DEADLINE)
    attempt = Attempt(
        run_dir=run_dir,
        directory=directory,
        owner=owner,
        deadline=None if deadline is None else float(deadline),
    )
    attempt.check_owner()
    for path in bring_back(run_dir):
        log.warning("%s was being replaced when its process ended: it is the older one again", path)
    return attempt
