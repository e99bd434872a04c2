"""Questions to a judge about home rows: scores of responses, and verdicts on pairs of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch, from_rows
from spmdrl.data.prompts import Prompt
from spmdrl.data.row_problems import BadRow
from spmdrl.distributed.reduce import gather_objects, world_any
from spmdrl.rewards.rubric import Reading, Rubric, prompt_text
from spmdrl.roles.calls import Call, together
from spmdrl.roles.generation_rows import Generation
from spmdrl.roles.judge import Judge
from spmdrl.roles.model_calls import SAMPLE_BITS

log = logging.getLogger(__name__)

SCORES_KEY, PAIRS_KEY = -3, -4
"""Values of `step` in the random numbers of answers; a question's number is its `prompt_id`."""

Readings = list[list[Reading]]
"""Readings of the answers to each question."""


@dataclass(frozen=True, kw_only=True)
class JudgeAsked:
    """A judge with its rubric.

    Args:
        seed: the run's seed, which answers that are drawn depend on.
    """

    role: Judge
    rubric: Rubric
    seed: int


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A judge's scores of home rows.

    Args:
        scores: float32 `[B]`; `failed` of the judge's section where none was found.
        failed: 1 where none was found, float32 `[B]`.
        reasons: why, for each of those.
    """

    scores: Tensor
    failed: Tensor
    reasons: tuple[str, ...]


def score_call(asked: JudgeAsked, batch: Batch) -> Call[Scored]:
    """Describe the call that scores rows, which have the Python columns `prompt` and `response`.

    A row's score is the mean of those that its answers hold.
    """
    rubric = asked.rubric
    prompts: Sequence[Prompt] = batch.objects["prompt"]
    questions = [
        rubric.score_question(prompt_text(p.text, p.messages), response, p.answer)
        for p, response in zip(prompts, batch.objects["response"], strict=True)
    ]
    ids = (batch["prompt_ids"] << SAMPLE_BITS) + batch["sample_index"]

    def scored(readings: Readings) -> Scored:
        found = [[r.value for r in own if r.value is not None] for own in readings]
        reasons = [own[0].reason for own, values in zip(readings, found, strict=True) if not values]
        scores = [rubric.scaled(fmean(own)) if own else rubric.section.failed for own in found]
        return Scored(
            scores=torch.tensor(scores, dtype=torch.float32),
            failed=torch.tensor([float(not own) for own in found]),
            reasons=tuple(reasons),
        )

    return _call(asked, questions, ids, SCORES_KEY, rubric.score).then(scored)


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """A judge's verdicts on pairs of home rows.

    Args:
        preferred: 1 where the first response of a pair is better in both orders, -1 where the
            second is, else 0: float64 `[P]`.
        disagrees: whether each order has another winner, bool `[P]`.
        failed: whether an order has no verdict, bool `[P]`.
        first: mean over both orders of what favours the response that is shown first, -1 to 1:
            float64 `[P]`; a judge without a preference for a position has a mean of 0.
    """

    preferred: Tensor
    disagrees: Tensor
    failed: Tensor
    first: Tensor


class PairJudge:
    """Judge that says which of two responses to a prompt is better.

    It is asked in both orders, and prefers a response only if it does so in both (Zheng et al.
    2023, https://arxiv.org/abs/2306.05685, section 3.4: the conservative way against the bias for
    a position). Of several answers to a question, the sign of their mean counts.
    """

    def __init__(self, asked: JudgeAsked) -> None:
        self.asked = asked

    def verdicts(self, batch: Batch, first: Tensor, second: Tensor) -> Verdicts:
        """Compare pairs of rows, which have the Python columns `prompt` and `response`. Every rank
        of the world calls it.

        Args:
            first, second: the rows of each pair, int64 `[P]`, of one prompt.
        """
        rubric = self.asked.rubric
        prompts, texts = batch.objects["prompt"], batch.objects["response"]
        questions = []
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            prompt: Prompt = prompts[one]
            shown = prompt_text(prompt.text, prompt.messages)
            for a, b in ((one, other), (other, one)):
                questions.append(rubric.pair_question(shown, texts[a], texts[b], prompt.answer))
        numbers = numbered(batch["prompt_ids"][first].repeat_interleave(2))
        call = _call(self.asked, questions, numbers, PAIRS_KEY, rubric.verdict)
        (readings,) = together(call)
        tell_failures(rubric, len(readings), _reasons(readings))
        values = [[r.value for r in own if r.value is not None] for own in readings]
        means = torch.tensor([fmean(own) if own else 0.0 for own in values], dtype=torch.float64)
        ahead, back = means[0::2].sign(), -means[1::2].sign()  # as seen from the first response
        missing = torch.tensor([not own for own in values], dtype=torch.bool).reshape(-1, 2)
        return Verdicts(
            preferred=torch.where(ahead == back, ahead, torch.zeros_like(ahead)),
            disagrees=ahead * back < 0,
            failed=missing.any(1),
            first=(means[0::2].sign() + means[1::2].sign()) / 2,
        )


def numbered(prompt_ids: Tensor) -> Tensor:  # [Q] int64
    """Number questions by prompt and their place among those of the prompt, int64 `[Q]`: a group is
    never split, so that the numbers are the same in any layout.
    """
    seen: dict[int, int] = {}
    found = []
    for prompt_id in prompt_ids.tolist():
        seen[prompt_id] = seen.get(prompt_id, -1) + 1
        found.append((prompt_id << SAMPLE_BITS) + seen[prompt_id])
    return torch.tensor(found, dtype=torch.int64)


def tell_failures(rubric: Rubric, count: int, reasons: Sequence[str]) -> None:
    """Let the first rank warn of questions without a reading, with one reason. Every rank calls it.

    Args:
        count: questions of this rank.
        reasons: why, for each of this rank's questions that has none.
    """
    if not world_any(bool(reasons)):
        return
    told: list[tuple[int, int, str]] = gather_objects(
        (count, len(reasons), next(iter(reasons), ""))
    )
    if dist.get_rank() == 0:
        asked, failed = sum(one[0] for one in told), sum(one[1] for one in told)
        example = next(one[2] for one in told if one[1])
        log.warning(
            "roles.%s: nothing could be read from the answers to %d of %d questions, e.g. %s",
            *(rubric.role, failed, asked, example),
        )


def _reasons(readings: Readings) -> list[str]:
    return [own[0].reason for own in readings if all(r.value is None for r in own)]


def _call(
    asked: JudgeAsked,
    questions: Sequence[str],
    ids: Tensor,
    key: int,
    read: Callable[[str], Reading],
) -> Call[Readings]:
    """Describe the call that asks questions and reads the answers.

    Args:
        ids: number of each question, unique in the call, int64 `[Q]`.
    """
    rubric, size = asked.rubric, asked.rubric.section.num_samples
    tokens, refused = _encoded(rubric, questions)
    kept = [place for place in range(len(questions)) if place not in refused]
    generation = Generation(seed=asked.seed, step=key, group_size=size, sampling=rubric.sampling())

    def readings(home: Batch) -> Readings:
        answers = torch.split(home["tokens"][home["loss_mask"]], home["response_lengths"].tolist())
        texts = iter(rubric.texts.decode(ids.tolist()) for ids in answers)
        found = {place: [read(next(texts)) for _ in range(size)] for place in kept}
        found |= {p: [Reading(value=None, reason=reason)] for p, reason in refused.items()}
        return [found[place] for place in range(len(questions))]

    rows = from_rows([tokens[place] for place in kept], rows={"prompt_ids": ids[kept]})
    return asked.role.answer.on(rows, generation).then(readings)


def _encoded(
    rubric: Rubric, questions: Sequence[str]
) -> tuple[dict[int, Sequence[int]], dict[int, str]]:
    """Tokens of the questions that can be asked, and why others cannot, by place."""
    tokens: dict[int, Sequence[int]] = {}
    refused: dict[int, str] = {}
    for place, question in enumerate(questions):
        try:
            tokens[place] = rubric.encode(question)
        except BadRow as error:
            refused[place] = str(error)
            continue
        if (length := len(tokens[place])) > rubric.most:
            refused[place] = (
                f"the question has {length} tokens, more than {rubric.most}: raise "
                f"roles.{rubric.role}.judge.max_prompt_tokens"
            )
    return tokens, refused
