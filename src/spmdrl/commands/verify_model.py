"""`spmdrl verify-model`: find out whether we compute a user's model as transformers does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spmdrl.verification.card import Verified
    from spmdrl.verification.lines import Line

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

TEXT = (
    "Compare trainer, engine, layouts and export of a model with transformers; 1 if a line does "
    "not hold, 2 if the model is refused."
)


def add_verify_model(add: Add) -> None:
    """Add the command and its words."""
    command = add("verify-model", run_verify_model, TEXT)
    command.add_argument("directory", help="a model, or a directory of models: variants")
    command.add_argument("--card", metavar="FILE", help="write the figures as a Markdown table")
    command.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    command.add_argument("--tokens", type=int, metavar="N", help="tokens of the longest row")
    command.add_argument(
        "--one-process", action="store_true", help="leave out the lines that need two processes"
    )


def run_verify_model(options: argparse.Namespace) -> None:
    """Verify one model or several, and end with the code of the worst.

    Raises:
        ValueError: there is no model.
    """
    root = Path(options.directory)
    found = models_in(root)
    done = [verify_directory(path, options) for path in found]
    if options.card is not None:
        from spmdrl.verification.card import write_card

        write_card(Path(options.card), [verified for verified, _ in done])
        print(options.card, flush=True)
    codes = {code for _, code in done}
    if code := next((c for c in (1, 2) if c in codes), 0):
        raise SystemExit(code)


def models_in(root: Path) -> list[Path]:
    """List the model in a directory, or those in the directories inside it: `plain`, with which a
    card compares the others, before the others by name.

    Raises:
        ValueError: there is none.
    """
    if (root / "config.json").is_file():
        return [root]
    inside = [file.parent for file in root.glob("*/config.json")]
    found = sorted(inside, key=lambda path: (path.name != "plain", path.name))
    if not found:
        raise ValueError(
            f"{root} has no config.json, nor has a directory in it: give the directory of a "
            "Hugging Face model"
        )
    return found


def verify_directory(path: Path, options: argparse.Namespace) -> tuple[Verified, int]:
    """Verify one model and print what is found: `check-model`'s report, then the lines.

    Returns: the findings, and 1 if a line does not hold, 2 if the model is refused, else 0.
    """
    from spmdrl.models.files.check import check_directory
    from spmdrl.verification.card import Verified
    from spmdrl.verification.verify import verify

    report = check_directory(path)
    print("\n".join(report.lines), flush=True)
    source = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if report.errors:
        return _refused(path, source, report.errors[0]), 2
    lines: list[Line] = []
    try:
        for line in verify(
            path, layers=options.layers, tokens=options.tokens, ranks=not options.one_process
        ):
            print(line.text, flush=True)
            lines.append(line)
    except ValueError as error:
        print(f"error: {error}", flush=True)
        return _refused(path, source, str(error)), 2
    verified = Verified(name=path.name, source=source, lines=tuple(lines))
    return verified, int(not all(line.holds for line in lines))


def _refused(path: Path, source: Mapping[str, Any], error: str) -> Verified:
    from spmdrl.verification.card import Verified

    return Verified(name=path.name, source=source, refused=error.replace(f"{path}/", ""))
