"""`RecurrentStates`: states and convolution windows of the engine's recurrent layers, by slot.

The scheduler gives slots to samples as it gives cache blocks: a slot holds what all tokens that a
sample has cached amount to. Samples that share a prompt share a slot until one of them computes
another token; that one first gets a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.models.blocks.delta_layout import Segment
from spmdrl.models.blocks.delta_rule import DeltaInputs, delta_step
from spmdrl.models.blocks.recurrence import Carried, SegmentRecurrence
from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import GatedDelta
from spmdrl.rollout.native.attention import PagedAttention
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.native.varlen import VarlenAttention

SPARE_SLOTS = 2
"""Slots in addition to the running samples': the common prefix's, and a prompt's that is shared."""


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """Sizes of the states on one tensor-parallel rank.

    Args:
        layers: number of each recurrent layer in the model -> its spec.
        num_slots: slots that samples can hold.
        dtype: dtype of the windows; states are float32.
    """

    layers: dict[int, GatedDelta]
    num_slots: int
    tp_size: int
    dtype: torch.dtype
    device: torch.device

    def state(self, layer: int) -> tuple[int, int, int]:
        spec = self.layers[layer]
        return (spec.num_v_heads // self.tp_size, spec.head_dim, spec.v_dim)

    def window(self, layer: int) -> tuple[int, int]:
        spec = self.layers[layer]
        channels = 2 * spec.num_heads * spec.head_dim + spec.num_v_heads * spec.v_dim
        return (spec.conv_size - 1, channels // self.tp_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, and of the one that idle rows of a step write to."""
        per_slot = 0
        for layer in self.layers:
            heads, keys, values = self.state(layer)
            inputs, channels = self.window(layer)
            per_slot += 4 * heads * keys * values + self.dtype.itemsize * inputs * channels
        return per_slot * (self.num_slots + 1) if self.num_slots else 0


def recurrent_layers(model: ModelConfig) -> dict[int, GatedDelta]:
    """Find a model's recurrent layers."""
    mixers = enumerate(spec.mixer for spec in model.layers)
    return {i: mixer for i, mixer in mixers if isinstance(mixer, GatedDelta)}


def slots_needed(samples: int, max_running: int) -> int:
    """Count the slots of a call with so many samples."""
    return min(samples, max_running) + SPARE_SLOTS


class RecurrentStates:
    """The states; after `prepare`, `recur` is that of the decoder's `Attend`."""

    def __init__(self, shape: StateShape) -> None:
        self.shape = shape
        slots, device = shape.num_slots + 1, shape.device
        self._states = {
            layer: torch.zeros(slots, *shape.state(layer), device=device) for layer in shape.layers
        }
        self._windows = {
            layer: torch.zeros(slots, *shape.window(layer), dtype=shape.dtype, device=device)
            for layer in shape.layers
        }
        self._decoding = self._chunked = self._fresh = torch.empty(0, dtype=torch.int64)
        self._chunks: SegmentRecurrence | None = None

    def caches(self) -> list[Tensor]:
        """Return all tensors, slots first, to be read and written between steps."""
        return [*self._states.values(), *self._windows.values()]

    def indices(self, plan: StepPlan, *, pad_to: int = 0) -> list[Tensor]:
        """Build on the host the slots of the decodes and of the chunks, and the places among the
        chunks of those that begin a sequence.

        Args:
            pad_to: pad to this many decodes, which use no sample's slot.
        """
        decoding = [_slot(sample.slot) for sample in plan.decodes]
        decoding += [self.shape.num_slots] * (pad_to - len(decoding))
        chunked = [_slot(chunk.sample.slot) for chunk in plan.chunks]
        fresh = [i for i, chunk in enumerate(plan.chunks) if chunk.start == 0]
        return [torch.tensor(x, dtype=torch.int64) for x in (decoding, chunked, fresh)]

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        """Take the plan's `indices`, which are on the device now."""
        self._decoding, self._chunked, self._fresh = indices
        segments = []
        at = 0
        for chunk in plan.chunks:
            stop = at + chunk.stop - chunk.start
            segments.append(Segment(start=at, stop=stop))
            at = stop
        self._chunks = SegmentRecurrence(segments) if segments else None

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:  # [T, HV, v_dim]
        """Advance the states of one layer; rows are one for each of the plan's decodes, then the
        tokens of its chunks.
        """
        count = len(self._decoding)
        parts = []
        if count:
            parts.append(self._step(layer, inputs.rows(slice(0, count))))
        if self._chunks is not None:
            rows = inputs.rows(slice(count, None)) if count else inputs
            parts.append(self._advance(layer, rows, self._chunks))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(self, layer: int, inputs: DeltaInputs) -> Tensor:
        slots, states, windows = self._decoding, self._states[layer], self._windows[layer]
        held = torch.cat((windows.index_select(0, slots), inputs.mixed.unsqueeze(1)), dim=1)
        windows.index_copy_(0, slots, held[:, 1:])
        state = states.index_select(0, slots)
        out = delta_step(
            state, *inputs.heads(inputs.convolve_last(held)), inputs.decay, inputs.beta
        )
        states.index_copy_(0, slots, state)
        return out.to(inputs.mixed.dtype)

    def _advance(self, layer: int, inputs: DeltaInputs, chunks: SegmentRecurrence) -> Tensor:
        slots, states, windows = self._chunked, self._states[layer], self._windows[layer]
        begin = Carried(
            states=states.index_select(0, slots).index_fill_(0, self._fresh, 0),
            windows=windows.index_select(0, slots).index_fill_(0, self._fresh, 0),
        )
        out, end = chunks.advance(inputs, begin)
        states.index_copy_(0, slots, end.states.to(states.dtype))
        windows.index_copy_(0, slots, end.windows)
        return out


class MixedAttention:
    """`PagedAttention` of models with recurrent layers: another's attention, and their states."""

    def __init__(self, attention: PagedAttention, states: RecurrentStates) -> None:
        self.attention, self.states = attention, states

    @property
    def takes_latents(self) -> bool:
        return self.attention.takes_latents

    def indices(self, plan: StepPlan, *, pad_to: int = 0) -> list[Tensor]:
        """See `PagedAttention.indices`."""
        own = self.states.indices(plan, pad_to=pad_to)[0]
        if not pad_to:
            found = self.attention.indices(plan)
        else:
            assert isinstance(self.attention, VarlenAttention), "only its steps are padded"
            found = self.attention.indices(plan, pad_to=pad_to)
        return [own, *found[:3], *self.chunk_indices(plan)]

    def chunk_indices(self, plan: StepPlan) -> list[Tensor]:
        """See `PagedAttention.chunk_indices`; the states' come first."""
        if not plan.chunks:
            return []
        _, *chunked = self.states.indices(StepPlan(copies=[], decodes=[], chunks=plan.chunks))
        return [*chunked, *self.attention.chunk_indices(plan)]

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        slots, positions, cells, table, *rest = indices
        chunked, others = [slots[:0], slots[:0]], rest
        if plan.chunks:
            chunked, others = rest[:2], rest[2:]
        self.states.prepare(plan, [slots, *chunked])
        self.attention.prepare(plan, [positions, cells, table, *others])

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        return self.attention(layer, q, k, v, sinks)

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:
        return self.states.recur(layer, inputs)

    def caches(self) -> Sequence[Tensor]:
        """Return the tensors by block of the other."""
        return self.attention.caches()


def _slot(slot: int | None) -> int:
    assert slot is not None, "a sample without slot is computed"
    return slot
