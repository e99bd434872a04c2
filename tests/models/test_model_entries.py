"""Tensors in a directory's files that the model does not use, and text models of composite ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdrl.models.config import parse_config, read_config
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.weight_files import SINGLE, open_checkpoint
from spmdrl.models.tensors import Slice
from spmdrl.models.text_part import text_part
from tiny_model import make_tiny_model


def whole(name: str, shape: tuple[int, ...]) -> Slice:
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)


def describe(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put(directory: Path, tensors: dict[str, Tensor]) -> None:
    weights = load_file(directory / SINGLE)
    save_file({**weights, **tensors}, directory / SINGLE, metadata={"format": "pt"})


def same(one: Path, other: Path) -> bool:
    (_, a), (_, b) = open_model(one), open_model(other)
    return a.names == b.names and all(
        torch.equal(a.read(whole(n, a.shape(n))), b.read(whole(n, b.shape(n)))) for n in a.names
    )


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain")
    make_tiny_model(tmp_path / "more")
    extra = {
        "model.layers.2.input_layernorm.weight": torch.ones(32),
        "model.layers.2.embed_tokens.weight": torch.ones(264, 32),
        "mtp.fc.weight": torch.ones(32, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    put(tmp_path / "more", extra)
    with pytest.raises(
        ValueError,
        match=r"is of layer 2, config.json has num_hidden_layers=2; layers for multi-token "
        r"prediction need num_nextn_predict_layers=1 there",
    ):
        open_model(tmp_path / "more")
    describe(tmp_path / "more", num_nextn_predict_layers=1)
    notes: list[str] = []
    model, weights = open_model(tmp_path / "more", warn=notes.append)
    assert notes == [
        f"{tmp_path / 'more' / 'config.json'}: tensors that are not loaded: 3 of multi-token "
        "prediction (model.layers.2.embed_tokens.weight ...), 1 of rotary frequencies "
        "(model.layers.0.self_attn.rotary_emb.inv_freq)"
    ]
    assert same(tmp_path / "more", tmp_path / "plain")
    names = sorted(weights.names)
    tensors = [(name, weights.read(whole(name, weights.shape(name)))) for name in names]
    save_pretrained(tensors, model, tmp_path / "out", None)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    )
    assert same(tmp_path / "out", tmp_path / "plain")
    put(tmp_path / "more", {"model.layers.3.input_layernorm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"is of layer 3, config\.json"):
        open_model(tmp_path / "more")


PREFIXES = {
    "language_model.model": ("language_model.model.", "language_model.lm_head."),
    "model.language_model": ("model.language_model.", "lm_head."),
    "model": ("model.", "lm_head."),
}


def composite(directory: Path, prefixes: tuple[str, str], **changes: Any) -> None:
    """A vision-language directory of the tiny model in `directory`."""
    body, head = prefixes
    weights = load_file(directory / SINGLE)
    named = {
        n.replace("model.", body, 1) if n.startswith("model.") else n.replace("lm_head.", head): t
        for n, t in weights.items()
    }
    for name in ("visual.patch_embed.weight", "model.vision_tower.layers.0.weight"):
        named[name] = torch.ones(2, 2)
    named["multi_modal_projector.linear_1.bias"] = torch.ones(2)
    save_file(named, directory / SINGLE, metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())
    del text["architectures"], text["eos_token_id"]
    source = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model"},
        "eos_token_id": 1,
        "image_token_index": 7,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(source))


@pytest.mark.parametrize("kind", PREFIXES)
def test_the_text_model_of_a_vision_language_model_is_loaded(tmp_path: Path, kind: str) -> None:
    plain = make_tiny_model(tmp_path / "plain", tie_word_embeddings=False)
    make_tiny_model(tmp_path / "both", tie_word_embeddings=False)
    composite(tmp_path / "both", PREFIXES[kind])
    notes: list[str] = []
    model, weights = open_model(tmp_path / "both", warn=notes.append)
    assert model == plain
    assert [note.partition(": tensors")[2] for note in notes] == [
        " that are not loaded: 3 of other inputs than text (model.vision_tower.layers.0.weight ...)"
    ]
    assert same(tmp_path / "both", tmp_path / "plain")
    names = sorted(weights.names)
    tensors = [(name, weights.read(whole(name, weights.shape(name)))) for name in names]
    save_pretrained(tensors, model, tmp_path / "out", tmp_path / "both")
    source = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (source["model_type"], source["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"text_config", "vision_config", "image_token_index"} & source.keys()
    assert same(tmp_path / "out", tmp_path / "plain")


def test_transformers_gives_the_same_logits_of_a_composite_model(tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 64,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            **sizes,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 8,
            **sizes,
        },
        image_token_index=3,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "both")
    model, weights = open_model(tmp_path / "both")
    tensors = [(name, weights.read(whole(name, weights.shape(name)))) for name in weights.names]
    save_pretrained(tensors, model, tmp_path / "out", None)
    tokens = torch.tensor([[5, 9, 11, 60, 1]])
    with torch.no_grad():
        want = AutoModelForImageTextToText.from_pretrained(tmp_path / "both")(tokens).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_composite_models_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    composite(tmp_path, PREFIXES["model.language_model"])
    put(tmp_path, {"language_model.model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight' are both 'model\.norm\.weight'"):
        open_model(tmp_path)
    describe(tmp_path, text_config=7)
    with pytest.raises(ValueError, match=r"text_config must be an object, not 7"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"text_config has no model_type"):
        parse_config({"text_config": {"hidden_size": 8}})
    with pytest.raises(ValueError, match=r"text_config.model_type='bark' is no language model"):
        parse_config({"text_config": {"model_type": "bark"}})


def test_the_text_part_takes_what_only_the_whole_model_says() -> None:
    text = {"model_type": "gemma3_text", "bos_token_id": None, "hidden_size": 8}
    source = {
        "text_config": text,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "fp8"},
        "vision_config": {},
    }
    assert text_part(source) == {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "bos_token_id": 2,
        "hidden_size": 8,
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "fp8"},
    }
    assert text_part(text) is text


def test_a_vision_tensor_of_a_text_model_is_noted_as_before(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    put(tmp_path, {"visual.patch_embed.weight": torch.ones(2)})
    notes = list(open_checkpoint(tmp_path).notes)
    assert not notes
    open_model(tmp_path, warn=notes.append)
    assert notes == [
        f"{tmp_path}: the tensor 'visual.patch_embed.weight' is of no use to the model"
    ]
