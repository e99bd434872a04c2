"""`DecoderPass`: passes of packed rows through a `Decoder`, as its train backends make them.

The torch and the DeepSpeed backend differ in who holds the parameters, in how a gradient is summed
and in what a rank must do to keep pace with others; these come in as functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.host_copies import to_device
from spmdrl.models.attention import AttentionKernel, PackedAttention
from spmdrl.models.config import ModelConfig
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.routing import EXPERT_CHOICES, Balance, Routing
from spmdrl.models.sharding import Head
from spmdrl.training.backend_steps import (
    as_columns,
    as_numbers,
    check_head,
    counted,
    loss_input,
    nothing_read,
    over_replicas,
    pack_rows,
    read_places,
    support_of,
    whole_stream,
)
from spmdrl.training.body import RoleWeights
from spmdrl.training.context import LocalStream, split_stream
from spmdrl.training.dropout import AdapterDropout
from spmdrl.training.experts import ExpertUse, make_balance, make_routing
from spmdrl.training.options import TrainOptions
from spmdrl.training.packing import Microbatch, empty_microbatch
from spmdrl.training.protocol import LossFn, MicrobatchProgress, loss_of
from spmdrl.training.readout import Readout
from spmdrl.training.support import Support

Call = Callable[..., Any]
"""The decoder, or what calls it with the same arguments and returns its result."""

Pace = Callable[[list[Microbatch]], list[Microbatch]]
"""Adds the empty microbatches that this rank must run to keep pace with others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderPass:
    """Args:
    mesh: the role's mesh; this rank is a member.
    head: the role's head, which decides the readouts that it serves.
    dropout: that of the adapter's inputs in updates, if it has one.
    """

    mesh: Mesh
    model: ModelConfig
    options: TrainOptions
    head: Head
    device: torch.device
    kernel: AttentionKernel
    dropout: AdapterDropout | None

    def forward(
        self,
        decoder: Call,
        weights: RoleWeights,
        batch: Batch,
        readout: Readout,
        pace: Pace,
        progress: MicrobatchProgress | None,
    ) -> Batch:
        """Compute what `TrainBackend.forward` returns."""
        rows = batch.to(torch.device("cpu"))
        size = rows.num_tokens if readout.is_per_token else rows.num_rows
        found = {name: torch.zeros(size) for name in readout.columns}
        places: list[Tensor] = []
        values: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for microbatch in counted(pace(pack_rows(rows, self.options, readout)), progress):
                stream = self._stream(microbatch)
                routing = make_routing(self.model, rows, microbatch, stream, self.device)
                support = support_of(rows, microbatch, stream, readout, self.device)
                places.append(microbatch.destination)
                values.append(self._run(decoder, weights, stream, readout, routing, support))
        if places:  # not in the loop: the host would wait for each microbatch
            at = torch.cat(places)
            for name, column in found.items():
                column[at] = torch.cat([own[name] for own in values]).cpu()
        return as_columns(batch, readout, found)

    def forward_backward(
        self,
        decoder: Call,
        weights: RoleWeights,
        batch: Batch,
        loss_fn: LossFn,
        readout: Readout,
        pace: Pace,
        *,
        normaliser: float,
        step: int,
        backward: Callable[[Tensor], object],
        starting: Callable[[bool], object] = lambda is_last: None,
        whole_groups: bool = False,
        progress: MicrobatchProgress | None = None,
    ) -> dict[str, float]:
        """Compute what `TrainBackend.forward_backward` returns, and add the gradient.

        Args:
            step: number of optimizer steps before this one.
            backward: adds the gradient of a microbatch's loss; all ranks that the backend sums
                gradients with call it equally often.
            starting: called before each microbatch, and told whether it is the last one.
        """
        rows = batch.to(torch.device("cpu"))
        parts: list[dict[str, Tensor]] = []
        use = None if self.model.moe is None else ExpertUse(self.model, self.device)
        keys = None if self.dropout is None else self.dropout.keys(rows, step)
        packed = pace(pack_rows(rows, self.options, readout, whole_groups=whole_groups))
        for number, microbatch in enumerate(counted(packed, progress), start=1):
            starting(number == len(packed))
            stream = self._stream(microbatch)
            balance = self._balance(rows, microbatch, stream, readout, normaliser)
            routing = make_routing(self.model, rows, microbatch, stream, self.device, balance)
            support = support_of(rows, microbatch, stream, readout, self.device)
            outputs = self._run(decoder, weights, stream, readout, routing, support, keys)
            if use is not None and routing is not None:
                use.add(routing, stream)
            if microbatch.is_empty:
                loss = nothing_read(outputs)
            else:
                given = loss_input(rows, microbatch, readout, outputs, self.device)
                loss, metrics = loss_of(loss_fn, given)
                loss = loss / normaliser
                parts.append({"loss": loss.detach(), **metrics})
            # one line for all: ranks with an empty microbatch meet the others in its collectives
            backward(loss)
        sums = over_replicas(combine([{"loss": 0.0}, *as_numbers(parts)]), self.mesh)
        if use is None:
            return sums
        return sums | use.metrics(
            self.mesh.group("reduce"),
            coefficient=self.options.balance_coef,
            is_replay=EXPERT_CHOICES in rows.tokens,
        )

    def _stream(self, microbatch: Microbatch) -> LocalStream:
        return split_stream(microbatch, self.mesh.coordinate("cp"), self.mesh.size("cp"))

    def _balance(
        self,
        rows: Batch,
        microbatch: Microbatch,
        stream: LocalStream,
        readout: Readout,
        normaliser: float,
    ) -> Balance | None:
        if self.model.moe is None or not readout.is_per_token:
            return None
        return make_balance(
            rows,
            microbatch,
            stream,
            self.device,
            coefficient=self.options.balance_coef,
            normaliser=normaliser,
            group=self.mesh.group("cp"),
        )

    def _run(
        self,
        decoder: Call,
        weights: RoleWeights,
        stream: LocalStream,
        readout: Readout,
        routing: Routing | None,
        support: Support | None,
        dropout_keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the readout's columns at all places of the microbatch that are read, [N] each."""
        check_head(self.mesh.role, self.head, readout)
        attend = PackedAttention(
            stream.spans,
            self.kernel,
            options=attention_options(self.model),
            dtype=self.options.param_dtype,
            device=self.device,
            cp_group=self.mesh.group("cp"),
        )
        tokens, positions, predict, targets = to_device(
            (stream.tokens, stream.positions, stream.predict, stream.targets), self.device
        )
        dropout = None
        if self.dropout is not None and dropout_keys is not None:
            dropout = self.dropout.make(dropout_keys, stream)

        def finish(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return read_places(
                hidden,
                weights.head_weight(weight),
                predict,
                targets,
                readout,
                head_chunk=self.options.head_chunk,
                tp=weights.body.decoder.tp,
                support=support,
                bias=weights.head_bias(),
                softcap=self.model.logit_softcap,
                gradient_sum=weights.head_sum(),
            )

        found = decoder(
            tokens,
            positions,
            attend,
            finish,
            recompute=self.options.recompute,
            routing=routing,
            adapters=weights.applied(dropout),
        )
        return whole_stream(found, readout, stream, self.mesh)


def keep_pace(microbatches: list[Microbatch], group: dist.ProcessGroup | None) -> list[Microbatch]:
    """Add empty microbatches until all ranks of the group have equally many."""
    if group is None:
        return microbatches
    most = torch.tensor(len(microbatches))  # on the host: the device may have work left
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    missing = int(most) - len(microbatches)
    return microbatches + [empty_microbatch()] * missing
