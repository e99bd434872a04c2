"""Reward and value models: Hugging Face's sequence classification with one label, in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scalar_heads import decoder_of, scores
from transformers import AutoModelForSequenceClassification

from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_model, random_tensor
from spmdrl.models.sharding import SCORE, all_slices, global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import model_layout
from tiny_model import make_tiny_model

FAMILIES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scores_equal_transformers(tmp_path, architecture):
    make_tiny_model(tmp_path / "m", architecture, head="score")
    rows = [[5, 9, 200, 17], [30, 31, 32, 33, 34, 35], [8, 7]]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=1)
    assert type(theirs).__name__ == architecture.replace("ForCausalLM", "ForSequenceClassification")
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row])).logits[0] for row in rows])
    found = scores(decoder_of(tmp_path / "m"), rows)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_model_is_one_for_sequence_classification(tmp_path):
    config = make_tiny_model(tmp_path / "lm")
    decoder = decoder_of(tmp_path / "lm", head_init="normal")
    save(decoder, config, tmp_path / "out", tmp_path / "lm")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    # <|im_end|>, which ends texts, is the only other special token
    assert saved["id2label"] == {"0": "LABEL_0"} and saved["pad_token_id"] == 0
    rows = [[5, 9, 200, 17], [8, 7]]
    # transformers pads the short row, and reads its score at the last token that is no padding
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    padded = torch.tensor([rows[0], [*rows[1], 0, 0]])
    with torch.no_grad():
        expected = theirs(padded, attention_mask=(padded != 0).long()).logits[:, 0]
    torch.testing.assert_close(scores(decoder, rows), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores(decoder_of(tmp_path / "out"), rows), expected)


def save(decoder: Decoder, model: ModelConfig, out: Path, tokenizer: Path) -> None:
    held = all_slices(model, 0, 1, "score")
    tensors = [
        (part.name, tensor.detach()[part.offset : part.offset + part.rows])
        for name, tensor in decoder.named_parameters()
        for part in held[name]
    ]
    save_pretrained(tensors, model, out, tokenizer, head="score")


def test_a_new_head_is_drawn_or_zero_and_the_body_is_the_file_s(tmp_path):
    config = make_tiny_model(tmp_path / "lm")
    whole = Slice(name=SCORE, shape=(1, 32), start=(0, 0), stop=(1, 32), offset=0)
    _, drawn = open_model(tmp_path / "lm", head="score", head_init="normal", seed=3)
    _, again = open_model(tmp_path / "lm", head="score", head_init="normal", seed=3)
    _, other = open_model(tmp_path / "lm", head="score", head_init="normal", seed=4)
    _, zero = open_model(tmp_path / "lm", head="score", head_init="zero")
    assert torch.equal(drawn.read(whole), again.read(whole))
    assert not torch.equal(drawn.read(whole), other.read(whole))
    assert torch.equal(zero.read(whole), torch.zeros(1, 32))
    # N(0, 1 / (D + 1))
    expected = random_tensor(SCORE, (1, 32), 3) / 0.02 / 33**0.5
    torch.testing.assert_close(drawn.read(whole), expected)
    assert set(global_shapes(config, "score")) - drawn.names == set()


def test_a_missing_or_wrong_head_is_named(tmp_path):
    make_tiny_model(tmp_path / "lm")
    make_tiny_model(tmp_path / "scalar", head="score", tie_word_embeddings=False)
    with pytest.raises(
        ValueError, match=r"lm has no tensor 'score.weight'.*roles.NAME.head=normal"
    ):
        open_model(tmp_path / "lm", head="score")
    with pytest.raises(ValueError, match=r"scalar has no tensor 'lm_head.weight'.*scalar head"):
        open_model(tmp_path / "scalar")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "scalar" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, SCORE: torch.zeros(2, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'score.weight' has shape \(2, 32\).*\(1, 32\)"):
        open_model(tmp_path / "scalar", head="score")


def test_the_head_is_on_every_rank(tmp_path):
    config = make_tiny_model(tmp_path / "lm")
    for rank in range(2):
        (part,) = all_slices(config, rank, 2, "score")["head.weight"]
        assert part.is_whole and part.shape == (1, 32)
    layout = model_layout(config, [0, 1], {"dp_shard": 2}, torch.float32, head="score")
    for rank in range(2):
        assert layout[rank]["head.weight"].shape == (1, 32)
        assert layout[rank]["head.weight"].slices[0].is_whole
