"""HTML as values. Every text is escaped where it enters: only `tag` and `raw` make `Markup`."""

from __future__ import annotations

import html
from dataclasses import dataclass

VOID = ("meta", "link", "br", "input")

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
"""Control characters -> their pictures: HTML may not have them."""


@dataclass(frozen=True)
class Markup:
    """HTML that is safe to write as it is."""

    text: str


Child = Markup | str | None
Value = str | float | bool | None


def escape(text: str) -> str:
    """Escape a text for the content of an element or the value of an attribute."""
    return html.escape(text.replace("\r\n", "\n").translate(CONTROLS))


def tag(name: str, /, *children: Child, **attributes: Value) -> Markup:
    """Make an element; texts among the children are escaped.

    Args:
        attributes: a last `_` is dropped, other `_` become `-`; None and False leave one out, True
            writes its name alone.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.removesuffix("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if name in VOID:
        return Markup(opening)
    return Markup(f"{opening}{joined(*children).text}</{name}>")


def joined(*children: Child) -> Markup:
    """Put texts and elements side by side."""
    parts = (
        child.text if isinstance(child, Markup) else escape(child)
        for child in children
        if child is not None
    )
    return Markup("".join(parts))


def raw(name: str, text: str) -> Markup:
    """Make a `style` or `script` element of this package's own text."""
    assert f"</{name}" not in text, name
    return Markup(f"<{name}>{text}</{name}>")
