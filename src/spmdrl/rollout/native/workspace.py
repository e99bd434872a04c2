"""`Workspace`: the native engine's cache, and the objects that hold its addresses.

Where steps are captured and the driver maps memory (`memory.mapped`), a released cache keeps its
address, and so the graphs stay: the next call captures nothing again. Elsewhere they go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spmdrl.config.sections import RolloutSection
from spmdrl.memory.mapped import MappedMemory, fault_of_mapping
from spmdrl.models.blocks.moe import has_fixed_shapes
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.native.attention import GatheredAttention, PagedAttention
from spmdrl.rollout.native.cache import CacheShape, layer_caches
from spmdrl.rollout.native.graphs import DecodeGraphs
from spmdrl.rollout.native.paged_decode import CompiledAttention, has_compiled_code
from spmdrl.rollout.native.recurrent import (
    MixedAttention,
    RecurrentStates,
    StateShape,
    recurrent_layers,
    slots_needed,
)
from spmdrl.rollout.native.rows import RowBuffers
from spmdrl.rollout.native.runner import Runner
from spmdrl.rollout.native.varlen import (
    BLOCK_MULTIPLE,
    VarlenAttention,
    paged_bytes,
    pages_are_usable,
)
from spmdrl.rollout.protocol import Request
from spmdrl.rollout.requests import GB, blocks_needed

CPU_CACHE_GB = 2.0
"""Most of an "auto" cache on a CPU."""

_CUDA_FREE_FRACTION = 0.8


class NativeOptions(RolloutSection):
    """The section `rollout` with what the run adds to it.

    A `kv_cache_gb` of "auto" is the most that a call's requests can need, up to 2 GB on the CPU and
    80 % of the free memory on CUDA. Torch's paged kernels round `block_size` up to 256's multiples.

    Args:
        keeps_aborted: keep the state of an aborted call (with its cache!), to resume it.
        samples, longest: on CUDA, "auto" is at least the need of this many samples of this many
            tokens, so that the cache of a run's first call also serves the later ones.
        planned_bytes: bytes that "auto" takes at most, but for a request that needs more by itself;
            on CUDA all of them at once. None: no bound.
    """

    keeps_aborted: bool = False
    samples: int = 0
    longest: int = 0
    planned_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """A cache of `num_blocks` and `num_slots`, attention over it, the runner of steps with it, and
    storage of the rows that they decode.

    Args:
        num_slots: number of slots of recurrent layers' states; 0 if the model has none.
        memory: the cache's, if it keeps its address while it is away.
    """

    num_blocks: int
    num_slots: int
    attention: PagedAttention
    runner: Runner
    rows: RowBuffers
    memory: MappedMemory | None = None

    @property
    def is_away(self) -> bool:
        """Whether the cache is not on the device."""
        return self.memory is not None and not self.memory.is_mapped

    def bring(self) -> None:
        """Put the cache on the device, filled with zeros, if it is away."""
        if self.memory is not None and self.is_away:
            self.memory.map()
            self.memory.tensor().zero_()

    def has_room(self, num_blocks: int, num_slots: int) -> bool:
        """Whether it has a cache of this size and at least so many slots."""
        return self.num_blocks == num_blocks and self.num_slots >= num_slots


def why_graphs_go(model: ModelConfig, device: torch.device | None) -> str | None:
    """Return why graphs of decode steps on a GPU do not outlive the cache; None if they do.

    Args:
        device: None: one whose driver maps memory.
    """
    if recurrent_layers(model):
        return "states of recurrent layers do not keep their addresses"
    fault = None if device is None else fault_of_mapping(device)
    return None if fault is None else f"memory cannot be mapped here: {fault}"


class Workspace:
    """Maker of `Work` for a call, which it keeps for later calls that need no larger cache.

    Args:
        tp_size: number of ranks that the heads are divided over.
        group: these ranks.
    """

    def __init__(
        self,
        model: ModelConfig,
        decoder: Decoder,
        options: NativeOptions,
        group: Lockstep,
        tp_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._decoder, self._options = model, decoder, options
        self._group, self._layers = group, layer_caches(model, tp_size)
        self._recurrent, self._tp_size = recurrent_layers(model), tp_size
        self._device, self._dtype = device, dtype
        self._paged = pages_are_usable(self._layers, dtype, device)
        multiple = BLOCK_MULTIPLE if self._paged else 1
        self.block_size = -(-options.block_size // multiple) * multiple
        self._work: Work | None = None
        self._graphs: DecodeGraphs | None = None

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs, which hold addresses."""
        shapes = {name: tuple(p.shape) for name, p in self._decoder.named_parameters()}
        fixed = has_fixed_shapes(self._model, shapes, self._dtype, self._device)
        fixed = fixed and not self._group.shares_experts  # whose exchanges have other sizes
        return self._paged and self._options.cuda_graphs and fixed

    @property
    def keeps_addresses(self) -> bool:
        """Whether the cache comes back at its address after `release`, which then leaves graphs."""
        return self.captures_graphs and why_graphs_go(self._model, self._device) is None

    def cache_bytes(self) -> int:
        """Return the current bytes of the cache."""
        if self._work is None or self._work.is_away:
            return 0
        states = self._states(self._work.num_slots).num_bytes
        return self._shape(self._work.num_blocks).num_bytes + states

    def graph_bytes(self) -> int:
        """Return the current bytes of the graphs' private memory pool."""
        return 0 if self._graphs is None else self._graphs.pool_bytes

    def release(self) -> None:
        """Free the cache, and the graphs if they hold addresses that it does not keep; the next
        call makes what is lacking.
        """
        if self._work is not None and self._work.memory is not None:
            self._work.memory.unmap()
        else:
            self.close()

    def close(self) -> None:
        """Free the cache, its address and the graphs."""
        self.release_graphs()
        self._work = None

    def release_graphs(self) -> None:
        """Free the graphs, before weights move whose addresses they hold."""
        if self._graphs is not None:
            self._graphs.drop()

    def slots_for(self, num_samples: int) -> int:
        """Return the number of slots for a call with so many samples; 0 if the model needs none."""
        return slots_needed(num_samples, self._options.max_running) if self._recurrent else 0

    def blocks_for(self, requests: Sequence[Request]) -> int:
        """Return the number of cache blocks for a call, equal on the ranks of the group."""
        states = self._states(self.slots_for(sum(len(r.samples) for r in requests))).num_bytes
        given, block_bytes = self._options.kv_cache_gb, self._shape(1).num_bytes
        kept = 0 if self._work is None else self._work.num_blocks
        if not block_bytes:  # all layers are recurrent: blocks only count tokens
            needed = blocks_needed(requests, self.block_size, self._options.max_running)
            return max(needed, kept)
        if given != "auto":
            return max(0, int(given * GB) - states) // block_bytes
        needed = blocks_needed(requests, self.block_size, self._options.max_running)
        planned = self._planned(requests, states)
        if planned is not None:
            needed = min(needed, planned)
            if self._work is not None and self._work.is_away and kept > planned:
                kept = 0  # a call has made more than there may be room for now
        if needed <= kept:
            return kept
        if self._device.type == "cpu":
            return min(needed, int(CPU_CACHE_GB * GB) // block_bytes)
        needed = self._with_room(needed) if planned is None else planned
        # memory that torch's allocator has cached is free for it, though not for others
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        free = torch.cuda.mem_get_info(self._device)[0] + cached + self.cache_bytes() - states
        # ranks may have different amounts free, but must schedule alike
        most = self._group.least(int(free * _CUDA_FREE_FRACTION) // block_bytes)
        return max(min(needed, most), kept)

    def _planned(self, requests: Sequence[Request], states: int) -> int | None:
        """Return the blocks of the plan without the states' bytes, or of the longest request if
        that needs more.
        """
        most = self._options.planned_bytes
        if most is None:
            return None
        longest = max((blocks_needed([r], self.block_size, 1) for r in requests), default=0)
        return max((most - states) // self._shape(1).num_bytes, longest)

    def _with_room(self, needed: int) -> int:
        """Round up so that the cache grows seldom, since its graphs must then be captured again."""
        options = self._options
        blocks = -(-options.longest // self.block_size)
        planned = min(options.samples, options.max_running) * blocks
        if needed <= planned:
            return planned
        step = 1 << max(0, needed.bit_length() - 3)  # four sizes per doubling
        return -(-needed // step) * step

    def prepare(self, num_blocks: int, num_samples: int = 0) -> Work:
        """Return the work with a cache of `num_blocks` and slots for so many samples; the kept one
        if it has that size, and slots enough.
        """
        num_slots = self.slots_for(num_samples)
        # no name of this call may hold the work: its cache is freed before the new one is made
        if self._work is not None and self._work.has_room(num_blocks, num_slots):
            self._work.bring()
            return self._work
        self.close()
        shape, options = self._shape(num_blocks), self._options
        attention: PagedAttention
        memory = None
        most = -(-min(self._model.max_position, num_blocks * self.block_size) // self.block_size)
        if self._paged:
            if self.keeps_addresses:
                memory = MappedMemory(paged_bytes(shape), self._device)
                memory.map()
            attention = VarlenAttention(
                shape, max_blocks=most, memory=None if memory is None else memory.tensor()
            )
        elif has_compiled_code(shape):
            attention = CompiledAttention(shape)
        else:
            attention = GatheredAttention(shape)
        if self._recurrent:
            attention = MixedAttention(attention, RecurrentStates(self._states(num_slots)))
        if self._graphs is None and self.captures_graphs:
            self._graphs = DecodeGraphs(options.max_running, self._device)
        runner = Runner(self._decoder, attention, self._device, graphs=self._graphs)
        rows = RowBuffers(
            options.max_running,
            most if self._paged else 1,
            self._device,
            block_size=self.block_size,
            trash=num_blocks if self._paged else 0,
            idle_slot=num_slots if self._recurrent else None,
            fixed=self._paged,
        )
        self._work = Work(
            num_blocks=num_blocks,
            num_slots=num_slots,
            attention=attention,
            runner=runner,
            rows=rows,
            memory=memory,
        )
        return self._work

    def _states(self, num_slots: int) -> StateShape:
        return StateShape(
            layers=self._recurrent,
            num_slots=num_slots,
            tp_size=self._tp_size,
            dtype=self._dtype,
            device=self._device,
        )

    def _shape(self, num_blocks: int) -> CacheShape:
        return CacheShape(
            layers=self._layers,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self._dtype,
            device=self._device,
        )
