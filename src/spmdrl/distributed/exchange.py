"""The row exchange: home layout -> a role's layout -> home.

`plan_exchange` is a pure function of values that every rank has (the gathered row table and the
role's replicas), so all ranks make the same plan without further messages. One
`all_to_all_single` of bytes then carries all columns of all rows, texts as UTF-8. Home columns are
on the host, so that ranks with and without a GPU exchange rows the same way (gloo).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch, Ragged, concat
from spmdrl.distributed.reduce import gather_tables


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that a call returns or sends: its name, kind, dtype and trailing dims.

    A column of kind `text` is a Python column of str and None; its dtype is that of its bytes. The
    dtype of a ragged column is that of its values.
    """

    name: str
    kind: Literal["token", "row", "text", "ragged"] = "token"
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """All rows of the world, ordered by home rank and then by their index there.

    Args:
        home: home rank of each row, `[N]`.
        cost: cost of each row that balancing counts, usually tokens, `[N]`.
        atom: atom id of each row; the rows of one atom stay together, `[N]`.
        order: sort key of each row within its replica (ties by global index), `[N]`.
        minibatch: minibatch of each row; each minibatch is balanced by itself, `[N]`.
    """

    home: Tensor
    cost: Tensor
    atom: Tensor
    order: Tensor
    minibatch: Tensor


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """The rows of each replica (indices into the `RowTable`), in the order they have there.

    Args:
        replicas: the ranks that take the same rows; the first one sends the results home.
        rows: global row numbers per replica.
        home: home rank of each global row, `[N]`.
        place: index of each global row in its home batch, `[N]`.
        minibatch: minibatch of each global row, `[N]`.
    """

    replicas: tuple[tuple[int, ...], ...]
    rows: tuple[Tensor, ...]
    home: Tensor
    place: Tensor
    minibatch: Tensor

    def replica_of(self, rank: int) -> int | None:
        for index, ranks in enumerate(self.replicas):
            if rank in ranks:
                return index
        return None

    def rows_at(self, rank: int) -> Tensor:
        """The global rows that `rank` takes, in its order; empty outside the role."""
        own = self.replica_of(rank)
        return self.home.new_empty(0) if own is None else self.rows[own]


def gather_rows(cost: Tensor, atom: Tensor, order: Tensor) -> RowTable:
    """Gather the world's row table from each rank's columns (all int64 `[B]`), in one minibatch."""
    parts = gather_tables(torch.stack([cost, atom, order], dim=1).cpu())
    home = torch.cat([torch.full((len(p),), rank) for rank, p in enumerate(parts)]).long()
    table = torch.cat(parts)
    return RowTable(
        home=home,
        cost=table[:, 0],
        atom=table[:, 1],
        order=table[:, 2],
        minibatch=torch.zeros_like(home),
    )


def plan_exchange(table: RowTable, replicas: Sequence[Sequence[int]]) -> ExchangePlan:
    """Assign atoms to replicas: largest first (ties by atom), each to the replica with the least
    cost so far (ties by replica), minibatch by minibatch.

    Rows within a replica are sorted by (minibatch, order, global index). Longest-processing-time-
    first is within 4/3 of the best makespan (Graham 1969, https://doi.org/10.1137/0117039).
    """
    minibatches, orders = table.minibatch.tolist(), table.order.tolist()
    atoms: dict[int, dict[int, list[int]]] = {}
    for row, (minibatch, atom) in enumerate(zip(minibatches, table.atom.tolist(), strict=True)):
        atoms.setdefault(minibatch, {}).setdefault(atom, []).append(row)
    costs = table.cost.tolist()
    assigned: list[list[int]] = [[] for _ in replicas]
    for members in atoms.values():
        weights = {atom: sum(costs[row] for row in rows) for atom, rows in members.items()}
        # (cost so far, replica): among equal costs the first replica comes next
        load = [(0, replica) for replica in range(len(replicas))]
        for atom in sorted(members, key=lambda atom: (-weights[atom], atom)):
            cost, target = load[0]
            heapq.heapreplace(load, (cost + weights[atom], target))
            assigned[target] += members[atom]
    for rows in assigned:
        rows.sort(key=lambda row: (minibatches[row], orders[row], row))
    return ExchangePlan(
        replicas=tuple(tuple(ranks) for ranks in replicas),
        rows=tuple(torch.tensor(rows, dtype=torch.int64) for rows in assigned),
        home=table.home,
        place=_place_at_home(table.home),
        minibatch=table.minibatch,
    )


def _place_at_home(home: Tensor) -> Tensor:
    counts = torch.bincount(home) if len(home) else torch.zeros(0, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(home)) - starts[home]


def send_to_role(plan: ExchangePlan, batch: Batch, names: Sequence[str]) -> Batch | None:
    """Send home rows to their replicas; returns this rank's rows there, None outside the role.

    The row column `minibatch` is added. `batch` must have the columns of `names`, with the same
    kinds and dtypes on every rank, even without rows. Python columns stay Python columns.

    Raises:
        ValueError: a column is missing, a Python column has values other than str and None, or
            another rank's column has another kind, dtype or trailing dims.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = batch.keep(names)
    columns = _schema(sent)
    outgoing: list[Tensor] = []
    for target in range(size):
        rows = plan.rows_at(target)
        outgoing.append(_pack(sent.select(plan.place[rows[plan.home[rows] == rank]]), columns))
    arriving = plan.rows_at(rank)
    sources = plan.home[arriving]
    counts = torch.bincount(sources, minlength=size).tolist()
    parts = _exchange(outgoing, counts, columns)
    if plan.replica_of(rank) is None:
        return None
    # rows arrive grouped by source rank, in this rank's order within each group
    arrival = torch.argsort(sources, stable=True)
    here = concat(parts).select(torch.argsort(arrival))
    return here.with_columns(rows={"minibatch": plan.minibatch[arriving]})


def bring_home(
    plan: ExchangePlan, result: Batch | None, columns: Sequence[Column], home_rows: int
) -> Batch:
    """Send a role's result rows (in the order they had there) back to their home places.

    Only the first rank of each replica sends. Rows may have new lengths.

    Raises:
        ValueError: `result` lacks a declared column, or has it with another dtype or shape.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    leaders = {ranks[0]: rows for ranks, rows in zip(plan.replicas, plan.rows, strict=True)}
    outgoing = [torch.empty(0, dtype=torch.uint8)] * size
    if rank in leaders:
        assert result is not None, "a member rank must return a result"
        homes = plan.home[leaders[rank]]
        outgoing = [
            _pack(result.select((homes == target).nonzero().flatten()), columns)
            for target in range(size)
        ]
    places = []
    for source in range(size):
        rows = leaders.get(source, plan.home[:0])
        places.append(plan.place[rows[plan.home[rows] == rank]])
    parts = _exchange(outgoing, [len(place) for place in places], columns)
    order = torch.cat(places)
    assert len(order) == home_rows, (len(order), home_rows)
    return concat(parts).select(torch.argsort(order))


def _schema(batch: Batch) -> tuple[Column, ...]:
    token = [
        Column(name=n, kind="token", dtype=c.dtype, shape=tuple(c.shape[1:]))
        for n, c in sorted(batch.tokens.items())
    ]
    row = [
        Column(name=n, kind="row", dtype=c.dtype, shape=tuple(c.shape[1:]))
        for n, c in sorted(batch.rows.items())
    ]
    text = [Column(name=n, kind="text", dtype=torch.uint8) for n in sorted(batch.objects)]
    ragged = [
        Column(name=n, kind="ragged", dtype=c.values.dtype) for n, c in sorted(batch.ragged.items())
    ]
    return (*token, *row, *text, *ragged)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _header(columns: Sequence[Column]) -> bytes:
    """The columns as text, so that the receiver can check that it expects the same ones."""
    return "".join(f"{c.kind} {c.name!r} {c.dtype} {c.shape}\n" for c in columns).encode()


def _pack(batch: Batch, columns: Sequence[Column]) -> Tensor:
    """Header, lengths, then every column, as bytes; empty if there are no rows."""
    parts = [_column_bytes(batch, column) for column in columns]
    if batch.num_rows == 0:
        return torch.empty(0, dtype=torch.uint8)
    header = _as_bytes(_header(columns))
    size = torch.tensor([len(header)])
    return torch.cat([_bytes(size), header, _bytes(batch.lengths), *parts])


def _column_bytes(batch: Batch, column: Column) -> Tensor:
    if column.kind == "text":
        return _text_bytes(batch, column)
    if column.kind == "ragged":
        return _ragged_bytes(batch, column)
    return _bytes(_typed(batch, column))


def _ragged_bytes(batch: Batch, column: Column) -> Tensor:
    """A ragged column: each token's number of values (int32 `[T]`), then the values."""
    if column.name not in batch.ragged:
        raise ValueError(
            f"the call declared the ragged column {column.name!r} but returned {batch.columns()}"
        )
    ragged = batch.ragged[column.name]
    if ragged.values.dtype != column.dtype:
        raise ValueError(
            f"column {column.name!r} was declared {column.dtype} but is {ragged.values.dtype}"
        )
    return torch.cat([_bytes(ragged.counts), _bytes(ragged.values)])


def _text_bytes(batch: Batch, column: Column) -> Tensor:
    """A Python column: each row's number of bytes (int64 `[B]`, None: -1), then the bytes."""
    if column.name not in batch.objects:
        raise ValueError(
            f"the call declared the text column {column.name!r} but returned {batch.columns()}"
        )
    texts = batch.objects[column.name]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"the Python column {column.name!r} has a {type(text).__name__} in row {row}: only "
                "str and None leave their home rank, so write it as text"
            )
    # surrogatepass: JSON may hold a lone surrogate, which must arrive unchanged
    encoded = [None if text is None else text.encode(errors="surrogatepass") for text in texts]
    sizes = torch.tensor([-1 if e is None else len(e) for e in encoded], dtype=torch.int64)
    return torch.cat([_bytes(sizes), _as_bytes(b"".join(e for e in encoded if e is not None))])


def _as_bytes(data: bytes) -> Tensor:  # uint8 [bytes]
    # frombuffer refuses an empty buffer
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _texts(sizes: Tensor, data: bytes) -> list[str | None]:  # sizes [B]
    """The texts that `_text_bytes` packed."""
    texts: list[str | None] = []
    start = 0
    for size in sizes.tolist():
        if size < 0:
            texts.append(None)
            continue
        texts.append(data[start : start + size].decode(errors="surrogatepass"))
        start += size
    return texts


def _typed(batch: Batch, column: Column) -> Tensor:
    values: Mapping[str, Tensor] = batch.tokens if column.kind == "token" else batch.rows
    if column.name not in values:
        raise ValueError(
            f"the call declared the {column.kind} column {column.name!r} but returned "
            f"{batch.columns()}"
        )
    tensor = values[column.name]
    if tensor.dtype != column.dtype or tuple(tensor.shape[1:]) != column.shape:
        raise ValueError(
            f"column {column.name!r} was declared {column.dtype} {column.shape} but is "
            f"{tensor.dtype} {tuple(tensor.shape[1:])}"
        )
    return tensor


def _exchange(
    outgoing: Sequence[Tensor], counts: Sequence[int], columns: Sequence[Column]
) -> list[Batch]:
    """Run one all-to-all of bytes; returns the rows of each rank (`counts` of them) as batches."""
    sizes = torch.tensor([len(part) for part in outgoing], dtype=torch.int64)
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes)
    received = torch.empty(int(incoming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(list(outgoing)), incoming.tolist(), sizes.tolist())
    parts = torch.split(received, incoming.tolist())
    return [_unpack(p, n, columns, r) for r, (p, n) in enumerate(zip(parts, counts, strict=True))]


def _unpack(data: Tensor, num_rows: int, columns: Sequence[Column], source: int) -> Batch:
    position = 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal position
        stop = position + count * dtype.itemsize
        # a copy: a view needs an offset that is a multiple of the item size
        piece = data[position:stop].clone().view(dtype)
        position = stop
        return piece

    if num_rows > 0:
        header = bytes(take(int(take(1, torch.int64)), torch.uint8).tolist())
        _check_header(header, _header(columns), source)
    lengths = take(num_rows, torch.int64)
    total = int(lengths.sum())
    tokens: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    objects: dict[str, list[str | None]] = {}
    ragged: dict[str, Ragged] = {}
    for column in columns:
        if column.kind == "text":
            sizes = take(num_rows, torch.int64)
            text = take(int(sizes.clamp(min=0).sum()), torch.uint8)
            objects[column.name] = _texts(sizes, text.numpy().tobytes())
            continue
        if column.kind == "ragged":
            counts = take(total, torch.int32)
            values = take(int(counts.sum()), column.dtype)
            ragged[column.name] = Ragged(counts=counts, values=values)
            continue
        first = total if column.kind == "token" else num_rows
        count = first * math.prod(column.shape)
        tensor = take(count, column.dtype).reshape(first, *column.shape)
        (tokens if column.kind == "token" else rows)[column.name] = tensor
    assert position == len(data), (position, len(data), num_rows)
    return Batch(lengths=lengths, tokens=tokens, rows=rows, objects=objects, ragged=ragged)


def _check_header(received: bytes, expected: bytes, source: int) -> None:
    if received != expected:
        theirs, mine = received.decode().splitlines(), expected.decode().splitlines()
        raise ValueError(
            f"rank {source} sends the columns {sorted(set(theirs) - set(mine))} where rank "
            f"{dist.get_rank()} has {sorted(set(mine) - set(theirs))}: a column has one kind, "
            "dtype and trailing shape on all ranks, those without rows included"
        )
