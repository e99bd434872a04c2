"""The table of docs/backends.md that says what each backend was seen to do: its cells, what a run
must show for each, and the page's text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend_cases import BACKENDS, Records
from spmdrl.models.family import families
from spmdrl.planning.support import ENGINES, make_spec, refusal, tiny_of

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"

MODELS = {"Llama": "LlamaForCausalLM", "MoE": "Qwen3MoeForCausalLM"}
FLOWS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # flow: its losses, and its gradient norms
    "GRPO": (("loss",), ("grad_norm",)),
    "PPO": (("loss", "value/loss"), ("grad_norm", "value/grad_norm")),
}
HEADS = (
    *("backend", "model", "flow", "losses", "gradient norms"),
    *("after kill -9", "native `tp=2`", "vllm `tp=2`"),
)

LIMIT = 1e-4
"""The largest difference that a backend may show."""

SMALL = 0.01
"""Differences of smaller values are taken relative to it: a loss may be next to zero."""

FINEST = 1e-6
"""What the table shows of smaller differences: rounding of float32, which processors do apart."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table."""

    backend: str
    model: str
    flow: str

    def __str__(self) -> str:
        return f"{self.backend}, {self.model}, {self.flow}"

    @property
    def group(self) -> str:
        """What the rows that are compared with each other have in common."""
        return f"{self.model} {self.flow}"


CELLS = [Cell(backend=b, model=m, flow=f) for b in BACKENDS for m in MODELS for f in FLOWS]


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The largest differences of a run's steps from those that it must equal."""

    losses: float
    norms: float


def worst(cell: Cell, found: Records, wanted: Records) -> Worst:
    """The differences over all steps, relative to what they should be."""
    assert [one["step"] for one in found] == [one["step"] for one in wanted]

    def largest(metrics: Sequence[str]) -> float:
        pairs = [(a[m], b[m]) for a, b in zip(found, wanted, strict=True) for m in metrics]
        return max(abs(a - b) / max(abs(b), SMALL) for a, b in pairs)

    losses, norms = FLOWS[cell.flow]
    return Worst(losses=largest(losses), norms=largest(norms))


def refuses(cell: Cell, engine: str | None = None) -> bool:
    """Whether the cell's backend, or the engine, refuses the model by name."""
    model = tiny_of(families()[MODELS[cell.model]])
    column = BACKENDS[cell.backend]
    if engine is not None:
        [column] = [one for one in ENGINES if one.backend == engine]
    return refusal(make_spec(model, column)) is not None


def bound(difference: float) -> str:
    """A power of ten with room for another processor's rounding, at most `LIMIT`."""
    power = math.ceil(math.log10(max(2 * difference, FINEST)) - 1e-9)
    return f"1e{min(power, round(math.log10(LIMIT)))}"


def rows(found: Mapping[Cell, Worst]) -> Iterator[tuple[str, ...]]:
    """The table's rows, of cells that passed."""
    yield HEADS
    for cell in CELLS:
        names = (f"`{cell.backend}`", cell.model, cell.flow)
        if refuses(cell):
            yield (*names, *["-"] * (len(HEADS) - len(names)))
            continue
        seen = found[cell]
        engines = ["-" if refuses(cell, engine) else "yes" for engine in ("native", "vllm")]
        yield (*names, bound(seen.losses), bound(seen.norms), "exact", *engines)


def text(found: Mapping[Cell, Worst]) -> str:
    heading, *others = rows(found)
    rule = ("---",) * len(heading)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *others))


def page_rows() -> dict[Cell, tuple[str, ...]]:
    """The rows that the page has, without their names."""
    lines = _page_table().splitlines()
    found = {}
    for line in lines[2:]:
        backend, model, flow, *others = line.strip("| ").split(" | ")
        found[Cell(backend=backend.strip("`"), model=model, flow=flow)] = tuple(others)
    return found


def write(found: Mapping[Cell, Worst]) -> None:
    """Put the table into the page, in place of the one it has."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(_page_table(), text(found)), encoding="utf-8")


def _page_table() -> str:
    page = PAGE.read_text(encoding="utf-8")
    heading = f"| {' | '.join(HEADS)} |"
    assert page.count(heading) == 1, f"{PAGE.name} has not one table with {heading}"
    return page[page.index(heading) :].partition("\n\n")[0]
