"""The block of gated DeltaNet, against the modules of transformers, whole and in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.blocks.gated_delta import DeltaMixer, delta_tensors
from spmdrl.models.blocks.projections import Build
from spmdrl.models.blocks.recurrence import PackedRecurrence
from spmdrl.models.config import parse_config
from spmdrl.models.degrees import check_cp
from spmdrl.models.family import STANDARD
from spmdrl.models.sharding import all_slices
from spmdrl.models.spans import Span
from spmdrl.models.specs import GatedDelta, NormSpec

HIDDEN = 32
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}


def reference(fused: bool) -> nn.Module:
    """Transformers' module with lively weights: Qwen3-Next's or Qwen3.5's."""
    if fused:
        from transformers.models.qwen3_next import configuration_qwen3_next as configurations
        from transformers.models.qwen3_next import modeling_qwen3_next as modules

        made: Any = modules.Qwen3NextGatedDeltaNet(configurations.Qwen3NextConfig(**SIZES), 0)
    else:
        from transformers.models.qwen3_5 import configuration_qwen3_5 as others
        from transformers.models.qwen3_5 import modeling_qwen3_5 as other_modules

        made = other_modules.Qwen3_5GatedDeltaNet(others.Qwen3_5TextConfig(**SIZES), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    module: nn.Module = made.float()
    return module


class Rows:
    """The trainer's recurrence over rows of these lengths."""

    def __init__(self, *lengths: int) -> None:
        spans: list[Span] = []
        for length in lengths:
            at = spans[-1].q_stop if spans else 0
            spans.append(Span(q_start=at, q_stop=at + length, own=(at, at + length)))
        self._recurrence = PackedRecurrence(spans)

    def recur(self, layer: int, inputs: Any) -> Tensor:
        return self._recurrence.recur(inputs)


def make(theirs: nn.Module, fused: bool, blocks: int = 1, rank: int = 0, size: int = 1) -> Any:
    """Make the block of one tensor-parallel rank; and where each parameter's rows come from."""
    spec = GatedDelta(num_heads=4, num_v_heads=8, head_dim=8, v_dim=6, conv_size=4, fused=fused)
    build = Build(
        norm=NormSpec(eps=1e-6, one_plus=True),
        tp=Parallel(rank=rank, size=size),
        blocks=blocks,
        device="cpu",
    )
    mixer = DeltaMixer(spec, HIDDEN, build)
    given = dict(theirs.named_parameters())
    origin = {}
    table = delta_tensors(spec, HIDDEN)
    for local, pieces in all_slices(None, rank, size, blocks=blocks, table=table).items():
        name = local.removeprefix("attention.")
        origin[name] = pieces
        parameter = mixer.get_parameter(name)
        for piece in origin[name]:
            box = given[file_name(piece.name)][tuple(map(slice, piece.start, piece.stop))]
            rows = parameter.data[piece.offset : piece.offset + piece.rows]
            rows.view(piece.size).copy_(box.detach())
        assert sum(piece.rows for piece in origin[name]) == len(parameter)
    return mixer, origin


def file_name(name: str) -> str:
    """Return the name in transformers' module."""
    module, dot, kind = name.rpartition(".") if name.endswith(".weight") else (name, "", "")
    return STANDARD[module].removeprefix("linear_attn.") + dot + kind


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_the_block_equals_that_of_transformers(fused: bool, blocks: int, size: int) -> None:
    theirs = reference(fused)
    x = torch.randn(90, HIDDEN, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(90, HIDDEN, generator=torch.Generator().manual_seed(3))
    wanted = torch.cat([theirs(part.unsqueeze(0))[0] for part in x.split([70, 20])])
    (wanted * weights).sum().backward()
    wanted = wanted.detach()

    total = torch.zeros_like(wanted)
    gradients = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for rank in range(size):
        mixer, origin = make(theirs, fused, blocks, rank, size)
        out = mixer(x, None, Rows(70, 20), 0)
        (out * weights).sum().backward()
        total += out.detach()
        for name, pieces in origin.items():
            for piece in pieces:
                box = tuple(map(slice, piece.start, piece.stop))
                found = mixer.get_parameter(name).grad[piece.offset : piece.offset + piece.rows]
                gradients[file_name(piece.name)][box] += found.view(piece.size)
    assert float((total - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    for name, parameter in theirs.named_parameters():
        difference = float((gradients[name] - parameter.grad).abs().max())
        assert difference < 1e-4 * float(parameter.grad.abs().max()), name


def test_context_parallelism_is_refused() -> None:
    from transformers import Qwen3NextConfig

    model = parse_config(Qwen3NextConfig(**SIZES, num_experts=0).to_dict())
    check_cp(model, 1)
    with pytest.raises(ValueError, match=r"cp=2 divides rows, but layer 0 of Qwen3Next.*set cp=1"):
        check_cp(model, 2)
