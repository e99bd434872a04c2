"""Draws the pictures of the documentation, as SVG files beside the pages.

    PYTHONPATH=src python scripts/dev/draw.py     # rewrites docs/*.svg

The pictures of packing and weight sync show what the package itself computes for a small example,
so they cannot be wrong; that of the architecture is drawn from docs/architecture.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch

from spmdrl.batch import Batch
from spmdrl.models.local_shards import LocalShard, Table
from spmdrl.models.tensors import Slice
from spmdrl.training.context import split_stream
from spmdrl.training.packing import pack
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.routes import Route

DOCS = Path(__file__).parents[2] / "docs"

COLOURS = ("#cfe2f3", "#fce5cd", "#d9ead3", "#ead1dc", "#fff2cc", "#d0e0e3")
LEFT, CELL, HEIGHT, LINE = 150, 44, 26, 40
"""Pixels: labels at the left, the width of a value, the height of a box, the next line."""


class Picture:
    """An SVG under construction: lines of boxes, each with a label at its left."""

    def __init__(self, columns: int, lines: float) -> None:
        self.width, self.height = LEFT + columns * CELL + 20, int(lines * LINE) + 10
        self._parts: list[str] = []

    def text(
        self, x: float, line: float, text: str, *, bold: bool = False, middle: bool = True
    ) -> None:
        anchor = "middle" if middle else "start"
        weight = ' font-weight="bold"' if bold else ""
        y = line * LINE + HEIGHT - 8
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def heading(self, line: float, text: str) -> None:
        self.text(8, line, text, bold=True, middle=False)

    def box(
        self, line: float, start: float, stop: float, text: str, colour: str = "#ffffff"
    ) -> None:
        """A box over columns `[start, stop)`."""
        x, width = LEFT + start * CELL, (stop - start) * CELL
        self._parts.append(
            f'<rect x="{x:g}" y="{line * LINE:g}" width="{width:g}" height="{HEIGHT}" '
            f'fill="{colour}" stroke="#555555"/>'
        )
        self.text(x + width / 2, line, text)

    def row(
        self, line: float, label: str, values: Sequence[object], colours: Sequence[str] = ()
    ) -> None:
        """One box per value."""
        self.text(8, line, label, middle=False)
        for i, value in enumerate(values):
            self.box(line, i, i + 1, str(value), colours[i] if colours else "#ffffff")

    def rule(self, column: float, first: float, last: float) -> None:
        """A dashed line down the picture, at the left of a column."""
        x = LEFT + column * CELL
        self._parts.append(
            f'<line x1="{x:g}" y1="{first * LINE:g}" x2="{x:g}" y2="{last * LINE:g}" '
            'stroke="#999999" stroke-dasharray="4 3"/>'
        )

    def svg(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" '
                f'height="{self.height}" font-family="sans-serif" font-size="13">',
                f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def weight_sync() -> str:
    """Draw a tensor of 12 rows: FSDP over ranks 0 to 2, and two engine replicas with tp 2."""
    rows = 12
    source = {rank: _rows(4 * rank, 4 * rank + 4, rows) for rank in range(3)}
    target = {rank: _rows(6 * (rank % 2), 6 * (rank % 2) + 6, rows) for rank in range(4)}
    plan = plan_sync(source, target)
    cells = sorted(
        ((cell.start[0], cell.stop[0], route) for _, cell, route in plan.cells()),
        key=lambda c: c[:2],
    )
    picture = Picture(15, 14.5)
    picture.heading(0, "Two layouts of one tensor with 12 rows, and its cells")
    for line, label, layout in (
        (1, "trainer", (0, 1, 2)),
        (3, "engine, replica 1", (0, 1)),
        (4, "engine, replica 2", (2, 3)),
    ):
        picture.text(8, line, label, middle=False)
        held = source if line == 1 else target
        for rank in layout:
            [piece] = held[rank]["w"].slices
            picture.box(line, piece.start[0], piece.stop[0], f"rank {rank}", COLOURS[rank])
    picture.text(8, 2, "cells", middle=False)
    for name, (start, stop, _) in zip("abcd", cells, strict=True):
        picture.box(2, start, stop, name)
    for bound in sorted({start for start, _, _ in cells} | {stop for _, stop, _ in cells}):
        picture.rule(bound, 0.9, 4.8)
    picture.heading(5.2, "Routes: how a cell comes to each rank that lacks it, once")
    for line, (name, (_, _, route)) in enumerate(zip("abcd", cells, strict=True)):
        picture.box(6.2 + line, 0, 1, name)
        picture.text(LEFT + CELL + 12, 6.2 + line, _route_text(route), middle=False)
    picture.heading(10.4, "Rounds: three are in flight, each in one of three slots")
    for number in range(3):
        picture.text(8, 11.4 + number, f"round {number + 1}", middle=False)
        for phase, text in enumerate(("send and copy", "broadcast", "land")):
            start = 3 * (number + phase)
            picture.box(11.4 + number, start, start + 3, text, COLOURS[number])
    return picture.svg()


def _rows(first: int, last: int, count: int) -> Table:
    piece = Slice(name="w", shape=(count, 1), start=(first, 0), stop=(last, 1), offset=0)
    return {"w": LocalShard(shape=(last - first, 1), dtype=torch.float32, slices=(piece,))}


def _route_text(route: Route) -> str:
    texts = [f"rank {rank} has it and copies it into its engine" for rank in route.copies]
    texts += [f"message {sender} → {receiver}" for sender, receiver in route.sends]
    texts += [f"then {root} broadcasts in {{{', '.join(map(str, g))}}}" for root, g in route.casts]
    return "; ".join(texts)


def packing() -> str:
    """Draw three rows, two of them with one prompt, as one stream; then its halves on two ranks."""
    words = ("P0 P1 P2 a b", "P0 P1 P2 c d e", "Q0 Q1 f")
    texts = " ".join(words).split()
    known = {word: i for i, word in enumerate(dict.fromkeys(texts))}
    lengths = torch.tensor([len(row.split()) for row in words])
    batch = Batch(
        lengths=lengths,
        tokens={"tokens": torch.tensor([known[word] for word in texts])},
        rows={"prompt_lengths": torch.tensor([3, 3, 2]), "prompt_ids": torch.tensor([0, 0, 1])},
    )
    [packed] = pack(batch, budget_tokens=100, share_prompts=True)
    names = list(known)
    of_row = {i: COLOURS[row] for i, row in enumerate(batch.row_of_token().tolist())}
    at = packed.origin.tolist()
    read = [COLOURS[int(packed.rows[i])] for i in packed.row]
    picture = Picture(len(texts) + 1, 21.4)
    picture.heading(0, "The batch: tokens of three rows; rows 0 and 1 have one prompt")
    picture.row(1, "tokens", texts, list(of_row.values()))
    picture.row(2, "place in the batch", range(len(texts)), list(of_row.values()))
    picture.heading(
        3.2, "The stream: the shared prompt once, and no token after the last that predicts"
    )
    colours = [of_row[i] for i in at]
    picture.row(4.2, "tokens", [names[i] for i in packed.tokens], colours)
    picture.row(5.2, "place in the stream", range(len(at)), colours)
    picture.row(6.2, "positions", packed.positions.tolist(), colours)
    picture.row(7.2, "origin", at, colours)
    picture.heading(8.4, "What is read: one entry per loss token")
    for line, (label, values) in enumerate(
        _read_rows(packed.predict, packed.targets, packed.destination, packed.row, names)
    ):
        picture.row(9.4 + line, label, values, read)
    picture.row(13.4, "rows", packed.rows.tolist(), COLOURS)
    picture.heading(
        14.6,
        "Context parallelism: of four chunks rank 0 takes the first and the last",
    )
    for rank in range(2):
        stream = split_stream(packed, rank, 2)
        line = 15.6 + 2 * rank
        picture.row(
            line,
            f"rank {rank}: origin",
            stream.origin.tolist(),
            [of_row[i] for i in stream.origin.tolist()],
        )
        picture.row(
            line + 1,
            f"rank {rank}: read",
            stream.read.tolist(),
            [read[i] for i in stream.read.tolist()],
        )
    assert stream.order is not None
    picture.row(19.6, "order", stream.order.tolist(), read)
    return picture.svg()


def _read_rows(
    predict: torch.Tensor,
    targets: torch.Tensor,
    destination: torch.Tensor,
    row: torch.Tensor,
    names: Sequence[str],
) -> list[tuple[str, list[object]]]:
    return [
        ("predict", predict.tolist()),
        ("targets", [names[i] for i in targets]),
        ("destination", destination.tolist()),
        ("row", row.tolist()),
    ]


BOX = re.compile(r"(\d+)-(\d+) (.+?)(?: /(\d))?$", re.MULTILINE)
"""A box of docs/architecture.txt: first column, column after its last, text, and its colour."""


def architecture() -> str:
    """Draw docs/architecture.txt: a heading or a label and its boxes per line."""
    lines = (DOCS / "architecture.txt").read_text(encoding="utf-8").splitlines()
    picture = Picture(16, 0.8 * len(lines))
    for number, text in enumerate(lines):
        line = 0.8 * number
        label, _, boxes = text.partition("|")
        if text.startswith("# "):
            picture.heading(line, text[2:])
            continue
        picture.text(8, line, label.strip(), middle=False)
        for start, stop, words, colour in BOX.findall(boxes.replace(" ;", "\n")):
            fill = COLOURS[int(colour)] if colour else "#ffffff"
            picture.box(line, int(start), int(stop), words, fill)
    return picture.svg()


def pictures() -> Mapping[str, str]:
    """Return the pictures: file name in docs -> SVG."""
    return {
        "architecture.svg": architecture(),
        "weight-sync.svg": weight_sync(),
        "packing.svg": packing(),
    }


def main() -> None:
    for name, svg in pictures().items():
        (DOCS / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
