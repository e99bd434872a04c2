"""Megatron's gradient buffers and distributed optimizer over a role's own groups.

The optimizer's state is sharded over dp_shard x cp: every rank updates a flat range of its chunks'
parameters and gathers the rest. It exists dp_replicate times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.flat_pieces import flat_pieces
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.megatron_buffers import chunk_ranges
from spmdrl.models.megatron_chunks import Parameter
from spmdrl.training.megatron.compat import named_as_on_cuda
from spmdrl.training.optimizer import (
    MOMENTS,
    all_reduce_gradients,
    average_gradients,
    fresh_state,
    gradient_norm,
    prepare_step,
)
from spmdrl.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The range of one parameter that this rank updates.

    Args:
        master: float32, flat; a view of the weights if those are float32. AdamW's state is keyed by
            this object; `values` is the same without autograd's bookkeeping of views.
        start: start of the range in the flattened parameter.
        counted: whether this rank counts its gradient in the norm; one rank of the role does.
    """

    parameter: Parameter
    master: Tensor
    start: int
    counted: bool

    @property
    def values(self) -> Tensor:
        return self.master.data


class ShardedOptimizer:
    """DDP around the chunks, and AdamW over this rank's shards."""

    def __init__(
        self,
        settings: TransformerConfig,
        chunks: Sequence[Any],
        named: Sequence[Sequence[tuple[Parameter, nn.Parameter]]],
        groups: ProcessGroupCollection,
        mesh: Mesh,
        options: TrainOptions,
    ) -> None:
        self._mesh, self._groups = mesh, groups
        self._clip_norm = options.clip_norm
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            num_distributed_optimizer_instances=mesh.size("dp_replicate"),
        )
        self.chunks = [
            DistributedDataParallel(settings, ddp, chunk, pg_collection=groups) for chunk in chunks
        ]
        parameters = [tensor for chunk in named for _, tensor in chunk]
        # Dense parameters and experts are summed over different ranks, so each has its optimizer.
        buffers = ("buffers", groups.intra_dp_cp), ("expert_parallel_buffers", groups.intra_expt_dp)
        # no_grad: shards are views of parameters and must be autograd leaves themselves
        with named_as_on_cuda(parameters), torch.no_grad():
            made = [self._make_inner(*kind, options) for kind in buffers]
        self._inner = [inner for inner in made if inner is not None]
        self._adamws = [inner.optimizer for inner in self._inner]
        self._start()
        self.shards = self._make_shards(named)
        self.tensors = self._boxes()
        """Masters (`weights/NAME`) and moments as boxes of the name space: the storage itself."""
        self._grad_bytes = [b.grad_data.untyped_storage().nbytes() for b in self._buffers()]
        self._free_gradients()

    def _make_inner(
        self, kind: str, group: dist.ProcessGroup, options: TrainOptions
    ) -> DistributedOptimizer | None:
        buffers = {i: getattr(chunk, kind) for i, chunk in enumerate(self.chunks)}
        parameters = [p for chunk in buffers.values() for buffer in chunk for p in buffer.params]
        if not parameters:
            return None
        return DistributedOptimizer(
            _adamw(parameters, options),
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                bf16=options.param_dtype == torch.bfloat16,
                params_dtype=options.param_dtype,
                use_distributed_optimizer=True,
            ),
            None,
            None,
            model_chunks=self.chunks,
            per_model_buffers=buffers,
            data_parallel_group=group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=self._mesh.coordinate("dp_replicate"),
        )

    def _start(self) -> None:
        """Make AdamW's state before the first step, so that a checkpoint can be read into it."""
        self._state: dict[Tensor, dict[str, Tensor]] = {}
        for adamw in self._adamws:
            for group in adamw.param_groups:
                for master in group["params"]:
                    self._state[master] = fresh_state(master)
                    adamw.state[master] = self._state[master]

    def _make_shards(
        self, named: Sequence[Sequence[tuple[Parameter, nn.Parameter]]]
    ) -> tuple[Shard, ...]:
        masters: dict[nn.Parameter, tuple[DistributedOptimizer, Tensor]] = {}
        for inner in self._inner:
            for models, mains in (
                (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
                (inner.model_fp32_groups, inner.shard_fp32_groups),
            ):
                for pair in zip(models, mains, strict=True):
                    masters |= {p: (inner, main) for p, main in zip(*pair, strict=True)}
        shard, count = self._groups.intra_dp_cp.rank(), self._groups.intra_dp_cp.size()
        shards = []
        for chunk in named:
            ranges = chunk_ranges([p for p, _ in chunk], shard, count, self._mesh.size("exchange"))
            for parameter, tensor in chunk:
                start, stop = ranges[parameter.name]
                if start == stop:
                    assert tensor not in masters, parameter.name
                    continue
                inner, master = masters[tensor]
                found = inner._get_model_param_range_map(tensor)["param"]
                assert (found.start, found.end) == (start, stop), (parameter.name, found)
                counted = self._is_counted(parameter)
                shards.append(
                    Shard(parameter=parameter, master=master, start=start, counted=counted)
                )
        return tuple(shards)

    def _is_counted(self, parameter: Parameter) -> bool:
        """Whether this rank is the first of those that hold the parameter."""
        if self._mesh.coordinate("dp_replicate") > 0:
            return False
        if parameter.shared and parameter.module_name.startswith("output_layer"):
            return False
        return not parameter.is_replicated or self._mesh.coordinate("tp") == 0

    def _buffers(self) -> list[Any]:
        return [
            buffer
            for chunk in self.chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    def hold_gradients(self) -> None:
        """Allocate gradients, all zero, unless they are allocated already."""
        for buffer, size in zip(self._buffers(), self._grad_bytes, strict=True):
            storage = buffer.grad_data.untyped_storage()
            if storage.nbytes() == 0:
                storage.resize_(size)
                buffer.grad_data.zero_()

    def _free_gradients(self) -> None:
        for buffer in self._buffers():
            buffer.grad_data.untyped_storage().resize_(0)

    def reduce(self) -> None:
        """Sum the gradients over the ranks that hold the same weights, into the shards."""
        self.hold_gradients()
        finalize_model_grads(self.chunks, None, pg_collection=self._groups)
        for inner in self._inner:
            inner.prepare_grads()
        tp = self._mesh.group("tp")
        held = [(s.parameter, grad) for s, grad in self.gradients() if s.parameter.is_replicated]
        average_gradients([grad for p, grad in held if not p.has_share], tp)
        all_reduce_gradients([grad for p, grad in held if p.has_share], tp)

    def gradients(self) -> list[tuple[Shard, Tensor]]:
        """Return every shard's gradient, flat, float32; call it after `reduce`."""
        found = []
        for shard in self.shards:
            assert shard.master.grad is not None, shard.parameter.name
            found.append((shard, shard.master.grad))
        return found

    def norm(self, device: torch.device) -> Tensor:  # [] float64
        """Compute the norm of the whole gradient, equal on all ranks of the role."""
        counted = [gradient for shard, gradient in self.gradients() if shard.counted]
        return gradient_norm(counted, [self._mesh.group("all")], device)

    def step(self, lr: float, norm: Tensor) -> None:
        """Update the shards and gather the weights from them, unless there is no gradient."""
        gradients = [gradient for _, gradient in self.gradients()]
        if not prepare_step(self._adamws, gradients, norm, self._clip_norm):
            return
        for inner, adamw in zip(self._inner, self._adamws, strict=True):
            for group in adamw.param_groups:
                group["lr"] = lr
            inner.step_with_ready_grads()

    def clear(self) -> None:
        """Clear the gradients and free their memory."""
        for inner in self._inner:
            inner.zero_grad()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._free_gradients()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Round the masters into the weights, and gather the weights over the shards."""
        for inner in self._inner:
            inner._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync()

    def parts(self) -> list[Tensor]:
        """Return the moments, and the masters that are not views of the weights."""
        moments = [self._state[s.master][name] for s in self.shards for name in MOMENTS]
        weights = {b.param_data.untyped_storage()._cdata for b in self._buffers()}
        masters = [s.master for s in self.shards]
        own = [m for m in masters if m.untyped_storage()._cdata not in weights]
        return [*own, *moments]

    def _boxes(self) -> LocalTensors:
        """Make all boxes at once, because no view can be made of a storage that is away."""
        found: LocalTensors = {}
        for kind in ("weights", *MOMENTS):
            for shard in self.shards:
                flat = shard.values if kind == "weights" else self._state[shard.master][kind]
                stop = shard.start + len(flat)
                for piece in flat_pieces(shard.parameter, shard.start, stop):
                    values = flat[piece.start - shard.start : piece.stop - shard.start]
                    name = f"{kind}/{shard.parameter.name}:{piece.start}"
                    found[name] = (values.view(piece.shape), piece.slices)
        return found

    def set_step_count(self, count: int) -> None:
        """Tell AdamW's bias correction how many updates the moments have seen."""
        for shard in self.shards:
            self._state[shard.master]["step"].fill_(count)


def _adamw(parameters: Sequence[nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """Make AdamW over whole parameters; the distributed optimizer replaces them by its shards."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )
