"""Megatron's distributed checkpoints: what is not converted is refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.torch_dist import convert_torch_dist
from tiny_model import load_into, make_tiny_model

LAYERS = "decoder.layers."


def tensors_of(model: ModelConfig, layers: int = 2, rows: int = 264) -> dict[str, Tensor]:
    """As Megatron names and stacks them, random."""
    hidden, ffn, d = model.hidden_size, model.dense_width, model.attention.head_dim
    q, kv = model.attention.num_heads * d, model.attention.num_kv_heads * d
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "embedding.word_embeddings.weight": drawn(rows, hidden),
        "decoder.final_layernorm.weight": drawn(hidden),
        f"{LAYERS}self_attention.linear_qkv.layer_norm_weight": drawn(layers, hidden),
        f"{LAYERS}self_attention.linear_qkv.weight": drawn(layers, q + 2 * kv, hidden),
        f"{LAYERS}self_attention.linear_proj.weight": drawn(layers, hidden, q),
        f"{LAYERS}mlp.linear_fc1.layer_norm_weight": drawn(layers, hidden),
        f"{LAYERS}mlp.linear_fc1.weight": drawn(layers, 2 * ffn, hidden),
        f"{LAYERS}mlp.linear_fc2.weight": drawn(layers, hidden, ffn),
        "optimizer.state.exp_avg.embedding.word_embeddings.weight": drawn(rows, hidden),
    }


def save(tensors: dict[str, Tensor], directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that this is a single process
        dcp.save(tensors, checkpoint_id=directory, no_dist=True)
    return directory


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("like") / "model"
    make_tiny_model(directory)
    return directory


@pytest.mark.parametrize("rows", [264, 265, 270, 384, 512])
def test_a_checkpoint_of_the_same_model_is_converted(like: Path, tmp_path: Path, rows: int) -> None:
    config, _ = open_model(like)
    tensors = tensors_of(config, rows=rows)
    convert_torch_dist(save(tensors, tmp_path / "d"), like, tmp_path / "out")
    from spmdrl.models.decoder import Decoder

    decoder = Decoder(config, device="cpu")
    load_into(decoder, open_model(tmp_path / "out")[1])
    found = dict(decoder.named_parameters())
    assert torch.equal(
        found["embed_tokens.weight"], tensors["embedding.word_embeddings.weight"][:264]
    )
    for layer in range(2):
        fc1, down = (
            tensors[f"{LAYERS}mlp.linear_fc1.weight"],
            tensors[f"{LAYERS}mlp.linear_fc2.weight"],
        )
        assert torch.equal(found[f"layers.{layer}.mlp.gate_up.weight"], fc1[layer])
        assert torch.equal(found[f"layers.{layer}.mlp.down.weight"], down[layer])


QKV, FC1 = f"{LAYERS}self_attention.linear_qkv", f"{LAYERS}mlp.linear_fc1"
STRANGE: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "layers": ({}, r"is of \(4,\) layers .and experts., the given configuration has \(2,\)"),
    "qkv_bias": ({f"{QKV}.bias": (2, 64)}, "linear_qkv.bias' .* has no place"),
    "fc1_bias": ({f"{FC1}.bias": (2, 128)}, "linear_fc1.bias' .* has no place"),
    "head": ({"output_layer.weight": (264, 32)}, "output_layer.weight' .* has no place"),
    "router": ({f"{LAYERS}mlp.router.expert_bias": (2, 4)}, "expert_bias' .* has no place"),
    "shared": ({f"{LAYERS}mlp.shared_experts.linear_fc1.weight": (2, 4, 4)}, "shared_experts"),
    "extra_layer": ({f"{LAYERS}2.mlp.linear_fc2.weight": (32, 64)}, "2.mlp.linear_fc2.weight' "),
    "rows": ({"embedding.word_embeddings.weight": (764, 32)}, "has 764 rows, .* vocab_size=264"),
    "rows_768": ({"embedding.word_embeddings.weight": (768, 32)}, "has 768 rows"),
    "fewer": ({"embedding.word_embeddings.weight": (256, 32)}, "has 256 rows"),
    "norm": ({f"{LAYERS}self_attention.q_layernorm.weight": (2, 8)}, "q_layernorm.weight' .* has"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_would_be_dropped_is_refused(like: Path, tmp_path: Path, name: str) -> None:
    """Of a public report: layers, biases and rows of a larger checkpoint were left out."""
    config, _ = open_model(like)
    extra, message = STRANGE[name]
    tensors = tensors_of(config, layers=4 if name == "layers" else 2)
    tensors |= {key: torch.zeros(shape) for key, shape in extra.items()}
    with pytest.raises(ValueError, match=message) as caught:
        convert_torch_dist(save(tensors, tmp_path / "d"), like, tmp_path / "out")
    assert str(tmp_path / "d") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(like: Path, tmp_path: Path) -> None:
    config, _ = open_model(like)
    source = save(tensors_of(config), tmp_path / "d")
    (data,) = source.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match=r"/d: the tensor .* cannot be read"):
        convert_torch_dist(source, like, tmp_path / "out")
    (source / ".metadata").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"/d/\.metadata cannot be read"):
        convert_torch_dist(source, like, tmp_path / "out")
