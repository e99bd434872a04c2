"""`Attempt`: one start of a run. Its directory, whose the run is, and how it ended.

`run_dir/attempt_NNNN` (or `$SPMDRL_ATTEMPT_DIR`) holds what belongs to one start: `outcome`,
`stop`, `failed`, heartbeats and stacks. `run_dir/owner` names the start that may write checkpoints:
a newer start takes it over, so that an older one that still runs on a lost node cannot overwrite
what the newer one saved.
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

from spmdrl.distributed.reduce import agreed, broadcast_object
from spmdrl.files import bring_back, replace_file
from spmdrl.launch import World

log = logging.getLogger(__name__)

Outcome = Literal["done", "stopped", "crashed", "hung"]
"""How an attempt ended; a missing file reads as `crashed`."""

DIRECTORY, OWNER, DEADLINE = "SPMDRL_ATTEMPT_DIR", "SPMDRL_OWNER", "SPMDRL_DEADLINE"
"""Variables of the launcher: where the attempt's files go, its token in `run_dir/owner` (which the
launcher then writes), and when the job ends, in seconds since 1970."""

STOP_FILE = "stop"


class Fenced(OSError):
    """Another attempt owns the run by now."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Args:
    owner: this attempt's token.
    deadline: when the job ends, in seconds since 1970; None: nothing is known of an end.
    """

    run_dir: Path
    directory: Path
    owner: str
    deadline: float | None

    def stop_files(self) -> tuple[Path, Path]:
        """Either asks for a stop when it is there."""
        return self.run_dir / STOP_FILE, self.directory / STOP_FILE

    def clear_stop_files(self) -> None:
        """So that the next start does not stop at once."""
        for file in self.stop_files():
            file.unlink(missing_ok=True)

    def check_owner(self) -> None:
        """Whether this attempt may still write checkpoints.

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
        """Who asked for the stop, for launchers that treat requests differently."""
        replace_file(self.directory / "stopped_by", f"{reason}\n".encode())

    def write_progress(self, steps_done: int) -> None:
        """`run_dir/last_step`, by which a launcher sees whether an attempt came further."""
        replace_file(self.run_dir / "last_step", f"{steps_done}\n".encode())

    def write_failed(self, text: str) -> None:
        """What ended the attempt, one line that names the rank; the first to know writes it."""
        with contextlib.suppress(FileExistsError), (self.directory / "failed").open("x") as file:
            file.write(text.rstrip() + "\n")

    def read_failed(self) -> str | None:
        with contextlib.suppress(OSError):  # what cannot be read is not known
            return (self.directory / "failed").read_text(encoding="utf-8").strip()
        return None


def begin_attempt(run_dir: Path, world: World) -> Attempt:
    """The same attempt on every rank; rank 0 makes its directory and takes the run over.

    Raises:
        OSError: the directory cannot be written, or the launcher's token is not the owner's (any
            more); on every rank.
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
