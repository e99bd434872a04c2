"""Held-out prompts whose questions are not trained on.

Held out means: no training row has the same question *text*. A seed alone does not give that: the
tasks of a small space repeat (chain_sum with 2 terms of 1 digit has 200 questions in all, however
many rows are drawn), so rows are told apart by their text, and the questions are divided.
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
    """Hold out `num_held_out` distinct questions, once each; all rows with other texts train.

    Which ones depends on the seed and the texts alone: the same questions are held out however
    many rows are read and in whatever order.

    Raises:
        ValueError: there are not more distinct questions than that.
    """
    texts = prompts.texts()
    first_row = {text: i for i, text in reversed(list(enumerate(texts)))}
    if not 0 < num_held_out < len(first_row):
        raise ValueError(
            f"{len(prompts)} prompts hold {len(first_row)} distinct questions: num_held_out="
            f"{num_held_out} must be from 1 to {len(first_row) - 1}"
        )
    chosen = sorted(first_row, key=lambda text: _draw(seed, text))[:num_held_out]
    held = set(chosen)
    train = [i for i, text in enumerate(texts) if text not in held]
    note = (
        f"{len(texts)} prompts hold {len(first_row)} distinct questions: {num_held_out} are held "
        f"out, {len(first_row) - num_held_out} train ({len(train)} prompts)"
    )
    log.info("%s", note)
    return Split(
        train=prompts.subset(train),
        held_out=prompts.subset(sorted(first_row[text] for text in chosen)),
        note=note,
    )


def without_overlap(held_out: PromptSet, training_texts: Collection[str]) -> tuple[PromptSet, str]:
    """The prompts of a separate held-out source that are not trained on, each text once; a note.

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


def _draw(seed: int, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=16).digest()
