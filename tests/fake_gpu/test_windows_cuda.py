"""A state on the host passes through the device without a race, and 8B trains in one card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fake_gpu.races import watching_races
from fake_gpu.test_budgets_cuda import measure
from spmdrl.memory import host_state
from spmdrl.memory.host_state import HostState

pytestmark = pytest.mark.fakegpu

SIZES = (700, 5000, 3)


@pytest.fixture
def state() -> Iterator[HostState]:
    """Windows of 1,024 numbers, with races watched."""
    with watching_races():
        made = HostState(torch.device("cuda", 0), window_bytes=4096)
        yield made
        torch.cuda.synchronize()  # its memory is unpinned next


def pass_through(state: HostState, turns: int) -> list[tuple[Tensor, ...]]:
    """Add 1 to each first tensor, and the result to the second one."""
    groups = [tuple(state.hold(torch.empty(size)) for _ in range(2)) for size in SIZES]
    for _ in range(turns):
        for ranges in state.passing(groups):
            for one in ranges:
                first, second = one.here
                first.add_(1)
                second.add_(first)
    return [tuple(tensor.clone() for tensor in group) for group in groups]


def test_windows_come_and_go_without_a_race(state: HostState) -> None:
    for first, second in pass_through(state, 3):
        assert (first == 3).all() and (second == 6).all()


WAITS = {
    "the host's, for what goes home": ("join", r"race"),
    "the computation's, for what comes": ("comes", r"race: aten::add_ .* that .* wrote"),
    "the copies' home, for what was computed": (
        "computed",
        r"race: a copy .* reads .* that aten::add_",
    ),
    "the copies' in, for what goes home": ("goes", r"race: a copy"),
    "the copies' in, for the places' former owners": ("owners", r"race: a copy"),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_that_is_taken_out_is_named(
    state: HostState, wait: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, message = WAITS[wait]
    current, waited = torch.cuda.current_stream, torch.cuda.Stream.wait_stream
    coming, going = state._streams or (None, None)

    def wait_stream(self: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        skipped = {
            "comes": self == current() and other == coming,
            "computed": self == going and other == current(),
            "owners": self == coming and other == current(),
        }
        if not skipped.get(name, False):
            waited(self, other)

    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", wait_stream)
    if name == "join":
        monkeypatch.setattr(host_state._Lanes, "join", lambda self: None)
    if name == "goes":
        monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda self, event: None)
    owned = torch.ones(4096, device="cuda")
    owned.add_(1)
    del owned  # its memory is the places'
    with pytest.raises(RuntimeError, match=message):
        pass_through(state, 2)


def test_8b_trains_in_one_card_of_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPU_GB", "80")
    found = measure(file="one_card_figures.py")
    print(found)
    assert found["parameters"] > 8e9 and found["state_gb"] == pytest.approx(98.3, abs=0.1)
    # the plan is above what it takes, by a quarter at most
    assert found["peak_gb"] <= found["planned_gb"] <= min(1.25 * found["peak_gb"], 80)
    assert found["device_peak_gb"] < 80
    for direction in ("in", "out"):
        # all of it once for each optimizer step
        assert found[f"{direction}_gb_of_step"] == pytest.approx(found["state_gb"], rel=1e-3)
    # the host's arenas are reserved and not touched here
    assert found["host_gb"] < 4
