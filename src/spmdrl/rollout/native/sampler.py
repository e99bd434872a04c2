"""Sampling from logits by the Gumbel-max rule with keyed noise.

A token is argmax(l / T + g) with Gumbel noise g, computed as argmax(p / e) with exponential noise
e = exp(-g): the order is the same with one logarithm less, and the probabilities p also give the
log-probability. Truncation works only on the most likely candidates; noise depends on the key and
the token id, so both computations draw the same token.

Equal logits are ordered by their ids, at every limit: in bfloat16 many are equal, and a request's
tokens must not depend on the number of candidates that its neighbours ask for.

Tokens that each token of a sample was drawn from, as bytes: lists of ids take tenfold memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spmdrl.batch import Ragged
from spmdrl.keyed_random import Noise, exponential_at, key_tensor
from spmdrl.memory.host_copies import to_device
from spmdrl.rollout.protocol import MAX_SUPPORT, SamplingParams

_HOST = torch.device("cpu")
_CANDIDATES = 1024
_CPU_VALUES = 200_000
_DEVICE_VALUES = 16_000_000
_ARGMAX_ROWS = 128
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Draws of N rows: `tokens [N]` int64, `logprobs [N]` float32 and `margins [N]` float32;
    `support` holds the int32 ids that each was drawn from, on the host, if a row asks for them.
    """

    tokens: Tensor
    logprobs: Tensor
    margins: Tensor
    support: Ragged | None = None


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows that are drawn together: few enough that logits and noise stay in the CPU's second-level
    cache, and that the buffers take at most a few hundred megabytes of a GPU.
    """
    values = _CPU_VALUES if device.type == "cpu" else _DEVICE_VALUES
    return max(1, values // vocab_size)


class Sampler:
    """Sampler of tokens from float32 logits over a vocabulary."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._noise = Noise(0, vocab_size, device)
        self._rows = rows_at_once(vocab_size, device)

    def sample(
        self,
        logits: Tensor,  # [R, V] float32, overwritten
        params: Sequence[SamplingParams],  # N
        keys: Sequence[int],  # N, keys of the tokens to draw
        rows: Sequence[int] | None = None,  # N, the row of logits of each; all by default
    ) -> Draws:
        """Draw N tokens; margins mean something only where they are asked for."""
        rows = range(len(params)) if rows is None else rows
        members: dict[str, list[int]] = {}
        for i, p in enumerate(params):
            members.setdefault(_kind(p), []).append(i)
        parts = [
            self._sample_kind(
                kind,
                logits,
                [params[i] for i in own],
                [keys[i] for i in own],
                [rows[i] for i in own],
            )
            for kind, own in members.items()
        ]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for own in members.values() for i in own])
        [place] = to_device([order.argsort()], self._device)
        support = None
        for own, part in zip(members.values(), parts, strict=True):
            if part.support is not None:  # only one kind has it, so its rows are in order
                counts = torch.zeros(len(params), dtype=torch.int32)
                counts[torch.tensor(own)] = part.support.counts
                support = Ragged(counts=counts, values=part.support.values)
        joined = _join(parts)
        return Draws(
            tokens=joined.tokens[place],
            logprobs=joined.logprobs[place],
            margins=joined.margins[place],
            support=support,
        )

    def _sample_kind(
        self,
        kind: str,
        logits: Tensor,
        params: list[SamplingParams],
        keys: list[int],
        rows: list[int],
    ) -> Draws:
        temperatures = [p.temperature for p in params]
        row, key, temperature = to_device(
            [torch.tensor(rows), key_tensor(keys, _HOST), torch.tensor(temperatures)], self._device
        )
        if rows != list(range(logits.shape[0])):
            logits = logits[row]
        asked = any(p.margins for p in params)
        if kind == "greedy":
            return _greedy(logits, asked)
        if any(t != 1 for t in temperatures):
            # a column even if all are equal: CUDA multiplies by a number's rounded inverse
            logits.div_(temperature[:, None])
        if kind == "truncated":
            return self._truncated(logits, params, key, asked)
        starts = range(0, len(params), self._rows)
        parts = [
            self._plain(logits[i : i + self._rows], key[i : i + self._rows], asked) for i in starts
        ]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _plain(self, logits: Tensor, keys: Tensor, asked: bool) -> Draws:
        probabilities = torch.softmax(logits, -1)
        noise = self._noise.exponential(keys)
        scores = torch.div(probabilities, noise, out=noise)
        tokens = _argmax(scores)
        logprobs = probabilities.gather(1, tokens[:, None])[:, 0].log()
        margins = _margins(scores.log_() if asked else scores, asked)
        return Draws(tokens=tokens, logprobs=logprobs, margins=margins)

    def _truncated(
        self, logits: Tensor, params: list[SamplingParams], keys: Tensor, asked: bool
    ) -> Draws:
        vocabulary = logits.shape[1]
        largest = max(p.top_k or _CANDIDATES for p in params)
        top_k, top_p, min_p = to_device(
            [
                torch.tensor([p.top_k or vocabulary for p in params]),
                torch.tensor([p.top_p for p in params]),
                torch.tensor([p.min_p for p in params]),
            ],
            self._device,
        )
        limits = top_k, top_p[:, None], min_p[:, None]
        # One candidate beyond the limit gives the distance to it.
        count = min(vocabulary, largest + 1)
        total = logits.logsumexp(-1, keepdim=True)
        values, tokens = logits.topk(count, dim=-1)
        keep, distance = truncate(values, total, *limits)
        is_short, has_ties = torch.stack((keep[:, -1].any(), _has_ties(values, keep))).tolist()
        if is_short and count < vocabulary:
            values, tokens = logits.sort(dim=-1, descending=True, stable=True)
            keep, distance = truncate(values, total, *limits)
        elif has_ties:
            tokens = _by_id(logits, values, tokens, keep)
        values = values.masked_fill(~keep, -torch.inf)
        noise = exponential_at(keys, self._noise.index_hash[tokens])
        scores = values - noise.log_()
        place = scores.argmax(-1, keepdim=True)
        left = keep.sum(-1)
        own = values.double().logsumexp(-1)
        whole = torch.where(left > MAX_SUPPORT, total[:, 0].double(), own)
        logprobs = (values.gather(1, place)[:, 0] - whole).float()
        return Draws(
            tokens=tokens.gather(1, place)[:, 0],
            logprobs=logprobs,
            margins=torch.minimum(_margins(scores, asked), distance),
            support=self._support(tokens, keep, left, params),
        )

    def _support(
        self, tokens: Tensor, keep: Tensor, left: Tensor, params: list[SamplingParams]
    ) -> Ragged | None:
        """Return the kept ids of rows that ask for them, if they are few but not all."""
        if not any(p.support for p in params):
            return None
        wanted = torch.tensor([p.support for p in params], device=self._device)
        wanted &= (left <= MAX_SUPPORT) & (left < self._noise.index_hash.shape[0])
        ids = tokens[keep & wanted[:, None]].to(torch.int32).cpu()
        return Ragged(counts=(left * wanted).to(torch.int32).cpu(), values=ids)


def _has_ties(values: Tensor, keep: Tensor) -> Tensor:  # [N, K] descending, [N, K] bool
    """Compute whether a kept value equals a neighbour, `[]` bool."""
    same = values[:, 1:] == values[:, :-1]
    return (same & (keep[:, 1:] | keep[:, :-1])).any()


def _by_id(
    logits: Tensor,  # [N, V]
    values: Tensor,  # [N, K] the largest of them, descending
    tokens: Tensor,  # [N, K] theirs
    keep: Tensor,  # [N, K] bool
) -> Tensor:
    """Put tokens with equal logits into the order of their ids, `[N, K]`, where they are kept.

    `topk` does not define which of several equal logits it takes at its end, nor their order.
    """
    changes = values[:, 1:] != values[:, :-1]
    group = torch.nn.functional.pad(changes, (1, 0)).cumsum(-1)
    vocabulary = logits.shape[1]
    tokens = (group * vocabulary + tokens).sort(-1).values % vocabulary
    # tokens beyond the candidates may equal the last one and have smaller ids
    last = values == values[:, -1:]
    for row in (last & keep).any(-1).nonzero().flatten().tolist():
        count = int(last[row].sum())
        tokens[row, -count:] = (logits[row] == values[row, -1]).nonzero().flatten()[:count]
    return tokens


def truncate(
    values: Tensor,  # [N, K] tempered logits, descending; K = V, or all that are kept and one more
    total: Tensor,  # [N, 1] logsumexp of all logits
    top_k: Tensor,  # [N]; V for all
    top_p: Tensor,  # [N, 1]
    min_p: Tensor,  # [N, 1]
) -> tuple[Tensor, Tensor]:
    """Return the candidates kept (bool `[N, K]`) and the distance to another choice (`[N]`).

    Top-p keeps the tokens whose preceding probability is still below it; a sum within `_ROUNDING`
    of it counts as having reached it, so that rounding does not decide. Probabilities are those of
    the distribution that top-k leaves. The distance is in nats for top-k and min-p, and in
    probability for top-p.
    """
    count = values.shape[1]
    places = torch.arange(count, device=values.device)
    keep = places < top_k[:, None]
    limited = (top_k < count)[:, None]
    kept = values.double().masked_fill(~keep, -torch.inf)
    norm = torch.where(limited, kept.logsumexp(-1, keepdim=True), total.double())
    probabilities = (kept - norm).exp()
    before = probabilities.cumsum(-1) - probabilities
    keep &= (before < top_p.double() * (1 - _ROUNDING)) | (top_p >= 1)
    floor = values[:, :1] + min_p.log()
    keep &= values >= floor
    padded = torch.cat((values, values.new_full((len(values), 1), -torch.inf)), dim=1)
    edge = top_k.clamp(max=count)[:, None]
    gap = padded.gather(1, edge - 1) - padded.gather(1, edge)
    distance = torch.where(limited, gap, torch.inf)[:, 0]
    p_distance = (before - top_p).abs().masked_fill(top_p >= 1, torch.inf).amin(-1)
    m_distance = (values - floor).abs().masked_fill(min_p <= 0, torch.inf).amin(-1)
    return keep, torch.minimum(distance, torch.minimum(p_distance.float(), m_distance))


def _kind(params: SamplingParams) -> str:
    if params.is_greedy:
        return "greedy"
    return "truncated" if params.is_truncated else "plain"


def _join(parts: Sequence[Draws]) -> Draws:
    """Join draws of further rows, without their supports."""
    return Draws(
        tokens=torch.cat([p.tokens for p in parts]),
        logprobs=torch.cat([p.logprobs for p in parts]),
        margins=torch.cat([p.margins for p in parts]),
    )


def _argmax(scores: Tensor) -> Tensor:  # [N, V]
    """Compute `scores.argmax(-1)` in two steps: on a CPU a maximum is far faster than its index."""
    n, width = scores.shape
    if scores.device.type != "cpu" or width % _ARGMAX_ROWS:
        return scores.argmax(-1)
    folded = scores.view(n, _ARGMAX_ROWS, -1)
    column = folded.amax(1).argmax(-1)
    row = folded[torch.arange(n), :, column].argmax(-1)
    return row * folded.shape[2] + column


def _greedy(logits: Tensor, asked: bool) -> Draws:
    tokens = _argmax(logits)
    best = logits.gather(1, tokens[:, None])[:, 0]
    margins = _margins(logits, asked)
    return Draws(tokens=tokens, logprobs=best - logits.logsumexp(-1), margins=margins)


def _margins(scores: Tensor, asked: bool) -> Tensor:  # [N, K]
    """Compute the lead of the best score, `[N]`; infinite if not asked for or without a second."""
    if not asked or scores.shape[1] == 1:
        return scores.new_full((scores.shape[0],), math.inf)
    best = scores.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


@dataclass(kw_only=True, eq=False)
class SupportRecord:
    """Supports of the tokens drawn so far: the number of ids for each token, and all ids, int32."""

    counts: array[int] = field(default_factory=lambda: array("i"))
    ids: array[int] = field(default_factory=lambda: array("i"))

    @classmethod
    def of(cls, column: Ragged) -> SupportRecord:
        record = cls()
        record.counts.frombytes(column.counts.numpy().tobytes())
        record.ids.frombytes(column.values.numpy().tobytes())
        return record

    def append(self, ids: bytes) -> None:
        """Add the ids that the next token was drawn from, as bytes of this machine's int32."""
        self.counts.append(len(ids) // self.ids.itemsize)
        self.ids.frombytes(ids)

    def column(self, num_tokens: int) -> Ragged:
        """Return the column; it must have `num_tokens` tokens."""
        assert len(self.counts) == num_tokens, (len(self.counts), num_tokens)
        counts, ids = (np.array(part, dtype=np.int32) for part in (self.counts, self.ids))
        return Ragged(counts=torch.from_numpy(counts), values=torch.from_numpy(ids))


def rows_of(column: Ragged) -> list[bytes]:
    """Return each token's ids as bytes."""
    data, size = column.values.numpy().tobytes(), column.values.itemsize
    found, start = [], 0
    for count in column.counts.tolist():
        found.append(data[start : start + count * size])
        start += count * size
    return found
