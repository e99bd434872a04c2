"""Torch and Megatron pass the contract on 1, 2 and 4 ranks; a backend is tried by name too."""

from __future__ import annotations

from typing import Any

import pytest
from contract_candidates import MEGATRON, TIED, TORCH, WINDOWED, report_of, try_candidate

from harness import run_ranks
from spmdrl.testing.__main__ import main
from spmdrl.testing.backend_contract import CLAUSES
from spmdrl.testing.subject import Candidate, Layout, layouts_of

pytestmark = pytest.mark.contract


def cases() -> list[Any]:
    found = []
    for candidate in (TORCH, MEGATRON):
        for size, layouts in candidate.layouts.items():
            for layout in layouts:
                # one layout is tried every time, the others with the long sweeps
                marks = [] if layout is candidate.layouts[2][0] else [pytest.mark.full]
                if candidate is MEGATRON:
                    marks.append(pytest.mark.megatron)
                name = f"{candidate.name} {layout.describe()}"
                found.append(pytest.param(candidate, size, layout, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("candidate", "size", "layout"), cases())
def test_backends_pass(candidate: Candidate, size: int, layout: Layout) -> None:
    report = report_of(candidate, size, layout).require()
    skipped = {verdict.clause for verdict in report.verdicts if verdict.skipped is not None}
    of_many = {"no group of the whole world", "ranks outside"} if size == 1 else set()
    assert skipped == of_many | ({"freezing"} if candidate is MEGATRON else set())


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2])
def test_an_optimizer_in_windows_passes(size: int) -> None:
    """All but that its part leaves the device, where it never is."""
    asked = [clause.name for clause in CLAUSES if clause.name != "parts that leave"]
    for layout in WINDOWED.layouts[size][:3]:
        report_of(WINDOWED, size, layout, only=asked).require()


STEPS, STILL = "steps", "minibatches without signal"


@pytest.mark.parametrize(
    ("candidate", "size", "clauses"),
    [
        pytest.param(TORCH, 2, [STEPS, STILL], marks=pytest.mark.full),
        pytest.param(TORCH, 4, [STEPS], marks=pytest.mark.full),
        pytest.param(TIED, 2, [STEPS], marks=pytest.mark.full),
        pytest.param(TIED, 4, [STEPS], marks=pytest.mark.full),
        pytest.param(MEGATRON, 2, [STILL], marks=pytest.mark.megatron),
    ],
    ids=lambda value: value.name if isinstance(value, Candidate) else None,
)
def test_every_layout_trains_alike(candidate: Candidate, size: int, clauses: list[str]) -> None:
    report_of(candidate, size, only=clauses).require()


def test_layouts_are_made_of_the_axes_that_a_system_has() -> None:
    axes = {"dp_replicate", "tp"}
    assert [layout.describe() for layout in layouts_of(axes, 2)] == ["dp_replicate=2", "tp=2"]
    assert [dict(layout.degrees) for layout in layouts_of(axes, 4)] == [
        {"dp_replicate": 4},
        {"dp_replicate": 2, "tp": 2},
    ]
    assert layouts_of(axes, 1) == (Layout(),)


def unknown(world: Any) -> None:
    with pytest.raises(ValueError, match="there is no clause 'speed': there are no group"):
        try_candidate(world, TORCH, (), ["speed"])
    bare = Candidate(name="torch", train={"backend": "torch"}, layouts={2: (Layout(),)})
    with pytest.raises(ValueError, match="torch has no layout of 1 ranks"):
        try_candidate(world, bare, (), ())


def test_unknown_clauses_and_sizes_are_named() -> None:
    run_ranks(unknown, 1)


def test_the_command_lists_the_clauses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torch", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(CLAUSES) and all(": " in line for line in listed)
