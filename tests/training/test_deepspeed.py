"""The DeepSpeed backend equals the torch backend, for every stage, dtype and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_runs import clone, compare, run_layouts, still
from backend_runs import make_backend as make_torch
from deepspeed_cases import Case, asked, brief, case, make_backend, run_cases
from torch import Tensor
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.memory.storages import distinct_storages
from spmdrl.models.adapters import Adapter
from spmdrl.models.blocks.projections import Embedding, Projection
from spmdrl.models.family import families
from spmdrl.models.zero_layout import Stage
from spmdrl.planning.support import tiny_of
from spmdrl.testing.cases import not_finite
from spmdrl.training.deepspeed.backend import DeepspeedBackend
from spmdrl.training.deepspeed.options import DeepspeedOptions, check_role
from spmdrl.training.deepspeed.settings import check_user, engine_settings, read_user
from spmdrl.training.readout import next_token
from spmdrl.world import World

pytestmark = pytest.mark.deepspeed

SHORT = {"microbatch_tokens": 20}
STAGES: tuple[Stage, ...] = (1, 2, 3)
NARROW = {"param_dtype": torch.bfloat16}

LAYOUTS: dict[str, Case] = {
    "1": case(1, dp_shard=2),
    "1 short": case(1, given=SHORT, dp_replicate=2),
    "2": case(2, dp_shard=2),
    "2 short": case(2, given={**SHORT, "recompute": "layer"}, dp_replicate=2),
    "2 cp": case(2, cp=2),
    "1 tp": case(1, tp=2),
    "2 tp": case(2, given=SHORT, tp=2),
    "3": case(3, dp_shard=2),
    "3 short": case(3, given={**SHORT, "recompute": "layer"}, dp_replicate=2),
    "3 cp": case(3, cp=2),
    "3 tp": case(3, given=SHORT, tp=2),
    "1 offload": case(1, "optimizer", given=SHORT, dp_shard=2),
    "2 offload": case(2, "optimizer", given=SHORT, dp_shard=2),
    "3 offload": case(3, "optimizer", given=SHORT, dp_shard=2),
    "3 offload all": case(3, "all", given=SHORT, dp_shard=2),
}
KINDS: dict[str, Case] = {
    f"{stage} {name}": case(stage, given=given, dp_shard=2)
    for stage in STAGES
    for name, given in {"float32": {}, "bfloat16": NARROW}.items()
}
"""Every optimizer class of DeepSpeed that the backend meets."""
AWAY: dict[str, Case] = {
    f"{stage} offload": case(stage, "optimizer", given=NARROW, dp_shard=2) for stage in STAGES
}


BRIEF = ("1 float32", "2 bfloat16", "3 bfloat16")
"""Kinds that are tried every time."""


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What two ranks found, in one launch for all tests that are asked for."""
    layouts = {name: LAYOUTS[name] for name in asked(request, "test_every_layout_trains_as_torch")}
    kinds = (KINDS | AWAY).items()
    names = asked(request, "test_gradients_of_microbatches_are_summed_in_float32")
    made = {name: kind for name, kind in kinds if name in names}
    return run_ranks(on_two_ranks, 2, layouts, made, timeout_s=900)


def on_two_ranks(world: World, layouts: dict[str, Case], kinds: dict[str, Case]) -> dict[str, Any]:
    model = tiny_config()
    held = {name: made for name, made in kinds.items() if name in KINDS}
    return {
        "layouts": run_cases(world, model, layouts),
        "sums": {name: summed(world, made) for name, made in kinds.items()},
        "failed": {name: failing(world, made) for name, made in kinds.items()},
        "still": {n: still(make_backend(world, model, warm(made))) for n, made in held.items()},
        "resumed": {name: resumed(world, made) for name, made in held.items()},
        "away": {name: away(world, made) for name, made in held.items()},
        "meshes": on_two_meshes(world),
    }


def warm(made: Case) -> Case:
    degrees, deepspeed, changes = made
    return degrees, deepspeed, {**changes, "warmup_steps": 4}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """One rank's record on the torch backend."""
    found: dict[str, Any] = run_ranks(run_layouts, 1, tiny_config(), [({}, {})])[0][0]
    return found


@pytest.mark.parametrize("name", brief(LAYOUTS, "1", "2 short", "3 short", "3 tp"))
def test_every_layout_trains_as_torch(
    one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    compare([rank["layouts"][name] for rank in two], one, tiny_config())


def summed(world: World, made: Case) -> list[tuple[float, float]]:
    """Norms by DeepSpeed and by torch, of the sums of 1, 3 and 5 microbatches of unequal sizes, in
    two calls.
    """
    model, (degrees, _, changes) = tiny_config(), made
    found = []
    backend = make_backend(world, model, made)
    torch_backend = make_torch(world, options(**changes), model, dp_replicate=2)
    for module in torch_backend._decoder.modules():  # a microbatch's gradient is rounded, as here
        if isinstance(module, (Projection, Embedding)):
            module.gradient_sum = None
    for prompts in ([5], [9, 3, 6], [2, 11, 4, 7, 3]):
        norms = []
        for one in (backend, torch_backend):
            rows = make_rows(prompts, 1 + world.rank, seed=7)
            for row in range(len(prompts)):
                part = rows.select([i for i, p in enumerate(rows["prompt_ids"]) if p == 100 + row])
                one.forward_backward(part, loss_fn, next_token(1.0), normaliser=3.0)
            norms.append(one.optim_step().grad_norm)
        found.append((norms[0], norms[1]))
    assert degrees
    return found


@pytest.mark.parametrize("name", brief(KINDS | AWAY, *BRIEF))
def test_gradients_of_microbatches_are_summed_in_float32(
    two: list[dict[str, Any]], name: str
) -> None:
    for rank in two:
        for found, wanted in rank["sums"][name]:
            assert found == pytest.approx(wanted, rel=1e-6)


def failing(world: World, made: Case) -> None:
    """One replica's gradient is not finite: all of them skip, and nothing of it is left."""
    backend = make_backend(world, tiny_config(), warm(made))
    rows = make_rows([4], 2)
    before = {**clone(backend.local_tensors()), **clone(backend.state_tensors())}
    given = not_finite if world.rank == 0 else loss_fn
    backend.forward_backward(rows, given, next_token(1.0), normaliser=1.0)
    done = backend.optim_step()
    assert done.skipped and done.lr == pytest.approx(1e-2 / 4)
    assert backend.counters() == {"num_steps": 1, "num_skipped": 1}
    after = {**backend.local_tensors(), **backend.state_tensors()}
    for name, (tensor, _) in before.items():
        assert torch.equal(tensor, after[name][0]), name
    backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=1.0)
    done = backend.optim_step()
    assert not done.skipped and 0 < done.grad_norm < float("inf")
    assert done.lr == pytest.approx(2e-2 / 4)
    assert backend.forward_backward(rows.select([]), loss_fn, next_token(1.0), normaliser=1.0) == {
        "loss": 0.0
    }
    assert backend.optim_step().no_gradient


def test_what_must_not_move_does_not(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert set(BRIEF) <= set(rank["still"]) and set(BRIEF) <= set(rank["failed"])


def step(backend: Any, seed: int) -> float:
    rows = make_rows([4, 6, 3], 2, seed=seed + backend.mesh.coordinate("dp"))
    backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
    return float(backend.optim_step().grad_norm)


def tensors_of(backend: DeepspeedBackend) -> dict[str, Tensor]:
    found = {**backend.local_tensors(), **backend.state_tensors()}
    return {name: tensor.clone() for name, (tensor, _) in found.items()}


def resumed(world: World, made: Case) -> list[str]:
    """What differs after a step when a second backend has taken over the first one's state."""
    first = make_backend(world, tiny_config(), made)
    for seed in (1, 2):
        step(first, seed)
    second = make_backend(world, tiny_config(), made)
    state = second.state_tensors()
    for name, (tensor, _) in first.state_tensors().items():
        state[name][0].copy_(tensor)
    second.restored(first.counters())
    norms = [step(backend, 3) for backend in (first, second)]
    assert norms[0] == norms[1] and first.counters() == second.counters()
    found, wanted = tensors_of(second), tensors_of(first)
    return [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]


def test_a_backend_resumes_exactly(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert set(BRIEF) <= set(rank["resumed"])
        assert {name: lost for name, lost in rank["resumed"].items() if lost} == {}


def away(world: World, made: Case) -> dict[str, Any]:
    """Bytes that stay when all parts leave, and whether they come back as they were."""
    backend = make_backend(world, tiny_config(), made)
    step(backend, 1)
    before = tensors_of(backend)
    storages = distinct_storages(t for part in backend.parts().values() for t in part)
    held = [storage.clone() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    left = sum(tensor.untyped_storage().nbytes() for tensor, _ in backend.local_tensors().values())
    left += sum(tensor.untyped_storage().nbytes() for tensor, _ in backend.state_tensors().values())
    engine, _ = backend._require_state()
    left += sum(p.untyped_storage().nbytes() for p in backend.body.decoder.parameters())
    left += gradient_bytes(engine.optimizer)
    with pytest.raises(ValueError, match=r"its (weights|optimizer) are not on the device"):
        step(backend, 2)
    for storage, values in zip(storages, held, strict=True):
        storage.resize_(values.nbytes())
        storage.copy_(values)
    after = tensors_of(backend)
    other = make_backend(world, tiny_config(), made)
    step(other, 1)
    return {
        "left": left,
        "differ": [name for name, tensor in before.items() if not torch.equal(tensor, after[name])],
        "norms": [step(backend, 2), step(other, 2)],
    }


def gradient_bytes(optimizer: Any) -> int:
    """Bytes of gradient buffers that a ZeRO optimizer keeps."""
    own = vars(optimizer)
    found = [*own.get("fp32_groups_gradients_flat", [])]
    if "grad_partitions_flat_buffer" in own:
        found += [
            own["grad_partitions_flat_buffer"],
            *(b.buffer for b in own["ipg_buckets"].values()),
        ]
    for groups in ("averaged_gradients", "all_grad_tensors"):
        for tensors in vars(optimizer).get(groups, {}).values():
            found += tensors or []
    return sum(tensor.untyped_storage().nbytes() for tensor in found)


def test_parts_leave_and_come_back(two: list[dict[str, Any]]) -> None:
    for rank in two:
        for name, found in rank["away"].items():
            assert found["left"] == 0 and found["differ"] == [], name
            assert found["norms"][0] == found["norms"][1], name


def on_two_meshes(world: World) -> dict[str, list[float]]:
    """Norms of two roles that train in turn: one on both ranks, one on rank 1 only."""
    model, found = tiny_config(), {}
    for stage in STAGES:
        made = case(stage, given=NARROW, dp_shard=2)
        policy = make_backend(world, model, made)
        mesh_of_one = case(stage, given=NARROW)
        value = (
            make_backend(world, model, mesh_of_one, role="value", ranks=[1])
            if world.rank == 1
            else outside(world)
        )
        norms = []
        for seed in (1, 2):
            norms.append(step(policy, seed))
            if value is not None:
                norms.append(step(value, seed))
        found[str(stage)] = norms
    return found


def outside(world: World) -> None:
    """Make the mesh of a role that this rank is not in."""
    from spmdrl.distributed.mesh import Mesh

    assert not Mesh("value", [1], {}, "cpu").is_member


def test_two_roles_have_engines_on_meshes_of_their_own(two: list[dict[str, Any]]) -> None:
    both, one = two[0]["meshes"], two[1]["meshes"]
    for stage, norms in one.items():
        assert norms[::2] == both[stage], "the role on both ranks"
        assert len(norms) == 4 and all(norms)
        # rows of rank 1 only, so less than the sum over both
        assert norms[1] != norms[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pp": ({"degrees": {"pp": 2}}, r"roles\.policy\.pp=2: .* has no pp"),
    "ep": ({"degrees": {"ep": 2}}, r"roles\.policy\.ep=2: .* has no ep"),
    "tp": ({"degrees": {"tp": 2}, "adapter": Adapter(targets={})}, r"roles\.policy\.tp=2 with an"),
    "all": ({"options": DeepspeedOptions(offload="all")}, "offload=all needs stage 3"),
    "base": (
        {"options": DeepspeedOptions(stage=3), "borrows": True, "adapter": Adapter(targets={})},
        r"roles\.policy\.base: train\.deepspeed\.stage=3 has one engine",
    ),
    "buffers": (
        {
            "options": DeepspeedOptions(stage=3),
            "model": tiny_of(families()["DeepseekV3ForCausalLM"]),
            "dtype": torch.bfloat16,
        },
        "would round the float32 buffers of DeepseekV3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    given: dict[str, Any] = {
        "degrees": {},
        "options": DeepspeedOptions(),
        "model": tiny_config(),
        "dtype": torch.float32,
        "trainable": True,
        "head": "lm",
        "adapter": None,
        "borrows": False,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        check_role("policy", **given)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "lr": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 3.0}}},
        r"params\.lr=3\.0: it is 0\.01",
    ),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, r'optimizer\.type="Lamb": it is "AdamW"'),
    "batch": ({"train_batch_size": 64}, "train_batch_size=64: the rows of a step"),
    "microbatch": ({"gradient_accumulation_steps": 4}, "train.microbatch_tokens decides"),
    "clipping": ({"gradient_clipping": 7.0}, r"gradient_clipping=7\.0: it is .*train\.clip_norm"),
    "fp16": ({"fp16": {"enabled": True}}, "there is no float16"),
    "bf16": ({"bf16": {"enabled": True}}, r"bf16\.enabled=true: it is false \(model\.dtype\)"),
    "dtype": ({"communication_data_type": "bf16"}, 'communication_data_type="bf16": it is "fp32"'),
    "stage": ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage=3: it is 2"),
    "order": ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients=true"),
    "offload": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        r"train\.deepspeed\.offload decides",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_json_that_contradicts_is_refused_by_key(name: str) -> None:
    user, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        check_user("policy", options(), DeepspeedOptions(config="ds.json"), user)


def test_a_json_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": options().clip_norm,
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": options().lr, "betas": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 123, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    path.write_text(json.dumps(given), encoding="utf-8")
    made = DeepspeedOptions(config=str(path))
    user = read_user("policy", made.config)
    check_user("policy", options(), made, user)
    settings = engine_settings(options(), made, 1000, user)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 123
    assert settings["zero_optimization"]["overlap_comm"] and settings["wall_clock_breakdown"]
    assert "optimizer" not in settings and "fp16" not in settings
    assert "train_batch_size" not in settings and settings["gradient_clipping"] == 0.0
    with pytest.raises(ValueError, match="there is no such file"):
        read_user("policy", str(tmp_path / "none.json"))
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_user("policy", str(path))
