"""Packing of rows into microbatches: streams of tokens without padding, shared prompts only once.

A stream holds, for each group, the prompt once and then the responses: [prompt][r_1][r_2]...
Positions of a response continue from the prompt, its attention sees the prompt and itself, and its
first token is predicted by the prompt's last place. This gives the same log-probabilities and
gradients as separate rows, with fewer tokens. Tokens after the last place that is read are left out
(for log-probabilities at least a row's last token). All of this is a pure function of the rows.

A row may have parts (`PART_START`), each with a context of its own: they are laid out as if each
were a row, and stay in one microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.models.routing import EXPERT_CHOICES
from spmdrl.models.spans import Span
from spmdrl.training.readout import Places

PADDING_SPAN = 64
"""Number of padding tokens that see one another."""

PART_START = "part_start"
"""Token column, bool: the first token of each part of a row but the first. A part sees no token of
others, and its positions begin at 0."""


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
    """A row, or a part of one.

    Args:
        index: the row.
        first: the part's first token in the row.
        prompt, used: tokens in the prompt, and tokens that enter the stream (both 0 if none do).
        group: number of the group; rows with the same number share their prompt.
        read: places of the part that are read, int64; all below `used`.
    """

    index: int
    first: int
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
    cut into pieces that repeat the prompt. A row longer than the budget gets its own microbatch;
    the parts of a row stay together.

    Args:
        batch: rows with the token column `tokens` and the row column `prompt_lengths` [B].
            Optional: `prompt_ids` [B] and the token columns `loss_mask` [T] bool (default: the
            response), `part_start` [T] bool and `expert_choices` (rows share a prompt only if its
            choices are equal).
        places, skipped: the places that are read, see `training.readout.Readout`.

    Raises:
        ValueError: the budget is below 1, a prompt is longer than its row, or the loss mask is
            true at the first token of a row or part, which nothing predicts (the message names the
            row).
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
        ValueError: a prompt is longer than its row, or the mask is true at the first token of a row
            or part.
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
    if PART_START in batch and bool((mask & batch[PART_START]).any()):
        row = int(batch.row_of_token()[mask & batch[PART_START]][0])
        raise ValueError(
            f"row {row}: the first token of a part is in the loss mask, but nothing precedes and "
            "predicts it in the part"
        )
    return mask


def part_bounds(batch: Batch) -> list[list[tuple[int, int]]]:
    """List for every row its parts (first token, end) as places in the row; rows without the column
    `PART_START` have one.
    """
    lengths = batch.lengths.tolist()
    if PART_START not in batch:
        return [[(0, n)] for n in lengths]
    starts = [own.nonzero().flatten().tolist() for own in torch.split(batch[PART_START], lengths)]
    return [list(pairwise([0, *own, length])) for own, length in zip(starts, lengths, strict=True)]


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
    rows: list[_Row] = []
    bounds = part_bounds(batch)
    for i, first, stop in ((i, *part) for i, parts in enumerate(bounds) for part in parts):
        places = read[i]
        if len(bounds[i]) > 1:
            places = places[(places >= first) & (places < stop)] - first
        used = int(places[-1]) + 1 if len(places) else 0
        prompt = min(prompts[i], used)
        # Rows with equal ids must not share a prompt if its tokens differ (a longer context, for
        # example) or its experts do (a group that was sampled on several replicas).
        own = slice(first, first + prompt)
        content = b"".join(column[i][own].cpu().numpy().tobytes() for column in shared)
        key = (ids[i], content) if share_prompts else (len(rows), b"")
        group = groups.setdefault(key, len(groups))
        rows.append(_Row(index=i, first=first, prompt=prompt, used=used, group=group, read=places))
    return rows


def _atoms(rows: Sequence[_Row], atom: Tensor | None) -> list[list[_Row]]:
    """Group the rows that belong together, in order of first appearance; parts follow the first."""
    keys = {row.index: row.group for row in reversed(rows)} if atom is None else atom.tolist()
    units: dict[int, list[_Row]] = {}
    for row in rows:
        units.setdefault(keys[row.index], []).append(row)
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
    whole: dict[int, list[_Row]] = {}  # rows with their parts
    for row in rows:
        whole.setdefault(row.index, []).append(row)
    pieces: list[list[_Row]] = []
    for own in sorted(whole.values(), key=lambda o: (-sum(r.own for r in o), o[0].index)):
        for piece in pieces:
            if _cost([*piece, *own]) <= budget:
                piece += own
                break
        else:
            pieces.append(own)
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
    rows = sorted(rows, key=lambda r: (r.index, r.first))
    numbers = {index: n for n, index in enumerate(dict.fromkeys(row.index for row in rows))}
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
    for row in rows:
        if row.used == 0:
            continue
        prompt_at, own_at = first_of[row.index, row.first]
        at = torch.where(
            row.read < row.prompt, row.read + prompt_at, row.read - row.prompt + own_at
        )
        first = starts[row.index] + row.first
        target = row.read + first + (1 if places == "loss_tokens" else 0)
        predict.append(at)
        targets.append(batch["tokens"][target])
        destination.append(target if places == "loss_tokens" else torch.tensor([row.index]))
        row_numbers.append(torch.full_like(at, numbers[row.index]))
    return Microbatch(
        tokens=stream,
        positions=positions,
        origin=origin,
        spans=tuple(spans),
        predict=torch.cat(predict),
        targets=torch.cat(targets),
        destination=torch.cat(destination),
        row=torch.cat(row_numbers),
        rows=torch.tensor(list(numbers)),
    )


def _lay_out(
    rows: Sequence[_Row], starts: Sequence[int]
) -> tuple[list[Span], list[tuple[int, int, int]], dict[tuple[int, int], tuple[int, int]]]:
    """Lay out the stream: its spans, its pieces (first token in the batch, length, first position)
    and, for each row or part, the places in the stream where its prompt and its own tokens start.
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
            pieces.append((starts[members[0].index] + members[0].first, prompt, 0))
            at += prompt
        for row in members:
            start, where = starts[row.index] + row.first, (row.index, row.first)
            if is_single:
                # A single row is one causal sequence without a prefix to look up.
                spans.append(Span(q_start=at, q_stop=at + row.used, own=(at, at + row.used)))
                pieces.append((start, row.used, 0))
                first_of[where] = (at, at + prompt)
                at += row.used
                continue
            first_of[where] = (prompt_at, at)
            if row.own:
                prefix = ((prompt_at, prompt_at + prompt),) if prompt else ()
                own = (at, at + row.own)
                spans.append(Span(q_start=at, q_stop=at + row.own, own=own, prefix=prefix))
                pieces.append((start + prompt, row.own, prompt))
                at += row.own
    return spans, pieces, first_of
