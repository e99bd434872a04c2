"""Hook of mkdocs: what the site has in addition to the files of docs/.

Pages may link to files elsewhere in the repository; these become pages (Markdown) or files below
`project/`. The marker `<!-- generated: NAME -->` of a page is replaced by what `site_reference.py`
reads from the code. Every page's Markdown lies next to its HTML, and `llms.txt` lists them.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

from site_reference import GENERATED  # noqa: E402

LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)((?:#[^)\s]*)?\))")
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

ELSEWHERE = "project"
"""Directory of the site for files that lie outside of docs/."""

_written: dict[str, str] = {}
"""Path in the site -> Markdown of the page, as it was rendered."""


def repository_path(src_uri: str) -> str:
    """Path in the repository of a file of the site."""
    inside, name = posixpath.split(src_uri)[0].split("/")[0] == ELSEWHERE, src_uri
    return name.removeprefix(f"{ELSEWHERE}/") if inside else f"docs/{name}"


def site_path(path: str) -> str:
    """Path in the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{ELSEWHERE}/{path}"


def targets(text: str, path: str) -> list[str]:
    """Files of the repository that a page at `path` links to."""
    text = FENCE.sub("", text)
    folder = posixpath.dirname(path)
    return [posixpath.normpath(posixpath.join(folder, found[2])) for found in LINK.finditer(text)]


def on_config(config: Any) -> Any:
    """Name headings as the repository's viewers do, so that an anchor is valid in both."""
    _written.clear()
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    open_pages = [f"docs/{f.src_uri}" for f in files if f.src_uri.endswith(".md")]
    known = set(open_pages)
    while open_pages:
        page = open_pages.pop()
        for path in targets((ROOT / page).read_text(encoding="utf-8"), page):
            if path in known or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            known.add(path)
            added = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
            files.append(added)
            if path.endswith(".md"):
                open_pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in generated parts, and mend links that leave docs/."""
    path = repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def mended(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        return f"{found[1]}{posixpath.relpath(site_path(target), here or '.')}{found[3]}"

    text = MARKER.sub(lambda found: GENERATED[found[1]](), markdown)
    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(mended, text[at : fence.start()]), fence[0]]
        at = fence.end()
    text = "".join([*parts, LINK.sub(mended, text[at:])])
    _written[page.file.src_uri] = text
    return text


def summary(markdown: str) -> str:
    """The first sentence of a page's first paragraph, as plain text."""
    paragraphs = [p.strip() for p in markdown.split("\n\n")]
    first = next(p for p in paragraphs if not p.startswith(("#", "|", "```", "- ", "!", "<!--")))
    plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(first.split())).replace("**", "")
    return re.split(r"(?<=[.!?])\s", plain)[0].rstrip(":")


def lines_of(items: Any, depth: int = 2) -> list[str]:
    """Entries of `llms.txt` for a part of the navigation."""
    lines: list[str] = []
    for item in items:
        if item.is_section:
            lines += ["", f"{'#' * depth} {item.title}", "", *lines_of(item.children, depth + 1)]
        elif item.is_page:
            src = item.file.src_uri
            lines.append(f"- [{item.title}]({src}): {summary(_written[src])}")
    return lines


_nav: list[Any] = []


def on_nav(nav: Any, config: Any, files: Files) -> Any:
    _nav[:] = nav.items
    return nav


def on_post_build(config: Any) -> None:
    """Write the pages' Markdown and llms.txt (https://llmstxt.org)."""
    place = Path(config.site_dir)
    for src, text in _written.items():
        (place / src).parent.mkdir(parents=True, exist_ok=True)
        (place / src).write_text(text, encoding="utf-8")
    head = [f"# {config.site_name}", "", f"> {config.site_description}"]
    text = "\n".join([*head, "", *lines_of(_nav)]) + "\n"
    (place / "llms.txt").write_text(text, encoding="utf-8")
