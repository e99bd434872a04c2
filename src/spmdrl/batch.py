"""`Batch`: packed rows of token sequences with per-token, per-row and home-only columns.

A batch holds B rows (samples) of T tokens in all, without padding. A token column is one tensor
whose first dim is T, rows laid end to end; a ragged column has a varying number of values per
token; a row column's first dim is B; a Python column is a list of B objects that stays on its home
rank. Everything here is pure: no process groups, and device moves only where the caller asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Values of each token, in varying number.

    Args:
        counts: number of values of each token, int32 [T].
        values: values of all tokens, laid end to end, [counts.sum()].

    Raises:
        ValueError: the number of values is not the sum of the counts.
    """

    counts: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int32 or self.counts.dim() != 1:
            raise ValueError(
                f"counts must be int32 [T], not {self.counts.dtype} {tuple(self.counts.shape)}"
            )
        if tuple(self.values.shape) != (int(self.counts.sum()),):
            raise ValueError(
                f"a ragged column has the values {tuple(self.values.shape)}, but its counts make "
                f"{int(self.counts.sum())}"
            )

    def __len__(self) -> int:
        return len(self.counts)

    def select(self, index: Tensor) -> Ragged:  # int64 [N]
        """The values of the tokens `index`, in its order."""
        counts = self.counts.long()
        starts = counts.cumsum(0) - counts
        picked = counts[index]
        return Ragged(
            counts=self.counts[index], values=self.values[span_index(starts[index], picked)]
        )

    def to(self, device: torch.device) -> Ragged:
        return Ragged(counts=self.counts.to(device), values=self.values.to(device))

    def padded(self, fill: int) -> Tensor:
        """A row per token, [T, K]: its values, padded with `fill`."""
        counts = self.counts.long()
        width = int(counts.max()) if len(counts) else 0
        table = self.values.new_full((len(counts), width), fill)
        held = torch.arange(width, device=counts.device) < counts[:, None]
        table[held] = self.values
        return table


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B packed rows.

    Args:
        lengths: tokens per row, int64 `[B]`.
        tokens: token columns by name, each `[T, ...]` with `T = lengths.sum()`.
        rows: row columns by name, each `[B, ...]`.
        objects: Python columns by name, each a list of B objects; they stay on their home rank,
            except texts that a role asks for.
        ragged: ragged columns by name, of T tokens each.

    Raises:
        ValueError: a column's first dim does not match; the column is named.
    """

    lengths: Tensor
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    objects: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ragged: Mapping[str, Ragged] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lengths.dtype != torch.int64 or self.lengths.dim() != 1:
            raise ValueError(
                f"lengths must be int64 [B], not {self.lengths.dtype} {tuple(self.lengths.shape)}"
            )
        if (self.lengths < 0).any():
            raise ValueError(f"lengths must not be negative: {self.lengths.tolist()}")
        tokens, rows = (self.num_tokens, "tokens"), (self.num_rows, "rows")
        kinds: tuple[tuple[str, Mapping[str, Any], tuple[int, str]], ...] = (
            ("token", self.tokens, tokens),
            ("row", self.rows, rows),
            ("Python", self.objects, rows),
            ("ragged", self.ragged, tokens),
        )
        for kind, columns, (count, unit) in kinds:
            for name, column in columns.items():
                shape = tuple(column.shape) if isinstance(column, Tensor) else (len(column),)
                if shape[:1] != (count,):
                    raise ValueError(
                        f"{kind} column {name!r} has the shape {shape}, but the batch has {count} "
                        f"{unit}"
                    )
        names = [*self.tokens, *self.rows, *self.objects, *self.ragged]
        if len(names) != len(set(names)):
            raise ValueError(f"a column name stands in two kinds of column: {sorted(names)}")

    @property
    def num_rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return self.num_rows

    def __contains__(self, name: object) -> bool:
        kinds = (self.tokens, self.rows, self.objects, self.ragged)
        return any(name in columns for columns in kinds)

    def __getitem__(self, name: str) -> Tensor:
        """A token or row column; ValueError lists the existing columns."""
        if name in self.tokens:
            return self.tokens[name]
        if name in self.rows:
            return self.rows[name]
        raise ValueError(f"the batch has no tensor column {name!r}; it has {self.columns()}")

    def columns(self) -> list[str]:
        return sorted([*self.tokens, *self.rows, *self.objects, *self.ragged])

    def offsets(self) -> Tensor:
        """Start of each row in the token columns, with T at the end: int64 `[B + 1]`."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.lengths.device)
        return torch.cat([zero, self.lengths.cumsum(0)])

    def row_of_token(self) -> Tensor:
        """The row index of every token: int64 `[T]`."""
        return torch.repeat_interleave(
            torch.arange(self.num_rows, device=self.lengths.device), self.lengths
        )

    def row_sum(self, column: Tensor) -> Tensor:  # column [T] -> [B]
        """The sum of a token column over each row, in its dtype (bool: int64 counts): `[B]`."""
        column = column.long() if column.dtype == torch.bool else column
        out = torch.zeros(self.num_rows, dtype=column.dtype, device=column.device)
        return out.index_add(0, self.row_of_token().to(column.device), column)

    def select(self, index: Tensor | Sequence[int]) -> Batch:
        """The rows of `index` (whole numbers, repeats allowed) in its order, with all their
        columns. ValueError for a mask, whose values would be read as rows 0 and 1.
        """
        given = torch.as_tensor(index, device=self.lengths.device)
        if given.dtype == torch.bool or (given.is_floating_point() and given.numel()):
            raise ValueError(
                f"select takes row numbers, not {given.dtype}: for a mask, select(mask.nonzero()"
                ".flatten())"
            )
        rows = given.long()
        lengths = self.lengths[rows]
        position = span_index(self.offsets()[:-1][rows], lengths)
        picked = rows.tolist() if self.objects else []
        return Batch(
            lengths=lengths,
            tokens={name: column[position] for name, column in self.tokens.items()},
            rows={name: column[rows] for name, column in self.rows.items()},
            objects={name: [column[i] for i in picked] for name, column in self.objects.items()},
            ragged={name: column.select(position) for name, column in self.ragged.items()},
        )

    def keep(self, names: Sequence[str]) -> Batch:
        """This batch with only the columns of `names`; ValueError if one is missing."""
        for name in names:
            if name not in self:
                raise ValueError(f"the batch has no column {name!r}; it has {self.columns()}")
        return Batch(
            lengths=self.lengths,
            tokens={n: c for n, c in self.tokens.items() if n in names},
            rows={n: c for n, c in self.rows.items() if n in names},
            objects={n: c for n, c in self.objects.items() if n in names},
            ragged={n: c for n, c in self.ragged.items() if n in names},
        )

    def with_columns(
        self,
        *,
        tokens: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        objects: Mapping[str, Sequence[Any]] | None = None,
        ragged: Mapping[str, Ragged] | None = None,
    ) -> Batch:
        """This batch with columns added or replaced."""
        return Batch(
            lengths=self.lengths,
            tokens={**self.tokens, **(tokens or {})},
            rows={**self.rows, **(rows or {})},
            objects={**self.objects, **(objects or {})},
            ragged={**self.ragged, **(ragged or {})},
        )

    def __or__(self, other: Batch) -> Batch:
        """Columns of both; `other` wins. ValueError if the rows differ in length."""
        if not torch.equal(self.lengths, other.lengths):
            raise ValueError("only batches of the same rows can be merged: the lengths differ")
        return self.with_columns(
            tokens=other.tokens, rows=other.rows, objects=other.objects, ragged=other.ragged
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(
            lengths=self.lengths.to(device),
            tokens={n: c.to(device) for n, c in self.tokens.items()},
            rows={n: c.to(device) for n, c in self.rows.items()},
            objects=self.objects,
            ragged={n: c.to(device) for n, c in self.ragged.items()},
        )

    def split_rows(self) -> Iterator[Batch]:
        """Every row as a batch of its own."""
        for i in range(self.num_rows):
            yield self.select([i])


def concat(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, in order. ValueError if their columns differ or none is given."""
    if not batches:
        raise ValueError("concat needs at least one batch")
    first = batches[0]
    for other in batches[1:]:
        if _kinds(other) != _kinds(first):
            raise ValueError(f"columns differ: {_kinds(first)} and {_kinds(other)}")
    return Batch(
        lengths=torch.cat([b.lengths for b in batches]),
        tokens={n: torch.cat([b.tokens[n] for b in batches]) for n in first.tokens},
        rows={n: torch.cat([b.rows[n] for b in batches]) for n in first.rows},
        objects={n: [x for b in batches for x in b.objects[n]] for n in first.objects},
        ragged={n: join_ragged([b.ragged[n] for b in batches]) for n in first.ragged},
    )


def _kinds(batch: Batch) -> dict[str, list[str]]:
    return {
        "tokens": sorted(batch.tokens),
        "rows": sorted(batch.rows),
        "objects": sorted(batch.objects),
        "ragged": sorted(batch.ragged),
    }


def from_rows(
    sequences: Sequence[Sequence[int]],
    *,
    rows: Mapping[str, Tensor] | None = None,
    objects: Mapping[str, Sequence[Any]] | None = None,
) -> Batch:
    """A batch whose token column `tokens` holds the given id sequences."""
    flat = [token for sequence in sequences for token in sequence]
    return Batch(
        lengths=torch.tensor([len(s) for s in sequences], dtype=torch.int64),
        tokens={"tokens": torch.tensor(flat, dtype=torch.int64)},
        rows=rows or {},
        objects=objects or {},
    )


def group_index(prompt_ids: Tensor) -> tuple[Tensor, int]:  # prompt_ids [B]
    """Rows by group: (int64 `[B]` group number in order of first appearance, number of groups)."""
    seen: dict[int, int] = {}
    index = [seen.setdefault(int(p), len(seen)) for p in prompt_ids.tolist()]
    return torch.tensor(index, dtype=torch.int64, device=prompt_ids.device), len(seen)


def join_ragged(parts: Sequence[Ragged]) -> Ragged:
    """The tokens of all parts (at least one), in order."""
    return Ragged(
        counts=torch.cat([part.counts for part in parts]),
        values=torch.cat([part.values for part in parts]),
    )


def span_index(starts: Tensor, lengths: Tensor) -> Tensor:
    """Indices of spans `[start, start + length)`, laid end to end."""
    total = int(lengths.sum())
    shifts = starts - lengths.cumsum(0) + lengths  # of a span from where it lies in the result
    shifts = torch.repeat_interleave(shifts, lengths, output_size=total)
    return shifts + torch.arange(total, device=lengths.device)
