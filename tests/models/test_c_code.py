"""C kernels are compiled once, for whoever may run them, and missed where they cannot be."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

import pytest

from spmdrl.models.kernels import c_code

SOURCE = "int twice(int x) { return 2 * x + MORE; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "twice.c"
    path.write_text(SOURCE)
    c_code.load.cache_clear()
    return path


def kept() -> list[str]:
    return sorted(p.name for p in c_code.cache_directory().iterdir())


def test_a_function_is_compiled_once_for_its_constants(source: Path) -> None:
    for more in (0, 5, 0):
        code = c_code.load(source, MORE=more)
        assert isinstance(code, ctypes.CDLL) and code.twice(4) == 8 + more
    assert len(kept()) == 2
    made = [(c_code.cache_directory() / name).stat().st_mtime_ns for name in kept()]
    c_code.load.cache_clear()
    assert c_code.load(source, MORE=5) is not None
    assert [(c_code.cache_directory() / name).stat().st_mtime_ns for name in kept()] == made


def test_another_text_is_another_library(source: Path) -> None:
    assert c_code.load(source, MORE=0) is not None
    source.write_text(SOURCE.replace("2 *", "3 *"))
    c_code.load.cache_clear()
    code = c_code.load(source, MORE=0)
    assert code is not None and code.twice(4) == 12
    assert len(kept()) == 2


def test_what_does_not_compile_is_missed_with_the_compilers_words(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("int twice(int x) { return y; }")
    with caplog.at_level(logging.WARNING):
        assert c_code.load(source, MORE=0) is None
    assert "twice.c" in caplog.text and "'y'" in caplog.text.replace("‘", "'").replace("’", "'")
    assert kept() == []


def test_without_a_compiler_there_is_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.delenv("CC", raising=False)
    assert c_code.load(source, MORE=0) is None


def test_the_next_compiler_serves_where_one_fails(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    code = c_code.load(source, MORE=0)
    assert code is not None and code.twice(4) == 8
    monkeypatch.setenv("CC", "env gcc")  # as ccache is given
    c_code.load.cache_clear()
    assert c_code.load(source, MORE=1) is not None
    assert c_code._compilers()[0] == ("env", "gcc")


def test_no_home_is_no_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    code = c_code.load(source, MORE=0)
    assert code is not None and code.twice(4) == 8


def test_a_directory_that_cannot_be_written_is_still_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert c_code.load(source, MORE=0) is not None
    made = kept()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(c_code, "_compile", lambda *arguments: pytest.fail("it was there"))
    c_code.load.cache_clear()
    assert c_code.load(source, MORE=0) is not None
    monkeypatch.undo()
    assert made


def test_a_directory_that_others_write_is_not_used(source: Path) -> None:
    c_code.cache_directory().chmod(0o777)
    with pytest.raises(PermissionError, match="does not belong only to this user"):
        c_code.cache_directory()
    # it is made elsewhere instead, for this process
    code = c_code.load(source, MORE=1)
    assert code is not None and code.twice(1) == 3
    assert os.listdir(Path(os.environ["XDG_CACHE_HOME"]) / "spmdrl" / "kernels") == []
