"""Settings of a source of turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spmdrl.rewards.server import passed_variables
from spmdrl.turns.serving import EnvironmentWork


@dataclass(frozen=True, kw_only=True)
class TurnsSettings:
    """Settings of a source of turns.

    Args:
        kind: place of the environment's class, `module:Class` or `path/to/file.py:Class`.
        options: keyword arguments of each object.
        key: key of the configuration that has all of these, for messages.
        max_turns: most turns of a sample.
        workers: most processes of a rank.
        timeout_s: seconds of one call of an object: `start`, `step`, `load` or `close`.
        memory_mb: MiB that the objects of one process may take; None: no limit.
        failed_reward: reward of a turn that could not be answered.
        seconds: wall-clock seconds from a sample's first turn on, after which it gets no other;
            None: no limit.
        output: file for what objects print; None: it is dropped.
        renders_history: whether a turn's context is the conversation as the chat template renders
            it (`rollout.turns.history: rendered`): where it is not what was there, a part begins.
        environment: names of this process's variables that objects see in addition to `PASSED` of
            `rewards.server`.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    key: str = "rollout.turns"
    max_turns: int = 8
    workers: int = 8
    timeout_s: float = 30.0
    memory_mb: int | None = 4096
    failed_reward: float = 0.0
    seconds: float | None = None
    output: Path | None = None
    renders_history: bool = False
    environment: tuple[str, ...] = ()

    def work(self) -> EnvironmentWork:
        """Return what a worker does."""
        return EnvironmentWork(
            kind=self.kind,
            options=dict(self.options),
            key=self.key,
            cpu_s=self.timeout_s,
            memory_mb=self.memory_mb,
            output=None if self.output is None else str(self.output.resolve()),
            environment=passed_variables(self.environment),
        )
