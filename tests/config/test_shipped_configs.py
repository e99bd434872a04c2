"""Shipped configurations by name: found from anywhere, included from anywhere, and listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spmdrl.commands.cli import main
from spmdrl.config.load import (
    FOLDER,
    RUN_FILE,
    find_config,
    list_configs,
    load_config,
    shipped_names,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_checkout_shows_them_in_its_root() -> None:
    assert (ROOT / "configs").resolve() == FOLDER.resolve()
    assert {"quickstart", "gsm8k", "rlhf/ppo", "methods/dapo"} <= set(shipped_names())


def test_a_name_stands_for_the_file() -> None:
    assert load_config("quickstart") == load_config(ROOT / "configs" / "quickstart.yaml")
    assert find_config("rlhf/ppo.yaml") == FOLDER / "rlhf" / "ppo.yaml"


def test_a_file_of_the_users_own_goes_before_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("includes: [quickstart]\nsteps: 3\n")
    assert load_config("quickstart.yaml").steps == 3
    assert load_config("quickstart").steps != 3


def test_a_copy_finds_what_it_includes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in shipped_names():
        if name.startswith("methods/"):
            continue
        assert main(["configs", name]) == 0
        copy = tmp_path / "copied" / f"{name.replace('/', '_')}.yaml"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(capsys.readouterr().out)
        assert load_config(copy) == load_config(name), name


def test_a_run_directory_stands_for_its_last_configuration(tmp_path: Path) -> None:
    for name in shipped_names():
        if name.startswith("methods/"):
            continue
        config = load_config(name, [f"run_dir={tmp_path}"], trains=False)
        entry = {"config": config.model_dump(mode="json", exclude_unset=True)}
        (tmp_path / RUN_FILE).write_text(json.dumps({"starts": [{"config": {}}, entry]}))
        assert load_config(tmp_path, trains=False) == config, name


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "without run.json"), ("{", "no configuration"), ('{"starts": []}', "no configuration")],
)
def test_a_directory_of_no_run_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_names_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert all(len(line.split()) > 3 for line in lines), lines
    assert "\n".join(lines) == list_configs()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "no config file .*/quickstrat; did you mean 'quickstart'?"),
        ("mine.yaml", "no config file .*/mine.yaml; `spmdrl configs` lists the shipped ones"),
        ("../quickstart", "no config file"),
    ],
)
def test_a_name_of_nothing_is_told_with_a_near_one(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(name)


def test_only_shipped_configurations_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "../../../setup"]) == 2
    assert "no shipped configuration '../../../setup'" in capsys.readouterr().err
