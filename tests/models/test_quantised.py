"""Quantised weights against transformers' dequantisation, slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoder import dense
from torch import Tensor

from spmdrl.models.config import parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.quantised import Mxfp4Tensor
from spmdrl.models.files.weight_files import SINGLE, Checkpoint, open_checkpoint
from spmdrl.models.tensors import Slice
from spmdrl.verification.reference import load_reference
from tiny_model import load_into, make_tiny_model

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8], "fmt": "e4m3"}
GATE = "model.layers.0.mlp.gate_proj.weight"


def box(name: str, shape: tuple[int, ...], *spans: tuple[int, int]) -> Slice:
    spans = spans or tuple((0, n) for n in shape)
    start, stop = zip(*spans, strict=True)
    return Slice(name=name, shape=shape, start=start, stop=stop, offset=0)


def describe(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def block_quantise(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """FP8 values and the scales of blocks, the last of which may be cut off."""
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    values, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def make_fp8(directory: Path) -> None:
    make_tiny_model(directory)
    weights = load_file(directory / SINGLE)
    for name in list(weights):
        if "_proj" in name:
            weights[name], weights[f"{name}_scale_inv"] = block_quantise(weights[name], 16, 8)
    rewrite(directory, weights)
    describe(directory, quantization_config=FP8)


@pytest.mark.filterwarnings("ignore")  # transformers' own, about CPUs
def test_fp8_blocks_are_read_as_transformers_dequantises_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_fp8(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    notes: list[str] = []
    model, weights = open_model(tmp_path, warn=notes.append)
    assert [note.partition(": ")[2] for note in notes] == [
        "14 fp8 tensors (model.layers.0.mlp.down_proj.weight ...) are read as floats"
    ]
    for name in weights.names:
        values = weights.read(box(name, weights.shape(name)))
        assert values.dtype == torch.float32
        assert torch.equal(values, theirs[name]), name
    save_pretrained(
        [(n, weights.read(box(n, weights.shape(n)))) for n in weights.names],
        model,
        tmp_path / "out",
        tmp_path,
    )
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    exported, again = open_model(tmp_path / "out")
    assert exported == model and again.names == weights.names


def test_boxes_of_fp8_begin_and_end_anywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values, scales = block_quantise(torch.randn(37, 21), 16, 8)
    stack = torch.stack((values.view(torch.uint8), values.view(torch.uint8)))
    rewrite(
        tmp_path,
        {
            "x": values,
            "x_scale_inv": scales.bfloat16(),
            "e": stack.view(torch.float8_e4m3fn),
            "e_scale_inv": torch.stack((scales, 2 * scales)),
        },
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    checkpoint = open_checkpoint(tmp_path)
    wide = scales.repeat_interleave(16, 0)[:37].repeat_interleave(8, 1)[:, :21]
    for spans in (((0, 37), (0, 21)), ((5, 6), (7, 9)), ((15, 33), (8, 21)), ((16, 32), (3, 4))):
        at = tuple(slice(a, b) for a, b in spans)
        want = values.float()[at]
        got = checkpoint.read(box("x", (37, 21), *spans))
        assert torch.equal(got, want * wide.bfloat16().float()[at])
        got = checkpoint.read(box("e", (2, 37, 21), (1, 2), *spans))
        assert torch.equal(got, (want * (2 * wide)[at])[None])


def test_quantised_weights_that_contradict_their_config_are_refused(tmp_path: Path) -> None:
    make_fp8(tmp_path)
    weights = load_file(tmp_path / SINGLE)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            open_model(tmp_path)
        assert "\n" not in str(caught.value)

    rewrite(tmp_path, {n: t for n, t in weights.items() if n != f"{GATE}_scale_inv"})
    refused(rf"'{GATE}' has dtype F8_E4M3, .* its scales or its quantization_config are missing")
    rewrite(tmp_path, {n: t for n, t in weights.items() if n != GATE})
    refused(rf"'{GATE}_scale_inv' belongs to quantised weights")
    rewrite(tmp_path, {**weights, f"{GATE}_scale_inv": torch.ones(1)})
    refused(rf"'{GATE}_scale_inv' \(F32, \(1,\)\) does not scale '{GATE}' \(64, 32\) in blocks of")
    rewrite(tmp_path, {**weights, f"{GATE}_scale_inv": torch.full((4, 4), float("nan"))})
    _, source = open_model(tmp_path)
    with pytest.raises(ValueError, match=rf"'{GATE}' has nan at \[0, 0\]"):
        source.read(box(GATE, (64, 32)))
    rewrite(tmp_path, weights)
    describe(tmp_path, quantization_config=None)
    refused(r"weight_scale_inv' belongs to quantised weights, which config.json's quantization_con")


@pytest.mark.parametrize(
    ("described", "match"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' is not read .fp8 in blocks and mxfp4 are"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size=None is not read"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size=.0, 128. is"),
        ([1], "quant_method=None is not read"),
    ],
)
def test_other_formats_are_refused_by_name(described: Any, match: str) -> None:
    source = {"architectures": ["LlamaForCausalLM"], "quantization_config": described}
    with pytest.raises(ValueError, match=match):
        parse_config(source)


def random_mxfp4(experts: int, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(100, 140, (experts, rows, groups), dtype=torch.uint8)


def test_mxfp4_is_read_as_transformers_dequantises_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks, scales = random_mxfp4(3, 10, 2)
    scales[0, 0] = torch.tensor([0, 252])  # the smallest and nearly the largest power of two
    blocks[0, 0, 0] = torch.arange(16, dtype=torch.uint8) * 17
    rewrite(tmp_path, {"e_blocks": blocks, "e_scales": scales, "e_bias": torch.ones(3, 10)})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == {"e", "e_bias"}
    assert checkpoint.shape("e") == (3, 64, 10)
    want = convert_moe_packed_tensors(blocks, scales)
    exact = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    got = checkpoint.read(box("e", (3, 64, 10)))
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want) and torch.equal(got.float(), exact)
    for spans in (
        ((1, 2), (0, 64), (4, 5)),
        ((0, 3), (31, 33), (0, 10)),
        ((2, 3), (40, 41), (2, 9)),
    ):
        at = tuple(slice(a, b) for a, b in spans)
        assert torch.equal(checkpoint.read(box("e", (3, 64, 10), *spans)), want[at])


@pytest.mark.filterwarnings("ignore")  # transformers' own, about kernels
def test_a_model_with_mxfp4_experts_has_the_logits_of_transformers(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "intermediate_size": 32, "sliding_window": 64}
    kinds = ["full_attention"] * 2
    make_tiny_model(tmp_path, "GptOssForCausalLM", layer_types=kinds, **sizes)
    weights = load_file(tmp_path / SINGLE)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        blocks, scales = random_mxfp4(experts, rows, columns // 32)
        weights[f"{name}_blocks"] = blocks
        weights[f"{name}_scales"] = scales % 8 + 117
    rewrite(tmp_path, weights)
    describe(tmp_path, quantization_config={"quant_method": "mxfp4"})
    theirs = load_reference(tmp_path)
    notes: list[str] = []
    model, source = open_model(tmp_path, warn=notes.append)
    assert "4 mxfp4 tensors (model.layers.0.mlp.experts.down_proj ...)" in notes[0]
    for name, values in theirs.state_dict().items():
        if name in source.names:
            assert torch.equal(source.read(box(name, source.shape(name))).float(), values), name
    decoder = Decoder(model, device="cpu")
    load_into(decoder, source)
    tokens = torch.arange(20) * 7
    with torch.no_grad():
        found = decoder(tokens, torch.arange(20), dense) @ decoder.head_weight().T
        wanted = theirs(tokens[None]).logits[0]
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_mxfp4_of_another_shape_or_without_scales_is_refused(tmp_path: Path) -> None:
    blocks, scales = random_mxfp4(1, 4, 2)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    rewrite(tmp_path, {"e_blocks": blocks, "e_scales": scales[:, :2].contiguous()})
    with pytest.raises(ValueError, match=r"'e_blocks' .* is not read as mxfp4"):
        open_checkpoint(tmp_path)
    rewrite(tmp_path, {"e_blocks": blocks})
    assert open_checkpoint(tmp_path).names == {"e_blocks"}
    rewrite(tmp_path, {"e_blocks": blocks, "e_scales": scales, "e": torch.ones(1, 64, 4)})
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    assert not any(isinstance(entry, Mxfp4Tensor) for entry in checkpoint.entries.values())
