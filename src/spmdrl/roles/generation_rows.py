"""Rows of a rollout's call: its requests to the engine, and the completions as rows; a stopped call
keeps them, and the one that resumes it begins with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch, Ragged, from_rows
from spmdrl.distributed.row_bytes import Column
from spmdrl.keyed_random import NOISE_VERSION
from spmdrl.models.routing import EXPERT_CHOICES
from spmdrl.roles.kept import PartialResult
from spmdrl.roles.ledger import Interrupted, Stint
from spmdrl.roles.turn_calls import (
    HEARD,
    NONE,
    NUM_TURNS,
    TURN_END,
    TURN_LIMIT,
    TURN_REWARDS,
    TURN_ROW,
    WAITS,
    AllTurns,
    Heard,
    has_parts,
    heard_column,
    heard_texts,
    opened_turns,
    packed_states,
    room_of,
    unpacked_states,
)
from spmdrl.rollout.protocol import (
    OWN,
    Completion,
    Ending,
    Finish,
    Request,
    RolloutEngine,
    SamplingParams,
)
from spmdrl.training.packing import PART_START
from spmdrl.training.support import SUPPORT

_NOTHING = Completion(tokens=(), logprobs=(), finish=Finish.ABORTED)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sampling of a rollout: `group_size` responses per prompt, keyed by (seed, step, prompt).

    Args:
        adapters: the adapters that each prompt is answered with, `group_size` times each: the
            policy's (`OWN`), None for the base alone, or names of `Rollout.add_adapter`. Sample
            `i` has the adapter `i // group_size`.
    """

    seed: int
    step: int
    group_size: int
    sampling: SamplingParams
    adapters: tuple[str | None, ...] = field(default=(OWN,), repr=False)

    def adapter_of(self, sample: int) -> str | None:
        """Return the adapter of the sample with this index."""
        return self.adapters[sample // self.group_size]

    def settings(self) -> Mapping[str, Any]:
        """Return the values that identify the call's configuration."""
        named = {} if self.adapters == (OWN,) else {"adapters": self.adapters}
        return {"generation": self, "noise": NOISE_VERSION, **named}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Requests of a call, with the rows that each one's samples become."""

    requests: Sequence[Request]
    rows: Sequence[Sequence[int]]
    entries: Sequence[str | None]


def run_generation(
    engine: RolloutEngine,
    rows: Batch,
    generation: Generation,
    turns: AllTurns,
    experts: tuple[Column, ...],
    stint: Stint,
) -> Batch | Interrupted:
    """Generate for this replica's rows; rows of one prompt and adapter become one request."""
    asked = _asked(rows, generation, turns, stint.begun)
    state, states = unpacked_states({} if stint.begun is None else stint.begun.state)

    def report(num_tokens: int, num_done: int) -> None:
        stint.beat()
        stint.report(num_done, len(rows))

    with opened_turns(turns, asked.requests, asked.entries, states) as answers:
        # an engine without turns is given none
        more: dict[str, Any] = {} if answers is None else {"turns": answers}
        generated = engine.generate(
            asked.requests,
            seed=generation.seed,
            step=generation.step,
            progress=report,
            should_stop=stint.should_stop,
            state=None if stint.begun is None else state,
            **more,
        )
        kept = {} if answers is None else packed_states(answers.states())
        heard = {} if answers is None else answers.heard()
    by_row: dict[int, Completion] = {}
    for group, completions in zip(asked.rows, generated, strict=True):
        by_row.update(zip(group, completions, strict=True))
    completions = [by_row[row] for row in range(len(rows))]
    batch = _completed(rows, completions, with_margins=generation.sampling.margins)
    if turns:
        batch = _with_turns(batch, rows, completions, _all_heard(stint.begun, heard))
    if has_parts(turns):
        batch = batch.with_columns(tokens={PART_START: _part_starts(batch, rows, completions)})
    if generation.sampling.support:
        batch = batch.with_columns(ragged={SUPPORT: _supports(rows, completions)})
    for column in experts:
        batch = batch.with_columns(tokens={column.name: _experts(column, completions)})
    if any(completion.finish is Finish.ABORTED for completion in completions):
        state = {**engine.aborted_state(), **kept}
        return Interrupted(part=PartialResult(rows=batch, state=state))
    return batch


def _asked(
    rows: Batch, generation: Generation, turns: AllTurns, part: PartialResult | None
) -> _Asked:
    sequences = torch.split(rows["tokens"], rows.lengths.tolist())
    samples = rows["sample_index"].tolist()
    places: dict[tuple[int, str | None], list[int]] = {}
    for row, prompt_id in enumerate(rows["prompt_ids"].tolist()):
        places.setdefault((prompt_id, generation.adapter_of(samples[row])), []).append(row)
    begun = {} if part is None else _begun(part)
    entries: Sequence[str | None] = rows.objects[TURN_ROW] if turns else [None] * len(rows)
    requests = [
        Request(
            tokens=tuple(sequences[group[0]].tolist()),
            prompt_id=prompt_id,
            samples=tuple(samples[row] for row in group),
            sampling=generation.sampling,
            begun=tuple(begun.get((prompt_id, samples[row]), _NOTHING) for row in group)
            if begun
            else (),
            adapter=adapter,
            room=room_of(entries[group[0]], turns, generation.sampling.max_tokens),
        )
        for (prompt_id, adapter), group in places.items()
    ]
    groups = list(places.values())
    return _Asked(requests=requests, rows=groups, entries=[entries[own[0]] for own in groups])


def _begun(part: PartialResult) -> dict[tuple[int, int], Completion]:
    """(prompt id, sample) -> what a stopped call has of it."""
    if part.rows is None:
        return {}
    found = {}
    for row in part.rows.split_rows():
        first = int(row["prompt_lengths"])
        key = int(row["prompt_ids"]), int(row["sample_index"])
        completion = Completion(
            tokens=tuple(row["tokens"][first:].tolist()),
            logprobs=tuple(row["rollout_logprobs"][first:].tolist()),
            finish=Finish(int(row["finish"])),
            margins=tuple(row["margins"][first:].tolist()) if "margins" in row else (),
            experts=row.tokens.get(EXPERT_CHOICES),
            support=row.ragged[SUPPORT].select(torch.arange(first, row.num_tokens))
            if SUPPORT in row.ragged
            else None,
        )
        found[key] = _begun_turns(completion, row, first) if NUM_TURNS in row else completion
    return found


def _begun_turns(completion: Completion, row: Batch, first: int) -> Completion:
    """The completion with the turns of its row.

    Args:
        first: tokens of the prompt.
    """
    mask = row["loss_mask"][first:]
    given = spans(~mask)
    ends = [start - 1 for start, _ in given]
    is_whole = completion.finish is not Finish.ABORTED
    ends += [len(mask) - 1] if is_whole else []
    waits, limit, ending = (int(row[name]) for name in (WAITS, TURN_LIMIT, TURN_END))
    return replace(
        completion,
        given=tuple(given),
        parts=tuple(row[PART_START][first:].nonzero().flatten().tolist())
        if PART_START in row
        else (),
        waits=None if waits == NONE else Finish(waits),
        turn_limit=None if limit == NONE else limit,
        rewards=tuple(row[TURN_REWARDS][first:][ends].tolist()),
        ending=None if ending == NONE else Ending(ending),
    )


def spans(mask: Tensor) -> list[tuple[int, int]]:  # [N] bool
    """Ranges (start, end) of the runs of True."""
    padded = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int()
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _experts(column: Column, completions: Sequence[Completion]) -> Tensor:
    """Experts that each token was routed to; ValueError if the engine records none."""
    none = torch.empty((0, *column.shape), dtype=column.dtype)
    chosen = [c.experts for c in completions if c.experts is not None]
    if len(chosen) < len(completions):
        raise ValueError(
            "algorithm.routing_replay=true, but the rollout's engine records no experts: set "
            "rollout.engine=native, or the other to false"
        )
    return torch.cat([none, *chosen])


def _supports(prompts: Batch, completions: list[Completion]) -> Ragged:
    """The tokens that each token was drawn from; none for a prompt's tokens."""
    counts, values = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int32)]
    for length, completion in zip(prompts.lengths.tolist(), completions, strict=True):
        if completion.support is None:
            raise ValueError("sampling.support=True, but the rollout's engine records no tokens")
        counts += [torch.zeros(length, dtype=torch.int32), completion.support.counts]
        values.append(completion.support.values)
    return Ragged(counts=torch.cat(counts), values=torch.cat(values))


def _completed(prompts: Batch, completions: list[Completion], *, with_margins: bool) -> Batch:
    sequences, logprobs, masks, margins = [], [], [], []
    for prompt, completion in zip(
        torch.split(prompts["tokens"], prompts.lengths.tolist()), completions, strict=True
    ):
        zeros, sampled = [0.0] * len(prompt), [True] * len(completion.tokens)
        for start, end in completion.given:
            sampled[start:end] = [False] * (end - start)
        sequences.append([*prompt.tolist(), *completion.tokens])
        logprobs += [*zeros, *completion.logprobs]
        masks += [False] * len(prompt) + sampled
        margins += [*zeros, *completion.margins]
    batch = from_rows(sequences)
    mask = torch.tensor(masks, dtype=torch.bool)
    asked = {"margins": torch.tensor(margins, dtype=torch.float32)} if with_margins else {}
    return replace(
        batch,
        tokens={
            **batch.tokens,
            **asked,
            "rollout_logprobs": torch.tensor(logprobs, dtype=torch.float32),
            "loss_mask": mask,
        },
        rows={
            "prompt_lengths": prompts.lengths,
            "response_lengths": batch.row_sum(mask),
            "finish": torch.tensor([c.finish for c in completions], dtype=torch.int64),
            # identifies the rows if the call is stopped
            "prompt_ids": prompts["prompt_ids"],
            "sample_index": prompts["sample_index"],
        },
    )


def _part_starts(
    batch: Batch, prompts: Batch, completions: Sequence[Completion]
) -> Tensor:  # bool [T]
    """The first tokens of parts of rows."""
    found = torch.zeros(batch.num_tokens, dtype=torch.bool)
    starts = (batch.offsets()[:-1] + prompts.lengths).tolist()
    for start, completion in zip(starts, completions, strict=True):
        for part in completion.parts:
            found[start + part] = True
    return found


def _all_heard(part: PartialResult | None, heard: Heard) -> dict[tuple[int, int], dict[int, str]]:
    """Add the messages that a stopped call has kept to those of this call, which may have answered
    a turn again.
    """
    found: dict[tuple[int, int], dict[int, str]] = {}
    rows = None if part is None else part.rows
    if rows is not None and HEARD in rows.ragged:
        # of ranks in lockstep only the first one's rows have them
        known = heard_texts(rows)
        for row, own in enumerate(known):
            key = int(rows["prompt_ids"][row]), int(rows["sample_index"][row])
            found.setdefault(key, {}).update(enumerate(own[place] for place in sorted(own)))
    for key, told in heard.items():
        found.setdefault(key, {}).update(told)
    return found


def _with_turns(
    batch: Batch,
    prompts: Batch,
    completions: Sequence[Completion],
    heard: Mapping[tuple[int, int], Mapping[int, str]],
) -> Batch:
    """Add the columns of turns, and those that a stopped call keeps as well."""
    rewards = torch.zeros(batch.num_tokens)
    columns: dict[str, list[int]] = {name: [] for name in (NUM_TURNS, TURN_END, WAITS, TURN_LIMIT)}
    starts = (batch.offsets()[:-1] + prompts.lengths).tolist()
    has_turns = [entry is not None for entry in prompts.objects[TURN_ROW]]
    for start, takes, completion in zip(starts, has_turns, completions, strict=True):
        ends = [first - 1 for first, _ in completion.given]
        is_open = completion.finish is Finish.ABORTED
        ends += [] if is_open else [len(completion.tokens) - 1]
        for end, reward in zip(ends, completion.rewards, strict=False):
            rewards[start + end] = reward
        columns[NUM_TURNS].append(len(ends))
        is_known = takes and completion.ending is not None
        columns[TURN_END].append(int(completion.ending or 0) if is_known else NONE)
        columns[WAITS].append(NONE if completion.waits is None else int(completion.waits))
        columns[TURN_LIMIT].append(completion.turn_limit or NONE)
    rows = {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}
    keys = zip(batch["prompt_ids"].tolist(), batch["sample_index"].tolist(), strict=True)
    answers = [[s + a for a, _ in c.given] for s, c in zip(starts, completions, strict=True)]
    told = heard_column(answers, [heard.get(key, {}) for key in keys], batch.num_tokens)
    return batch.with_columns(tokens={TURN_REWARDS: rewards}, rows=rows, ragged={HEARD: told})
