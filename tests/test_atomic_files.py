"""Directories that are replaced whole or not at all, also by who fails or is killed in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spmdrl.atomic_files import atomic_directory, bring_back, replace_file


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "model") as made:
            (made / "file").write_text(text)
    assert contents(tmp_path / "model") == {"file": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_older_one_has_its_name_again_where_the_new_one_cannot_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(tmp_path / "model") as made:
        (made / "file").write_text("old")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(122, "Disk quota exceeded")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with (
        pytest.raises(OSError, match=r"could not be saved .*content is untouched"),
        atomic_directory(tmp_path / "model") as made,
    ):
        (made / "file").write_text("new")
    assert contents(tmp_path / "model") == {"file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_had_moved_away_comes_back(tmp_path: Path) -> None:
    for name, number in (("model", 7), ("model_step_00000002", 7), ("model", 8), ("other", 9)):
        old = tmp_path / f".{name}.{number}.old"
        old.mkdir()
        (old / "file").write_text(str(number))
        os.utime(old, (number, number))
    (tmp_path / "other").mkdir()
    found = bring_back(tmp_path)
    assert sorted(path.name for path in found) == ["model", "model_step_00000002"]
    assert contents(tmp_path / "model") == {"file": "8"}  # the newest of two
    assert list((tmp_path / "other").iterdir()) == []
    assert bring_back(tmp_path) == []
    # also without a run: whoever writes it next finds it first, and replaces it
    (tmp_path / "model").rename(tmp_path / ".model.10.old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "model"):
        raise KeyError("nothing was written")
    assert contents(tmp_path / "model") == {"file": "8"}


def test_files_that_need_not_last_are_replaced_whole_without_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    replace_file(tmp_path / "heartbeat", b"1", lasting=False)
    assert (tmp_path / "heartbeat").read_bytes() == b"1" and synced == []
    replace_file(tmp_path / "outcome", b"done")
    assert len(synced) == 2
