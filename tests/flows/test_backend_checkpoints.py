"""A checkpoint that one train backend wrote is loaded by every other, with its optimizer's state:
what follows is what would have followed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from backend_cases import BACKENDS, GRPO, GRPO_METRICS, Records, assert_same_steps, words_of
from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.world import World
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.contract, pytest.mark.megatron, pytest.mark.full]

MATRIX = [(writer, reader) for writer in BACKENDS for reader in BACKENDS if writer != reader]


def write_and_read(
    world: World, config: str, root: str
) -> tuple[Records, dict[tuple[str, str], Records]]:
    """Metrics of an uninterrupted run on torch, and of what each reader makes of each writer's
    first step.
    """
    base = Path(root)

    def run(name: str, backend: str, steps: int) -> Records:
        words = [*words_of(backend), f"steps={steps}", f"run_dir={base / name}"]
        [records] = run_configs(world, [(config, words)], root)
        return records

    whole = run("whole", "torch", 3)
    found = {}
    for writer in BACKENDS:
        run(writer, writer, 1)
        for reader in (one for one in BACKENDS if one != writer):
            name = f"{reader} of {writer}"
            if world.is_first:
                shutil.copytree(base / writer, base / name)
            dist.barrier()
            found[writer, reader] = run(name, reader, 3)
    return whole, found


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Records, dict[tuple[str, str], Records]]:
    root = tmp_path_factory.mktemp("checkpoints")
    make_tiny_model(root / "model")
    config = write_config(root / "config.yaml", root / "model", root / "whole", **GRPO)
    return run_ranks(write_and_read, 2, str(config), str(root), timeout_s=900)[0]


@pytest.mark.parametrize(("writer", "reader"), MATRIX)
def test_a_checkpoint_is_loaded_by_every_other_backend(runs, writer: str, reader: str) -> None:
    whole, found = runs
    assert [record["step"] for record in found[writer, reader]] == [1, 2, 3]
    assert_same_steps(found[writer, reader], whole, GRPO_METRICS)
