"""`Body`: the chunks of a model on this rank, which several roles can share; a role's weights.

The role that owns a body trains it, or an adapter over it, or nothing. Other roles may borrow a
body that is fixed: each has its own adapter and scalar head over it, or reads it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.megatron_chunks import (
    HEAD,
    Cut,
    Parameter,
    adapter_chunks,
    chunk_adapter,
    chunk_layers,
    rank_chunks,
)
from spmdrl.models.sharding import Head
from spmdrl.training.backend_steps import check_borrowing
from spmdrl.training.megatron.adapted import AdaptedChunk, keep_differentiable, pass_dropout
from spmdrl.training.megatron.checks import MegatronOptions, model_cut
from spmdrl.training.megatron.groups import make_groups
from spmdrl.training.megatron.model import ModelChunks, build_chunks, transformer_config
from spmdrl.training.options import TrainOptions

Named = list[tuple[Parameter, nn.Parameter]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """A model's chunks on this rank.

    Args:
        head: its head; a scalar one is the owner's own if it has an adapter.
        is_fixed: whether nothing of it trains.
    """

    model: ModelConfig
    cut: Cut
    settings: TransformerConfig
    groups: ProcessGroupCollection
    stage: ModelChunks
    head: Head
    is_fixed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class RoleWeights:
    """The weights of one role: a body, and the role's own over it.

    Args:
        added: each chunk with the role's own parameters there, or None if it has none.
        fixed: names of the body's parameters that are of the role's name space.
    """

    body: Body
    added: list[AdaptedChunk] | None
    fixed: frozenset[str]
    is_borrowed: bool

    @property
    def units(self) -> list[Any]:
        """The modules that a microbatch passes through, in order."""
        return self.body.stage.chunks if self.added is None else self.added

    @property
    def named(self) -> list[Named]:
        """The parameters of each chunk that train, if any do."""
        if self.added is None:
            return self.body.stage.named
        return [chunk.named for chunk in self.added]

    def own_tensors(self) -> LocalTensors:
        """Return the tensors that the role owns, to be filled: without borrowed ones."""
        own = {} if self.added is None else _tensors(self.named)
        return own if self.is_borrowed else _tensors(self.body.stage.named) | own

    def local_tensors(self) -> LocalTensors:
        """Return the tensors of the role's name space."""
        body = _tensors(self.body.stage.named)
        own = {} if self.added is None else _tensors(self.named)
        return {name: held for name, held in body.items() if name in self.fixed} | own

    def parts(self) -> dict[str, list[Tensor]]:
        """Return the tensors of `weights`, and of `base` if the role owns one under an adapter."""
        body = [tensor for tensor, _ in _tensors(self.body.stage.named).values()]
        if self.added is None:
            return {"weights": body}
        own = [tensor for tensor, _ in _tensors(self.named).values()]
        return {"weights": [*body, *own]} if self.is_borrowed else {"base": body, "weights": own}

    def head_weight(self) -> Tensor | None:
        """Return the role's own scalar head, if it has one; only on the last stage."""
        if self.added is None:
            return None
        return next((tensor for row, tensor in self.named[-1] if row.name == HEAD), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Add the role's adapter to the body's layers inside the `with` block."""
        with ExitStack() as stack:
            for chunk in self.added or ():
                stack.enter_context(chunk.applied())
            yield


def _tensors(named: list[Named]) -> LocalTensors:
    return {row.name: (tensor.detach(), row.slices) for chunk in named for row, tensor in chunk}


def own_weights(
    mesh: Mesh,
    model: ModelConfig,
    options: TrainOptions,
    device: torch.device,
    megatron: MegatronOptions,
    *,
    trainable: bool,
    head: Head,
    adapter: Adapter | None,
) -> RoleWeights:
    """Make the weights of a role that owns its body; they are not filled yet."""
    is_fixed = adapter is not None or not trainable
    is_plain = adapter is not None
    cut = model_cut(mesh.degrees, megatron, device, is_plain=is_plain)
    groups = make_groups(
        mesh,
        device,
        tied=model.tie_embeddings and head == "lm" and not is_fixed,
        has_experts=model.moe is not None,
    )
    settings = transformer_config(mesh, model, options, megatron, device, is_plain=is_plain)
    with_score = adapter is None
    stage = build_chunks(settings, model, cut, groups, mesh, device, head, with_score=with_score)
    for chunk in stage.chunks:
        chunk.requires_grad_(not is_fixed)
        if is_fixed and chunk.pre_process:
            keep_differentiable(chunk)
        if is_fixed and not cut.fused_norms:
            pass_dropout(chunk)
    body = Body(
        model=model,
        cut=cut,
        settings=settings,
        groups=groups,
        stage=stage,
        head=head,
        is_fixed=is_fixed,
    )
    return _with_added(
        body,
        mesh,
        options,
        device,
        adapter,
        trainable=trainable,
        has_head=head == "score" and adapter is not None,
        head=head,
        is_borrowed=False,
    )


def borrowed_weights(
    body: Body,
    mesh: Mesh,
    options: TrainOptions,
    device: torch.device,
    *,
    trainable: bool,
    head: Head,
    adapter: Adapter | None,
) -> RoleWeights:
    """Make the weights of a role over another role's body; its own are not filled yet.

    A scalar head is always the role's own.

    Raises:
        ValueError: the body trains, has no head of this kind, or has layers that take no addition;
            or the role would train it.
    """
    check_borrowing(
        mesh.role,
        is_fixed=body.is_fixed,
        lacks_head=head == "lm" and body.head != "lm",
        trains_base=trainable and adapter is None,
    )
    if adapter is not None and body.cut.fused_norms:
        key = f"roles.{mesh.role}"
        raise ValueError(
            f"{key}.adapter: the role of {key}.base has TransformerEngine's layers, which take no "
            "additions: give it an adapter too, or let it borrow this role's base"
        )
    return _with_added(
        body,
        mesh,
        options,
        device,
        adapter,
        trainable=trainable,
        has_head=head == "score",
        head=head,
        is_borrowed=True,
    )


def _with_added(
    body: Body,
    mesh: Mesh,
    options: TrainOptions,
    device: torch.device,
    adapter: Adapter | None,
    *,
    trainable: bool,
    has_head: bool,
    head: Head,
    is_borrowed: bool,
) -> RoleWeights:
    model, cut = body.model, body.cut
    tp_rank, pp_rank, ep_rank = (mesh.coordinate(axis) for axis in ("tp", "pp", "ep"))
    expected = rank_chunks(
        model, cut, tp_rank, pp_rank, head, ep_rank=ep_rank, with_score=not has_head
    )
    fixed = frozenset(row.name for chunk in expected for row in chunk)
    if adapter is None and not has_head:
        return RoleWeights(body=body, added=None, fixed=fixed, is_borrowed=is_borrowed)
    adapter = Adapter(targets={}) if adapter is None else adapter
    tp = Parallel(group=mesh.group("tp"), rank=tp_rank, size=cut.tp)
    table = adapter_chunks(model, cut, tp_rank, pp_rank, adapter, "score" if has_head else "lm")
    added = []
    for number, (chunk, rows) in enumerate(zip(body.stage.chunks, table, strict=True)):
        layers = chunk_layers(model, cut, pp_rank, number)
        weights = AdapterWeights(
            model,
            chunk_adapter(model, adapter, layers),
            tp=tp,
            head=any(row.name == HEAD for row in rows),
            dtype=options.param_dtype,
            device=device,
        ).requires_grad_(trainable)
        added.append(AdaptedChunk(chunk, layers, weights, rows))
    return RoleWeights(body=body, added=added, fixed=fixed, is_borrowed=is_borrowed)
