"""Steps of a train backend, for tests of all backends: on any layout they are those of one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter, adapter_shapes
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.sharding import buffer_names, global_shapes
from spmdrl.testing.cases import without_signal
from spmdrl.training.options import TrainOptions
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

TEMPERATURE = 0.8
NUM_STEPS = 3


def make_backend(
    world: World,
    given: TrainOptions,
    model: ModelConfig,
    *,
    trainable: bool = True,
    **degrees: int,
) -> TorchBackend:
    mesh = Mesh("policy", range(world.size), degrees, "cpu")
    return TorchBackend(
        mesh, model, LivelyCheckpoint(model), given, torch.device("cpu"), trainable=trainable
    )


def assemble(parts: list[LocalTensors], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' slices; copies of a slice must be equal, nothing missing."""
    whole = {n: torch.full(s, float("nan")) for n, s in shapes.items()}
    for part in parts:
        for tensor, slices in part.values():
            for s in slices:
                box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
                values = tensor[s.offset : s.offset + s.rows].view(s.size).float()
                held = whole[s.name][box]
                assert held.isnan().all() or torch.allclose(held, values, atol=1e-6), s
                whole[s.name][box] = values
    assert not any(t.isnan().any() for t in whole.values())
    return whole


def rows_of_step(step: int, num_replicas: int, replica: int) -> Batch:
    """Unequal shares: the last replica gets no rows in step 1, and most of them otherwise."""
    batch = make_rows([6, 3, 9, 4], 3, seed=step, seconds=step == 2)
    groups = (batch["prompt_ids"] - 100).tolist()
    empty = num_replicas - 1 if step == 1 and num_replicas > 1 else None
    used = [r for r in range(num_replicas) if r != empty]
    owner = [used[min(g, len(used) - 1)] for g in groups]
    return batch.select([i for i, r in enumerate(owner) if r == replica])


RowsOf = Callable[[int, int, int], Batch]
"""Step, number of replicas, replica -> its rows."""


def train(backend: TorchBackend, rows_of: RowsOf = rows_of_step) -> dict[str, Any]:
    """Three optimizer steps; metrics, log-probabilities before and after, and local tensors."""
    mesh = backend.mesh
    replicas, replica = mesh.size("dp"), mesh.coordinate("dp")
    record: dict[str, Any] = {"steps": []}
    probe = make_rows([5, 2], 2, seed=9)
    record["before"] = backend.forward(probe, next_token(TEMPERATURE))["logprobs"]
    for step in range(NUM_STEPS):
        rows = rows_of(step, replicas, replica)
        # Between updates the weights are read: nothing gathered may go stale.
        backend.forward(rows, next_token(1.0))
        sums = backend.forward_backward(rows, loss_fn, next_token(TEMPERATURE), normaliser=50.0)
        done = backend.optim_step()
        record["steps"].append((sums, done))
    record["after"] = backend.forward(probe, next_token(TEMPERATURE))["logprobs"]
    record["weights"] = clone(backend.local_tensors())
    record["state"] = clone(backend.state_tensors())
    record["counters"] = backend.counters()
    return record


def clone(tensors: LocalTensors) -> LocalTensors:
    return {name: (tensor.clone(), slices) for name, (tensor, slices) in tensors.items()}


def run_layouts(
    world: World,
    model: ModelConfig,
    cases: list[tuple[dict[str, int], dict[str, Any]]],
    rows_of: RowsOf = rows_of_step,
) -> list[dict[str, Any]]:
    return [
        train(make_backend(world, options(**changes), model, **degrees), rows_of)
        for degrees, changes in cases
    ]


def compare(
    found: list[dict[str, Any]],
    expected: dict[str, Any],
    model: ModelConfig,
    adapter: Adapter | None = None,
) -> None:
    """All ranks of one layout against the single rank."""
    added = {} if adapter is None else adapter_shapes(model, adapter)
    shapes = global_shapes(model) | added
    for record in found:
        assert [done for _, done in record["steps"]] == [done for _, done in found[0]["steps"]]
        torch.testing.assert_close(record["before"], expected["before"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(record["after"], expected["after"], rtol=1e-4, atol=1e-4)
        for (sums, done), (wanted_sums, wanted) in zip(
            record["steps"], expected["steps"], strict=True
        ):
            assert sums == pytest.approx(wanted_sums, rel=1e-4)
            assert done.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
            assert (done.lr, done.skipped) == (wanted.lr, False)
        assert record["counters"] == {"num_steps": NUM_STEPS, "num_skipped": 0}
    weights = assemble([record["weights"] for record in found], shapes)
    for name, wanted in assemble([expected["weights"]], shapes).items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    for moment in ("exp_avg", "exp_avg_sq"):
        prefix = f"{moment}/"
        parts = [{n: t for n, t in r["state"].items() if n.startswith(prefix)} for r in found]
        wanted_part = {n: t for n, t in expected["state"].items() if n.startswith(prefix)}
        trained = added or {n: s for n, s in shapes.items() if n not in buffer_names(model)}
        moments = assemble(parts, trained)
        for name, wanted in assemble([wanted_part], trained).items():
            torch.testing.assert_close(moments[name], wanted, rtol=1e-3, atol=1e-5, msg=name)


def still(backend: Any) -> None:
    """A minibatch without signal after one with: weights, moments and schedule stay."""
    rows = make_rows([4, 6], 2, seed=backend.mesh.coordinate("dp"))
    backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
    assert not backend.optim_step().no_gradient
    before = {**clone(backend.local_tensors()), **clone(backend.state_tensors())}
    backend.forward_backward(rows, without_signal, next_token(1.0), normaliser=9.0)
    done = backend.optim_step()
    assert (done.grad_norm, done.no_gradient, done.skipped) == (0.0, True, False)
    assert backend.counters() == {"num_steps": 1, "num_skipped": 0}
    after = {**backend.local_tensors(), **backend.state_tensors()}
    for name, (tensor, _) in before.items():
        assert torch.equal(tensor, after[name][0]), name
    backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
    done = backend.optim_step()
    assert done.lr == pytest.approx(1e-2 * 2 / 4), "the second step of a warm-up of four"
    assert backend.counters() == {"num_steps": 2, "num_skipped": 0}
