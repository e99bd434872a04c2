"""The gated delta rule on packed streams, against its recurrence token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.blocks.delta_kernels import cut_levels, fast_convolution, fast_rule
from spmdrl.models.blocks.delta_layout import (
    Segment,
    chunk_size_for,
    cut_chunks,
    lay_out,
    segments_of,
)
from spmdrl.models.blocks.delta_rule import DeltaInputs, delta_step
from spmdrl.models.blocks.recurrence import Carried, PackedRecurrence, SegmentRecurrence
from spmdrl.models.spans import Span

HEADS, V_HEADS, DIM, V_DIM, CONV = 2, 4, 8, 6, 4
CHANNELS = 2 * HEADS * DIM + V_HEADS * V_DIM
TENSORS = ("mixed", "conv_weight", "decay", "beta")


def random_inputs(
    num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> DeltaInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return DeltaInputs(
        mixed=normal(num_tokens, CHANNELS).to(dtype),
        conv_weight=normal(CHANNELS, CONV).to(dtype),
        decay=-F.softplus(normal(num_tokens, V_HEADS)).to(dtype) * 0.3,
        beta=normal(num_tokens, V_HEADS).sigmoid().to(dtype),
        num_heads=HEADS,
        head_dim=DIM,
    )


def rows_of(inputs: DeltaInputs, rows: Tensor | slice) -> DeltaInputs:
    return replace(
        inputs, mixed=inputs.mixed[rows], decay=inputs.decay[rows], beta=inputs.beta[rows]
    )


def by_tokens(inputs: DeltaInputs) -> Tensor:  # one sequence -> [T, HV, v_dim]
    """Compute the recurrence as it is written, token by token."""
    padded = F.pad(inputs.mixed, (0, 0, CONV - 1, 0))
    windows = padded.unfold(0, CONV, 1)
    q, k, v = inputs.heads(F.silu((windows * inputs.conv_weight).sum(-1)))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(V_HEADS // HEADS, dim=1) for x in (q, k))
    state = q.new_zeros(V_HEADS, DIM, V_DIM)
    out = []
    for t in range(len(q)):
        state = state * inputs.decay[t].exp()[:, None, None]
        found = torch.einsum("hdv,hd->hv", state, k[t])
        correction = inputs.beta[t][:, None] * (v[t] - found)
        state = state + torch.einsum("hd,hv->hdv", k[t], correction)
        out.append(torch.einsum("hdv,hd->hv", state, q[t]) * DIM**-0.5)
    return torch.stack(out)


def results(inputs: DeltaInputs, function: Callable[[DeltaInputs], Tensor]) -> list[Tensor]:
    """Return a function's outputs, and the gradients of a weighted sum of them."""
    held = {name: vars(inputs)[name].clone().requires_grad_() for name in TENSORS}
    out = function(replace(inputs, **held))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in held.values())]


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of any pair of tensors, by the larger magnitude in it."""
    return max(
        float((a - b).abs().max() / max(1.0, float(b.abs().max())))
        for a, b in zip(found, wanted, strict=True)
    )


def rows_spans(lengths: Sequence[int]) -> list[Span]:
    spans: list[Span] = []
    for length in lengths:
        at = spans[-1].q_stop if spans else 0
        spans.append(Span(q_start=at, q_stop=at + length, own=(at, at + length)))
    return spans


LENGTHS = (1, 5, 70, 130, 64, 2)


def row_by_row(inputs: DeltaInputs) -> Tensor:
    parts = []
    at = 0
    for length in LENGTHS:
        part = rows_of(inputs, slice(at, at + length))
        parts.append(PackedRecurrence(rows_spans([length])).recur(part))
        at += length
    return torch.cat(parts)


def test_a_packed_stream_equals_its_rows_one_by_one() -> None:
    inputs = random_inputs(sum(LENGTHS))
    packed = results(inputs, PackedRecurrence(rows_spans(LENGTHS)).recur)
    assert error(packed, results(inputs, row_by_row)) < 1e-5


@pytest.mark.parametrize("leak", ["state", "window"])
def test_a_leak_between_rows_would_be_found(leak: str) -> None:
    inputs = random_inputs(sum(LENGTHS))
    segments = segments_of(rows_spans(LENGTHS))
    if leak == "state":
        segments = tuple(
            replace(segment, parent=i - 1 if i else None) for i, segment in enumerate(segments)
        )
        recurrence = SegmentRecurrence(segments)
        leaky = results(inputs, recurrence.recur)
    else:
        # each row after the first has the last inputs of the row before in its window
        begins = [s.start for s in segments]
        windows = F.pad(inputs.mixed, (0, 0, CONV - 1, 0)).unfold(0, CONV - 1, 1)[begins].mT
        begin = Carried(
            states=torch.zeros(len(segments), V_HEADS, DIM, V_DIM), windows=windows.contiguous()
        )
        leaky = results(inputs, lambda i: SegmentRecurrence(segments).advance(i, begin)[0])
    assert error(leaky, results(inputs, row_by_row)) > 1e-2


@pytest.mark.parametrize("length", [1, 3, 64, 150])
def test_chunks_equal_the_recurrence_token_by_token(length: int) -> None:
    inputs = random_inputs(length, torch.float64)
    chunked = results(inputs, PackedRecurrence(rows_spans([length])).recur)
    assert error(chunked, results(inputs, by_tokens)) < 1e-10


def shared_spans() -> tuple[list[Span], list[list[int]]]:
    """Make a prompt of 70 tokens with three responses, one of which has two ends of its own, and a
    response to the prompt's first 30 tokens; with the tokens of each sequence.
    """
    prompt, first = (0, 70), (0, 30)
    spans = [
        Span(q_start=0, q_stop=70, own=prompt),
        Span(q_start=70, q_stop=72, own=(70, 72), prefix=(prompt,)),
        Span(q_start=72, q_stop=200, own=(72, 200), prefix=(prompt,)),
        Span(q_start=200, q_stop=205, own=(200, 205), prefix=(first,)),
        Span(q_start=205, q_stop=206, own=(205, 206), prefix=(prompt, (70, 72))),
        Span(q_start=206, q_stop=276, own=(206, 276), prefix=(prompt, (70, 72))),
    ]
    sequences = [[i for range_ in span.keys for i in range(*range_)] for span in spans]
    return spans, sequences


def test_a_shared_prompt_equals_copies_of_it() -> None:
    spans, sequences = shared_spans()
    inputs = random_inputs(spans[-1].q_stop)

    def apart(inputs: DeltaInputs) -> Tensor:
        parts = []
        for span, sequence in zip(spans, sequences, strict=True):
            rows = rows_of(inputs, torch.tensor(sequence))
            out = PackedRecurrence(rows_spans([len(sequence)])).recur(rows)
            parts.append(out[-span.num_queries :])
        return torch.cat(parts)

    shared = results(inputs, PackedRecurrence(spans).recur)
    assert error(shared, results(inputs, apart)) < 1e-5


def test_pieces_of_a_sequence_continue_what_they_carry() -> None:
    inputs = random_inputs(150)
    whole = PackedRecurrence(rows_spans([150])).recur(inputs)
    carried = Carried(
        states=torch.zeros(1, V_HEADS, DIM, V_DIM), windows=torch.zeros(1, CONV - 1, CHANNELS)
    )
    parts = []
    for start, stop in ((0, 1), (1, 3), (3, 100), (100, 150)):
        recurrence = SegmentRecurrence([Segment(start=0, stop=stop - start)])
        out, carried = recurrence.advance(rows_of(inputs, slice(start, stop)), carried)
        parts.append(out)
    assert error([torch.cat(parts)], [whole]) < 1e-5
    assert torch.equal(carried.windows[0], inputs.mixed[-3:])


def test_steps_equal_chunks() -> None:
    inputs = random_inputs(40)
    whole = PackedRecurrence(rows_spans([40])).recur(inputs)
    state = torch.zeros(1, V_HEADS, DIM, V_DIM)
    q, k, v = inputs.heads(inputs.convolve(F.pad(inputs.mixed, (0, 0, CONV - 1, 0))))
    rows = (x.unsqueeze(1) for x in (q, k, v, inputs.decay, inputs.beta))
    out = [delta_step(state, *row)[0] for row in zip(*rows, strict=True)]
    assert error([torch.stack(out)], [whole]) < 1e-5


def test_functions_equal_those_of_transformers() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    inputs = random_inputs(150)

    def reference(inputs: DeltaInputs) -> Tensor:
        mixed = theirs.causal_conv1d_fn(
            inputs.mixed.T.unsqueeze(0), inputs.conv_weight, activation="silu"
        )
        q, k, v = inputs.heads(mixed.mT)
        q, k = (x.repeat_interleave(V_HEADS // HEADS, dim=2) for x in (q, k))
        out, _ = theirs.torch_chunk_gated_delta_rule(
            *(q, k, v),
            g=inputs.decay.unsqueeze(0),
            beta=inputs.beta.unsqueeze(0),
            use_qk_l2norm_in_kernel=True,
        )
        return out[0]

    found = results(inputs, PackedRecurrence(rows_spans([150])).recur)
    assert error(found, results(inputs, reference)) < 1e-5


def test_chunks_of_short_rows_are_short() -> None:
    assert chunk_size_for([1000, 900]) == 64
    assert chunk_size_for([65, 65]) == 16
    assert chunk_size_for([32] * 8) == 32
    assert chunk_size_for([3]) == 16


def test_steps_of_a_scan_hold_chunks_of_several_rows() -> None:
    spans, _ = shared_spans()
    segments = segments_of(spans)
    laid = lay_out(segments, CONV, torch.device("cpu"))
    chunks = cut_chunks(segments, laid.starts, torch.device("cpu"), 64)
    # 30 tokens of the prompt; 40 more, and 5 that continue the 30; 2, and 64 of 128; 64, 1, 64; 6
    assert chunks.sizes == (1, 2, 2, 3, 1)


def naive_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what the kernels compute, sequence by sequence."""
    ends = options["cu_seqlens"].tolist()
    states = options["initial_state"]
    if states is None:
        states = torch.zeros(len(ends) - 1, V_HEADS, DIM, V_DIM)
    states = states.clone()
    out = torch.zeros_like(v)
    for i, (start, stop) in enumerate(pairwise(ends)):
        for t in range(start, stop):
            row = (x[:, t] for x in (q, k, v, g, beta))
            out[:, t] = delta_step(states[i : i + 1], *row)
    return out, states


def test_kernels_get_the_segments_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    package, ops, rule = (ModuleType(n) for n in ("fla", "fla.ops", "fla.ops.gated_delta_rule"))
    vars(rule)["chunk_gated_delta_rule"] = naive_fla
    modules, convolution = ModuleType("fla.modules"), ModuleType("fla.modules.convolution")

    def causal_conv1d(x: Tensor, weight: Tensor, activation: str) -> tuple[Tensor, None]:
        assert activation == "silu"
        out = F.conv1d(x.mT, weight.unsqueeze(1), groups=CHANNELS, padding=CONV - 1)
        return F.silu(out[..., : x.shape[1]]).mT, None

    vars(convolution)["causal_conv1d"] = causal_conv1d
    for module in (package, ops, rule, modules, convolution):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spans, _ = shared_spans()
    inputs, segments = random_inputs(spans[-1].q_stop), segments_of(spans)
    device = torch.device("cpu")
    laid = lay_out(segments, CONV, device)
    rows = inputs.mixed[laid.rows].index_fill(0, laid.absent, 0)
    levels = cut_levels(segments, laid.starts, device)
    out, states = fast_rule(inputs, fast_convolution(inputs, rows), levels, None)
    begin = Carried(
        states=torch.zeros(1, V_HEADS, DIM, V_DIM), windows=torch.zeros(1, CONV - 1, CHANNELS)
    )
    wanted, carried = SegmentRecurrence(segments).advance(inputs, begin)
    assert error([out, states], [wanted, carried.states]) < 1e-5
