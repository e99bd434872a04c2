"""Steps that all train backends share: from a microbatch's hidden states to columns and metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel, gather_own_grad
from spmdrl.memory.host_copies import to_device
from spmdrl.memory.storages import require_resident
from spmdrl.models.attention import (
    AttentionKernel,
    describe_attention,
    make_kernel,
    resolve_attention,
)
from spmdrl.models.config import ModelConfig
from spmdrl.models.gradient_sums import GradientSum
from spmdrl.models.layer_attention import attention_needs
from spmdrl.models.sharding import Head
from spmdrl.training.context import LocalStream
from spmdrl.training.logprobs import token_logprobs
from spmdrl.training.options import TrainOptions, lr_at
from spmdrl.training.packing import Microbatch, pack
from spmdrl.training.protocol import Given, LossInput, MicrobatchProgress, OptimStep
from spmdrl.training.readout import Readout
from spmdrl.training.support import SUPPORT, Support, support_at

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass
class StepCounts:
    """Optimizer steps that a backend has made, and those of them that were skipped."""

    num_steps: int = 0
    num_skipped: int = 0

    def lr(self, options: TrainOptions) -> float:
        """Return the learning rate of the next step."""
        return lr_at(self.num_steps, options)

    def count(self, grad_norm: float, options: TrainOptions) -> OptimStep:
        """Count a step with this gradient norm, and say what became of it."""
        done = OptimStep(
            grad_norm=grad_norm,
            lr=self.lr(options),
            skipped=not math.isfinite(grad_norm),
            no_gradient=grad_norm == 0,
        )
        self.num_steps += not done.no_gradient
        self.num_skipped += done.skipped
        return done

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def restored(self, counters: Mapping[str, int]) -> int:
        """Take over `as_dict`'s counts; returns the number of updates that were made."""
        self.num_steps, self.num_skipped = counters["num_steps"], counters["num_skipped"]
        return self.num_steps - self.num_skipped


def attention_of(
    mesh: Mesh, model: ModelConfig, options: TrainOptions, device: torch.device
) -> AttentionKernel:
    """Make the role's attention; on GPUs its first rank says which it is.

    Raises:
        ValueError: as `resolve_attention`.
    """
    needs = attention_needs(model)
    kind = resolve_attention(options.attention, device, options.param_dtype, needs)
    if device.type == "cuda" and mesh.coordinate("all") == 0:
        log.info("%s: attention by %s", mesh.role, describe_attention(kind))
    return make_kernel(kind, needs)


def require_trainable(role: str, optimizer: T | None) -> T:
    """Return the optimizer; ValueError if the role has none."""
    if optimizer is None:
        raise ValueError(f"role {role!r} is frozen: it has no optimizer")
    return optimizer


def require_parts(role: str, held: Mapping[str, Sequence[Tensor]], *parts: str) -> None:
    """Raise ValueError unless these parts of the role are on the device."""
    for part in parts:
        require_resident(role, part, held[part])


def check_borrowing(role: str, *, is_fixed: bool, lacks_head: bool, trains_base: bool) -> None:
    """Refuse a role that shares weights which cannot be shared with it.

    Args:
        is_fixed: whether nothing of the shared weights trains.
        lacks_head: whether the role needs a language model's head that they do not have.
        trains_base: whether the role would train them.

    Raises:
        ValueError: one of these is so; the message names the role's key and the fix.
    """
    key = f"roles.{role}.base"
    if not is_fixed:
        raise ValueError(f"{key} names a role that trains its weights: give it an adapter")
    if trains_base:
        raise ValueError(f"{key}: it would train the weights it borrows: give it an adapter")
    if lacks_head:
        raise ValueError(f"{key} names a role without a language model's head")


def pack_rows(
    rows: Batch,
    options: TrainOptions,
    readout: Readout,
    *,
    whole_groups: bool = False,
    budget_tokens: int | None = None,
) -> list[Microbatch]:
    """Pack the rows as the options say, by default to `options.microbatch_tokens`."""
    return pack(
        rows,
        budget_tokens=options.microbatch_tokens if budget_tokens is None else budget_tokens,
        share_prompts=options.share_prompts,
        atom=rows["prompt_ids"] if whole_groups else None,
        places=readout.places,
        skipped=readout.skipped,
    )


def check_head(role: str, head: Head, readout: Readout) -> None:
    """Raise ValueError unless the role's model has the head that is to be read."""
    if readout.head != head:
        raise ValueError(
            f"role {role!r} has the head {head!r}, and {readout.columns} are read by the head "
            f"{readout.head!r}"
        )


def counted(
    microbatches: Sequence[Microbatch], progress: MicrobatchProgress | None
) -> Iterator[Microbatch]:
    """Yield the microbatches, and report each as done when the next one is asked for."""
    for number, microbatch in enumerate(microbatches, start=1):
        yield microbatch
        if progress is not None:
            progress(number, len(microbatches))


def read_places(
    hidden: Tensor,  # [L, D], this rank's part of the stream
    weight: Tensor,  # [V_local, D], or [1, D] of a scalar head
    predict: Tensor,  # [M] int64
    targets: Tensor,  # [M] int64
    readout: Readout,
    *,
    head_chunk: int,
    tp: Parallel,
    first_id: int | None = None,
    support: Support | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    gradient_sum: GradientSum | None = None,
) -> tuple[Tensor, ...]:
    """Compute the readout's columns at the places `predict`, [M] each.

    Args:
        first_id, support, softcap, gradient_sum: see `token_logprobs`.
        bias: the bias [1] of a scalar head that has one.
    """
    read = hidden.index_select(0, predict)
    if readout.head == "score":
        # Equal on all tp ranks, like hidden states and this head. No view: FSDP2 warns of views.
        found = torch.mv(read.float(), weight.float().flatten())
        return (found if bias is None else found + bias.float(),)
    return token_logprobs(
        read,
        weight,
        targets,
        temperature=readout.temperature,
        chunk=head_chunk,
        tp=tp,
        first_id=first_id,
        support=support,
        with_entropy="entropy" in readout.columns,
        softcap=softcap,
        gradient_sum=gradient_sum,
    )


def support_of(
    rows: Batch,
    microbatch: Microbatch,
    stream: LocalStream,
    readout: Readout,
    device: torch.device,
) -> Support | None:
    """Return the support of the tokens at the stream's places that are read, if they have one."""
    column = rows.ragged.get(SUPPORT)
    if column is None or readout.head != "lm" or not readout.is_per_token:
        return None
    found = support_at(column, microbatch.destination[stream.read], microbatch.targets[stream.read])
    return None if found is None else found.to(device)


def whole_stream(
    found: Sequence[Tensor], readout: Readout, stream: LocalStream, mesh: Mesh
) -> dict[str, Tensor]:
    """Gather each column's values over the cp ranks, in the microbatch's order."""
    if stream.order is None:
        return dict(zip(readout.columns, found, strict=True))
    [order] = to_device([stream.order], found[0].device)
    gathered = [gather_own_grad(values, mesh.group("cp"))[order] for values in found]
    return dict(zip(readout.columns, gathered, strict=True))


def loss_input(
    rows: Batch,
    microbatch: Microbatch,
    readout: Readout,
    outputs: Mapping[str, Tensor],
    device: torch.device,
) -> LossInput:
    """Make the loss function's input from a microbatch."""
    tokens = rows.tokens if readout.is_per_token else {}
    own = [column[microbatch.destination] for column in tokens.values()]
    own += [column[microbatch.rows] for column in rows.rows.values()]
    *columns, row = to_device([*own, microbatch.row], device)
    return LossInput(
        outputs=Given(outputs),
        columns=Given(zip(tokens, columns[: len(tokens)], strict=True)),
        rows=Given(zip(rows.rows, columns[len(tokens) :], strict=True)),
        row=row,
        num_rows=len(microbatch.rows),
    )


def nothing_read(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a microbatch without rows: 0, with a backward through the whole model."""
    return torch.stack([values.sum() for values in outputs.values()]).sum()


def as_columns(batch: Batch, readout: Readout, columns: Mapping[str, Tensor]) -> Batch:
    """Return the batch with the readout's columns, on the batch's device."""
    here = {name: column.to(batch.lengths.device) for name, column in columns.items()}
    if readout.is_per_token:
        return batch.with_columns(tokens=here)
    return batch.with_columns(rows=here)


def over_replicas(sums: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """Combine the metric sums of all replicas."""
    group = mesh.group("dp")
    if group is None:
        return sums
    # Gathered as objects: a rank without rows does not know the names.
    gathered: list[dict[str, float]] = [{}] * mesh.size("dp")
    dist.all_gather_object(gathered, sums, group=group)
    return combine(gathered)


def as_numbers(parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Convert all metrics to numbers, with one wait per device on which a loss left some."""
    waiting: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        for value in part.values():
            waiting.setdefault(value.device, []).append(value.detach().double())
    numbers = {at: iter(torch.stack(values).tolist()) for at, values in waiting.items()}
    return [{name: next(numbers[value.device]) for name, value in p.items()} for p in parts]
