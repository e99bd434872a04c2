"""Files that are written past the page cache hold what was given, wherever it was cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spmdrl.checkpoint import stream as direct
from spmdrl.checkpoint.stream import _BUFFER, BLOCK, DirectFile

SIZES = (0, 1, BLOCK, BLOCK + 1, _BUFFER - 1, _BUFFER, _BUFFER + BLOCK, 2 * _BUFFER + 777)


def write(path: Path, content: bytes, cut: int) -> None:
    with DirectFile(path) as file:
        for start in range(0, len(content), cut):
            file.write(memoryview(content)[start : start + cut])
            file.sync()


def all_is_written(directory: Path) -> None:
    for size in SIZES:
        content = os.urandom(size)
        for cut in (3_000_001, _BUFFER, _BUFFER + 1):
            write(directory / "file", content, cut)
            assert (directory / "file").read_bytes() == content, (size, cut)


def test_every_size_is_written_whole(tmp_path: Path) -> None:
    all_is_written(tmp_path)


@pytest.mark.parametrize("refusing", ["system", "open", "write"])
def test_where_nothing_is_written_directly_the_cache_serves(
    refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, opened, written = direct._DIRECT, os.open, os.write
    refused = []

    def refuse() -> None:
        refused.append(True)
        raise OSError(errno.EINVAL, "Invalid argument")

    def open_file(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & flag:
            refuse()
        return opened(path, flags, mode)

    def write_file(file: int, part: memoryview) -> int:
        if direct.fcntl.fcntl(file, direct.fcntl.F_GETFL) & flag:
            refuse()
        return written(file, part)

    if refusing == "system":
        monkeypatch.setattr(direct, "_DIRECT", 0)
    elif refusing == "open":
        monkeypatch.setattr(direct.os, "open", open_file)
    else:
        monkeypatch.setattr(direct.os, "write", write_file)
    all_is_written(tmp_path)
    assert bool(refused) == (refusing != "system")


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.write
    lengths = iter([BLOCK, 3 * BLOCK, BLOCK + 100])

    def write_less(file: int, part: memoryview) -> int:
        return written(file, part[: next(lengths, len(part))])

    # where the file system writes directly, a length that is no multiple of the block needs the
    # cache already to be written at all
    monkeypatch.setattr(direct, "_DIRECT", 0)
    monkeypatch.setattr(direct.os, "write", write_less)
    content = os.urandom(_BUFFER + 5)
    write(tmp_path / "file", content, 1 << 20)
    assert (tmp_path / "file").read_bytes() == content


def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(file: int, part: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct.os, "write", write_nothing)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", b"some", 4)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", bytes(2 * _BUFFER), _BUFFER)
