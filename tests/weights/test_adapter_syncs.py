"""Syncs of a policy with an adapter, on gloo ranks: of the adapter, or of merged weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_weight_sync import Engine
from torch import Tensor
from weight_cases import Case, model, tensors_of

from harness import run_ranks
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.models.adapter_weights import merged as merge
from spmdrl.models.adapters import Adapter, LowRank, adapter_shapes, find_targets, lora_names
from spmdrl.models.sharding import global_shapes
from spmdrl.weights import views
from spmdrl.weights.checksums import first_difference
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import SyncPlan, plan_sync
from spmdrl.weights.sync import WeightSync
from spmdrl.world import World

MODEL = model(num_attention_heads=4, num_key_value_heads=4, vocab_size=36)
BASE = global_shapes(MODEL)
RANKS = {"q_proj": 3, "v_proj": 2, "o_proj": 4, "gate_proj": 2, "down_proj": 3}
ADAPTER = Adapter(
    targets={
        name: LowRank(rank=RANKS[part], scale=RANKS[part] / 2)
        for name in find_targets(MODEL, ["all"])
        if (part := name.split(".")[-2]) in RANKS
    }
)
Values = dict[str, Tensor]


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def wanted(base: Values, own: Values) -> Values:
    """The base with the adapter merged in."""
    found = dict(base)
    for name, target in ADAPTER.targets.items():
        a, b = (own[each] for each in lora_names(name))
        found[name] = base[name] + target.scale * (b @ a)
    return found


@dataclass
class Made:
    """A sync of this rank, with both sides' tensors."""

    plan: SyncPlan
    sync: WeightSync
    engine: Engine | None
    source: dict[str, Tensor]
    source_case: Case
    target_case: Case
    merges: bool
    blocks: int
    dtype: torch.dtype

    def set(self, world: World, base: Values, own: Values) -> None:
        """Give the source's tensors these values, which for the base are bfloat16's."""
        table = layout(self.source_case, True, self.blocks)[world.rank]
        for name, tensor in tensors_of(table, base | own).items():
            self.source[name].copy_(tensor)

    def check(self, world: World, base: Values, own: Values) -> None:
        """Assert what the engine on this rank holds."""
        if self.engine is None:
            return
        held = layout(self.target_case, not self.merges, 1, self.dtype)[world.rank]
        everything = wanted(base, own) if self.merges else base | own
        everything = {name: value.to(self.dtype) for name, value in everything.items()}
        exact = 1e-5 if self.dtype == torch.float32 else 2e-2
        for name, tensor in tensors_of(held, everything).items():
            torch.testing.assert_close(self.engine.held[name], tensor, atol=exact, rtol=exact)


def layout(case: Case, adapted: bool, blocks: int = 1, dtype: torch.dtype = torch.float32):
    own = ADAPTER if adapted else None
    frozen = BASE if adapted else ()
    return model_layout(MODEL, *case, dtype, adapter=own, blocks=blocks, frozen=frozen)


def make(
    world: World,
    cases: tuple[Case, Case],
    *,
    merges: bool,
    blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    memory: DeviceParts | None = None,
) -> Made:
    source = layout(cases[0], True, blocks)
    target = layout(cases[1], not merges, 1, dtype)
    targets = frozenset(ADAPTER.targets) if merges else frozenset()
    plan = plan_sync(source, target, bucket_bytes=1024, merged=targets)
    table, held = source.get(world.rank, {}), target.get(world.rank)
    tensors = {name: torch.zeros(shard.shape) for name, shard in table.items()}
    if memory is not None:
        memory.registry.register("policy", "weights", tensors=tensors.values(), residency="host")
    sync = WeightSync(
        plan,
        table,
        held or {},
        {name: (tensors[name], shard.slices) for name, shard in table.items()},
        engine := None if held is None else Engine(dict(held)),
        world.device,
        None if memory is None else memory.view,
        merged=ADAPTER if merges else None,
    )
    return Made(plan, sync, engine, tensors, *cases, merges, blocks, dtype)


PAIRS: dict[int, list[tuple[Case, Case, int, torch.dtype]]] = {
    2: [
        (([0, 1], {"dp_shard": 2}), ([0, 1], {"tp": 2}), 1, torch.float32),
        (([0, 1], {"dp_shard": 2}), ([0, 1], {"tp": 2}), 2, torch.float32),
        (([0, 1], {"tp": 2}), ([0, 1], {"dp_replicate": 2}), 1, torch.float32),
        (([0], {}), ([1], {}), 1, torch.float32),
        (([0, 1], {"dp_replicate": 2}), ([0, 1], {"dp_replicate": 2}), 1, torch.bfloat16),
    ],
    4: [
        (([0, 1], {"dp_shard": 2}), ([2, 3], {"tp": 2}), 1, torch.float32),
        (([0, 1, 2, 3], {"dp_shard": 2, "tp": 2}), ([1, 2], {"tp": 2}), 1, torch.float32),
        (([1, 3], {"tp": 2}), ([0, 1, 2, 3], {"dp_replicate": 4}), 1, torch.bfloat16),
    ],
}


def follow(world: World, merges: bool) -> list[list[int]]:
    moved = []
    base = values(BASE, 0)
    for first, second, blocks, dtype in PAIRS[world.size]:
        made = make(world, (first, second), merges=merges, blocks=blocks, dtype=dtype)
        found = []
        for seed in (1, 2):
            own = values(adapter_shapes(MODEL, ADAPTER), seed)
            if world.rank in first[0]:
                made.set(world, base, own)
            found.append(made.sync.moved_bytes)
            made.sync.run()
            made.check(world, base, own)
            assert made.sync.sums.differing() == []
            assert first_difference(made.sync) is None
        moved.append(found)
    return moved


@pytest.mark.parametrize("merges", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_engines_follow_a_policy_with_an_adapter(size: int, merges: bool) -> None:
    moved = run_ranks(follow, size, merges)[0]
    moving = adapter_shapes(MODEL, ADAPTER)
    if merges:
        moving = {name: BASE[name] for name in ADAPTER.targets}
    once = 4 * sum(torch.Size(shape).numel() for shape in moving.values())
    # per pair: how often the moving tensors arrive; FSDP cuts a matrix and never an adapter
    most = {
        (2, False): [0, 0, 1, 1, 0],
        (2, True): [0.5, 0, 1, 1, 0],
        (4, False): [1.6, 1.6, 3],
        (4, True): [1, 1, 3],
    }[size, merges]
    for (first, later), count in zip(moved, most, strict=True):
        assert later <= first
        assert later <= count * once
        assert later >= 0.4 * count * once


def from_the_host(world: World) -> None:
    """The source's storages are freed: values are merged from their copies on the host."""
    memory = DeviceParts(world.device)
    cases: tuple[Case, Case] = (([0, 1], {"dp_shard": 2}), ([0, 1], {"tp": 2}))
    made = make(world, cases, merges=True, memory=memory)
    base, own = values(BASE, 0), values(adapter_shapes(MODEL, ADAPTER), 1)
    made.set(world, base, own)
    memory.settle()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in made.source.values())
    made.sync.run()
    made.check(world, base, own)
    assert made.sync.sums.differing() == []
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in made.source.values())


def test_a_source_that_is_away_is_merged_on_the_host() -> None:
    run_ranks(from_the_host, 2)


def alive_at_once(world: World) -> int:
    """Most merged tensors that exist at once in a sync whose cells are all local copies."""
    made = make(world, (([0], {}), ([0], {})), merges=True)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(*given: Any) -> Tensor:
        nonlocal most
        found = merge(*given)
        alive.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in alive))
        return found

    base, own = values(BASE, 0), values(adapter_shapes(MODEL, ADAPTER), 1)
    made.set(world, base, own)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(views, "merged", watched)
        made.sync.run()
    made.check(world, base, own)
    assert len(alive) > 4
    return most


def test_merged_matrices_do_not_pile_up_where_they_are_copied() -> None:
    assert run_ranks(alive_at_once, 1) == [2]


def spoiled(world: World) -> tuple[list[str], str | None]:
    """One value of a merged matrix is changed in the engine after a sync."""
    made = make(world, (([0], {}), ([1], {})), merges=True)
    base, own = values(BASE, 0), values(adapter_shapes(MODEL, ADAPTER), 1)
    if world.rank == 0:
        made.set(world, base, own)
    made.sync.run()
    if made.engine is not None:
        made.engine.held["layers.1.mlp.down.weight"][3, 4] += 1
    return made.sync.sums.differing(), first_difference(made.sync)


def test_a_merged_tensor_that_differs_is_named() -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    for names, text in run_ranks(spoiled, 2):
        assert names == [name]
        assert text is not None
        assert text.startswith(f"{name}[") and text.endswith("is not what the policy holds")


def test_a_merge_is_computed_once_for_boxes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(*given: object) -> Tensor:
        nonlocal count
        count += 1
        return merge(*given)

    monkeypatch.setattr(views, "merged", counted)
    table = layout(([0], {}), True)[0]
    made = tensors_of(table, values(BASE | adapter_shapes(MODEL, ADAPTER), 0))
    own = {name: (made[name], held.slices) for name, held in table.items()}
    reader = views.MergedReader(ADAPTER, own, lambda tensor: tensor)
    qkv, out = (made[f"layers.0.attention.{name}.weight"] for name in ("qkv", "out"))
    plain = made["layers.0.input_norm.weight"]
    assert reader(plain) is plain and count == 0
    assert reader(qkv) is reader(qkv) and count == 1
    reader(out), reader(qkv)
    assert count == 2
    reader(made["layers.1.attention.qkv.weight"]), reader(qkv)
    assert count == 4
    first = reader(qkv).clone()
    made["layers.0.attention.qkv.lora_A"].mul_(2)
    reader.forget()
    assert not torch.equal(reader(qkv), first)
    assert count == 5
