"""The block pool: references, the two ends, and compaction."""

from __future__ import annotations

import random

import pytest

from spmdrl.rollout.native.blocks import BlockPool


def test_private_blocks_come_from_the_low_end_and_shared_ones_from_the_high_end() -> None:
    pool = BlockPool(6)
    assert [pool.allocate(), pool.allocate()] == [0, 1]
    assert [pool.allocate(high=True), pool.allocate(high=True)] == [5, 4]
    pool.release(0)
    assert pool.num_free == 3
    assert pool.allocate() == 0
    assert [pool.allocate(high=True), pool.allocate()] == [3, 2]
    with pytest.raises(AssertionError, match="no free block"):
        pool.allocate()


def test_a_shared_block_is_free_after_its_last_user() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    assert pool.is_shared(block)
    pool.release(block)
    assert not pool.is_shared(block) and pool.num_free == 1
    pool.release(block)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="is free"):
        pool.release(block)


def test_compaction_closes_gaps_at_both_ends() -> None:
    pool = BlockPool(12)
    low = [pool.allocate() for _ in range(5)]
    high = [pool.allocate(high=True) for _ in range(4)]
    for block in (low[0], low[2], low[3], high[0], high[1]):
        pool.release(block)
    moves = pool.compact()
    assert moves == {4: 0, 8: 11, 9: 10}
    assert pool.compact() == {}
    assert pool.allocate() == 2


def test_few_gaps_are_left_alone() -> None:
    pool = BlockPool(10)
    blocks = [pool.allocate() for _ in range(8)]
    pool.release(blocks[3])
    assert pool.compact() == {}


def test_any_history_keeps_the_books() -> None:
    draw = random.Random(0)
    for _ in range(50):
        pool, held = BlockPool(20), []
        for _ in range(200):
            action = draw.random()
            if action < 0.45 and pool.num_free:
                block = pool.allocate(high=draw.random() < 0.4)
                assert block not in held
                held.append(block)
            elif action < 0.55 and held:
                held.append(draw.choice(held))
                pool.share(held[-1])
            elif action < 0.97 and held:
                pool.release(held.pop(draw.randrange(len(held))))
            else:
                moves = pool.compact(waste=0.1)
                assert not set(moves.values()) & (set(held) - set(moves))
                assert len(set(moves.values())) == len(moves)
                held = [moves.get(block, block) for block in held]
            assert pool.num_free == 20 - len(set(held))
