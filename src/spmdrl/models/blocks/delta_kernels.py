"""The gated delta rule by flash-linear-attention's kernels, in half precision on CUDA.

Its kernels take sequences of unequal length and their first states. Segments that continue one
another are computed level by level: first those that begin sequences, then those that continue
these, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.blocks.delta_layout import Segment
from spmdrl.models.blocks.delta_rule import DeltaInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """Segments that depend only on those of the level before.

    Args:
        tokens, convolved: int64 [rows], their rows in the stream and in the convolution's result.
        ends: int64 [n + 1], the start of each segment, with the total at the end.
        parents: int64 [n], the places in the level before of the segments that they continue; None:
            they begin sequences.
    """

    tokens: Tensor
    convolved: Tensor
    ends: Tensor
    parents: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """All segments of a stream.

    Args:
        places: int64 [T], each row's place in the rows of all levels.
        last: int64 [segments], each segment's place in the segments of all levels.
    """

    levels: tuple[Level, ...]
    places: Tensor
    last: Tensor


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are installed for a stream's device and compute in its dtype."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and find_spec("fla") is not None


def cut_levels(
    segments: Sequence[Segment],
    starts: Sequence[int],
    device: torch.device,
) -> Levels:
    """Sort segments by the number of those that they continue.

    Args:
        starts: the segments' places in the convolution's result, see `delta_layout.Laid`.
    """
    members: list[list[int]] = []
    level_of: list[int] = []
    for number, segment in enumerate(segments):
        depth = 0 if segment.parent is None else level_of[segment.parent] + 1
        level_of.append(depth)
        if depth == len(members):
            members.append([])
        members[depth].append(number)
    order = [number for level in members for number in level]
    place = {number: i for level in members for i, number in enumerate(level)}
    tokens = [torch.arange(segments[n].start, segments[n].stop) for n in order]
    places, last = torch.cat(tokens).argsort(), torch.tensor(order).argsort()
    levels = []
    for depth, level in enumerate(members):
        held = [segments[n] for n in level]
        rows = torch.cat([torch.arange(s.start, s.stop) for s in held])
        laid = [
            torch.arange(s.stop - s.start) + starts[n] for s, n in zip(held, level, strict=True)
        ]
        ends = torch.tensor([0, *(s.stop - s.start for s in held)]).cumsum(0)
        parents = torch.tensor([place[s.parent] for s in held if s.parent is not None]).long()
        moved = to_device([rows, torch.cat(laid), ends, parents], device)
        level_parents = moved[3] if depth else None
        levels.append(
            Level(tokens=moved[0], convolved=moved[1], ends=moved[2], parents=level_parents)
        )
    places, last = to_device([places, last], device)
    return Levels(levels=tuple(levels), places=places, last=last)


def fast_convolution(
    inputs: DeltaInputs,
    laid: Tensor,  # [L, C]
) -> Tensor:  # [L - K + 1, C]
    """Compute `inputs.convolve`."""
    if inputs.activate is not F.silu:
        return inputs.convolve(laid).to(laid.dtype)
    from fla.modules.convolution import causal_conv1d

    out, _ = causal_conv1d(laid.unsqueeze(0), inputs.conv_weight, activation="silu")
    found: Tensor = out[0, inputs.conv_weight.shape[1] - 1 :]
    return found


def fast_rule(
    inputs: DeltaInputs,
    convolved: Tensor,  # [L - K + 1, C]
    levels: Levels,
    initial: Tensor | None,  # [segments without parent, HV, d, v_dim]
) -> tuple[Tensor, Tensor]:  # [T, HV, v_dim]; states at the segments' ends
    """Compute outputs of all rows, and the state at each segment's end."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    outputs, states = [], []
    state = initial
    for level in levels.levels:
        if level.parents is not None:
            assert state is not None
            state = state.index_select(0, level.parents)
        q, k, v = inputs.heads(convolved.index_select(0, level.convolved).unsqueeze(0))
        out, state = chunk_gated_delta_rule(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            inputs.decay.index_select(0, level.tokens).unsqueeze(0).float(),
            inputs.beta.index_select(0, level.tokens).unsqueeze(0),
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=level.ends,
        )
        outputs.append(out[0])
        states.append(state)
    return (
        torch.cat(outputs).index_select(0, levels.places),
        torch.cat(states).index_select(0, levels.last),
    )
