"""Attention by its definition: every key of every row in one dense softmax."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions


def dense_mask(spans: Sequence[Span], num_keys: int, window: int | None = None) -> Tensor:
    """[Tq, Tk] bool: which keys each row sees, key by key."""
    mask = torch.zeros(spans[-1].q_stop, num_keys, dtype=torch.bool)
    for span in spans:
        keys = [key for start, stop in span.keys for key in range(start, stop)]
        for row in range(span.q_start, span.q_stop):
            seen = keys[: len(keys) - (span.q_stop - 1 - row)]
            mask[row, seen if window is None else seen[-window:]] = True
    return mask


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    options: AttentionOptions | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[Tq, H, e]; the window is the mask's."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if options is None else options.scale)
    if options is not None and options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, column), dim=-1)
    p = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", p, v)


def shared_prompt(start: int, prompt: int, responses: Sequence[int]) -> list[Span]:
    """A prompt at `start` and its responses after it."""
    spans = [Span(q_start=start, q_stop=start + prompt, own=(start, start + prompt))]
    at = start + prompt
    for length in responses:
        prefix = ((start, start + prompt),)
        spans.append(Span(q_start=at, q_stop=at + length, own=(at, at + length), prefix=prefix))
        at += length
    return spans


def random_spans(random: Random, most: int) -> tuple[list[Span], int]:
    """Rows of up to `most` tokens with up to three prefixes each, and the number of keys."""
    spans, at, num_keys = [], 0, 2 * most
    for _ in range(random.randint(1, 5)):
        count = random.randint(1, most)
        own = random.randint(count, most)
        start = random.randint(0, num_keys - own)
        # prefixes are parts of what is left on both sides, in any order
        cuts = sorted(random.sample(range(start + 1), min(4, start + 1)))
        ranges = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
        if start + own < num_keys:
            ranges.append((random.randint(start + own, num_keys - 1), num_keys))
        random.shuffle(ranges)
        prefix = tuple(ranges[: random.randint(0, 3)])
        spans.append(Span(q_start=at, q_stop=at + count, own=(start, start + own), prefix=prefix))
        at += count
    return spans, num_keys
