"""Sync plans, executed by hand on dicts of tensors: no process takes part."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from weight_cases import Case, model, tensors_of, values

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import WeightLayout, local_box, model_layout, overlap, within
from spmdrl.weights.plan import key, plan_sync

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
]


def layout(case: Case, dtype: torch.dtype = torch.float32) -> WeightLayout:
    return model_layout(model(), case[0], case[1], dtype)


def total_bytes(table: WeightLayout) -> int:
    return sum(held.num_bytes for names in table.values() for held in names.values())


def execute(source: WeightLayout, target: WeightLayout) -> None:
    """Do what the plan says and compare every target tensor with what it must hold."""
    plan = plan_sync(source, target)
    whole = values(model())
    has = {rank: tensors_of(table, whole) for rank, table in source.items()}
    pieces = {
        rank: {key(s) for held in table.values() for s in held.slices}
        for rank, table in source.items()
    }
    got = {
        rank: {
            name: has[rank][name]
            if name in plan.shared[rank]
            else torch.full(held.shape, float("nan"), dtype=held.dtype)
            for name, held in table.items()
        }
        for rank, table in target.items()
    }
    for transfer in plan.transfers:
        piece = transfer.piece
        [sent] = [s for s in source[transfer.owner][transfer.local_name].slices if key(s) == piece]
        value = local_box(has[transfer.owner][transfer.local_name], sent)
        for rank, table in target.items():
            # a rank has the value when it receives it or holds the very slice
            if rank not in transfer.receivers and piece not in pieces.get(rank, ()):
                continue
            for name, held in table.items():
                for s in held.slices if name not in plan.shared[rank] else ():
                    if s.name == piece.name and (ranges := overlap(piece, s)) is not None:
                        box = local_box(got[rank][name], s)
                        box[within(ranges, s)] = value[within(ranges, piece)]
    for rank, table in target.items():
        for name, expected in tensors_of(table, whole).items():
            assert torch.equal(got[rank][name], expected), (rank, name)
    moved = plan.shared_bytes + plan.copied_bytes + plan.gathered_bytes
    assert moved == total_bytes(target)


@pytest.mark.parametrize("source", CASES, ids=str)
def test_every_target_slice_is_right(source: Case) -> None:
    for target in CASES:
        execute(layout(source), layout(target))


def test_equal_layouts_share_everything_and_move_nothing() -> None:
    for case in CASES:
        plan = plan_sync(layout(case), layout(case))
        assert (plan.copied_bytes, plan.gathered_bytes, plan.transfers) == (0, 0, ())
        assert plan.shared_bytes == total_bytes(layout(case))
        assert all(plan.shared[r] == set(names) for r, names in layout(case).items())


def test_replicas_need_no_message() -> None:
    two = layout(([0, 1], {"dp_replicate": 2}))
    plan = plan_sync(layout(([0, 1, 2, 3], {"dp_replicate": 4})), two)
    assert (plan.copied_bytes, plan.gathered_bytes) == (0, 0)
    # another dtype on the same rank: a copy of each tensor, still no message
    plan = plan_sync(two, layout(([0, 1], {"dp_replicate": 2}), torch.bfloat16))
    assert plan.shared_bytes == plan.gathered_bytes == 0
    assert plan.copied_bytes == total_bytes(two) // 2
    assert all(transfer.receivers == () for transfer in plan.transfers)


def test_bytes_by_hand_from_one_rank_to_two() -> None:
    plan = plan_sync(layout(([0], {})), layout(([0, 1], {"tp": 2})))
    whole = {name: 4 * t.numel() for name, t in values(model()).items()}
    norms = sum(n for name, n in whole.items() if "norm" in name)
    halves = (sum(whole.values()) - norms) // 2
    # rank 0 shares the norms, copies its halves; rank 1 receives its halves and the norms
    assert (plan.shared_bytes, plan.copied_bytes) == (norms, halves)
    assert plan.gathered_bytes == halves + norms
    assert f"copied {halves:,} bytes" in plan.describe()
    assert "(5 tensors in place)" in plan.describe()


def test_key_value_heads_on_several_ranks() -> None:
    """An engine with more ranks than key/value heads holds each head more than once."""
    config = model(num_key_value_heads=2)
    source = model_layout(config, [0, 1], {"tp": 2}, torch.float32)
    target = model_layout(config, [0, 1, 2, 3], {"tp": 4}, torch.float32)
    plan = plan_sync(source, target)
    names = {t.piece.name for t in plan.transfers}
    assert "model.layers.0.self_attn.k_proj.weight" in names
    moved = plan.shared_bytes + plan.copied_bytes + plan.gathered_bytes
    assert moved == total_bytes(target)


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
        assert {t.dtype for t in plan.transfers} == {expected}
    # of two targets that want different dtypes neither may lose digits
    mixed = layout(([2], {})) | layout(([3], {}), half)
    plan = plan_sync(layout(([0], {})), mixed)
    assert {t.dtype for t in plan.transfers} == {torch.float32}
    assert plan.gathered_bytes == total_bytes(mixed)


def test_ranks_that_hold_the_same_share_one_table() -> None:
    table = layout(([0, 1, 2, 3, 4, 5, 6, 7], {"dp_replicate": 2, "dp_shard": 2, "tp": 2}))
    assert [len({id(held) for held in table.values()}), len(table)] == [4, 8]
    assert table[0] is table[4]
    assert table[0] is not table[1]


def test_a_plan_between_512_ranks_takes_no_pairs_of_ranks() -> None:
    """Every rank makes the plan at start-up: seconds at most."""
    config = model(
        num_hidden_layers=4, hidden_size=1024, intermediate_size=2048, vocab_size=4096,
        num_attention_heads=16, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    ranks = list(range(512))
    begun = time.process_time()
    source = model_layout(config, ranks, {"dp_shard": 512}, torch.float32)
    target = model_layout(config, ranks, {"dp_replicate": 64, "tp": 8}, torch.bfloat16)
    plan = plan_sync(source, target)
    plan.describe(), plan.tensor_lines(target)
    seconds = time.process_time() - begun
    assert seconds < 5
    assert plan.copied_bytes + plan.gathered_bytes == total_bytes(target)
    # a shard of rows of `down` goes to every other rank, whatever columns it takes
    [down] = [t for t in plan.transfers if t.local_name == "layers.3.mlp.down.weight"][5:6]
    assert (down.owner, down.piece.start) == (5, (10, 0))
    assert down.receivers == tuple(r for r in ranks if r != 5)
    # a norm of 1024 rows, two on each rank
    norms = [t for t in plan.transfers if t.local_name == "norm.weight"]
    assert [t.piece.start[0] for t in norms] == list(range(0, 1024, 2))


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


def test_overlap_and_within_by_hand() -> None:
    a = Slice(name="w", shape=(8, 8), start=(2, 0), stop=(6, 4), offset=3)
    b = replace(a, start=(4, 2), stop=(8, 8), offset=0)
    ranges = overlap(a, b)
    assert ranges == ((4, 6), (2, 4))
    assert within(ranges, a) == (slice(2, 4), slice(2, 4))
    assert within(ranges, b) == (slice(0, 2), slice(0, 2))
    assert overlap(a, replace(b, start=(6, 0))) is None
    assert math.prod(a.size) == a.numel
