"""The interfaces of train backends and of loss functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalTensors
from spmdrl.training.experts import EXPERT_METRICS, EXPERT_SUMS
from spmdrl.training.readout import Readout


class Given(dict[str, Tensor]):
    """Columns of a loss input, by name.

    Raises:
        ValueError: a loss asks for a column that it was not given.
    """

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"the loss asks for {name!r} and is given {sorted(self)}: name token columns of the "
            "batch in Update(columns=(...)); row columns all come along, and the readout says "
            "what was read"
        )


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """The values read from one microbatch, in order of its rows and places. Rows are always whole.

    `given["logprobs"]` is the readout's column of that name: [N], with gradient, at loss tokens or
    at rows (see `training.readout`).

    Args:
        outputs: the readout's columns, [N] each, with gradient.
        columns: the batch's token columns at the loss tokens, [N, ...] each; empty if rows are
            read.
        rows: the batch's row columns, [R, ...] each.
        row: [N] int64, the row of each place that was read.
        num_rows: R, which includes rows of which nothing was read.
    """

    outputs: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    row: Tensor
    num_rows: int

    def __getitem__(self, name: str) -> Tensor:
        return self.outputs[name]


MicrobatchProgress = Callable[[int, int], None]
"""Callback of a running pass with this rank's (microbatches done, microbatches)."""

LossFn = Callable[[LossInput], tuple[Tensor, dict[str, Tensor]]]
"""Loss function. It returns the loss, an unnormalised sum over tokens (or rows), and metrics as
unnormalised float64 sums (maxima if named `..._max`, see `spmdrl.algorithms.metrics`)."""


NO_GRADIENT = "no_gradient"
"""Metric of a minibatch: 1 if its gradient was exactly 0, so that nothing moved."""

STEP_METRICS = ("loss", "grad_norm", "lr", "skipped", NO_GRADIENT)
"""Metrics by which an update describes an optimizer step as a whole."""

TAKEN = (*STEP_METRICS, *EXPERT_METRICS, *EXPERT_SUMS, "update_tokens")
"""Metric names that a loss must not use."""


def loss_of(loss_fn: LossFn, given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss and metrics of one microbatch.

    Raises:
        ValueError: the function returns something else, or a metric whose name the update uses.
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
    grad_norm: norm before clipping, over all parameters of the role; equal on its ranks.
    lr: learning rate of this step.
    skipped: whether the gradient was not finite; then only the schedule moved.
    no_gradient: whether the gradient was exactly 0; then nothing moved, not even the schedule,
        since momentum and decay must not move the weights on their own.
    """

    grad_norm: float
    lr: float
    skipped: bool
    no_gradient: bool


class TrainBackend(Protocol):
    """A model on a mesh. All ranks of a replica (pp x cp x tp) are given the same rows; replicas
    may have different numbers of rows, or none. All ranks of the mesh call every method together.
    """

    @property
    def mesh(self) -> Mesh: ...

    @property
    def model(self) -> ModelConfig: ...

    def forward(
        self, batch: Batch, readout: Readout, *, progress: MicrobatchProgress | None = None
    ) -> Batch:
        """Return the rows with the readout's columns, float32: [T] with 0 at tokens outside the
        loss mask, or [B] with 0 for rows without tokens. No gradient is computed.

        Rows need the token column `tokens` and the row column `prompt_lengths`. Optional are the
        row column `prompt_ids` (equal for rows whose prompt may be computed once) and the token
        columns `loss_mask`, `part_start` (the first tokens of parts, see `training.packing`) and
        `expert_choices` (experts to use instead of the model's choice).
        """

    def forward_backward(
        self,
        batch: Batch,
        loss_fn: LossFn,
        readout: Readout,
        *,
        normaliser: float,
        whole_groups: bool = False,
        progress: MicrobatchProgress | None = None,
    ) -> dict[str, float]:
        """Add the gradient of sum(loss) / normaliser over one minibatch.

        With an adapter's dropout the rows need the row columns `prompt_ids` and `sample_index` too,
        see `training.dropout`.

        Args:
            whole_groups: put rows with equal `prompt_ids` into one microbatch, whatever its size,
                for losses that compare them.

        Returns the metrics and `loss` (divided by the normaliser), combined over the mesh's `dp`
        axis and equal on all its ranks; for a mixture of experts also the metrics of their use (see
        `training.experts.ExpertUse`). The balance loss, for which rows need `loss_share`, is part
        of the gradient but not of `loss`.
        """

    def optim_step(self) -> OptimStep:
        """Clip, update the weights, move the schedule, clear the gradients."""

    def local_tensors(self) -> LocalTensors:
        """Return this rank's weights, in the dtype that the model computes with (the master's if
        FSDP shards are the master): the storage itself, for sharing and for loading.
        """

    def parts(self) -> dict[str, list[Tensor]]:
        """Return the tensors that stay on the device between calls, for memory sharing: `weights`,
        and those of the `optimizer` if the role trains (none if its state stays on the host). A
        call needs the parts that it uses on the device.
        """

    def state_tensors(self) -> LocalTensors:
        """Return this rank's share of a checkpoint: the master weights `weights/NAME` (the weights
        themselves if those are float32), and the optimizer's `exp_avg/NAME` and `exp_avg_sq/NAME`,
        all float32 in every layout and compute dtype; also `weights/NAME` of parameters that do not
        train, in the dtype they are held in. The storage itself. Empty if the role is frozen.
        """

    def counters(self) -> dict[str, int]:
        """Return the optimizer's scalar state, equal on all ranks."""

    def restored(self, counters: Mapping[str, int]) -> None:
        """Resume from a checkpoint, after `state_tensors()` have been filled: adopt its
        `counters()` and round the master weights into the weights that the model computes with.
        """
