"""Training, a resume and an evaluation in surroundings that are not a workstation's.

The quick run has them all at once, and what must be refused; `full` has each of them alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from surroundings import STRANGER, Ended, as_user, give, prepare, run

LIVES = ["train", "go on", "evaluate"]
LEFT_OVER = {
    "MASTER_ADDR": "10.1.2.3",
    "MASTER_PORT": "29500",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "gone",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "/nowhere/error.json",
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_POWERS = ["setpriv", "--inh-caps=-sys_resource", "--bounding-set=-sys_resource"]
"""What root needs in order to raise a hard limit."""

as_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)


def limits(words: str) -> list[str]:
    return ["bash", "-c", f'{words}; exec "$@"', "bash"]


def refused(ended: Ended, *words: str) -> str:
    """The one line of a refusal, which has all of `words`."""
    [line] = [line for line in ended.output.splitlines() if ": error: " in line]
    assert ended.status == 2 and "Traceback" not in ended.output, ended.output
    assert all(word in line for word in words), line
    return line


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that every user may enter."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    return tmp_path


@as_root
def test_all_at_once(place: Path) -> None:
    (place / "real place (1)").mkdir()
    (place / "link").symlink_to(place / "real place (1)")
    root = place / "link" / "it's a=b"
    config = prepare(root, run_dir=root / "runs here" / "a")
    give(root / "runs here")
    before = [*as_user(), *limits("umask 077; ulimit -v 12000000 -n 256 -t 3000")]
    ended = run(str(config), before=before, variables={**LEFT_OVER, **ASCII})
    assert ended.lives == LIVES, ended.output
    assert (root / "runs here" / "a" / "checkpoints" / "latest").read_text() == "step_00000002"


@pytest.mark.full
def test_names_of_files_that_a_locale_cannot_write_are_refused_in_one_line(place: Path) -> None:
    ended = run(str(prepare(place / "größe")), variables=ASCII, home=place)
    refused(ended, "cannot be a file's name here", "PYTHONUTF8=1")


@pytest.mark.full
def test_a_full_disk_is_one_line_and_room_is_all_that_it_needs(place: Path) -> None:
    config = str(prepare(place))
    ended = run(config, before=limits("ulimit -f 40"), home=place)
    refused(ended, str(place / "run"))
    assert list((place / "run" / "checkpoints").glob("step_*")) == []
    assert not list(place.glob("run/**/.*.tmp")), "half-written files are left"
    assert run(config, home=place).lives == LIVES


def stranger(place: Path) -> Ended:
    give(place / "runs")
    return run(str(prepare(place, run_dir=place / "runs" / "a")), before=as_user())


def read_only_home(place: Path) -> Ended:
    (place / "home" / ".cache").mkdir(parents=True)
    for path in (place / "home" / ".cache", place / "home"):
        path.chmod(0o555)
    give(place / "runs")
    config = prepare(place, run_dir=place / "runs" / "a")
    return run(str(config), before=as_user(), home=place / "home")


def no_home_to_write(place: Path) -> Ended:
    variables = {"XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": str(give(place / "tmp", 0))}
    return run(str(prepare(place)), home=Path("/nonexistent"), variables=variables)


def latin_1(place: Path) -> Ended:
    locales = place / "locales"
    locales.mkdir()
    words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(locales / "en_US.ISO-8859-1")]
    if shutil.which("localedef") is None or subprocess.run(words, check=False).returncode > 1:
        pytest.skip("no localedef here")
    variables = {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(locales), "PYTHONUTF8": "0"}
    return run(str(prepare(place)), home=place, variables=variables)


def full_tmp(place: Path) -> Ended:
    with tmpfs(place / "tmp", "4k") as tmp:
        with pytest.raises(OSError, match="No space"):
            (tmp / "filled").write_bytes(bytes(1 << 20))
        return run(str(prepare(place)), home=place, variables={"TMPDIR": str(tmp)})


SURROUNDINGS: dict[str, Callable[[Path], Ended]] = {
    "an unknown user without a home": stranger,
    "a home that is read-only": read_only_home,
    "a home and a cache that are not there": no_home_to_write,
    "ASCII": lambda place: run(str(prepare(place)), home=place, variables=ASCII),
    "the locale C": lambda place: run(str(prepare(place)), home=place, variables={"LC_ALL": "C"}),
    "Latin-1": latin_1,
    "other letters in UTF-8": lambda place: run(str(prepare(place / "größe 几")), home=place),
    "blanks": lambda place: run(str(prepare(place / "a b 'c' $d")), home=place),
    "left over": lambda place: run(str(prepare(place)), home=place, variables=LEFT_OVER),
    "address space": lambda place: run(
        str(prepare(place)), home=place, before=[*NO_POWERS, *limits("ulimit -v 12000000")]
    ),
    "open files": lambda place: run(
        str(prepare(place)), home=place, before=[*NO_POWERS, *limits("ulimit -n 128")]
    ),
    "CPU time": lambda place: run(
        str(prepare(place)), home=place, before=[*NO_POWERS, *limits("ulimit -t 3000")]
    ),
    "umask": lambda place: run(str(prepare(place)), home=place, before=limits("umask 077")),
    "an empty PATH": lambda place: run(
        str(prepare(place)), home=place, before=["/usr/bin/env"], variables={"PATH": ""}
    ),
    "a full TMPDIR": full_tmp,
}


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    path.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("the system mounts no tmpfs here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@as_root
@pytest.mark.full
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_each_alone(place: Path, name: str) -> None:
    ended = SURROUNDINGS[name](place)
    assert ended.lives == LIVES, ended.output


@as_root
@pytest.mark.full
def test_closed_streams(place: Path) -> None:
    ended = run(str(prepare(place)), home=place, before=limits("exec 0<&- 1>&- 2>&-"))
    assert ended.status == 0
    assert (place / "run" / "checkpoints" / "latest").read_text() == "step_00000002"


@as_root
@pytest.mark.full
def test_a_small_disk(place: Path) -> None:
    with tmpfs(place / "small", "250k") as small:
        ended = run(str(prepare(place, run_dir=small / "run")), home=place)
        refused(ended, str(small / "run"))
        assert not list((small / "run" / "checkpoints").glob("step_*"))


@as_root
@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "named"),
    [("ulimit -n 24", "raise ulimit -n, which is 24"), ("ulimit -v 1500000", "ulimit -v")],
)
def test_limits_that_are_too_small_are_named(place: Path, words: str, named: str) -> None:
    ended = run(str(prepare(place)), home=place, before=[*NO_POWERS, *limits(words)])
    refused(ended, named)


@as_root
@pytest.mark.full
def test_two_users_and_one_tmp(place: Path) -> None:
    shared = place / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)

    def live(user: int) -> Ended:
        root = give(place / str(user), user)
        config = prepare(root, run_dir=root / "run")
        variables = {"TMPDIR": str(shared), "XDG_CACHE_HOME": str(shared / "cache")}
        before = [*as_user(user), *limits("umask 077")]
        return run(str(config), before=before, variables=variables, home=root)

    with ThreadPoolExecutor(2) as pool:
        for ended in pool.map(live, (STRANGER, STRANGER + 1)):
            assert ended.lives == LIVES, ended.output
