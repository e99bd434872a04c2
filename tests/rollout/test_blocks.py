"""The block pool: references, and what is free."""

from __future__ import annotations

import json
import random

import pytest

from spmdrl.rollout.native.blocks import BlockPool


def test_a_block_is_given_once() -> None:
    pool = BlockPool(3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(AssertionError, match="no free block"):
        pool.allocate()
    pool.release(1)
    assert pool.num_free == 1 and pool.allocate() == 1


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


def test_any_history_keeps_the_books() -> None:
    draw = random.Random(0)
    for _ in range(50):
        pool, held = BlockPool(20), []
        for _ in range(200):
            action = draw.random()
            if action < 0.45 and pool.num_free:
                block = pool.allocate()
                assert block not in held
                held.append(block)
            elif action < 0.55 and held:
                held.append(draw.choice(held))
                pool.share(held[-1])
            elif action < 0.97 and held:
                pool.release(held.pop(draw.randrange(len(held))))
            else:
                kept = json.loads(json.dumps(pool.state()))
                pool = BlockPool(20)
                pool.restore(kept)
            assert pool.num_free == 20 - len(set(held))
            assert all(pool.is_shared(block) == (held.count(block) > 1) for block in held)
