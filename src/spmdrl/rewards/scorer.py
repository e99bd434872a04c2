"""Rewards of generated rows: by functions in the pool, reward models, judges, users' own roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from spmdrl.batch import Batch, from_rows
from spmdrl.config.user_objects import AgreedError
from spmdrl.data.prompts import Prompt
from spmdrl.distributed.reduce import gather_objects, world_any
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.rewards.arguments import MESSAGES
from spmdrl.rewards.asking import JudgeAsked, Scored, score_call, tell_failures
from spmdrl.rewards.conversations import conversations
from spmdrl.rewards.judging import (
    FailureCount,
    RewardError,
    RewardJob,
    RewardResult,
    Teller,
    add_counts,
)
from spmdrl.rewards.pool import RewardPool
from spmdrl.roles.calls import Call, together
from spmdrl.roles.custom import SCORES, CustomRole
from spmdrl.roles.generation_rows import spans
from spmdrl.roles.handles import Reward
from spmdrl.roles.kept import origin_of
from spmdrl.roles.ledger import Stint, current, places_of
from spmdrl.roles.turn_calls import NUM_TURNS, TURN_REWARDS
from spmdrl.rollout.protocol import Finish
from spmdrl.rollout.stops import StopTexts
from spmdrl.training.packing import PART_START

OF_TURNS = "reward/turns"
"""Component of the reward: the sum of a row's rewards of turns."""

Retokenize = Callable[[Prompt, str, bool], Sequence[int]]
"""(prompt, response text, whether it was cut) -> token ids for another model."""


class RewardsFailed(AgreedError):
    """Reward functions fail so often that the user must fix them."""


@dataclass(frozen=True, kw_only=True)
class ScoringRole:
    """A role whose `scores` are part of the reward.

    Args:
        weight: factor of its score in the sum.
        retokenize: for a reward model with its own tokenizer; None: it reads the tokens.
    """

    role: Reward | CustomRole | JudgeAsked
    weight: float
    retokenize: Retokenize | None = None

    @property
    def name(self) -> str:
        return self.role.role.name if isinstance(self.role, JudgeAsked) else self.role.name


class Scorer:
    """Scorer that adds texts and rewards to home rows. All ranks of the world call it together.

    Args:
        pool: this rank's reward workers; None: no reward functions.
        texts: texts of tokens.
        stop: stop strings; the text ends before the first of them.
        roles: roles whose scores are added.
    """

    def __init__(
        self,
        pool: RewardPool | None,
        texts: TokenTexts,
        stop: Sequence[str] = (),
        roles: Sequence[ScoringRole] = (),
    ) -> None:
        self.pool, self.stops, self._texts = pool, StopTexts(stop, texts), texts
        self._teller = None if pool is None else Teller(pool.failed)
        self.roles = tuple(roles)

    def texts(self, batch: Batch) -> list[str]:
        """The response texts of rows from `rollout.generate`: those of turns, a line break between
        two.
        """
        if NUM_TURNS in batch:
            return ["\n".join(turn["text"] for turn in own) for own in self.turns(batch)]
        responses = torch.split(
            batch["tokens"][batch["loss_mask"]], batch["response_lengths"].tolist()
        )
        return [self.stops.before(ids.tolist()) for ids in responses]

    def turns(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """The turns of rows that took some: `text` of the response, `reward`, and `given`, the text
        with special tokens that the model read next, "" after the last one; where conversations are
        rendered also `part`, the number from 1 on of the turn's part of the row.
        """
        found: list[list[dict[str, Any]]] = []
        for row in batch.split_rows():
            ids, rewards = row["tokens"].tolist(), row[TURN_REWARDS].tolist()
            places = spans(row["loss_mask"])
            starts = [start for start, _ in places[1:]] + [len(ids)]
            parts = row[PART_START].cumsum(0).tolist() if PART_START in row else None
            found.append(
                [
                    {
                        "text": self.stops.before(ids[start:end]),
                        "reward": rewards[end - 1],
                        "given": self._texts.decode_all(ids[end:following]),
                        **({} if parts is None else {"part": 1 + parts[start]}),
                    }
                    for (start, end), following in zip(places, starts, strict=False)
                ]
            )
        return found

    def score(self, batch: Batch, *, evaluation: bool = False) -> Batch:
        """Score `batch`, which has the Python column `prompt`: adds the row columns `rewards`,
        `reward/NAME` of each component, `reward/NAME_failed` of each judge and `reward_failed`
        (`[B]` each), and the Python columns `response`, `prompt_text` and `answer`; for rows that
        took turns also `turns`, and the component `reward/turns` is the sum of their rewards.
        """
        prompts: Sequence[Prompt] = batch.objects["prompt"]
        own: dict[str, Sequence[Any]] = {}
        if NUM_TURNS in batch:
            own = {"turns": self.turns(batch)}
        texts = self.texts(batch)
        batch = batch.with_columns(
            objects={
                **own,
                "response": texts,
                "prompt_text": [p.text for p in prompts],
                "answer": [p.answer for p in prompts],
            }
        )
        if self.pool is not None and any(c.takes_messages for c in self.pool.callers.values()):
            talks = conversations(batch, texts, own.get("turns"))
            batch = batch.with_columns(objects={MESSAGES: talks})
        made = self._kept(batch, lambda: self._by_functions(batch, own.get("turns")))
        rewards, columns = made.rows["sum"], {n: c for n, c in made.rows.items() if n != "sum"}
        calls = [_call(scoring, batch, evaluation=evaluation) for scoring in self.roles]
        for scoring, home in zip(self.roles, together(*calls), strict=True):
            if isinstance(scoring.role, JudgeAsked):
                judged: Scored = home
                scores = judged.scores
                columns[f"reward/{scoring.name}_failed"] = judged.failed
                columns["reward_failed"] = columns["reward_failed"].maximum(judged.failed)
                tell_failures(scoring.role.rubric, len(batch), judged.reasons)
            else:
                scores = home[SCORES].float()
            columns[f"reward/{scoring.name}"] = scores
            rewards = rewards + scoring.weight * scores
        if own:
            columns[OF_TURNS] = batch.row_sum(batch[TURN_REWARDS].double()).float()
            rewards = rewards + columns[OF_TURNS]
        return batch.with_columns(rows={"rewards": rewards, **columns})

    def _kept(self, batch: Batch, make: Callable[[], Batch]) -> Batch:
        """Keep results for a resumed step: functions may be slow or random, so none runs twice."""
        ledger = current()
        if ledger is None:
            return make()
        places = places_of(batch["prompt_ids"])
        assert places is not None
        entries = [repr(prompt.entry) for prompt in batch.objects["prompt"]]
        talks = [repr(messages) for messages in batch.objects.get(MESSAGES, ())]
        texts = {"entry": entries, **({MESSAGES: talks} if talks else {})}
        read = batch.with_columns(objects=texts)
        names = ("prompt_ids", "sample_index", "prompt_text", "response", "answer", *texts)
        functions = () if self.pool is None else self.pool.describe()
        origin = origin_of({"functions": functions}, read, names)
        return ledger.keep_rows("rewards", origin, places, make)

    def _by_functions(
        self, batch: Batch, turns: Sequence[Sequence[Mapping[str, Any]]] | None
    ) -> Batch:
        """Row columns of the functions: `sum` (weighted), `reward/NAME` and `reward_failed`."""
        none = torch.zeros(len(batch), dtype=torch.int64)
        if self.pool is None:
            zeros = torch.zeros(len(batch))
            return Batch(lengths=none, rows={"sum": zeros, "reward_failed": zeros})
        prompts, texts = batch.objects["prompt"], batch.objects["response"]
        talks = batch.objects.get(MESSAGES, [()] * len(batch))
        jobs = [
            RewardJob(prompt=p.text, response=text, answer=p.answer, entry=p.entry, messages=talk)
            for p, text, talk in zip(prompts, texts, talks, strict=True)
        ]
        if turns is not None and any("turns" in c.columns for c in self.pool.callers.values()):
            jobs = [
                replace(job, entry={**job.entry, "turns": [turn["text"] for turn in own]})
                for job, own in zip(jobs, turns, strict=True)
            ]
        results = self._scored(self.pool, jobs)
        columns = {
            f"reward/{name}": _column([r.components[name] for r in results])
            for name in self.pool.names
        }
        failed = _column([float(bool(r.failures)) for r in results])
        total = _column([r.score for r in results])
        return Batch(lengths=none, rows={"sum": total, **columns, "reward_failed": failed})

    def _scored(self, pool: RewardPool, jobs: Sequence[RewardJob]) -> list[RewardResult]:
        """Score this rank's jobs. Rank 0 logs the failures of all ranks together.

        Raises:
            RewardsFailed: a function fails too often on some rank; raised on all ranks.
        """
        counts: list[FailureCount] = []
        results: list[RewardResult] = []
        problem = None
        try:
            if jobs:
                report, count = Stint().report, len(jobs)
                results = pool.score(
                    jobs,
                    # in calls, which go row by row
                    progress=lambda done, calls: report(count * done // calls, count),
                    tell=counts.extend,
                )
        except RewardError as error:
            problem = str(error)
        if not world_any(bool(counts) or problem is not None):
            return results
        told = gather_objects((counts, problem))
        for rank, (_, found) in enumerate(told):
            if found is not None:
                raise RewardsFailed(found if len(told) == 1 else f"rank {rank}: {found}")
        if dist.get_rank() == 0 and self._teller is not None:
            self._teller(add_counts([count for counts, _ in told for count in counts]))
        return results


def _call(scoring: ScoringRole, batch: Batch, *, evaluation: bool) -> Call[Any]:
    if isinstance(scoring.role, JudgeAsked):
        return score_call(scoring.role, batch)
    if isinstance(scoring.role, CustomRole):
        method = scoring.role.evaluate if evaluation else scoring.role.forward
        return method.on(batch)
    if scoring.retokenize is None:
        return scoring.role.score.on(batch)
    # rows that a user's environment made may have no `finish`
    ended = batch["finish"] == Finish.STOP if "finish" in batch else torch.ones(len(batch)).bool()
    texts = batch.objects["response"]
    given = zip(batch.objects["prompt"], texts, ended.tolist(), strict=True)
    other = from_rows(
        [scoring.retokenize(prompt, text, not is_whole) for prompt, text, is_whole in given],
        rows={
            **{name: batch[name] for name in ("prompt_ids", "sample_index")},
            # prompts are not shared: their end may differ with the other tokenizer
            "prompt_lengths": torch.zeros(len(batch), dtype=torch.int64),
        },
    )
    mask = torch.zeros(other.num_tokens, dtype=torch.bool)
    return scoring.role.score.on(other.with_columns(tokens={"loss_mask": mask}))


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
