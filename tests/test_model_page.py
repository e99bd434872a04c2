"""docs/adding-a-model.md: its family is the shipped one, its code and commands run as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from spmdrl.commands.cli import main
from test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "adding-a-model.md"


def body(source: str) -> str:
    return source[source.index("def read(") :]


def test_the_family_shown_is_the_shipped_one() -> None:
    shown, _ = blocks(PAGE, "python")
    shipped = ROOT / "src" / "spmdrl" / "models" / "families" / "seed_oss.py"
    assert body(shown) == body(shipped.read_text(encoding="utf-8"))
    namespace: dict[str, object] = {}
    exec(compile(shown, "seed_oss", "exec"), namespace)
    assert "FAMILY" in namespace


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_tiny_models_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, making = blocks(PAGE, "python")
    exec(compile(making, "variants", "exec"), {})
    ((line,),) = [block.splitlines() for block in blocks(PAGE, "bash")]
    assert main(line.split()[1:]) == 0
