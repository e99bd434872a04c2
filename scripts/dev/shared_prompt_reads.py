"""Prints the table of docs/kernels.md on prompts that a group shares: what a layer's attention
moves, forward and backward, by three ways to call flash-attn-4.

    PYTHONPATH=src python scripts/dev/shared_prompt_reads.py

Nothing here is measured on a card. Ways: the prompt's keys laid out once for every response
(`repeated`); one call for rows with their own keys and one for the responses with the prompt's,
merged by their normalisers (`two calls`); and one call over the stream, whose mask says which
blocks a row sees (`one stream`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from spmdrl.models.attention_stream import seen_keys
from spmdrl.models.spans import Span

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
        """Bytes of keys and values that the forward's tiles read, from memory or a cache."""
        packed = self.heads // self.kv_heads
        tiles = sum(self._tiles(way, packed))
        return tiles * BLOCK * 2 * 2 * self.kv_heads * self.dims

    def _tiles(self, way: str, packed: int) -> list[int]:
        """Blocks of keys that each tile of `BLOCK` rows reads, rows of `packed` heads each."""

        def tiles(rows: int, before: int, grows: bool = True) -> list[int]:
            found = []
            for tile in range(ceil(rows * packed / BLOCK)):
                last = min(rows, ceil((tile + 1) * BLOCK / packed)) if grows else 0
                found.append(ceil((before + last) / BLOCK))
            return found

        if way == "one stream":
            seen = seen_keys(self.spans(), None, (BLOCK, BLOCK))
            assert seen is not None
            listed = (seen.by_rows.part_count + seen.by_rows.whole_count).flatten().tolist()
            # rows of a block share its list
            return [listed[t // packed] for t in range(ceil(self.stream * packed / BLOCK))]
        before = self.prompt if way == "repeated" else 0
        own = tiles(self.prompt, 0) + tiles(self.response, before) * self.responses
        if way == "repeated":
            return own
        return own + tiles(self.responses * self.response, self.prompt, grows=False)

    def spans(self) -> list[Span]:
        """The prompt and the responses, in a stream."""
        prompt, n = (0, self.prompt), self.response
        starts = [self.prompt + i * n for i in range(self.responses)]
        return [
            Span(q_start=0, q_stop=self.prompt, own=prompt),
            *(Span(q_start=a, q_stop=a + n, own=(a, a + n), prefix=(prompt,)) for a in starts),
        ]


HEADS = {"1.5B": (12, 2, 128), "8B": (32, 8, 128)}
GROUPS = ((500, 8, 900), (4000, 16, 500), (250, 8, 4100), (1000, 8, 70))


def tables() -> list[str]:
    """Return the lines of the table; of three numbers in a cell each is a way's."""
    lines = [f"| model | prompt | responses | moved, MB: {', '.join(WAYS)} | read by tiles, MB |"]
    lines.append("|---" * 5 + "|")
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
            moved = ", ".join(f"{group.moved_bytes(way) / 1e6:,.0f}" for way in WAYS)
            tiles = ", ".join(f"{group.tile_bytes(way) / 1e6:,.0f}" for way in WAYS)
            lines.append(
                f"| {name} | {prompt:,} | {responses} of {response:,} | {moved} | {tiles} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(tables()))
