"""Vector clocks name an access that waits for nothing, and only that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fake_gpu.races import watching_races

pytestmark = pytest.mark.fakegpu

SIZE = 1 << 10


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with watching_races():
        yield
    torch.cuda.synchronize()


def pinned() -> Tensor:
    return torch.zeros(SIZE, pin_memory=True)


def test_a_read_that_does_not_wait_is_named() -> None:
    side, x = torch.cuda.Stream(), torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"race: aten::mul .*reads memory that aten::add_ at "):
        x * 2


def test_a_write_over_what_another_stream_reads_is_named() -> None:
    side, x = torch.cuda.Stream(), torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x.sum()
    with pytest.raises(RuntimeError, match=r"aten::zero_ .*writes memory that aten::sum .* read"):
        x.zero_()


@pytest.mark.parametrize("wait", ["event", "stream", "host_event", "host_stream", "device"])
def test_every_wait_orders(wait: str) -> None:
    side, x = torch.cuda.Stream(), torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x.add_(1)
        event = torch.cuda.Event()
        event.record()
    match wait:
        case "event":
            torch.cuda.current_stream().wait_event(event)
        case "stream":
            torch.cuda.current_stream().wait_stream(side)
        case "host_event":
            event.synchronize()
        case "host_stream":
            side.synchronize()
        case "device":
            torch.cuda.synchronize()
    assert (x * 2).sum().item() == 2 * SIZE


def test_an_event_before_the_write_orders_nothing() -> None:
    side, x = torch.cuda.Stream(), torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        event = torch.cuda.Event()
        event.record()
        x.add_(1)
    torch.cuda.current_stream().wait_event(event)
    with pytest.raises(RuntimeError, match="race"):
        x * 2


@pytest.mark.parametrize("use", ["operation", "tolist"])
def test_pinned_memory_is_not_read_before_its_copy_ends(use: str) -> None:
    away, x = pinned(), torch.ones(SIZE, device="cuda")
    away.copy_(x, non_blocking=True)
    with pytest.raises(RuntimeError, match=r"on the host reads memory that a copy"):
        away.sum() if use == "operation" else away.tolist()
    torch.cuda.current_stream().synchronize()
    assert away.sum().item() == SIZE


def test_pinned_memory_is_not_written_before_its_copy_ends() -> None:
    home, x = pinned(), torch.ones(SIZE, device="cuda")
    x.copy_(home, non_blocking=True)
    with pytest.raises(RuntimeError, match=r"on the host writes memory that a copy .* read"):
        home.fill_(2)


def test_memory_that_a_side_stream_reads_is_not_given_to_another_tensor() -> None:
    side, x = torch.cuda.Stream(), torch.ones(1 << 20, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    away = torch.zeros(1 << 20, pin_memory=True)
    with torch.cuda.stream(side):
        away.copy_(x, non_blocking=True)
    del x
    with pytest.raises(RuntimeError, match=r"race: aten::(fill_|ones) .*writes memory"):
        torch.ones(1 << 20, device="cuda")


def test_a_graph_reads_and_writes_on_the_stream_that_launches_it() -> None:
    x, graph, side = torch.zeros(SIZE, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        x.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.replay()
    with pytest.raises(RuntimeError, match=r"memory that a graph's aten::add_"):
        x * 2
    torch.cuda.current_stream().wait_stream(side)
    assert (x * 2).sum().item() == 2 * SIZE
