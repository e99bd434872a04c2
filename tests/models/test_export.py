"""What is exported is read by transformers as it was computed: scores, logits, texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scalar_heads import decoder_of, scores
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data_sources import data_source
from spmdrl.data.preferences import load_preferences
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.files.export import files_dtype, save_pretrained
from spmdrl.models.files.hf import RandomCheckpoint, open_model
from spmdrl.models.files.token_texts import token_texts, turn_end
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.models.sharding import Head, global_shapes
from spmdrl.models.tensors import Slice
from tiny_model import make_tiny_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tensors_of(model: ModelConfig, head: Head, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    source = RandomCheckpoint(model, seed, head)
    for name, shape in global_shapes(model, head).items():
        part = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        values = source.read(part)
        yield name, values if name.endswith("norm.weight") else values * 10


def change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    file.write_text(json.dumps(content))


def add_tokens(directory: Path, *texts: str, special: bool = True) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(texts), special_tokens=special)
    tokenizer._tokenizer.save(str(directory / "tokenizer.json"))


def pad_is_end(start: Path) -> None:
    """As SmolLM2-Instruct and many others have it."""
    change(start / "config.json", pad_token_id=1)
    change(start / "tokenizer_config.json", pad_token="<|im_end|>")


def nothing_said(start: Path) -> None:
    pass


def pad_in_the_configuration_alone(start: Path) -> None:
    add_tokens(start, "<|other|>", "<|filler|>")
    change(start / "config.json", pad_token_id=259)


def two_pads(start: Path) -> None:
    """The tokenizer's serves, config.json names the end of text."""
    add_tokens(start, "<|padding|>")
    change(start / "config.json", pad_token_id=1)
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    token = {"__type": "AddedToken", "content": "<|padding|>", "special": True, **flags}
    change(start / "tokenizer_config.json", pad_token=token)


def pad_is_the_turn_s_end(start: Path) -> None:
    """The end of text is another token than the one that the template writes."""
    add_tokens(start, "<|eot|>", "<unk>")
    template = CHATML.replace("<|im_end|>", "<|eot|>")
    change(
        start / "tokenizer_config.json",
        pad_token="<|eot|>",
        unk_token="<unk>",
        chat_template=template,
    )
    (start / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|eot|>"}))


def one_special_token(start: Path) -> None:
    """And room in the embedding for a new one."""
    content = json.loads((start / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] == 1]
    (start / "tokenizer.json").write_text(json.dumps(content))
    template = CHATML.replace("<|im_start|>", "")
    change(start / "tokenizer_config.json", pad_token="<|im_end|>", chat_template=template)


def pad_outside(start: Path) -> None:
    change(start / "config.json", pad_token_id=-1)


PADS = [
    pad_is_end,
    nothing_said,
    pad_in_the_configuration_alone,
    two_pads,
    pad_is_the_turn_s_end,
    one_special_token,
    pad_outside,
]


@pytest.mark.parametrize("change_pad", PADS)
def test_padded_rows_get_the_score_of_their_last_token(tmp_path: Path, change_pad: Any) -> None:
    """Public reports: transformers#35352, trl#6952, OpenRLHF#300."""
    start, out = tmp_path / "start", tmp_path / "out"
    make_tiny_model(start)
    change_pad(start)
    config = parse_config(json.loads((start / "config.json").read_text()))
    save_pretrained(tensors_of(config, "score"), config, out, start, head="score")
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    pad = theirs.config.pad_token_id
    assert pad is not None and pad == tokenizer.pad_token_id and pad < config.vocab_size
    rows = preference_rows(tmp_path, start)
    assert pad not in [row[-1] for row in rows]
    expected = scores(decoder_of(out), rows)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            found = theirs(**padded).logits[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found = torch.cat([theirs(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before = load_tokenizer(start)
    for text in ("a <|im_end|>b\n", "<|im_start|>user"):
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"]


def preference_rows(root: Path, model: Path) -> list[list[int]]:
    """Rows as the flow `reward_model` trains on them."""
    lines = [{"prompt": f"Say {i}", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(3)]
    file = root / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for chat in (True, False):
        source = data_source(source=str(file), prompt_column="prompt", chat=chat)
        for pair in load_preferences(source, load_tokenizer(model)):
            found += [[*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]]
    return found


def test_without_a_token_to_spare_transformers_refuses_batches(tmp_path: Path, caplog: Any) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    make_tiny_model(start, vocab_size=258)
    one_special_token(start)
    change(start / "tokenizer.json", padding={"pad_id": 1, "pad_token": "<|im_end|>"} | PADDING)
    config = parse_config(json.loads((start / "config.json").read_text()))
    save_pretrained(tensors_of(config, "score"), config, out, start, head="score")
    assert "no padding token" in caplog.text
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).pad_token is None
    rows = preference_rows(tmp_path, start)
    with torch.no_grad():
        found = torch.cat([theirs(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(found, scores(decoder_of(out), rows), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no padding token"):
        theirs(torch.tensor([rows[0], rows[0]]))


PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_type_id": 0} | {
    "pad_to_multiple_of": None
}


def test_templates_and_added_tokens_travel(tmp_path: Path) -> None:
    """Public report: LLaMA-Factory#8399."""
    start, out = tmp_path / "start", tmp_path / "out"
    config = make_tiny_model(start)
    change(start / "tokenizer_config.json", chat_template=None)
    add_tokens(start, "<tool>", special=False)
    (start / "chat_template.jinja").write_text(CHATML)
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML + "tools")
    heads: list[Head] = ["lm", "score"]
    for head in heads:
        save_pretrained(tensors_of(config, head), config, out, start, head=head)
        before, after = (AutoTokenizer.from_pretrained(d) for d in (start, out))
        assert before.chat_template == after.chat_template
        assert sorted(after.chat_template) == ["default", "tool_use"]
        text = "a<tool> <|im_start|>b"
        assert before(text)["input_ids"] == after(text)["input_ids"]
        ids = [5, 258, 0, 9]
        for skip in (True, False):
            assert before.decode(ids, skip_special_tokens=skip) == after.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_as_asked(tmp_path: Path, dtype: torch.dtype) -> None:
    config = make_tiny_model(tmp_path / "start")
    tensors = dict(tensors_of(config, "lm"))
    save_pretrained(tensors.items(), config, tmp_path / "out", tmp_path / "start", dtype=dtype)
    assert files_dtype(tmp_path / "out", config) == dtype
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["dtype"] == str(dtype).removeprefix("torch.")
    _, weights = open_model(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    shape = weights.shape(name)
    part = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
    assert torch.equal(weights.read(part), tensors[name].to(dtype))


def test_what_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path / "start")
    tensors = dict(tensors_of(config, "lm"))
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = 1e5
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down.*1e\+05.*export_dtype"):
        save_pretrained(tensors.items(), config, tmp_path / "out", None, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_every_end_of_text_is_in_the_generation_config(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "temperature": 0.6, "do_sample": True})
    )
    save_pretrained(
        tensors_of(config, "lm"), config, tmp_path / "out", tmp_path / "start", ends=(1, 7, 999)
    )
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 7]
    assert saved["temperature"] == 0.6 and saved["do_sample"]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[0]['parts'][0]['text'] }}", None),
        ("{% for m in messages %}<|im_end|>{{ m['content'] | trim }} <|im_start|>{% endfor %}",)
        + ("<|im_start|>",),
    ],
)
def test_the_turn_s_end_is_what_follows_an_answer(
    tmp_path: Path, template: str, end: str | None
) -> None:
    make_tiny_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    found = turn_end(tokenizer)
    assert (None if found is None else found.text) == end
    ends = token_texts(tokenizer, chat=False).ends
    assert [e.text for e in ends] == ["<|im_end|>"]
