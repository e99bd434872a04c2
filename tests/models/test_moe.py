"""Mixtures of experts against transformers, on the same safetensors in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_models import CASES, by_file_name, config_of, reference_model
from test_decoder import check_gradients, dense, reference_logits, tokens_of
from torch import Tensor

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel, copy_to
from spmdrl.launch import World
from spmdrl.models.decoder import Decoder
from spmdrl.models.grouped import Groups, grouped_gemm, grouped_linear
from spmdrl.models.hf import load_into, open_model, save_pretrained
from spmdrl.models.routing import (
    Routing,
)
from spmdrl.models.sharding import Slice, global_shapes

LENGTH = 60


def logits_of(decoder: Decoder, tokens: Tensor, routing: Routing | None = None) -> Tensor:
    with torch.no_grad():
        hidden = decoder(tokens, torch.arange(len(tokens)), dense, routing=routing)
        return hidden @ decoder.head_weight().T


@pytest.mark.parametrize("name", CASES)
def test_directories_go_both_ways_with_equal_logits(name: str, tmp_path: Path) -> None:
    """transformers -> files -> decoder -> files -> transformers."""
    import transformers

    model = reference_model(name)
    model.save_pretrained(tmp_path / "theirs")
    config, weights = open_model(tmp_path / "theirs")
    assert weights.names >= set(global_shapes(config))
    decoder = Decoder(config, device="cpu")
    load_into(decoder, weights)
    tokens = tokens_of(LENGTH)
    expected = reference_logits(model, tokens)
    assert (logits_of(decoder, tokens) - expected).abs().max() <= 1e-4

    held, tensors = decoder.slices(), dict(decoder.named_parameters())
    whole = [
        (s.name, tensors[local][s.offset : s.offset + s.rows])
        for local, slices in held.items()
        for s in slices
    ]
    save_pretrained(whole, config, tmp_path / "ours", None, max_shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert (reference_logits(again.eval(), tokens) - expected).abs().max() <= 1e-4


def decoder_of(
    model: Any, *, tp: Parallel | None = None, ep: Parallel | None = None
) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder with the model's weights, and these by file name."""
    config = config_of(model)
    weights = by_file_name(dict(model.state_dict()), config)
    decoder = Decoder(config, tp=tp, ep=ep, device="cpu")
    load_into(decoder, Weights(weights))
    return decoder, weights


class Weights:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.names = frozenset(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, part: Slice) -> Tensor:
        return self._tensors[part.name][tuple(map(slice, part.start, part.stop))]


def expected_gradients(model: Any, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
    (model(tokens[None]).logits[0] * weight).sum().backward()
    return by_file_name({n: p.grad for n, p in model.named_parameters()}, config_of(model))


def weight_of(length: int) -> Tensor:
    return torch.randn(length, 96, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_gradients_equal_transformers(name: str, recompute: Any) -> None:
    model, tokens, weight = reference_model(name), tokens_of(24), weight_of(24)
    expected = expected_gradients(model, tokens, weight)
    decoder, _ = decoder_of(model)
    routing = Routing(decoder.config.moe)
    decoder(
        tokens,
        torch.arange(24),
        dense,
        lambda hidden, head: (hidden @ head.T * weight).sum(),
        recompute=recompute,
        routing=routing,
    ).backward()
    check_gradients(decoder, expected)


# degrees of two and four ranks: experts over tp, over ranks with other tokens, over both
RANKS = {
    2: [{"tp": 2}, {"tp": 2, "ep": 2}, {"dp_replicate": 2, "ep": 2}],
    4: [
        {"tp": 2, "dp_replicate": 2, "ep": 2},
        {"tp": 2, "dp_replicate": 2, "ep": 4},
        {"tp": 4, "ep": 2},
        {"dp_replicate": 4, "ep": 2},
    ],
}


def on_ranks(world: World, name: str) -> list[dict[str, int]]:
    """Logits and gradients of every layout, each replica with tokens of its own."""
    model, tokens, weight = reference_model(name), tokens_of(24), weight_of(24)
    expected = expected_gradients(model, tokens, weight)
    wanted = reference_logits(model, tokens)
    served = []
    for degrees in RANKS[world.size]:
        mesh = Mesh("policy", range(world.size), degrees, "cpu")
        tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
        ep = Parallel(
            group=mesh.group("exchange"), rank=mesh.coordinate("ep"), size=mesh.size("ep")
        )
        if name == "mixtral" and degrees.get("tp") == 4:
            continue  # two key-value heads
        decoder, _ = decoder_of(model, tp=tp, ep=ep)
        # unequal parts, causal attention over all that came before
        bounds = [24 * i * (i + 1) // (mesh.size("dp") * (mesh.size("dp") + 1)) for i in range(5)]
        first, last = bounds[mesh.coordinate("dp")], bounds[mesh.coordinate("dp") + 1]
        logits = decoder(
            tokens[:last],
            torch.arange(last),
            dense,
            lambda hidden, head, group=tp.group: copy_to(hidden, group) @ head.T,
            recompute="layer",
        )
        vocab = slice(96 * tp.rank // tp.size, 96 * (tp.rank + 1) // tp.size)
        assert (logits - wanted[:last, vocab]).abs().max() <= 1e-4
        (logits * weight[:last, vocab])[first:].sum().backward()
        for local, parameter in decoder.named_parameters():
            group = mesh.group("edp" if ".experts." in local else "reduce")
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)
        check_gradients(decoder, expected)
        served.append(degrees)
    return served


@pytest.mark.parametrize(("name", "size"), [("qwen3_moe", 2), ("mixtral", 2), ("mixtral", 4)])
def test_parallel_layouts_equal_transformers(name: str, size: int) -> None:
    served = run_ranks(on_ranks, size, name)
    assert served == [[d for d in RANKS[size] if d.get("tp") != 4]] * size


def test_grouped_products_by_loop_and_by_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((9, 8), (4, 16, 8)))
    grad = torch.randn(9, 16, generator=generator)
    counts = torch.tensor([3, 0, 5, 1])
    expert = torch.repeat_interleave(torch.arange(4), counts)
    wanted = torch.einsum("nk,nmk->nm", x, weight[expert])
    found = []
    for product in (
        lambda a, b: grouped_linear(a, b, Groups(counts=counts)),
        lambda a, b: grouped_linear(a, b, Groups(counts=counts, sizes=counts.tolist())),
        lambda a, b: grouped_gemm(a, b, counts),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(a, b)
        torch.testing.assert_close(out, wanted)
        out.backward(grad)
        found.append((a.grad, b.grad))
    for a, b in found:
        torch.testing.assert_close(a, torch.einsum("nm,nmk->nk", grad, weight[expert]))
        torch.testing.assert_close(b[2], grad[3:8].T @ x[3:8])
        assert not b[1].any()
