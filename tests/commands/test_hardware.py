"""Hardware that is not supported is named in one line."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from spmdrl.commands.doctor import hardware_findings
from spmdrl.commands.hardware import (
    Accelerator,
    find_accelerator,
    say_hardware,
    say_world_hardware,
    unsupported,
    untested,
)
from spmdrl.world import World

H100 = Accelerator(kind="cuda", name="NVIDIA H100", capability=(9, 0), cuda="13.0")
A100 = Accelerator(kind="cuda", name="NVIDIA A100", capability=(8, 0), cuda="13.0")
T4 = Accelerator(kind="cuda", name="Tesla T4", capability=(7, 5), cuda="13.0")
MI300 = Accelerator(kind="cuda", name="AMD Instinct MI300X", capability=(9, 4), hip="6.4.2")
APPLE = Accelerator(kind="mps")
OLD_CUDA = Accelerator(kind="cuda", name="NVIDIA H100", capability=(9, 0), cuda="12.6")


@pytest.mark.parametrize("found", [H100, A100])
def test_nothing_is_said_of_supported_hardware(
    found: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unsupported(found) is None and untested(found) is None
    say_hardware(found)
    say_hardware(None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (T4, "Tesla T4 has compute capability 7.5: supported are NVIDIA GPUs from"),
        (MI300, "torch is built for ROCm 6.4.2, which is not supported"),
        (APPLE, "torch finds a device of type mps, which is not used"),
        (Accelerator(kind="xpu"), "torch finds a device of type xpu, which is not used"),
        (OLD_CUDA, "torch is built for CUDA 12.6: spmdrl is tested with 13.0"),
    ],
)
def test_the_start_says_one_line_of_other_hardware(
    found: Accelerator, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say_hardware(found)
    line = capsys.readouterr().err
    assert line.startswith(f"spmdrl: {words}") and line.count("\n") == 1


@pytest.mark.parametrize(
    ("local_rank", "device", "lines"), [(0, "auto", 1), (1, "auto", 0), (0, "cpu", 0)]
)
def test_the_first_rank_of_a_node_says_it_unless_the_cpu_was_asked_for(
    local_rank: int,
    device: str,
    lines: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spmdrl.commands.hardware.find_accelerator", lambda _: APPLE)
    world = World(
        rank=local_rank,
        size=2,
        local_rank=local_rank,
        local_size=2,
        device=torch.device("cpu"),
        device_types=("cpu", "cpu"),
        store=dist.HashStore(),
    )
    say_world_hardware(world, device)
    assert capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize(
    ("device", "found", "num_problems", "num_notes"),
    [
        ("cuda", H100, 0, 0),
        ("cuda", T4, 1, 0),
        ("cuda", MI300, 1, 0),
        ("cuda", OLD_CUDA, 0, 1),
        ("cpu", APPLE, 0, 1),
        ("cpu", None, 0, 0),
    ],
)
def test_doctor_calls_a_node_bad_only_if_its_device_is_in_use(
    device: str, found: Accelerator | None, num_problems: int, num_notes: int
) -> None:
    problems, notes = hardware_findings(torch.device(device), found)
    assert (len(problems), len(notes)) == (num_problems, num_notes)


def test_this_process_has_an_accelerator_or_none() -> None:
    found = find_accelerator(torch.device("cpu"))
    assert (found is not None) == torch.accelerator.is_available()
