"""PEFT's adapters have the same logits here, and those written here the same in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_dirs import load_peft, make_peft, our_gradients, our_logits, their_gradients
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdrl.models.adapters import adapter_shapes, find_targets, make_adapter
from spmdrl.models.family import family_of
from spmdrl.models.files.adapter_sources import FreshAdapter
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.files.peft import open_adapter, read_adapter
from spmdrl.models.files.peft_config import ADAPTER_WEIGHTS
from spmdrl.models.files.peft_export import write_adapter
from spmdrl.models.tensors import Slice
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
    "experts": (
        "Qwen3MoeForCausalLM",
        {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "target_modules": ["q_proj"],
            "rank_pattern": {"q_proj": 2},
            "use_rslora": True,
        },
    ),
    "down": (
        "Qwen3MoeForCausalLM",
        {"target_parameters": ["experts.down_proj"], "target_modules": [], "r": 3},
    ),
    "renamed": (
        "Qwen3MoeForCausalLM",
        {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"], "lora_alpha": 6},
    ),
    "phi3": ("Phi3ForCausalLM", {"target_modules": "all-linear", "rank_pattern": {"o_proj": 2}}),
    "delta": (
        "Qwen3NextForCausalLM",
        {
            "target_modules": r".*\.(in_proj_qkvz|in_proj_ba|out_proj|q_proj|o_proj|"
            r"shared_expert\.(gate|up|down)_proj)"
        },
    ),
    "delta_parts": (
        "Qwen3_5ForCausalLM",
        {"target_modules": ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj"]},
    ),
    "mixtral": ("MixtralForCausalLM", {"target_modules": ["w1", "w2", "w3", "k_proj"]}),
}


def whole(source: TensorSource) -> list[tuple[str, Tensor]]:
    found = []
    for name in sorted(source.names):
        shape = source.shape(name)
        part = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        found.append((name, source.read(part)))
    return found


# PEFT looks for these patterns among modules only, and warns of those of parameters
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pefts(case: str, tmp_path: Path) -> None:
    base, made, written = (tmp_path / name for name in ("base", "made", "written"))
    architecture, fields = CASES[case]
    has_delta = case.startswith("delta")
    tiny = family_of(architecture).tiny if has_delta else {}
    changes = {"mixtral": {"num_local_experts": 8}, "phi3": {"pad_token_id": 1}}.get(case, {})
    model = make_tiny_model(base, architecture, **tiny, **changes)
    expected = make_peft(base, made, **fields)
    ours = our_logits(base, made)
    # long sums of the recurrence round in another order
    atol = 2e-4 if has_delta else 1e-5
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-5)
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


def test_gradients_of_fused_projections_equal_pefts(tmp_path: Path) -> None:
    base, made = tmp_path / "base", tmp_path / "made"
    make_tiny_model(base, "Phi3ForCausalLM", pad_token_id=1)
    make_peft(base, made, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])
    ours, wanted = our_gradients(base, made), their_gradients(base, made)
    assert ours.keys() == wanted.keys() and len(wanted) == 2 * 2 * 3
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_gradients_of_experts_equal_pefts(tmp_path: Path) -> None:
    """PEFT's A of gate and up is one matrix; its gradient is the sum of both here."""
    base, made = tmp_path / "base", tmp_path / "made"
    make_tiny_model(base, "Qwen3MoeForCausalLM")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    make_peft(base, made, target_parameters=parameters, target_modules=["q_proj"])
    ours, wanted = our_gradients(base, made), their_gradients(base, made)
    assert len(wanted) == 2 * 2 * 3
    for layer in range(2):
        mlp, attention = f"model.layers.{layer}.mlp.experts", f"model.layers.{layer}.self_attn"
        found: dict[str, Tensor] = {}
        for factor in ("lora_A.weight", "lora_B.weight"):
            gate, up, down = (
                [ours[f"{mlp}.{expert}.{part}_proj.{factor}"] for expert in range(8)]
                for part in ("gate", "up", "down")
            )
            if factor == "lora_A.weight":
                both = [a + b for a, b in zip(gate, up, strict=True)]
                found[f"{mlp}.base_layer.{factor}"] = torch.cat(both)
                found[f"{mlp}.{factor}"] = torch.cat(down)
            else:
                both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
                found[f"{mlp}.base_layer.{factor}"] = torch.stack(both, dim=2).flatten(1)
                found[f"{mlp}.{factor}"] = torch.stack(down, dim=2).flatten(1)
            found[f"{attention}.q_proj.{factor}"] = ours[f"{attention}.q_proj.{factor}"]
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_experts_that_share_a_and_b_are_equal_copies_in_pefts_form(tmp_path: Path) -> None:
    base, made, written = (tmp_path / name for name in ("base", "made", "written"))
    model = make_tiny_model(base, "Qwen3MoeForCausalLM", num_experts=4, num_local_experts=4)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    make_peft(base, made, target_parameters=parameters, target_modules=["q_proj"])
    with pytest.raises(
        ValueError,
        match=r"adapter_model.safetensors: model\.layers\.0\.mlp\.experts\.1\.gate_proj\.lora_A"
        r"\.weight differs from model\.layers\.0\.mlp\.experts\.0\.gate",
    ):
        open_adapter(made, model, experts="shared")

    tensors = load_file(made / ADAPTER_WEIGHTS)
    for name, tensor in tensors.items():
        if ".experts" in name and ".lora_A." in name:
            tensor.copy_(tensor[:4].repeat(4, 1))
        elif ".experts" in name:
            tensor.copy_(tensor.view(len(tensor), 4, 4)[:, :, :1].expand(-1, -1, 4).flatten(1))
    save_file(tensors, made / ADAPTER_WEIGHTS)
    expected = load_peft(base, made)
    torch.testing.assert_close(our_logits(base, made), expected, atol=1e-5, rtol=1e-5)
    shared = our_logits(base, made, experts="shared")
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-5)

    adapter = read_adapter(made, model, experts="shared")
    own = whole(open_adapter(made, model, experts="shared"))
    assert len(own) == 2 * (2 + 6)
    assert {name: tuple(t.shape) for name, t in own} == adapter_shapes(model, adapter)
    write_adapter(own, model, adapter, written, base=base)
    torch.testing.assert_close(load_peft(base, written), expected, atol=1e-6, rtol=1e-6)
    assert read_adapter(written, model, experts="shared") == adapter
    for (name, values), (_, again) in zip(
        own, whole(open_adapter(written, model, experts="shared")), strict=True
    ):
        assert torch.equal(values, again), name
    assert len(whole(open_adapter(written, model))) == 2 * (2 + 4 * 6)


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


def test_an_adapter_that_float16_cannot_hold_is_not_written(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(find_targets(model, ["q_proj"]), rank=4, alpha=8)
    shapes = adapter_shapes(model, adapter)
    tensors = ((name, torch.full(shape, 1e5)) for name, shape in shapes.items())
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"lora_.*values of up to 1e\+05, which float16 cannot"):
        write_adapter(tensors, model, adapter, out, base=tmp_path / "base", dtype=torch.float16)
    assert not out.exists()
