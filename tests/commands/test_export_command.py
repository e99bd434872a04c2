"""`spmdrl export`: what one process writes of a checkpoint is what the run itself exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.commands.cli import main
from tiny_model import make_tiny_model

RUNS: dict[str, dict[str, Any]] = {
    "shards": {"roles": {"policy": {"dp_shard": 2}, "rollout": {}}},
    # masters are wider than the weights that the run exports
    "narrow": {
        "model": {"dtype": "bfloat16"},
        "checkpoint": {"export_dtype": "float32"},
        "roles": {"policy": {}, "rollout": {}},
    },
    "adapter": {
        "roles": {"policy": {"adapter": {"rank": 4}, "dp_shard": 2}, "rollout": {}},
        "checkpoint": {"export_as": "both"},
    },
}


def configure(root: Path, name: str, given: dict[str, Any]) -> tuple[str, list[str]]:
    """A run of two steps, with a checkpoint of each step and an export at the end."""
    sections = {
        "steps": 2,
        "data": {**questions(root / "rows.jsonl"), "prompts_per_step": 2, "group_size": 4},
        **given,
        "model": {"path": str(root / "model"), **given.get("model", {})},
        "train": {"lr": 2e-2, "microbatch_tokens": 300, **given.get("train", {})},
        "checkpoint": {"every": 1, "export": True, **given.get("checkpoint", {})},
    }
    return str(write_config(root / f"{name}.yaml", Path(), root / name, **sections)), []


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, on two ranks."""
    root = tmp_path_factory.mktemp("exported")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=7)
    configs = [configure(root, name, given) for name, given in RUNS.items()]
    run_ranks(run_configs, 2, configs, str(root), timeout_s=300)
    return root


def export(run: Path, *words: str) -> int:
    return main(["export", str(run), *words])


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", RUNS)
def test_the_last_step_is_what_the_run_exported(root: Path, tmp_path: Path, name: str) -> None:
    assert export(root / name, "--to", str(tmp_path / "model")) == 0
    directories = ["model", "model_adapter"] if name == "adapter" else ["model"]
    for directory in directories:
        own, found = files(root / name / directory), files(tmp_path / directory)
        assert own.keys() == found.keys()
        assert [file for file in own if own[file] != found[file]] == []


SHARDED = {"policy": {"dp_shard": 2}, "rollout": {}}
BACKENDS: dict[str, dict[str, Any]] = {
    "megatron": {
        "roles": {"policy": {"tp": 2}, "rollout": {}},
        "train": {"backend": "megatron"},
        "model": {"dtype": "bfloat16"},
    },
    "deepspeed": {"roles": SHARDED, "train": {"backend": "deepspeed", "deepspeed": {"stage": 3}}},
}


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in BACKENDS]
)
def test_checkpoints_of_other_backends_are_read_alike(tmp_path: Path, name: str) -> None:
    make_tiny_model(tmp_path / "model")
    configs = [configure(tmp_path, name, BACKENDS[name])]
    run_ranks(run_configs, 2, configs, str(tmp_path), timeout_s=300)
    assert export(tmp_path / name, "--to", str(tmp_path / "found")) == 0
    own, found = files(tmp_path / name / "model"), files(tmp_path / "found")
    assert own.keys() == found.keys()
    assert [file for file in own if own[file] != found[file]] == []


def test_an_earlier_step_has_its_own_weights_and_place(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "shards"
    assert export(run, "--step", "1") == 0
    written = run / "model_step_00000001"
    assert str(written) in capsys.readouterr().out
    first, last = files(written), files(run / "model")
    assert first.pop("model.safetensors") != last.pop("model.safetensors")
    assert first == last


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    assert export(run, *words) == 2
    return capsys.readouterr().err


def test_what_is_not_there_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "shards"
    text = refusal(capsys, run, "--step", "7")
    assert "has no checkpoint of step 7: there are those of 1, 2" in text
    text = refusal(capsys, run, "--role", "rollout")
    assert "--role rollout: it does not train: name policy" in text
    assert "--role valu: the run has no such role" in refusal(capsys, run, "--role", "valu")
    assert "without run.json" in refusal(capsys, tmp_path)
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    assert "there is no checkpoint in" in refusal(capsys, tmp_path)


def test_checkpoints_that_do_not_fit_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"model.path={root / 'other'}"
    text = refusal(capsys, root / "adapter", other, "--to", str(tmp_path / "a"))
    assert "roles.policy:" in text and "holds an adapter of" in text
    as_adapter = "roles.policy.adapter={rank: 4}"
    text = refusal(capsys, root / "shards", as_adapter, "--to", str(tmp_path / "b"))
    assert "of the tensors that train in roles.policy" in text
    copy = tmp_path / "copy"
    shutil.copytree(root / "shards", copy)
    newest = copy / "checkpoints" / (copy / "checkpoints" / "latest").read_text()
    file = newest / "rank_00001.safetensors"
    values = bytearray(file.read_bytes())
    values[-1] ^= 1
    file.write_bytes(values)
    assert "rank_00001.safetensors is damaged" in refusal(capsys, copy)
    index = json.loads((newest / "checkpoint.json").read_text())
    lost = next(e for e in index["entries"] if e["group"] == "policy.weights")
    index["entries"].remove(lost)
    file.unlink()
    shutil.copy(root / "shards" / "checkpoints" / newest.name / file.name, file)
    (newest / "checkpoint.json").write_text(json.dumps(index))
    assert lost["name"] in refusal(capsys, copy)
    assert not (copy / f"model_{newest.name}").exists()
