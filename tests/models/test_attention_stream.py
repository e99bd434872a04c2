"""Keys that the rows of a stream see, key by key, from ranges and from lists of blocks."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from dense_attention import dense_mask, shared_prompt
from spmdrl.models.attention_stream import BlockLists, SeenKeys, seen_keys
from spmdrl.models.spans import Span


def pairs(seen: SeenKeys, rows: int) -> Tensor:
    """[rows, rows] bool: the keys that a kernel's mask shows each row."""
    row, key = torch.arange(len(seen.first))[:, None], torch.arange(rows)
    first, stop, own = (x[:, None] for x in (seen.first, seen.stop, seen.own))
    return ((key >= first) & (key < stop)) | ((key >= own) & (key <= row))


def listed(lists: BlockLists, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    found = []
    for count, order in ((lists.part_count, lists.part), (lists.whole_count, lists.whole)):
        assert count.shape == (1, 1, blocks[0]) and order.shape[:3] == count.shape
        assert count.dtype == order.dtype == torch.int32 and order.shape[3] >= 2
        mask = torch.zeros(blocks, dtype=torch.bool)
        for i, number in enumerate(count[0, 0].tolist()):
            chosen = order[0, 0, i, :number].tolist()
            assert chosen == sorted(set(chosen))
            mask[i, chosen] = True
        found.append(mask)
    return found[0], found[1]


@pytest.mark.parametrize("seed", range(12))
def test_random_groups(seed: int) -> None:
    random = Random(seed)
    spans: list[Span] = []
    while not spans or len(spans) < 3:
        start = spans[-1].q_stop if spans else 0
        lengths = [random.randint(1, 20) for _ in range(random.randint(1, 5))]
        spans += shared_prompt(start, random.randint(1, 30), lengths)
    rows, window = spans[-1].q_stop, random.choice([None, 1, 7, 25])
    block = random.choice([(4, 4), (8, 4), (16, 16), (3, 5)])
    seen = seen_keys(spans, window, block)
    assert seen is not None
    expected = dense_mask(spans, rows, window)
    shown = pairs(seen, rows)
    assert torch.equal(shown[:rows], expected) and not shown[rows:].any()
    assert len(seen.first) % block[0] == 0
    # of each block: whether any pair is seen, and whether all are; padding is not
    counts = -(-rows // block[0]), -(-rows // block[1])
    padded = torch.zeros(counts[0] * block[0], counts[1] * block[1], dtype=torch.bool)
    padded[:rows, :rows] = expected
    tiles = padded.view(counts[0], block[0], counts[1], block[1]).transpose(1, 2).flatten(2)
    part, whole = listed(seen.by_rows, counts)
    assert torch.equal(whole, tiles.all(2)) and torch.equal(part, tiles.any(2) & ~tiles.all(2))
    by_keys = listed(seen.by_keys, (counts[1], counts[0]))
    assert torch.equal(by_keys[0], part.T) and torch.equal(by_keys[1], whole.T)


def test_streams_of_another_form_are_none() -> None:
    spans = shared_prompt(0, 9, [4, 6])
    assert seen_keys(spans, None, (4, 4)) is not None
    assert seen_keys(spans, None, (4, 19)) is None, "less than two blocks"
    assert seen_keys([Span(q_start=0, q_stop=19, own=(0, 19))], None, (4, 4)) is None
    elsewhere = Span(q_start=0, q_stop=9, own=(10, 19), prefix=((0, 10),))
    assert seen_keys([elsewhere], None, (4, 4)) is None
    two = Span(q_start=19, q_stop=23, own=(19, 23), prefix=((0, 4), (6, 9)))
    assert seen_keys([*spans, two], None, (4, 4)) is None
