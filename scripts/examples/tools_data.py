"""Makes what tools.sh trains on: sums in words with their expressions, traces of calculator calls,
and the model's directory with a chat template that writes tools.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spmdrl.atomic_files import replace_file
from spmdrl.turns.arithmetic import evaluate
from spmdrl.turns.schemas import schema_of
from spmdrl.turns.shipped_tools import calculator

PROBLEMS: Sequence[tuple[str, str]] = (
    ("What is {a} times {b} plus {c}?", "{a} * {b} + {c}"),
    ("What is {a} plus {b} times {c}?", "{a} + {b} * {c}"),
    ("Multiply the sum of {a} and {b} by {c}.", "({a} + {b}) * {c}"),
    ("Subtract {a} from {b}, then multiply by {c}.", "({b} - {a}) * {c}"),
    ("Add {a} to the product of {b} and {c}.", "{b} * {c} + {a}"),
    ("Take {c} away from {a} times {b}.", "{a} * {b} - {c}"),
    (
        "A store sold {a} boxes of {b} screws and {c} single screws. How many screws is that?",
        "{a} * {b} + {c}",
    ),
    (
        "{a} people pay {b} dollars each, and {c} dollars are spent. How many dollars are left?",
        "{a} * {b} - {c}",
    ),
    (
        "A farm has {a} red and {b} white hens. Each lays {c} eggs. How many eggs are there?",
        "({a} + {b}) * {c}",
    ),
)
"""A question, and the expression that answers it."""

Row = Mapping[str, Any]


def problems(seed: str) -> Iterator[tuple[str, str]]:
    """Questions with their expressions, none twice."""
    chance = random.Random(seed)
    seen: set[str] = set()
    while True:
        text, expression = chance.choice(PROBLEMS)
        numbers = {name: chance.randint(100, 9999) for name in "abc"}
        question = text.format(**numbers)
        if question not in seen:
            seen.add(question)
            yield question, expression.format(**numbers)


def trace(question: str, expression: str) -> Row:
    """A conversation in which the calculator is called, as supervised fine-tuning reads it."""
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return {
        "tools": [schema_of(calculator)],
        "messages": [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "name": "calculator", "content": evaluate(expression)},
            {"role": "assistant", "content": f"The answer is {evaluate(expression)}."},
        ],
    }


def direct(question: str, expression: str) -> Row:
    """The same conversation without the tool."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"The answer is {evaluate(expression)}."},
        ]
    }


def asked(question: str, expression: str) -> Row:
    """A question and its answer, as GRPO reads them."""
    return {"question": question, "answer": evaluate(expression)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("out", type=Path, help="gets model, traces.jsonl, direct.jsonl, ...")
    parser.add_argument("--traces", type=int, default=400)
    parser.add_argument("--questions", type=int, default=2000, help="that GRPO draws from")
    parser.add_argument("--held-out", type=int, default=200)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = problems("tools")
    sizes = {"traces": given.traces, "questions": given.questions, "held_out": given.held_out}
    parts = {name: [next(found) for _ in range(size)] for name, size in sizes.items()}
    rows = {
        "traces": [trace(*one) for one in parts["traces"]],
        "direct": [direct(*one) for one in parts["traces"]],
        "questions": [asked(*one) for one in parts["questions"]],
        "held_out": [asked(*one) for one in parts["held_out"]],
    }
    for name, part in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        replace_file(given.out / f"{name}.jsonl", text.encode())
    with_template(given.model, given.out / "model")


def with_template(model: Path, out: Path) -> None:
    """A directory of the same files, with a chat template that writes tools and calls."""
    out.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name not in ("tokenizer_config.json", "chat_template.jinja"):
            link = out / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = Path(__file__).with_name("tools.jinja").read_text(encoding="utf-8")
    replace_file(out / "tokenizer_config.json", json.dumps(settings, indent=1).encode())


if __name__ == "__main__":
    main()
