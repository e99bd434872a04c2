"""Tables of a report: captions, headers with their scope, bars in cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spmdrl.observe.report.markup import Child, Markup, tag


@dataclass(frozen=True, kw_only=True)
class Section:
    """Section of a page, with its id and its heading for the list of sections."""

    label: str
    title: str
    content: Markup


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    caption_hidden: bool = False,
) -> Markup:
    """Make a table whose first column has the rows' headers. It scrolls where it is too wide.

    Args:
        caption_hidden: show the caption to screen readers only, below a heading that says it.
    """
    body = [
        tag("tr", tag("th", cells[0], scope="row"), *(_cell(cell) for cell in cells[1:]))
        for cells in rows
    ]
    made = tag(
        "table",
        tag("caption", caption, class_="hidden" if caption_hidden else None),
        tag("thead", tag("tr", *(tag("th", text, scope="col") for text in head))),
        tag("tbody", *body),
    )
    return tag("div", made, class_="scroll", tabindex="0", role="group", aria_label=caption)


def _cell(cell: Child) -> Markup:
    return cell if isinstance(cell, Markup) and cell.text.startswith("<td") else tag("td", cell)


def bar(text: str, value: float, largest: float, run: int) -> Markup:
    """Make a cell with a number and a bar of its length, as a share of the largest one."""
    share = 100 * value / largest if largest > 0 else 0
    drawn = tag("span", class_=f"bar run{run}", style=f"width:{share:.1f}%", aria_hidden="true")
    return tag("td", tag("span", text), drawn, class_="bars")


def details(summary: str, *content: Child) -> Markup:
    """Make a part that is folded until it is opened."""
    return tag("details", tag("summary", summary), *content)


def section(label: str, title: str, *content: Child) -> Section:
    """Make a section of the page, named by its heading."""
    heading = tag("h2", title, id=f"{label}-heading")
    made = tag("section", heading, *content, id=label, aria_labelledby=f"{label}-heading")
    return Section(label=label, title=title, content=made)
