"""`spmdrl check-model`: every fault of a directory in one report, with an exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmdrl.commands.cli import main
from spmdrl.models.files.check import check_directory
from spmdrl.models.files.weight_files import SINGLE
from tiny_model import make_tiny_model


def status(directory: Path) -> int:
    try:
        return main(["check-model", str(directory)])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code


def test_a_whole_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "m")
    assert status(tmp_path / "m") == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/m: LlamaForCausalLM, 2 layers, 20 tensors (F32) in 1 file"
    assert last == "the model is loaded"
    make_tiny_model(tmp_path / "r", head="score")
    assert status(tmp_path / "r") == 0
    assert "LlamaForCausalLM with a scalar head" in capsys.readouterr().out


def test_every_fault_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    weights["model.norm.weight"][2] = float("nan")
    weights["model.layers.1.input_layernorm.weight"][:] = float("inf")
    weights["lm_head.weight"] = torch.zeros(264, 32)
    weights["model.layers.0.mlp.up_proj.bias"] = torch.zeros(64)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 31)
    weights["v_head.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / SINGLE)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert status(tmp_path) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "the model is refused"
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {tmp_path}: the tensor 'v_head.weight' is of no use to the model"
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 6 == len(lines) - 3
    for place, error in zip(
        ("up_proj.bias", "(64, 31)", "lm_head.weight", "input_layernorm", "norm.weight", "Git LFS"),
        errors,
        strict=True,
    ):
        assert place in error and str(tmp_path) in error


def test_a_configuration_that_is_none_ends_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_model(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**source, "vocab_size": "264"}))
    assert status(tmp_path) == 2
    out = capsys.readouterr().out
    assert 'config.json: vocab_size must be a whole number, not "264"' in out


def test_weights_that_are_zero_throughout_are_noted(tmp_path: Path) -> None:
    """What a download that broke off leaves of a file whose space was set aside."""
    make_tiny_model(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        weights[name].zero_()
    save_file(weights, tmp_path / SINGLE)
    found = check_directory(tmp_path)
    assert found.errors == []
    (note,) = found.notes
    assert "tensor 'model.embed_tokens.weight' and 1 more is zero throughout" in note
    assert str(tmp_path / SINGLE) in note
