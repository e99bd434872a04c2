"""The environment of the stand-in CUDA: keyed, never half made; where it cannot be made, the suite
says so, and how many tests that leaves out.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "dev" / "cuda_env.sh"
REQUIREMENTS = ROOT / "tests" / "fake_gpu" / "requirements.txt"


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def ask(base: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPMDRL_CUDA_ENV": str(base), "PYTHON312": "/no/python"}
    return subprocess.run(
        ["bash", str(SCRIPT)],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_pins_are_the_project_s() -> None:
    project = pins(ROOT / "requirements.txt") | pins(ROOT / "requirements-dev.txt")
    own = pins(REQUIREMENTS)
    assert own == {name: project[name] for name in own}
    assert pins(ROOT / "requirements.txt").keys() - own.keys() == {"torch"}


def path_without(program: str, directory: Path) -> str:
    """A PATH with every program of the usual one but `program`, as links in `directory`."""
    directory.mkdir()
    for folder in os.environ["PATH"].split(":"):
        for found in Path(folder).glob("*") if folder else ():
            link = directory / found.name
            if found.name != program and not link.exists():
                link.symlink_to(found)
    return str(directory)


def test_what_prevents_it_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = {
        "no Python 3.12 with venv (/no/python); set PYTHON312=": ask(tmp_path / "base"),
        "no g++ (apt-get install g++)": ask(
            tmp_path / "base", PATH=path_without("g++", tmp_path / "bin")
        ),
    }
    for why, answer in cases.items():
        assert (answer.returncode, answer.stdout) == (3, ""), answer
        [line] = answer.stderr.splitlines()
        assert line.startswith("cuda_env: ") and why in line


@pytest.mark.parametrize("complete", [True, False])
def test_a_half_made_environment_is_not_used(tmp_path: Path, complete: bool) -> None:
    torch = pins(ROOT / "requirements.txt")["torch"]
    wanted = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    text = "".join(f"{line}\n" for line in [f"torch=={torch}", *wanted])
    env = tmp_path / f"cuda-{torch}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    (env / "bin").mkdir(parents=True)
    (env / "bin" / "python").symlink_to(sys.executable)
    if complete:
        (env / "complete").touch()
    answer = ask(tmp_path)
    if complete:
        assert (answer.returncode, answer.stdout.strip()) == (0, str(env))
    else:
        assert answer.returncode == 3 and "no Python 3.12" in answer.stderr


@pytest.mark.full
def test_the_line_on_what_is_skipped_agrees_with_the_count() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "fakegpu", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    answer = subprocess.run(
        [*command, "tests/fake_gpu"],
        cwd=ROOT,
        env=environment | {"SPMDRL_NO_STAND_IN": "cuda_env: no Python 3.12"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    [said] = re.findall(
        r"^stand-in CUDA: (\d+) tests not run: cuda_env: no Python 3.12$", answer.stdout, re.M
    )
    [count] = re.findall(r"^(\d+) skipped", answer.stdout, re.M)
    assert said == count
    assert int(count) > 20 and "passed" not in answer.stdout


STUBS = (
    *("setup.sh", "get_model.sh", "test_cuda.sh"),
    *("dev/install_compiler.sh", "dev/install_slurm.sh"),
)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_suite_runs_the_quick_part_or_hands_on_why_not(tmp_path: Path, code: int) -> None:
    """`scripts/test.sh` in a checkout whose other scripts only say what they are asked."""
    scripts = {f"scripts/{name}": f'echo "{name} $*"' for name in STUBS}
    scripts["scripts/dev/cuda_env.sh"] = f"echo making >&2; echo 'cuda_env: why' >&2; exit {code}"
    scripts["scripts/test.sh"] = (ROOT / "scripts" / "test.sh").read_text()
    for name in ("ruff", "mypy"):
        scripts[f".venv/bin/{name}"] = "true"
    scripts[".venv/bin/python"] = 'echo "python $* (${SPMDRL_NO_STAND_IN:-})"'
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "scripts" / "test.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    answer = run()
    has_quick = "test_cuda.sh --quick" in answer.stdout
    if code == 1:
        assert answer.returncode == 1 and "cuda_env: why" in answer.stderr
        return
    [pytest_line] = [line for line in answer.stdout.splitlines() if line.startswith("python")]
    assert answer.returncode == 0, answer
    assert has_quick == (code == 0) == ("-m not full and not fakegpu" in pytest_line)
    assert pytest_line.endswith("()" if code == 0 else "(cuda_env: why)")
    assert "test_cuda.sh" not in run("-k", "exchange").stdout
    (tmp_path / ".venv/bin/mypy").write_text("#!/bin/sh\necho 'a type'; exit 1\n")
    answer = run()
    assert answer.returncode == 1 and "a type" in answer.stdout
    assert not [line for line in answer.stdout.splitlines() if line.startswith("python")]
