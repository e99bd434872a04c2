"""Prints the table of docs/kernels.md on prompts that a group shares: what a layer's attention moves,
forward and backward, by three ways to call flash-attn-4.

    PYTHONPATH=src python scripts/dev/shared_prompt_reads.py

Nothing here is measured on a card. Ways: the prompt's keys laid out once for every response
(`repeated`); one call for rows with their own keys and one for the responses with the prompt's,
merged by their normalisers (`two calls`); and one call over the stream, whose mask says which
blocks a row sees (`one stream`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

WAYS = ("repeated", "two calls", "one stream")
BLOCK = 128
"""Rows and keys of a tile, and of a block of the mask."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A layer's heads, and the responses that share a prompt, in tokens."""

    heads: int
    kv_heads: int
    dims: int
    prompt: int
    responses: int
    response: int

    @property
    def stream(self) -> int:
        return self.prompt + self.responses * self.response

    def moved_bytes(self, way: str) -> float:
        """Bytes that pass between memory and processors, each tensor of a pass once.

        Sums of gradients are float32: twice as wide, written as zeros, added to (read, written) and
        read. Laying out keys is a write, and a read and a write of their gradients.
        """
        q, kv = 2 * self.heads * self.dims, 2 * 2 * self.kv_heads * self.dims
        rows, answers = self.stream, self.responses * self.response

        def call(queries: int, keys: int) -> float:
            forward = 2 * queries * q + keys * kv
            sums = 4 * 2 * (queries * q + keys * kv)
            return forward + 4 * queries * q + keys * kv + sums + queries * q + keys * kv

        laid_out = rows + self.responses * self.prompt if way == "repeated" else rows
        total = call(rows, laid_out) + (2 * laid_out + rows) * kv
        if way == "two calls":
            merged = 3 + 5 + 3  # forward, backward, and the sum of the queries' gradients
            total += call(answers, self.prompt) + merged * answers * q + 3 * self.prompt * kv
        return total

    def tile_bytes(self, way: str) -> float:
        """Bytes of keys and values that the forward's tiles of rows read, from memory or a cache."""
        packed = self.heads // self.kv_heads
        tiles = sum(self._tiles(way, packed))
        return tiles * BLOCK * 2 * 2 * self.kv_heads * self.dims

    def _tiles(self, way: str, packed: int) -> Iterator[int]:
        """Blocks of keys that each tile of `BLOCK` rows reads, rows of `packed` heads each."""

        def causal(rows: int, before: int) -> Iterator[int]:
            for tile in range(ceil(rows * packed / BLOCK)):
                last = min(rows, ceil((tile + 1) * BLOCK / packed))
                yield ceil((before + last) / BLOCK)

        if way != "one stream":
            yield from causal(self.prompt, 0)
            for _ in range(self.responses):
                yield from causal(self.response, self.prompt if way == "repeated" else 0)
            if way == "two calls":
                count = ceil(self.responses * self.response * packed / BLOCK)
                yield from [ceil(self.prompt / BLOCK)] * count
            return
        for tile in range(ceil(self.stream * packed / BLOCK)):
            block = tile // packed  # of the mask: its rows share one list
            yield len(self._seen(block * BLOCK, min(self.stream, (block + 1) * BLOCK)))

    def _seen(self, first: int, stop: int) -> set[int]:
        """Blocks of keys that any of the rows sees."""
        found: set[int] = set()
        for row in range(first, stop):
            own = 0
            if row >= self.prompt:
                own = row - (row - self.prompt) % self.response
                found |= set(range(ceil(self.prompt / BLOCK)))
            found |= set(range(own // BLOCK, row // BLOCK + 1))
        return found


HEADS = {"1.5B": (12, 2, 128), "8B": (32, 8, 128)}
GROUPS = ((512, 8, 896), (4096, 16, 512), (256, 8, 4096), (1024, 8, 64))


def tables() -> list[str]:
    lines = [
        "| model | prompt | responses | " + " | ".join(f"{way}, MB" for way in WAYS) + " | "
        "tiles, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (heads, kv_heads, dims) in HEADS.items():
        for prompt, responses, response in GROUPS:
            group = Group(
                heads=heads,
                kv_heads=kv_heads,
                dims=dims,
                prompt=prompt,
                responses=responses,
                response=response,
            )
            moved = [f"{group.moved_bytes(way) / 1e6:.0f}" for way in WAYS]
            tiles = ", ".join(f"{group.tile_bytes(way) / 1e6:.0f}" for way in WAYS)
            row = [name, f"{prompt:,}", f"{responses} of {response:,}", *moved, tiles]
            lines.append("| " + " | ".join(row) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(tables()))
