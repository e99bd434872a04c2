"""Which tokens end a response, and how long rows may be: before anything runs."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flow_cases import write_config
from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig, parse_config, read_config
from spmdrl.models.files.token_texts import TokenTexts, token_texts
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.planning.engines import ends_of_text, longest_sequence
from spmdrl.run.inputs import check_ends, check_lengths
from tiny_model import make_tiny_model


def change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def made(
    root: Path,
    *,
    config_eos: Any = None,
    generation_eos: Any = None,
    tokenizer_eos: str | None = None,
    **sections: Any,
) -> tuple[Config, ModelConfig, TokenTexts]:
    model = root / "model"
    make_tiny_model(model, eos_token_id=config_eos)
    if generation_eos is not None:
        change(model / "generation_config.json", eos_token_id=generation_eos)
    change(model / "tokenizer_config.json", eos_token=tokenizer_eos)
    config = load_config(str(write_config(root / "c.yaml", model, root / "run", **sections)), [])
    texts = token_texts(load_tokenizer(model), chat=config.data.train.chat)
    return config, read_config(model), texts


def test_all_sources_end_a_response_and_one_that_stands_alone_is_named(
    tmp_path: Path, caplog: Any
) -> None:
    """Public reports: open-r1#663, mlx-vlm#2112."""
    config, shape, texts = made(
        tmp_path, config_eos=5, generation_eos=[5, 6], tokenizer_eos="<|im_start|>"
    )
    assert ends_of_text(shape, texts) == (5, 6, 0, 1)
    with caplog.at_level(logging.WARNING):
        check_ends(config, specs_of(config, shape)["rollout"], texts)
    assert "config.json and generation_config.json name [5, 6] as eos_token_id" in caplog.text
    assert "not '<|im_start|>' (0), the tokenizer's eos_token and '<|im_end|>' (1)" in caplog.text


def test_sources_that_agree_say_nothing(tmp_path: Path, caplog: Any) -> None:
    config, shape, texts = made(tmp_path, config_eos=5, generation_eos=[5, 1], tokenizer_eos=None)
    with caplog.at_level(logging.WARNING):
        check_ends(config, specs_of(config, shape)["rollout"], texts)
    assert not caplog.text and ends_of_text(shape, texts) == (5, 1)


def test_raw_text_does_not_end_with_a_turn(tmp_path: Path) -> None:
    data = {"train": {"source": "d.jsonl", "chat": False}}
    _, shape, texts = made(tmp_path, config_eos=5, tokenizer_eos=None, data=data)
    assert ends_of_text(shape, texts) == (5,)


@pytest.mark.parametrize("eos", [None, 99_999, []])
def test_a_response_that_nothing_ends_is_an_error(tmp_path: Path, eos: Any) -> None:
    data = {"train": {"source": "d.jsonl", "chat": False}}
    config, shape, texts = made(tmp_path, tokenizer_eos=None, data=data)
    shape = replace(shape, eos_ids=tuple([eos] if eos else []))
    with pytest.raises(ValueError, match=r"no token ends.*eos_token_id.*sampling\.stop_token_ids"):
        check_ends(config, specs_of(config, shape)["rollout"], texts)
    stopped = config.model_copy(
        update={"sampling": config.sampling.model_copy(update={"stop_token_ids": (7,)})}
    )
    check_ends(stopped, specs_of(stopped, shape)["rollout"], texts)


def test_the_tokenizer_s_end_alone_serves_and_is_named(tmp_path: Path, caplog: Any) -> None:
    config, shape, texts = made(tmp_path, tokenizer_eos="<|im_end|>")
    with caplog.at_level(logging.WARNING):
        check_ends(config, specs_of(config, shape)["rollout"], texts)
    assert "name no eos_token_id, not '<|im_end|>' (1), the tokenizer's eos_token" in caplog.text


OFFLINE = {
    "sft": {"flow": "sft", "roles": {"policy": {}}},
    "dpo": {"flow": "dpo", "roles": {"policy": {}, "reference": {}}},
    "reward_model": {
        "flow": "reward_model",
        "roles": {"reward": {"head": "normal", "trained": True}},
    },
    "kto": {
        "flow": "dpo",
        "roles": {"policy": {}, "reference": {}},
        "preference": {"loss": "kto"},
    },
}


def offline(root: Path, name: str, words: list[str], **more: Any) -> Config:
    path = root / "offline.yaml"
    content: dict[str, Any] = {
        "steps": 1,
        "run_dir": str(root / "run"),
        "model": {"path": str(root / "model")},
        "data": {"prompts_per_step": 2, "train": {"source": "d.jsonl", "max_tokens": 512}},
        **OFFLINE[name],
        **more,
    }
    path.write_text(yaml.safe_dump(content))
    return load_config(str(path), words)


MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


def fits(config: Config) -> None:
    """Check the rows against 512 positions."""
    for spec in specs_of(config, parse_config(MODEL)).values():
        check_lengths(config, spec)


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_rows_may_be_as_long_as_the_context(tmp_path: Path, name: str) -> None:
    fits(offline(tmp_path, name, []))
    with pytest.raises(ValueError, match=r"^data\.train\.max_tokens=513 allows rows of 513 tokens"):
        fits(offline(tmp_path, name, ["data.train.max_tokens=513"]))


def test_held_out_prompts_that_are_sampled_need_room_for_answers(tmp_path: Path) -> None:
    sets = {"sums": {"kind": "prompts", "data": {"source": "e.jsonl", "max_tokens": 400}}}
    more = {"evaluation": {"sets": sets}}
    config = offline(tmp_path, "sft", [], **more)
    fits(config)  # without a rollout nothing is sampled
    roles = {"policy": {}, "rollout": {}}
    config = offline(tmp_path, "sft", ["sampling.max_tokens=112"], **more, roles=roles)
    fits(config)
    make_tiny_model(tmp_path / "model")
    assert longest_sequence(config, read_config(tmp_path / "model").max_position) == 512
    config = offline(tmp_path, "sft", ["sampling.max_tokens=113"], **more, roles=roles)
    with pytest.raises(
        ValueError,
        match=r"evaluation\.sets\.sums\.data\.max_tokens=400 and "
        r"evaluation\.sets\.sums\.sampling\.max_tokens=113 make 513 tokens",
    ):
        fits(config)


def test_sampling_flows_need_room_for_both(tmp_path: Path) -> None:
    config, _, _ = made(
        tmp_path,
        sampling={"max_tokens": 100},
        data={"train": {"source": "d.jsonl", "max_tokens": 413}},
    )
    with pytest.raises(ValueError, match=r"data\.train\.max_tokens=413 and sampling\.max_tokens"):
        fits(config)
