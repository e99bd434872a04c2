"""The torch-native train backend: data (plain or FSDP2) x tensor x context parallelism, with
experts over these axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.blocks.projections import Embedding, Projection
from spmdrl.models.compiled import check_compiler
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.gradient_sums import GradientSum
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.sharding import Head
from spmdrl.training.backend_steps import (
    StepCounts,
    attention_of,
    require_parts,
    require_trainable,
)
from spmdrl.training.body import Body, borrowed_weights, own_weights
from spmdrl.training.decoder_pass import DecoderPass, keep_pace
from spmdrl.training.dropout import make_dropout
from spmdrl.training.optimizer import (
    HostNumber,
    LeafOptimizer,
    Optimizer,
    all_reduce_gradients,
    average_gradients,
    gradient_norm,
)
from spmdrl.training.options import TrainOptions
from spmdrl.training.packing import Microbatch
from spmdrl.training.protocol import LossFn, MicrobatchProgress, OptimStep
from spmdrl.training.readout import Readout
from spmdrl.training.weights import SUM_AXES, Leaf, fill_leaves, refresh_weights
from spmdrl.training.windowed_optimizer import WindowedOptimizer


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
        kernel = attention_of(mesh, model, options, device)
        kind: Any = {"trainable": trainable, "head": head, "adapter": adapter}
        if trainable and options.host_state is not None:
            kind["new_master"] = options.host_state.hold
        if base is None:
            self._weights = own_weights(mesh, model, options, device, **kind)
        else:
            self._weights = borrowed_weights(base.body, mesh, options, device, **kind)
        self._decoder = self.body.decoder
        if options.compile != "none" and base is None:  # a shared decoder is its owner's
            check_compiler(device)
            self._decoder.compile_layers()
        self._leaves = self._weights.leaves
        self._trained = [leaf for leaf in self._leaves if leaf.trained]
        fill_leaves(self._leaves if base is None else self._weights.own, checkpoint)
        self._optimizer: LeafOptimizer | None = None
        if trainable:
            self._optimizer = _make_optimizer(self._trained, options)
        self._pass = DecoderPass(
            mesh=mesh,
            model=model,
            options=options,
            head=head,
            device=device,
            kernel=kernel,
            dropout=make_dropout(mesh.role, model, adapter if trainable else None, options, device),
        )
        self._steps = StepCounts()
        self._sums: dict[str, GradientSum] = {}
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
        found = self._pass.forward(
            self._decoder, self._weights, batch, readout, self._paced, progress
        )
        if isinstance(self._decoder, FSDPModule):
            # The root stays gathered after a forward pass; an optimizer step would not reach it.
            self._decoder.reshard()
        return found

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
        if any(layer.pieces is not None for layer in self.body.decoder.layers):
            self._start_sums()
        return self._pass.forward_backward(
            self._decoder,
            self._weights,
            batch,
            loss_fn,
            readout,
            self._paced,
            normaliser=normaliser,
            step=self._steps.num_steps,
            backward=torch.autograd.backward,
            starting=self._reduce_over_replicas,
            whole_groups=whole_groups,
            progress=progress,
        )

    def optim_step(self) -> OptimStep:
        optimizer = require_trainable(self.mesh.role, self._optimizer)
        require_parts(self.mesh.role, self.parts(), "weights", "optimizer")
        gradients = self._take_gradients()
        plain = [leaf for leaf in self._trained if not leaf.sharded]
        for axis in SUM_AXES:
            own = [gradients[leaf.name] for leaf in plain if leaf.summed_over == axis]
            all_reduce_gradients(own, self.mesh.group(axis))
        for copied in ("tp", "etp"):
            copies = [gradients[leaf.name] for leaf in self._trained if leaf.copied_over == copied]
            average_gradients(copies, self.mesh.group(copied))
        norm = gradient_norm(
            [gradients[leaf.name] for leaf in self._trained if leaf.counted],
            [self.mesh.group("all")],
            self._device,
        )
        found = HostNumber(norm)
        optimizer.step(gradients, self._steps.lr(self.options), norm)
        return self._steps.count(found.value(), self.options)

    def local_tensors(self) -> LocalTensors:
        return {leaf.name: (leaf.weight, leaf.slices) for leaf in self._leaves}

    def parts(self) -> dict[str, list[Tensor]]:
        parts = self._weights.parts()
        if self._optimizer is not None:
            parts["optimizer"] = self._optimizer.resident()
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
        is_single = self.mesh.shard_mesh is None and self.mesh.size("exchange") == 1
        return keep_pace(microbatches, None if is_single else self.mesh.group("reduce"))

    def _reduce_over_replicas(self, is_last: bool) -> None:
        """Sum shards over the replicas only in the last backward: they are the slowest axis."""
        if isinstance(self._decoder, FSDPModule) and self.mesh.size("dp_replicate") > 1:
            self._decoder.set_requires_all_reduce(is_last)

    def _accumulate_wide(self) -> None:
        """Sum microbatches' gradients in float32 where the parameters are narrower."""
        own = {leaf.parameter: leaf.name for leaf in self._trained if leaf.has_own_master}
        self._sums.update({name: GradientSum() for name in own.values()})
        for parameter, name in own.items():
            # not `self`, which could then never be collected: autograd keeps hooks where Python's
            # collector does not look
            def add(parameter: Tensor, total: GradientSum = self._sums[name]) -> None:
                if parameter.grad is not None:  # products have not added it
                    total.add(parameter.grad)
                    parameter.grad = None

            parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
        for module in self._decoder.modules():
            if isinstance(module, (Projection, Embedding)) and module.weight in own:
                module.gradient_sum = self._sums[own[module.weight]]

    def _start_sums(self) -> None:
        """Begin the sums of gradients that compiled graphs are given."""
        for leaf in self._trained:
            if leaf.has_own_master:
                self._sums[leaf.name].start(leaf.parameter)

    def _take_gradients(self) -> dict[str, Tensor]:
        """Take every trained leaf's float32 gradient, 0 if there was none, and clear it."""
        taken = {}
        for leaf in self._trained:
            gradient = leaf.gradient()
            if leaf.has_own_master:
                gradient = self._sums[leaf.name].take()
            if gradient is None:
                gradient = torch.zeros_like(leaf.weight, dtype=torch.float32)
            taken[leaf.name] = gradient.contiguous()
            leaf.parameter.grad = None
        return taken


def _make_optimizer(leaves: Sequence[Leaf], options: TrainOptions) -> LeafOptimizer:
    if options.host_state is None:
        return Optimizer(leaves, options)
    return WindowedOptimizer(leaves, options, options.host_state)
