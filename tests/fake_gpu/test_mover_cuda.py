"""Parts leave and come back without a race, and a wait that is taken out is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fake_gpu.races import watching_races
from spmdrl.memory.mover import Mover, Ticket
from spmdrl.memory.tensor_part import TensorPart

pytestmark = pytest.mark.fakegpu

SMALL, LARGE = 1 << 10, 1 << 20
"""Elements of storages that move in a bucket, and individually."""


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with watching_races():
        yield
    torch.cuda.synchronize()


def tensors() -> list[Tensor]:
    return [torch.full((n,), n % 97, device="cuda") for n in (SMALL, LARGE, SMALL + 5)]


def part_of(held: list[Tensor]) -> TensorPart:
    return TensorPart([x.untyped_storage() for x in held], Mover(torch.device("cuda", 0)))


def leave(part: TensorPart) -> None:
    ticket = part.start_leaving()
    if ticket is not None:
        ticket.finish()
    part.leave()


def test_a_round_trip_and_a_prefetch_have_no_race() -> None:
    held = tensors()
    part = part_of(held)
    other = torch.ones(LARGE, device="cuda")
    for turn in range(3):
        leave(part)
        busy = torch.zeros(2 * LARGE, device="cuda") + 1  # may lie where the part was
        part.bring()
        other.mul_(2)  # a call that runs while the part comes
        del busy
        part.hand_out(read_only=False, stays=False)
        for x in held:
            x.add_(1)
        assert [int(x[-1]) for x in held] == [x.numel() % 97 + turn + 1 for x in held]


def test_a_use_before_the_copy_in_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held = tensors()
    part = part_of(held)
    leave(part)
    part.bring()
    monkeypatch.setattr(Mover, "let_compute_wait", lambda self, ticket: None)
    part.hand_out(read_only=True, stays=False)
    with pytest.raises(RuntimeError, match=r"race: aten::add .* reads memory that .* wrote"):
        held[1] + 1
    torch.cuda.synchronize()  # the arena is unpinned next


def test_memory_that_is_freed_before_the_copy_out_ended_is_named() -> None:
    part = part_of(tensors())
    part.start_leaving()
    part.leave()
    with pytest.raises(RuntimeError, match=r"race: .* writes memory that .* read"):
        for _ in range(4):
            torch.ones(LARGE, device="cuda")
    torch.cuda.synchronize()


def test_a_copy_out_that_does_not_wait_for_the_computation_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = tensors()
    part = part_of(held)
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, stream: None)
    with pytest.raises(RuntimeError, match=r"race: .* reads memory that .* wrote"):
        part.start_leaving()
    torch.cuda.synchronize()


def test_an_arena_that_dies_during_a_copy_is_named() -> None:
    held = tensors()
    part = part_of(held)
    part.start_leaving()
    arena = part._arena
    assert arena is not None
    assert int(torch.cuda.cudart().cudaHostUnregister(arena.bytes.data_ptr())) != 0
    with pytest.raises(RuntimeError, match=r"race: cudaHostUnregister on the host writes memory"):
        torch.zeros(1, device="cuda")  # CUDA's last error is raised by the next call of torch
    torch.cuda.synchronize()


def test_host_memory_is_not_written_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ticket, "finish", lambda self: None)
    held = tensors()
    part = part_of(held)
    part.start_leaving()
    part.leave()
    with pytest.raises(RuntimeError, match=r"on the host (reads|writes) memory that"):
        part.host_view(held[1]).fill_(3)
    torch.cuda.synchronize()
