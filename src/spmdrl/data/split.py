"""Division of sets by prompt: held-out items are not trained on, and parts share no prompt.

Held out means that no training row asks the same question (`PromptSet.questions`). Different seeds
are not enough for that: the tasks of a small space repeat (chain_sum with 2 terms of 1 digit has
200 questions in all, however many rows are drawn), so the questions themselves are divided.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from spmdrl.config.amounts import Amount, count_of, read_part
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)

PLACES = 2**64

S = TypeVar("S", bound="Divisible")


class Divisible(Protocol):
    """Set whose items ask questions: prompts, conversations, preference pairs."""

    def __len__(self) -> int: ...

    def texts(self) -> list[str]:
        """Texts of the prompts, none of which may be on both sides of a division."""

    def openings(self) -> list[str]:
        """First user messages; they decide parts, and overlaps with separate held-out sources."""

    def identities(self) -> Sequence[Hashable]:
        """Keys, equal for equal items: prompts of the same text, pairs of the same tokens."""

    def questions(self) -> list[str]:
        """Texts by which questions are told apart: usually the prompts' texts."""

    def subset(self: S, indices: Sequence[int]) -> S: ...


@dataclass(frozen=True, kw_only=True)
class Split(Generic[S]):
    """Two sets without a common question, and a line that describes the division."""

    train: S
    held_out: S
    note: str


def split_examples(
    examples: S, *, held_out: Amount, seed: int = 0, at_most: int | None = None
) -> Split[S]:
    """Hold out all examples of some prompts, at least `held_out` examples; the others train.

    The choice of prompts depends only on the seed and their texts.

    Args:
        held_out: a count, or a share of the examples.
        at_most: bound on the count that a share gives; None: no bound.

    Raises:
        ValueError: nothing would be left to train on.
    """
    texts = examples.texts()
    counts = Counter(texts)
    wanted = count_of(held_out, len(texts), at_most)
    held: set[str] = set()
    total = 0
    for text in sorted(counts, key=lambda text: _draw(seed, text)):
        if total >= wanted:
            break
        held.add(text)
        total += counts[text]
    if wanted < 1 or total < wanted or len(held) == len(counts):
        there = f"{len(texts)} examples have {len(counts)} prompts"
        raise _nothing_left(there, held_out, "prompt")
    note = (
        f"{len(texts)} examples have {len(counts)} prompts: {len(held)} are held out ({total} "
        f"examples), {len(counts) - len(held)} train ({len(texts) - total} examples)"
    )
    log.info("%s", note)
    return Split(
        train=examples.subset([i for i, text in enumerate(texts) if text not in held]),
        held_out=examples.subset([i for i, text in enumerate(texts) if text in held]),
        note=note,
    )


def split(prompts: S, *, held_out: Amount, seed: int = 0, at_most: int | None = None) -> Split[S]:
    """Hold out `held_out` distinct prompts; all rows that ask other questions train.

    The order in which questions are taken depends only on the seed and the questions, not on how
    many rows are read or in which order. If a question has several texts, all of them are held out
    (of the last question, as many as are still wanted), each once.

    Args:
        held_out: a count, or a share of the distinct prompts.
        at_most: bound on the count that a share gives; None: no bound.

    Raises:
        ValueError: nothing would be left to train on.
    """
    questions, texts = prompts.questions(), prompts.texts()
    rows: dict[str, dict[str, int]] = {}  # question -> text -> its first row
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        rows.setdefault(question, {}).setdefault(text, i)
    num_texts = sum(map(len, rows.values()))
    wanted = count_of(held_out, num_texts, at_most)
    held: set[str] = set()
    kept: list[int] = []
    for question in sorted(rows, key=lambda question: _draw(seed, question)):
        if len(kept) >= wanted:
            break
        held.add(question)
        by_text = rows[question]
        kept += [by_text[text] for text in sorted(by_text)][: wanted - len(kept)]
    if wanted < 1 or len(kept) < wanted or len(held) == len(rows):
        there = f"{len(prompts)} prompts hold {len(rows)} distinct questions with {num_texts} texts"
        raise _nothing_left(there, held_out, "question")
    train = [i for i, question in enumerate(questions) if question not in held]
    note = (
        f"{len(texts)} prompts hold {len(rows)} distinct questions: {len(held)} are held out "
        f"({len(kept)} prompts), {len(rows) - len(held)} train ({len(train)} prompts)"
    )
    log.info("%s", note)
    return Split(train=prompts.subset(train), held_out=prompts.subset(sorted(kept)), note=note)


def _nothing_left(there: str, held_out: Amount, what: str) -> ValueError:
    return ValueError(
        f"{there}: evaluation.held_out={held_out} must be positive and leave a {what} to train "
        "on: lower it, give it as a share (10%), or bring more rows"
    )


def limited(examples: S, count: int | None, *, seed: int = 0) -> S:
    """Choose `count` of the examples, in their order; None: all.

    The choice depends only on the seed and the examples' openings: it takes all examples of some
    openings, and of the last of these as many as there is room for.
    """
    if count is None or len(examples) <= count:
        return examples
    texts = examples.openings()
    drawn = {text: _draw(seed, text) for text in set(texts)}
    chosen = sorted(range(len(texts)), key=lambda i: drawn[texts[i]])[:count]
    return examples.subset(sorted(chosen))


def without_overlap(held_out: S, trained_openings: Collection[str]) -> tuple[S, str]:
    """Keep the items of a separate held-out source that are not trained on; return a note, too.

    Equal items are kept once; different pairs of one prompt are all kept. Items are compared by
    their openings: if a task asks one question in several ways, `split` one source instead.

    Raises:
        ValueError: none is left (the task space is too small for a separate source: use `split`).
    """
    trained = set(trained_openings)
    first: dict[Hashable, int] = {}
    pairs = zip(held_out.openings(), held_out.identities(), strict=True)
    for i, (opening, identity) in enumerate(pairs):
        if opening not in trained:
            first.setdefault(identity, i)
    kept = list(first.values())
    if not kept:
        raise ValueError(
            f"each of the {len(held_out)} held-out questions is also trained on: divide one source "
            "instead (spmdrl.data.split.split)"
        )
    note = f"{len(kept)} of {len(held_out)} held-out examples are kept"
    if len(kept) < len(held_out):
        note += ": the others are trained on or come twice"
    if len(kept) < len(held_out):
        log.warning("%s", note, extra=ALIKE)
    return held_out.subset(kept), note


def in_part(text: str, part: str) -> bool:
    """Whether a text is in a part: `2/3` is the second of three with equal shares of all texts."""
    first, last, count = read_part(part)
    if (first, last) == (1, count):
        return True
    low, high = (
        PLACES if i == count else round(i * (1 / count) * PLACES) for i in (first - 1, last)
    )
    return low <= _place(0, text) < high


def _place(seed: int, text: str) -> int:
    """Draw uniformly from [0, PLACES), independently of the draws that decide what is held out."""
    return int.from_bytes(_draw(seed, text, "part")[:8], "big")


def _draw(seed: int, question: str, purpose: str = "") -> bytes:
    key = f"{purpose}{seed}".encode()
    return hashlib.blake2b(question.encode(), key=key, digest_size=16).digest()
