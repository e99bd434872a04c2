"""The pictures of the documentation are those that the script draws, and its pages show them."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_pictures_are_what_the_script_draws() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    pictures = runpy.run_path(str(ROOT / "scripts/dev/draw.py"))["pictures"]()
    assert sorted(path.name for path in (ROOT / "docs").glob("*.svg")) == sorted(pictures)
    for name, svg in pictures.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == svg, name
        assert f"]({name})" in pages, name
