"""Whole tensors of a role on one rank, and what clauses read of a role: gradients and steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.models.local_shards import LocalTensors, local_box
from spmdrl.testing.cases import loss_fn, make_rows
from spmdrl.testing.subject import Role
from spmdrl.training.protocol import LossFn, OptimStep
from spmdrl.training.readout import Readout, next_token

TEMPERATURE = 0.8
NORMALISER = 50.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step: the metrics of its minibatch, and what became of it."""

    sums: dict[str, float]
    done: OptimStep


def take_step(
    role: Role,
    rows: Batch,
    *,
    loss: LossFn = loss_fn,
    readout: Readout | None = None,
    normaliser: float = NORMALISER,
) -> Step:
    """Make one optimizer step over the rows of this rank's replica."""
    given = next_token(TEMPERATURE) if readout is None else readout
    sums = role.held.forward_backward(rows, loss, given, normaliser=normaliser)
    return Step(sums=sums, done=role.held.optim_step())


def logprobs(role: Role, rows: Batch, temperature: float = TEMPERATURE) -> Tensor:
    """Read the log-probabilities [T] of rows."""
    return role.held.forward(rows, next_token(temperature))["logprobs"]


def copies(tensors: LocalTensors) -> dict[str, Tensor]:
    """Copy local tensors, by local name."""
    return {name: tensor.detach().clone() for name, (tensor, _) in tensors.items()}


def everything(role: Role) -> LocalTensors:
    """Return the weights and the state of a role."""
    return {**role.held.local_tensors(), **role.held.state_tensors()}


def of_kind(tensors: LocalTensors, kind: str) -> LocalTensors:
    """Return the state of one kind: `weights`, `exp_avg` or `exp_avg_sq`."""
    return {name: held for name, held in tensors.items() if name.startswith(f"{kind}/")}


def whole_tensors(tensors: LocalTensors) -> dict[str, Tensor]:
    """Assemble global tensors of what one rank holds of them, by global name, in float32."""
    found: dict[str, Tensor] = {}
    for tensor, slices in tensors.values():
        for piece in slices:
            if piece.name not in found:
                found[piece.name] = torch.zeros(piece.shape)
            box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
            found[piece.name][box] = local_box(tensor, piece).detach().float().cpu()
    return found


def whole_state(role: Role, kind: str) -> dict[str, Tensor]:
    """Assemble the state of one kind that a role on one rank holds."""
    return whole_tensors(of_kind(role.held.state_tensors(), kind))


GRADIENTS = {"clip_norm": float("inf"), "betas": (0.0, 0.999), "lr": 1e-30, "weight_decay": 0.0}
"""Keys of `train` with which a step leaves the weights as they are, and the gradient in AdamW's
first moment, which every backend can be asked for."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """A minibatch's gradient as a role made with `GRADIENTS` leaves it; its slices are float32."""

    step: Step
    slices: LocalTensors


def gradient_of(
    role: Role, rows: Batch, *, loss: LossFn = loss_fn, normaliser: float = NORMALISER
) -> Gradient:
    """Compute the gradient of the rows of this rank's replica, summed over the role's ranks."""
    step = take_step(role, rows, loss=loss, normaliser=normaliser)
    moments = of_kind(role.held.state_tensors(), "exp_avg")
    held = {name: (tensor.detach().clone(), slices) for name, (tensor, slices) in moments.items()}
    return Gradient(step=step, slices=held)


def probe(seed: int = 9) -> Batch:
    """Make rows that are only read."""
    return make_rows([5, 2], 2, seed=seed)
