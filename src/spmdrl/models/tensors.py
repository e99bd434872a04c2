"""Global tensors, named as in Hugging Face files, and the boxes of them that local tensors hold.

Local tensors have one dim or two. The *rows* of a box are all its indices but those of the last
dim, in order: an expert's box `[1, F, D]` of a stacked tensor is F rows of D columns, a convolution
`[C, 1, K]` is C rows of K columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A box `[start, stop)` of the global tensor `name`, from row `offset` of a local tensor.

    `tensor[offset : offset + rows].view(size)` is the box.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    offset: int

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def rows(self) -> int:
        # plans ask for it a hundred thousand times, nearly always of matrices
        if len(self.start) <= 2:
            return self.stop[0] - self.start[0]
        return math.prod(self.size[:-1])

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        return self.size == self.shape


class TpSplit(Enum):
    """Ways in which tensor parallelism divides a global tensor."""

    NONE = "none"
    ROWS = "rows"
    COLUMNS = "columns"
    KV_ROWS = "kv_rows"
    """Rows by key/value head; with fewer heads than ranks, neighbouring ranks share one."""
    VOCABULARY = "vocabulary"
    """Rows; an engine may hold additional ones at the end, which are padding."""


@dataclass(frozen=True, kw_only=True)
class GlobalTensor:
    """One global tensor, or rows of one, within a local parameter.

    Args:
        name: the Hugging Face name.
        region: the rows (indices of `row_dim`) that are meant; None: all.
        heads: number of heads in the rows of a `KV_ROWS` tensor.
        expert: number of the expert that it is of, if it is of one; in a tensor that holds all
            experts of a layer, which has as many dims more, it is the index in dim 0.
        is_stacked: whether it holds all experts of a layer.
        every_expert: whether all experts of a layer share it, cut as their matrices are.
        num_experts: number of experts in its layer, 0 for none.
        is_buffer: whether no gradient changes it, and every layout and file keeps it in float32.
    """

    name: str
    shape: tuple[int, ...]
    split: TpSplit = TpSplit.NONE
    region: tuple[int, int] | None = None
    heads: int = 0
    expert: int | None = None
    is_stacked: bool = False
    every_expert: bool = False
    num_experts: int = 0
    is_buffer: bool = False

    @property
    def is_of_experts(self) -> bool:
        return self.expert is not None or self.every_expert

    @property
    def row_dim(self) -> int:
        """The dim that its region and a split by rows are of."""
        return 1 if self.is_stacked else 0


TensorTable = Mapping[str, tuple[GlobalTensor, ...]]
"""Local name -> the global tensors in it, top to bottom."""


def restrict(held: Iterable[Slice], first_row: int, last_row: int) -> tuple[Slice, ...]:
    """Restrict `held` to rows `[first_row, last_row)` of the local tensor (an FSDP shard).

    The offsets of the result count from `first_row`, that is, within the shard.
    """
    result = []
    for s in held:
        low, high = max(s.offset, first_row), min(s.offset + s.rows, last_row)
        if low < high:
            result += _rows_of(s, low - s.offset, high - s.offset, low - first_row)
    return tuple(result)


def _rows_of(s: Slice, low: int, high: int, offset: int) -> list[Slice]:
    """Return boxes of the rows `[low, high)` of `s`: several if they cut an index of dim 0."""
    inner = s.rows // s.size[0]
    if inner == 1 or (low % inner == 0 and high % inner == 0):
        start = (s.start[0] + low // inner, *s.start[1:])
        stop = (s.start[0] + high // inner, *s.stop[1:])
        return [replace(s, start=start, stop=stop, offset=offset)]
    boxes = []
    for index in range(low // inner, -(-high // inner)):
        first, last = (min(max(n - index * inner, 0), inner) for n in (low, high))
        start = (s.start[0] + index, s.start[1] + first, *s.start[2:])
        stop = (s.start[0] + index + 1, s.start[1] + last, *s.stop[2:])
        boxes.append(replace(s, start=start, stop=stop, offset=offset))
        offset += last - first
    return boxes


def layer_of(local_name: str) -> int | None:
    """Return the number of the layer that a local parameter is of, if it is of one."""
    return int(local_name.split(".", 2)[1]) if local_name.startswith("layers.") else None


def in_layer(name: str, first: int, layer: int) -> str:
    """Return the name of a tensor of layer `layer` that is called `name` in layer `first`: a local
    one (`layers.0.input_norm.weight`) or that of a file (`model.layers.0.input_layernorm.weight`).
    """
    head, _, tail = name.partition(f"layers.{first}.")
    return f"{head}layers.{layer}.{tail}"


def without_expert(name: str) -> str:
    """Return a tensor's name without the number of its expert, if it is of one."""
    head, found, tail = name.partition(".experts.")
    return head + found + tail.partition(".")[2]


def heads_per_rank(heads: int, tp_size: int) -> int:
    """Count the key-value heads on each tensor-parallel rank, at least one."""
    return max(1, heads // tp_size)


def is_expert_parameter(local_name: str) -> bool:
    """Whether a local parameter holds experts, which `ep` divides, and FSDP over other ranks."""
    return ".mlp.experts." in local_name
