"""Random texts that a model is verified on: rows to train on, and prompts to sample from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spmdrl.batch import Batch, from_rows

LONGEST = 80
"""Tokens of the longest row, unless the model or `--tokens` allows fewer: more than one chunk of
linear attention."""

NEW_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of one model.

    Args:
        rows: rows of different lengths, some of which share a prompt; the loss is over the tokens
            after their prompts.
        prompts: prompts with a common beginning.
        new_tokens: tokens to sample after each prompt.
    """

    rows: Batch
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int

    @property
    def row_tokens(self) -> list[list[int]]:
        return [
            part.tolist() for part in torch.split(self.rows["tokens"], self.rows.lengths.tolist())
        ]

    @property
    def num_read(self) -> int:
        """Number of tokens that the loss is over."""
        return int((self.rows.lengths - self.rows["prompt_lengths"]).sum())


def draw_texts(
    vocab_size: int, source: Mapping[str, Any], longest: int | None, max_position: int
) -> Texts:
    """Draw the same texts for every model of these sizes.

    Ids that config.json gives a meaning (padding, images) are left out: transformers computes no
    gradient for a padding token's row, for one.

    Args:
        source: config.json.
        longest: tokens of the longest row; None: `LONGEST`.

    Raises:
        ValueError: fewer than 8 tokens.
    """
    size = min(LONGEST if longest is None else longest, max_position)
    if size < 8:
        raise ValueError(f"rows of {size} tokens show nothing: give --tokens 8 or more")
    generator = torch.Generator().manual_seed(7)
    taken = set(_special(source))
    ids = torch.tensor([i for i in range(vocab_size) if i not in taken] or [0])

    def text(count: int) -> list[int]:
        return ids[torch.randint(len(ids), (count,), generator=generator)].tolist()

    def part(share: float) -> int:
        return max(2, int(size * share))

    rows: list[list[int]] = []
    prompts: list[int] = []
    groups: list[int] = []
    for share in (1.0, 0.2, 0.5, 0.0, 0.35):
        rows.append(text(part(share)))
        prompts.append(1)
        groups.append(len(groups))
    for share in (0.3, 0.1):
        prompt, group = text(part(share)), len(rows)
        for own in (0.3, 0.1, 0.2):
            rows.append(prompt + text(part(own)))
            prompts.append(len(prompt))
            groups.append(group)
    new_tokens = min(NEW_TOKENS, size // 4)
    common = text(min(40, size // 2))
    room = size - len(common) - new_tokens
    tails = [text(1 + (i * 3) % max(1, room)) for i in range(8)]
    columns = {"prompt_lengths": prompts, "prompt_ids": groups, "sample_index": range(len(rows))}
    return Texts(
        rows=from_rows(rows, rows={k: torch.tensor(list(v)) for k, v in columns.items()}),
        prompts=tuple(tuple(common + tail) for tail in tails),
        new_tokens=new_tokens,
    )


def _special(source: Mapping[str, Any]) -> Iterator[int]:
    for key, value in source.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif key.endswith(("token_id", "token_index")):
            yield from [i for i in (value if isinstance(value, list) else [value]) if i is not None]
