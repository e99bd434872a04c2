"""Turns in a rollout's calls: the prompts that environments begin with, the columns of rows whose
samples took turns, and the turns of prompts from several sources in one call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from spmdrl.batch import Batch, Ragged, from_rows
from spmdrl.config.turns import TurnsSection
from spmdrl.data.prompts import Prompt
from spmdrl.distributed.reduce import agreed
from spmdrl.distributed.row_bytes import Column
from spmdrl.rollout.protocol import Answer, Ending, Finish, Request, Turn, Turns, TurnSource
from spmdrl.training.packing import PART_START

TURN_ROW = "turn_row"
"""Text column of prompts: JSON of what the rollout's ranks need to answer turns, or None."""

TURN_REWARDS, NUM_TURNS, TURN_END = "turn_rewards", "num_turns", "turn_end"
"""Columns of rows that took turns: float32 `[T]`, a turn's reward at its last sampled token, else
0; int64 `[B]`; int64 `[B]`, an `Ending`, -1 for a row whose source has no turns."""

OPENING = "opening"
"""Python column of rows: the messages that their environment begins with, or None."""

HEARD = "turn_messages"
"""Ragged column of rows that took turns, uint8: at the first token of an answer, the JSON of its
messages; nothing at other tokens."""

WAITS, TURN_LIMIT = "turn_waits", "turn_limit"
"""Row columns of a stopped call: the state of a turn that is not answered yet; -1: none."""

TURN_COLUMNS = (
    Column(name=TURN_REWARDS),
    Column(name=NUM_TURNS, kind="row", dtype=torch.int64),
    Column(name=TURN_END, kind="row", dtype=torch.int64),
    Column(name=HEARD, kind="ragged", dtype=torch.uint8),
)

PART_COLUMNS = (Column(name=PART_START, dtype=torch.bool),)
"""Columns of rows whose samples may have parts (`rollout.turns.history: rendered`)."""

NONE = -1


@dataclass(frozen=True, kw_only=True)
class OpenedPrompt:
    """Begin of a prompt's samples.

    Args:
        tokens: the rendered messages.
        entry: what `TurnSource.open` is given for the prompt.
        messages: what was rendered.
    """

    tokens: Sequence[int]
    entry: str
    messages: Sequence[Mapping[str, Any]] = ()


class Opens(Protocol):
    """Maker of prompts, on their home ranks."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[OpenedPrompt]:
        """Begin the samples of rows of the data. ValueError: the environment fails."""


@dataclass(frozen=True, kw_only=True)
class RolloutTurns:
    """The turns that samples take for the rows of some sources of data.

    Args:
        source: answers them, on the rollout's ranks.
        opens: begins them, on any rank.
        section: their limits.
        longest: most tokens of a prompt.
        longest_key: the key with that limit, for messages.
        rewritten: names of what the chat template writes otherwise once another message follows
            (`TurnRenderer.rewritten`).
        described: text that is equal for equal environments.
        counts: counts of the source's last call on this rank.
        metrics: sums of its observations' own metrics.
    """

    source: TurnSource
    opens: Opens
    section: TurnsSection
    longest: int
    longest_key: str
    rewritten: tuple[str, ...] = ()
    described: str = ""
    counts: Callable[[], Mapping[str, int]] = dict
    metrics: Callable[[], Mapping[str, float]] = dict


AllTurns = Mapping[str, RolloutTurns]
"""`Prompt.turns` -> its turns."""

NO_TURNS: AllTurns = MappingProxyType({})


def has_parts(turns: AllTurns) -> bool:
    """Whether samples of some source may have parts, so that rows have the columns of them."""
    return any(own.section.history == "rendered" for own in turns.values())


def turn_columns(turns: AllTurns) -> tuple[Column, ...]:
    """Columns of turns that come home from a call."""
    return (*(TURN_COLUMNS if turns else ()), *(PART_COLUMNS if has_parts(turns) else ()))


def with_openings(prompts: Batch, turns: AllTurns) -> Batch:
    """Replace prompts' tokens by what their environments begin with, and add the columns `TURN_ROW`
    and `OPENING`.

    Every rank of the world calls it.

    Args:
        prompts: home rows with the Python column `prompt`.

    Raises:
        ValueError: an environment fails, or begins with too long a prompt; on every rank.
    """

    def opened() -> Batch:
        given: Sequence[Prompt] = prompts.objects.get("prompt", ())
        if len(given) < len(prompts):
            raise ValueError(
                "rollout.turns: rows to sample from need the Python column `prompt`, as run.rows "
                f"gives it; they have {prompts.columns()}"
            )
        tokens: list[Sequence[int]] = [prompt.tokens for prompt in given]
        entries: list[str | None] = [None] * len(given)
        messages: list[Sequence[Mapping[str, Any]] | None] = [None] * len(given)
        for key in dict.fromkeys(prompt.turns for prompt in given if prompt.turns):
            own = [i for i, prompt in enumerate(given) if prompt.turns == key]
            made = turns[key].opens([row_of(given[i]) for i in own])
            for i, one in zip(own, made, strict=True):
                check_opening(one, turns[key], given[i])
                tokens[i], messages[i] = one.tokens, one.messages
                entries[i] = json.dumps({"turns": key, "entry": one.entry})
        return from_rows(
            tokens,
            rows=prompts.rows,
            objects={**prompts.objects, TURN_ROW: entries, OPENING: messages},
        )

    return agreed(ValueError, opened)


def row_of(prompt: Prompt) -> Mapping[str, Any]:
    """Return a prompt's row as `TurnEnvironment.start` is given it."""
    return {**prompt.entry, "messages": [dict(message) for message in prompt.messages]}


def check_opening(opened: OpenedPrompt, turns: RolloutTurns, prompt: Prompt) -> None:
    """Raise ValueError if an environment begins with too long a prompt, or none."""
    if not 0 < len(opened.tokens) <= turns.longest:
        raise ValueError(
            f"{turns.longest_key}={turns.longest}: the environment {turns.section.kind} begins row "
            f"{prompt.prompt_id} of the data with a prompt of {len(opened.tokens)} tokens: raise "
            "the key, or leave the row out"
        )


def room_of(entry: str | None, turns: AllTurns, max_tokens: int) -> int:
    """Most tokens of a prompt's turns and their answers; 0 for a prompt without turns.

    Args:
        entry: the prompt's `TURN_ROW`.
        max_tokens: most tokens of a turn.
    """
    return 0 if entry is None else turns[json.loads(entry)["turns"]].section.room(max_tokens)


def rooms(batch: Batch, turns: AllTurns, max_tokens: int) -> Tensor:
    """The most tokens after each row's prompt: int64 `[B]`."""
    if not turns:
        return torch.full((len(batch),), max_tokens)
    found = [room_of(entry, turns, max_tokens) for entry in batch.objects[TURN_ROW]]
    return torch.tensor([room or max_tokens for room in found], dtype=torch.int64)


def described(turns: AllTurns) -> dict[str, Any]:
    """Values that identify the turns of a call; nothing without turns."""
    return {"turns": [(key, own.described) for key, own in turns.items()]} if turns else {}


Heard = Mapping[tuple[int, int], Mapping[int, str]]
"""(prompt id, sample) -> number of a turn -> JSON of its answer's messages."""


def heard_column(
    starts: Sequence[Sequence[int]], heard: Sequence[Mapping[int, str]], num_tokens: int
) -> Ragged:
    """Make the column `HEARD`.

    Args:
        starts: the first tokens of each row's answers, as places in the batch.
        heard: each row's messages; those of answers that others have given may be missing.
        num_tokens: tokens of the batch.
    """
    counts = torch.zeros(num_tokens, dtype=torch.int32)
    parts = []
    for own, known in zip(starts, heard, strict=True):
        for number, start in enumerate(own):
            data = known.get(number, "").encode()
            counts[start] = len(data)
            parts.append(data)
    values = torch.frombuffer(bytearray(b"".join(parts) or b"-"), dtype=torch.uint8)
    return Ragged(counts=counts, values=values[: int(counts.sum())])


def heard_texts(batch: Batch) -> list[dict[int, str]]:
    """Read the column `HEARD`: for each row, place of a token in the row -> JSON of messages."""
    ragged, rows, offsets = batch.ragged[HEARD], batch.row_of_token(), batch.offsets()
    ends = ragged.counts.long().cumsum(0)
    data = ragged.values.numpy().tobytes()
    found: list[dict[int, str]] = [{} for _ in range(len(batch))]
    for place in ragged.counts.nonzero().flatten().tolist():
        row, end = int(rows[place]), int(ends[place])
        text = data[end - int(ragged.counts[place]) : end].decode()
        found[row][place - int(offsets[row])] = text
    return found


States = Mapping[tuple[int, int], bytes]
"""(prompt id, sample) -> what a stopped call has kept of its environment."""

_STATE = "turns/"


def packed_states(states: States) -> dict[str, Tensor]:
    """States as tensors, for a `PartialResult`."""
    return {
        f"{_STATE}{prompt_id}/{sample}": torch.frombuffer(bytearray(state), dtype=torch.uint8)
        for (prompt_id, sample), state in states.items()
        if state
    }


def unpacked_states(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], States]:
    """Divide a `PartialResult`'s state into the engine's and that of turns."""
    engine = {name: tensor for name, tensor in state.items() if not name.startswith(_STATE)}
    found = {}
    for name, tensor in state.items():
        if name.startswith(_STATE):
            prompt_id, sample = name.removeprefix(_STATE).split("/")
            found[int(prompt_id), int(sample)] = tensor.numpy().tobytes()
    return engine, found


@contextmanager
def opened_turns(
    turns: AllTurns, requests: Sequence[Request], entries: Sequence[str | None], states: States
) -> Iterator[Turns | None]:
    """Open the turns of a call's requests, each at its own source; None without turns.

    Args:
        entries: the requests' `TURN_ROW`.
    """
    if not turns:
        yield None
        return
    places: dict[str, list[int]] = {}
    given: dict[int, str] = {}  # what a request's source is given
    for place, entry in enumerate(entries):
        if entry is not None:
            known = json.loads(entry)
            places.setdefault(known["turns"], []).append(place)
            given[place] = known["entry"]
    with ExitStack() as stack:
        parts = []
        for key, own in places.items():
            source = turns[key].source
            made = source.open([requests[i] for i in own], [given[i] for i in own], states)
            parts.append(_Part(turns=stack.enter_context(made), places=own))
        yield _Parts(parts, len(requests))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Turns of some requests, which it counts from 0.

    Args:
        places: the requests' places in the call.
    """

    turns: Turns
    places: Sequence[int]


class _Parts:
    """Turns of requests with different sources, or without turns: these end with their first."""

    def __init__(self, parts: Sequence[_Part], count: int) -> None:
        self._parts = parts
        self._found: list[tuple[_Part, int] | None] = [None] * count
        for part in parts:
            for own, place in enumerate(part.places):
                self._found[place] = (part, own)
        self._at_once: list[Answer] = []

    def ended(self, turn: Turn) -> None:
        found = self._found[turn.request]
        if found is None:
            ending = Ending.DONE if turn.finish is Finish.STOP else Ending.ROOM
            answer = Answer(request=turn.request, sample=turn.sample, ending=ending)
            self._at_once.append(answer)
            return
        part, own = found
        part.turns.ended(replace(turn, request=own))

    def answers(self, wait_s: float) -> Sequence[Answer]:
        found, self._at_once = self._at_once, []
        for part in self._parts:
            share = 0.0 if found else wait_s / len(self._parts)
            found += [replace(a, request=part.places[a.request]) for a in part.turns.answers(share)]
        return found

    def states(self) -> States:
        return {key: state for part in self._parts for key, state in part.turns.states().items()}

    def heard(self) -> Heard:
        return {key: told for part in self._parts for key, told in part.turns.heard().items()}
