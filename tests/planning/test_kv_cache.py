"""The native engine's cache: as large as plans say, whatever a call asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.memory.call_memory import CallMemory
from spmdrl.memory.plan import MemoryPlan
from spmdrl.models.config import read_config
from spmdrl.placement import place_roles
from spmdrl.planning.plan import plan_roles
from spmdrl.rollout.native.workspace import Work, Workspace
from spmdrl.world import World
from tiny_model import make_tiny_model

CACHE = ("rollout", "kv_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kv_cache") / "model"
    make_tiny_model(path)
    return path


def written(model: Path, directory: Path) -> str:
    """A configuration whose evaluation has 64 samples, its steps 20."""
    path = directory / "c.yaml"
    data = {**questions(directory / "data.jsonl"), "prompts_per_step": 5, "group_size": 4}
    data["train"]["max_tokens"] = 50
    evaluation = {"held_out": 16, "num_samples": 4, "before": True, "after": False}
    return str(write_config(path, model, directory, data=data, evaluation=evaluation, steps=2))


def plan_of(path: str, words: list[str]) -> MemoryPlan:
    config = load_config(path, words)
    placements = place_roles(config, 1)
    shapes = {name: read_config(config.model_path(name)) for name in placements}
    return plan_roles(config, placements, shapes, ["cpu"]).memory[0].plan


def size_of(plan: MemoryPlan) -> int:
    return next(part.num_bytes for part in plan.parts if part.key == CACHE)


def working_bytes_of(plan: MemoryPlan) -> int:
    """Bytes of activations, logits and sampling while the rollout generates."""
    sizes = {part.key: part.num_bytes for part in plan.parts}
    call = next(call for call in plan.calls if call.name == "rollout.generate")
    return call.peak_bytes - sum(sizes[key] for key in call.resident)


def test_the_cache_takes_what_is_free_and_makes_no_other_part_move(
    model: Path, tmp_path: Path
) -> None:
    path = written(model, tmp_path)
    step = size_of(plan_of(path, []))
    evaluation = step * 64 // 20
    roomy = plan_of(path, ["memory_gb=1"])
    assert size_of(roomy) == evaluation and set(roomy.residencies.values()) == {"keep"}
    # all that is kept, and room for some of the evaluation's samples
    peak = roomy.peak_bytes - evaluation + step
    words = [f"memory_gb={(peak + step // 2) / 1e9}"]
    some = plan_of(path, words)
    assert step < size_of(some) <= 1.5 * step and set(some.residencies.values()) == {"keep"}
    words = [f"memory_gb={peak / 1e9}"]
    assert size_of(plan_of(path, words)) == step


def test_a_cache_that_does_not_fit_is_smaller(model: Path, tmp_path: Path) -> None:
    path = written(model, tmp_path)
    words = ["train.microbatch_tokens=110", "data.train.max_tokens=100", "data.group_size=200"]
    roomy = plan_of(path, words)
    whole, room = size_of(roomy), working_bytes_of(roomy) + 6_000_000
    found = plan_of(path, [*words, f"memory_gb={room / 1e9}"])
    assert 0.005e9 < size_of(found) < 0.006e9 < whole, "what is left of 6 MB"
    given = [*words, f"memory_gb={room / 1e9}", f"rollout.kv_cache_gb={whole / 1e9}"]
    with pytest.raises(ValueError, match=r"during rollout.generate, the device has"):
        plan_of(path, given)


def watched(world: World, path: str, words: list[str]) -> tuple[list[int], list[int], list[float]]:
    """Bytes of the engine's cache as it is made, and as each update begins; each step's reward."""
    made: list[int] = []
    left: list[int] = []
    prepare, begin = Workspace.prepare, CallMemory.begin
    with pytest.MonkeyPatch.context() as patch:

        def noted_prepare(workspace: Workspace, num_blocks: int, num_samples: int) -> Work:
            work = prepare(workspace, num_blocks, num_samples)
            made.append(workspace.cache_bytes())
            return work

        def noted_begin(memory: CallMemory, call: str, *args: object, **settings: object) -> None:
            begin(memory, call, *args, **settings)  # type: ignore[arg-type]
            if call == "policy.update":
                left.append(memory.parts.registry.size(CACHE))

        patch.setattr(Workspace, "prepare", noted_prepare)
        patch.setattr(CallMemory, "begin", noted_begin)
        [records] = run_configs(world, [(path, words)], "")
    return made, left, [record["response_length"] for record in records if "loss" in record]


def test_evaluations_stay_within_the_plan_and_leave_no_more_behind(
    model: Path, tmp_path: Path
) -> None:
    path = written(model, tmp_path)
    free = plan_of(path, [])
    made, left, lengths = run_ranks(watched, 1, path, [f"run_dir={tmp_path}/free"])[0]
    assert max(made) > size_of(free), "without a bound an evaluation takes what it needs"
    assert max(left) <= size_of(free)
    tight = plan_of(path, ["memory_gb=1"])
    bound = (tight.peak_bytes - size_of(tight) + size_of(free)) / 1e9
    words = [f"memory_gb={bound}"]
    planned = size_of(plan_of(path, words))
    assert planned == size_of(free)
    words.append(f"run_dir={tmp_path}/tight")
    made, left, bounded = run_ranks(watched, 1, path, words)[0]
    assert max(made) <= planned and max(left) <= planned
    assert bounded == lengths
