"""Sampling from logits by the Gumbel-max rule with keyed noise.

A token is argmax(l / T + g) with Gumbel noise g, computed as argmax(p / e) with exponential noise
e = exp(-g): the order is the same with one logarithm less, and the probabilities p also give the
log-probability. Truncation works only on the most likely candidates; noise depends on the key and
the token id, so both computations draw the same token.

Equal logits are ordered by their ids, at every limit: in bfloat16 many are equal, and a request's
tokens must not depend on the number of candidates that its neighbours ask for.

Where the project's kernels run (`models.kernels.gpu`), rows without truncation are drawn by one of
them (`DIRECT`), greedy ones among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.batch import Ragged
from spmdrl.keyed_random import Noise, exponential_at, key_tensor
from spmdrl.memory.host_copies import to_device
from spmdrl.models.kernels import gpu
from spmdrl.rollout.native.compiled_draws import compiled_draws
from spmdrl.rollout.protocol import MAX_SUPPORT, SamplingParams

DIRECT = "direct"
"""The kind of draws that a kernel makes."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class _AskedKind:
    """Draws of one kind.

    Args:
        members: their places among all, on the host; `place` has them on the device.
        rows: row of logits of each; None: all rows in order. Of direct draws always there, int32.
        temperature: [n, 1]; None: all are 1. Of direct draws [n], 0 where they are greedy.
        margins: whether any asks for margins.
        limits: what `truncate` takes: top-k, top-p and min-p of each.
        most: candidates that they are drawn from at first.
        support: whether each asks for its support, bool [n]; None: none does.
    """

    kind: str
    members: Tensor
    place: Tensor
    rows: Tensor | None
    temperature: Tensor | None
    margins: bool
    limits: tuple[Tensor, Tensor, Tensor]
    most: int
    support: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """Draws that are prepared.

    Args:
        place: places of the draws among those of the kinds, one after the other; None: one kind.
    """

    kinds: Sequence[_AskedKind]
    place: Tensor | None

    @property
    def direct_temperatures(self) -> Tensor | None:
        """Temperatures, float32 [n], if a kernel makes all draws; 0 where they are greedy."""
        kind = self.kinds[0]
        return kind.temperature if self.place is None and kind.kind == DIRECT else None


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows that are drawn together: few enough that logits and noise stay in the CPU's second-level
    cache, and that the buffers take at most a few hundred megabytes of a GPU.
    """
    values = _CPU_VALUES if device.type == "cpu" else _DEVICE_VALUES
    return max(1, values // vocab_size)


class Sampler:
    """Sampler of tokens from float32 logits over a vocabulary."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device, self._draws_directly = device, gpu.runs_on(device)
        self._noise = Noise(0, vocab_size, device)
        self._rows = rows_at_once(vocab_size, device)
        self._compiled = compiled_draws(self._noise.index_hash)

    def sample(
        self,
        logits: Tensor,  # [R, V] float32, overwritten
        params: Sequence[SamplingParams],  # N
        keys: Sequence[int],  # N, keys of the tokens to draw
        rows: Sequence[int] | None = None,  # N, the row of logits of each; all by default
    ) -> Draws:
        """Draw N tokens; margins mean something only where they are asked for."""
        [key] = to_device([key_tensor(keys, _HOST)], self._device)
        return self.draw(logits, self.ask(params, rows, logits.shape[0]), key)

    def ask(
        self,
        params: Sequence[SamplingParams],  # N
        rows: Sequence[int] | None,  # N, the row of logits of each; all by default
        num_rows: int,
    ) -> Asked:
        """Prepare draws from `num_rows` rows of logits, for any number of steps."""
        members: dict[str, list[int]] = {}
        for i, p in enumerate(params):
            members.setdefault(_kind(p, self._draws_directly), []).append(i)
        rows = range(len(params)) if rows is None else rows
        kinds = [
            self._ask_kind(kind, own, [params[i] for i in own], [rows[i] for i in own], num_rows)
            for kind, own in members.items()
        ]
        place = None
        if len(kinds) > 1:
            order = torch.tensor([i for own in members.values() for i in own])
            [place] = to_device([order.argsort()], self._device)
        return Asked(kinds=kinds, place=place)

    def _ask_kind(
        self,
        kind: str,
        own: list[int],
        params: list[SamplingParams],
        rows: list[int],
        num_rows: int,
    ) -> _AskedKind:
        temperatures = [p.temperature for p in params]
        vocabulary = self._noise.index_hash.shape[0]
        place, row, temperature, top_k, top_p, min_p, support = to_device(
            [
                torch.tensor(own),
                torch.tensor(rows),
                torch.tensor(temperatures),
                torch.tensor([p.top_k or vocabulary for p in params]),
                torch.tensor([p.top_p for p in params]),
                torch.tensor([p.min_p for p in params]),
                torch.tensor([p.support for p in params]),
            ],
            self._device,
        )
        tempered: Tensor | None = temperature
        of_rows: Tensor | None = row.to(torch.int32)
        if kind != DIRECT:
            # a column even if all are equal: CUDA multiplies by a number's rounded inverse
            tempered = temperature[:, None] if any(t != 1 for t in temperatures) else None
            of_rows = None if rows == list(range(num_rows)) else row
        return _AskedKind(
            kind=kind,
            members=torch.tensor(own),
            place=place,
            rows=of_rows,
            temperature=tempered,
            margins=any(p.margins for p in params),
            limits=(top_k, top_p[:, None], min_p[:, None]),
            most=max(p.top_k or _CANDIDATES for p in params),
            support=support if any(p.support for p in params) else None,
        )

    def draw(self, logits: Tensor, asked: Asked, keys: Tensor) -> Draws:
        """Draw the tokens that were asked for.

        Args:
            logits: `[R, V]` float32, overwritten.
            keys: keys of the tokens, int64 `[N]` on the device, side by side.
        """
        if asked.place is None:
            return self._draw_kind(logits, asked.kinds[0], keys)
        parts = [self._draw_kind(logits, kind, keys[kind.place]) for kind in asked.kinds]
        support = None
        for kind, part in zip(asked.kinds, parts, strict=True):
            if part.support is not None:  # only one kind has it, so its rows are in order
                counts = torch.zeros(len(keys), dtype=torch.int32)
                counts[kind.members] = part.support.counts
                support = Ragged(counts=counts, values=part.support.values)
        joined = _join(parts)
        return Draws(
            tokens=joined.tokens[asked.place],
            logprobs=joined.logprobs[asked.place],
            margins=joined.margins[asked.place],
            support=support,
        )

    def _draw_kind(self, logits: Tensor, asked: _AskedKind, key: Tensor) -> Draws:
        if asked.kind == DIRECT:
            assert asked.temperature is not None and asked.rows is not None
            return draw_directly(logits, key, asked.temperature, asked.rows)
        if asked.rows is not None:
            logits = logits[asked.rows]
        if asked.kind == "greedy":
            return _greedy(logits, asked.margins)
        if asked.temperature is not None:
            logits.div_(asked.temperature)
        if asked.kind == "truncated":
            return self._truncated(logits, asked, key)
        count = key.shape[0]
        if count <= self._rows:
            return self._plain(logits, key, asked.margins)
        starts = range(0, count, self._rows)
        parts = [
            self._plain(logits[i : i + self._rows], key[i : i + self._rows], asked.margins)
            for i in starts
        ]
        return _join(parts)

    def _plain(self, logits: Tensor, keys: Tensor, asked: bool) -> Draws:
        if self._compiled is not None:
            tokens, logprobs, margins = self._compiled(logits, keys, asked)
            return Draws(tokens=tokens, logprobs=logprobs, margins=margins)
        probabilities = torch.softmax(logits, -1)
        noise = self._noise.exponential(keys)
        scores = torch.div(probabilities, noise, out=noise)
        tokens = _argmax(scores)
        logprobs = probabilities.gather(1, tokens[:, None])[:, 0].log()
        margins = _margins(scores.log_() if asked else scores, asked)
        return Draws(tokens=tokens, logprobs=logprobs, margins=margins)

    def _truncated(self, logits: Tensor, asked: _AskedKind, keys: Tensor) -> Draws:
        vocabulary, limits = logits.shape[1], asked.limits
        # One candidate beyond the limit gives the distance to it.
        count = min(vocabulary, asked.most + 1)
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
            margins=torch.minimum(_margins(scores, asked.margins), distance),
            support=self._support(tokens, keep, left, asked.support),
        )

    def _support(
        self, tokens: Tensor, keep: Tensor, left: Tensor, asked: Tensor | None
    ) -> Ragged | None:
        """Return the kept ids of rows that ask for them, if they are few but not all."""
        if asked is None:
            return None
        wanted = asked & (left <= MAX_SUPPORT) & (left < self._noise.index_hash.shape[0])
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


def draw_directly(
    logits: Tensor,  # [R, V], unchanged
    keys: Tensor,  # [n] int64
    temperatures: Tensor,  # [n] float32; 0: greedy
    rows: Tensor,  # [n] int32, each draw's row of logits
) -> Draws:
    """Draw n tokens by `kernels.cuda.sampling.draw_tokens`."""
    from spmdrl.models.kernels.cuda.sampling import draw_tokens

    tokens, logprobs, margins = draw_tokens(logits, keys, temperatures, rows)
    return Draws(tokens=tokens, logprobs=logprobs, margins=margins)


def _kind(params: SamplingParams, draws_directly: bool) -> str:
    if draws_directly and (params.is_greedy or not params.is_truncated):
        return DIRECT
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
