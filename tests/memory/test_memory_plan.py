"""Plans by hand: what stays, what goes first, what moves before which call, what is refused."""

from __future__ import annotations

import re

import pytest

from spmdrl.memory.parts import Part
from spmdrl.memory.plan import MemoryPlan, make_plan
from spmdrl.memory.schedule import PlannedCall

POLICY, OPTIMIZER = ("policy", "weights"), ("policy", "optimizer")
REFERENCE, ENGINE, CACHE = ("reference", "weights"), ("rollout", "weights"), ("rollout", "kv_cache")
GRAPHS = ("rollout", "graphs")


def part(name, num_bytes, wish="auto", **more):
    return Part(role=name[0], name=name[1], num_bytes=num_bytes, wish=wish, **more)


def grpo_parts(graphs=None, **wishes):
    """Policy 10, optimizer 40, reference 12, an engine on the policy's weights, cache 30."""
    parts = [
        part(POLICY, 10, wishes.get("policy", "auto")),
        part(OPTIMIZER, 40, wishes.get("optimizer", "auto"), rests_on=(POLICY,)),
        part(REFERENCE, 12, wishes.get("reference", "auto"), frozen=True),
        part(ENGINE, 0, rests_on=(POLICY,)),
        part(CACHE, 30, wishes.get("cache", "auto"), droppable=True),
    ]
    if graphs is not None:
        parts.append(part(GRAPHS, 3, graphs, droppable=True, holds=(ENGINE, CACHE)))
    return parts


def grpo_calls(graphs=False):
    return [
        PlannedCall(name="sync", needs=(POLICY,), fills=(ENGINE,)),
        PlannedCall(name="rollout.generate", needs=(ENGINE, CACHE, *([GRAPHS] if graphs else []))),
        PlannedCall(name="policy.logprobs", needs=(POLICY,), working_bytes=5),
        PlannedCall(name="reference.logprobs", needs=(REFERENCE,), working_bytes=5),
        PlannedCall(name="policy.update", needs=(POLICY, OPTIMIZER), working_bytes=20),
    ]


def plan(capacity, parts=None, calls=None) -> MemoryPlan:
    return make_plan(parts or grpo_parts(), calls or grpo_calls(), capacity=capacity, rank=3)


def residencies(found):
    return {f"{role}.{name}": residency for (role, name), residency in found.residencies.items()}


def test_all_is_kept_where_all_fits():
    # parts 92 and the update's 20
    found = plan(112)
    assert set(found.residencies.values()) == {"keep"}
    assert found.peak_bytes == 112
    assert [call.moved_in + call.moved_out + call.dropped + call.made for call in found.calls] == [
        ()
    ] * 5
    assert plan(None).residencies == found.residencies


def test_what_costs_nothing_goes_first():
    # 112 > 111: only the cache must go, although the optimizer is larger
    found = plan(111)
    assert {n for n, p in found.residencies.items() if p != "keep"} == {CACHE}
    assert found.residencies[CACHE] == "drop"
    generate, logprobs = found.calls[1:3]
    assert (generate.made, generate.bytes_in) == ((CACHE,), 0)
    assert (logprobs.dropped, logprobs.bytes_out) == ((CACHE,), 0)
    assert found.peak_bytes == 92


def test_then_the_optimizer_then_weights_of_the_fewest_calls():
    # the cache dropped: generate has all 92; the optimizer helps it, the reference helps the update
    assert residencies(plan(82)) == {
        "policy.weights": "keep",
        "policy.optimizer": "host",
        "reference.weights": "keep",
        "rollout.weights": "keep",
        "rollout.kv_cache": "drop",
    }
    smaller = plan(81)
    assert residencies(smaller)["reference.weights"] == "host"
    assert [call.peak_bytes for call in smaller.calls] == [10, 40, 15, 27, 70]


def test_a_part_is_not_moved_for_a_call_that_needs_it_itself():
    # only the update is too large: the optimizer cannot help it, the reference and the cache can
    parts = [part(POLICY, 10), part(OPTIMIZER, 40), part(REFERENCE, 12), part(ENGINE, 9)]
    calls = [
        PlannedCall(name="policy.update", needs=(POLICY, OPTIMIZER), working_bytes=30),
        PlannedCall(name="reference.logprobs", needs=(REFERENCE,)),
        PlannedCall(name="rollout.generate", needs=(ENGINE,)),
    ]
    assert {n for n, p in plan(90, parts, calls).residencies.items() if p == "host"} == {REFERENCE}
    assert {n for n, p in plan(80, parts, calls).residencies.items() if p == "host"} == {
        REFERENCE,
        ENGINE,
    }


def test_more_calls_or_fewer_bytes_stay_longer():
    often, small, large = ("a", "weights"), ("b", "weights"), ("c", "weights")
    parts = [part(often, 50), part(small, 20), part(large, 30), part(("d", "optimizer"), 1)]
    calls = [
        PlannedCall(name="x", needs=(often,)),
        PlannedCall(name="y", needs=(often,)),
        PlannedCall(name="z", needs=(small, large)),
        PlannedCall(name="w", needs=(("d", "optimizer"),)),
    ]

    def moved(capacity):
        found = plan(capacity, parts, calls).residencies
        return {name[0] for name, residency in found.items() if residency == "host"}

    assert moved(101) == set()
    # w needs d itself: of the others c is used by fewer calls than a, and larger than b
    assert moved(100) == {"d", "c"}
    assert moved(99) == {"d", "c", "a"}  # z needs b and c: only a can help it
    assert moved(69) == {"d", "c", "a", "b"}


def test_steady_state_by_hand():
    found = plan(81)
    sync, generate, logprobs, reference, update = found.calls
    assert sync.moved_out == (OPTIMIZER,) and sync.bytes_out == 40
    assert sync.moved_in == () and sync.resident == (POLICY, ENGINE)
    assert generate.made == (CACHE,)
    assert generate.resident == (POLICY, ENGINE, CACHE)
    assert logprobs.dropped == (CACHE,)
    assert reference.moved_in == (REFERENCE,) and reference.bytes_in == 12
    assert reference.resident == (POLICY, REFERENCE, ENGINE)
    # frozen: the host has it already
    assert update.moved_out == (REFERENCE,) and update.bytes_out == 0
    assert update.moved_in == (OPTIMIZER,) and update.bytes_in == 40
    assert sum(c.bytes_in for c in found.calls) == 52
    assert sum(c.bytes_out for c in found.calls) == 40


def test_prefetch_only_where_it_fits_beside_the_running_call():
    # logprobs takes 15 (+ 12 of the reference), reference.logprobs 27 (+ 40 of the optimizer)
    found = plan(81)
    assert [call.prefetch for call in found.calls] == [(), (), (REFERENCE,), (OPTIMIZER,), ()]
    assert [call.prefetch_bytes for call in found.calls] == [0, 0, 12, 40, 0]
    tight = plan(70)  # 27 + 40 fits still
    assert tight.calls[3].prefetch == (OPTIMIZER,)
    wishes = {"policy": "host", "optimizer": "host", "reference": "host", "cache": "drop"}
    calls = [*grpo_calls()[:4], PlannedCall(name="policy.update", needs=(POLICY, OPTIMIZER))]
    found = plan(50, grpo_parts(**wishes), calls)
    # only the needed reference is there: 17 + 10 of the policy fits, 40 of the optimizer does not
    assert found.calls[3].prefetch == (POLICY,)
    assert found.calls[3].prefetch_bytes == 10
    assert all(call.prefetch == () for call in plan(None, grpo_parts(**wishes)).calls)


def test_configured_residencies_are_followed_even_where_all_fits():
    found = plan(1000, grpo_parts(optimizer="host"))
    assert found.residencies[OPTIMIZER] == "host"
    assert found.calls[0].moved_out == (OPTIMIZER,)


def test_what_cannot_fit_is_refused_with_sizes_and_the_fix():
    with pytest.raises(ValueError) as refused:
        plan(65, grpo_parts(reference="keep"))
    lines = str(refused.value).splitlines()
    assert lines[0] == (
        "roles policy and reference need 82 bytes on rank 3 during policy.update, the "
        "device has 65 bytes:"
    )
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:-1]}
    assert table == {
        "policy.weights": "10 bytes needed",
        "policy.optimizer": "40 bytes needed",
        "reference.weights": "12 bytes kept by roles.reference.residency.weights=keep",
        "working": "memory 20 bytes",
    }
    assert lines[-1] == "set roles.reference.residency.weights=host"


def test_a_call_too_large_by_itself_is_refused_otherwise():
    with pytest.raises(ValueError, match="all of it is needed at once: give policy") as refused:
        plan(69, grpo_parts()[:3], grpo_calls()[2:])
    assert "role policy needs 70 bytes on rank 3 during policy.update" in str(refused.value)
    assert plan(70, grpo_parts()[:3], grpo_calls()[2:]).peak_bytes == 70


def test_several_kept_parts_are_all_named():
    with pytest.raises(ValueError) as refused:
        plan(60, grpo_parts(reference="keep", cache="keep"))
    assert str(refused.value).splitlines()[-1] == (
        "set roles.reference.residency.weights=host or roles.rollout.residency.kv_cache=drop"
    )


def test_graphs_are_kept_over_what_is_kept():
    found = plan(115, grpo_parts(graphs="auto"), grpo_calls(graphs=True))
    assert set(found.residencies.values()) == {"keep"}
    assert found.recaptured == ()
    assert "rollout.graphs" in found.describe() and "captured once" in found.describe()


def test_graphs_stay_over_a_cache_that_comes_back_where_it_was():
    """It goes first, as it costs nothing, and nothing is captured again."""
    graphs = part(GRAPHS, 3, droppable=True, is_capture=True, holds=(POLICY,))
    found = plan(112, [*grpo_parts(), graphs], grpo_calls(graphs=True))
    assert found.residencies[CACHE] == "drop" and found.residencies[GRAPHS] == "keep"
    assert found.recaptured == () and "captured once" in found.describe()
    assert found.calls[1].made == (CACHE,) and found.calls[2].dropped == (CACHE,)


def test_what_graphs_hold_goes_last_and_takes_the_graphs_along():
    parts, calls = grpo_parts(graphs="auto"), grpo_calls(graphs=True)
    # 115 in all; generate has no working memory, so that the optimizer can only help the others
    found = plan(114, parts, calls)
    assert {n for n, p in found.residencies.items() if p != "keep"} == {REFERENCE}
    # the update without the reference: 10 + 40 + 30 + 3 + 20
    found = plan(102, parts, calls)
    assert {n: p for n, p in found.residencies.items() if p != "keep"} == {
        REFERENCE: "host",
        CACHE: "drop",
        GRAPHS: "drop",
    }
    assert found.recaptured == (GRAPHS,)
    assert found.calls[1].made == (CACHE, GRAPHS)
    assert found.calls[2].dropped == (CACHE, GRAPHS)
    assert "captured again in every step" in found.describe()


@pytest.mark.parametrize(
    ("wishes", "other"),
    [
        ({"cache": "drop"}, "rollout.residency.kv_cache=drop"),
        ({"policy": "host"}, "policy.residency.weights=host"),
    ],
)
def test_graphs_over_what_moves_are_refused_or_dropped(wishes, other):
    calls = grpo_calls(graphs=True)
    message = f"roles.rollout.residency.graphs=keep, but roles.{other}"
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(1000, grpo_parts(graphs="keep", **wishes), calls)
    assert plan(1000, grpo_parts(graphs="auto", **wishes), calls).residencies[GRAPHS] == "drop"


def test_graphs_to_be_kept_hold_their_parts_fast():
    calls = grpo_calls(graphs=True)
    found = plan(103, grpo_parts(graphs="keep"), calls)
    assert {n for n, p in found.residencies.items() if p != "keep"} == {REFERENCE}
    with pytest.raises(ValueError) as refused:
        plan(102, grpo_parts(graphs="keep"), calls)
    assert str(refused.value).splitlines()[-1] == "set roles.rollout.residency.graphs=drop"
    assert "kept by roles.rollout.residency.graphs=keep" in str(refused.value)


def test_dropped_weights_need_somebody_to_fill_them():
    parts = [part(POLICY, 10), part(ENGINE, 10, "drop"), part(REFERENCE, 10)]
    sync = PlannedCall(name="sync", needs=(POLICY,), fills=(ENGINE,))
    generate = PlannedCall(name="rollout.generate", needs=(ENGINE,))
    other = PlannedCall(name="reference.logprobs", needs=(REFERENCE,))
    found = plan(100, parts, [sync, generate, other])
    assert found.calls[0].made == (ENGINE,) and found.calls[0].bytes_in == 0
    assert found.calls[2].dropped == (ENGINE,)
    message = "roles.rollout.residency.weights=drop: rollout.generate needs rollout.weights"
    with pytest.raises(ValueError, match=message):
        plan(100, parts, [sync, other, generate])
    with pytest.raises(ValueError, match=message):
        plan(100, parts, [generate, sync])  # the first step has no step before it


SYNC = PlannedCall(name="sync", needs=(POLICY,), fills=(ENGINE,))
GENERATE = PlannedCall(name="rollout.generate", needs=(ENGINE,))
UPDATE = PlannedCall(name="policy.update", needs=(POLICY, OPTIMIZER), working_bytes=5)


def parts_of_their_own():
    return [part(POLICY, 10), part(OPTIMIZER, 40), part(ENGINE, 10, may_lose=True)]


def test_what_a_sync_overwrites_before_each_use_is_dropped_and_goes_first():
    calls = [SYNC, GENERATE, UPDATE]
    found = plan(62, parts_of_their_own(), calls)
    assert (
        residencies(found)
        == {
            "policy.weights": "keep",
            "policy.optimizer": "keep",
            "rollout.weights": "drop",
        }
        and sum(call.bytes_in + call.bytes_out for call in found.calls) == 0
    )
    assert found.calls[0].made == (ENGINE,) and found.calls[2].dropped == (ENGINE,)
    assert plan(65, parts_of_their_own(), calls).residencies[ENGINE] == "keep"


@pytest.mark.parametrize("again", [[SYNC, UPDATE, GENERATE], [SYNC, GENERATE, UPDATE, GENERATE]])
def test_what_a_step_uses_again_is_not_dropped(again):
    calls = [SYNC, GENERATE, UPDATE]
    found = make_plan(parts_of_their_own(), calls, capacity=55, other_steps={"lag=1": again})
    assert found.residencies[ENGINE] == "host"
    # nothing of it is read before the sync overwrites it
    assert ENGINE in found.calls[0].made and found.calls[0].bytes_in == 0
    partly = PlannedCall(name="sync", needs=(POLICY,), fills=(ENGINE,), adds_to=(ENGINE,))
    found = make_plan(
        parts_of_their_own(), [partly, *calls[1:]], capacity=55, other_steps={"lag=1": again}
    )
    assert ENGINE in found.calls[0].moved_in and found.calls[0].bytes_in == 10


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match=r"roles.rollout.residency.kv_cache=host: it has nothing"):
        part(CACHE, 1, "host", droppable=True)
    with pytest.raises(ValueError, match=r"part policy.weights exists twice"):
        plan(10, [part(POLICY, 1), part(POLICY, 1)], [])
    with pytest.raises(ValueError, match=r"rollout.weights refers to policy.weights, which is not"):
        plan(10, [part(ENGINE, 0, rests_on=(POLICY,)), part(POLICY, 1)], [])
    with pytest.raises(ValueError, match=r"no part reward.weights here: there are \['policy.wei"):
        plan(10, [part(POLICY, 1)], [PlannedCall(name="score", needs=(("reward", "weights"),))])


def test_the_description_says_what_moves():
    giga = [
        part(POLICY, 14 * 10**9),
        part(OPTIMIZER, 84 * 10**9, rests_on=(POLICY,)),
        part(REFERENCE, 14 * 10**9, frozen=True),
        part(CACHE, 20 * 10**9, droppable=True),
    ]
    calls = [
        PlannedCall(name="rollout.generate", needs=(POLICY, CACHE)),
        PlannedCall(name="reference.logprobs", needs=(REFERENCE,)),
        PlannedCall(name="policy.update", needs=(POLICY, OPTIMIZER), working_bytes=10 * 10**9),
    ]
    text = make_plan(giga, calls, capacity=110 * 10**9, rank=2).describe()
    assert (
        text
        == """\
memory of rank 2: 110.00 GB; peak 108.00 GB in policy.update, 10.00 GB of it working memory
  policy.weights                 14.00 GB  keep (auto)
  policy.optimizer               84.00 GB  host (auto), plus what it shares with policy.weights
  reference.weights              14.00 GB  host (auto)
  rollout.kv_cache               20.00 GB  drop (auto)
  rollout.generate: peak 34.00 GB with policy.weights, rollout.kv_cache
    out  policy.optimizer: 84.00 GB copied to the host
    made rollout.kv_cache
    meanwhile reference.weights: 14.00 GB for the next call
  reference.logprobs: peak 28.00 GB with policy.weights, reference.weights
    free rollout.kv_cache
    in   reference.weights: 14.00 GB
  policy.update: peak 108.00 GB with policy.weights, policy.optimizer
    out  reference.weights: 0 bytes copied to the host
    in   policy.optimizer: 84.00 GB"""
    )
