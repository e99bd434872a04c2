"""Models of sharded layouts, exported and loaded by transformers: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from flow_cases import write_config
from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.config.load import load_config
from spmdrl.roles.handles import Policy, Reward, Value
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.run.exporting import export_models
from spmdrl.world import World
from sweeps import swept
from tiny_model import make_tiny_model

ROWS = [[5, 9, 200, 17, 1], [30, 31, 32, 33, 34, 35, 1], [8, 1]]

Found = dict[str, list[list[float]]]

CASES: dict[str, tuple[str, bool, list[str]]] = {
    "llama tied, tp and shards": (
        "LlamaForCausalLM",
        True,
        ["roles.policy.tp=2", "roles.reward.dp_shard=2", "roles.value.tp=2"],
    ),
    "qwen2 untied, shards and tp": (
        "Qwen2ForCausalLM",
        False,
        ["roles.policy.dp_shard=2", "roles.reward.tp=2", "roles.value.dp_shard=2"],
    ),
    "qwen3 moe, experts apart": (
        "Qwen3MoeForCausalLM",
        False,
        ["roles.policy.ep=2", "roles.reward.tp=2", "roles.value.dp_shard=2"],
    ),
    "mistral, roles on ranks of their own": (
        "MistralForCausalLM",
        False,
        ["roles.policy.ranks=1", "roles.reward.ranks=0", "roles.value.ranks=1"],
    ),
}


def home(world: World) -> Batch:
    """Home rows: some on each rank, and for values one more token, since V is of the state before
    each.
    """
    own = ROWS[:2] if world.is_first else ROWS[2:]
    first = 0 if world.is_first else 2
    batch = from_rows(
        [[*row, 2] for row in own],
        rows={
            "prompt_ids": torch.arange(first, first + len(own)),
            "sample_index": torch.zeros(len(own), dtype=torch.int64),
            "prompt_lengths": torch.ones(len(own), dtype=torch.int64),
        },
    )
    mask = torch.tensor([place > 0 for row in own for place in range(len(row) + 1)])
    return batch.with_columns(tokens={"loss_mask": mask})


def export(world: World, path: str, overrides: list[str]) -> Found:
    """Export; what the roles say of this rank's rows."""
    config = load_config(path, overrides)
    models = open_models(config)
    assembly = assemble(config, world, models, None)
    export_models(config, assembly, Path(config.run_dir) / "model")
    policy, reward, value = (assembly.roles[name] for name in ("policy", "reward", "value"))
    assert isinstance(policy, Policy) and isinstance(reward, Reward) and isinstance(value, Value)
    batch = home(world)
    lengths = batch.lengths.tolist()
    return {
        "logprobs": per_row(policy.logprobs(batch)["logprobs"], lengths),
        "values": per_row(value.values(batch)["values"], lengths),
        "scores": [[score] for score in reward.score(batch)["scores"].tolist()],
    }


def per_row(column: Tensor, lengths: list[int]) -> list[list[float]]:
    return [row.tolist() for row in torch.split(column, lengths)]


def write_models(root: Path, architecture: str, *, tied: bool, dtype: torch.dtype) -> Path:
    """A language model and a reward model whose end of text is their padding, as it often is."""
    for name in ("lm", "scalar"):
        head: Any = "lm" if name == "lm" else "score"
        make_tiny_model(
            root / name, architecture, head=head, tie_word_embeddings=tied, pad_token_id=1
        )
        file = root / name / "model.safetensors"
        values = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
        save_file(values, file, metadata={"format": "pt"})
        settings = root / name / "tokenizer_config.json"
        content = json.loads(settings.read_text())
        settings.write_text(json.dumps({**content, "pad_token": "<|im_end|>"}))
    trained = {"trained": True, "model": str(root / "scalar")}
    return write_config(
        root / "config.yaml",
        root / "lm",
        root / "run",
        flow="grpo",
        roles={"value": {"head": "normal"}, "reward": trained, "policy": {}, "rollout": {}},
    )


@pytest.mark.parametrize("case", swept(CASES, list(CASES)[:1]))
def test_transformers_reads_what_the_roles_compute(tmp_path: Path, case: str) -> None:
    architecture, tied, overrides = CASES[case]
    path = write_models(tmp_path, architecture, tied=tied, dtype=torch.float32)
    parts = run_ranks(export, 2, str(path), overrides)
    found = {name: [*parts[0][name], *parts[1][name]] for name in parts[0]}
    out = tmp_path / "run"
    check_logprobs(out / "model", found["logprobs"])
    for name, column in (("model_reward", "scores"), ("model_value", "values")):
        check_scores(out / name, found[column])


def check_logprobs(directory: Path, found: list[list[float]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": [[*row, 2] for row in ROWS]}, return_tensors="pt")
        with torch.no_grad():
            logprobs = model(**padded).logits.log_softmax(-1)
        for number, row in enumerate(ROWS):
            own = padded["attention_mask"][number].bool()
            tokens = torch.tensor([*row, 2])
            expected = logprobs[number][own][:-1].gather(1, tokens[1:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(found[number][1:]), expected, rtol=1e-4, atol=1e-4
            )
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 1


def check_scores(directory: Path, found: list[list[float]]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # of values the last one is that of the state before the token that was added
    own = torch.tensor([row[-1] for row in found])
    rows = ROWS if "value" in directory.name else [[*row, 2] for row in ROWS]
    assert model.config.pad_token_id == tokenizer.pad_token_id != 1
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            expected = model(**padded).logits[:, 0]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "dtype"),
    [([], torch.bfloat16), (["checkpoint.export_dtype=float32"], torch.float32)],
)
def test_exports_have_the_dtype_of_the_files_or_what_the_key_says(
    tmp_path: Path, words: list[str], dtype: torch.dtype
) -> None:
    """Public report: verl#296."""
    path = write_models(tmp_path, "LlamaForCausalLM", tied=True, dtype=torch.bfloat16)
    run_ranks(export, 1, str(path), words)
    for name in ("model", "model_reward", "model_value"):
        directory = tmp_path / "run" / name
        saved = load_file(directory / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}
        described = json.loads((directory / "config.json").read_text())
        assert described["dtype"] == str(dtype).removeprefix("torch.")


def test_an_export_that_cannot_be_written_ends_every_rank_alike(tmp_path: Path) -> None:
    path = write_models(tmp_path, "LlamaForCausalLM", tied=True, dtype=torch.float32)
    answers = run_ranks(fail_to_export, 2, str(path), str(tmp_path / "lm" / "tokenizer.json"))
    assert answers[0] == answers[1]
    assert "model could not be written: " in answers[0]


def fail_to_export(world: World, path: str, damaged: str) -> str:
    config = load_config(path, [])
    models = open_models(config)
    assembly = assemble(config, world, models, None)
    if world.is_first:
        Path(damaged).parent.joinpath("tokenizer_config.json").unlink()
    try:
        export_models(config, assembly, Path(config.run_dir) / "model")
    except OSError as error:
        return str(error)
    return "written"
