"""Scalar heads with a bias: values at loss tokens and scores of rows, on every layout, against row
by row.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import dense, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import RandomCheckpoint, fill
from spmdrl.models.sharding import all_slices
from spmdrl.models.tensors import Slice
from spmdrl.training.packing import pack
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import SCORES, VALUES, Readout, next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

CPU = torch.device("cpu")
MODEL = replace(tiny_config(), score_bias=True)
READOUTS = {"values": VALUES, "scores": SCORES}


class LivelyScores:
    """Random weights, ten times larger than those of a fresh model."""

    def __init__(self, model: ModelConfig = MODEL) -> None:
        self._plain = RandomCheckpoint(model, 0, head="score")
        self.names, self.shape = self._plain.names, self._plain.shape

    def read(self, part: Slice) -> Tensor:
        return self._plain.read(part) * (1 if part.name.endswith("norm.weight") else 10)


def loss_fn(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Not linear in what was read; weighted by a column of tokens or of rows."""
    (outputs,) = given.outputs.values()
    weight = given.columns["weight"] if given.columns else given.rows["weigh"][given.row]
    return (weight * outputs.square() + 0.3 * outputs).sum(), {
        "tokens": torch.tensor(float(len(outputs))).double()
    }


def rows() -> Batch:
    batch = make_rows([6, 3, 9, 4], 3, seed=1)
    return batch.with_columns(rows={"weigh": torch.linspace(-1, 2, len(batch))})


def naive(decoder: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """values [T] (0 at prompts) and scores [B], row by row."""
    assert decoder.head is not None
    bias = 0.0 if decoder.head.bias is None else decoder.head.bias
    values, scores = [], []
    for tokens, prompt in zip(
        torch.split(batch["tokens"], batch.lengths.tolist()),
        batch["prompt_lengths"].tolist(),
        strict=True,
    ):
        hidden = decoder(tokens, torch.arange(len(tokens)), dense)
        read = (hidden @ decoder.head.weight.T)[:, 0] + bias
        values.append(torch.cat((read.new_zeros(prompt), read[prompt - 1 : -1])))
        scores.append(read[-1])
    return torch.cat(values), torch.stack(scores)


def share_of(batch: Batch, mesh: Mesh) -> Batch:
    replica, count = mesh.coordinate("dp"), mesh.size("dp")
    return batch.select([i for i in range(len(batch)) if i // 3 % count == replica])


def run_layouts(
    world: World, cases: list[tuple[dict[str, int], dict[str, Any]]]
) -> list[dict[str, Any]]:
    results = []
    for degrees, changes in cases:
        mesh = Mesh("value", range(world.size), degrees, "cpu")
        found: dict[str, Any] = {}
        for name, readout in READOUTS.items():
            backend = TorchBackend(
                mesh, MODEL, LivelyScores(), options(**changes), CPU, head="score"
            )
            own = share_of(rows(), mesh)
            found[f"{name} before"] = backend.forward(own, readout)[name]
            loss = backend.forward_backward(own, loss_fn, readout, normaliser=7.0)["loss"]
            norm = backend.optim_step().grad_norm
            found |= {f"{name} loss": loss, f"{name} norm": norm}
            found[f"{name} after"] = backend.forward(own, readout)[name]
        results.append({"replica": mesh.coordinate("dp"), "replicas": mesh.size("dp"), **found})
    return results


def reference(model: ModelConfig = MODEL) -> dict[str, Any]:
    batch, found = rows(), {}
    for name in READOUTS:
        decoder = Decoder(model, device="cpu", head="score")
        held = all_slices(decoder.model, 0, 1, head="score")
        fill(((p.data, held[n]) for n, p in decoder.named_parameters()), LivelyScores(model))
        values, scores = naive(decoder, batch)
        mask = torch.arange(batch.num_tokens) - batch.offsets()[:-1].repeat_interleave(
            batch.lengths
        ) >= batch["prompt_lengths"].repeat_interleave(batch.lengths)
        read, weight = (
            (values[mask], batch["weight"][mask]) if name == "values" else (scores, batch["weigh"])
        )
        loss = (weight * read.square() + 0.3 * read).sum() / 7
        loss.backward()
        norm = torch.cat([p.grad.flatten().double() for p in decoder.parameters()]).norm()
        found |= {f"{name} loss": loss.item(), f"{name} norm": norm.item()}
        found[f"{name} before"] = (values if name == "values" else scores).detach()
    return found


CASES: dict[int, list[tuple[dict[str, int], dict[str, Any]]]] = {
    1: [({}, {}), ({}, {"share_prompts": False}), ({}, {"microbatch_tokens": 1})],
    2: [({"dp_replicate": 2}, {}), ({"dp_shard": 2}, {}), ({"tp": 2}, {}), ({"cp": 2}, {})],
    4: [({"dp_shard": 2, "tp": 2}, {}), ({"dp_shard": 2, "cp": 2}, {})],
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scalar_heads_equal_row_by_row_on_every_layout(world_size: int) -> None:
    expected, batch = reference(), rows()
    for ranks in zip(*run_ranks(run_layouts, world_size, CASES[world_size]), strict=True):
        for name in READOUTS:
            assert ranks[0][f"{name} loss"] == pytest.approx(expected[f"{name} loss"], rel=1e-4)
            assert ranks[0][f"{name} norm"] == pytest.approx(expected[f"{name} norm"], rel=1e-4)
        for found in ranks:
            mine = [i for i in range(len(batch)) if i // 3 % found["replicas"] == found["replica"]]
            whole = batch.with_columns(
                tokens={"values": expected["values before"]},
                rows={"scores": expected["scores before"]},
            ).select(mine)
            for name in READOUTS:
                torch.testing.assert_close(
                    found[f"{name} before"], whole[name], rtol=1e-4, atol=1e-5
                )
                assert not torch.equal(found[f"{name} before"], found[f"{name} after"])


def wrong_head(world: World) -> None:
    backend = TorchBackend(
        Mesh("value", [0], {}, "cpu"), MODEL, LivelyScores(), options(), CPU, head="score"
    )
    with pytest.raises(ValueError, match=r"'value' has the head 'score'.*logprobs.*'lm'"):
        backend.forward(rows(), next_token())


def test_a_readout_of_another_head_is_refused() -> None:
    run_ranks(wrong_head, 1)


def test_rows_are_read_at_their_last_token_and_empty_rows_not_at_all() -> None:
    batch = make_rows([4], 2)
    (found,) = pack(batch, budget_tokens=100, share_prompts=True, places="rows")
    lengths = batch.lengths.tolist()
    # the shared prompt once, then each response to its end
    assert len(found.tokens) == sum(lengths) - 4
    assert found.predict.tolist() == [lengths[0] - 1, sum(lengths) - 4 - 1]
    assert found.destination.tolist() == [0, 1]
    assert found.tokens[found.predict].tolist() == found.targets.tolist()
    none = Batch(
        lengths=torch.tensor([0, 3]),
        tokens={"tokens": torch.tensor([5, 6, 7])},
        rows={"prompt_lengths": torch.tensor([0, 3])},
    )
    (alone,) = pack(none, budget_tokens=100, share_prompts=True, places="rows")
    assert alone.destination.tolist() == [1] and alone.predict.tolist() == [2]
    assert alone.row.tolist() == [1] and alone.rows.tolist() == [0, 1]


def test_readouts_name_their_columns() -> None:
    assert isinstance(next_token(0.5), Readout) and next_token(0.5).temperature == 0.5
    assert VALUES.is_per_token and not SCORES.is_per_token


def warned(world: World) -> list[str]:
    mesh = Mesh("value", range(world.size), {"dp_shard": 2}, "cpu")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        backend = TorchBackend(mesh, MODEL, LivelyScores(), options(), CPU, head="score")
        for readout in READOUTS.values():
            backend.forward(rows(), readout)
            backend.forward_backward(rows(), loss_fn, readout, normaliser=9.0)
            backend.optim_step()
    return [str(warning.message) for warning in seen]


def test_a_sharded_scalar_head_trains_without_a_warning() -> None:
    assert run_ranks(warned, 2) == [[], []]
