"""Stage `ceilings`: what this machine can do at best, next to what the card's maker publishes."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch

from first_minutes.cards import Card, card_of
from first_minutes.cases import Case, Outcome, Setting
from first_minutes.clock import device_s

_NODES = 200


def cases(setting: Setting) -> Iterator[Case]:
    card = card_of(torch.cuda.get_device_name(setting.device))
    yield Case(name="machine", run=lambda: machine(setting, card))
    yield Case(name="memory", run=lambda: memory(setting, card))
    yield Case(name="products", run=lambda: products(setting, card))
    yield Case(name="launches", run=lambda: launches(setting))
    yield Case(name="bus", run=lambda: bus(setting, card))


def machine(setting: Setting, card: Card | None) -> Outcome:
    """Say what the figures of this run belong to."""
    properties = torch.cuda.get_device_properties(setting.device)
    return Outcome(
        facts={
            "gpu": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton") if find_spec("triton") else None,
            "published": None if card is None else card.source,
        }
    )


def _published(card: Card | None, *names: str) -> dict[str, float | None]:
    known = {} if card is None else card.ceilings()
    return {name: known.get(name) for name in names}


def memory(setting: Setting, card: Card | None) -> Outcome:
    size = 1 << (20 if setting.small else 31)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = device_s(lambda: target.copy_(source))
    return Outcome(
        predicted=_published(card, "copy_tb_s"),
        measured={"copy_tb_s": 2 * size / seconds / 1e12},
    )


def products(setting: Setting, card: Card | None) -> Outcome:
    side = 128 if setting.small else 8192
    measured = {}
    for name, dtype in (("bf16_tflops", torch.bfloat16), ("fp32_tflops", torch.float32)):
        matrix = torch.randn(side, side, device=setting.device).to(dtype)
        seconds = device_s(partial(torch.mm, matrix, matrix), repeats=5)
        measured[name] = 2 * side**3 / seconds / 1e12
    return Outcome(predicted=_published(card, *measured), measured=measured)


def launches(setting: Setting) -> Outcome:
    """Measure small operations: outside a graph, captured, and replayed."""
    value = torch.zeros(1024, device=setting.device)

    def work() -> None:
        for _ in range(_NODES):
            value.add_(1.0)

    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    launch_s = time.perf_counter() - began
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    began = time.perf_counter()
    with torch.cuda.graph(graph):
        work()
    capture_s = time.perf_counter() - began
    node_s = device_s(graph.replay)
    return Outcome(
        measured={
            "launch_us": launch_s / _NODES * 1e6,
            "capture_us": capture_s / _NODES * 1e6,
            "node_us": node_s / _NODES * 1e6,
        }
    )


def bus(setting: Setting, card: Card | None) -> Outcome:
    """Measure copies of page-locked memory, and the host's first writes into fresh pages."""
    size = 1 << (20 if setting.small else 30)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fresh = torch.frombuffer(pages, dtype=torch.uint8)
    began = time.perf_counter()
    fresh.zero_()
    fill_s = time.perf_counter() - began
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=setting.device)
    to_host = device_s(lambda: host.copy_(device, non_blocking=True), repeats=5)
    to_device = device_s(lambda: device.copy_(host, non_blocking=True), repeats=5)
    return Outcome(
        predicted=_published(card, "to_host_gb_s", "to_device_gb_s"),
        measured={
            "to_host_gb_s": size / to_host / 1e9,
            "to_device_gb_s": size / to_device / 1e9,
            "fill_gb_s": size / fill_s / 1e9,
        },
    )
