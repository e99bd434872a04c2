"""The torch-native train backend: data (plain or FSDP2) x tensor x context parallelism, with
experts over these axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from spmdrl.algorithms.metrics import combine
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.host_copies import to_device
from spmdrl.models.adapters import Adapter
from spmdrl.models.attention import PackedAttention, make_kernel, resolve_attention
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.routing import EXPERT_CHOICES, Balance, Routing
from spmdrl.models.sharding import Head
from spmdrl.training.backend_steps import (
    StepCounts,
    as_columns,
    as_numbers,
    check_head,
    counted,
    loss_input,
    nothing_read,
    over_replicas,
    pack_rows,
    read_places,
    require_parts,
    require_trainable,
    support_of,
    whole_stream,
)
from spmdrl.training.body import Body, borrowed_weights, own_weights
from spmdrl.training.context import LocalStream, split_stream
from spmdrl.training.dropout import AdapterDropout
from spmdrl.training.experts import ExpertUse, make_balance, make_routing
from spmdrl.training.optimizer import (
    HostNumber,
    Optimizer,
    all_reduce_gradients,
    average_gradients,
    gradient_norm,
)
from spmdrl.training.options import TrainOptions
from spmdrl.training.packing import Microbatch, empty_microbatch
from spmdrl.training.protocol import LossFn, MicrobatchProgress, OptimStep, loss_of
from spmdrl.training.readout import Readout
from spmdrl.training.support import Support
from spmdrl.training.weights import fill_leaves, refresh_weights


class TorchBackend:
    """A decoder on this rank of `mesh`, with or without an adapter, and its optimizer.

    Args:
        mesh: the role's mesh; this rank is a member.
        checkpoint: the initial weights: the model's, the adapter's and the scalar head's.
        trainable: False for a frozen role, which has no gradients, no optimizer and only `forward`.
        head: the role's head, which decides the readouts that it serves.
        adapter: low-rank additions, which train (and a scalar head) in place of the matrices.
        base: a backend on the same ranks whose decoder this one shares, instead of one of its own.

    Raises:
        ValueError: the degrees do not fit the model, the attention cannot run here, or `base` is
            not one that can be shared.
    """

    def __init__(
        self,
        mesh: Mesh,
        model: ModelConfig,
        checkpoint: TensorSource,
        options: TrainOptions,
        device: torch.device,
        *,
        trainable: bool = True,
        head: Head = "lm",
        adapter: Adapter | None = None,
        base: TorchBackend | None = None,
    ) -> None:
        self.mesh, self.model, self.options, self.head = mesh, model, options, head
        self._device = device
        dtype = options.param_dtype
        self._kernel = make_kernel(resolve_attention(options.attention, device, dtype))
        kind: Any = {"trainable": trainable, "head": head, "adapter": adapter}
        if base is None:
            self._weights = own_weights(mesh, model, options, device, **kind)
        else:
            self._weights = borrowed_weights(base.body, mesh, options, device, **kind)
        self._decoder = self.body.decoder
        self._leaves = self._weights.leaves
        self._trained = [leaf for leaf in self._leaves if leaf.trained]
        fill_leaves(self._leaves if base is None else self._weights.own, checkpoint)
        self._optimizer = Optimizer(self._trained, options) if trainable else None
        self._dropout: AdapterDropout | None = None
        if trainable and adapter is not None and adapter.dropout > 0:
            self._dropout = AdapterDropout(mesh.role, model, adapter, options.seed, device)
        self._steps = StepCounts()
        self._sums: dict[str, Tensor] = {}
        if trainable:
            self._accumulate_wide()

    @property
    def body(self) -> Body:
        """The decoder and its leaves, which other backends may share."""
        return self._weights.body

    def forward(
        self, batch: Batch, readout: Readout, *, progress: MicrobatchProgress | None = None
    ) -> Batch:
        self._require_weights()
        rows = batch.to(torch.device("cpu"))
        size = rows.num_tokens if readout.is_per_token else rows.num_rows
        found = {name: torch.zeros(size) for name in readout.columns}
        places: list[Tensor] = []
        values: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for microbatch in counted(
                self._paced(pack_rows(rows, self.options, readout)), progress
            ):
                stream = self._stream(microbatch)
                routing = make_routing(self.model.moe, rows, microbatch, stream, self._device)
                support = support_of(rows, microbatch, stream, readout, self._device)
                places.append(microbatch.destination)
                values.append(self._run(stream, readout, routing, support))
        if places:  # not in the loop: the host would wait for each microbatch
            at = torch.cat(places)
            for name, column in found.items():
                column[at] = torch.cat([own[name] for own in values]).cpu()
        if isinstance(self._decoder, FSDPModule):
            # The root stays gathered after a forward pass; an optimizer step would not reach it.
            self._decoder.reshard()
        return as_columns(batch, readout, found)

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
        require_trainable(self.mesh.role, self._optimizer)
        self._require_weights()
        rows = batch.to(torch.device("cpu"))
        parts: list[dict[str, Tensor]] = []
        moe = self.model.moe
        use = None if moe is None else ExpertUse(moe, self._device)
        keys = None if self._dropout is None else self._dropout.keys(rows, self._steps.num_steps)
        packed = self._paced(pack_rows(rows, self.options, readout, whole_groups=whole_groups))
        for number, microbatch in enumerate(counted(packed, progress), start=1):
            self._reduce_over_replicas(number == len(packed))
            stream = self._stream(microbatch)
            balance = self._balance(rows, microbatch, stream, readout, normaliser)
            routing = make_routing(moe, rows, microbatch, stream, self._device, balance)
            support = support_of(rows, microbatch, stream, readout, self._device)
            outputs = self._run(stream, readout, routing, support, keys)
            if use is not None and routing is not None:
                use.add(routing, stream)
            if microbatch.is_empty:
                torch.autograd.backward(nothing_read(outputs))
                continue
            given = loss_input(rows, microbatch, readout, outputs, self._device)
            loss, metrics = loss_of(loss_fn, given)
            loss = loss / normaliser
            torch.autograd.backward(loss)
            parts.append({"loss": loss.detach(), **metrics})
        sums = over_replicas(combine([{"loss": 0.0}, *as_numbers(parts)]), self.mesh)
        if use is None:
            return sums
        return sums | use.metrics(
            self.mesh.group("reduce"),
            coefficient=self.options.balance_coef,
            is_replay=EXPERT_CHOICES in rows.tokens,
        )

    def optim_step(self) -> OptimStep:
        optimizer = require_trainable(self.mesh.role, self._optimizer)
        require_parts(self.mesh.role, self.parts(), "weights", "optimizer")
        gradients = self._take_gradients()
        plain = [leaf for leaf in self._trained if not leaf.sharded]
        for axis in ("reduce", "edp", "expert", "all"):
            own = [gradients[leaf.name] for leaf in plain if leaf.summed_over == axis]
            all_reduce_gradients(own, self.mesh.group(axis))
        copies = [gradients[leaf.name] for leaf in self._trained if leaf.replicated]
        average_gradients(copies, self.mesh.group("tp"))
        norm = gradient_norm(
            [gradients[leaf.name] for leaf in self._trained if leaf.counted],
            [self.mesh.group("all")],
            self._device,
        )
        found = HostNumber(norm)
        optimizer.step(gradients, self._steps.lr(self.options), norm)
        refresh_weights(self._trained)
        return self._steps.count(found.value(), self.options)

    def local_tensors(self) -> LocalTensors:
        return {leaf.name: (leaf.weight, leaf.slices) for leaf in self._leaves}

    def parts(self) -> dict[str, list[Tensor]]:
        parts = self._weights.parts()
        if self._optimizer is not None:
            moments = [tensor for tensor, _ in self._optimizer.tensors().values()]
            masters = [leaf.master for leaf in self._trained if leaf.has_own_master]
            parts["optimizer"] = [*masters, *moments]
        return parts

    def state_tensors(self) -> LocalTensors:
        if self._optimizer is None:
            return {}
        masters: LocalTensors = {
            f"weights/{leaf.name}": (leaf.master, leaf.slices) for leaf in self._weights.held
        }
        return masters | self._optimizer.tensors()

    def counters(self) -> dict[str, int]:
        return self._steps.as_dict()

    def restored(self, counters: Mapping[str, int]) -> None:
        optimizer = require_trainable(self.mesh.role, self._optimizer)
        refresh_weights(self._trained)
        optimizer.set_step_count(self._steps.restored(counters))

    def _require_weights(self) -> None:
        parts = self._weights.parts()
        require_parts(self.mesh.role, parts, *parts)

    def _paced(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Add empty microbatches until all ranks that FSDP2 gathers and reduces with, or that
        experts exchange tokens with, have equally many: each one is a collective.
        """
        group = self.mesh.group("reduce")
        is_single = self.mesh.shard_mesh is None and self.mesh.size("exchange") == 1
        if is_single or group is None:
            return microbatches
        most = torch.tensor(len(microbatches))  # on the host: the device may have work left
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        missing = int(most) - len(microbatches)
        return microbatches + [empty_microbatch()] * missing

    def _reduce_over_replicas(self, is_last: bool) -> None:
        """Sum shards over the replicas only in the last backward: they are the slowest axis."""
        if isinstance(self._decoder, FSDPModule) and self.mesh.size("dp_replicate") > 1:
            self._decoder.set_requires_all_reduce(is_last)

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
            self._device,
            coefficient=self.options.balance_coef,
            normaliser=normaliser,
            group=self.mesh.group("cp"),
        )

    def _run(
        self,
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
            self._kernel,
            dtype=self.options.param_dtype,
            device=self._device,
            cp_group=self.mesh.group("cp"),
        )
        tokens, positions, predict, targets = to_device(
            (stream.tokens, stream.positions, stream.predict, stream.targets), self._device
        )

        dropout = None
        if self._dropout is not None and dropout_keys is not None:
            dropout = self._dropout.make(dropout_keys, stream)

        def finish(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return read_places(
                hidden,
                self._weights.head_weight(weight),
                predict,
                targets,
                readout,
                head_chunk=self.options.head_chunk,
                tp=self._decoder.tp,
                support=support,
            )

        found = self._decoder(
            tokens,
            positions,
            attend,
            finish,
            recompute=self.options.recompute,
            routing=routing,
            adapters=self._weights.applied(dropout),
        )
        return whole_stream(found, readout, stream, self.mesh)

    def _accumulate_wide(self) -> None:
        """Sum microbatches' gradients in float32 where the parameters are narrower."""
        # not `self`, which could then never be collected: autograd keeps hooks where Python's
        # collector does not look
        sums = self._sums
        for leaf in self._trained:
            if not leaf.has_own_master:
                continue

            def add(parameter: Tensor, name: str = leaf.name) -> None:
                assert parameter.grad is not None
                if name in sums:
                    sums[name].add_(parameter.grad)
                else:
                    sums[name] = parameter.grad.float()
                parameter.grad = None

            leaf.parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]

    def _take_gradients(self) -> dict[str, Tensor]:
        """Take every trained leaf's float32 gradient, 0 if there was none, and clear it."""
        taken = {}
        for leaf in self._trained:
            gradient = self._sums.pop(leaf.name, None) if leaf.has_own_master else leaf.gradient()
            if gradient is None:
                gradient = torch.zeros_like(leaf.master)
            taken[leaf.name] = gradient.contiguous()
            leaf.parameter.grad = None
        return taken
