"""A role's weights on one rank: a decoder, plain or sharded by FSDP2, and its leaves.

A leaf is one local parameter with what the optimizer, the norm, checkpoints and weight sync need to
know about it. With `dp_shard: 1` the parameters are plain and replicated over dp and cp. Otherwise
FSDP2 shards float32 parameters over dp_shard x cp and gathers them in the compute dtype (those that
do not train have that dtype as shards too); the few that tensor parallelism does not divide
(norms) stay plain. Tensor and expert parallelism are the decoder's own in both cases. Experts are
replicated, or sharded, only over the ranks that hold the same ones (`distributed.mesh`).

An adapter's parameters are plain in every layout. Under tensor parallelism the halves that it does
not divide have only a share of their gradient on each rank: A before a column-parallel matrix has
that through the rank's own outputs, B after a row-parallel one that of the rank's own inputs. Where
all experts share one A and B, every rank has the share of its own experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.adapter_weights import HEAD_WEIGHT, AdapterWeights
from spmdrl.models.blocks.moe import Experts
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.degrees import check_cp, check_tp
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.fsdp_cuts import fsdp_dims, fsdp_shard
from spmdrl.models.sharding import Head, buffer_names, fused_tensors
from spmdrl.models.tensors import Slice, TpSplit, is_expert_parameter

SumAxis = Literal["reduce", "edp", "expert", "every_expert", "all"]
SUM_AXES: tuple[SumAxis, ...] = get_args(SumAxis)
CopyAxis = Literal["tp", "etp"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaf:
    """One local parameter.

    Args:
        parameter: the module's parameter (a DTensor if FSDP2 shards it).
        weight: this rank's part, the parameter's own storage; may have no rows.
        master: the float32 tensor that the optimizer updates; `weight` itself if that is float32.
        slices: slices of the global name space that `weight` holds.
        sharded: whether FSDP2 shards it and sums its gradients.
        counted: whether this rank counts the leaf's gradient in the norm; the first of the ranks
            that hold the same part does.
        summed_over: the mesh's axis over which gradients are summed if it is not sharded.
        copied_over: the axis whose ranks all hold it and compute its whole gradient, because tensor
            parallelism does not divide it: tp, or for experts the ranks that divide their widths.
        decay: whether weight decay applies.
        trained: whether it changes; a leaf that does not has no master of its own.
    """

    name: str
    parameter: nn.Parameter
    weight: Tensor
    master: Tensor
    slices: tuple[Slice, ...]
    sharded: bool
    counted: bool
    summed_over: SumAxis
    copied_over: CopyAxis | None
    decay: bool
    trained: bool

    @property
    def has_own_master(self) -> bool:
        return self.master is not self.weight

    def gradient(self) -> Tensor | None:
        """Return this rank's part of the parameter's gradient, if it has one."""
        gradient = self.parameter.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient


NewMaster = Callable[[Tensor], Tensor]
"""Makes a float32 tensor like a weight, wherever the optimizer's state is."""


def on_device(weight: Tensor) -> Tensor:
    """Make a master on the weight's device."""
    return torch.empty_like(weight, dtype=torch.float32)


def build_decoder(
    mesh: Mesh,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trainable: bool,
    head: Head = "lm",
    frozen: Collection[str] = (),
    blocks: int = 1,
    is_fixed: bool = False,
    fsdp: bool = True,
) -> Decoder:
    """Build this rank's decoder; its weights are not filled yet.

    Args:
        frozen: Hugging Face names of parameters that do not change while others are trained.
        blocks: number of blocks of fused projections, see `models.sharding.all_slices`.
        is_fixed: whether nothing that FSDP2 may shard is trained, so that shards need no more
            digits than the compute dtype has.
        fsdp: whether FSDP2 shards over the mesh's dp_shard; False leaves it to the caller.

    Raises:
        ValueError: the mesh has a degree that the model or this backend does not allow.
    """
    if mesh.size("pp") > 1:
        raise ValueError(f"role {mesh.role!r}: the torch backend has no pipeline stages, set pp: 1")
    check_tp(model, mesh.size("tp"), ep=mesh.size("ep"), replicate_kv=not trainable)
    check_cp(model, mesh.size("cp"))
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    ep = Parallel(group=mesh.group("exchange"), rank=mesh.coordinate("ep"), size=mesh.size("ep"))
    if mesh.shard_mesh is None or not fsdp:
        decoder = Decoder(model, tp=tp, ep=ep, dtype=dtype, device=device, head=head)
        return _require_grad(decoder, trainable, frozen)
    shard_dtype = dtype if is_fixed else torch.float32
    decoder = Decoder(
        model, tp=tp, ep=ep, dtype=shard_dtype, device="meta", head=head, blocks=blocks
    )
    _require_grad(decoder, trainable, frozen)
    _shard(decoder, mesh, dtype)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            # Losses are already divided by the global count: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            # Otherwise a factor means a pre-multiplied sum, which gloo does not have, nor NCCL over
            # NVLink's switches.
            module.set_force_sum_reduction_for_comms(True)
    return decoder.to_empty(device=device)


def _shard(decoder: Decoder, mesh: Mesh, dtype: torch.dtype) -> None:
    dims = fsdp_dims(decoder.model, decoder.kind, decoder.blocks)
    whole, by_columns = set(), set()
    buffers, tables = buffer_names(decoder.model), decoder.slices()
    for name, parameter in decoder.named_parameters():
        is_buffer = any(s.name in buffers for s in tables[name])
        if (dims[name] is None or not parameter.requires_grad) and not is_buffer:
            parameter.data = parameter.data.to(dtype)  # no master is here
        if dims[name] is None:
            whole.add(parameter)
        elif dims[name] == 1:
            by_columns.add(parameter)

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter in by_columns else 0)

    # Nothing that a layer is called with (rope's float32 tables) may be cast.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for experts in [module for module in decoder.modules() if isinstance(module, Experts)]:
        fully_shard(experts, mesh=mesh.expert_shard_mesh, mp_policy=policy)
    for layer in (*decoder.layers, decoder):
        fully_shard(
            layer,
            mesh=mesh.shard_mesh,
            mp_policy=policy,
            shard_placement_fn=place,
            ignored_params=whole,
        )
    _prefetch(decoder)


def _prefetch(decoder: Decoder) -> None:
    """Let every layer's weights be gathered before the layer ahead of it computes.

    FSDP2 by itself gathers them only when the host comes to the layer, so that the device waits
    where the host is not far enough ahead. Two layers' weights are held then, as plans count.
    """

    def gathered_with(layer: nn.Module) -> list[FSDPModule]:
        return [module for module in layer.modules() if isinstance(module, FSDPModule)]

    whole = [gathered_with(layer) for layer in decoder.layers]
    assert isinstance(decoder, FSDPModule)
    decoder.set_modules_to_forward_prefetch(whole[0])
    decoder.set_modules_to_backward_prefetch(whole[-1])
    for index, (layer, *_) in enumerate(whole):
        layer.set_modules_to_forward_prefetch(
            [m for own in whole[index + 1 : index + 2] for m in own]
        )
        before = whole[index - 1] if index else []
        layer.set_modules_to_backward_prefetch(before)


def _require_grad(decoder: Decoder, trainable: bool, frozen: Collection[str]) -> Decoder:
    tables, fixed = decoder.slices(), {*frozen, *buffer_names(decoder.model)}
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(trainable and not any(s.name in fixed for s in tables[name]))
    return decoder


@torch.no_grad()
def make_leaves(
    decoder: Decoder, mesh: Mesh, *, new_master: NewMaster | None = on_device
) -> tuple[Leaf, ...]:
    """Make leaves of the decoder's parameters, in their order; they are not filled yet.

    Args:
        new_master: makes the masters of leaves narrower than float32; None: they have none.
    """
    shard, num_shards, exchange = 0, 1, 1
    if any(isinstance(parameter, DTensor) for parameter in decoder.parameters()):
        shard, num_shards = mesh.coordinate("shard"), mesh.size("shard")
        exchange = mesh.size("exchange")
    tables = decoder.slices()
    dims = fsdp_dims(decoder.model, decoder.kind, decoder.blocks)
    table = fused_tensors(decoder.model, decoder.kind)
    leaves = []
    for name, parameter in decoder.named_parameters():
        sharded = isinstance(parameter, DTensor)
        weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
        is_expert = is_expert_parameter(name)
        of = (shard // exchange, num_shards // exchange) if is_expert else (shard, num_shards)
        shape, slices = fsdp_shard(tuple(parameter.shape), tables[name], dims[name], *of)
        assert tuple(weight.shape) == shape, (name, weight.shape, shape)
        summed_over: SumAxis = "edp" if is_expert else "reduce"
        copies = "dp_replicate" if sharded else summed_over
        copied_over = _copied_over(name, table[name][0].split)
        is_first = copied_over is None or mesh.coordinate(copied_over) == 0
        leaves.append(
            Leaf(
                name=name,
                parameter=parameter,
                weight=weight,
                master=_master_of(parameter, weight, new_master),
                slices=slices,
                sharded=sharded,
                counted=mesh.coordinate(copies) == 0 and is_first,
                summed_over=summed_over,
                copied_over=copied_over,
                # experts' biases have two dims
                decay=parameter.ndim > 1 and not name.endswith("bias"),
                trained=parameter.requires_grad,
            )
        )
    return tuple(leaves)


def _copied_over(name: str, split: TpSplit) -> CopyAxis | None:
    """Return the axis whose ranks all hold a parameter that tensor parallelism does not divide."""
    if split is not TpSplit.NONE:
        return None
    return "etp" if is_expert_parameter(name) else "tp"


@torch.no_grad()
def make_adapter_leaves(
    added: AdapterWeights, mesh: Mesh, *, new_master: NewMaster | None = on_device
) -> tuple[Leaf, ...]:
    """Make leaves of an adapter's parameters and its head, in order; they are not filled yet.

    Args:
        new_master: see `make_leaves`.
    """
    tables = added.tables()
    leaves = []
    for name, parameter in added.named_parameters():
        weight = parameter.detach()
        is_whole = all(part.is_whole for part in tables[name])
        summed_over = _summed_over(name, is_whole, added, mesh)
        replicated = is_whole and summed_over == "reduce"
        leaves.append(
            Leaf(
                name=name,
                parameter=parameter,
                weight=weight,
                master=_master_of(parameter, weight, new_master),
                slices=tables[name],
                sharded=False,
                counted=mesh.coordinate(summed_over) == 0 and not (replicated and added.tp.rank),
                summed_over=summed_over,
                copied_over="tp" if replicated else None,
                decay=True,
                trained=parameter.requires_grad,
            )
        )
    return tuple(leaves)


def _summed_over(name: str, is_whole: bool, added: AdapterWeights, mesh: Mesh) -> SumAxis:
    """Return the axis of the ranks that have shares of an adapter's gradient."""
    if not is_expert_parameter(name):
        is_share = is_whole and name != HEAD_WEIGHT and added.tp.size > 1
        return "all" if is_share and not added.is_copied(name) else "reduce"
    if added.adapter.shares_experts:
        return "all" if is_whole else "every_expert"
    return "expert" if is_whole and mesh.size("etp") > 1 else "edp"


def _master_of(parameter: nn.Parameter, weight: Tensor, new_master: NewMaster | None) -> Tensor:
    """Return the float32 tensor that is updated: one of its own where the weight is narrower."""
    if new_master and parameter.requires_grad and weight.dtype != torch.float32:
        return new_master(weight)
    return weight


@torch.no_grad()
def fill_leaves(leaves: Sequence[Leaf], checkpoint: TensorSource) -> None:
    """Read masters (so that a float32 checkpoint loses nothing), and round weights from them."""
    fill(((leaf.master, leaf.slices) for leaf in leaves), checkpoint)
    refresh_weights(leaves)


@torch.no_grad()
def refresh_weights(leaves: Sequence[Leaf]) -> None:
    """Round the masters into the weights where these are separate tensors."""
    own = [leaf for leaf in leaves if leaf.has_own_master]
    if own:
        torch._foreach_copy_([leaf.weight for leaf in own], [leaf.master for leaf in own])
