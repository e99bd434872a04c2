"""The decoder against transformers, on the same random weights in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dense_attention
from harness import run_ranks
from spmdrl.distributed.parallel import Parallel, copy_to
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.local_shards import local_box
from spmdrl.models.sharding import all_slices, local_parameters
from spmdrl.world import World

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 100000.0}

CASES = {
    "llama": ("LlamaForCausalLM", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "llama_linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 24}),
}


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Causal attention over the packed tokens as one sequence."""
    if sinks is not None:
        mask = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        return dense_attention.dense(q, k, v, mask, sinks=sinks)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def reference_model(name: str) -> Any:
    """transformers' model of the case, every weight random (norms and biases too)."""
    import transformers

    architecture, extra = CASES[name]
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    kind = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **extra})
    config.architectures = [architecture]
    model = getattr(transformers, architecture)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def make_decoder(
    model: ModelConfig, weights: dict[str, Tensor], tp: Parallel | None = None
) -> Decoder:
    tp = tp or Parallel()
    decoder = Decoder(model, tp=tp, device="cpu")
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, held in all_slices(model, tp.rank, tp.size).items():
            for s in held:
                box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
                parameters[name][s.offset : s.offset + s.rows] = weights[s.name][box]
    return decoder


def tokens_of(length: int, vocab: int = 96) -> Tensor:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(2))


def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens[None]).logits[0]
    return logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    model = reference_model(name)
    config = parse_config(model.config.to_dict())
    decoder = make_decoder(config, dict(model.state_dict()))
    tokens = tokens_of(200)
    with torch.no_grad():
        hidden = decoder(tokens, torch.arange(200), dense)
        logits = hidden @ decoder.head_weight().T
    assert (logits - reference_logits(model, tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_table(name: str) -> None:
    config = parse_config(reference_model(name).config.to_dict())
    for tp_size in (1, 2):
        decoder = Decoder(config, tp=Parallel(size=tp_size))
        held = {n: tuple(p.shape) for n, p in decoder.named_parameters()}
        assert held == local_parameters(config, tp_size)
        assert list(held) == list(local_parameters(config, tp_size))
    scalar = Decoder(config, head="score").head
    assert scalar is not None and scalar.weight.shape == (1, config.hidden_size)


def test_gradients_equal_transformers_with_and_without_recompute() -> None:
    model = reference_model("qwen3")
    config = parse_config(model.config.to_dict())
    tokens = tokens_of(12)
    weight = torch.randn(12, 96, generator=torch.Generator().manual_seed(3))
    (model(tokens[None]).logits[0] * weight).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    decoder = make_decoder(config, dict(model.state_dict()))
    for recompute in ("none", "layer"):
        decoder.zero_grad()
        loss = decoder(
            tokens,
            torch.arange(12),
            dense,
            lambda hidden, head: (hidden @ head.T * weight).sum(),
            recompute=recompute,
        )
        loss.backward()
        check_gradients(decoder, expected)


def check_gradients(decoder: Decoder, expected: dict[str, Tensor]) -> None:
    parameters = dict(decoder.named_parameters())
    for name, held in decoder.slices().items():
        grad = parameters[name].grad
        assert (grad is not None) == parameters[name].requires_grad, name
        for s in held if grad is not None else ():
            box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
            want = expected[s.name][box]
            gap = (local_box(grad, s) - want).abs().max()
            assert gap <= 1e-4 * max(1.0, want.abs().max().item()), (name, s.name, gap)


def _tp_rank(world: World, name: str) -> tuple[Any, Any]:
    """This rank's part of the logits, and the reference; gradients are compared on the way."""
    import torch.distributed as dist

    model = reference_model(name)
    config = parse_config(model.config.to_dict())
    tokens = tokens_of(20)
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(3))
    logits = model(tokens[None]).logits[0]
    (logits * weight).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    decoder = make_decoder(config, dict(model.state_dict()), tp)
    mine = weight.chunk(world.size, dim=1)[world.rank]

    def finish(hidden: Tensor, head: Tensor) -> Tensor:
        return copy_to(hidden, tp.group) @ head.T

    local: Tensor = decoder(tokens, torch.arange(20), dense, finish, recompute="layer")
    (local * mine).sum().backward()
    check_gradients(decoder, expected)
    return local.detach().numpy(), logits.detach().numpy()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_two_tensor_parallel_ranks_equal_one(name: str) -> None:
    results = run_ranks(_tp_rank, 2, name)
    logits = np.concatenate([local for local, _ in results], axis=1)
    assert np.abs(logits - results[0][1]).max() <= 1e-4


def _fsdp_rank(world: World, name: str) -> float:
    """The largest gap between FSDP2's gradients and one process's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = reference_model(name)
    config = parse_config(model.config.to_dict())
    weights = dict(model.state_dict())
    tokens = tokens_of(16)
    plain, sharded = make_decoder(config, weights), make_decoder(config, weights)
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for decoder in (plain, sharded):
        loss = decoder(
            tokens,
            torch.arange(16),
            dense,
            lambda hidden, head: (hidden @ head.T).square().sum(),
            recompute="layer",
        )
        loss.backward()
    worst = 0.0
    for one, two in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert one.grad is not None and isinstance(two.grad, DTensor)
        gap = (two.grad.full_tensor() - one.grad).abs().max() / one.grad.abs().max()
        worst = max(worst, gap.item())
    return worst


def test_fully_sharded_gradients_equal_one_process_with_tied_embeddings() -> None:
    assert max(run_ranks(_fsdp_rank, 2, "qwen2")) <= 1e-4


def test_bfloat16_keeps_close_to_float32() -> None:
    model = reference_model("llama3")
    config = parse_config(model.config.to_dict())
    decoder = make_decoder(config, dict(model.state_dict()))
    tokens, positions = tokens_of(32), torch.arange(32)
    with torch.no_grad():
        exact = decoder(tokens, positions, dense)
        rounded = decoder.bfloat16()(tokens, positions, dense)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() <= 0.02 * exact.abs().mean()
