"""`Saver`: checkpoints cross layouts in bfloat16, and one run is not mixed with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flow_cases import write_config
from harness import run_ranks
from spmdrl.batch import from_rows
from spmdrl.checkpoint.rng import rng_state
from spmdrl.config.load import load_config
from spmdrl.models.local_shards import WeightLayout
from spmdrl.roles.handles import Policy
from spmdrl.roles.kept import Journal
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.run.resume_point import Moment, Saved
from spmdrl.run.saving import Saver
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.weights.views import full_tensors
from spmdrl.world import World
from tiny_model import make_tiny_model

Made = tuple[Saver, Policy, WeightLayout]


def make(world: World, path: Path, *overrides: str) -> Made:
    config = load_config(str(path), list(overrides))
    models = open_models(config)
    assembly = assemble(config, world, models, None)
    policy = assembly.trained["policy"]
    assert isinstance(policy, Policy)
    return Saver(config, world, assembly), policy, assembly.layouts["policy"]


SAVED = {"kl": {"coef": 0.5}}


def save(saver: Saver, steps_done: int) -> None:
    moment = Moment(
        steps_done=steps_done,
        saved=SAVED,
        metrics_lines=7,
        versions=saver.states.versions(),
        generators=rng_state(torch.device("cpu")),
    )
    saver.save(moment, Journal())
    saver.wait()


def restored(saver: Saver) -> tuple[int, Saved, int]:
    found = saver.restore()
    assert found.journal == Journal()
    return found.steps_done, found.saved, found.metrics_lines


def train(policy: Policy) -> None:
    def loss_fn(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        return -given["logprobs"].sum(), {}

    generator = torch.Generator().manual_seed(policy.mesh.coordinate("dp"))
    tokens = torch.randint(2, 200, (2, 12), generator=generator).tolist()
    rows = {"prompt_lengths": torch.tensor([4, 4]), "prompt_ids": torch.tensor([0, 1])}
    for _ in range(2):
        assert policy.backend is not None
        policy.backend.forward_backward(
            from_rows(tokens, rows=rows), loss_fn, next_token(), normaliser=9.0
        )
        assert not policy.backend.optim_step().skipped


def state_of(policy: Policy, layout: WeightLayout) -> dict[str, Tensor]:
    """The whole state on rank 0."""
    assert policy.backend is not None
    tensors = policy.backend.state_tensors()
    whole = {}
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        part = {
            n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")
        }
        whole |= {f"{kind}/{n}": t for n, t in full_tensors(layout, part) if t is not None}
    return whole


def check_equal(policy: Policy, layout: WeightLayout, expected: dict[str, Tensor]) -> None:
    found = state_of(policy, layout)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


def cross(world: World, path: Path) -> None:
    """Replicated bfloat16 with masters -> shards -> replicated, each trained on before it saves."""
    half, sharded = "model.dtype=bfloat16", "roles.policy.dp_shard=2"
    saver, policy, layout = make(world, path, half)
    train(policy)
    save(saver, 2)
    expected = state_of(policy, layout)
    if world.is_first:
        masters = [t for name, t in expected.items() if name.startswith("weights/")]
        assert not all(torch.equal(t, t.bfloat16().float()) for t in masters)

    saver, policy, layout = make(world, path, half, sharded)
    assert restored(saver) == (2, SAVED, 7)
    check_equal(policy, layout, expected)
    train(policy)
    save(saver, 3)
    expected = state_of(policy, layout)

    saver, policy, layout = make(world, path, half)
    assert restored(saver) == (3, SAVED, 7)
    check_equal(policy, layout, expected)
    backend = policy.backend
    assert backend is not None
    assert backend.counters() == {"num_steps": 4, "num_skipped": 0}
    masters_here = backend.state_tensors()
    for name, (weight, _) in backend.local_tensors().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, masters_here[f"weights/{name}"][0].bfloat16()), name


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saving")
    make_tiny_model(root / "model")
    return root


def test_bfloat16_checkpoints_cross_between_replicas_and_shards(root: Path) -> None:
    path = write_config(root / "cross.yaml", root / "model", root / "cross")
    run_ranks(cross, 2, path)


def begin_afresh(world: World, path: Path, run_dir: Path) -> None:
    saver, policy, _ = make(world, path)
    assert restored(saver) == (0, {}, 0)
    save(saver, 1)
    index = run_dir / "checkpoints" / "step_00000001" / "checkpoint.json"
    written = index.stat().st_ino
    train(policy)
    save(saver, 1)  # as a run's end does after the last step's checkpoint
    assert index.stat().st_ino == written
    save(saver, 2)

    saver, _, _ = make(world, path, "checkpoint.resume=false")
    assert restored(saver) == (0, {}, 0)
    assert [p.name for p in run_dir.iterdir()] == ["checkpoints.old-1"]
    torch.distributed.barrier()
    save(saver, 1)

    saver, _, _ = make(world, path)
    assert restored(saver) == (1, SAVED, 7)
    written = index.stat().st_ino
    save(saver, 1)  # it has just been loaded
    assert index.stat().st_ino == written
    with pytest.raises(ValueError, match=r"seed=3, the configuration has seed=4"):
        make(world, path, "seed=4")[0].restore()
    saver, _, _ = make(world, path)
    saver._config = saver._config.model_copy(update={"flow": "ppo"})
    with pytest.raises(ValueError, match=r"by flow=grpo, the configuration has flow=ppo"):
        saver.restore()
    saver._config = saver._config.model_copy(update={"flow": "copy_of_grpo.py:main"})
    assert restored(saver)[0] == 1
    kept = run_dir / "checkpoints.old-1" / "step_00000002" / "checkpoint.json"
    assert json.loads(kept.read_text())["state"]["steps_done"] == 2


def test_a_fresh_start_keeps_older_checkpoints_aside_and_never_resumes_them(root: Path) -> None:
    path = write_config(root / "afresh.yaml", root / "model", root / "afresh")
    run_ranks(begin_afresh, 2, path, root / "afresh")
