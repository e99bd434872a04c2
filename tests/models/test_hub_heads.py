"""Reward and value models of the hub: names of heads, classes, biases, and the token that is read,
against `transformers` and its pipeline.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scalar_heads import decoder_of, scores
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from hub_heads import linear_head, make_hub_model
from spmdrl.batch import Batch
from spmdrl.models.config import read_config
from spmdrl.models.files.check import check_directory
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_model
from spmdrl.models.model_classes import read_place, skipped_token
from spmdrl.models.sharding import SCORE, SCORE_BIAS, all_slices
from spmdrl.training.packing import pack

ROWS = [[5, 9, 200, 17], [30, 1, 32, 33, 1, 1], [8, 7], [1, 4]]
"""Rows in which token 1, the end of text and sometimes the padding, is anywhere."""

OURS = ["LlamaForSequenceClassification"]


def plain_scores(directory: Path, module: str, rows: list[list[int]]) -> torch.Tensor:
    """Score with `transformers`' body and the head's tensors, at the last token."""
    from transformers import AutoModel

    body = AutoModel.from_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    with torch.no_grad():
        hidden = torch.stack([body(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
    bias = tensors.get(f"{module}.bias", torch.zeros(1))
    return (hidden @ tensors[f"{module}.weight"].T + bias)[:, 0]


@pytest.mark.parametrize(
    ("module", "bias", "classes"),
    [
        ("v_head.summary", True, None),
        ("v_head", False, ["LlamaForRewardModel"]),
        ("regression_head", False, ["LlamaRewardModel"]),
        ("value_head", True, ["RewardModel"]),
        ("reward_head", True, ["LlamaForSequenceClassification"]),
        ("classifier", False, ["LlamaForSequenceClassification"]),
        ("regression_layer", False, ["LlamaForScore"]),
        ("score", True, ["LlamaForTokenClassification"]),
    ],
)
def test_heads_of_the_hub_are_read_under_their_names(tmp_path, module, bias, classes):
    made = make_hub_model(tmp_path / "m", linear_head(module, bias=bias), classes)
    found = scores(decoder_of(made), ROWS)
    torch.testing.assert_close(found, plain_scores(made, module, ROWS), rtol=1e-4, atol=1e-4)
    model, weights = open_model(made, head="score")
    assert model.score_bias == bias and (SCORE_BIAS in weights.names) == bias
    summary = check_directory(made).summary
    assert f"{module}.weight" in summary and (" and .bias" in summary) == bias


def test_a_head_that_config_json_names_or_a_file_of_its_own_is_read(tmp_path):
    head = linear_head("my_head")
    made = make_hub_model(tmp_path / "a", head, ["RewardModel"], value_head_prefix="my_head")
    torch.testing.assert_close(
        scores(decoder_of(made), ROWS), plain_scores(made, "my_head", ROWS), rtol=1e-4, atol=1e-4
    )
    made = make_hub_model(tmp_path / "b", {}, with_logits=True)
    own = linear_head("v_head.summary", bias=True)
    save_file(own, made / "value_head.safetensors")
    model, weights = open_model(made, head="score")
    assert model.score_bias and SCORE in weights.names
    # the same directory is a language model too
    assert "with logits, and a scalar head (v_head.summary.weight and .bias" in (
        check_directory(made).summary
    )
    assert not open_model(made)[0].score_bias


REFUSED = {
    "mlp": (
        {"score.0.weight": torch.ones(32, 32), "score.2.weight": torch.ones(1, 32)},
        ["LlamaForRewardModel"],
        {},
        r"the head 'score' is of several layers \(score.0.weight, score.2.weight\).*module:Class",
    ),
    "labels": (
        linear_head("score", rows=3),
        OURS,
        {"id2label": {"0": "help", "1": "harm", "2": "style"}},
        r"'score.weight' has shape \(3, 32\).*3 labels \(help, harm, style\).*module:Class",
    ),
    "said": (
        linear_head("score"),
        OURS,
        {"id2label": {"0": "no", "1": "yes"}},
        r"one row, but config.json has 2 labels \(id2label, num_labels\): set num_labels: 1",
    ),
    "several": (
        linear_head("v_head.summary") | linear_head("reward_head"),
        ["LlamaForRewardModel"],
        {},
        r"several heads \(v_head.summary.weight and reward_head.weight\)",
    ),
    "code": (
        linear_head("regression_layer") | {"gating.weight": torch.ones(2, 32)},
        ["LlamaForRewardModel"],
        {},
        r"'gating.weight' may change the score of LlamaForRewardModel, whose code is not run",
    ),
    "token": (
        linear_head("v_head"),
        ["LlamaForRewardModel"],
        {"reward_token_id": 9},
        r"reward_token_id=9: its score is read at a token that rows here do not end with",
    ),
    "bias": (
        linear_head("score") | {"score.bias": torch.ones(2)},
        OURS,
        {},
        r"'score.bias' has shape \(2,\), that of a scalar head has \(1,\)",
    ),
}


def test_a_head_that_is_read_is_no_oddity(tmp_path):
    """TRL saves policy and value in one directory: `lm_head` and `v_head`."""
    made = make_hub_model(
        tmp_path / "m", linear_head("v_head.summary", bias=True), with_logits=True
    )
    report = check_directory(made)
    assert "with logits, and a scalar head (v_head.summary.weight and .bias" in report.summary
    assert not report.errors and "v_head" not in "".join(report.notes)
    warned, said = [], []
    open_model(made, head="score", warn=warned.append, inform=said.append)
    assert "v_head" not in "".join(warned)
    assert said == [f"{made}: the scalar head 'v_head.summary' is read as 'score.weight'"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_linear_row_is_refused_by_name(tmp_path, case):
    heads, classes, changes, message = REFUSED[case]
    made = make_hub_model(tmp_path / "m", heads, classes, **changes)
    with pytest.raises(ValueError, match=message):
        open_model(made, head="score")
    assert any("refused" in line for line in check_directory(made).lines)
    # a new head takes the place of the files'
    open_model(made, head="score", head_init="zero")


def test_a_class_of_an_unknown_family_is_named(tmp_path):
    made = make_hub_model(tmp_path / "m", {}, ["LlamaForRewardModelWithGating"])
    with pytest.raises(ValueError, match="'LlamaForRewardModelWithGating' is not supported"):
        read_config(made)


def skipping(directory: Path) -> int | None:
    model = read_config(directory)
    return skipped_token(model.source, model.pad_id)


@pytest.mark.parametrize("pad", [None, 0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_read_where_transformers_reads_them(tmp_path, pad, side):
    labels = {"num_labels": 1, "pad_token_id": pad}
    made = make_hub_model(tmp_path / "m", linear_head("score"), OURS, **labels)
    assert skipping(made) == pad
    theirs = AutoModelForSequenceClassification.from_pretrained(made)
    found = scores(decoder_of(made), ROWS, skipped=pad)
    with torch.no_grad():
        alone = torch.cat([theirs(torch.tensor([row])).logits[0] for row in ROWS])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        if pad is None:
            return
        width = max(map(len, ROWS))
        fill = [[pad] * (width - len(row)) for row in ROWS]
        ones = [[1] * len(row) for row in ROWS]
        gaps = [[0] * len(own) for own in fill]
        pairs = [(fill, ROWS), (gaps, ones)] if side == "left" else [(ROWS, fill), (ones, gaps)]
        tokens, mask = (
            torch.tensor([[*a, *b] for a, b in zip(*pair, strict=True)]) for pair in pairs
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = theirs(tokens, attention_mask=mask, position_ids=positions).logits[:, 0]
    torch.testing.assert_close(found, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_packing_passes_over_a_token_at_rows_ends(share):
    rows = [*ROWS, [1, 1]]
    batch = Batch(
        lengths=torch.tensor([len(row) for row in rows]),
        tokens={"tokens": torch.tensor([token for row in rows for token in row])},
        rows={
            "prompt_lengths": torch.tensor([2, 5, 1, 1, 2]),
            "prompt_ids": torch.arange(len(rows)),
        },
    )
    (found,) = pack(batch, budget_tokens=100, share_prompts=share, places="rows", skipped=1)
    assert found.destination.tolist() == [0, 1, 2, 3, 4]
    assert found.targets.tolist() == [17, 33, 7, 4, 1]
    assert found.positions[found.predict].tolist() == [3, 3, 1, 1, 0]
    assert found.tokens[found.predict].tolist() == found.targets.tolist()


def test_the_place_is_said_with_its_reason():
    ours, theirs = {"architectures": OURS}, {"architectures": ["LlamaForRewardModel"]}
    assert "not pad_token_id 1, as LlamaForSequenceClassification does" in read_place(ours, 1)
    assert "which has no pad_token_id" in read_place(ours, None)
    assert "the last token, end of text included" in read_place(theirs, 1)
    assert skipped_token(theirs, 1) is None


def export(made: Path, out: Path) -> None:
    model, _ = open_model(made, head="score")
    decoder = decoder_of(made)
    held = all_slices(model, 0, 1, "score")
    tensors = [
        (part.name, tensor.detach()[part.offset : part.offset + part.rows])
        for name, tensor in decoder.named_parameters()
        for part in held[name]
    ]
    save_pretrained(tensors, model, out, made, head="score", skipped=skipping(made))


@pytest.mark.parametrize(
    ("module", "classes", "pad"),
    [("v_head", ["LlamaForRewardModel"], 1), ("score", OURS, 1), ("score", OURS, 0)],
)
def test_an_export_gives_the_pipeline_our_scores(tmp_path, module, classes, pad):
    made = make_hub_model(
        tmp_path / "m", linear_head(module), classes, pad_token_id=pad, num_labels=1
    )
    export(made, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["a longer text<|im_end|>", "<|im_end|>short", "<|im_start|>hi<|im_end|>"]
    ours = scores(decoder_of(made), tokenizer(texts)["input_ids"], skipping(made))
    again = scores(
        decoder_of(tmp_path / "out"), tokenizer(texts)["input_ids"], skipping(tmp_path / "out")
    )
    torch.testing.assert_close(again, ours)
    for side in ("right", "left"):
        classify = pipeline(
            "text-classification", model=str(tmp_path / "out"), function_to_apply="none", top_k=None
        )
        classify.tokenizer.padding_side = side
        for batch_size in (1, 3):
            results = classify(texts, batch_size=batch_size)
            found = torch.tensor([result[0]["score"] for result in results])
            torch.testing.assert_close(found, ours.float(), rtol=1e-4, atol=1e-4)


def test_a_bias_is_exported_where_transformers_has_one(tmp_path):
    made = make_hub_model(tmp_path / "m", linear_head("v_head.summary", bias=True))
    export(made, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForTokenClassification"]
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = torch.stack([theirs(torch.tensor([row])).logits[0, -1, 0] for row in ROWS])
    torch.testing.assert_close(scores(decoder_of(made), ROWS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(decoder_of(tmp_path / "out"), ROWS), expected)
