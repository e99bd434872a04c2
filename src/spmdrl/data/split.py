"""Held-out prompts whose questions are not trained on.

Held out means: no training row asks the same question (`PromptSet.questions`). A seed alone does
not give that: the tasks of a small space repeat (chain_sum with 2 terms of 1 digit has 200
questions in all, however many rows are drawn), so the questions themselves are divided.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass

from spmdrl.data.prompts import PromptSet

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two sets of prompts without a common question, and a line that says how they came about."""

    train: PromptSet
    held_out: PromptSet
    note: str


def split(prompts: PromptSet, *, num_held_out: int, seed: int = 0) -> Split:
    """Hold out `num_held_out` distinct prompts; all rows that ask other questions train.

    Which questions depends on the seed and the questions alone, not on how many rows are read nor
    on their order. Where one question has several texts, all of them are held out (of the last
    question, as many as are wanted), each once.

    Raises:
        ValueError: nothing would be left to train on.
    """
    questions, texts = prompts.questions(), prompts.texts()
    rows: dict[str, dict[str, int]] = {}  # question -> text -> its first row
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        rows.setdefault(question, {}).setdefault(text, i)
    held: set[str] = set()
    kept: list[int] = []
    for question in sorted(rows, key=lambda question: _draw(seed, question)):
        if len(kept) >= num_held_out:
            break
        held.add(question)
        by_text = rows[question]
        kept += [by_text[text] for text in sorted(by_text)][: num_held_out - len(kept)]
    if num_held_out < 1 or len(kept) < num_held_out or len(held) == len(rows):
        raise ValueError(
            f"{len(prompts)} prompts hold {len(rows)} distinct questions with "
            f"{sum(map(len, rows.values()))} texts: num_held_out={num_held_out} must be positive "
            "and leave a question to train on"
        )
    train = [i for i, question in enumerate(questions) if question not in held]
    note = (
        f"{len(texts)} prompts hold {len(rows)} distinct questions: {len(held)} are held out "
        f"({len(kept)} prompts), {len(rows) - len(held)} train ({len(train)} prompts)"
    )
    log.info("%s", note)
    return Split(train=prompts.subset(train), held_out=prompts.subset(sorted(kept)), note=note)


def without_overlap(held_out: PromptSet, training_texts: Collection[str]) -> tuple[PromptSet, str]:
    """The prompts of a separate held-out source that are not trained on, each once; a note.

    Goes by the text: of a task that asks one question in several ways, `split` one source instead.

    Raises:
        ValueError: none is left (the task space is too small for a source of its own: use `split`).
    """
    seen = set(training_texts)
    kept: list[int] = []
    for i, text in enumerate(held_out.texts()):
        if text not in seen:
            seen.add(text)
            kept.append(i)
    if not kept:
        raise ValueError(
            f"each of the {len(held_out)} held-out questions is also trained on: divide one source "
            "instead (spmdrl.data.split.split)"
        )
    note = (
        f"{len(kept)} of {len(held_out)} held-out prompts are kept: the others are trained on or "
        "come twice"
    )
    if len(kept) < len(held_out):
        log.warning("%s", note)
    return held_out.subset(kept), note


def _draw(seed: int, question: str) -> bytes:
    return hashlib.blake2b(question.encode(), key=str(seed).encode(), digest_size=16).digest()
