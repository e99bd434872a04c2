"""Context-parallel attention with every option, against one dense softmax over the whole stream."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from training_cases import make_rows

from dense_attention import dense, dense_mask
from harness import run_ranks
from spmdrl.models.attention import PackedAttention, make_kernel
from spmdrl.models.specs import AttentionOptions
from spmdrl.training.context import split_stream
from spmdrl.training.packing import pack
from spmdrl.world import World

OPTIONS = [
    AttentionOptions(scale=0.5, window=4, softcap=1.5),
    AttentionOptions(scale=0.5),
    AttentionOptions(scale=0.5, window=9),
]


def differences(world: World) -> list[float]:
    """The largest of outputs and gradients, layer by layer."""
    (whole,) = pack(make_rows([5, 7, 3], 3), budget_tokens=1000, share_prompts=True)
    length = len(whole.tokens)
    numbered = replace(whole, positions=torch.arange(length))
    part = split_stream(numbered, world.rank, world.size)
    places = part.positions
    kept = torch.ones(len(places), dtype=torch.bool)
    kept[1:] = places[1:] != places[:-1]  # padding repeats the last token
    drawn = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=drawn, dtype=torch.float64).requires_grad_()

    attend = PackedAttention(
        part.spans,
        make_kernel("blocked"),
        options=OPTIONS,
        dtype=torch.float64,
        device=torch.device("cpu"),
        cp_group=dist.group.WORLD,
    )
    found = []
    for layer, options in enumerate(OPTIONS):
        leaves = [draw(length, 4, 8), draw(length, 2, 8), draw(length, 2, 5), draw(4)]
        q, k, v, sinks = leaves
        weight = torch.randn(length, 4, 5, generator=drawn, dtype=torch.float64)
        expected = dense(q, k, v, dense_mask(whole.spans, length, options.window), options, sinks)
        wanted = torch.autograd.grad(expected, leaves, weight)
        out = attend(layer, q[places], k[places], v[places], sinks)
        gradients = torch.autograd.grad(out, leaves, weight[places] * kept[:, None, None])
        for gradient, want in zip(gradients, wanted, strict=True):
            dist.all_reduce(gradient)
            found.append(float((gradient - want).abs().max()))
        found.append(float((out - expected[places])[kept].abs().max()))
    return found


def test_ranks_attend_as_one_process_does() -> None:
    for found in run_ranks(differences, 2):
        assert max(found) < 1e-9 and len(found) == 15
