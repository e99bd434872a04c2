"""Configurations written before keys were renamed: they say what to write, and are rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spmdrl.commands.cli import main
from spmdrl.config.faults import ConfigError
from spmdrl.config.key_table import known_keys
from spmdrl.config.load import load_config
from spmdrl.config.migrate import RENAMED, migrated, new_name
from spmdrl.run.resume_point import changed_keys

BASE = """\
# a base of 0.1, part: of two
steps: 10
run_dir: ${RUN_DIR:runs/test}
model: {path: models/toy}
roles:
  policy: {ranks: all, memory: {optimizer: host}}   # memory: as it was called
  rollout: {}
  reference:
    memory:   # of the weights
      weights: host
"""
OLD = """\
includes: [base.yaml]
algorithm: {kl_coef: 0.1}
data:
  prompts_per_step: 4
  train:
    source: "reasoning_gym:chain_sum"
    system: "part: one, memory: {none}"
    size: 20
    part: 1/2
  mix: [{source: "${OTHER:more.jsonl}", "part": 2/3, size: 5}]
evaluation:
  sets:
    own: {data: {part: "2/2"}}   # the other part
    part: {data: {size: 3, part: '${data.train.part}'}}
rewards: [{function: exact}]
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    (tmp_path / "old.yaml").write_text(OLD, encoding="utf-8")
    return tmp_path / "old.yaml"


def test_an_old_name_fails_with_the_new_one(old: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(old)
    found = {fault.key: fault for fault in caught.value.faults}
    assert sorted(found) == ["data.train.part", "roles.policy.memory", "roles.reference.memory"]
    assert found["data.train.part"].value == "1/2"
    assert "data.train.part is now data.train.share: `spmdrl migrate CONFIG`" in str(caught.value)
    assert found["roles.policy.memory"].fix.endswith("write roles.policy.residency")


@pytest.mark.parametrize(
    ("word", "key", "new"),
    [
        ("data.mix=[{part: 1/2}]", "data.mix.0.part", "data.mix.0.share"),
        (
            "evaluation.sets.x={data: {part: 1/2}}",
            "evaluation.sets.x.data.part",
            "evaluation.sets.x.data.share",
        ),
    ],
)
def test_an_old_name_in_a_source_fails_alike(old, capsys, word, key, new):
    assert main(["migrate", str(old)]) == 0
    with pytest.raises(ConfigError) as caught:
        load_config(old, [word])
    assert [fault.key for fault in caught.value.faults] == [key]
    assert f"{key} is now {new}" in str(caught.value)


def test_files_are_rewritten_and_all_else_stays(old, capsys):
    assert main(["migrate", str(old)]) == 0
    lines = capsys.readouterr().out.splitlines()
    base = old.parent / "base.yaml"
    assert lines == [
        f"{old}:9: data.train.part is now data.train.share",
        f"{old}:10: data.mix.0.part is now data.mix.0.share",
        f"{old}:13: evaluation.sets.own.data.part is now evaluation.sets.own.data.share",
        f"{old}:14: evaluation.sets.part.data.part is now evaluation.sets.part.data.share",
        f"{old}:14: data.train.part is now data.train.share",
        f"{base}:6: roles.policy.memory is now roles.policy.residency",
        f"{base}:9: roles.reference.memory is now roles.reference.residency",
    ]
    expected = BASE.replace("memory: {", "residency: {").replace("    memory:", "    residency:")
    assert base.read_text(encoding="utf-8") == expected
    text = OLD.replace("    part: 1/2", "    share: 1/2").replace('"part": 2/3', "share: 2/3")
    text = text.replace("{part:", "{share:").replace(", part:", ", share:")
    text = text.replace("${data.train.part}", "${data.train.share}")
    assert old.read_text(encoding="utf-8") == text
    config = load_config(old)
    assert config.roles["policy"].residency == {"optimizer": "host"}
    assert config.data.train.share == "1/2" and config.data.mix[0]["share"] == "2/3"
    assert config.evaluation.sets["part"]["data"]["share"] == "1/2"
    # a second time there is nothing to do
    assert main(["migrate", str(old)]) == 0
    assert capsys.readouterr().out == f"{old}: no key has another name now\n"
    assert old.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {train: {part: 1/2, share: 1/2}}",
            "line 1: data.train.part is now data.train.share, and both are set: remove one",
        ),
        ("- 1", "top level"),
        ("a: [", "expected"),
    ],
)
def test_a_file_that_cannot_be_migrated_stays(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["migrate", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/c.yaml: " in error and message in error
    assert (tmp_path / "c.yaml").read_text() == text


def test_a_saved_configuration_of_old_names_is_the_same(old, capsys):
    assert main(["migrate", str(old)]) == 0
    config = load_config(old)
    saved = config.model_dump(mode="json")
    before = dated(saved)
    assert "memory" in before["roles"]["policy"] and "part" in before["data"]["train"]
    assert migrated(before) == saved and migrated(saved) == saved
    assert changed_keys(before, config) == changed_keys(saved, config) == []
    before["data"]["train"]["part"] = "2/2"
    assert changed_keys(before, config) == ["data.train.share was '2/2' and is '1/2'"]


def dated(values: Any, prefix: str = "") -> Any:
    """Values with the names that keys had before."""
    if isinstance(values, list):
        return [dated(value, f"{prefix}{i}.") for i, value in enumerate(values)]
    if not isinstance(values, dict):
        return values
    names = {new_name(f"{prefix}{key}"): key for key in ("memory", "part")}
    return {
        names.get(f"{prefix}{key}", key): dated(value, f"{prefix}{key}.")
        for key, value in values.items()
    }


def test_new_names_are_keys_and_old_ones_are_none() -> None:
    keys = [key.replace("NAME", "*") for key in known_keys()]
    for old in RENAMED:
        new = new_name(old)
        assert old not in keys and new is not None
        assert new in keys or new.startswith(("data.mix", "evaluation.sets"))
    assert new_name("data.train.source") is None and new_name("memory") is None
