"""What a train backend offers, and what a loss function is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Slice
from spmdrl.training.experts import EXPERT_METRICS, EXPERT_SUMS
from spmdrl.training.readout import Readout

LocalTensors = dict[str, tuple[Tensor, tuple[Slice, ...]]]
"""Local name -> the tensor that this rank holds and where it lies in the global name space."""


class Given(dict[str, Tensor]):
    """Columns by name.

    Raises:
        ValueError: a loss asks for one that it is not given.
    """

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"the loss asks for {name!r} and is given {sorted(self)}: name token columns of the "
            "batch in Update(columns=(...)); row columns all come along, and the readout says "
            "what was read"
        )


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """What was read of one microbatch, in order of its rows and places. Rows are always whole.

    `given["logprobs"]` is what the readout calls so: [N], with gradient, at loss tokens or at rows
    (see `training.readout`).

    Args:
        outputs: the readout's columns, [N] each, with gradient.
        columns: the batch's token columns at the loss tokens, [N, ...] each; none when rows are
            read.
        rows: the batch's row columns, [R, ...] each.
        row: [N] int64, the row of each place that was read.
        num_rows: R; a row of which nothing was read counts too.
    """

    outputs: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    row: Tensor
    num_rows: int

    def __getitem__(self, name: str) -> Tensor:
        return self.outputs[name]


Progress = Callable[[int, int], None]
"""Called with (microbatches done, microbatches) of this rank while a pass goes on."""

LossFn = Callable[[LossInput], tuple[Tensor, dict[str, Tensor]]]
"""The loss as an unnormalised sum over tokens (or rows), and metrics as unnormalised float64 sums
(maxima where the name ends in `_max`, see `spmdrl.algorithms.metrics`)."""


NO_GRADIENT = "no_gradient"
"""Metric of a minibatch: 1 where its gradient was exactly 0, and so nothing moved."""

STEP_METRICS = ("loss", "grad_norm", "lr", "skipped", NO_GRADIENT)
"""What an update says of an optimizer step as a whole."""

TAKEN = (*STEP_METRICS, *EXPERT_METRICS, *EXPERT_SUMS, "update_tokens")
"""Names of metrics that a loss may not have."""


def loss_of(loss_fn: LossFn, given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and metrics of one microbatch.

    Raises:
        ValueError: the function returns something else, or a metric with a name of the update's.
    """
    name, result = getattr(loss_fn, "__qualname__", repr(loss_fn)), loss_fn(given)
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    if not is_pair or not isinstance(result[0], Tensor) or result[0].ndim:
        raise ValueError(
            f"the loss function {name} must return (loss, metrics): a sum as a tensor without "
            "dimensions, and a dict of sums"
        )
    for metric, value in result[1].items():
        if metric in TAKEN:
            raise ValueError(
                f"the loss function {name} returns a metric {metric!r}, and the update has one of "
                "that name: give it another"
            )
        if not isinstance(value, Tensor) or value.ndim:
            raise ValueError(
                f"the loss function {name} must return its metric {metric!r} as a tensor without "
                "dimensions (a sum), and returns "
                + (f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value))
            )
    return result


@dataclass(frozen=True, kw_only=True)
class OptimStep:
    """Args:
    grad_norm: before clipping, over all parameters of the role; equal on its ranks.
    lr: of this step.
    skipped: the gradient was not finite, and nothing but the schedule moved.
    no_gradient: it was exactly 0, and nothing moved, the schedule neither: momentum and decay alone
        must not move the weights.
    """

    grad_norm: float
    lr: float
    skipped: bool
    no_gradient: bool


class TrainBackend(Protocol):
    """A model on a mesh. Every rank of a replica (cp x tp) is given the same rows; replicas may
    have unequally many, or none. Every method is called by all ranks of the mesh together.
    """

    @property
    def mesh(self) -> Mesh: ...

    @property
    def config(self) -> ModelConfig: ...

    def forward(self, batch: Batch, readout: Readout, *, progress: Progress | None = None) -> Batch:
        """The same rows with the readout's columns, float32: [T] with 0 at tokens outside the loss
        mask, or [B] with 0 for rows without tokens. Without gradient.

        Rows need the token column `tokens` and the row column `prompt_lengths`; `prompt_ids` (rows
        whose prompts may be computed once) and the token columns `loss_mask` and `expert_choices`
        (of a mixture of experts: to be taken instead of the model's own) are optional.
        """
        ...

    def forward_backward(
        self,
        batch: Batch,
        loss_fn: LossFn,
        readout: Readout,
        *,
        normaliser: float,
        whole_groups: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Add the gradient of sum(loss) / normaliser over one minibatch.

        Args:
            whole_groups: rows with one `prompt_ids` are in one microbatch, whatever its size, for
                losses that compare them.

        Returns the metrics and `loss` (divided by the normaliser), combined over the mesh's `dp`
        axis, equal on all its ranks; of a mixture of experts also how these were used (see
        `training.experts.ExpertUse`). Its balance loss, for which rows need `loss_share`, is in the
        gradient and not in `loss`.
        """
        ...

    def optim_step(self) -> OptimStep:
        """Clip, update the weights, move the schedule, clear the gradients."""
        ...

    def local_tensors(self) -> LocalTensors:
        """The weights on this rank, in the dtype that the model computes with (the master's where
        FSDP shards are the master); the storage itself, for sharing and for loading.
        """
        ...

    def parts(self) -> dict[str, list[Tensor]]:
        """What stays between calls, for memory sharing: `weights`, and the `optimizer`'s tensors
        where there is one. A call needs those that it uses on the device.
        """
        ...

    def state_tensors(self) -> LocalTensors:
        """What a checkpoint holds, on this rank: the master weights `weights/NAME` (the weights
        themselves where those are float32), and the optimizer's `exp_avg/NAME` and
        `exp_avg_sq/NAME`, all float32 in every layout and compute dtype; and `weights/NAME` of what
        does not train, as it is held. The storage itself. Empty when the role is frozen.
        """
        ...

    def counters(self) -> dict[str, int]:
        """The optimizer's scalar state, equal on all ranks."""
        ...

    def restored(self, counters: Mapping[str, int]) -> None:
        """Go on from a checkpoint, after `state_tensors()` have been filled: take its `counters()`
        and round the master weights into the weights that the model computes with.
        """
        ...
