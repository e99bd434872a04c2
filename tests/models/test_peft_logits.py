"""PEFT's adapters have the same logits here, and those written here the same in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_dirs import load_peft, make_peft, our_logits
from torch import Tensor

from spmdrl.models.adapters import adapter_shapes, find_targets, make_adapter
from spmdrl.models.files.adapter_sources import FreshAdapter
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.files.peft import open_adapter, read_adapter
from spmdrl.models.files.peft_export import write_adapter
from spmdrl.models.sharding import Slice
from tiny_model import make_tiny_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"target_modules": "all-linear", "lora_alpha": 12}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "target_modules": r"model\.layers\.\d+\.(self_attn\.[qo]_proj|mlp\.down_proj)",
            "rank_pattern": {"q_proj": 3, "1.mlp.down_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
            "use_rslora": True,
        },
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
            "exclude_modules": ["0.self_attn.k_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
}


def whole(source: TensorSource) -> list[tuple[str, Tensor]]:
    found = []
    for name in sorted(source.names):
        shape = source.shape(name)
        part = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        found.append((name, source.read(part)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pefts(case: str, tmp_path: Path) -> None:
    base, made, written = (tmp_path / name for name in ("base", "made", "written"))
    architecture, fields = CASES[case]
    model = make_tiny_model(base, architecture)
    expected = make_peft(base, made, **fields)
    ours = our_logits(base, made)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (ours - our_logits(base, None)).abs().max() > 0.01

    adapter, source = read_adapter(made, model), open_adapter(made, model)
    write_adapter(whole(source), model, adapter, written, base=base)
    assert read_adapter(written, model) == adapter
    for (name, values), (_, again) in zip(
        whole(source), whole(open_adapter(written, model)), strict=True
    ):
        assert torch.equal(values, again), name
    torch.testing.assert_close(load_peft(base, written), expected, atol=1e-6, rtol=1e-6)
    assert (written / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_scalar_head_comes_with_the_adapter(tmp_path: Path) -> None:
    base, made, written = (tmp_path / name for name in ("base", "made", "written"))
    model = make_tiny_model(base)
    expected = make_peft(base, made, head="score")
    torch.testing.assert_close(our_logits(base, made, "score"), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"has a scalar head .*reward or value model"):
        read_adapter(made, model)

    adapter = read_adapter(made, model, head="score")
    source = open_adapter(made, model, head="score")
    write_adapter(whole(source), model, adapter, written, base=base, head="score")
    torch.testing.assert_close(load_peft(base, written, "score"), expected, atol=1e-6, rtol=1e-6)
    pad = json.loads((written / "tokenizer_config.json").read_text())["pad_token"]
    assert pad == "<|im_start|>", "the only special token with which no row ends"


def test_a_new_adapter_adds_nothing_and_is_drawn_by_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = make_tiny_model(base)
    adapter = make_adapter(find_targets(model, ["attention"]), rank=4, alpha=8)
    fresh = dict(whole(FreshAdapter(model, adapter, seed=1)))
    assert fresh.keys() == adapter_shapes(model, adapter).keys()
    name = "model.layers.0.self_attn.o_proj.lora_A.weight"
    bound = 32**-0.5
    assert 0.9 * bound < fresh[name].abs().max() < bound
    assert abs(fresh[name].std() / (bound / 3**0.5) - 1) < 0.2
    gaussian = FreshAdapter(model, adapter, seed=1, init="gaussian")
    assert (
        abs(
            torch.stack([v for n, v in whole(gaussian) if "_A" in n and v.shape[1] == 32]).std()
            - 0.25
        )
        < 0.02
    )
    half = Slice(name=name, shape=(4, 32), start=(0, 16), stop=(4, 32), offset=0)
    assert torch.equal(FreshAdapter(model, adapter, 1).read(half), fresh[name][:, 16:])
    assert not torch.equal(FreshAdapter(model, adapter, 2).read(half), fresh[name][:, 16:])
    write_adapter(fresh.items(), model, adapter, tmp_path / "new", base=base)
    torch.testing.assert_close(our_logits(base, tmp_path / "new"), our_logits(base, None))
    torch.testing.assert_close(
        load_peft(base, tmp_path / "new"), our_logits(base, None), atol=1e-5, rtol=1e-5
    )
