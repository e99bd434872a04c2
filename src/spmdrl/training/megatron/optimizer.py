"""Megatron's gradient buffers and distributed optimizer over a role's own groups.

The optimizer's state is sharded over dp_shard x cp: every rank updates a flat range of its chunks'
parameters and gathers the rest. With dp_replicate > 1 there are so many copies of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
from spmdrl.models.megatron_layout import Parameter, buffer_places, flat_pieces, shard_range
from spmdrl.training.gradients import gradient_norm
from spmdrl.training.megatron.compat import named_as_on_cuda
from spmdrl.training.optimizer import MOMENTS
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LocalTensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """What this rank updates of one parameter.

    Args:
        master: float32, flat; a view of the weights where those are float32. AdamW knows it as
            this object; `values` is the same without autograd's bookkeeping of views.
        start: of the range in the flattened parameter.
        counted: its gradient counts in the norm here: once in the whole role.
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
        self._adamw = _adamw(parameters, options)
        # no_grad: shards are views of parameters, and shall be leaves themselves
        with named_as_on_cuda(parameters), torch.no_grad():
            self._inner = DistributedOptimizer(
                self._adamw,
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
                per_model_buffers={i: chunk.buffers for i, chunk in enumerate(self.chunks)},
                data_parallel_group=groups.intra_dp_cp,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=0,
                distributed_optimizer_instance_id=mesh.coordinate("dp_replicate"),
            )
        self._start()
        self.shards = self._make_shards(named)
        self.tensors = self._boxes()
        """Masters (`weights/NAME`) and moments as boxes of the name space; the storage itself."""
        self._grad_bytes = [b.grad_data.untyped_storage().nbytes() for b in self._buffers()]
        self._free_gradients()

    def _start(self) -> None:
        """State from the start, so that a checkpoint can be read into it."""
        for group in self._adamw.param_groups:
            for master in group["params"]:
                moments = {name: torch.zeros_like(master) for name in MOMENTS}
                self._adamw.state[master] = {"step": torch.zeros(()), **moments}

    def _make_shards(
        self, named: Sequence[Sequence[tuple[Parameter, nn.Parameter]]]
    ) -> tuple[Shard, ...]:
        inner = self._inner
        masters: dict[nn.Parameter, Tensor] = {}
        for models, mains in (
            (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
            (inner.model_fp32_groups, inner.shard_fp32_groups),
        ):
            for model_group, main_group in zip(models, mains, strict=True):
                masters |= dict(zip(model_group, main_group, strict=True))
        shard, count = self._groups.intra_dp_cp.rank(), self._groups.intra_dp_cp.size()
        shards = []
        for chunk in named:
            places, buckets = buffer_places([p for p, _ in chunk], count)
            for parameter, tensor in chunk:
                start, stop = shard_range(places[parameter.name], buckets, shard, count)
                if start == stop:
                    assert tensor not in masters, parameter.name
                    continue
                found = inner._get_model_param_range_map(tensor)["param"]
                assert (found.start, found.end) == (start, stop), (parameter.name, found)
                shards.append(
                    Shard(
                        parameter=parameter,
                        master=masters[tensor],
                        start=start,
                        counted=self._is_counted(parameter),
                    )
                )
        return tuple(shards)

    def _is_counted(self, parameter: Parameter) -> bool:
        """Of what several ranks hold, the first tp rank and the first pipeline stage count it."""
        if parameter.shared and parameter.module_name.startswith("output_layer"):
            return False
        replicated = all(piece.is_whole for piece in parameter.slices)
        return not replicated or self._mesh.coordinate("tp") == 0

    def _buffers(self) -> list[Any]:
        return [buffer for chunk in self.chunks for buffer in chunk.buffers]

    def hold_gradients(self) -> None:
        """Make room for gradients, all zero, where there is none yet."""
        for buffer, size in zip(self._buffers(), self._grad_bytes, strict=True):
            storage = buffer.grad_data.untyped_storage()
            if storage.nbytes() == 0:
                storage.resize_(size)
                buffer.grad_data.zero_()

    def _free_gradients(self) -> None:
        for buffer in self._buffers():
            buffer.grad_data.untyped_storage().resize_(0)

    def reduce(self) -> None:
        """Sum the gradients over the ranks that hold the same weights; the shards have them."""
        self.hold_gradients()
        finalize_model_grads(self.chunks, None, pg_collection=self._groups)
        self._inner.prepare_grads()

    def gradients(self) -> list[tuple[Shard, Tensor]]:
        """Every shard's gradient, flat, float32; after `reduce`."""
        found = []
        for shard in self.shards:
            assert shard.master.grad is not None, shard.parameter.name
            found.append((shard, shard.master.grad))
        return found

    def norm(self, device: torch.device) -> float:
        """Of the whole gradient, equal on all ranks of the role."""
        counted = [gradient for shard, gradient in self.gradients() if shard.counted]
        axes = ("shard", "tp", "pp")
        return gradient_norm(counted, [self._mesh.group(axis) for axis in axes], device)

    def step(self, lr: float) -> None:
        """Update the shards and gather the weights from them."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._inner.step_with_ready_grads()

    def clear(self) -> None:
        """Forget the gradients, and give their room back."""
        self._inner.zero_grad()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._free_gradients()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Round the masters into the weights, and gather these over the shards."""
        self._inner._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync()

    def parts(self) -> list[Tensor]:
        """What there is beside the weights."""
        moments = [self._adamw.state[s.master][name] for s in self.shards for name in MOMENTS]
        weights = {b.param_data.untyped_storage()._cdata for b in self._buffers()}
        masters = [s.master for s in self.shards]
        own = [m for m in masters if m.untyped_storage()._cdata not in weights]
        return [*own, *moments]

    def _boxes(self) -> LocalTensors:
        """Made once: no view can be taken of a storage that is away."""
        found: LocalTensors = {}
        for kind in ("weights", *MOMENTS):
            for shard in self.shards:
                flat = shard.values if kind == "weights" else self._adamw.state[shard.master][kind]
                stop = shard.start + len(flat)
                for piece in flat_pieces(shard.parameter, shard.start, stop):
                    values = flat[piece.start - shard.start : piece.stop - shard.start]
                    name = f"{kind}/{shard.parameter.name}:{piece.start}"
                    found[name] = (values.view(piece.shape), piece.slices)
        return found

    def set_step_count(self, count: int) -> None:
        """Tell AdamW's bias correction how many updates the moments have seen."""
        for shard in self.shards:
            self._adamw.state[shard.master]["step"].fill_(count)


def _adamw(parameters: Sequence[nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """Over whole parameters: the distributed optimizer puts its shards in their place."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )
