"""`WeightSync` and `full_tensors` on gloo ranks, and the layout against what FSDP2 holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_layouts import pairs
from torch import Tensor
from weight_cases import UNTOUCHED, Case, Degrees, model, numbered, tensors_of, values

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalShard, Table
from spmdrl.training.weights import build_decoder, make_leaves
from spmdrl.weights.checksums import checksum, first_difference
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.sync import WeightSync
from spmdrl.weights.views import full_tensors
from spmdrl.world import World
from sweeps import swept


@dataclass
class Engine:
    """Holds tensors by local name, as the native engine does."""

    shapes: dict[str, LocalShard]
    device: torch.device | str = "cpu"
    held: dict[str, Tensor] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        self.held[local_name] = tensor
        self.adopted.append(local_name)

    def allocate(self, local_name: str) -> Tensor:
        here = self.shapes[local_name]
        self.held[local_name] = torch.full(
            here.shape, UNTOUCHED, dtype=here.dtype, device=self.device
        )
        return self.held[local_name]


PAIRS: dict[int, list[tuple[Case, Case, torch.dtype | None]]] = {
    # None: float32, but for norms
    2: [
        (([0, 1], {"dp_shard": 2}), ([0, 1], {"tp": 2}), torch.float32),
        (([0, 1], {"tp": 2}), ([0, 1], {"dp_replicate": 2}), torch.float32),
        (([0], {}), ([1], {}), torch.float32),
        (([0, 1], {"dp_replicate": 2}), ([0, 1], {"dp_replicate": 2}), torch.float32),
        (([0, 1], {"dp_shard": 2}), ([0], {}), torch.bfloat16),
        (([0, 1], {"tp": 2}), ([0, 1], {"tp": 2}), None),
    ],
    4: [
        (([0, 1], {"dp_shard": 2}), ([2, 3], {"tp": 2}), torch.float32),
        (([0, 1, 2, 3], {"dp_shard": 2, "tp": 2}), ([1, 2, 3], {"dp_replicate": 3}), torch.float32),
        (([1, 3], {"tp": 2}), ([0, 1, 2, 3], {"tp": 4}), torch.float32),
    ],
}


def with_narrow_norms(table: Table) -> Table:
    half = torch.bfloat16
    return {n: replace(held, dtype=half) if "norm" in n else held for n, held in table.items()}


def sync(world: World) -> list[int]:
    adopted = []
    for source_case, target_case, dtype in PAIRS[world.size]:
        config = model()
        source = model_layout(config, *source_case, torch.float32)
        target = model_layout(config, *target_case, dtype or torch.float32)
        if dtype is None:
            target = {rank: with_narrow_norms(table) for rank, table in target.items()}
        table = source.get(world.rank, {})
        tensors = tensors_of(table, values(config))
        own = {name: (tensors[name], held.slices) for name, held in table.items()}
        wanted = target.get(world.rank)
        engine = None if wanted is None else Engine(dict(wanted))
        plan = plan_sync(source, target, bucket_bytes=1024)
        weight_sync = WeightSync(plan, table, wanted or {}, own, engine, world.device)
        for salt in (0, 1):
            for name, tensor in tensors_of(table, values(config, salt)).items():
                tensors[name].copy_(tensor)
            weight_sync.run()
            if engine is not None and wanted is not None:
                for name, tensor in tensors_of(wanted, values(config, salt)).items():
                    assert torch.equal(engine.held[name], tensor), (name, salt)
        assert first_difference(weight_sync) is None
        adopted.append(0 if engine is None else len(engine.adopted))
        if engine is not None:
            for name in engine.adopted:
                assert engine.held[name].data_ptr() == tensors[name].data_ptr()
    return adopted


def test_engines_follow_the_trainer_on_two_ranks() -> None:
    num_tensors = len(model_layout(model(), [0], {}, torch.float32)[0])
    # norms alone, or with half of embedding and head, are not worth it
    assert run_ranks(sync, 2) == [[0, 0, 0, num_tensors, 0, num_tensors - 5]] * 2


def test_engines_follow_the_trainer_on_four_ranks() -> None:
    results = run_ranks(sync, 4)
    assert results == [[0] * len(PAIRS[4])] * 4


def assemble(world: World, case: Case, to_rank: int) -> dict[str, Tensor]:
    config = model()
    source = model_layout(config, *case, torch.float32)
    table = source.get(world.rank, {})
    tensors = tensors_of(table, values(config))
    held = {name: (tensors[name], here.slices) for name, here in table.items()}
    whole = dict(full_tensors(source, held or None, to_rank=to_rank))
    assert sorted(whole) == sorted(values(config))
    if world.rank != to_rank:
        assert set(whole.values()) == {None}
        return {}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


@pytest.mark.parametrize(
    ("size", "case", "to_rank"),
    [
        (1, ([0], {}), 0),
        (3, ([1, 2], {"dp_shard": 2}), 0),
        (4, ([0, 1, 2, 3], {"dp_shard": 2, "tp": 2}), 3),
    ],
)
def test_whole_tensors_come_to_one_rank(size: int, case: Case, to_rank: int) -> None:
    whole = run_ranks(assemble, size, case, to_rank)[to_rank]
    for name, expected in values(model()).items():
        assert torch.equal(whole[name], expected), name


EXPERTS = model(architectures=["MixtralForCausalLM"], num_local_experts=4, num_experts_per_tok=2)


def held_by_fsdp(world: World, model: ModelConfig, cases: list[Degrees]) -> list[dict[str, Any]]:
    """Local shapes of the decoder's parameters as FSDP2 cut them."""
    found = []
    for case in cases:
        degrees, blocks = without_blocks(case)
        mesh = Mesh("policy", list(range(world.size)), degrees, "cpu")
        decoder = build_decoder(
            mesh, model, torch.float32, world.device, trainable=True, blocks=blocks
        )
        leaves = make_leaves(decoder, mesh)
        found.append(
            {
                leaf.name: LocalShard(
                    shape=tuple(leaf.weight.shape), dtype=leaf.weight.dtype, slices=leaf.slices
                )
                for leaf in leaves
            }
        )
    return found


def without_blocks(given: Degrees) -> tuple[Degrees, int]:
    """Degrees, and the blocks of fused projections, which stand among them in the cases below."""
    return {axis: n for axis, n in given.items() if axis != "blocks"}, given.get("blocks", 1)


@pytest.mark.parametrize(
    ("size", "shape", "cases"),
    [
        (
            2,
            model(),
            [
                {"dp_shard": 2},
                {"tp": 2},
                {"dp_replicate": 2},
                {"cp": 2},
                {"dp_shard": 2, "blocks": 2},
            ],
        ),
        (2, EXPERTS, [{"dp_shard": 2, "ep": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2}]),
        (
            4,
            EXPERTS,
            [
                {"dp_shard": 4, "ep": 2},
                {"dp_shard": 2, "tp": 2, "ep": 4},
                {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
                {"dp_shard": 2, "cp": 2, "ep": 4},
                {"dp_replicate": 2, "tp": 2},
            ],
        ),
        (
            4,
            model(),
            [
                {"dp_shard": 4},
                {"dp_shard": 2, "cp": 2},
                {"dp_replicate": 2, "dp_shard": 2, "blocks": 2},
                {"dp_shard": 2, "tp": 2},
                {"dp_replicate": 2, "dp_shard": 2},
            ],
        ),
    ],
)
def test_the_layout_is_what_fsdp_holds(size: int, shape: ModelConfig, cases: list[Degrees]) -> None:
    found = run_ranks(held_by_fsdp, size, shape, cases)
    for number, case in enumerate(cases):
        degrees, blocks = without_blocks(case)
        layout = model_layout(shape, list(range(size)), degrees, torch.float32, blocks=blocks)
        for rank in range(size):
            assert found[rank][number] == layout[rank], (case, rank)
    # four shards of 10 rows are not alike: the last has one row; norms are not cut
    if size == 4 and shape.moe is None:
        for name, expected in (
            ("layers.0.mlp.down.weight", [3, 3, 3, 1]),
            ("norm.weight", [10] * 4),
        ):
            assert [held[name].shape[0] for held, *_ in found] == expected


FEW = [(3, 4)]


def random_syncs(world: World, count: int) -> int:
    """Random layouts, drawn alike on every rank; the sources lie on the host in half of them."""
    moved = 0

    @settings(
        derandomize=True, database=None, deadline=None, max_examples=count, phases=[Phase.generate]
    )
    @given(drawn=pairs(world.size), bucket=st.sampled_from([400, 5000, 10**6]))
    def run(drawn: Any, bucket: int) -> None:
        nonlocal moved
        shapes, source, target = drawn
        plan = plan_sync(source, target, node_size=2, bucket_bytes=bucket)
        table, wanted = source.get(world.rank, {}), target.get(world.rank)
        made = tensors_of(table, numbered(shapes), math.nan)
        tensors = {name: tensor.to(world.device) for name, tensor in made.items()}
        own = {name: (tensors[name], held.slices) for name, held in table.items()}
        engine = None if wanted is None else Engine(dict(wanted), world.device)
        sync = WeightSync(plan, table, wanted or {}, own, engine, world.device)
        narrow = next(held.dtype for table in source.values() for held in table.values())
        for salt in (0, 1):
            for name, tensor in tensors_of(table, numbered(shapes, salt), math.nan).items():
                tensors[name].copy_(tensor)
            sync.run()
            assert first_difference(sync) is None
            assert sync.sums.differing() == []
            whole = {n: t.to(narrow) for n, t in numbered(shapes, salt).items()}
            for name, tensor in tensors_of(wanted or {}, whole, UNTOUCHED).items():
                assert engine is not None
                if name not in engine.adopted:
                    assert torch.equal(engine.held[name].cpu(), tensor), (name, salt)
        moving = list(plan.cells())
        for name, cell, _ in moving[:: max(1, len(moving) // 3)]:
            # one value of one cell on the last rank that has it
            last = (slice(-1, None),) * len(cell.start)
            spoiled = [view[last] for view in sync.views.target(name, cell)[-1:]]
            is_here = world.rank == cell.wanting[-1]
            for value in spoiled if is_here else []:
                value *= 2
            assert sync.sums.differing() == [name]
            for value in spoiled if is_here else []:
                value /= 2
        assert sync.staging_bytes <= 3 * max(plan.slot_bytes, 16 * 500)
        moved += plan.moved_bytes

    run()
    return moved


@pytest.mark.parametrize(
    ("size", "count"), swept([(2, 4), (3, 4), (4, 8), (2, 10), (3, 10), (4, 30)], FEW)
)
def test_random_layouts_on_gloo_ranks(size: int, count: int) -> None:
    assert run_ranks(random_syncs, size, count, timeout_s=300)[0] > 0


def from_the_host(world: World) -> None:
    """The source's storages are freed: the sync reads their copies on the host."""
    config = model()
    source = model_layout(config, [0, 1], {"dp_shard": 2}, torch.float32)
    target = model_layout(config, [0, 1], {"tp": 2}, torch.bfloat16)
    table = source[world.rank]
    tensors = tensors_of(table, values(config))
    own = {name: (tensors[name], held.slices) for name, held in table.items()}
    memory = DeviceParts(world.device)
    memory.registry.register("policy", "weights", tensors=tensors.values(), residency="host")
    engine = Engine(dict(target[world.rank]))
    plan = plan_sync(source, target)
    sync = WeightSync(plan, table, target[world.rank], own, engine, world.device, memory.view)
    memory.settle()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors.values())
    sync.run()
    assert first_difference(sync) is None
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors.values())
    for name, tensor in tensors_of(target[world.rank], values(config)).items():
        assert torch.equal(engine.held[name], tensor), name


def test_a_source_that_is_away_is_read_from_the_host() -> None:
    run_ranks(from_the_host, 2)


def differing(world: World) -> str | None:
    """One value of one tensor is changed on rank 1 after a sync."""
    config = model()
    source = model_layout(config, [0], {}, torch.float32)
    target = model_layout(config, [0, 1], {"dp_replicate": 2}, torch.float32)
    table = source.get(world.rank, {})
    tensors = tensors_of(table, values(config))
    own = {name: (tensors[name], held.slices) for name, held in table.items()}
    engine = Engine(dict(target[world.rank]))
    plan = plan_sync(source, target)
    sync = WeightSync(plan, table, target[world.rank], own, engine, world.device)
    sync.run()
    assert first_difference(sync) is None
    if world.rank == 1:
        engine.held["layers.1.mlp.down.weight"][3, 4] += 1
        engine.held["norm.weight"][0] += 1
    return first_difference(sync)


def test_the_first_differing_tensor_is_named_on_every_rank() -> None:
    [message] = set(run_ranks(differing, 2))
    name = "model.layers.1.mlp.down_proj.weight[0:10, 0:20]"
    assert message == f"{name} on rank 1 is not what the policy holds"


def other_plans(world: World) -> str:
    config = model()
    layout = model_layout(config, [0, 1], {"dp_replicate": 2}, torch.float32)
    plan = plan_sync(layout, layout, bucket_bytes=1000 + world.rank)
    with pytest.raises(ValueError, match="weight sync: ranks") as raised:
        WeightSync(plan, {}, {}, {}, None, world.device)
    return str(raised.value)


def test_ranks_with_other_plans_are_refused() -> None:
    messages = set(run_ranks(other_plans, 2))
    assert len(messages) == 1
    assert "ranks [1] made other plans than rank 0" in messages.pop()


def test_checksums_see_values_and_places() -> None:
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        one = values.to(dtype)
        changed = one.clone()
        changed[70_000] = torch.nextafter(one[70_000], one[70_000] + 1)
        swapped = one.clone()
        swapped[[1, 2]] = one[[2, 1]]
        blocks = one.clone()
        blocks[:65536], blocks[65536:131072] = one[65536:131072], one[:65536]
        sums = {checksum(tensor) for tensor in (one, changed, swapped, blocks)}
        assert len(sums) == 4
        assert checksum(one.reshape(3, -1)) == checksum(one) == checksum(one.clone())
    assert checksum(torch.empty(0)) == 0
