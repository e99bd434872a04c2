"""The documentation as a site: it builds strictly, alone, and leads to every page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

TERMS = {
    "out of memory": "out-of-memory",
    "resume": "resume",
    "LoRA": "adapters",
    "reward": "rewards",
    "hang": "debugging-hangs",
    "vLLM": "vllm",
    "DPO": "preferences",
    "Slurm": "slurm",
    "checkpoint": "resume",
    "tool": "turns",
}
"""Words that a user types into the search -> the page that must be among the first."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(place)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place


class Links(HTMLParser):
    """Pages that a page links to: in its text, in the tabs, in the sidebar of its section."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.page = page
        self.text: set[Path] = set()
        self.tabs: set[Path] = set()
        self.sidebar: set[Path] = set()
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("article", "nav", "div"):
            self._open.append(given.get("class") or tag)
        target = (given.get("href") or "").partition("#")[0]
        if tag == "a" and target and ":" not in target:
            inside = " ".join(self._open)
            found = (self.page.parent / target).resolve()
            if "md-content__inner" in inside:
                self.text.add(found)
            elif "md-tabs" in inside:
                self.tabs.add(found)
            elif "md-sidebar--primary" in inside:
                self.sidebar.add(found)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("article", "nav", "div"):
            self._open.pop()


def sections() -> list[list[str]]:
    """Pages of each section of the navigation."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return [list(pages_in(entry)) for entry in nav]


def pages_in(entry: object) -> Iterator[str]:
    for part in entry if isinstance(entry, list) else [entry]:
        if isinstance(part, dict):
            for inner in part.values():
                yield from pages_in(inner)
        else:
            yield str(part)


def html_of(site: Path, page: str) -> Path:
    path = site / page
    is_index = path.stem == "README" and not (site / page).with_suffix(".html").exists()
    return path.with_name("index.html") if is_index else path.with_suffix(".html")


def test_every_page_is_reached_from_the_front_page_in_two_clicks(site: Path) -> None:
    front = Links(site / "index.html")
    first = {path for path in front.text | front.tabs if path.suffix == ".html"}
    second = set(first)
    for path in first:
        links = Links(path)
        second |= links.text
        for pages in sections():
            section = {html_of(site, page) for page in pages}
            if path in section:
                assert section <= links.sidebar | {path}, path
                second |= section
    pages = {path for path in site.rglob("*.html") if path.name != "404.html"}
    assert sorted(str(p.relative_to(site)) for p in pages - second - {site / "index.html"}) == []


def test_nothing_comes_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", text)
        assert loaded
        assert [tag for tag in loaded if "//" in tag.replace("://www.w3.org", "")] == [], path
    for path in site.rglob("*.css"):
        assert "url(http" not in path.read_text(encoding="utf-8"), path


def test_every_page_has_its_markdown_and_a_line_in_llms_txt(site: Path) -> None:
    listed = (site / "llms.txt").read_text(encoding="utf-8")
    for page in [page for pages in sections() for page in pages]:
        assert re.search(rf"^- \[.+\]\({re.escape(page)}\): \S", listed, re.M), page
        text = (site / page).read_text(encoding="utf-8")
        assert text.startswith("# ") and "<!-- generated" not in text, page


def test_references_hold_what_the_code_has(site: Path) -> None:
    from spmdrl import api
    from spmdrl.api import backends
    from spmdrl.commands.cli import parser

    names = re.findall(r"^### (\w+)$", (site / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(names) == sorted([*api.__all__, *backends.__all__])
    found = re.findall(r"^## (\S+)$", (site / "cli.md").read_text(encoding="utf-8"), re.M)
    (commands,) = (a.choices for a in parser()._actions if isinstance(a.choices, dict))
    assert found == list(commands)


def test_links_of_the_readme_find_their_sections(site: Path) -> None:
    links = re.findall(r"\]\(docs/([\w/-]+\.md)#([\w-]+)\)", (ROOT / "README.md").read_text())
    assert links
    for page, anchor in links:
        assert f'id="{anchor}"' in html_of(site, page).read_text(encoding="utf-8"), (page, anchor)


def score(entry: dict[str, str], words: list[str]) -> int:
    """Weight of an entry, as the site's search has it: titles count far more than texts."""
    title, text = entry["title"].lower(), entry["text"].lower()
    if not all(word in title or word in text for word in words):
        return 0
    return sum(1000 * (word in title) + min(text.count(word), 999) for word in words)


@pytest.mark.parametrize(("term", "page"), TERMS.items())
def test_the_search_finds_what_users_type(site: Path, term: str, page: str) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    words = term.lower().split()
    ranked = sorted(index["docs"], key=lambda entry: -score(entry, words))
    pages = list(dict.fromkeys(e["location"].partition("#")[0] for e in ranked if score(e, words)))
    assert f"{page}.html" in pages[:5], pages[:5]


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the site's own search")
def test_the_sites_own_search_finds_what_users_type(site: Path) -> None:
    script = Path(__file__).with_name("site_search.js")
    done = subprocess.run(
        ["node", str(script), str(site), *TERMS], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    missed = {t: found[t][:5] for t, page in TERMS.items() if f"{page}.html" not in found[t][:5]}
    assert missed == {}
