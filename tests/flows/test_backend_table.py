"""GRPO and PPO, dense and with experts, on every train backend: the same steps, resumed exactly
after kill -9, synced into both engines. The table in docs/backends.md says what was found:

    SPMDRL_TEST_WRITE_TABLE=1 python -m pytest tests/flows/test_backend_table.py

writes it anew, in some minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_moe_layouts import SETTINGS as MOE
from test_ppo_layouts import METRICS, settings

import backend_table
from backend_cases import GRPO, GRPO_METRICS, Records, assert_same_steps, words_of
from backend_table import CELLS, LIMIT, MODELS, Cell, page_rows, refuses, worst
from flow_cases import run_configs, write_config
from harness import run_ranks
from killed import PHASES, kill_in
from replay import assert_same_samples, read_samples
from saved_runs import records, weights
from spmdrl.world import World
from sweeps import asked, swept
from tiny_model import make_tiny_model
from vllm_cases import needs_vllm

pytestmark = [pytest.mark.contract, pytest.mark.deepspeed, pytest.mark.megatron]

WRITES = "SPMDRL_TEST_WRITE_TABLE" in os.environ

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
ENGINES: dict[str, dict[str, Any]] = {
    "native": {"engine": "native", "sync_check_every": 1},
    "vllm": {"engine": "vllm", "block_size": 16, "sync_check_every": 1},
}
STEPS = [1, 2, 3]
ROLES = {"GRPO": ("policy", "reference"), "PPO": ("policy", "reference", "reward", "value")}
"""Flow -> roles that a backend computes."""

TAKEN = [cell for cell in CELLS if not refuses(cell)]
SAMPLE = Cell(backend="deepspeed 3", model="Llama", flow="GRPO")
"""The cell that is not left to the long sweeps."""

Configs = dict[str, list[tuple[str, list[str]]]]
"""Directory of the samples that its runs record or replay -> configurations and words."""

Runs = dict[Cell, Records]


def launch(world: World, configs: Configs) -> dict[str, list[Records]]:
    return {root: run_configs(world, given, root) for root, given in configs.items()}


def sections(root: Path, model: str, flow: str, engine: str) -> dict[str, Any]:
    found = (GRPO if model == "Llama" else MOE) if flow == "GRPO" else settings(root / model)
    if model == "MoE":
        # one router for what was sampled and what is trained, as experts need for equal steps
        replays = {"routing_replay": True}
        found = {**found, "algorithm": {**found["algorithm"], **replays}}
    return {
        **found,
        "environment": "killed:KilledEnvironment",
        "rollout": ENGINES[engine],
        "checkpoint": {"export": False, "every": 1},
    }


def config_of(root: Path, cell: Cell, engine: str, name: str) -> tuple[str, Path]:
    """The configuration of one run, and where it and those that it is compared with sample."""
    place = root / engine / cell.group
    place.mkdir(parents=True, exist_ok=True)
    given = sections(root, cell.model, cell.flow, engine)
    model = root / cell.model / "model"
    return str(write_config(place / f"{name}.yaml", model, place / name, **given)), place


def layout_of(cell: Cell) -> list[str]:
    """All roles on the cell's backend, in front of an engine over both ranks."""
    experts = cell.model == "MoE"
    own = [w for role in ROLES[cell.flow] for w in words_of(cell.backend, role, experts=experts)]
    return [*own, "roles.rollout.tp=2"]


def make_models(root: Path) -> None:
    for model, architecture in MODELS.items():
        make_tiny_model(root / model / "model", architecture, **SHAPE)
        make_tiny_model(root / model / "scalar", architecture, seed=1, head="score", **SHAPE)


def run_cells(root: Path, cells: Iterable[Cell], engine: str) -> Runs:
    """Every cell's run over two ranks, all of them in one launch."""
    configs: Configs = {}
    order: dict[str, list[Cell]] = {}
    for cell in cells:
        config, place = config_of(root, cell, engine, cell.backend)
        configs.setdefault(str(place), []).append((config, layout_of(cell)))
        order.setdefault(str(place), []).append(cell)
    found = run_ranks(launch, 2, configs, timeout_s=1800)[0]
    return {c: r for at, own in order.items() for c, r in zip(own, found[at], strict=True)}


@pytest.fixture(scope="module")
def native(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Runs, dict[str, Records], Path]:
    """The runs of the cells, and those on one rank with torch whose samples they replay."""
    root = tmp_path_factory.mktemp("table")
    make_models(root)
    chosen = asked(request, "cell")
    cells = [cell for cell in TAKEN if cell in chosen]
    alone: Configs = {}
    for cell in {cell.group: cell for cell in cells}.values():
        config, place = config_of(root, cell, "native", "one")
        alone[str(place)] = [(config, [])]
    found = run_ranks(launch, 1, alone, timeout_s=400)[0]
    expected = {Path(place).name: runs[0] for place, runs in found.items()}
    runs = run_cells(root, cells, "native")
    if WRITES and cells == TAKEN:
        backend_table.write({c: worst(c, runs[c], expected[c.group]) for c in cells})
    return runs, expected, root


SAMPLED = [cell for cell in TAKEN if not refuses(cell, "vllm")]


@pytest.fixture(scope="module")
def vllm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Runs, Path]:
    """The runs of cells that vLLM samples, those on torch first: the others replay them."""
    root = tmp_path_factory.mktemp("table_vllm")
    make_models(root)
    chosen = asked(request, "sampled")
    flows = {cell.group for cell in chosen}
    firsts = [cell for cell in SAMPLED if cell.backend == "torch" and cell.group in flows]
    others = [cell for cell in SAMPLED if cell in chosen and cell not in firsts]
    return run_cells(root, [*firsts, *others], "vllm"), root


def assert_synced(found: Records, place: Path, name: str) -> None:
    """That the engine had the policy's weights in every step, and drew what they say."""
    assert [record["step"] for record in found] == STEPS
    for step, record in enumerate(found):
        assert record["grad_norm"] > 0 and record["rollout_gap_max"] < 1e-4, step
        # an engine that shares all of the policy's tensors has no sync to prove
        assert 0 <= record.get("sync/canary_gap", 0.0) < 2e-5, step
        if name != (place / "recorder").read_text():
            assert_same_samples(place, name, step)


@pytest.mark.parametrize("cell", swept(TAKEN, []), ids=str)
def test_every_backend_makes_the_same_steps(native, cell: Cell) -> None:
    runs, expected, root = native
    found, wanted = runs[cell], expected[cell.group]
    assert_synced(found, root / "native" / cell.group, cell.backend)
    assert_same_steps(found, wanted, GRPO_METRICS if cell.flow == "GRPO" else METRICS)
    seen, said = worst(cell, found, wanted), page_rows()[cell]
    for difference, shown in zip((seen.losses, seen.norms), said, strict=False):
        assert difference <= float(shown) <= LIMIT, "write the table anew (see above)"
        assert float(shown) <= float(backend_table.bound(10 * difference)), "the table is too wide"


@pytest.mark.parametrize("cell", swept(TAKEN, []), ids=str)
def test_a_run_killed_in_its_second_step_resumes_exactly(native, cell: Cell) -> None:
    root = native[2]
    name, phase = f"{cell.backend} killed", PHASES[CELLS.index(cell) % len(PHASES)]
    config, place = config_of(root, cell, "native", name)
    whole, killed = place / cell.backend, place / name
    kill_in(phase, config, layout_of(cell), place, killed)
    run_ranks(run_configs, 2, [(config, layout_of(cell))], str(place), timeout_s=400)
    assert records(killed) == records(whole), phase
    saved, expected = weights(killed), weights(whole)
    assert saved.keys() == expected.keys() and len(saved) > 10
    assert all(torch.equal(saved[key], expected[key]) for key in expected), phase
    for step in range(len(STEPS)):
        rows, others = (read_samples(place, run, step) for run in (name, cell.backend))
        assert rows.keys() == others.keys()
        for key, row in rows.items():
            assert row.keys() == others[key].keys()
            assert all(torch.equal(row[column], others[key][column]) for column in row), (step, key)


@pytest.mark.full
@needs_vllm
@pytest.mark.parametrize("sampled", SAMPLED, ids=str)
def test_every_backend_makes_the_same_steps_with_vllm(vllm, sampled: Cell) -> None:
    runs, root = vllm
    wanted = runs[Cell(backend="torch", model=sampled.model, flow=sampled.flow)]
    assert_synced(runs[sampled], root / "vllm" / sampled.group, sampled.backend)
    assert_same_steps(runs[sampled], wanted, GRPO_METRICS if sampled.flow == "GRPO" else METRICS)


def test_the_page_has_a_row_for_every_cell() -> None:
    page = page_rows()
    assert list(page) == CELLS
    for cell, said in page.items():
        no = ["-" if refuses(cell, engine) else "yes" for engine in ("native", "vllm")]
        wanted = ["-"] * 3 if refuses(cell) else ["exact", *no]
        assert list(said[2:]) == wanted, cell
