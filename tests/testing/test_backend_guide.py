"""docs/backends.md, "Writing a backend": its file passes the contract, and is planned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from contract_candidates import report_of

from flow_cases import write_config
from spmdrl.commands.cli import main
from spmdrl.testing.subject import Candidate, Layout
from test_docs import ROOT, blocks
from tiny_model import make_tiny_model

pytestmark = pytest.mark.contract

PAGE = ROOT / "docs" / "backends.md"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The page's file, `replicas.py`."""
    code = "\n\n".join(blocks(PAGE, "python"))
    assert len([line for line in code.splitlines() if line.strip()]) < 200
    path = tmp_path / "replicas.py"
    path.write_text(code, encoding="utf-8")
    return path


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_toy_backend_passes(toy: Path, size: int) -> None:
    layout = Layout(degrees={"dp_replicate": size})
    candidate = Candidate(
        name="replicas",
        train={"backend": f"{toy}:Replicas"},
        layouts={size: (layout,)},
        lacks=frozenset({"experts"}),
    )
    report = report_of(candidate, size, layout).require()
    skipped = {verdict.clause for verdict in report.verdicts if verdict.skipped is not None}
    assert skipped - {"no group of the whole world", "ranks outside"} == {"experts"}


def commands() -> list[str]:
    """The page's two commands, on one rank and on two."""
    lines = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]
    return [line for line in lines if "spmdrl.testing" in line]


@pytest.mark.full
def test_its_command_prints_what_the_page_shows(toy: Path) -> None:
    [shown] = [block for block in blocks(PAGE, "text") if "holds" in block]
    where, *lines = [line for line in shown.splitlines() if line.strip() != "..."]
    clauses = [line.split(maxsplit=1)[1].partition(":")[0] for line in lines]
    _, line = commands()
    words = [word for clause in clauses for word in ("--only", clause)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *line.split()[1:], *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=toy.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [where, *lines]


@pytest.mark.full
def test_its_command_ends_with_1_where_a_clause_is_broken(toy: Path) -> None:
    line, _ = commands()
    code = toy.read_text(encoding="utf-8")
    assert code.count("loss / normaliser") == 1
    toy.write_text(code.replace("loss / normaliser", "loss / len(batch)"), encoding="utf-8")
    words = [*line.replace("python ", "", 1).split(), "--only", "refusals"]
    done = subprocess.run(
        [sys.executable, *words, "--only", "global normaliser"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=toy.parent,
    )
    assert done.returncode == 1, done.stderr
    where, normaliser, refusals = done.stdout.splitlines()
    assert (where, refusals) == ("replicas.py:Replicas on ranks 0: one rank", "  holds   refusals")
    assert normaliser.startswith("  BROKEN  replicas.py:Replicas on ranks 0: one rank: 'global")


def test_it_is_planned_like_any_other(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    backend = f"train.backend={toy}:Replicas"
    assert main(["plan", str(path), backend, "--ranks", "2"]) == 0
    assert "policy" in capsys.readouterr().out
    code = main(["plan", str(path), backend, "roles.policy.tp=2", "--ranks", "2"])
    assert code != 0
    assert "roles.policy.tp=2" in capsys.readouterr().err
