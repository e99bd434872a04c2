"""A state that passes through the device in windows is updated as one that lies there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_runs import make_backend, train
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.memory import host_state
from spmdrl.memory.device_parts import Meter
from spmdrl.memory.host_state import WINDOW_BYTES, HostState, spans, staged_bytes
from spmdrl.training.readout import next_token
from spmdrl.world import World

KINDS: list[dict[str, Any]] = [
    {"param_dtype": torch.bfloat16},
    {"param_dtype": torch.float32, "weight_decay": 0.1, "clip_norm": 0.01},
]


def on_host() -> HostState:
    """Windows that hold some leaves whole, and cut others."""
    return HostState(torch.device("cpu"), window_bytes=10_000)


def both(world: World, degrees: dict[str, int]) -> None:
    for kind in KINDS:
        whole, windowed = [
            train(make_backend(world, options(**kind, host_state=state), tiny_config(), **degrees))
            for state in (None, on_host())
        ]
        for key in ("steps", "counters"):
            assert whole[key] == windowed[key]
        assert torch.equal(whole["after"], windowed["after"])
        for key in ("weights", "state"):
            for name, (tensor, slices) in whole[key].items():
                found, held = windowed[key][name]
                assert held == slices and torch.equal(found, tensor), (kind, name)


@pytest.mark.parametrize("degrees", [{}, {"dp_shard": 2}])
def test_the_updates_are_the_same(degrees: dict[str, int]) -> None:
    run_ranks(both, degrees.get("dp_shard", 1), degrees)


def skipped(world: World) -> None:
    backend = make_backend(world, options(host_state=on_host()), tiny_config())
    before = {name: tensor.clone() for name, (tensor, _) in backend.state_tensors().items()}
    rows = make_rows([5], 2)

    def infinite(given: Any) -> Any:
        loss, metrics = loss_fn(given)
        return loss * float("inf"), metrics

    for loss in (infinite, loss_fn, loss_fn):
        backend.forward_backward(rows, loss, next_token(), normaliser=10.0)
        done = backend.optim_step()
        assert done.skipped is (loss is infinite)
        after = backend.state_tensors()
        assert all(torch.equal(after[n][0], before[n]) for n in before) is (loss is infinite)

    # the count of updates comes back with a checkpoint, although no tensor of it holds it
    other = make_backend(world, options(host_state=on_host()), tiny_config())
    for name, (tensor, _) in other.state_tensors().items():
        tensor.copy_(backend.state_tensors()[name][0])
    other.restored(backend.counters())
    for each in (backend, other):
        each.forward_backward(rows, loss_fn, next_token(), normaliser=10.0)
        each.optim_step()
    for name, (tensor, _) in other.state_tensors().items():
        assert torch.equal(tensor, backend.state_tensors()[name][0]), name


def test_nothing_moves_without_a_finite_gradient_and_a_checkpoint_resumes() -> None:
    run_ranks(skipped, 1)


def test_no_part_of_it_is_on_the_device() -> None:
    run_ranks(parts, 1)


def parts(world: World) -> None:
    backend = make_backend(
        world, options(host_state=on_host(), param_dtype=torch.bfloat16), tiny_config()
    )
    assert backend.parts()["optimizer"] == []
    held = {tensor.data_ptr() for tensor in backend.parts()["weights"]}
    assert not held.intersection(t.data_ptr() for t, _ in backend.state_tensors().values())


@pytest.mark.parametrize("capacity", [1, 384, 1000, 4096, 10**6])
def test_windows_cut_every_group_once_and_in_order(capacity: int) -> None:
    sizes = [(5, 3), (0, 3), (4097, 2), (128, 3), (1, 1), (300, 3)]
    windows = spans(sizes, capacity)
    assert all(windows)
    for group, (size, _) in enumerate(sizes):
        own = [(start, stop) for window in windows for g, start, stop in window if g == group]
        assert [0, *(stop for _, stop in own)] == [*(start for start, _ in own), size]
        assert all(start % 128 == 0 for start, _ in own), "kernels load many numbers at once"
    for window in windows:
        rooms = [sizes[g][1] * -(-(stop - start) // 128) * 128 for g, start, stop in window]
        assert sum(rooms) <= max(capacity, 384)
    # what is not cut does not lie in more windows than it must
    assert len(spans(sizes, 10**6)) == 1


def test_what_is_written_in_a_window_goes_home() -> None:
    state = HostState(torch.device("cpu"), window_bytes=4 * 1024)
    groups = [(state.hold(torch.empty(700)), state.hold(torch.empty(700))) for _ in range(3)]
    for number, group in enumerate(groups):
        group[0].fill_(number)
    seen = 0
    for ranges in state.passing(groups):
        for one in ranges:
            first, second = one.here
            assert (first == one.group).all() and not second.any()
            second.copy_(first + torch.arange(one.start, one.stop))
            seen += len(first)
    assert seen == 2100
    for number, (first, second) in enumerate(groups):
        assert (first == number).all()
        assert torch.equal(second, number + torch.arange(700.0))


def test_what_passes_is_counted_in_both_directions() -> None:
    meter = Meter()
    state = HostState(torch.device("cpu"), window_bytes=4 * 1024, meter=meter)
    groups = [(state.hold(torch.empty(700)), state.hold(torch.empty(700))) for _ in range(3)]
    for _ in range(2):
        for _ in state.passing(groups):
            pass
    found = meter.take(0)
    assert found["to_host_bytes"] == found["to_device_bytes"] == 2 * 3 * 2 * 4 * 700
    assert found["to_host_seconds"] > 0


def test_an_error_in_a_window_leaves_no_copy_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    state, joined = HostState(torch.device("cpu"), window_bytes=4 * 1024), []
    monkeypatch.setattr(host_state._Lanes, "join", lambda self: joined.append(True))
    passing = state.passing([(state.hold(torch.empty(7000)),)])
    next(passing)
    with pytest.raises(RuntimeError, match="boom"):
        passing.throw(RuntimeError("boom"))  # type: ignore[attr-defined]
    assert joined == [True]


def test_a_host_without_room_is_named() -> None:
    state = HostState(torch.device("cpu"))
    state.hold(torch.empty(1000))
    with pytest.raises(ValueError, match=r"cannot map .* GB for an optimizer's state.*--mem"):
        state.hold(torch.empty(2**46, device="meta"))


def test_bytes_on_the_device_are_those_of_two_windows_at_most() -> None:
    assert staged_bytes(10**12) == 2 * WINDOW_BYTES
    assert staged_bytes(1000) == 1000
