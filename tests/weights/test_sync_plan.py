"""Sync plans: bytes, and a whole sync carried out in memory for up to 64 ranks."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import SYNTHETIC, pairs, simulate, with_experts
from weight_cases import Case, model

from harness import run_ranks
from spmdrl.models.local_shards import WeightLayout
from spmdrl.models.sharding import global_shapes
from spmdrl.weights.cells import Cell
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import SyncPlan, plan_sync
from spmdrl.weights.rank_rounds import rank_rounds
from spmdrl.weights.rounds import CellRange, Round
from spmdrl.weights.routes import Route
from spmdrl.world import World

CASES: list[Case] = [
    ([0], {}),
    ([0, 1], {"dp_replicate": 2}),
    ([0, 1], {"tp": 2}),
    ([0, 1], {"dp_shard": 2}),
    ([0, 1, 2], {"dp_shard": 3}),
    ([0, 1, 2, 3], {"tp": 4}),
    ([2, 3, 4, 5], {"dp_shard": 4}),
    ([4, 5, 6, 7], {"dp_replicate": 2, "tp": 2}),
    ([0, 1, 2, 3], {"dp_shard": 2, "tp": 2}),
    ([1, 2, 3, 4], {"dp_shard": 2, "cp": 2}),
    ([0, 1, 2, 3], {"dp_replicate": 2, "dp_shard": 2}),
    ([0, 1, 2, 3], {"pp": 2, "tp": 2}),
]


SHAPES = global_shapes(model())


def layout(case: Case, dtype: torch.dtype = torch.float32) -> WeightLayout:
    return model_layout(model(), case[0], case[1], dtype)


def total_bytes(table: WeightLayout) -> int:
    return sum(held.num_bytes for names in table.values() for held in names.values())


@pytest.mark.parametrize("source", CASES, ids=str)
def test_every_target_slice_is_right(source: Case) -> None:
    for target in CASES:
        tables = layout(source), layout(target)
        plan = plan_sync(*tables, bucket_bytes=1500)
        received, lacking = simulate(SHAPES, plan, *tables)
        assert received == lacking == plan.moved_bytes == plan.gathered_bytes
        moved = plan.shared_bytes + plan.copied_bytes + plan.gathered_bytes
        assert moved == total_bytes(tables[1])


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.full)])
def test_any_layout_to_any_other(examples: int) -> None:
    settings(deadline=None, max_examples=examples)(given(data=st.data())(check_any))()


def check_any(data: st.DataObject) -> None:
    """A plan between two layouts that are drawn moves what it must, and no more."""
    world_size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64]))
    shapes, source, target = data.draw(pairs(world_size))
    node_size = data.draw(st.sampled_from([1, 2, 8]))
    bucket = data.draw(st.sampled_from([300, 3000, 2**20]))
    plan = plan_sync(source, target, node_size=node_size, bucket_bytes=bucket)
    received, lacking = simulate(shapes, plan, source, target)
    assert received == plan.moved_bytes
    assert lacking == plan.gathered_bytes
    # in the target's dtype, or narrower where the source is: never more than it must be
    assert received <= lacking
    widths = {held.dtype.itemsize for table in source.values() for held in table.values()}
    if min(widths) >= next(iter(target[min(target)].values())).dtype.itemsize:
        assert received == lacking


def test_equal_layouts_share_everything_and_move_nothing() -> None:
    for case in CASES:
        plan = plan_sync(layout(case), layout(case))
        assert (plan.copied_bytes, plan.gathered_bytes, plan.rounds) == (0, 0, ())
        assert plan.shared_bytes == total_bytes(layout(case))
        assert all(plan.shared[r] == set(names) for r, names in layout(case).items())


def test_shards_in_blocks_are_what_a_tensor_parallel_engine_holds() -> None:
    config = model(num_attention_heads=4, num_key_value_heads=4, vocab_size=36)
    target = model_layout(config, [0, 1], {"tp": 2}, torch.float32)
    plain, blocked = (
        model_layout(config, [0, 1], {"dp_shard": 2}, torch.float32, blocks=blocks)
        for blocks in (1, 2)
    )
    plan = plan_sync(blocked, target)
    assert (plan.copied_bytes, plan.gathered_bytes, plan.rounds) == (0, 0, ())
    assert plan.shared_bytes == total_bytes(target)
    assert plan_sync(plain, target).gathered_bytes > total_bytes(target) // 4
    # narrower at the engine: a rank's own copy, and still no message
    half = model_layout(config, [0, 1], {"tp": 2}, torch.bfloat16)
    plan = plan_sync(blocked, half)
    assert (plan.copied_bytes, plan.moved_bytes) == (total_bytes(half), 0)


def test_replicas_need_no_message() -> None:
    two = layout(([0, 1], {"dp_replicate": 2}))
    plan = plan_sync(layout(([0, 1, 2, 3], {"dp_replicate": 4})), two)
    assert (plan.copied_bytes, plan.gathered_bytes) == (0, 0)
    # another dtype on the same rank: a copy of each tensor, still no message
    plan = plan_sync(two, layout(([0, 1], {"dp_replicate": 2}), torch.bfloat16))
    assert plan.shared_bytes == plan.gathered_bytes == plan.moved_bytes == 0
    assert plan.copied_bytes == total_bytes(two) // 2
    assert {route.num_receivers for _, _, route in plan.cells()} == {0}


def test_bytes_by_hand_from_one_rank_to_two() -> None:
    plan = plan_sync(layout(([0], {})), layout(([0, 1], {"tp": 2})))
    whole = total_bytes(layout(([0], {})))
    norms = 4 * 10 * 5
    halves = (whole - norms) // 2
    # rank 0 copies its halves and the norms, rank 1 receives its own
    assert (plan.shared_bytes, plan.copied_bytes) == (0, halves + norms)
    assert plan.gathered_bytes == plan.moved_bytes == halves + norms
    assert f"copied {halves + norms:,} bytes" in plan.describe()
    assert "1 rounds" in plan.describe()


def test_most_is_shared_or_nothing() -> None:
    """An engine that shares norms alone would keep the whole policy on the device for them."""
    source = layout(([0], {}))

    def narrow(part: str) -> WeightLayout:
        half = torch.bfloat16
        return {
            0: {n: replace(h, dtype=half) if part in n else h for n, h in source[0].items()},
        }

    norms = 4 * 10 * 5
    plan = plan_sync(source, narrow("norm"))
    assert (plan.shared_bytes, plan.copied_bytes) == (total_bytes(source) - norms, norms // 2)
    assert "(12 tensors in place)" in plan.describe()
    plan = plan_sync(source, narrow("layers"))  # left are embedding, head and the last norm
    assert plan.shared == {0: frozenset()}


def test_key_value_heads_on_several_ranks() -> None:
    """An engine with more ranks than key/value heads holds each head more than once."""
    config = model(num_key_value_heads=2)
    source = model_layout(config, [0, 1], {"tp": 2}, torch.float32)
    target = model_layout(config, [0, 1, 2, 3], {"tp": 4}, torch.float32)
    plan = plan_sync(source, target)
    routes = {route for name, _, route in plan.cells() if "layers.0.self_attn.k_proj.w" in name}
    # rank 0 has the first head for rank 1, rank 1 the second for 3, which passes it on
    assert {(r.copies, r.sends, r.casts) for r in routes} == {
        ((0,), ((0, 1),), ()),
        ((), ((1, 3),), ((3, (2, 3)),)),
    }
    shapes = global_shapes(config)
    assert simulate(shapes, plan, source, target) == (plan.gathered_bytes, plan.gathered_bytes)


def test_three_ranks_to_two() -> None:
    """Degrees that do not divide each other: the middle rank's third goes to both."""
    config = model(num_attention_heads=12, num_key_value_heads=12, head_dim=2,
                   intermediate_size=24, vocab_size=36)  # fmt: skip
    source = model_layout(config, [0, 1, 2], {"tp": 3}, torch.float32)
    target = model_layout(config, [0, 1], {"tp": 2}, torch.float32)
    plan = plan_sync(source, target)
    cells = [(c.start[0], c.stop[0], r.sends) for n, c, r in plan.cells() if "embed" in n]
    assert cells == [(0, 12, ()), (12, 18, ((1, 0),)), (18, 24, ()), (24, 36, ((2, 1),))]
    shapes = global_shapes(config)
    assert simulate(shapes, plan, source, target) == (plan.gathered_bytes, plan.gathered_bytes)


def test_stacked_experts_and_a_padded_vocabulary() -> None:
    """Experts below each other in one tensor, from ep 2 to tp 2; seven rows of four and four."""
    config = model()
    ranks = [0, 1]
    source = with_experts(model_layout(config, ranks, {"tp": 2}, torch.float32), ep=2, tp=1)
    target = with_experts(model_layout(config, ranks, {"tp": 2}, torch.float32), ep=1, tp=2)
    assert source[1]["layers.0.experts.up_proj"].shape == (12, 5)
    assert source[1]["layers.0.experts.up_proj"].slices[1].offset == 6
    assert target[1]["layers.0.experts.up_proj"].shape == (12, 5)
    plan = plan_sync(source, target)
    # of two layers each rank lacks half of two experts; it has the seven rows of the vocabulary
    layers = 4 * 2 * 2 * (2 * 3 * 5 + 2 * 5 * 3)
    # and half of two experts in the tensor that has all of them
    assert plan.moved_bytes == plan.gathered_bytes == layers + 4 * 2 * 2 * 3 * 5
    name = "synthetic.1.experts.3.up_proj.weight"
    sends = {c.start: r.sends for n, c, r in plan.cells() if n == name}
    assert sends == {(0, 0): ((1, 0),), (3, 0): ()}
    shapes = global_shapes(config) | SYNTHETIC
    assert simulate(shapes, plan, source, target) == (plan.moved_bytes, plan.moved_bytes)
    # and back, where the vocabulary of the target is padded by a row, on the second rank
    plan = plan_sync(target, source)
    assert simulate(shapes, plan, target, source) == (plan.moved_bytes, plan.moved_bytes)


def test_frozen_tensors_move_in_the_first_sync_alone() -> None:
    source = {
        rank: {n: replace(h, frozen="norm" in n) for n, h in table.items()}
        for rank, table in layout(([0], {})).items()
    }
    target = layout(([1], {}))
    plan = plan_sync(source, target)
    assert plan.gathered_bytes == total_bytes(target)
    names = [
        {span.name for one in some for span in one} for some in (plan.frozen_rounds, plan.rounds)
    ]
    assert all("norm" in name for name in names[0])
    assert len(names[0]) == 5
    assert not any("norm" in name for name in names[1])


def test_layers_that_differ_in_what_is_frozen_are_not_alike() -> None:
    frozen = {"model.layers.1.mlp.down_proj.weight"}
    source = model_layout(model(), [0, 1], {"dp_shard": 2}, torch.float32, frozen=frozen)
    for table in source.values():
        names = {name for name, held in table.items() if held.frozen}
        assert names == {"layers.1.mlp.down.weight"}
    plan = plan_sync(source, layout(([0, 1], {"tp": 2})))
    assert {span.name for one in plan.frozen_rounds for span in one} == frozen
    assert not frozen & {span.name for one in plan.rounds for span in one}


def test_what_is_narrower_at_the_target_travels_so() -> None:
    half = torch.bfloat16
    source, target = ([0, 1], {"dp_shard": 2}), ([1, 2], {"tp": 2})
    for dtypes, expected in (
        ((torch.float32, half), half),
        ((half, torch.float32), half),
        ((half, torch.float16), half),
        ((torch.float32, torch.float32), torch.float32),
    ):
        plan = plan_sync(layout(source, dtypes[0]), layout(target, dtypes[1]))
        assert {cell.dtype for _, cell, _ in plan.cells()} == {expected}
    # two targets that want different dtypes each get their own
    mixed = layout(([2], {})) | layout(([3], {}), half)
    plan = plan_sync(layout(([0], {})), mixed)
    travels = {(cell.dtype, cell.wanting) for _, cell, _ in plan.cells()}
    assert travels == {(torch.float32, (2,)), (half, (3,))}
    assert plan.gathered_bytes == plan.moved_bytes == total_bytes(mixed)


def test_ranks_that_hold_the_same_share_one_table() -> None:
    table = layout(([0, 1, 2, 3, 4, 5, 6, 7], {"dp_replicate": 2, "dp_shard": 2, "tp": 2}))
    assert [len({id(held) for held in table.values()}), len(table)] == [4, 8]
    assert table[0] is table[4]
    assert table[0] is not table[1]


def test_rounds_bound_what_a_rank_stages() -> None:
    tables = layout(([0, 1, 2, 3], {"dp_shard": 4})), layout(([0, 1, 2, 3], {"dp_replicate": 4}))
    for bucket in (600, 6000, 2**20):
        plan = plan_sync(*tables, bucket_bytes=bucket)
        assert plan.slot_bytes == 2 * bucket // 3
        assert simulate(SHAPES, plan, *tables) == (plan.gathered_bytes, plan.gathered_bytes)
        assert (len(plan.rounds) == 1) == (bucket == 2**20)
    # a large tensor is cut into rounds in which every holder has a part
    wide = model(vocab_size=4000)
    pair = [
        model_layout(wide, [0, 1, 2, 3], degrees, torch.float32)
        for degrees in ({"dp_shard": 4}, {"dp_replicate": 4})
    ]
    plan = plan_sync(*pair, bucket_bytes=30000)
    first = {
        root for name, _, route in plan.cells() if "embed" in name for root, _ in route.casts[:1]
    }
    assert first == {0, 1, 2, 3}
    roots = [m.peer for m in rank_rounds(plan, plan.rounds, 0)[0].casts]
    assert set(roots) == {0, 1, 2, 3}


def test_equal_plans_have_equal_digests() -> None:
    tables = layout(([0, 1], {"tp": 2})), layout(([1, 2], {"dp_replicate": 2}))
    again = layout(([0, 1], {"tp": 2})), layout(([1, 2], {"dp_replicate": 2}))
    plan = plan_sync(*tables)
    assert plan.digest == plan_sync(*again).digest
    assert plan.digest != plan_sync(*tables, bucket_bytes=1000).digest


@settings(deadline=None, max_examples=10)
@given(drawn=pairs(8), bucket=st.sampled_from([300, 2**20]))
def test_a_plan_survives_being_written_and_read(
    drawn: tuple[object, WeightLayout, WeightLayout], bucket: int
) -> None:
    plan = plan_sync(drawn[1], drawn[2], bucket_bytes=bucket)
    again = plan_from_json(json.loads(json.dumps(plan.as_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert [rank_rounds(again, again.rounds, rank) for rank in range(8)] == [
        rank_rounds(plan, plan.rounds, rank) for rank in range(8)
    ]


def plan_from_json(given: Mapping[str, Any]) -> SyncPlan:
    """Rebuild a plan from `as_json`, even after the values were written and read as JSON."""
    slot, world_size, shared, copied, gathered, moved = given["bytes"]
    return SyncPlan(
        shared={int(rank): frozenset(names) for rank, names in given["shared"].items()},
        patterns=tuple(
            tuple((_cell(*values), route) for *values, route in cells)
            for cells in given["patterns"]
        ),
        routes=tuple(
            Route(tuple(copies), _pairs(sends), tuple((root, tuple(g)) for root, g in casts))
            for copies, sends, casts in given["routes"]
        ),
        groups=tuple(tuple(group) for group in given["groups"]),
        rounds=_rounds(given["rounds"]),
        frozen_rounds=_rounds(given["frozen_rounds"]),
        slot_bytes=slot,
        world_size=world_size,
        shared_bytes=shared,
        copied_bytes=copied,
        gathered_bytes=gathered,
        moved_bytes=moved,
    )


def _rounds(given: Iterable[Iterable[Iterable[Any]]]) -> tuple[Round, ...]:
    return tuple(tuple(CellRange(*cells) for cells in one) for one in given)


def _pairs(given: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((first, second) for first, second in given)


def _cell(
    start: Iterable[int],
    stop: Iterable[int],
    dtype: str,
    holders: Iterable[int],
    wanting: Iterable[int],
) -> Cell:
    return Cell(tuple(start), tuple(stop), _DTYPES[dtype], tuple(holders), tuple(wanting))


_DTYPES = {
    str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def plan_of_70b(world: World) -> dict[str, float]:
    """From two layouts to a rank's program, in a process that has done nothing else."""
    config = model(
        num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, vocab_size=128256,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    ranks = list(range(512))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    source = model_layout(config, ranks, {"dp_shard": 512}, torch.float32)
    target = model_layout(config, ranks, {"dp_replicate": 64, "tp": 8}, torch.bfloat16)
    plan = plan_sync(source, target, node_size=8)
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert plan.copied_bytes + plan.gathered_bytes == total_bytes(target)
    assert plan.moved_bytes == plan.gathered_bytes
    program = rank_rounds(plan, plan.rounds, 77)
    messages = sum(len(p.sends) + len(p.receives) + len(p.casts) for p in program)
    cells = sum(len(m.cells) for p in program for m in (*p.sends, *p.receives, *p.casts))
    # 723 tensors, of each a piece from every shard, and what this rank's shard sends
    assert cells < 723 * 2 * 512
    assert messages < len(plan.rounds) * 2 * 512
    # the other ranks of its tensor-parallel place; norms are everywhere
    assert len([group for group in plan.groups if 77 in group]) == 1
    # per node, each box enters once: from its owner to one rank of each place
    sends = [send for name, _, r in plan.cells() if "layers.3.mlp.down" in name for send in r.sends]
    assert len(sends) == 512 * 7
    return {"seconds": seconds, "bytes": (peak - before) * 1024}


@pytest.mark.full
def test_a_plan_of_a_70b_model_between_512_ranks() -> None:
    """Every rank makes the plan at start-up: seconds at most, and no list of pairs of ranks."""
    [cost] = run_ranks(plan_of_70b, 1)
    assert cost["seconds"] < 5
    assert 0 < cost["bytes"] < 1e9


def test_models_that_differ_are_refused() -> None:
    source = layout(([0], {}))
    more = model_layout(model(num_hidden_layers=3), [0, 1], {"tp": 2}, torch.float32)
    with pytest.raises(ValueError, match=r"holds 0 of the .* values of model\.layers\.2\."):
        plan_sync(source, more)
    smaller = model_layout(model(vocab_size=20), [0, 1], {"tp": 2}, torch.float32)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight \(20, 10\)"):
        plan_sync(source, smaller)
    holes = {0: {n: h for n, h in source[0].items() if n != "norm.weight"}}
    with pytest.raises(ValueError, match=r"holds 0 of the 10 values of model\.norm\.weight"):
        plan_sync(holes, layout(([0, 1], {"tp": 2})))
