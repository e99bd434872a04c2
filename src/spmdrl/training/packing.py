"""Packing of rows into microbatches: streams of tokens without padding, shared prompts only once.

A stream holds, for each group, the prompt once and then the responses: [prompt][r_1][r_2]...
Positions of a response continue from the prompt, its attention sees the prompt and itself, and its
first token is predicted by the prompt's last place. This gives the same log-probabilities and
gradients as separate rows, with fewer tokens. Tokens after the last place that is read are left out
(for log-probabilities at least a row's last token). All of this is a pure function of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.models.routing import EXPERT_CHOICES
from spmdrl.models.spans import Span
from spmdrl.training.readout import Places

PADDING_SPAN = 64
"""Number of padding tokens that see one another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """One stream and its places that are read: before each loss token, or at each row's last token.

    Args:
        tokens, positions: the stream, int64 [S].
        origin: int64 [S], each token's place in the batch's token columns; -1 if it has none.
        spans: the keys that each place of the stream sees; together they cover the stream.
        predict: int64 [N], the places in the stream that are read.
        targets: int64 [N], the ids of the loss tokens, or of the rows' last tokens.
        destination: int64 [N], where in the batch each value that is read belongs: a place in its
            token columns, or a row.
        row: int64 [N], the index into `rows` of the row that is read.
        rows: int64 [R], the batch's rows in this microbatch, ascending.
    """

    tokens: Tensor
    positions: Tensor
    origin: Tensor
    spans: tuple[Span, ...]
    predict: Tensor
    targets: Tensor
    destination: Tensor
    row: Tensor
    rows: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether it has no rows, reads nothing and only keeps pace with other ranks."""
        return len(self.rows) == 0


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Args:
    prompt, used: tokens in the prompt, and tokens that enter the stream (both 0 if none do).
    group: number of the group; rows with the same number share their prompt.
    read: places of the row that are read, int64; all below `used`.
    """

    index: int
    prompt: int
    used: int
    group: int
    read: Tensor

    @property
    def own(self) -> int:
        return self.used - self.prompt


def pack(
    batch: Batch,
    *,
    budget_tokens: int,
    share_prompts: bool,
    atom: Tensor | None = None,  # [B] int64
    places: Places = "loss_tokens",
    skipped: int | None = None,
) -> list[Microbatch]:
    """Pack the rows into microbatches of at most `budget_tokens` stream tokens where possible.

    Rows of one atom stay together even if they exceed the budget (a loss over pairs needs both).
    Without atoms the rows of a shared prompt stay together if they fit; otherwise their group is
    cut into pieces that repeat the prompt. A row longer than the budget gets its own microbatch.

    Args:
        batch: rows with the token column `tokens` and the row column `prompt_lengths` [B].
            Optional: `prompt_ids` [B] and the token columns `loss_mask` [T] bool (default: the
            response) and `expert_choices` (rows share a prompt only if its choices are equal).
        places, skipped: the places that are read, see `training.readout.Readout`.

    Raises:
        ValueError: the budget is below 1, a prompt is longer than its row, or the loss mask is
            true at a row's first token, which nothing predicts (the message names the row).
    """
    if budget_tokens < 1:
        raise ValueError(f"microbatch_tokens={budget_tokens}: it must be at least 1")
    read = _before_loss_tokens(batch) if places == "loss_tokens" else _last_tokens(batch, skipped)
    rows = _describe(batch, read, share_prompts)
    units = [
        unit for atom_rows in _atoms(rows, atom) for unit in _cut(atom_rows, budget_tokens, atom)
    ]
    return [_build(batch, places, bin_rows) for bin_rows in _bins(units, budget_tokens)]


def empty_microbatch() -> Microbatch:
    """Make a microbatch of one token that is not read, for a rank that keeps pace with others."""
    none = torch.zeros(0, dtype=torch.int64)
    return Microbatch(
        tokens=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
        origin=torch.full((1,), -1),
        spans=(Span(q_start=0, q_stop=1, own=(0, 1)),),
        predict=none,
        targets=none,
        destination=none,
        row=none,
        rows=none,
    )


def pad_microbatch(microbatch: Microbatch, length: int) -> Microbatch:
    """Pad the stream to `length` tokens; no token sees the padding, and none of it is read."""
    used = len(microbatch.tokens)
    if used == length:
        return microbatch
    missing = torch.zeros(length - used, dtype=torch.int64)
    # Padding is cut into short pieces because attention over it costs time too.
    starts = range(used, length, PADDING_SPAN)
    stops = [min(start + PADDING_SPAN, length) for start in starts]
    spans = [Span(q_start=a, q_stop=b, own=(a, b)) for a, b in zip(starts, stops, strict=True)]
    return replace(
        microbatch,
        tokens=torch.cat((microbatch.tokens, missing)),
        positions=torch.cat((microbatch.positions, missing)),
        origin=torch.cat((microbatch.origin, missing - 1)),
        spans=(*microbatch.spans, *spans),
    )


def loss_mask(batch: Batch) -> Tensor:
    """Return the loss mask, bool [T]: the column `loss_mask`, or the tokens after the prompt.

    Raises:
        ValueError: a prompt is longer than its row, or the mask is true at a row's first token.
    """
    prompts, starts = batch["prompt_lengths"], batch.offsets()[:-1]
    bad = ((prompts > batch.lengths) | (prompts < 0)).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"row {row} has {int(batch.lengths[row])} tokens, but its prompt_lengths says "
            f"{int(prompts[row])}"
        )
    if "loss_mask" in batch:
        mask = batch["loss_mask"].bool()
    else:
        place = torch.arange(batch.num_tokens, device=starts.device)
        mask = place >= (starts + prompts).repeat_interleave(batch.lengths)
    first = mask[starts[batch.lengths > 0]].nonzero().flatten()
    if len(first):
        row = int((batch.lengths > 0).nonzero()[first[0]])
        raise ValueError(
            f"row {row}: its first token is in the loss mask, but nothing precedes and predicts it "
            f"(prompt_lengths={int(prompts[row])})"
        )
    return mask


def _before_loss_tokens(batch: Batch) -> list[Tensor]:
    """List for every row the places before its loss tokens."""
    masks = torch.split(loss_mask(batch), batch.lengths.tolist())
    return [mask.nonzero().flatten() - 1 for mask in masks]


def _last_tokens(batch: Batch, skipped: int | None) -> list[Tensor]:
    """List for every row its last place whose token is not `skipped`; a row without tokens has
    none, and one of that token only has its first, as `transformers` reads it.
    """
    lengths = batch.lengths.tolist()
    if skipped is None:
        return [torch.arange(n)[-1:] for n in lengths]
    rows = torch.split(batch["tokens"], lengths)
    kept = [(row != skipped).nonzero().flatten()[-1:] for row in rows]
    return [
        place if len(place) else torch.arange(n)[:1] for place, n in zip(kept, lengths, strict=True)
    ]


def _describe(batch: Batch, read: Sequence[Tensor], share_prompts: bool) -> list[_Row]:
    lengths = batch.lengths.tolist()
    names = [name for name in ("tokens", EXPERT_CHOICES) if share_prompts and name in batch]
    shared = [torch.split(batch[name], lengths) for name in names]
    prompts = batch["prompt_lengths"].tolist()
    has_ids = share_prompts and "prompt_ids" in batch
    ids = batch["prompt_ids"].tolist() if has_ids else range(len(lengths))
    groups: dict[tuple[int, bytes], int] = {}
    rows = []
    for i, places in enumerate(read):
        used = int(places[-1]) + 1 if len(places) else 0
        prompt = min(prompts[i], used)
        # Rows with equal ids must not share a prompt if its tokens differ (a longer context, for
        # example) or its experts do (a group that was sampled on several replicas).
        content = b"".join(column[i][:prompt].cpu().numpy().tobytes() for column in shared)
        group = groups.setdefault((ids[i], content), len(groups))
        rows.append(_Row(index=i, prompt=prompt, used=used, group=group, read=places))
    return rows


def _atoms(rows: Sequence[_Row], atom: Tensor | None) -> list[list[_Row]]:
    """Group the rows that belong together, in order of first appearance."""
    keys = [row.group for row in rows] if atom is None else atom.tolist()
    units: dict[int, list[_Row]] = {}
    for key, row in zip(keys, rows, strict=True):
        units.setdefault(key, []).append(row)
    return list(units.values())


def _cost(rows: Iterable[_Row]) -> int:
    """Count the stream tokens of these rows together."""
    prompts = {}
    own = 0
    for row in rows:
        prompts[row.group] = row.prompt
        own += row.own
    return own + sum(prompts.values())


def _cut(rows: list[_Row], budget: int, atom: Tensor | None) -> list[list[_Row]]:
    """Cut a shared-prompt group into pieces that fit, each with its own copy of the prompt."""
    if atom is not None or _cost(rows) <= budget:
        return [rows]
    pieces: list[list[_Row]] = []
    for row in sorted(rows, key=lambda r: (-r.own, r.index)):
        for piece in pieces:
            if _cost([*piece, row]) <= budget:
                piece.append(row)
                break
        else:
            pieces.append([row])
    return pieces


def _bins(units: Sequence[list[_Row]], budget: int) -> list[list[_Row]]:
    """Pack by first-fit decreasing, in a fixed order: at most about 11/9 of the fewest bins."""
    # Johnson 1973. Pieces of a group that meet in a bin share its prompt: costs are upper bounds.
    costed = sorted(((_cost(unit), unit) for unit in units), key=lambda c: (-c[0], c[1][0].index))
    bins = first_fit([cost for cost, _ in costed], budget)
    return [[row for i in places for row in costed[i][1]] for places in bins]


def first_fit(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Put each cost into the first bin with room for it, or a new one; return indices of costs."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i, cost in enumerate(costs):
        place = next((b for b, room in enumerate(free) if cost <= room), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(budget)
        bins[place].append(i)
        free[place] -= cost
    return bins


def _build(batch: Batch, places: Places, rows: Sequence[_Row]) -> Microbatch:
    rows = sorted(rows, key=lambda r: r.index)
    starts = batch.offsets()[:-1].tolist()
    spans, pieces, first_of = _lay_out(rows, starts)
    total = spans[-1].q_stop if spans else 0
    if total == 0:
        # No position is read in any row, but a stream must contain at least one token.
        blank = empty_microbatch()
        spans, stream, positions = list(blank.spans), blank.tokens, blank.positions
        origin = blank.origin
    else:
        origin = torch.cat([torch.arange(at, at + n) for at, n, _ in pieces])
        stream = batch["tokens"][origin]
        positions = torch.cat([torch.arange(p, p + n) for _, n, p in pieces])
    none = torch.zeros(0, dtype=torch.int64)
    predict, targets, destination, row_numbers = [none], [none], [none], [none]
    for number, row in enumerate(rows):
        if row.used == 0:
            continue
        prompt_at, own_at = first_of[row.index]
        at = torch.where(
            row.read < row.prompt, row.read + prompt_at, row.read - row.prompt + own_at
        )
        target = row.read + starts[row.index] + (1 if places == "loss_tokens" else 0)
        predict.append(at)
        targets.append(batch["tokens"][target])
        destination.append(target if places == "loss_tokens" else torch.tensor([row.index]))
        row_numbers.append(torch.full_like(at, number))
    return Microbatch(
        tokens=stream,
        positions=positions,
        origin=origin,
        spans=tuple(spans),
        predict=torch.cat(predict),
        targets=torch.cat(targets),
        destination=torch.cat(destination),
        row=torch.cat(row_numbers),
        rows=torch.tensor([row.index for row in rows]),
    )


def _lay_out(
    rows: Sequence[_Row], starts: Sequence[int]
) -> tuple[list[Span], list[tuple[int, int, int]], dict[int, tuple[int, int]]]:
    """Lay out the stream: its spans, its pieces (first token in the batch, length, first position)
    and, for each row, the places in the stream where its prompt and its own tokens start.
    """
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        if row.used:
            groups.setdefault(row.group, []).append(row)
    spans: list[Span] = []
    pieces: list[tuple[int, int, int]] = []
    first_of = {}
    at = 0
    for members in groups.values():
        prompt, prompt_at = members[0].prompt, at
        is_single = len(members) == 1
        if prompt and not is_single:
            spans.append(Span(q_start=at, q_stop=at + prompt, own=(at, at + prompt)))
            pieces.append((starts[members[0].index], prompt, 0))
            at += prompt
        for row in members:
            start = starts[row.index]
            if is_single:
                # A single row is one causal sequence without a prefix to look up.
                spans.append(Span(q_start=at, q_stop=at + row.used, own=(at, at + row.used)))
                pieces.append((start, row.used, 0))
                first_of[row.index] = (at, at + prompt)
                at += row.used
                continue
            first_of[row.index] = (prompt_at, at)
            if row.own:
                prefix = ((prompt_at, prompt_at + prompt),) if prompt else ()
                own = (at, at + row.own)
                spans.append(Span(q_start=at, q_stop=at + row.own, own=own, prefix=prefix))
                pieces.append((start + prompt, row.own, prompt))
                at += row.own
    return spans, pieces, first_of
