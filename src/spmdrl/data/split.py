"""Sets divided by prompt: what is held out is not trained on, and parts have no common prompt.

Held out means: no training row asks the same question (`PromptSet.questions`). A seed alone does
not give that: the tasks of a small space repeat (chain_sum with 2 terms of 1 digit has 200
questions in all, however many rows are drawn), so the questions themselves are divided.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from spmdrl.amounts import Amount, count_of
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)

PLACES = 2**64

S = TypeVar("S", bound="Divisible")


class Divisible(Protocol):
    """A set whose items ask questions: prompts, conversations, preference pairs."""

    def __len__(self) -> int: ...

    def texts(self) -> list[str]:
        """The prompts' texts: what must not be on both sides of a division."""
        ...

    def openings(self) -> list[str]:
        """What the user says first: parts, and overlaps of sources of their own, go by it."""
        ...

    def identities(self) -> Sequence[Hashable]:
        """Equal for items that say the same: prompts of one text, pairs of the same tokens."""
        ...

    def questions(self) -> list[str]:
        """What tells two questions apart: usually the text."""
        ...

    def subset(self: S, indices: Sequence[int]) -> S: ...


@dataclass(frozen=True, kw_only=True)
class Split(Generic[S]):
    """Two sets without a common question, and a line that says how they came about."""

    train: S
    held_out: S
    note: str


def split_examples(
    examples: S, *, held_out: Amount, seed: int = 0, at_most: int | None = None
) -> Split[S]:
    """Hold out all examples of some prompts, at least so many; the others train.

    Which prompts depends on the seed and their texts alone.

    Args:
        held_out: a count, or a share of the examples.
        at_most: a bound on what a share comes to; None: none.

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
    """Hold out so many distinct prompts; all rows that ask other questions train.

    Which questions depends on the seed and the questions alone, not on how many rows are read nor
    on their order. Where one question has several texts, all of them are held out (of the last
    question, as many as are wanted), each once.

    Args:
        held_out: a count, or a share of the distinct prompts.
        at_most: a bound on what a share comes to; None: none.

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
    """So many of the examples, in their order; None: all.

    Which ones depends on the seed and their texts alone: those of some prompts, and of the last of
    these as many as there is room for.
    """
    if count is None or len(examples) <= count:
        return examples
    texts = examples.openings()
    drawn = {text: _draw(seed, text) for text in set(texts)}
    chosen = sorted(range(len(texts)), key=lambda i: drawn[texts[i]])[:count]
    return examples.subset(sorted(chosen))


def without_overlap(held_out: S, trained_openings: Collection[str]) -> tuple[S, str]:
    """The items of a separate held-out source whose prompts are not trained on; a note.

    Each once; pairs of one prompt are all kept, unless they are the same pair. Goes by what the
    user says first: of a task that asks one question in several ways, `split` one source instead.

    Raises:
        ValueError: none is left (the task space is too small for a source of its own: use `split`).
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


def disjoint_parts(
    texts: Sequence[str], shares: Sequence[float], *, seed: int = 0
) -> list[list[int]]:
    """Indices of `texts` in parts that have no text in common: one list per share.

    The part of a text depends on the seed, the shares and the text alone. So stages of a pipeline
    that read one file in different ways (other columns, other limits) still get disjoint prompts;
    in return the sizes are the shares of the distinct texts only about.

    Args:
        shares: of the distinct texts; what they leave of 1 is in no part.

    Raises:
        ValueError: a share that is not positive, or shares of more than 1 in all.
    """
    bounds = _bounds(shares)
    parts: list[list[int]] = [[] for _ in shares]
    for i, text in enumerate(texts):
        number = bisect_right(bounds, _place(seed, text))
        if number < len(parts):
            parts[number].append(i)
    return parts


def read_part(part: str) -> tuple[int, int, int]:
    """`2/3` as (2, 2, 3), `2-3/4` as (2, 3, 4), `all` as (1, 1, 1): first, last, of how many.

    Raises:
        ValueError: it is no part.
    """
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?/([0-9]+)", "1/1" if part == "all" else part)
    if match is not None:
        first, last, count = (int(x) for x in (match[1], match[2] or match[1], match[3]))
        if 1 <= first <= last <= count:
            return first, last, count
    raise ValueError(
        f"part={part!r}: write all, 2/3 for the second of three parts, or 2-3/4 for two of four"
    )


def in_part(text: str, part: str) -> bool:
    """Whether a text is in a part: `2/3` is the second of `disjoint_parts(.., [1/3] * 3)`."""
    first, last, count = read_part(part)
    if (first, last) == (1, count):
        return True
    # `_bounds` of equal shares, those two that matter: a sum of i equal floats, rounded once, is
    # their product
    low, high = (
        PLACES if i == count else round(i * (1 / count) * PLACES) for i in (first - 1, last)
    )
    return low <= _place(0, text) < high


def _bounds(shares: Sequence[float]) -> list[int]:
    """Where the parts end on the range that `_place` draws from."""
    total = math.fsum(shares)
    if not all(share > 0 for share in shares) or total > 1 + 1e-9:
        raise ValueError(f"shares={list(shares)}: each must be positive, and their sum at most 1")
    bounds = [round(math.fsum(shares[: i + 1]) * PLACES) for i in range(len(shares))]
    if bounds and total > 1 - 1e-9:
        bounds[-1] = PLACES
    return bounds


def _place(seed: int, text: str) -> int:
    """Uniform in [0, PLACES), and independent of `_draw`: a part is held out from at random."""
    return int.from_bytes(_draw(seed, text, "part")[:8], "big")


def _draw(seed: int, question: str, purpose: str = "") -> bytes:
    key = f"{purpose}{seed}".encode()
    return hashlib.blake2b(question.encode(), key=key, digest_size=16).digest()
