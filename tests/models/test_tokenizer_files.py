"""Tokenizers against the files they are made of, and ids that no token has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spmdrl.models.files.check import check_directory
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from tiny_model import make_tiny_model


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "class": (
        "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizerFast"},
        "tokenizer_class 'LlamaTokenizerFast' makes another tokenizer of tokenizer.json, which "
        "loses letters: set it to 'PreTrainedTokenizerFast'",
    ),
    "failing class": (
        "tokenizer_config.json",
        {"tokenizer_class": "GemmaTokenizerFast"},
        "tokenizer_class 'GemmaTokenizerFast' makes another tokenizer of tokenizer.json",
    ),
    "input names": ("tokenizer_config.json", {"model_input_names": 3}, "no tokenizer can be made"),
    "template": (
        "tokenizer_config.json",
        {"chat_template": "{{ x }}\n{% for %}"},
        "tokenizer_config.json: the chat template is none: line 2: ",
    ),
    "second template": (
        "tokenizer_config.json",
        {
            "chat_template": [
                {"name": "default", "template": "x"},
                {"name": "rag", "template": "{{"},
            ]
        },
        "tokenizer_config.json: the chat template 'rag' is none: line 1: ",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_is_not_its_file_s_is_refused(tmp_path: Path, name: str) -> None:
    """Of public reports: a class that brings rules of its own drops blanks and bytes in silence."""
    file, changes, message = REFUSED[name]
    make_tiny_model(tmp_path / "m")
    edit(tmp_path / "m" / file, **changes)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path / "m")
    assert message in str(caught.value) and str(tmp_path / "m") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_tokens_are_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    edit(tmp_path / "tokenizer.json", model={**model, "dropout": 0.5})
    with pytest.raises(ValueError, match=r"tokenizer\.json: model\.dropout is 0\.5"):
        load_tokenizer(tmp_path)


NOTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "new end": (
        "tokenizer_config.json",
        {"eos_token": "</s>"},
        "has no token '</s>', which is special by tokenizer_config.json: it gets the new id 258",
    ),
    "two ends": (
        "special_tokens_map.json",
        {"eos_token": {"content": "<|im_start|>"}},
        "'<|im_start|>': '<|im_start|>' counts",
    ),
    "added": ("added_tokens.json", {"<|im_end|>": 77}, "'<|im_end|>' has the id 77, in "),
    "decoder": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"78": {"content": "<|im_end|>", "special": True}}},
        "'<|im_end|>' has the id 78, in ",
    ),
    "split": (
        "tokenizer_config.json",
        {"split_special_tokens": True},
        "gives some texts other tokens than tokenizer.json by itself",
    ),
    "end without a row": ("config.json", {"eos_token_id": [1, 264]}, "eos_token_id 264 has no row"),
    "generation's end": ("generation_config.json", {"eos_token_id": 999}, "_id 999 has no row"),
    "begin": ("config.json", {"bos_token_id": 264}, "bos_token_id 264 has no row"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOTED)
def test_what_files_say_otherwise_is_noted(tmp_path: Path, name: str) -> None:
    file, changes, message = NOTED[name]
    make_tiny_model(tmp_path)
    assert check_directory(tmp_path).notes == []
    edit(tmp_path / file, **changes)
    found = check_directory(tmp_path)
    assert found.errors == []
    assert [message in note for note in found.notes] == [True], found.notes


def test_a_padding_token_without_a_row_is_not_exported(tmp_path: Path) -> None:
    """transformers does not load a model whose padding token is none of its embedding's rows."""
    make_tiny_model(tmp_path / "m", pad_token_id=264)
    config, weights = open_model(tmp_path / "m")
    tensors = [
        (n, weights.read(Slice(name=n, shape=s, start=(0,) * len(s), stop=s, offset=0)))
        for n, s in global_shapes(config).items()
    ]
    save_pretrained(tensors, config, tmp_path / "out", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.pad_token_id is None
