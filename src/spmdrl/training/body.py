"""`Body`: a decoder on this rank and its leaves, which several roles can share.

The role that owns a body trains it, or an adapter over it, or nothing. Other roles may borrow a
body that is fixed: each has its own adapter and scalar head over it, or reads it as it is. The
decoder object is shared, and with it FSDP2's state: a role's pass ends with all shards in place, so
that any role's pass may follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapter_weights import HEAD_WEIGHT, AdapterWeights
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.dropout import Dropout
from spmdrl.models.gradient_sums import GradientSum
from spmdrl.models.low_rank import Applied
from spmdrl.models.sharding import SCORE, Head, global_shapes
from spmdrl.training.backend_steps import check_borrowing
from spmdrl.training.options import TrainOptions
from spmdrl.training.weights import (
    Leaf,
    NewMaster,
    build_decoder,
    make_adapter_leaves,
    make_leaves,
    on_device,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """A decoder and its leaves.

    Args:
        is_fixed: whether no matrix of it trains; a scalar head may.
    """

    decoder: Decoder
    leaves: tuple[Leaf, ...]
    is_fixed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class RoleWeights:
    """The weights of one role: a body, and the adapter and head that it has over it.

    Args:
        added: the adapter's matrices, and a scalar head in place of the decoder's; or None.
        own: leaves of `added`.
        is_borrowed: whether another role owns the body.
    """

    body: Body
    added: AdapterWeights | None
    own: tuple[Leaf, ...]
    is_borrowed: bool

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves of the role's name space: those of the body, of the adapter, of its head."""
        if self.added is None:
            return self.body.leaves
        names = {leaf.name for leaf in self.own}
        body = [leaf for leaf in self.body.leaves if leaf.name not in names]
        fixed = [leaf for leaf in body if not leaf.trained]
        return (*fixed, *self.own, *(leaf for leaf in body if leaf.trained))

    @property
    def held(self) -> tuple[Leaf, ...]:
        """The leaves that a checkpoint of the role holds: all, or under an adapter those that
        train. A body that is borrowed is its owner's.
        """
        if self.is_borrowed:
            return tuple(leaf for leaf in self.own if leaf.trained)
        if self.added is not None:
            return tuple(leaf for leaf in self.leaves if leaf.trained)
        return self.leaves

    def parts(self) -> dict[str, list[Tensor]]:
        """Return the tensors of `weights`, and of `base` if the role owns one under an adapter."""
        own = [leaf.weight for leaf in self.own]
        fixed = [leaf.weight for leaf in self.body.leaves if not leaf.trained]
        if self.is_borrowed:
            return {"weights": [*fixed, *own]}
        if self.added is None:
            return {"weights": [leaf.weight for leaf in self.body.leaves]}
        trained = [leaf.weight for leaf in self.body.leaves if leaf.trained]
        return {"base": fixed, "weights": [*trained, *own]}

    def applied(self, dropout: Dropout | None = None) -> list[Applied]:
        """Return the adapter as a pass applies it."""
        return [] if self.added is None else [Applied(weights=self.added, dropout=dropout)]

    def head_weight(self, of_decoder: Tensor) -> Tensor:
        """Return the weight of the role's own head, or else the decoder's."""
        own = None if self.added is None else self.added.head_weight()
        return of_decoder if own is None else own

    def head_sum(self) -> GradientSum | None:
        """Return what takes the gradient of the decoder's head, if the role has that head."""
        has_own = self.added is not None and self.added.head_weight() is not None
        return None if has_own else self.body.decoder.head_holder.gradient_sum

    def head_bias(self) -> Tensor | None:
        """Return the bias [1] of the decoder's scalar head, if the role has that head."""
        has_own = self.added is not None and self.added.head_weight() is not None
        head = self.body.decoder.head
        return None if has_own or head is None else head.bias


def own_weights(
    mesh: Mesh,
    model: ModelConfig,
    options: TrainOptions,
    device: torch.device,
    *,
    trainable: bool,
    head: Head,
    adapter: Adapter | None,
    zero: bool = False,
    new_master: NewMaster = on_device,
) -> RoleWeights:
    """Make the weights of a role that owns its body; they are not filled yet.

    Args:
        zero: whether DeepSpeed's ZeRO divides what is trained, and holds the masters.
        new_master: otherwise makes the masters of weights narrower than float32.

    Raises:
        ValueError: see `build_decoder`.
    """
    frozen = options.frozen
    if adapter is not None:
        frozen = frozenset(global_shapes(model, head)) - {SCORE}
    is_fixed = not trainable or adapter is not None
    decoder = build_decoder(
        mesh,
        model,
        options.param_dtype,
        device,
        trainable=trainable,
        head=head,
        frozen=frozen,
        blocks=options.blocks,
        is_fixed=is_fixed,
        fsdp=not zero,
    )
    masters = None if zero else new_master
    leaves = make_leaves(decoder, mesh, new_master=masters)
    body = Body(decoder=decoder, leaves=leaves, is_fixed=is_fixed)
    return _with_added(
        body, mesh, options, device, trainable, adapter, is_borrowed=False, new_master=masters
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
    zero: bool = False,
    new_master: NewMaster = on_device,
) -> RoleWeights:
    """Make the weights of a role over another role's body; its own are not filled yet.

    A scalar head is always the role's own.

    Args:
        zero, new_master: see `own_weights`.

    Raises:
        ValueError: the body trains, or has no head of this kind; or the role would train it.
    """
    check_borrowing(
        mesh.role,
        is_fixed=body.is_fixed,
        lacks_head=head == "lm" and body.decoder.kind != "lm",
        trains_base=trainable and adapter is None,
    )
    has_head = head == "score"
    return _with_added(
        body,
        mesh,
        options,
        device,
        trainable,
        adapter,
        has_head=has_head,
        is_borrowed=True,
        new_master=None if zero else new_master,
    )


def _with_added(
    body: Body,
    mesh: Mesh,
    options: TrainOptions,
    device: torch.device,
    trainable: bool,
    adapter: Adapter | None,
    *,
    is_borrowed: bool,
    new_master: NewMaster | None,
    has_head: bool = False,
) -> RoleWeights:
    if adapter is None and not has_head:
        return RoleWeights(body=body, added=None, own=(), is_borrowed=is_borrowed)
    decoder = body.decoder
    added = AdapterWeights(
        decoder.model,
        Adapter(targets={}) if adapter is None else adapter,
        tp=decoder.tp,
        ep=decoder.ep,
        blocks=decoder.blocks,
        head=has_head,
        dtype=options.param_dtype,
        device=device,
    ).requires_grad_(trainable)
    own = make_adapter_leaves(added, mesh, new_master=new_master)
    assert not has_head or HEAD_WEIGHT in {leaf.name for leaf in own}
    return RoleWeights(body=body, added=added, own=own, is_borrowed=is_borrowed)
