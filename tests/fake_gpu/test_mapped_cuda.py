"""Memory that leaves and comes back at one address, and the graphs over it that stay."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_gpu import stand_in
from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.memory import mapped
from spmdrl.memory.mapped import MappedMemory, fault_of_mapping
from spmdrl.rollout.native import workspace
from spmdrl.rollout.native.graphs import DecodeGraphs
from spmdrl.world import World
from tiny_model import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
from test_decode_gpu import make_engine, requests
from test_flows_cuda import SHAPE

pytestmark = pytest.mark.fakegpu

MB = 1 << 20
DEVICE = torch.device("cuda", 0)


def test_memory_comes_back_at_its_address_and_is_others_meanwhile() -> None:
    start, memory = stand_in.used_bytes(), MappedMemory(5 * MB, DEVICE)
    assert memory.num_bytes == 6 * MB and stand_in.used_bytes() == start
    addresses = set()
    for value in (3, 5):
        start = stand_in.used_bytes()
        memory.map()
        assert stand_in.used_bytes() == start + 6 * MB
        held = memory.tensor()
        addresses.add(held.data_ptr())
        held.fill_(value)
        assert held[:: MB // 2].tolist() == [value] * 12 and int(held[-1]) == value
        start = stand_in.used_bytes()
        memory.unmap()
        assert stand_in.used_bytes() == start - 6 * MB
    assert len(addresses) == 1
    start = stand_in.used_bytes()
    memory.map()
    del memory  # `held` holds it
    assert stand_in.used_bytes() == start + 6 * MB
    del held
    assert stand_in.used_bytes() == start


def test_pages_that_torch_caches_are_taken_before_there_are_too_few() -> None:
    free, _ = torch.cuda.mem_get_info()
    cached = torch.empty(free // 2 // MB * MB, dtype=torch.uint8, device=DEVICE)
    del cached
    memory = MappedMemory(free * 3 // 4, DEVICE)
    memory.map()
    other = MappedMemory(free, DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        other.map()
    assert not other.is_mapped
    memory.unmap()
    other = MappedMemory(free // 2, DEVICE)
    other.map()


def test_a_driver_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fault_of_mapping.cache_clear()
    assert fault_of_mapping(DEVICE) is None
    load = ctypes.CDLL

    def without_maps(name: str, *words: Any) -> Any:
        library = load(name, *words)
        library.cuMemMap = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 801)
        return library

    monkeypatch.setattr(mapped.ctypes, "CDLL", without_maps)
    fault_of_mapping.cache_clear()
    used = stand_in.used_bytes()
    assert fault_of_mapping(DEVICE) == "cuMemMap of the CUDA driver failed (CUresult 801)"
    assert stand_in.used_bytes() == used
    fault_of_mapping.cache_clear()


@pytest.mark.parametrize("maps", [True, False])
def test_graphs_outlive_a_cache_that_keeps_its_address(
    maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not maps:
        monkeypatch.setattr(workspace, "fault_of_mapping", lambda device: "told so")
    engine = make_engine(DEVICE, torch.bfloat16, samples=16, longest=1000)
    if not engine.captures_graphs:
        pytest.skip("this torch reads no pages")
    assert engine.keeps_cache_address == maps
    found = []
    captures = []
    for _ in range(3):
        with stand_in.counting() as counts:
            found.append(engine.generate(requests(4, 20, 8), seed=0, step=0))
        captures.append(counts.get("capture", 0))
        assert counts.get("illegal", 0) == 0
        size, used = engine.cache_bytes(), stand_in.used_bytes()
        engine.release_cache()
        torch.cuda.empty_cache()
        assert engine.cache_bytes() == 0 and stand_in.used_bytes() <= used - size
        assert bool(engine.graph_bytes()) == maps
        others = torch.full((size,), 77, dtype=torch.uint8, device=DEVICE)  # on the same pages
        del others
    assert found[0] == found[1] == found[2]
    assert captures[0] > 0 and captures[1:] == ([0, 0] if maps else [captures[0]] * 2)
    engine.generate(requests(16, 900, 8), seed=0, step=0)  # a larger cache lies elsewhere
    assert engine.generate(requests(4, 20, 8), seed=0, step=0) == found[0]
    engine.close()
    assert engine.graph_bytes() == 0


def captures_of(world: World, path: str, words: list[str], maps: bool) -> int:
    """Captures in a run."""
    if not maps:
        workspace.fault_of_mapping = lambda device: "told so"  # type: ignore[assignment]
    counted = []
    capture = DecodeGraphs._capture

    def counting(graphs: DecodeGraphs, *arguments: Any) -> Any:
        counted.append(1)
        return capture(graphs, *arguments)

    DecodeGraphs._capture = counting  # type: ignore[method-assign]
    run_configs(world, [(path, words)], str(Path(path).parent))
    return len(counted)


LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "on the policy's weights": (1, ("kv_cache",), ()),
    "on weights of its own": (2, ("kv_cache", "weights"), ("roles.policy.dp_shard=2",)),
    "on a half of them": (
        2,
        ("kv_cache", "weights"),
        ("roles.policy.dp_shard=2", "roles.rollout.tp=2"),
    ),
}
"""Ranks, the engine's parts that leave, and further settings."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_colocated_step_captures_nothing_anew(tmp_path: Path, layout: str) -> None:
    """Policy and rollout take turns on one device: where the cache, and weights of the engine's
    own, leave for each update and come back, three steps capture what they do where these stay.
    """
    size, parts, more = LAYOUTS[layout]
    make_tiny_model(tmp_path / "model", **SHAPE)
    data = questions(tmp_path / "questions.jsonl")
    path = write_config(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "run", data=data)
    found = {}
    for residency, maps in (("keep", True), ("drop", True), ("drop", False)):
        words = [
            *("device=cuda", "model.dtype=bfloat16", "steps=3", *more),
            *(f"roles.rollout.residency.{part}={residency}" for part in parts),
            f"run_dir={tmp_path / f'{residency}_{maps}'}",
        ]
        arguments = (captures_of, size, str(path), words, maps)
        found[residency, maps] = run_ranks(*arguments, device="cuda", timeout_s=300)[0]
    assert found["drop", False] > found["drop", True] == found["keep", True] > 0, found
