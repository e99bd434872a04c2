"""`PackedRecurrence`: recurrent layers over a packed stream; no state crosses a row.

Rows that share a prompt continue the state and the convolution's window at its end, and their
gradients flow back into it. Chunks of all rows advance together, as far as they do not depend on
one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spmdrl.models.blocks.delta_kernels import (
    Levels,
    cut_levels,
    fast_convolution,
    fast_rule,
    serves,
)
from spmdrl.models.blocks.delta_layout import (
    Chunks,
    Laid,
    Segment,
    cut_chunks,
    lay_out,
    segments_of,
)
from spmdrl.models.blocks.delta_rule import DeltaInputs, chunk_products, scan_chunks
from spmdrl.models.spans import Span, covers_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """States and windows at the ends or begins of sequences.

    Args:
        states: [n, HV, d, v_dim], float32 or wider.
        windows: [n, K - 1, C], the last inputs of the convolution, oldest first.
    """

    states: Tensor
    windows: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    """Rows for the convolution, and those for the kernels (`levels`) or for plain torch."""

    laid: Laid
    levels: Levels | None = None
    chunks: Chunks | None = None


class SegmentRecurrence:
    """The recurrence over segments of a stream, which it lays out once for all layers."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)
        self._layout: _Layout | None = None

    def recur(self, inputs: DeltaInputs) -> Tensor:  # [T, HV, v_dim]
        """Compute outputs; sequences begin with zero states and empty windows.

        In plain torch a backward pass computes them again: what the rule holds between its products
        is many times its inputs, and exists for one layer at a time.
        """
        if torch.is_grad_enabled() and self._lay_out(inputs).chunks is not None:
            out: Tensor = checkpoint(
                self._outputs, inputs, use_reentrant=False, preserve_rng_state=False
            )
            return out
        return self._outputs(inputs)

    def _outputs(self, inputs: DeltaInputs) -> Tensor:
        return self._run(inputs, None, keeps=False)[0]

    def advance(self, inputs: DeltaInputs, begin: Carried) -> tuple[Tensor, Carried]:
        """Compute outputs [T, HV, v_dim], and what each segment carries at its end.

        Args:
            begin: what each segment without parent begins with.
        """
        out, end = self._run(inputs, begin, keeps=True)
        assert end is not None
        return out, end

    def _run(
        self, inputs: DeltaInputs, begin: Carried | None, keeps: bool
    ) -> tuple[Tensor, Carried | None]:
        mixed, layout = inputs.mixed, self._lay_out(inputs)
        laid = layout.laid
        rows = mixed.index_select(0, laid.rows)
        if begin is None:
            rows.index_fill_(0, laid.absent, 0)
        else:
            windows = begin.windows.flatten(0, 1).index_select(0, laid.given)
            rows.index_copy_(0, laid.absent, windows.to(rows.dtype))
        initial = None if begin is None else begin.states
        states: Tensor | None
        if layout.levels is not None:
            convolved = fast_convolution(inputs, rows)
            out, states = fast_rule(inputs, convolved, layout.levels, initial)
        else:
            assert layout.chunks is not None
            convolved = inputs.convolve(rows)
            out, states = by_chunks(inputs, convolved, layout.chunks, initial, keeps=keeps)
        out = out.to(mixed.dtype)
        if not keeps:
            return out, None
        assert states is not None
        return out, Carried(states=states, windows=rows[laid.ends])

    def _lay_out(self, inputs: DeltaInputs) -> _Layout:
        device, conv_size = inputs.mixed.device, inputs.conv_weight.shape[1]
        if self._layout is None:
            # Indices made in inference mode could not be saved for a backward pass.
            with torch.inference_mode(False):
                laid = lay_out(self._segments, conv_size, device)
                if serves(device, inputs.mixed.dtype):
                    levels = cut_levels(self._segments, laid.starts, device)
                    self._layout = _Layout(laid=laid, levels=levels)
                else:
                    chunks = cut_chunks(self._segments, laid.starts, device)
                    self._layout = _Layout(laid=laid, chunks=chunks)
        return self._layout


class PackedRecurrence:
    """The recurrence over one packed stream of training.

    Args:
        spans: spans in order, covering every row, whose keys are rows of this stream.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        assert covers_rows(spans), spans
        self._recurrence = SegmentRecurrence(segments_of(spans))

    def recur(self, inputs: DeltaInputs) -> Tensor:  # [T, HV, v_dim]
        """Compute one layer's outputs for all rows."""
        return self._recurrence.recur(inputs)


def by_chunks(
    inputs: DeltaInputs,
    convolved: Tensor,  # [L - K + 1, C]
    chunks: Chunks,
    initial: Tensor | None,  # [segments without parent, HV, d, v_dim]
    *,
    keeps: bool,
) -> tuple[Tensor, Tensor | None]:  # [T, HV, v_dim]; [segments, HV, d, v_dim]
    """Compute outputs of all rows in plain torch, and the states at the segments' ends if asked."""
    shape = chunks.tokens.shape
    decay, beta = (
        x.index_select(0, chunks.tokens.flatten()).view(*shape, -1) * chunks.is_token
        for x in (inputs.decay, inputs.beta)
    )
    found = convolved.index_select(0, chunks.convolved.flatten()).view(*shape, -1)
    products = chunk_products(*inputs.heads(found), decay, beta)
    out, states = scan_chunks(products, initial, chunks.sizes, chunks.previous, keeps=keeps)
    # [n, H, R, c, v_dim] -> [n * c, HV, v_dim]
    out = out.flatten(1, 2).transpose(1, 2).flatten(0, 1).index_select(0, chunks.places)
    if not keeps:
        return out, None
    return out, torch.cat(states).flatten(1, 2).index_select(0, chunks.last)
