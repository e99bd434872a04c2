"""Where storages lie in an arena, and that copies through it lose nothing."""

from __future__ import annotations

import random

import pytest
import torch

from spmdrl.memory.arena import ALIGNMENT, SMALL_BYTES, Bucket, HostArena, layout_arena
from spmdrl.memory.mover import Mover, allocate, free


def test_layout_by_hand():
    sizes = [100, 2 * SMALL_BYTES, 512, 513, 1]
    layout = layout_arena(sizes, staging_bytes=2048)
    big = 512 + 2 * SMALL_BYTES
    assert layout.offsets == (0, 512, big, big + 512, big + 1536)
    assert layout.num_bytes == big + 2048
    assert layout.singles == (1,)
    assert layout.buckets == (
        Bucket(first=0, last=1, start=0, stop=512),
        Bucket(first=2, last=5, start=big, stop=big + 2048),
    )


def test_without_staging_every_storage_moves_alone():
    layout = layout_arena([5, SMALL_BYTES, 1], staging_bytes=0)
    assert layout.buckets == ()
    assert layout.singles == (0, 1, 2)


def test_buckets_are_bounded_and_each_storage_moves_once():
    draw = random.Random(0)
    sizes = [draw.choice([1, 511, 4000, 70_000, SMALL_BYTES - 1, SMALL_BYTES]) for _ in range(200)]
    layout = layout_arena(sizes, staging_bytes=100_000)
    moved = [*layout.singles, *(i for b in layout.buckets for i in range(b.first, b.last))]
    assert sorted(moved) == list(range(200))
    assert max(bucket.stop - bucket.start for bucket in layout.buckets) <= 100_000
    assert all(sizes[i] >= 70_000 for i in layout.singles)
    ends = [offset + size for offset, size in zip(layout.offsets, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, layout.offsets[1:], strict=False))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    # neighbours that fit together are together
    for left, right in zip(layout.buckets, layout.buckets[1:], strict=False):
        assert (
            left.last != right.first
            or right.stop - left.start > 100_000
            or (sizes[right.first] + left.stop - left.start > 100_000 - ALIGNMENT)
        )


@pytest.mark.parametrize("staging_bytes", [0, 2048, 1 << 22])
def test_storages_come_back_bit_by_bit(staging_bytes):
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 700, 2000, 3, SMALL_BYTES + 8, 512, SMALL_BYTES, 40]
    tensors = [torch.randint(0, 256, (n,), generator=generator).to(torch.uint8) for n in sizes]
    before = [tensor.clone() for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in tensors]
    mover = Mover(torch.device("cpu"), staging_bytes=staging_bytes)
    layout = layout_arena(sizes, staging_bytes)
    arena = HostArena(layout.num_bytes, pinned=False)
    assert mover.to_host(storages, layout, arena).num_bytes == sum(sizes)
    free(storages)
    assert [storage.nbytes() for storage in storages] == [0] * len(sizes)
    allocate(storages, sizes)
    for tensor in tensors:
        tensor.fill_(77)
    ticket = mover.to_device(storages, layout, arena)
    assert ticket.is_done() and ticket.seconds() > 0
    assert all(map(torch.equal, tensors, before))
