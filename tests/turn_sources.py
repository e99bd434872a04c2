"""Turns without processes: answers that depend on what was drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.config.turns import TurnsSection
from spmdrl.data.prompts import Prompt
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import read_config
from spmdrl.models.files.hf import fill
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.roles.generation import Rollout
from spmdrl.roles.turn_calls import OpenedPrompt, RolloutTurns
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Answer, Ending, Request, Turn, Turns
from spmdrl.world import World

KEY, OTHER = "one", "other"
"""Keys of two sources."""

SHIFT = 6
"""Tokens of answers and prompts begin here, after those that end a text."""


class Scripted:
    """A source whose answers are made of the turn's tokens; it waits for `held` engine steps.

    Args:
        rounds: most turns of a sample.
    """

    def __init__(self, rounds: int = 3, held: int = 0) -> None:
        self.rounds, self.held = rounds, held
        self.opened = 0
        self.told: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...], float]]] = {}
        """(number of the row, sample) -> its turns: tokens, those of the answer, and reward."""

    @contextmanager
    def open(
        self,
        requests: Sequence[Request],
        entries: Sequence[str],
        states: Mapping[tuple[int, int], bytes] | None = None,
    ) -> Iterator[Turns]:
        self.opened += 1
        assert len(requests) == len(entries)
        yield _Answers(self, requests, [json.loads(entry) for entry in entries])


class _Answers:
    def __init__(
        self, source: Scripted, requests: Sequence[Request], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        self._source, self._requests, self._rows = source, requests, rows
        self._open: list[tuple[int, Turn]] = []
        self._heard: dict[tuple[int, int], dict[int, str]] = {}

    def ended(self, turn: Turn) -> None:
        self._open.append((self._source.held, turn))

    def answers(self, wait_s: float) -> Sequence[Answer]:
        ready = [turn for left, turn in self._open if left <= 0 or wait_s]
        self._open = [(left - 1, turn) for left, turn in self._open if turn not in ready]
        return [self._answer(turn) for turn in ready]

    def states(self) -> Mapping[tuple[int, int], bytes]:
        return {(7, 0): b"kept"} if self._open else {}

    def heard(self) -> Mapping[tuple[int, int], Mapping[int, str]]:
        return self._heard

    def _answer(self, turn: Turn) -> Answer:
        answer = self._made(turn)
        key = self._rows[turn.request]["number"], turn.sample
        told = self._source.told.setdefault(key, [])
        told.append((turn.tokens, answer.tokens, answer.reward))
        if answer.tokens:
            own = self._heard.setdefault((self._requests[turn.request].prompt_id, turn.sample), {})
            own[turn.number] = json.dumps([{"role": "user", "content": f"\u00fc{answer.tokens}"}])
        return answer

    def _made(self, turn: Turn) -> Answer:
        request, row = self._requests[turn.request], self._rows[turn.request]
        where: dict[str, Any] = {"request": turn.request, "sample": turn.sample}
        total = sum(turn.tokens) + 7 * turn.number + row["number"]
        where["reward"] = (total % 13) / 4
        if turn.number == self._source.rounds - 1:
            return Answer(**where, ending=Ending.TURNS)
        if total % 7 == 0:
            return Answer(**where, ending=Ending.DONE)
        given = tuple((total + 13 * k) % 100 + SHIFT for k in range(1 + total % 5))
        return Answer(**where, tokens=given, max_tokens=request.sampling.max_tokens)


def opens(rows: Sequence[Mapping[str, Any]]) -> list[OpenedPrompt]:
    """Prompts that depend on the row's `number`."""
    return [
        OpenedPrompt(
            tokens=[SHIFT + (row["number"] * 5 + k) % 90 for k in range(3 + row["number"] % 3)],
            entry=json.dumps({"number": row["number"]}),
            messages=[{"role": "user", "content": f"number {row['number']}"}],
        )
        for row in rows
    ]


def scripted_turns(source: Scripted, **limits: Any) -> RolloutTurns:
    values = {"kind": "script:ed", "max_turns": source.rounds, "max_tokens": 60, **limits}
    return RolloutTurns(
        source=source,
        opens=opens,
        section=TurnsSection(**values),
        longest=8,
        longest_key="data.train.max_tokens",
    )


def rollout_of(
    world: World, path: Path, tp: int = 1, held: int = 0, *, keeps: bool = False
) -> Rollout:
    model = read_config(path)
    degrees = {"dp_replicate": world.size // tp, "tp": tp}
    mesh = Mesh("rollout", range(world.size), degrees, "cpu")
    part = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=tp)
    engine = NativeEngine(model, tp=part, options=NativeOptions(keeps_aborted=keeps))
    for name, parts in engine.weights.table().items():
        fill([(engine.allocate(name), parts.slices)], open_checkpoint(path))
    turns = {KEY: scripted_turns(Scripted(held=held)), OTHER: scripted_turns(Scripted(rounds=2))}
    return Rollout("rollout", mesh, model, engine, turns=turns)


def prompts_of(world: World, keys: tuple[str, ...] = (KEY,), count: int = 4) -> Batch:
    numbers = list(range(count))[world.rank :: world.size]
    prompts = [
        Prompt(
            prompt_id=i,
            text="",
            messages=(),
            tokens=(40, 41 + i),
            answer=None,
            entry={"number": i},
            turns=keys[i % len(keys)],
        )
        for i in numbers
    ]
    return from_rows(
        [prompt.tokens for prompt in prompts],
        rows={"prompt_ids": torch.tensor(numbers, dtype=torch.int64)},
        objects={"prompt": prompts},
    )
