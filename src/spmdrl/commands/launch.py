"""`spmdrl launch`: torchrun's own launcher as a library, in this process, with Ctrl-C as a request.

torchrun answers SIGINT with a stack, exit code 1, and SIGKILL for ranks that have not ended in
30 s. Here a thread answers SIGINT and SIGTERM, passes them on to the ranks, and the launcher waits
for their end. The ranks decide what to do with them (`supervision.signals`).

`Forwarder`: the thread of `spmdrl launch` that passes SIGINT and SIGTERM on to the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmdrl.supervision.error_file import EXIT_CODE, LAUNCH, LOST_PEER, one_line
from spmdrl.supervision.processes import processes
from spmdrl.supervision.signals import (
    DEBUGGER_FILE,
    EXIT_INTERRUPTED,
    HELD,
    Interrupts,
    hold,
    say,
)

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


COMMANDS = ("train", "eval", "generate", "doctor")
"""Commands that ranks can run."""

TICK_S = 0.05

KILL_S = 1.0
"""Seconds that ranks have to end by themselves when they must end at once."""


class Forwarder:
    """Answers the held signals (`supervision.signals.hold`) until the process ends.

    Before any rank is started a signal ends the process: there is nothing to save.

    Args:
        command: the command of the ranks; `train` saves at the first SIGINT.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._interrupts = self._new_interrupts()
        self._is_ending = False
        self._begins = threading.Lock()
        self._has_ranks = False
        self._directory = self._debugger_file = Path()
        self._patience: float | None = None
        self._request: int | None = None
        """Signal that all ranks get, also those that start later."""
        self._told: set[int] = set()
        self._deadline: float | None = None
        threading.Thread(target=self._run, name="spmdrl-forwarder", daemon=True).start()

    def start_ranks(self, command: str, patience: float | None, directory: Path) -> None:
        """Note that ranks may exist from now on.

        Args:
            command: the command that they run.
            patience: seconds that they have after a request; None: no limit.
            directory: temporary directory in which they leave files for the launcher.
        """
        with self._begins:
            self._has_ranks, self._command = True, command
            self._interrupts = self._new_interrupts()
            self._patience, self._directory = patience, directory
            self._debugger_file = directory / "debugger"
            os.environ[DEBUGGER_FILE] = str(self._debugger_file)

    def let_end(self) -> None:
        """Wait, after the ranks have ended, if the thread is about to end the process."""
        while self._is_ending:
            time.sleep(TICK_S)

    def _new_interrupts(self) -> Interrupts:
        return Interrupts(saves=self._command == "train", under_agent=True)

    def _run(self) -> None:
        while True:
            found = signal.sigtimedwait(HELD, TICK_S)
            if found is not None:
                self._take(found.si_signo)
            if self._request is not None:
                self._tell(self._request)
            if self._deadline is not None and time.monotonic() > self._deadline:
                say(f"spmdrl launch: ranks have not ended within {self._patience:g} s: killed")
                self._end()

    def _take(self, number: int) -> None:
        meaning = self._interrupts.meaning(number, time.time())
        with self._begins:
            if not self._has_ranks:
                self._leave_early(number)
        if meaning == "end":
            self._end_at_once()
        elif meaning == "ask":
            if not ranks():
                say(f"spmdrl launch: {signal.Signals(number).name}: no rank has started yet; waits")
            self._told.clear()
            self._request = number
            if self._patience is not None and self._deadline is None:
                self._deadline = time.monotonic() + self._patience

    def _leave_early(self, number: int) -> None:
        if self._command == "train":
            say("spmdrl launch: stopped before any rank was started: nothing was to save")
        else:
            say(f"spmdrl {self._command}: interrupted")
        os._exit(0 if self._command == "train" and number == signal.SIGINT else 128 + number)

    def _tell(self, number: int) -> None:
        """Signal each rank once; a rank that is still starting answers it when it can."""
        for pid in ranks():
            if pid not in self._told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                self._told.add(pid)

    def _end_at_once(self) -> None:
        """Send SIGINT once more, by which ranks end by themselves, and kill those that do not."""
        self._is_ending = True
        if not ranks():
            say(f"spmdrl {self._command}: interrupted: no rank had started")
        self._told.clear()
        self._tell(signal.SIGINT)
        deadline = time.monotonic() + KILL_S
        while ranks() and time.monotonic() < deadline:
            time.sleep(TICK_S)
        if ranks():
            if self._debugger_file.exists():
                self._go_on()
                return
            say(f"spmdrl {self._command}: interrupted: ranks that did not end were killed")
        self._end()

    def _go_on(self) -> None:
        """Continue, because SIGINT was for a rank's debugger."""
        self._debugger_file.unlink()
        self._interrupts = self._new_interrupts()
        self._request = self._deadline = None
        self._is_ending = False

    def _end(self) -> None:
        """Kill the ranks and exit at once: after `import torch` a regular exit takes long."""
        self._is_ending = True
        for pid in ranks():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(EXIT_INTERRUPTED)


def ranks() -> list[int]:
    """Process ids of running ranks: this process's children that lead a session."""
    own = os.getpid()
    return [p.pid for p in processes() if p.parent == own and p.session == p.pid]


USAGE = f"spmdrl launch [torchrun's options] {'|'.join(COMMANDS)} [its words]"

FOREVER_S = 10**8
"""Seconds of a shutdown that are practically no limit."""


def launch(
    words: Sequence[str],
    before: Sequence[str] = (),
    check: Callable[[Sequence[str]], None] = lambda words: None,
) -> int:
    """Run a command on the ranks of this node; returns the exit code, 0 also after a saved stop.

    Args:
        words: torchrun's options, the command and its words.
        before: words of `spmdrl` that come before the command.
        check: gets the words that the ranks will run; if it raises, no rank starts.

    Raises:
        ValueError: the words cannot be used.
    """
    hold()
    command = next((word for word in words if word in COMMANDS), None)
    if command is None and not {"-h", "--help"} & set(words):
        raise ValueError(f"no command to run on the ranks: {USAGE}")
    forwarder = Forwarder(command or "launch")
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import run

    if "LOGLEVEL" not in os.environ:
        # it warns of each process that it ends
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    with tempfile.TemporaryDirectory(prefix="spmdrl_launch_") as directory:
        options = torchrun_options(words, before, directory)
        command = options.training_script_args[len(before)]
        check(options.training_script_args)
        forwarder.start_ranks(command, _patience(options), Path(directory))
        try:
            run(options)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            forwarder.let_end()
            return show_failure(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
        except (DistError, RendezvousError) as error:  # an address in use, or one that is missing
            raise ValueError(f"the ranks cannot meet: {one_line(error)}") from error
    return 0


def torchrun_options(
    words: Sequence[str], before: Sequence[str], directory: str
) -> argparse.Namespace:
    """Parse words as torchrun does, with the ranks' command in place of a script.

    Also sets the variables that the ranks inherit.
    """
    from torch.distributed.run import (
        determine_local_world_size,
        get_args_parser,
        parse_min_max_nnodes,
    )

    parser = get_args_parser()
    parser.prog, parser.usage = "spmdrl launch", USAGE
    options = parser.parse_args(_with_fold_last(words))
    if options.training_script not in COMMANDS:
        raise ValueError(f"{options.training_script!r} is no command of the ranks: {USAGE}")
    if options.module or options.no_python or options.run_path:
        raise ValueError(f"-m, --no-python and --run-path name a program, which is known: {USAGE}")
    size = determine_local_world_size(options.nproc_per_node)
    if size < 1:
        raise ValueError(f"--nproc-per-node={size}: it must be at least 1")
    try:
        least, most = parse_min_max_nnodes(options.nnodes)
    except (RuntimeError, ValueError):
        least, most = 0, 0
    if not 0 < least <= most:
        raise ValueError(f"--nnodes={options.nnodes}: it must be a number or MIN:MAX, from 1 on")
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts={options.max_restarts}: it must be at least 0")
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // size)))
    os.environ[LAUNCH] = "launch"
    options.nproc_per_node = str(size)
    options.training_script_args = [
        *before,
        options.training_script,
        *options.training_script_args,
    ]
    options.training_script, options.module = "spmdrl", True
    options.log_dir = options.log_dir or directory
    options.signals_to_handle = ",".join(_agents_signals(options.signals_to_handle))
    return options


def _with_fold_last(words: Sequence[str]) -> list[str]:
    """Move `--fold` from torchrun's options to the words of the command, which knows it."""
    start = next((i for i, word in enumerate(words) if word in COMMANDS), len(words))
    before = [word for word in words[:start] if word != "--fold"]
    return [*before, *words[start:], *["--fold"] * (start - len(before))]


def _agents_signals(wanted: str) -> list[str]:
    """Signals for torchrun's agent: the wanted ones, without those that the forwarder answers and
    those that are ignored (SIGHUP under nohup).
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in signal.Signals.__members__]
    if unknown:
        raise ValueError(f"--signals-to-handle: {unknown} are no names of signals")
    found = [
        name
        for name in names
        if name not in ("SIGINT", "SIGTERM")
        and signal.getsignal(signal.Signals[name]) != signal.SIG_IGN
    ]
    return found or ["SIGQUIT"]  # the list must not be empty


def _patience(options: argparse.Namespace) -> float | None:
    """Seconds that ranks have after a request; None: the user sets no limit."""
    if options.shutdown_timeout is None:
        told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        options.shutdown_timeout = FOREVER_S if told is None else int(told)
        return None if told is None else float(told)
    return float(options.shutdown_timeout)


def show_failure(failures: Mapping[int, ProcessFailure]) -> int:
    """Show once why the ranks failed; returns the exit code.

    A user's mistake is shown as one line, a crash as the stack of the first rank that raised.
    """
    rank = min(failures, key=lambda rank: _order(failures[rank]))
    failure = failures[rank]
    message = _message(failure)
    code = failure.exitcode if message is None else int(message["extraInfo"][EXIT_CODE])
    if message is None:
        cause = f"ended with exit code {code}" if code > 0 else f"died of {failure.signal_name()}"
        if code not in (EXIT_INTERRUPTED, EXIT_BAD_NODES):
            _show(f"spmdrl launch: rank {rank} (process {failure.pid}) {cause}")
    elif code == EXIT_BAD_INPUT or _is_lost(message):
        _show(str(message["message"]))
    else:
        _show(f"rank {rank}:\n{message['extraInfo']['py_callstack'].rstrip()}")
    return code if code > 0 else 128 - code


EXIT_BAD_INPUT = 2
EXIT_BAD_NODES = 3
"""Exit code of `spmdrl doctor` if it has named bad nodes."""


def _order(failure: ProcessFailure) -> tuple[int, int, int]:
    """Key for sorting; the least is the first cause: a rank's own error, a death, then the rest."""
    message = _message(failure)
    if message is not None and not _is_lost(message):
        kind = 0
    elif failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
        kind = 1
    else:
        kind = 2 if failure.exitcode > 0 else 3
    return kind, failure.timestamp, failure.local_rank


def _message(failure: ProcessFailure) -> dict[str, Any] | None:
    """Content of the rank's error file; None: it wrote none."""
    message = failure.error_file_data["message"]
    return message if isinstance(message, dict) else None


def _is_lost(message: Mapping[str, Any]) -> bool:
    return bool(message["extraInfo"][LOST_PEER])


def _show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
