"""Parts that are dropped, prefetched, viewed where they are, or planned."""

from __future__ import annotations

import pytest
import torch
from memory_cases import CPU, moved, values, watch, weigh
from torch import Tensor

from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.plan import make_plan
from spmdrl.memory.schedule import PlannedCall


def test_dropped_tensors_must_be_filled_before_a_call_needs_them():
    weights, other = values(100), values(3)
    memory = DeviceParts(CPU)
    here = watch(weights, other)
    memory.registry.register("rollout", "weights", tensors=[weights], residency="drop")
    memory.registry.register("reward", "weights", tensors=[other], residency="host")
    memory.prepare([("rollout", "weights")])  # as registered, it has its content
    memory.prepare([("reward", "weights")])
    assert here() == [False, True]
    assert moved(memory) == (12, 12)  # of the reward model
    message = "role 'rollout': its weights were dropped, and nothing has filled them since"
    with pytest.raises(ValueError, match=message):
        memory.prepare([("rollout", "weights")])
    assert here() == [False, True]  # a refused call moves nothing
    memory.prepare([("reward", "weights")], fills=[("rollout", "weights")])
    assert here() == [True, True]
    assert moved(memory) == (0, 0)
    with pytest.raises(ValueError, match=message):
        memory.prepare([("rollout", "weights")])
    weights.fill_(3.0)
    memory.filled("rollout", "weights")
    memory.prepare([("rollout", "weights")])
    assert weights.tolist() == [3.0] * 100
    memory.settle()
    with pytest.raises(ValueError, match=r"no tensors of that part are on the device"):
        memory.filled("rollout", "weights")
    with memory.resident("rollout", "weights"):
        weights.zero_()
        memory.filled("rollout", "weights")
    memory.prepare([("rollout", "weights")])
    assert weights.tolist() == [0.0] * 100


def test_what_a_call_overwrites_comes_without_content():
    weights, other = values(100), values(3)
    memory = DeviceParts(CPU)
    memory.registry.register("rollout", "weights", tensors=[weights], residency="host")
    memory.registry.register("reward", "weights", tensors=[other], residency="keep")
    memory.prepare([("reward", "weights")])
    assert moved(memory) == (400, 0)
    memory.prepare([], fills=[("rollout", "weights")])
    assert moved(memory) == (0, 0)
    with pytest.raises(ValueError, match="its weights were dropped, and nothing has filled them"):
        memory.prepare([("rollout", "weights")])  # the call that should have filled them failed
    weights.fill_(2.0)
    memory.filled("rollout", "weights")
    memory.prepare([("reward", "weights")])
    memory.prepare([("rollout", "weights")])
    assert moved(memory) == (400, 400) and weights.tolist() == [2.0] * 100


def test_a_view_reads_and_writes_where_the_values_are():
    weights, narrow, dropped = values(300), values(9).to(torch.bfloat16), values(3)
    part, expected = weights[20:260].view(12, 20)[:, ::2], weights.clone()
    memory = DeviceParts(CPU, capacity=10_000, staging_bytes=2048)
    memory.registry.register("policy", "weights", tensors=[weights, narrow], residency="host")
    memory.registry.register("rollout", "weights", tensors=[dropped], residency="drop")
    assert memory.view(part) is part
    memory.settle()
    away = memory.view(part)
    assert torch.equal(away, expected[20:260].view(12, 20)[:, ::2])
    away[1, 1] = 7.0
    memory.view(narrow).fill_(0.5)
    with pytest.raises(ValueError, match=r"part rollout.weights was dropped"):
        memory.view(dropped)
    assert memory.prefetch([("policy", "weights")])
    assert weights[20 + 22] == part[1, 1] == 7.0 and narrow.tolist() == [0.5] * 9
    memory.view(narrow).fill_(0.25)  # after the copy came
    memory.settle()
    memory.prepare([("policy", "weights")])
    assert narrow.tolist() == [0.25] * 9
    empty = values(0)
    assert memory.view(empty) is empty


def test_prefetch_respects_the_capacity_and_costs_nothing_when_it_was_in_vain():
    policy, reward, value = values(100), values(50), values(200)
    expected = reward.clone()
    alive, policy_here = weigh(policy, reward, value), watch(policy)
    memory = DeviceParts(CPU, capacity=700)
    for role, tensor in (("policy", policy), ("reward", reward), ("value", value)):
        memory.registry.register(role, "weights", tensors=[tensor], residency="host")
    memory.prepare([("policy", "weights")])
    moved(memory)
    assert not memory.prefetch([("value", "weights")])
    assert not memory.prefetch([("reward", "weights")], working_bytes=101)
    assert memory.registry.resident_bytes() == alive() == 400
    assert memory.prefetch([("reward", "weights")], working_bytes=100)
    assert memory.registry.resident_bytes() == alive() == 600
    assert moved(memory) == (0, 200)
    memory.prepare([("value", "weights")])  # nobody used the reward model: the host has it
    assert moved(memory) == (400, 800)
    assert alive() == 800
    memory.prepare([("policy", "weights")])
    assert memory.prefetch([("reward", "weights")])
    moved(memory)
    memory.prepare([("reward", "weights")])
    assert moved(memory) == (400, 0)
    assert policy_here() == [False]
    assert torch.equal(reward, expected)
    reward.fill_(2.0)
    memory.settle()
    memory.prepare([("reward", "weights")])
    assert reward.tolist() == [2.0] * 50
    assert not DeviceParts(CPU).prefetch([])


def test_droppable_parts_go_when_no_call_needs_them_and_captures_before_what_they_hold():
    weights, reward = values(100), values(10)
    here = watch(weights)
    made: dict[str, Tensor] = {}
    order: list[str] = []

    def dropper(name: str):
        def drop() -> None:
            if made.pop(name, None) is not None:
                assert here() == [True], f"{name} was dropped after what it points into moved"
                order.append(name)

        return drop

    def size(name: str):
        return lambda: made[name].nbytes if name in made else 0

    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[weights], residency="host")
    memory.registry.register("reward", "weights", tensors=[reward], residency="host")
    memory.registry.register_droppable(
        "rollout", "kv_cache", drop=dropper("c"), num_bytes=size("c")
    )
    memory.registry.register_droppable(
        "rollout",
        "graphs",
        drop=dropper("g"),
        num_bytes=size("g"),
        holds=[("policy", "weights"), ("rollout", "kv_cache")],
    )
    generate = [("rollout", "kv_cache"), ("rollout", "graphs")]  # the weights follow from graphs
    for _ in range(2):
        memory.prepare(generate)
        assert here() == [True]
        made.update(c=values(20), g=values(5))
        memory.prepare(generate)
        assert set(made) == {"c", "g"} and memory.registry.resident_bytes() == 4 * 125
        memory.prepare([("reward", "weights")])
        assert not made and here() == [False]
    assert order == ["g", "c"] * 2
    assert memory.take_metrics()["peak_resident_bytes"] == 4 * 125
    memory.prepare(generate)
    made.update(g=values(5))
    with memory.resident("rollout", "graphs"):
        memory.prepare([("reward", "weights")])
        assert "g" in made and here() == [True]


def test_captures_are_dropped_with_what_moves_before_the_plan_is_applied():
    dropped: list[int] = []
    memory = DeviceParts(CPU)
    memory.registry.register("policy", "weights", tensors=[values(8)])
    memory.registry.register_droppable(
        "rollout",
        "graphs",
        drop=lambda: dropped.append(1),
        num_bytes=lambda: 0,
        residency="keep",
        holds=[("policy", "weights")],
    )
    memory.prepare([("policy", "weights")])
    assert dropped == []
    memory.settle()
    assert dropped == [1]
    memory.registry.apply({("policy", "weights"): "keep"})
    memory.prepare([("rollout", "graphs")])
    memory.settle()
    assert dropped == [1]


def test_moves_and_peaks_are_those_of_the_plan():
    sizes = {"weights": 100, "optimizer": 800, "reference": 120, "cache": 300}
    tensors = {name: values(count // 4) for name, count in sizes.items() if name != "cache"}
    cache: list[Tensor] = []
    parts = {
        "policy": ("policy", "weights"),
        "optimizer": ("policy", "optimizer"),
        "reference": ("reference", "weights"),
        "engine": ("rollout", "weights"),
        "cache": ("rollout", "kv_cache"),
    }
    memory = DeviceParts(CPU)
    memory.registry.register(*parts["policy"], tensors=[tensors["weights"]])
    memory.registry.register(
        *parts["optimizer"], tensors=[tensors["optimizer"], tensors["weights"]]
    )
    memory.settle()
    memory.registry.register(*parts["reference"], tensors=[tensors["reference"]], frozen=True)
    memory.settle()
    memory.registry.register(*parts["engine"], tensors=[tensors["weights"]])
    cache.append(torch.empty(sizes["cache"], dtype=torch.int8))
    memory.registry.register_droppable(
        *parts["cache"], drop=cache.clear, num_bytes=lambda: sum(t.nbytes for t in cache)
    )
    calls = [
        PlannedCall(name="rollout.generate", needs=(parts["engine"], parts["cache"])),
        PlannedCall(name="reference.logprobs", needs=(parts["reference"],)),
        PlannedCall(name="policy.update", needs=(parts["policy"], parts["optimizer"])),
    ]
    plan = make_plan(memory.registry.parts(), calls, capacity=1000)
    assert {name: plan.residencies[key] for name, key in parts.items()} == {
        "policy": "keep",
        "optimizer": "host",
        "reference": "host",
        "engine": "keep",
        "cache": "drop",
    }
    memory.registry.apply(plan.residencies)
    memory.settle()
    for step in range(3):
        memory.take_metrics()
        for call, scheduled in zip(calls, plan.calls, strict=True):
            memory.prepare(call.needs)
            if parts["cache"] in call.needs:
                cache.append(torch.empty(sizes["cache"], dtype=torch.int8))
            assert weigh(*tensors.values(), *cache)() == scheduled.peak_bytes
            found = memory.take_metrics()
            assert found["peak_resident_bytes"] <= plan.peak_bytes
            if step:
                assert found["to_device_bytes"] == scheduled.bytes_in
                assert found["to_host_bytes"] == scheduled.bytes_out
    assert plan.peak_bytes == 900
