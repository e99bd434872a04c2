"""`CheckpointWriter`: copies a checkpoint's contents, and writes them while training continues.

Each rank copies its part to the host (page-locked if there is a GPU), and a thread writes it under
a temporary name, with fsync and a checksum. Threads report through the store, so no collective runs
in parallel to the training's. When all parts are written, rank 0's thread writes the index, renames
the directory, and makes `latest` name it: a reader never sees a partial checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from spmdrl.atomic_files import replace_file, sync
from spmdrl.checkpoint.index import (
    CHECKPOINTS,
    INDEX,
    LATEST,
    PRIVATE,
    Entry,
    Mark,
    Tensors,
    entries_of,
    index_text,
    is_checkpoint_name,
    rank_file,
)
from spmdrl.checkpoint.staging import Staging
from spmdrl.checkpoint.stream import check_tensors, write_safetensors
from spmdrl.distributed.reduce import agreed, broadcast_object, world_any
from spmdrl.memory.json_tensors import json_values
from spmdrl.world import World

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)

_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Rule for the checkpoints to keep.

    Args:
        last: number of newest checkpoints to keep, not counting those that `every` keeps.
        every: keep all checkpoints whose number of steps is a multiple of it; 0 keeps none.
    """

    last: int
    every: int = 0

    def keeps(self, name: str, best: int | None = None) -> bool:
        """Whether the checkpoint is kept, whatever its age.

        Args:
            best: number of steps of one that is kept; None: none is.
        """
        whole = re.fullmatch(r"step_(\d{8})(\.\d+)?", name)
        if whole is None:
            return False
        step = int(whole[1])
        return step == best or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True, kw_only=True)
class _Job:
    number: int
    name: str
    step: int
    state: str
    staged: Mapping[str, Tensor]
    began: float
    copy_seconds: float


class CheckpointWriter:
    """Writes checkpoints, one at a time. Every rank of the world has one and calls it alike.

    Args:
        root: the directory of the checkpoints.
        tag: unique among the starts of the run, so that a start on a lost node writes elsewhere.
        permit: called before a checkpoint is published; an OSError forbids it.
        published: called with the step of a published checkpoint, on rank 0's writing thread.
        progress: called whenever some rank makes progress that this one waits for.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        retention: Retention,
        *,
        tag: str = "",
        permit: Callable[[], None] = lambda: None,
        published: Callable[[int], None] = lambda step: None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._retention, self._tag = root, retention, tag
        self._rank, self._size = world.rank, world.size
        self._permit, self._published, self._progress = permit, published, progress
        # several writers of a process must not read each other's keys
        serial = world.store.add("checkpoint writers", 1) if world.is_first else 0
        prefix = f"checkpoints/{broadcast_object(serial, 0)}"
        self._store, self._thread_store = world.connect(prefix), world.connect(prefix)
        self._staging = Staging()
        self._entries: tuple[Entry, ...] | None = None
        self._all_entries: tuple[Entry, ...] = ()
        """Entries of all ranks, on rank 0."""
        self._known: set[str] | None = None
        self._number = 0
        self._thread: threading.Thread | None = None
        self._failed = threading.Event()
        self.seconds: float | None = None
        """Seconds from the start of the last checkpoint until it was published; only on rank 0."""
        self.best: int | None = None
        """Number of steps of the checkpoint that is kept until this names another one."""

    def adopt(self, names: Iterable[str]) -> None:
        """Limit the checkpoints that `Retention` may remove to these and later ones; before this
        call, all that exist are the run's.
        """
        self._known = set(names)
        others = sorted(_names(self._root) - self._known) if self._rank == 0 else []
        if others:
            log.info(
                "%s: the run does not resume from %s, and so will not remove them",
                *(self._root, ", ".join(others)),
            )

    @property
    def has_failed(self) -> bool:
        """Whether the current checkpoint failed, on rank 0; `wait` raises it on all ranks."""
        return self._failed.is_set()

    def begin(
        self,
        name: str,
        step: int,
        state: Mapping[str, Any],
        owned: Tensors,
        private: Mapping[str, Tensor],
    ) -> None:
        """Copy this rank's part, and start writing the checkpoint `name`.

        Args:
            step: number of finished steps.
            state: values that `json_values` accepts, equal on all ranks.
            owned: this rank's tensors with the slices that it must write: one rank writes each
                slice of the global tensors (`owners.owned_slices` chooses it).
            private: tensors that this rank keeps for itself.

        Raises:
            ValueError: a checkpoint cannot keep a tensor or value of this kind; raised on every
                rank, naming it; nothing was started.
            OSError: the previous checkpoint could not be written, see `wait`.
        """
        self.wait()
        began = time.monotonic()

        def checked() -> str:
            check_tensors({key: tensor for key, (tensor, _) in owned.items()})
            check_tensors(private)
            known = _names(self._root) if self._known is None else self._known
            return json.dumps({**json_values(state, "the state"), CHECKPOINTS: sorted(known)})

        text = agreed(ValueError, checked)
        entries, boxes = entries_of(owned, rank_file(self._rank))
        self._share(entries)
        own = {PRIVATE + key: tensor for key, tensor in private.items()}
        copying = time.monotonic()
        staged = self._staging.copies({**boxes, **own}, self._progress)
        job = _Job(
            number=self._number,
            name=name,
            step=step,
            state=text,
            staged=staged,
            began=began,
            copy_seconds=time.monotonic() - copying,
        )
        self._number += 1
        self._forget(self._number - 3)
        self._thread = threading.Thread(
            target=self._work, args=(job,), name="spmdrl-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current checkpoint, if there is one, is published.

        Raises:
            OSError: it could not be written; raised on every rank, naming the path; older
                checkpoints are untouched.
        """
        if self._thread is None:
            return
        number, thread = self._number - 1, self._thread
        verdict = json.loads(self._await(self._store, f"{number}/done", number, thread))
        thread.join()
        self._thread = None
        self._failed.clear()
        world_any(False)  # rank 0 may host the store: it must not leave before all have read
        if verdict["error"] is not None:
            raise OSError(
                f"the checkpoint {self._root / verdict['name']} could not be written: "
                f"{verdict['error']}; earlier checkpoints are untouched"
            )

    def _share(self, entries: tuple[Entry, ...]) -> None:
        """Send this rank's entries to rank 0, unless no rank's have changed since the last time."""
        if not world_any(entries != self._entries):
            return
        self._entries = entries
        parts: list[Any] | None = [None] * self._size if self._rank == 0 else None
        dist.gather_object(entries, parts, dst=0)
        self._all_entries = tuple(entry for part in parts or [] for entry in part)
        places = {(entry.group, entry.piece) for entry in self._all_entries}
        twice = len(self._all_entries) - len(places)
        assert twice == 0, f"{twice} slices were written twice"

    def _forget(self, number: int) -> None:
        """Delete, on rank 0, the keys of an old checkpoint, which every rank has read."""
        if self._rank == 0 and number >= 0:
            for key in (*range(self._size), "progress", "done"):
                self._store.delete_key(f"{number}/{key}")

    # The thread

    def _work(self, job: _Job) -> None:
        """Body of the thread; it reports any outcome, because all ranks wait for it."""
        partial = self._root / f".partial-{self._tag}-{job.number}"
        report: dict[str, Any]
        try:
            report = {"mark": asdict(self._write(job, partial))}
        except BaseException as error:
            report = {"error": _told(self._rank, error)}
        self._thread_store.set(f"{job.number}/{self._rank}", json.dumps(report))
        if self._rank != 0:
            return
        try:
            error_text = self._conclude(job, partial)
        except BaseException as error:
            error_text = _told(0, error)
        if error_text is not None:
            shutil.rmtree(partial, ignore_errors=True)
            self._failed.set()
            log.error("checkpoint %s: %s; the run ends at its next step", job.name, error_text)
        verdict = json.dumps({"name": job.name, "error": error_text})
        self._thread_store.set(f"{job.number}/done", verdict)

    def _write(self, job: _Job, partial: Path) -> Mark:
        """Write this rank's file."""
        partial.mkdir(parents=True, exist_ok=True)
        return write_safetensors(
            partial / rank_file(self._rank), job.staged, lambda: self._advance(job)
        )

    def _advance(self, job: _Job) -> None:
        """Report progress, also to the ranks that wait for this one."""
        self._thread_store.add(f"{job.number}/progress", 1)
        self._progress()

    def _conclude(self, job: _Job, partial: Path) -> str | None:
        """Publish the checkpoint, on rank 0, once all parts are written; returns a rank's error.

        Raises:
            Exception: this rank's own error.
        """
        keys = [f"{job.number}/{rank}" for rank in range(self._size)]
        reports = [json.loads(self._await(self._thread_store, key, job.number)) for key in keys]
        errors: list[str] = [report["error"] for report in reports if "error" in report]
        if errors:
            return errors[0]
        files = {rank_file(r): Mark(**found["mark"]) for r, found in enumerate(reports)}
        self._publish(job, partial, files)
        self._published(job.step)
        self.seconds = time.monotonic() - job.began
        log.info(
            "checkpoint %s: %.2f s to copy %.3f GB of rank 0, there after %.1f s",
            job.name,
            job.copy_seconds,
            sum(tensor.nbytes for tensor in job.staged.values()) / 1e9,
            self.seconds,
        )
        return None

    def _publish(self, job: _Job, partial: Path, files: Mapping[str, Mark]) -> None:
        final, parts = self._root / job.name, []
        for part in index_text(
            job.step, job.state, files, self._all_entries, lambda: self._advance(job)
        ):
            parts.append(part.encode())
        replace_file(partial / INDEX, b"".join(parts))
        sync(partial)
        self._permit()
        # next to an older run's of this step, which `latest` may name
        names = (final.with_name(f"{final.name}.{number}") for number in count(1))
        final = next(path for path in chain([final], names) if not path.exists())
        partial.rename(final)
        sync(final.parent)
        replace_file(final.parent / LATEST, final.name.encode())
        there = _names(self._root)
        if self._known is not None:
            self._known = {*self._known, final.name} & there
            there = self._known
        kept = {name for name in there if self._retention.keeps(name, self.best)}
        others = [self._root / name for name in there - kept - {final.name}]
        others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        surplus = len(others) + (final.name not in kept) - self._retention.last
        for path in others[: max(0, surplus)]:
            shutil.rmtree(path, ignore_errors=True)  # leftovers go with the next checkpoint
            self._progress()

    def _await(
        self, store: Store, key: str, number: int, thread: threading.Thread | None = None
    ) -> bytes:
        """The value of a key that some rank will set; progress of any rank counts as ours.

        Args:
            thread: this rank's thread, which must report before it ends.
        """
        seen = 0
        while not store.check([key]):
            time.sleep(_POLL_S)
            if thread is not None and not thread.is_alive():
                self._report_for(store, number)
                thread = None
            count = store.add(f"{number}/progress", 0)
            if count != seen:
                seen = count
                self._progress()
        value: bytes = store.get(key)
        return value

    def _report_for(self, store: Store, number: int) -> None:
        """Report for the thread, which has ended, anything that it has not reported."""
        text = f"rank {self._rank}: the thread that writes it ended without a word"
        if not store.check([f"{number}/{self._rank}"]):
            store.set(f"{number}/{self._rank}", json.dumps({"error": text}))
        if self._rank == 0 and not store.check([f"{number}/done"]):
            store.set(f"{number}/done", json.dumps({"name": f"number {number}", "error": text}))


def _told(rank: int, error: BaseException) -> str:
    """A rank's error as text: a system error with advice, others with type and a logged stack."""
    if not isinstance(error, OSError):
        log.error("the thread that writes a checkpoint", exc_info=error)
        return f"rank {rank}: {type(error).__name__}: {error}"
    fix = "" if error.errno is None else ": free space or choose another run_dir"
    return f"rank {rank}: {error}{fix}"


def _names(root: Path) -> set[str]:
    return {path.name for path in root.glob("step_*") if is_checkpoint_name(path.name)}


def remove_partial(root: Path) -> None:
    """Remove what unfinished checkpoints have left below `root`."""
    for path in root.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
