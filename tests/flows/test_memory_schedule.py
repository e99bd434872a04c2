"""The schedule that is printed at start-up is what the run does: its moves, call by call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_ppo_layouts import ON_HOST, settings

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.memory import host_state
from spmdrl.memory.call_memory import CallMemory
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.parts import PartKey
from spmdrl.models.config import read_config
from spmdrl.placement import place_roles
from spmdrl.planning.memory import RankMemory, memory_texts
from spmdrl.planning.plan import plan_roles
from spmdrl.run.assembly.assembly import open_models
from spmdrl.world import World
from sweeps import swept
from tiny_model import make_tiny_model

Moves = tuple[str, set[PartKey], set[PartKey], set[PartKey]]
"""A call: what comes from the host for it, during it for the next one, what leaves before it."""


class Recorder:
    """Writes down what moves; the moves of a check count for the planned call after it."""

    def __init__(self) -> None:
        self.calls: list[Moves] = []
        self._in: set[PartKey] = set()
        self._out: set[PartKey] = set()
        self._ahead: set[PartKey] = set()
        self._prefetching = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        begin, prefetch = CallMemory.begin, DeviceParts.prefetch
        bring, send_away = DeviceParts._bring, DeviceParts._send_away

        def recorded_begin(turns: CallMemory, call: str, *args: Any, **settings: Any) -> None:
            begin(turns, call, *args, **settings)
            if settings.get("is_planned", True):
                self.calls.append((call, self._in, self._ahead, self._out))
                self._in, self._out, self._ahead = set(), set(), set()

        def recorded_prefetch(memory: DeviceParts, *args: Any, **settings: Any) -> bool:
            self._prefetching = True
            found = prefetch(memory, *args, **settings)
            self._prefetching = False
            return found

        def recorded_bring(memory: DeviceParts, name: PartKey, *, empty: bool = False) -> None:
            if not empty:
                (self._ahead if self._prefetching else self._in).add(name)
            bring(memory, name, empty=empty)

        def recorded_send_away(memory: DeviceParts, wanted: frozenset[PartKey]) -> None:
            here = {n for n, held in memory.registry.tensors.items() if not held.is_away}
            send_away(memory, wanted)
            gone = {n for n in here if memory.registry.tensors[n].is_away}
            self._out |= {n for n in gone if not memory.registry.drops(*n)}

        patch.setattr(CallMemory, "begin", recorded_begin)
        patch.setattr(DeviceParts, "prefetch", recorded_prefetch)
        patch.setattr(DeviceParts, "_bring", recorded_bring)
        patch.setattr(DeviceParts, "_send_away", recorded_send_away)


def compared(world: World, path: str, words: list[str]) -> tuple[list[Moves], list[Moves]]:
    """The moves of the second and third step: as the plan has them, and as they were."""
    config = load_config(path, words)
    placements = place_roles(config, world.size)
    shapes = {name: opened.model for name, opened in open_models(config).items()}
    plan = plan_roles(config, placements, shapes, world.device_types, world.size)
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        run_configs(world, [(path, words)], "")
    step = plan.memory[world.rank].plan.calls
    planned = []
    for before, call in zip((step[-1], *step), step, strict=False):
        coming = set(call.moved_in).difference(before.prefetch)
        planned.append((call.name, coming, set(call.prefetch), set(call.moved_out)))
    names = [call[0] for call in recorder.calls]
    second = [i for i, name in enumerate(names) if name == step[0].name][1]
    return planned * 2, recorder.calls[second : second + 2 * len(step)]


HOST = [*ON_HOST, "roles.rollout.residency.weights=host"]
# the policy's update fits only without its whole optimizer
STEPS = [*ON_HOST, "train.num_minibatches=2", "rollout.prefill_tokens=32"]
STEPS += ["rollout.max_running=8"]
SPLIT = {"float32": "0.00295", "bfloat16": "0.0028"}
"""GB by dtype of the model, in which the update fits only split."""
CASES = {
    "roomy": (1, [*ON_HOST, "memory_gb=1"]),
    # nothing fits beside the value's update, which is the largest call
    "tight": (
        1,
        [*ON_HOST, "memory_gb=0.0037", "train.microbatch_tokens=110"]
        + ["roles.value.train.microbatch_tokens=2000", "roles.value.train.num_minibatches=1"],
    ),
    "no bound": (1, ON_HOST),
    "an optimizer in windows": (1, [*STEPS, "memory_gb=0.00295"]),
    "with syncs that move": (2, [*HOST, "memory_gb=1", "roles.policy.dp_shard=2"]),
    # `auto` drops the engine's weights, which do not fit together with the update
    "weights that the sync overwrites": (
        2,
        [*ON_HOST, "memory_gb=0.0029", "roles.policy.dp_shard=2", "rollout.sync_bucket_mb=1"],
    ),
}


# the least room and the split update, and both syncs: more room leaves less to decide
BRIEF = [case for case in CASES if case in ("tight", "with syncs that move")]


@pytest.mark.parametrize("case", swept(CASES, BRIEF))
def test_what_moves_is_what_the_plan_says(tmp_path, case):
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "scalar", seed=1, head="score")
    ranks, words = CASES[case]
    given = settings(tmp_path, environment=None)
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", **given)
    for planned, found in run_ranks(compared, ranks, str(path), words, timeout_s=300):
        assert found == planned
        ahead = [call for call in planned if call[2]]
        assert bool(ahead) == (case != "no bound")
        assert case != "tight" or any(call[1] for call in planned), "some parts have no room ahead"


# with bfloat16 Megatron's masters are of the optimizer too
@pytest.mark.full
@pytest.mark.megatron
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizer_that_comes_for_its_steps_only_steps_alike(tmp_path: Path, dtype: str) -> None:
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "scalar", seed=1, head="score")
    given = settings(tmp_path, environment=None)
    path = str(write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", **given))
    words = [*STEPS, "roles.policy.train.backend=megatron", f"model.dtype={dtype}"]
    whole, split = [
        [*words, f"memory_gb={size}", f"run_dir={tmp_path / size}"] for size in ("1", SPLIT[dtype])
    ]
    assert [plan_of(path, words).splits for words in (whole, split)] == [set(), {"policy"}]
    found = plan_of(path, split)
    calls = [call for call in found.plan.calls if call.name == "policy.update"]
    assert len(calls) == 4 and all(("policy", "optimizer") not in c.resident for c in calls)
    first, second = run_ranks(run_configs, 1, [(path, whole), (path, split)], "")[0]
    for record, other in zip(first, second, strict=True):
        for name in ("loss", "grad_norm", "value/loss", "response_length"):
            assert other[name] == record[name], name


def in_small_windows(world: World, configs: list[tuple[str, list[str]]]) -> Any:
    """Run configurations; windows cut an optimizer's tensors."""
    host_state.WINDOW_BYTES = 20_000
    return run_configs(world, configs, "")


@pytest.mark.parametrize("dtype", swept(["float32", "bfloat16"], ["bfloat16"]))
def test_an_optimizer_that_steps_in_windows_steps_alike(tmp_path: Path, dtype: str) -> None:
    """Also from a checkpoint of a run that has it on the device, and the other way round."""
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "scalar", seed=1, head="score")
    given = settings(tmp_path, environment=None)
    path = str(write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", **given))
    words = [*STEPS, f"model.dtype={dtype}", "checkpoint.every=1"]
    roomy, tight = [[*words, f"memory_gb={size}"] for size in ("1", SPLIT[dtype])]
    asked = [*roomy, "roles.policy.residency.optimizer=stream"]
    plans = [plan_of(path, words) for words in (roomy, tight, asked)]
    assert [set(plan.windowed) for plan in plans] == [set(), {"policy"}, {"policy"}]
    text = plans[2].plan.describe()
    assert "stays on the host" in text and "all of it stays on the device" not in text
    assert "optimizer 0 bytes" not in memory_texts({0: plans[2]})["policy"]
    runs = {
        "on the device": [(roomy, 3)],
        "in windows": [(tight, 3)],
        "as asked, then on the device": [(asked, 1), (roomy, 3)],
        "on the device, then in windows": [(roomy, 1), (tight, 3)],
    }
    configs = [
        (path, [*own, f"steps={steps}", f"run_dir={tmp_path / name}"])
        for name, parts in runs.items()
        for own, steps in parts
    ]
    records = iter(run_ranks(in_small_windows, 1, configs)[0])
    first, *others = ([next(records) for _ in parts][-1] for parts in runs.values())
    for found in others:
        assert [record["step"] for record in found] == [record["step"] for record in first]
        for record, other in zip(first, found, strict=True):
            for key in ("loss", "grad_norm", "value/loss", "response_length"):
                assert other[key] == record[key], key


def plan_of(path: str, words: list[str]) -> RankMemory:
    config = load_config(path, words)
    placements = place_roles(config, 1)
    shapes = {name: read_config(config.model_path(name)) for name in placements}
    return plan_roles(config, placements, shapes, ["cpu"]).memory[0]
