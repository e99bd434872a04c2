"""`Lifetime` decides when a run saves, exports and stops."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spmdrl.checkpoint.rng import rng_state
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import gather_objects, world_flags
from spmdrl.memory.json_tensors import json_values
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.own_work import OwnWork
from spmdrl.roles.ledger import Ledger
from spmdrl.roles.policy_sync import PolicySync
from spmdrl.run.resume_point import Moment, Resumed, describe_roles
from spmdrl.run.saving import Saver
from spmdrl.supervision.stopping import StopAsked, Walltime
from spmdrl.supervision.watcher import STOPPING_PHASE, Watcher
from spmdrl.world import World

log = logging.getLogger(__name__)


class Lifetime:
    """Begins and ends steps, the same on every rank.

    Args:
        saver: writes checkpoints.
        resumed: point from which the run resumes; the roles are restored already.
        export: writes the trained models to a directory.
        writer: metrics.jsonl, whose lines checkpoints count.
        watcher: knows the requests to stop.
        work: meter of this rank's role calls.

    `saved` holds numbers that a flow needs again after a resume, equal on all ranks.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        saver: Saver,
        resumed: Resumed,
        export: Callable[[Path], None],
        writer: MetricsWriter,
        watcher: Watcher,
        syncs: Sequence[PolicySync],
        work: OwnWork,
    ) -> None:
        self._world, self._section = world, config.checkpoint
        self._directory, self._export, self._writer = Path(config.run_dir), export, writer
        self._saver, self.watcher, self._syncs = saver, watcher, syncs
        self._walltime = Walltime()
        self._began: float | None = None
        self.first_step = self.steps_done = resumed.steps_done
        self.saved = resumed.saved
        self.ledger = Ledger(
            world,
            str(watcher.attempt.directory),
            watcher.pulse,
            lambda: watcher.stop_asked,
            resumed.journal,
            describe_roles(config),
            work,
        )
        self._ended_by: str | None = None
        self._moment: Moment | None = None
        """State at the beginning of the current step; None between steps."""

    def end_early(self, reason: str) -> None:
        """Let no further step begin: the run is done. The first rank's word decides for all."""
        self._ended_by = reason

    def keep_best(self, step: int) -> None:
        """Keep the checkpoint after `step` steps until this is called with another one."""
        self._saver.keep_best(step)

    def begin(self, step: int) -> bool:
        """Begin a step, or stop the run here; returns whether there are steps to do.

        Raises:
            StopAsked: a stop was requested, or the step would not fit into the job's time.
            OSError: the checkpoint being written has failed.
        """
        now, deadline = time.time(), self.watcher.attempt.deadline
        if self._began is not None:
            self._walltime.steps.append(now - self._began)
        self._began = now
        if self._saver.seconds is not None:
            self._walltime.save = self._saver.seconds
        self.watcher.pulse.at_step(step)
        self.watcher.stop_by = self._walltime.stop_by(deadline)
        late = self._world.is_first and not self._walltime.fits(now, deadline)
        if late:
            log.info("the next step and a save do not fit into the job's time any more")
        failed, stop, over = world_flags(
            self._saver.has_failed,
            self.watcher.look_for_requests() or late,
            self._world.is_first and self._ended_by is not None,
        )
        if failed:
            self._saver.wait()
        if stop:
            raise StopAsked
        self._moment = self._now()
        self.ledger.begin_step(step)
        for sync in self._syncs:
            sync.begin_step(step)
        return not over

    def finish(self, step: int) -> None:
        """End a step, and save a checkpoint or export the models if that is due."""
        self.steps_done = step + 1
        self._moment = None
        self.ledger.finish_step()
        if self._section.every > 0 and self.steps_done % self._section.every == 0:
            self.save()
        export = self._section.export
        if export is not True and export > 0 and self.steps_done % export == 0:
            self._export(self._directory / f"model_step_{self.steps_done:08d}")

    def save(self) -> None:
        """Begin a checkpoint of the steps done, unless it exists."""
        self._saver.save(self._now(), self.ledger.journal())

    def export(self) -> None:
        """Export the trained models at the end of the run, if the configuration wants it."""
        if self._section.export:
            self._export(self._directory / "model")

    def _now(self) -> Moment:
        return Moment(
            steps_done=self.steps_done,
            saved=json_values(self.saved, "run.saved"),
            metrics_lines=self._writer.count_lines(),
            versions=self._saver.states.versions(),
            generators=rng_state(self._world.device),
        )

    def stop(self) -> None:
        """Save, and tell launchers that the run can resume from here."""
        self.watcher.agreed()
        log.info("stopping after %d steps, as asked", self.steps_done)
        began = time.monotonic()
        with self.watcher.pulse.phase(STOPPING_PHASE):
            self._save_stopped()
            self._saver.wait()
        conclude_stop(self.watcher, self._world)
        log.info("stopped; the save took %.1f s", time.monotonic() - began)

    def _save_stopped(self) -> None:
        if self._moment is not None:  # within a step
            self._saver.save(self._moment, self.ledger.journal(), calls=self.ledger.num_done)
        elif self.steps_done > self.first_step:
            self.save()
        else:
            # nothing was done since the checkpoint that the run resumed from
            log.info("step %d was not begun: nothing was to save", self.steps_done + 1)

    def done(self) -> None:
        """Wait for the last checkpoint, and write the outcome `done`."""
        with self.watcher.pulse.phase("checkpoint"):
            self._saver.wait()
        self.watcher.agreed()
        if self._world.is_first:
            self.watcher.attempt.clear_stop_files()
            if self._ended_by is not None:
                log.info("ended after %d steps by %s", self.steps_done, self._ended_by)
                self.watcher.write_stopped_by(self._ended_by)
            self.watcher.attempt.write_outcome("done")


def check_start(watcher: Watcher) -> None:
    """Stop a run before its first step if that was requested; called before slow parts of a start.

    Raises:
        StopAsked: a stop was requested (raised on every rank); `stop_start` handles it.
    """
    (asked,) = world_flags(watcher.look_for_requests())
    if asked:
        raise StopAsked


def stop_start(watcher: Watcher, world: World) -> None:
    """End a stopped start, which saves nothing: the next one begins where it would have."""
    watcher.agreed()
    conclude_stop(watcher, world)
    log.info("stopped at the start, as asked: nothing was to save")


def conclude_stop(watcher: Watcher, world: World) -> None:
    """Write the files that tell launchers of a stop, once everything is saved.

    Raises:
        RuntimeError: some rank has lost something essential (raised on every rank).
    """
    broken = [text for text in gather_objects(watcher.broken) if text is not None]
    if broken:
        raise RuntimeError(f"{broken[0]}; all was saved, and the next start resumes from here")
    if world.is_first:
        watcher.attempt.clear_stop_files()
        watcher.write_stopped_by(watcher.stop_reason())
        watcher.attempt.write_outcome("stopped")
