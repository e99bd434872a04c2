"""Padded heads change nothing of what a model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spmdrl.models.config import read_config
from spmdrl.models.degrees import check_tp
from spmdrl.models.files.pad_heads import pad_heads
from tiny_model import make_tiny_model


def test_the_padded_model_computes_the_same(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "padded"
    make_tiny_model(source)
    old = read_config(source)
    ratio = old.attention.num_heads // old.attention.num_kv_heads
    kv_heads = old.attention.num_kv_heads + 2
    config = pad_heads(source, target, f"{ratio * kv_heads}/{kv_heads}")
    assert read_config(target) == config
    check_tp(config, kv_heads)
    tokens = torch.arange(12)[None] % old.vocab_size
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (source, target)
        ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "message"),
    [("12", "QUERY/KV"), ("0/0", "QUERY/KV"), ("1/1", "heads already"), ("16/2", "same ratio")],
)
def test_bad_numbers_of_heads(tmp_path: Path, heads: str, message: str) -> None:
    make_tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        pad_heads(tmp_path / "model", tmp_path / "padded", heads)
    assert not (tmp_path / "padded").exists()


def test_what_would_be_dropped_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"q_proj.bias' is a bias"):
        pad_heads(tmp_path / "model", tmp_path / "padded", "8/4")
    assert not (tmp_path / "padded").exists()
