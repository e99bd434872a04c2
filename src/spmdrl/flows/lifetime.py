"""`Lifetime`: when a run saves, and when it stops."""

from __future__ import annotations

import logging
import time

from spmdrl.config import CheckpointSection
from spmdrl.distributed.reduce import world_any
from spmdrl.flows.saving import Saver
from spmdrl.launch import World
from spmdrl.runtime.stopping import StopAsked
from spmdrl.runtime.walltime import Walltime
from spmdrl.runtime.watcher import STOPPING_PHASE, Watcher

log = logging.getLogger(__name__)


class Lifetime:
    """Begins and ends steps, the same on every rank.

    Args:
        saver: checkpoints and export.
        watcher: knows of requests to stop.

    `saved` holds what a flow wants to find again after a resume: numbers, equal on all ranks.
    """

    def __init__(
        self, world: World, section: CheckpointSection, saver: Saver, watcher: Watcher
    ) -> None:
        self._world, self._section = world, section
        self._saver, self.watcher = saver, watcher
        self._walltime = Walltime()
        self._began: float | None = None
        self.first_step, self.saved = saver.restore()
        self.steps_done = self.first_step

    def begin(self, step: int) -> None:
        """A step begins, or the run stops here.

        Raises:
            StopAsked: a stop was asked for, or the step would not fit into the job's time.
        """
        now, deadline = time.time(), self.watcher.attempt.deadline
        if self._began is not None:
            self._walltime.steps.append(now - self._began)
        self._began = now
        self.watcher.pulse.at_step(step)
        self.watcher.stop_by = self._walltime.stop_by(deadline)
        late = self._world.is_first and not self._walltime.fits(now, deadline)
        if late:
            log.info("the next step and a save do not fit into the job's time any more")
        if world_any(late or self.watcher.stop_asked):
            raise StopAsked

    def finish(self, step: int) -> None:
        """A step is done: a checkpoint where one is due."""
        self.steps_done = step + 1
        if self._section.every > 0 and self.steps_done % self._section.every == 0:
            self.save()

    def save(self) -> None:
        """A checkpoint of the steps that are done, unless it is there."""
        began = time.monotonic()
        self._saver.save(self.steps_done, self.saved)
        self._walltime.saves.append(time.monotonic() - began)
        if self._world.is_first:
            self.watcher.attempt.write_progress(self.steps_done)

    def stop(self) -> None:
        """Save, and say that the run can go on from here."""
        self.watcher.agreed()
        log.info("stopping after %d steps, as asked", self.steps_done)
        with self.watcher.pulse.phase(STOPPING_PHASE):
            self.save()
        if self._world.is_first:
            self.watcher.attempt.clear_stop_files()
            self.watcher.attempt.write_outcome("stopped")

    def done(self) -> None:
        """The run has come to its end."""
        self.watcher.agreed()
        if self._world.is_first:
            self.watcher.attempt.clear_stop_files()
            self.watcher.attempt.write_outcome("done")
