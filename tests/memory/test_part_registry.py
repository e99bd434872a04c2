"""What is on the device before, during and after calls, measured from the tensors themselves."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator

import pytest
import torch
from memory_cases import CPU, ROLES, moved, values, watch, weigh
from torch import Tensor, nn

from harness import run_ranks
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.storages import is_resident, live_bytes
from spmdrl.world import World

MB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> Iterator[None]:
    """What there was before these tests is left out where all objects are looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def arenas() -> dict[int, int]:
    """Address -> bytes of all uint8 tensors that live: here only host arenas are of that dtype."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.dtype == torch.uint8]
    return {t.data_ptr(): t.nbytes for t in found}


def living() -> int:
    """Bytes of all tensors of this process, arenas apart."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return live_bytes([t for t in found if t.dtype != torch.uint8])


def test_content_survives_many_round_trips():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator)
    tensors = [
        bits.to(torch.int32).view(torch.float32),  # NaNs of all kinds among them
        values(33).to(torch.bfloat16),
        torch.tensor(7.0),
        values(12).view(3, 4).t(),
        torch.tensor([True, False, True]),
        nn.Parameter(values(2 * MB)),
    ]
    before = [tensor.detach().clone().contiguous().view(-1).view(torch.int8) for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    alive = weigh(*tensors)
    memory = DeviceParts(CPU, staging_bytes=8192)
    memory.registry.register("policy", "weights", tensors=tensors, residency="host")
    memory.registry.register("reward", "weights", tensors=[values(5)], residency="host")
    for _ in range(5):
        memory.prepare([("reward", "weights")])
        assert alive() == 0
        memory.prepare([("policy", "weights")])
        after = [tensor.detach().contiguous().view(-1).view(torch.int8) for tensor in tensors]
        assert all(map(torch.equal, after, before))
    assert [tensor._version for tensor in tensors] == versions


def test_what_a_call_wrote_is_what_comes_back():
    weights, other = values(100), values(100)
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[weights], residency="host")
    memory.registry.register("reward", "weights", tensors=[other], residency="host")
    for step in range(3):
        memory.prepare([("policy", "weights")])
        weights.fill_(step)
        memory.prepare([("reward", "weights")])
        memory.prepare([("policy", "weights")])
        assert weights.tolist() == [step] * 100


def test_views_and_tied_tensors_are_one_storage():
    base = values(64)
    tied, view = nn.Parameter(base), base.view(8, 8)[2:, ::2]
    expected = view.clone()
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[tied, view, base], residency="host")
    assert memory.registry.resident_bytes() == 256
    memory.settle()
    assert moved(memory) == (256, 0)
    here = watch(tied, view, base)
    assert here() == [False] * 3
    memory.prepare([("policy", "weights")])
    assert torch.equal(view, expected) and view.data_ptr() == tied.data_ptr() + 4 * 16
    tied.data[16] = 5.0
    assert view[0, 0] == 5.0


def test_exactly_what_is_needed_is_resident_and_calls_in_a_row_move_nothing():
    held = {role: [values(100 + i), values(10)] for i, role in enumerate(ROLES)}
    alive = weigh(*(tensor for tensors in held.values() for tensor in tensors))
    of = {role: 4 * (110 + i) for i, role in enumerate(ROLES)}
    here = watch(*(tensors[0] for tensors in held.values()))
    memory = DeviceParts(CPU)
    for role, tensors in held.items():
        memory.registry.register(role, "weights", tensors=tensors, residency="host")
    memory.settle()
    assert memory.registry.resident_bytes() == 0
    memory.take_metrics()
    for role in (*ROLES, *ROLES):
        memory.prepare([(role, "weights")])
        assert here() == [role == other for other in ROLES]
        assert memory.registry.resident_bytes() == alive() == of[role]
        assert moved(memory)[1] == of[role]
        memory.prepare([(role, "weights")])
        assert moved(memory) == (0, 0)


def high_water(world: World, num_bytes: int, policy: str) -> tuple[int, int]:
    """Resident memory of this process, at most: (while roles are built, while they take turns),
    above what it was before.
    """
    status = "/proc/self/status"

    def read(key: str) -> int:
        with open(status, encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    before = read("VmHWM")
    assert before - read("VmRSS") < 8 * MB
    memory = DeviceParts(world.device)
    for role in ROLES:
        tensor = torch.ones(num_bytes // 4)
        memory.registry.register(role, "weights", tensors=[tensor], residency=policy)
        memory.settle()
    built = read("VmHWM") - before
    for role in ROLES * 2:
        memory.prepare([(role, "weights")])
    return built, read("VmHWM") - before


def test_the_peak_of_four_roles_is_one_role():
    size = 64 * MB
    built, run = run_ranks(high_water, 1, size, "host")[0]
    arenas_and_one = 5 * size
    assert abs(built - arenas_and_one) < size // 4
    assert abs(run - arenas_and_one) < size // 4  # onload before offload would add another role
    kept = run_ranks(high_water, 1, size, "keep")[0]
    assert abs(kept[1] - 4 * size) < size // 4


def test_the_live_tensors_of_the_process_say_the_same():
    start = living()
    memory = DeviceParts(CPU)
    sizes = {role: 1000 * (i + 1) for i, role in enumerate(ROLES)}
    models = {role: nn.Linear(size, 1, bias=False) for role, size in sizes.items()}
    assert living() - start == 4 * sum(sizes.values())
    for role, model in models.items():
        memory.registry.register(
            role, "weights", tensors=list(model.parameters()), residency="host"
        )
    memory.settle()
    assert living() == start
    for role, size in sizes.items():
        memory.prepare([(role, "weights")])
        assert living() - start == 4 * size
    assert memory.take_metrics()["peak_resident_bytes"] == 4 * sum(sizes.values())
    memory.prepare([("value", "weights")])
    memory.prepare([("policy", "weights")])
    assert memory.take_metrics()["peak_resident_bytes"] == 4 * sizes["value"]


def test_the_arena_is_made_at_the_first_offload_and_used_for_ever():
    before = arenas()
    memory = DeviceParts(CPU)
    memory.registry.register(
        "policy", "weights", tensors=[values(300), values(50)], residency="host"
    )
    assert arenas() == before
    memory.settle()
    made = arenas()
    assert sorted(made.values()) == sorted([*before.values(), 1536 + 512])
    for _ in range(3):
        memory.prepare([("policy", "weights")])
        memory.settle()
    assert arenas() == made


def test_a_part_that_the_plan_keeps_gives_its_arena_back():
    before = arenas()
    weights = values(300)
    expected = weights.clone()
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[weights])
    memory.settle()
    assert len(arenas()) == len(before) + 1
    memory.registry.apply({("policy", "weights"): "keep"})
    memory.prepare([("policy", "weights")])
    memory.settle()
    assert torch.equal(weights, expected)
    assert arenas() == before


def test_frozen_parts_are_copied_to_the_host_once():
    weights = values(100)
    expected = weights.clone()
    memory = DeviceParts(CPU)
    memory.registry.register(
        "reference", "weights", tensors=[weights], residency="host", frozen=True
    )
    found = []
    for _ in range(3):
        memory.settle()
        memory.prepare([("reference", "weights")])
        assert torch.equal(weights, expected)
        found.append(moved(memory))
    assert found == [(400, 400), (0, 400), (0, 400)]


def test_a_shared_storage_follows_its_owner():
    weights, own = values(100), values(10)
    expected = weights.clone()
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[weights], residency="host")
    memory.settle()
    # adopted while it is away, as when the engine is built after the trainer was settled
    adopted = nn.Parameter(weights.detach(), requires_grad=False)
    here = watch(weights, adopted, own)
    memory.registry.register("rollout", "weights", tensors=[adopted, own], residency="keep")
    memory.registry.register("reward", "weights", tensors=[values(7)], residency="host")
    parts = {part.key: part for part in memory.registry.parts()}
    assert parts["rollout", "weights"].num_bytes == 40
    assert parts["rollout", "weights"].rests_on == (("policy", "weights"),)
    memory.prepare([("rollout", "weights")])
    assert here() == [True] * 3
    assert torch.equal(adopted, expected)
    moved(memory)
    memory.prepare([("policy", "weights")])
    assert moved(memory) == (0, 0)
    memory.prepare([("reward", "weights")])
    assert here() == [False, False, True]
    with memory.resident("rollout", "weights"):
        memory.prepare([("reward", "weights")])
        assert here() == [True] * 3


def test_pinned_parts_stay_until_the_last_pin_goes():
    held = {role: values(50, i) for i, role in enumerate(ROLES)}
    memory = DeviceParts(CPU)
    for role, tensor in held.items():
        memory.registry.register(role, "weights", tensors=[tensor], residency="host")
    memory.settle()

    def here() -> list[str]:
        return [role for role in ROLES if is_resident(held[role])]

    with memory.resident("policy", "weights"):
        assert here() == ["policy"]
        memory.prepare([("reward", "weights")])
        assert here() == ["policy", "reward"]
        with memory.resident("policy", "weights"), memory.resident("value", "weights"):
            assert here() == ["policy", "value"]
            memory.settle()
            assert here() == ["policy", "value"]
        memory.prepare([("reference", "weights")])
        assert here() == ["policy", "reference"]
    assert here() == ["policy", "reference"]
    memory.prepare([("reference", "weights")])
    assert here() == ["reference"]
    with pytest.raises(KeyError), memory.resident("policy", "weights"):
        raise KeyError
    memory.prepare([("reference", "weights")])
    assert here() == ["reference"]
    with pytest.raises(ValueError, match="name the parts to hold"), memory.resident("policy"):
        pass


def test_metrics_count_time_and_rate():
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[values(MB)], residency="host")
    assert memory.take_metrics() == {
        "peak_resident_bytes": 4.0 * MB,
        "to_host_bytes": 0.0,
        "to_host_seconds": 0.0,
        "to_host_gb_per_s": 0.0,
        "to_device_bytes": 0.0,
        "to_device_seconds": 0.0,
        "to_device_gb_per_s": 0.0,
    }
    memory.settle()
    memory.prepare([("policy", "weights")])
    memory.settle()
    found = memory.take_metrics()
    assert found["to_host_bytes"] == 2 * found["to_device_bytes"] == 8.0 * MB
    for way in ("to_host", "to_device"):
        assert 0 < found[f"{way}_seconds"] < 10
        rate = found[f"{way}_bytes"] / found[f"{way}_seconds"] / 1e9
        assert found[f"{way}_gb_per_s"] == pytest.approx(rate)


def test_what_cannot_work_is_refused():
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[values(4)], residency="host")
    message = "there is no part reward.weights here: there are ['policy.weights']"
    with pytest.raises(ValueError, match=re.escape(message)):
        memory.prepare([("reward", "weights")])
    with pytest.raises(ValueError, match=r"part policy.weights exists twice"):
        memory.registry.register("policy", "weights", tensors=[values(4)])
    gone = values(4)
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"part value.weights: 1 of its tensors are freed"):
        memory.registry.register("value", "weights", tensors=[gone])
    foreign = torch.frombuffer(bytearray(16), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"roles.value.residency.weights=host: 1 of its storages"):
        memory.registry.register("value", "weights", tensors=[foreign], residency="host")
    memory.registry.register("value", "weights", tensors=[foreign], residency="keep")
    nothing = {"drop": lambda: None, "num_bytes": lambda: 0}
    with pytest.raises(ValueError, match=r"roles.rollout.residency.kv_cache=host"):
        memory.registry.register_droppable("rollout", "kv_cache", residency="host", **nothing)
    holds = [("policy", "weights")]
    with pytest.raises(ValueError, match=r"graphs=keep, but roles.policy.residency.weights=host"):
        memory.registry.register_droppable(
            "rollout", "graphs", residency="keep", holds=holds, **nothing
        )
    memory.registry.register_droppable("rollout", "graphs", holds=holds, **nothing)
    with pytest.raises(ValueError, match=r"graphs=keep, but roles.policy.residency.weights=host"):
        memory.registry.apply({("rollout", "graphs"): "keep"})
    with pytest.raises(ValueError, match=r"no part reward.weights here"):
        memory.registry.apply({("reward", "weights"): "keep"})
