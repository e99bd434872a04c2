"""Four models of equal size take turns on one rank: what is alive, seen from the storages."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppo_layouts import ON_HOST, settings

from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import read_metrics
from spmdrl.placement import place_roles
from spmdrl.planning.plan import plan_roles
from spmdrl.rewards.server import start_reward_server
from spmdrl.roles.handles import Rollout
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from tiny_model import make_tiny_model

SIZE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def make_models(root: Path) -> None:
    make_tiny_model(root / "model", **SIZE)
    make_tiny_model(root / "scalar", seed=1, head="score", **SIZE)


def live(num_bytes: int) -> int:
    """Bytes of the distinct storages of at least `num_bytes` of all tensors that Python knows, less
    host arenas: uint8 storages that no one computes with.
    """
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not found.is_meta and found.dtype != torch.uint8:
            storage = found.untyped_storage()
            if storage.nbytes() >= num_bytes:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured(world: World, path: str, words: list[str], limit: int) -> dict[str, int]:
    """The most live bytes seen within a forward or a backward pass, and after each role is made."""
    gc.collect()
    gc.freeze()  # `live` need not look through what there was before
    config = load_config(path, words)
    seen: dict[str, int] = {}

    def watch(name: str, inner: Any) -> Any:
        def outer(self: TorchBackend, *args: Any, **kwargs: Any) -> Any:
            result = inner(self, *args, **kwargs)
            seen[name] = max(seen.get(name, 0), live(limit))
            return result

        return outer

    # seen from within: after a pass its role's parts are still there, and gradients as well
    plain = {name: vars(TorchBackend)[name] for name in ("forward", "forward_backward")}
    for name, inner in plain.items():
        setattr(TorchBackend, name, watch(name, inner))
    try:
        with start_reward_server() as server:
            train(config, world, server)
    finally:
        for name, inner in plain.items():
            setattr(TorchBackend, name, inner)
    return seen


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    make_models(root)
    given = {**settings(root, environment=None), "steps": 2}
    path = write_config(root / "c.yaml", root / "model", root / "run", **given)
    limit = 64 * 1024
    found = {}
    for name, words in (("kept", []), ("host", ON_HOST)):
        run = [f"run_dir={root / name}"]
        found[name] = run_ranks(measured, 1, str(path), [*words, *run], limit, timeout_s=200)[0]
        found[f"{name} metrics"] = read_metrics(root / name / "metrics.jsonl")
    return found, root, path


def test_the_peak_is_that_of_the_largest_phase(peaks):
    found, root, _ = peaks
    one = (root / "model" / "model.safetensors").stat().st_size  # bytes of a model, float32
    # an update needs weights, gradients and AdamW's two moments; a forward pass weights alone
    kept, host = found["kept"], found["host"]
    assert kept["forward"] > 7.5 * one, "four models and two optimizers stay"
    assert host["forward"] < 1.6 * one
    assert host["forward_backward"] < 4.6 * one
    assert kept["forward_backward"] > host["forward_backward"] + 3.5 * one


def test_what_moves_is_recorded(peaks):
    found, root, _ = peaks
    one = (root / "model" / "model.safetensors").stat().st_size / 1e9
    record = [r for r in found["host metrics"] if "loss" in r][-1]
    assert record["memory/moved_gb"] > 4 * one
    assert record["memory/gb_per_s"] > 0
    assert record["memory/parts_gb/update"] == pytest.approx(3 * one, rel=0.05)
    # the rollout's parts are there until the reward's come
    assert record["memory/parts_gb/reward"] < 2 * one
    kept = [r for r in found["kept metrics"] if "loss" in r][-1]
    assert kept["memory/moved_gb"] == 0 and "memory/gb_per_s" not in kept
    assert kept["memory/parts_gb/update"] > 7.5 * one


def refused(world: World, path: str) -> str:
    config = load_config(path, ["memory_gb=0.001"])
    with start_reward_server() as server, pytest.raises(ValueError) as error:
        train(config, world, server)
    return str(error.value)


def test_roles_that_cannot_fit_are_refused_with_the_sizes(peaks):
    _, _, path = peaks
    for message in run_ranks(refused, 2, str(path)):
        assert "the device has 1.0" in message and "policy.weights" in message, message


def freed(world: World, path: str) -> None:
    config = load_config(path, ON_HOST)
    assembly = assemble(config, world, open_models(config), None)
    policy = assembly.trained["policy"]
    rows = Batch(
        lengths=torch.tensor([3]),
        tokens={"tokens": torch.tensor([5, 6, 7]), "loss_mask": torch.tensor([False, True, True])},
        rows={
            "prompt_lengths": torch.tensor([1]),
            "prompt_ids": torch.tensor([0]),
            "sample_index": torch.tensor([0]),
        },
    )
    value = assembly.trained["value"]
    assert policy.backend is not None and value.backend is not None
    for tensor in value.backend.parts()["weights"]:
        assert tensor.untyped_storage().nbytes() == 0
    with pytest.raises(ValueError, match=r"role 'policy': its weights are not on the device"):
        policy.backend.forward(rows, next_token())
    with assembly.parts.resident("policy", "weights"):
        assert policy.backend.forward(rows, next_token())["logprobs"].sum() < 0


def test_a_backend_refuses_parts_that_are_away(peaks):
    run_ranks(freed, 1, str(peaks[2]))


def synced(world: World, path: str, streams: bool) -> tuple[bool, list[torch.Tensor]]:
    """Whether the policy's weights are on the device after a sync, and the engine's weights."""
    # without the canary, whose calls would move the policy too
    words = ["roles.policy.dp_shard=2", "rollout.sync_check_every=0"]
    config = load_config(path, [*ON_HOST, *words])
    placements = place_roles(config, world.size)
    models = open_models(config)
    shapes = {name: opened.model for name, opened in models.items()}
    plan = plan_roles(config, placements, shapes, world.device_types)
    memory = {rank: replace(own, syncs_from_host=streams) for rank, own in plan.memory.items()}
    assembly = assemble(config, world, models, None, plan=replace(plan, memory=memory))
    assembly.syncs["policy", "rollout"].run()
    policy, rollout = assembly.trained["policy"], assembly.roles["rollout"]
    assert policy.backend is not None and isinstance(rollout, Rollout) and rollout.engine
    here = {t.untyped_storage().nbytes() > 0 for t in policy.backend.parts()["weights"]}
    assert len(here) == 1
    return here.pop(), [tensor.clone() for tensor, _ in rollout.engine.local_tensors().values()]


def test_a_sync_that_streams_reads_the_policys_weights_from_the_host(peaks):
    _, _, path = peaks
    streamed, plain = (run_ranks(synced, 2, str(path), streams) for streams in (True, False))
    assert [here for here, _ in streamed] == [False, False]
    assert [here for here, _ in plain] == [True, True]
    for (_, found), (_, expected) in zip(streamed, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_turns_on_a_gpu_change_nothing(tmp_path):
    """Parts in pinned arenas between calls: the losses of a run whose parts stay."""
    make_models(tmp_path)
    given = {**settings(tmp_path, environment=None), "steps": 2}
    given["model"] = {"path": str(tmp_path / "model"), "dtype": "float32"}
    given["data"] = {**given.get("data", {}), **questions(tmp_path / "questions.jsonl")}
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", **given)
    records = []
    for name, words in (("kept", []), ("host", ON_HOST)):
        words = [*words, f"run_dir={tmp_path / name}"]
        run_ranks(measured, 1, str(path), words, 1 << 16, timeout_s=300, device="cuda")
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        records.append([r for r in metrics if "loss" in r])
    for kept, host in zip(*records, strict=True):
        for metric in ("loss", "grad_norm", "value/loss", "score", "kl_per_response"):
            assert host[metric] == pytest.approx(kept[metric], rel=1e-3, abs=1e-5), metric
        assert host["memory/moved_gb"] > 0 and host["memory/gb_per_s"] > 0
        # half of them, and those of the next call that a device has room to prefetch
        assert host["memory/parts_gb/update"] < 0.8 * kept["memory/parts_gb/update"]
