"""What a model's directory says against what it holds: refusals that name file and tensor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdrl.models.config import parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import open_checkpoint, open_model
from spmdrl.models.files.weight_files import INDEX, SINGLE
from spmdrl.models.tensors import Slice
from tiny_model import load_into, make_tiny_model

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
Change = Callable[[dict[str, Tensor]], None]


def whole(name: str, shape: tuple[int, ...]) -> Slice:
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)


def rewrite(directory: Path, change: Change) -> None:
    weights = load_file(directory / SINGLE)
    change(weights)
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})


def load(directory: Path, **options: Any) -> Decoder:
    config, weights = open_model(directory, **options)
    decoder = Decoder(config, device="cpu")
    load_into(decoder, weights)
    return decoder


def quantise(dtype: torch.dtype, suffix: str) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        values = weights[Q]
        weights[Q] = (values / values.abs().max() * 100).to(dtype)
        if suffix:
            weights[Q + suffix] = values.abs().max().reshape(1, 1)

    return change


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda weights: weights.update({name: torch.ones(shape, dtype=dtype)})


def poison(name: str, value: float, dtype: torch.dtype = torch.float32) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name].to(dtype).clone()
        weights[name].view(-1)[3] = value

    return change


LAYER = "model.layers.0"
STRANGE: dict[str, tuple[Change, str]] = {
    "fp8": (quantise(torch.float8_e4m3fn, "_scale_inv"), "q_proj.weight_scale_inv' belongs to qu"),
    "fp8_without_scale": (quantise(torch.float8_e4m3fn, ""), f"'{Q}' has dtype F8_E4M3"),
    "fp8_e5m2": (quantise(torch.float8_e5m2, ""), f"'{Q}' has dtype F8_E5M2"),
    "int8": (quantise(torch.int8, "_scale"), "q_proj.weight_scale' belongs to quantised"),
    "int32": (quantise(torch.int32, ""), f"'{Q}' has dtype I32"),
    "bool": (quantise(torch.bool, ""), f"'{Q}' has dtype BOOL"),
    "gptq": (put(f"{LAYER}.self_attn.q_proj.qweight", 4, dtype=torch.int32), "qweight' belongs"),
    "awq": (put(f"{LAYER}.self_attn.q_proj.qzeros", 4, dtype=torch.int32), "qzeros' belongs"),
    "bnb": (put(f"{Q}.quant_state.bitsandbytes__nf4", 4, dtype=torch.uint8), "nf4' belongs to qu"),
    "bnb8": (put(f"{LAYER}.self_attn.q_proj.SCB", 4), "SCB' belongs to quantised"),
    "packed": (put(f"{LAYER}.self_attn.q_proj.weight_packed", 4), "weight_packed' belongs to qu"),
    "kv_scale": (put(f"{LAYER}.self_attn.k_proj.k_scale", 1), "k_scale' belongs to quantised"),
    "lora": (
        put(f"{LAYER}.self_attn.q_proj.lora_A.weight", 4, 32),
        "belongs to an adapter: give the base",
    ),
    "bias": (put(f"{LAYER}.self_attn.q_proj.bias", 32), "is a bias that LlamaForCausalLM does"),
    "mlp_bias": (put(f"{LAYER}.mlp.down_proj.bias", 32), "is a bias that LlamaForCausalLM"),
    "head_bias": (put("lm_head.bias", 264), "is a bias"),
    "more_layers": (put("model.layers.2.input_layernorm.weight", 32), "is of layer 2, config.json"),
    "qk_norm": (put(f"{LAYER}.self_attn.q_norm.weight", 8), "is none of LlamaForCausalLM as conf"),
    "experts": (put(f"{LAYER}.mlp.experts.0.up_proj.weight", 4, 4), "is of expert 0, config.json"),
    "nan": (poison(NORM, float("nan")), rf"{NORM}' has nan at \[3\]"),
    "inf": (poison(Q, float("inf")), rf"{Q}' has inf at \[0, 3\]"),
    "half_inf": (poison(Q, -float("inf"), torch.float16), rf"{Q}' has -inf at \[0, 3\]"),
    "brain_nan": (poison(Q, float("nan"), torch.bfloat16), rf"{Q}' has nan at \[0, 3\]"),
    "too_large": (poison(Q, 1e300, torch.float64), rf"{Q}' has 1e\+300 at \[0, 3\]"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_weights_are_refused_by_file_and_tensor(tmp_path: Path, name: str) -> None:
    """Of public reports: quantised weights were cast and their scales ignored, and NaN in a file
    was taken for a fault of the engine.
    """
    make_tiny_model(tmp_path / "m")
    change, message = STRANGE[name]
    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match=rf"m/model\.safetensors: tensor .*{message}") as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_plain_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    make_tiny_model(tmp_path / "m")
    want = load(tmp_path / "m")
    rewrite(tmp_path / "m", lambda w: w.update({k: v.to(dtype) for k, v in w.items()}))
    found = dict(load(tmp_path / "m").named_parameters())
    for name, parameter in want.named_parameters():
        assert torch.equal(found[name], parameter.to(dtype).float()), name


def test_values_that_do_not_lie_at_multiples_of_their_size_are_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32)
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    for pad in range(4):
        header = json.dumps({"x": entry}).encode()
        header += b" " * (-len(header) % 4 + pad)
        content = len(header).to_bytes(8, "little") + header + values.numpy().tobytes()
        (tmp_path / SINGLE).write_bytes(content)
        read = open_checkpoint(tmp_path).read(whole("x", (2, 3)))
        assert torch.equal(read, values.view(2, 3))


def test_a_head_of_its_own_in_a_tied_model_is_refused(tmp_path: Path) -> None:
    """Of a public report: the embedding was used in silence, where transformers uses the head."""
    make_tiny_model(tmp_path / "m")
    embedding = load_file(tmp_path / "m" / SINGLE)["model.embed_tokens.weight"]
    rewrite(tmp_path / "m", lambda w: w.update({"lm_head.weight": embedding.clone()}))
    load(tmp_path / "m")
    rewrite(tmp_path / "m", lambda w: w.update({"lm_head.weight": embedding.bfloat16()}))
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.embed_tokens"):
        load(tmp_path / "m")
    other = embedding.clone()
    other[-1, -1] += 1
    rewrite(tmp_path / "m", lambda w: w.update({"lm_head.weight": other}))
    with pytest.raises(ValueError, match=r"set tie_word_embeddings: false in config.json"):
        load(tmp_path / "m")
    rewrite(tmp_path / "m", lambda w: w.update({"lm_head.weight": other[:-1].clone()}))
    with pytest.raises(ValueError, match="is not the tied embedding"):
        open_model(tmp_path / "m")
    # a reward model of it reads no head
    config, _ = open_model(tmp_path / "m", head="score", head_init="zero")
    assert config.tie_embeddings


def test_one_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    """Of a public report: the index was read, where transformers reads the single file."""
    make_tiny_model(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    save_file(weights, tmp_path / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"both model\.safetensors and model\.safetensors\.index"):
        open_model(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, SINGLE)}))
    notes: list[str] = []
    open_model(tmp_path, warn=notes.append)
    assert notes == [f"{tmp_path}: model-00001-of-00001.safetensors is not read"]


def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    first = {name: t for name, t in weights.items() if "layers.0" in name}
    second = {name: t for name, t in weights.items() if "layers.0" not in name}

    def save(one: dict[str, Tensor], two: dict[str, Tensor], names: dict[str, str]) -> None:
        for file, held in (("a.safetensors", one), ("b.safetensors", two)):
            save_file(held, tmp_path / file, metadata={"format": "pt"})
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))

    names = {n: "a.safetensors" if n in first else "b.safetensors" for n in weights}
    save(first, second, names)
    open_model(tmp_path)
    save(first, {**second, Q: first[Q]}, names)
    with pytest.raises(ValueError, match=rf"both hold the tensor '{Q}'"):
        open_model(tmp_path)
    save(first, second, {**names, Q: "b.safetensors"})
    with pytest.raises(ValueError, match=rf"b.safetensors has no tensor '{Q}', .* says that it"):
        open_model(tmp_path)
    save(first, second, {n: f for n, f in names.items() if n != Q})
    notes: list[str] = []
    open_model(tmp_path, warn=notes.append)
    assert notes == [f"{tmp_path / INDEX} does not name '{Q}', which a file holds"]
    save(first, second, {**names, Q: "../a.safetensors"})
    with pytest.raises(ValueError, match=r"index.json: weight_map has '../a.safetensors'"):
        open_model(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json is of an adapter"):
        open_model(tmp_path)


def test_what_is_of_no_use_is_noted_once(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    rewrite(tmp_path, put("v_head.summary.weight", 1, 32))
    rewrite(tmp_path, put(f"{LAYER}.self_attn.rotary_emb.inv_freq", 4))
    (tmp_path / "quantize_config.json").write_text("{}")
    notes: list[str] = []
    open_model(tmp_path, warn=notes.append)
    assert notes == [
        f"{tmp_path}/config.json: tensors that are not loaded: 1 of rotary frequencies "
        f"({LAYER}.self_attn.rotary_emb.inv_freq)",
        f"{tmp_path}: the tensor 'v_head.summary.weight' is of no use to the model",
        f"{tmp_path}/quantize_config.json is of a quantised format, but config.json names none: "
        "it is not read",
    ]


def test_another_prefix_is_seen(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    save_file({f"_orig_mod.{k}": v for k, v in weights.items()}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"it holds '_orig_mod.model.embed_tokens.weight', under"):
        open_model(tmp_path)
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"it holds 'embed_tokens.weight', under another prefix"):
        open_model(tmp_path)


def test_a_default_that_does_not_fit_the_weights_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    del source["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(source))
    with pytest.raises(
        ValueError, match=r"without intermediate_size in config.json, defaults count"
    ):
        open_model(tmp_path)
    assert parse_config(source).dense_width == 11008


def test_reading_a_slice_does_not_read_the_header_again(tmp_path: Path) -> None:
    """Of a public report: 2.2 ms for each slice of a file with 1,200 tensors, 42 s for a mixture
    with 18,867.
    """
    count = 4000
    save_file({f"t{i}": torch.full((2, 2), float(i)) for i in range(count)}, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    began = time.process_time()
    for i in range(count):
        assert checkpoint.read(whole(f"t{i}", (2, 2)))[0, 0] == i
    # reading the header of such a file takes 5 ms
    assert (time.process_time() - began) / count < 1e-3
