"""Reference pages that are read from the code: the command line and the public names.

Names are read from their source, so that nothing is imported but the parsers of the command line.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "spmdrl"

FACES = ("api", "api.backends")

GIVEN = ("Run", "StepRows", "ItemSet")
GIVEN += ("Policy", "Reference", "Reward", "Value", "Rollout", "CustomRole")
"""Classes that a flow is given, and does not make."""

SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):$")


def command_line() -> str:
    """A section for each command of `spmdrl`, with its words."""
    from spmdrl.commands.cli import parser
    from spmdrl.commands.launch import USAGE

    root = parser()
    (commands,) = (a for a in root._actions if isinstance(a, argparse._SubParsersAction))
    parts = []
    for name, command in commands.choices.items():
        actions = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
        # its words are torchrun's and another command's
        own = USAGE if name == "launch" else " ".join(["spmdrl", name, *map(usage, actions)])
        parts.append(f"## {name}\n\n{command.description}\n\n```text\n{own}\n```\n")
        told = [a for a in actions if a.help]
        if told:
            rows = [f"| `{cell(' '.join(shown(a)))}` | {cell(help_of(a))} |" for a in told]
            parts.append("\n".join(["| word | meaning |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def shown(action: argparse.Action) -> list[str]:
    """An option's last name, or an argument's name, with the name of its value."""
    if not action.option_strings:
        return [str(action.metavar or action.dest)]
    first = action.option_strings[-1]
    if action.nargs == 0:
        return [first]
    if action.choices is not None:
        return [first, "|".join(map(str, action.choices))]
    return [first, str(action.metavar or action.dest.upper())]


def usage(action: argparse.Action) -> str:
    word = " ".join(shown(action))
    many = "..." if action.nargs in ("*", "+") else ""
    is_needed = action.required and action.nargs not in ("*", "?")
    return f"{word}{many}" if is_needed else f"[{word}{many}]"


def help_of(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": "spmdrl"}
    return text[:1].upper() + text[1:]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def public_names() -> str:
    """A section for each group of names of `spmdrl.api` and `spmdrl.api.backends`."""
    return "\n".join(part for face in FACES for part in face_parts(face))


def face_parts(face: str) -> Iterator[str]:
    tree = ast.parse(file_of(face).read_text(encoding="utf-8"))
    places = {
        alias.name: node.module.removeprefix("spmdrl.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spmdrl.")
        for alias in node.names
    }
    listed = (ast.get_docstring(tree) or "").partition("\n\n- ")[2].partition("\n\n")[0]
    for bullet in listed.split("\n- "):
        title = " ".join(re.split(r"[:;]| `", bullet)[0].split())
        yield f"## {title} (`spmdrl.{face}`)\n"
        for name in re.findall(r"`(\w+)`", bullet):
            yield name_part(name, places[name])


def file_of(module: str) -> Path:
    plain = SOURCE.joinpath(*module.split("."))
    return plain / "__init__.py" if plain.is_dir() else plain.with_suffix(".py")


def name_part(name: str, module: str) -> str:
    """The section of one name: what defines it, its docstring, and its public members."""
    text = file_of(module).read_text(encoding="utf-8")
    body = ast.parse(text).body
    parts = [f"### {name}\n"]
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            parts += [code(header(text, node)), prose(ast.get_docstring(node))]
        elif isinstance(node, ast.ClassDef) and node.name == name:
            shown_as = "\n    ".join(
                [header(text, node), *(line for line, _ in fields(text, node))]
            )
            parts += [code(shown_as), prose(ast.get_docstring(node))]
            parts += [f"`{line}`: {told}\n" for line, told in fields(text, node) if told]
            parts += methods(text, node)
        elif isinstance(node, ast.Assign):
            targets = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
            if name in targets:
                parts += [code(source_of(text, node)), prose(string_of(after))]
    assert len(parts) > 1, f"{module} does not define {name}"
    parts.append(f"Defined in `{file_of(module).relative_to(SOURCE.parents[1])}`.\n")
    return "\n".join(part for part in parts if part)


def header(text: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """The lines from `def` or `class` to the body, decorators before them, comments included."""
    lines = text.splitlines()
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    found = inspect.cleandoc("\n".join(lines[first - 1 : node.body[0].lineno - 1]))
    if node.body[0].lineno == node.lineno:  # the body stands on the same line
        found = lines[node.lineno - 1].strip()
    return found


def source_of(text: str, node: ast.stmt) -> str:
    return ast.get_source_segment(text, node) or ""


def string_of(node: ast.stmt | None) -> str | None:
    """The string that stands after an assignment and describes it."""
    match node:
        case ast.Expr(value=ast.Constant(value=str(found))):
            return inspect.cleandoc(found)
    return None


def fields(text: str, owner: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Public attributes of a class as they are written, each with the string below it, or ""."""
    for node, after in zip(owner.body, [*owner.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign | ast.Assign):
            shown_as = " ".join(source_of(text, node).split())
            if "description=" in shown_as:  # a key, which docs/configuration.md describes
                shown_as = shown_as.partition(" = ")[0]
            if not shown_as.startswith("_"):
                yield shown_as, " ".join((string_of(after) or "").split())


def methods(text: str, owner: ast.ClassDef) -> Iterator[str]:
    """Public methods, and `__init__` where users call it."""
    for node in owner.body:
        if isinstance(node, ast.FunctionDef):
            is_made = node.name == "__init__" and owner.name not in GIVEN
            if is_made or not node.name.startswith("_"):
                yield code(header(text, node))
                yield prose(ast.get_docstring(node))


def code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: its sections become lists."""
    if not docstring:
        return ""
    lines: list[str] = []
    inside = False
    for line in even(docstring.splitlines()):
        found = SECTION.match(line)
        if found:
            lines += ["", f"**{found[1]}**", ""]
            inside = True
        elif inside and re.match(r" {4}\*{0,2}[\w.]+(?: \([^)]*\))?: ", line):
            name, _, told = line.strip().partition(": ")
            lines.append(f"- `{name}`: {told}")
        elif inside and line.startswith("    "):
            lines.append(f"    {line.strip()}")
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


def even(lines: list[str]) -> Iterator[str]:
    """Indent the entries of a section with which a docstring begins, as those of others are."""
    begins = bool(SECTION.match(lines[0]))
    for number, line in enumerate(lines):
        begins = begins and bool(line.strip()) and not (number and SECTION.match(line))
        yield f"    {line}" if begins and number else line


GENERATED: Mapping[str, Callable[[], str]] = {
    "command_line": command_line,
    "public_names": public_names,
}
"""Marker of a page -> what replaces it."""
