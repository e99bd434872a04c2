"""Sync plans of a policy with an adapter: what is shared, moves once, or moves every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from random_layouts import simulate
from weight_cases import Case, model

from spmdrl.models.adapters import Adapter, adapter_shapes, find_targets, make_adapter
from spmdrl.models.local_shards import WeightLayout
from spmdrl.models.sharding import fused_tensors, global_shapes
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.rounds import Round

MODEL = model(num_key_value_heads=2, vocab_size=36)
BASE = global_shapes(MODEL)


def adapter(*targets: str) -> Adapter:
    return make_adapter(find_targets(MODEL, targets), rank=3, alpha=6)


def layout(
    case: Case, own: Adapter | None, *, blocks: int = 1, source: bool = False
) -> WeightLayout:
    return model_layout(
        *(MODEL, *case, torch.float32),
        adapter=own,
        blocks=blocks,
        frozen=BASE if source else (),
    )


def names(rounds: Iterable[Round]) -> set[str]:
    return {cells.name for one in rounds for cells in one}


def num_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


def test_an_engine_like_the_trainer_uses_base_and_adapter_in_place() -> None:
    own = adapter("all")
    for case in (([0], {}), ([0, 1], {"tp": 2}), ([0, 1], {"dp_replicate": 2})):
        plan = plan_sync(layout(case, own, source=True), layout(case, own))
        assert not plan.moves and not plan.frozen_rounds
        assert plan.shared_bytes >= num_bytes(BASE | adapter_shapes(MODEL, own))


def test_a_base_that_fsdp_cuts_is_used_in_place_and_a_rank_copies_its_part_of_the_adapter() -> None:
    whole = model(num_attention_heads=4, num_key_value_heads=4, vocab_size=36)
    own = make_adapter(find_targets(whole, ["all"]), rank=3, alpha=6)
    ranks, base = [0, 1], global_shapes(whole)
    source = model_layout(
        whole, ranks, {"dp_shard": 2}, torch.float32, blocks=2, frozen=base, adapter=own
    )
    target = model_layout(whole, ranks, {"tp": 2}, torch.float32, adapter=own)
    plan = plan_sync(source, target)
    # the trainer holds the whole adapter, the engine the rows or columns of its matrix
    rows = ("o_proj", "down_proj")
    cut = {
        name
        for name in adapter_shapes(whole, own)
        if ("lora_A" if name.split(".")[-3] in rows else "lora_B") in name
    }
    assert names(plan.rounds) == cut
    assert not plan.frozen_rounds
    assert plan.gathered_bytes == 0
    shapes = base | adapter_shapes(whole, own)
    assert simulate(shapes, plan, source, target) == (0, 0)


def test_on_other_ranks_the_base_moves_once_and_the_adapter_with_every_sync() -> None:
    own = adapter("attention")
    added = adapter_shapes(MODEL, own)
    source = layout(([0, 1], {"dp_shard": 2}), own, source=True)
    target = layout(([2, 3], {"tp": 2}), own)
    plan = plan_sync(source, target)
    assert names(plan.rounds) == set(added)
    assert names(plan.frozen_rounds) == set(BASE)
    received, lacking = simulate(BASE | added, plan, source, target)
    assert received == lacking == plan.moved_bytes
    assert num_bytes(added) <= plan.moved_again_bytes < plan.moved_bytes - num_bytes(BASE) / 2


def test_merged_weights_are_computed_for_every_sync_and_the_rest_is_shared() -> None:
    own = adapter("*.layers.0.self_attn.q_proj", "*.layers.1.mlp.down_proj")
    targets = frozenset(own.targets)
    case: Case = ([0, 1], {"tp": 2})
    source, target = layout(case, own, source=True), layout(case, None)
    plan = plan_sync(source, target, merged=targets)
    fused = {
        local
        for local, tensors in fused_tensors(MODEL).items()
        if not targets.isdisjoint(tensor.name for tensor in tensors)
    }
    assert fused == {"layers.0.attention.qkv.weight", "layers.1.mlp.down.weight"}
    assert plan.shared == dict.fromkeys((0, 1), frozenset(target[0]) - fused)
    assert names(plan.rounds) == targets
    # what lies in one tensor with a target, but is none, is copied once
    prefix = "model.layers.0.self_attn"
    assert names(plan.frozen_rounds) == {f"{prefix}.{x}_proj.weight" for x in "kv"}
    assert simulate(BASE | adapter_shapes(MODEL, own), plan, source, target) == (0, 0)


def test_an_engine_with_weights_of_its_own_gets_the_targets_alone_after_the_first_sync() -> None:
    own = adapter("all")
    targets = frozenset(own.targets)
    source = layout(([0, 1], {"dp_shard": 2}), own, source=True)
    for case in (([0, 1], {"tp": 2}), ([1, 2], {"dp_replicate": 2})):
        target = layout(case, None)
        plan = plan_sync(source, target, merged=targets)
        assert not any(plan.shared.values())
        assert names(plan.rounds) == targets
        assert names(plan.frozen_rounds) == set(BASE) - targets
        received, lacking = simulate(BASE | adapter_shapes(MODEL, own), plan, source, target)
        assert received == lacking == plan.moved_bytes


def test_little_that_is_not_merged_is_not_worth_sharing() -> None:
    """The engine would keep the whole base on the device for an embedding and norms."""
    own = adapter("all")
    targets = frozenset(own.targets)
    case: Case = ([0], {})
    source, target = layout(case, own, source=True), layout(case, None)
    matrices = num_bytes({name: BASE[name] for name in targets})
    assert matrices > num_bytes(BASE) / 2
    plan = plan_sync(source, target, merged=targets)
    assert plan.shared == {0: frozenset()}
    assert plan.copied_bytes == num_bytes(BASE)
    assert plan_sync(source, target, merged=frozenset()).shared_bytes == num_bytes(BASE)
