"""`RowState`: the decoding samples as rows of tensors on the device, which advance there.

A step changes nothing on the host but a few counters, and moves nothing to the device but the
blocks that some rows have begun. When rows begin or end, the host writes all of them anew, in one
copy: it knows everything but the newest tokens, which stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spmdrl.keyed_random import chain_all
from spmdrl.memory.host_copies import to_device
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.sharing import alone, find_sharing
from spmdrl.rollout.native.step_plan import StepPlan

_KEYS_AHEAD = 32
"""Steps whose random keys are computed together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRows:
    """Rows of the decodes of one step, on the device.

    Args:
        tokens: newest token of each, int64 [n].
        positions: its place in its sequence, int64 [n].
        cells: the cell of the cache that it is written to, int64 [n]; see `places`.
        table: blocks, int32 [n, W].
        slots: slots of recurrent layers' states, int64 [n], if the model has any.
        factors: each adapter's factor of every row, [n, 1], where rows have different ones.
        sharing: rows that hold the same pages, int32 [4, n], see `sharing`; None: nobody asks.
    """

    tokens: Tensor
    positions: Tensor
    cells: Tensor
    table: Tensor
    slots: Tensor | None
    factors: Sequence[Tensor] = ()
    sharing: Tensor | None = None

    def indices(self) -> list[Tensor]:
        """Return what `PagedAttention.prepare` takes of decodes in steps with chunks, too."""
        slots = [] if self.slots is None else [self.slots]
        return [*slots, self.positions, self.cells, self.table]

    def tensors(self) -> list[Tensor]:
        """Return what a step that only decodes reads of them: tokens, positions, factors, indices,
        and who shares.
        """
        sharing = [] if self.sharing is None else [self.sharing]
        return [self.tokens, self.positions, *self.factors, *self.indices(), *sharing]


class RowBuffers:
    """Storage of rows at fixed addresses, which graphs read in place.

    Args:
        num_rows: most rows.
        num_blocks: most blocks of a row; a wider table is made where rows need it, unless it is
            `fixed`.
        block_size: tokens of a block.
        trash: block that idle rows write to.
        idle_slot: slot of idle rows; None without recurrent layers.
        fixed: whether all rows and blocks are read in every step, beyond those that are used.
    """

    def __init__(
        self,
        num_rows: int,
        num_blocks: int,
        device: torch.device,
        *,
        block_size: int,
        trash: int = 0,
        idle_slot: int | None = None,
        fixed: bool = False,
    ) -> None:
        self.device, self.trash, self.idle_slot, self.is_fixed = device, trash, idle_slot, fixed
        self.num_rows, self.block_size = num_rows, block_size
        # tokens, positions, cells; slots
        self.numbers = torch.zeros(3 if idle_slot is None else 4, num_rows, dtype=torch.int64)
        self.numbers = self.numbers.to(device)
        self.table = torch.zeros(num_rows, num_blocks, dtype=torch.int32, device=device)
        self.factors: dict[str, Tensor] = {}
        # rows that share pages, in a call that has such, and those of rows alone
        self.shares = False
        self._alone = torch.from_numpy(alone(num_rows if fixed else 0)).to(device)
        self.sharing = self._alone.clone()
        # of draws in a graph, where steps are captured: keys, temperatures, and rows of logits
        count = num_rows if fixed else 0
        self.keys = torch.zeros(count, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(count, device=device)
        self.order = torch.arange(count, dtype=torch.int32, device=device)

    def view(self, count: int, width: int, adapters: Sequence[str]) -> DecodeRows:
        """Return the first rows; all blocks of them if the width is fixed."""
        table = self.table[:count] if self.is_fixed else self.table[:count, :width]
        return DecodeRows(
            tokens=self.numbers[0, :count],
            positions=self.numbers[1, :count],
            cells=self.numbers[2, :count],
            table=table,
            slots=None if self.idle_slot is None else self.numbers[3, :count],
            factors=[self.factors[name][:count] for name in adapters],
            sharing=self.sharing[:, :count] if self.shares else None,
        )

    def idle(self, count: int, adapters: Sequence[str]) -> list[Tensor]:
        """Make tensors of the shapes of `view(count).tensors()` in which every row is idle."""
        numbers = torch.zeros_like(self.numbers[:, :count])
        table = torch.zeros_like(self.table[:count])
        self._idle(numbers, table)
        return DecodeRows(
            tokens=numbers[0],
            positions=numbers[1],
            cells=numbers[2],
            table=table,
            slots=None if self.idle_slot is None else numbers[3],
            factors=[torch.zeros_like(self.factors[name][:count]) for name in adapters],
            sharing=self._alone[:, :count] if self.shares else None,
        ).tensors()

    def begin(self, adapters: Sequence[str], dtype: torch.dtype, *, shares: bool = False) -> None:
        """Begin a call: all rows are idle.

        Args:
            shares: whether some may hold the same pages, and attention asks which.
        """
        self.shares = shares and self.is_fixed
        none = self.numbers[0, :0]
        self.write(self.num_rows, none, self.numbers[1:3, :0], none, self.table[:0])
        for name in adapters:
            if name not in self.factors:
                zeros = torch.zeros(self.num_rows, 1, dtype=dtype, device=self.device)
                self.factors[name] = zeros
            self.factors[name].zero_()

    def write(
        self, before: int, tokens: Tensor, positions_and_cells: Tensor, slots: Tensor, table: Tensor
    ) -> None:
        """Write the first rows; others up to `before` become idle."""
        count, width = table.shape
        self.numbers[0, :count], self.numbers[1:3, :count] = tokens, positions_and_cells
        self.table[:count, :width] = table
        if self.idle_slot is not None:
            self.numbers[3, :count] = slots
        if self.shares:
            self.sharing[:, count:before] = self._alone[:, count:before]
        if count < before and self.is_fixed:
            self._idle(self.numbers[:, count:before], self.table[count:before])

    def _idle(self, numbers: Tensor, table: Tensor) -> None:
        """Make rows idle: they hold one token, in the first cell of the block `trash`."""
        numbers[:2] = 0
        numbers[2], table[:, 0] = self.trash * self.block_size, self.trash
        if self.idle_slot is not None:
            numbers[3] = self.idle_slot

    def move(self, begun: NDArray[np.int64]) -> None:
        """Let rows continue in the blocks that they have begun.

        Args:
            begun: their rows, and of each block its place, its number and its first cell, [4, m].
        """
        if self.device.type == "cpu":  # where torch's calls take longer than the work
            row, column, block, cell = begun
            self.numbers[2].numpy()[row], self.table.numpy()[row, column] = cell, block
            return
        # one tensor, because making each costs as much as using it
        [(rows, columns, blocks, cells)] = to_device([torch.from_numpy(begun)], self.device)
        self.numbers[2].index_put_((rows,), cells)
        self.table.index_put_((rows, columns), blocks.to(torch.int32))

    def widen(self, width: int) -> int:
        """Let rows have so many blocks at least; returns how many they can have now."""
        held = self.table.shape[1]
        if width > held:
            assert not self.is_fixed, (width, held)
            self.table = F.pad(self.table, (0, 2 * width - held))
        return self.table.shape[1]


class RowState:
    """The rows of one call's decodes.

    Args:
        adapters: names of the adapters of which rows have different ones.
        dtype: dtype of their factors.
        shares: see `RowBuffers.begin`.
    """

    def __init__(
        self,
        buffers: RowBuffers,
        adapters: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        *,
        shares: bool = False,
    ) -> None:
        self._buffers, self._block_size, self._adapters = buffers, buffers.block_size, adapters
        buffers.begin(adapters, dtype, shares=shares)
        self._samples: list[Sample] = []
        self._row: dict[Sample, int] = {}
        # of each row, on the host: its length, its key, how far its tokens' numbers are beyond
        # their places, and its blocks
        self._lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._bases: NDArray[np.int64] = np.zeros((2, 0), np.int64)
        self._table: NDArray[np.int32] = np.zeros((0, 1), np.int32)
        self._longest = 0
        self._view: DecodeRows | None = None
        none = buffers.numbers[:, :0]
        self._newest = none[0], none[1:3]
        self._base = torch.zeros(2, 0, dtype=torch.int64, device=buffers.device)
        self._keys = self._base[0]
        self._keys_from = 0
        self._temperatures: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self._samples)

    @property
    def shares(self) -> bool:
        """Whether its tensors tell which rows hold the same pages."""
        return self._buffers.shares

    def view(self, size: int | None = None) -> DecodeRows:
        """Return the rows, or the first `size`, of which those that are not used are idle."""
        width = -(-self._longest // self._block_size)
        if size is not None:
            return self._buffers.view(size, width, self._adapters)
        if self._view is None or self._view.table.shape[1] < width:
            self._view = self._buffers.view(self.count, width, self._adapters)
        return self._view

    def idle(self, size: int) -> list[Tensor]:
        """See `RowBuffers.idle`."""
        return self._buffers.idle(size, self._adapters)

    def keys(self) -> Tensor:
        """Return the random keys of the tokens that this step draws, int64 [n] on the device."""
        at = self._longest - self._keys_from
        if not at < self._keys.shape[0]:
            base, beyond = self._base
            ahead = torch.arange(1, 1 + _KEYS_AHEAD, device=base.device)[:, None]
            self._keys = chain_all(base, self._buffers.numbers[1, : self.count] + beyond + ahead)
            self._keys_from, at = self._longest, 0
        return self._keys[at]

    def draw_inputs(self, size: int, temperatures: Tensor) -> list[Tensor]:
        """Return what `draw_directly` takes of the first `size` rows but their logits, at fixed
        addresses: the rows' keys of this step, and their temperatures.

        Args:
            temperatures: float32 [n]; the same tensor as before if they are the same.
        """
        buffers = self._buffers
        buffers.keys[: self.count].copy_(self.keys())
        if temperatures is not self._temperatures:
            buffers.temperatures[: self.count].copy_(temperatures)
            self._temperatures = temperatures
        return [buffers.keys[:size], buffers.temperatures[:size], buffers.order[:size]]

    def update(self, plan: StepPlan, drawn: Tensor | None, place: Mapping[Sample, int]) -> None:
        """Make the rows those of a plan's decodes.

        Args:
            drawn: tokens of the step before, int64 [N] on the device; its first ones are those of
                its decodes.
            place: places in it of other samples' tokens.
        """
        if plan.decodes is not self._samples:
            self._arrange(plan, drawn, place)
            return
        if not self.count:
            return
        assert drawn is not None, "rows continue after a step that has drawn"
        self._lengths += 1
        self._longest += 1
        tokens, numbers = self._newest
        tokens.copy_(drawn[: self.count])
        numbers.add_(1)
        if plan.moved:
            self._buffers.move(self._move(plan))

    def _move(self, plan: StepPlan) -> NDArray[np.int64]:
        """Note the blocks that rows have begun; returns their rows, places, numbers and first
        cells, [4, m].
        """
        row = self._row
        found = [(row[s], number, s.blocks[number]) for s, number in plan.moved]
        rows, numbers, blocks = np.array(found, np.int64).T
        self._hold(int(numbers.max()) + 1)
        self._table[rows, numbers] = blocks
        return np.stack((rows, numbers, blocks, blocks * self._block_size))

    def _arrange(self, plan: StepPlan, drawn: Tensor | None, place: Mapping[Sample, int]) -> None:
        """Write all rows."""
        samples, known, before = plan.decodes, self._row, self.count
        source = np.array([known.get(sample, -1) for sample in samples], np.int64)
        if before:  # of a fresh row these are another's until they are overwritten
            self._lengths, self._bases = self._lengths[source] + 1, self._bases[:, source]
            self._table = self._table[source]
        else:
            self._lengths = np.zeros(len(samples), np.int64)
            self._bases = np.zeros((2, len(samples)), np.int64)
            self._table = np.zeros((len(samples), self._table.shape[1]), np.int32)
        fresh = [(i, samples[i]) for i in np.flatnonzero(source < 0).tolist()]
        self._hold(max((len(sample.blocks) for _, sample in fresh), default=1))
        num_drawn, written = 0 if drawn is None else len(drawn), list[int]()
        for i, sample in fresh:
            self._lengths[i] = sample.cached
            self._bases[:, i] = sample.key, sample.next_number - len(sample.tokens)
            self._table[i] = 0
            self._table[i, : len(sample.blocks)] = sample.blocks
            source[i] = place.get(sample, num_drawn + len(written))
            if sample not in place:
                written.append(sample.tokens[-1])
        self._samples, self._row = samples, {sample: i for i, sample in enumerate(samples)}
        if plan.moved:
            self._move(plan)
        self._longest = int(self._lengths.max(initial=0))
        self._keys, self._keys_from = self._keys[:0], self._longest
        self._view = None
        self._write(before, drawn, source, written)

    def _write(
        self, before: int, drawn: Tensor | None, source: NDArray[np.int64], written: list[int]
    ) -> None:
        """Write the rows to the device.

        Args:
            before: number of rows so far.
            source: place of each row's token among `drawn` and then `written`.
        """
        buffers, asked = self._buffers, [sample.request.adapter for sample in self._samples]
        if buffers.idle_slot is not None:
            slots = [sample.slot for sample in self._samples]
        else:
            slots = []
        places = self._lengths - 1
        columns = places // self._block_size
        cells = places + (self._table[range(self.count), columns] - columns) * self._block_size
        sharing = [] if not self.shares else [torch.from_numpy(self._find_sharing())]
        numbers, table, where, tokens, slot, self._base, *others = to_device(
            [
                torch.from_numpy(np.stack((places, cells))),
                torch.from_numpy(self._table),
                torch.from_numpy(source),
                torch.tensor(written, dtype=torch.int64),
                torch.tensor(slots, dtype=torch.int64),
                torch.from_numpy(self._bases),
                *sharing,
                *(
                    torch.tensor(
                        [[name == own] for name in asked], dtype=buffers.factors[own].dtype
                    )
                    for own in self._adapters
                ),
            ],
            buffers.device,
        )
        if drawn is not None:
            tokens = torch.cat((drawn, tokens))
        # tokens; positions and cells, which go to the next in their blocks
        self._newest = buffers.numbers[0, : self.count], buffers.numbers[1:3, : self.count]
        buffers.write(before, tokens[where], numbers, slot, table)
        if sharing:
            buffers.sharing[:, : self.count] = others.pop(0)
        for own, factor in zip(self._adapters, others, strict=True):
            buffers.factors[own][: self.count] = factor.view(-1, 1)
            buffers.factors[own][self.count : before] = 0

    def _find_sharing(self) -> NDArray[np.int32]:
        prompts = np.array([sample.index for sample in self._samples], np.int64)
        return find_sharing(self._table, self._lengths, prompts, self._block_size)

    def _hold(self, width: int) -> None:
        """Make room for so many blocks of a row."""
        held = self._table.shape[1]
        if width > held:
            wide = min(2 * width, self._buffers.widen(width))
            self._table = np.pad(self._table, ((0, 0), (0, wide - held)))
