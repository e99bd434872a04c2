"""`spmdrl show`: one sample of a run, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spmdrl.observe.rollout_log import given_name, logged_steps, read_rollouts


def show(run_dir: Path, step: int | None, sample: int | None) -> str:
    """Return the text of one sample, or the table of a step's samples.

    Args:
        step: number of the step, as metrics.jsonl counts them; None: the last one.
        sample: the sample's place in the step, from 0; None: the table of all.

    Raises:
        ValueError: the run has no such step or sample.
    """
    if step is None:
        step = next(iter(reversed(logged_steps(run_dir))), 0)
    rows = read_rollouts(run_dir, step)
    if sample is None:
        return "\n".join(_table(step, rows))
    if not 0 <= sample < len(rows):
        raise ValueError(f"--sample {sample}: step {step} has samples 0 to {len(rows) - 1}")
    return "\n".join(_one(step, sample, rows[sample]))


def _table(step: int, rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"step {step}: {len(rows)} samples"
    yield "sample  prompt            reward  advantage  tokens  finish   response"
    for number, row in enumerate(rows):
        advantage = row.get("advantage")
        shown = "-" if advantage is None else f"{advantage:.3f}"
        text = " ".join(row["response"].split())[:60]
        yield (
            f"{number:>6}  {row['prompt_id']:<16}  {row['reward']:>6.3f}  {shown:>9}  "
            f"{row['response_tokens']:>6}  {row['finish']:<7}  {text}"
        )


def _one(step: int, sample: int, row: Mapping[str, Any]) -> Iterator[str]:
    yield f"step {step}, sample {sample}: prompt {row['prompt_id']}, its sample {row['sample']}"
    parts = {n.removeprefix("reward/"): v for n, v in row.items() if n.startswith("reward/")}
    rewards = "  ".join(f"{name} {value:.4g}" for name, value in parts.items())
    yield f"reward {row['reward']:.4g}" + (f" ({rewards})" if len(parts) > 1 else "")
    if "advantage" in row:
        yield f"advantage {row['advantage']:.4g}"
    yield (
        f"{row['prompt_tokens']} + {row['response_tokens']} tokens, finish {row['finish']}, "
        f"weights of version {row['version']}"
    )
    if row.get("opening"):  # what the model read, where an environment wrote it
        for message in row["opening"]:
            yield from _text(f"prompt, {message['role']}", message["content"])
    elif row.get("prompt") is not None:
        yield from _text("prompt", row["prompt"])
    if "turns" in row:
        yield from _turns(row)
    else:
        yield from _text("response", row["response"])
    if row.get("answer") is not None:
        yield from _text("answer", row["answer"])


def _turns(row: Mapping[str, Any]) -> Iterator[str]:
    """The turns of a sample, with what the model read after each."""
    turns = row["turns"]
    for number, turn in enumerate(turns, start=1):
        yield from _text(f"turn {number}, reward {turn['reward']:.4g}", turn["text"])
        if turn["given"]:
            yield from _text(given_name(turns, number), turn["given"])
    if row["ending"] is not None:
        yield f"--- after turn {len(turns)} of them: {row['ending']} ---"


def _text(name: str, text: object) -> Iterator[str]:
    yield f"--- {name} ---"
    yield str(text)
