"""`roles.NAME.freeze`: parameters that stay as they are while the others are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config

from flow_cases import run_configs, write_config
from harness import run_ranks
from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import read_config
from spmdrl.models.files.hf import open_checkpoint
from spmdrl.models.tensors import Slice
from spmdrl.planning.frozen import frozen_names
from spmdrl.run.assembly.assembly import assemble, open_models, plan_models
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from tiny_model import make_tiny_model

FROZEN = frozenset({"model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"})
LOCAL = {"embed_tokens.weight", "layers.0.mlp.down.weight"}


def trained(
    world: World, degrees: dict[str, int], dtype: torch.dtype, frozen: frozenset[str]
) -> dict[str, Any]:
    """One step: its gradient's norm, every parameter before and after, the optimizer's tensors."""
    config = tiny_config()
    given = options(param_dtype=dtype, frozen=frozen, clip_norm=1e9)
    mesh = Mesh("policy", range(world.size), degrees, "cpu")
    backend = TorchBackend(mesh, config, LivelyCheckpoint(config), given, torch.device("cpu"))

    def weights() -> dict[str, tuple[Tensor, tuple[Slice, ...]]]:
        return {n: (t.clone(), slices) for n, (t, slices) in backend.local_tensors().items()}

    before = weights()
    rows = make_rows([4, 6], 2, seed=mesh.coordinate("dp"))
    backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
    norm = backend.optim_step().grad_norm
    backend.forward(rows, next_token(1.0))
    parts = backend.parts()
    return {
        "norm": norm,
        "before": before,
        "after": weights(),
        "states": set(backend.state_tensors()),
        "optimizer_numbers": sum(t.numel() for t in parts["optimizer"]),
        # masters where weights are narrow, and two moments
        "trained_numbers": sum(
            t.numel() * (3 if t.dtype == torch.bfloat16 else 2)
            for n, (t, _) in before.items()
            if n not in LOCAL
        ),
    }


@pytest.mark.parametrize(
    ("degrees", "dtype"),
    [
        ({}, torch.float32),
        ({"dp_shard": 2}, torch.bfloat16),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ({}, torch.bfloat16),
                ({"dp_shard": 2}, torch.float32),
                ({"dp_replicate": 2}, torch.float32),
                ({"tp": 2}, torch.bfloat16),
            )
        ),
    ],
)
def test_frozen_parameters_stay_and_have_no_state(
    degrees: dict[str, int], dtype: torch.dtype
) -> None:
    size = next(iter(degrees.values()), 1)
    without = run_ranks(trained, size, degrees, dtype, frozenset())
    found = run_ranks(trained, size, degrees, dtype, FROZEN)
    for own, all_trained in zip(found, without, strict=True):
        assert 0 < own["norm"] < all_trained["norm"]
        for name, (tensor, _) in own["after"].items():
            before, expected = own["before"][name][0], all_trained["after"][name][0]
            assert torch.equal(tensor, before) == (name in LOCAL), name
            if name in LOCAL:
                assert tensor.dtype == dtype, f"{name} does not train: no more digits than computed"
            assert (f"exp_avg/{name}" in own["states"]) == (name not in LOCAL)
            if name not in LOCAL:
                # a step is at most lr = 0.01, in bfloat16 a few last digits
                atol = 1e-5 if dtype == torch.float32 else 0.02
                assert torch.allclose(tensor.float(), expected.float(), rtol=0, atol=atol), name
        assert own["optimizer_numbers"] == own["trained_numbers"]


def test_plans_hold_what_is_frozen_in_its_dtype(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    words = [
        "model.dtype=bfloat16",
        "roles.policy.dp_shard=2",
        f"roles.policy.freeze={sorted(FROZEN)}",
    ]
    for differing in run_ranks(layout_differences, 2, str(path), words):
        assert differing == {}


def layout_differences(world: World, path: str, words: list[str]) -> dict[str, Any]:
    """Tensor -> its planned and its real shape and dtype, where they differ."""
    config = load_config(path, words)
    models = open_models(config)
    plan = plan_models(config, world, models)
    assembly = assemble(config, world, models, None, plan)
    policy = assembly.trained["policy"]
    assert policy.backend is not None
    planned = plan.layouts["policy"][world.rank]
    found = {
        name: (tuple(tensor.shape), tensor.dtype, [tuple(s.start) for s in slices])
        for name, (tensor, slices) in policy.backend.local_tensors().items()
    }
    wanted = {
        name: (held.shape, held.dtype, [tuple(s.start) for s in held.slices])
        for name, held in planned.items()
    }
    assert {held.dtype for name, held in planned.items() if name in LOCAL} == {torch.bfloat16}
    return {n: (wanted.get(n), found.get(n)) for n in wanted | found if wanted[n] != found[n]}


def test_patterns_name_what_there_is(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    shape = read_config(tmp_path / "model")

    def frozen(*patterns: str) -> frozenset[str]:
        config = load_config(path, [f"roles.policy.freeze={list(patterns)}"])
        return frozen_names(specs_of(config, shape)["policy"])

    assert frozen() == frozenset()
    names = frozen("model.embed_tokens.weight", "*.layers.1.self_attn.*_proj.weight")
    assert names == {"model.embed_tokens.weight"} | {
        f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkvo"
    }
    with pytest.raises(ValueError, match=r"roles\.policy\.freeze=\['embed'\]: no parameter fits"):
        frozen("embed")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* lie in one tensor"):
        frozen("*q_proj*")
    with pytest.raises(ValueError, match=r"every parameter; set roles\.policy\.trained: false"):
        frozen("*")


def test_freezing_what_is_not_trained_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    with pytest.raises(ValueError, match=r"roles\.policy\.freeze=.*policy is not trained"):
        load_config(path, ["roles.policy.freeze=[model.norm.weight]", "roles.policy.trained=false"])


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_run_syncs_what_is_frozen_once(tmp_path: Path, kept: bool) -> None:
    """Or every time, where the engine drops its weights; the checksums of each sync are right."""
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    words = [
        "roles.policy.tp=2", "roles.rollout.tp=1", "model.dtype=float32", "checkpoint.export=true",
        "rollout.sync_check_every=1", "roles.policy.freeze=[model.embed_tokens.weight]",
        f"roles.rollout.residency.weights={'keep' if kept else 'drop'}",
    ]  # fmt: skip
    [records] = run_ranks(run_configs, 2, [(str(path), words)], str(tmp_path))[0]
    sizes = [record["sync/gb"] for record in records]
    shape = read_config(tmp_path / "model")
    table = shape.vocab_size * shape.hidden_size * 4 / 1e9  # each rank gets half of it
    assert sizes == pytest.approx([sizes[0], *[sizes[0] - table * kept] * 2], rel=1e-9)
    before, after = (
        open_checkpoint(tmp_path / "model"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    changed = {
        name for name, tensor in after.items() if not torch.equal(tensor, whole(before, name))
    }
    assert set(after) - changed == {"model.embed_tokens.weight"}


def whole(checkpoint: Any, name: str) -> Tensor:
    shape = checkpoint.shape(name)
    part = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
    return checkpoint.read(part).float()
