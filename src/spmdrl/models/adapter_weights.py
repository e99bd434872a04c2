"""`AdapterWeights`: an adapter's matrices on this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spmdrl.distributed.parallel import Parallel
from spmdrl.keyed_random import key64
from spmdrl.models.adapters import Adapter, LowRank, adapter_tensors, part_name
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.low_rank_products import Addition, Span
from spmdrl.models.sharding import SCORE, all_slices, fused_tensors, local_parameters
from spmdrl.models.tensors import Slice, TpSplit, is_expert_parameter

HEAD_WEIGHT = "head.weight"
"""Local name of a head's weight, in decoders and adapters alike."""


class AdapterWeights(nn.Module):
    """An adapter of a decoder on this rank, cut like the decoder; its storage is not initialised.

    Args:
        model: the global model.
        tp, ep, blocks: those of the decoder.
        head: whether it has a scalar head of its own, `head.weight`, in place of the decoder's.
    """

    def __init__(
        self,
        model: ModelConfig,
        adapter: Adapter,
        *,
        tp: Parallel | None = None,
        ep: Parallel | None = None,
        blocks: int = 1,
        head: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter
        self.tp = Parallel() if tp is None else tp
        self.ep = Parallel() if ep is None else ep
        self.head: nn.ParameterDict | None = None
        self._additions: dict[str, Addition] = {}
        tables = self.tables()
        shapes = local_parameters(
            model,
            self.tp.size,
            ep_size=self.ep.size,
            table=adapter_tensors(model, adapter),
        )
        for local, (spans, count) in _all_spans(model, adapter, self.tp, self.ep).items():
            name = f"{local}.lora_A"
            place = (shapes[name][1], tables[name][0].start[1])
            own_blocks = 1 if is_expert_parameter(local) else blocks
            addition = Addition(spans, *place, own_blocks, count, dtype=dtype, device=device)
            self._additions[local] = addition
            _add_module(self, local, addition)
        if head:
            row = torch.empty(1, model.hidden_size, dtype=dtype, device=device)
            self.head = nn.ParameterDict({"weight": nn.Parameter(row)})

    def addition(self, local: str) -> Addition | None:
        """Return the addition to a projection (`layers.0.attention.qkv`), if it has a target."""
        return self._additions.get(local)

    def head_weight(self) -> Tensor | None:
        """Return the weight [1, D] of its own scalar head, if it has one."""
        return None if self.head is None else self.head["weight"]

    def is_copied(self, name: str) -> bool:
        """Whether every tensor-parallel rank computes the whole product with the matrix that the
        parameter `name` adapts, so that the ranks' gradients are equal and no parts of a sum.
        """
        target = fused_tensors(self.model)[f"{name.partition('.lora_')[0]}.weight"][0]
        return target.split is TpSplit.NONE

    def tables(self) -> dict[str, tuple[Slice, ...]]:
        """Return the slices of the global tensors that every parameter holds."""
        table = dict(adapter_tensors(self.model, self.adapter))
        if self.head is not None:
            table[HEAD_WEIGHT] = fused_tensors(self.model, "score")[HEAD_WEIGHT]
        return all_slices(
            self.model,
            self.tp.rank,
            self.tp.size,
            ep_rank=self.ep.rank,
            ep_size=self.ep.size,
            table=table,
        )


def _all_spans(
    model: ModelConfig, adapter: Adapter, tp: Parallel, ep: Parallel
) -> dict[str, tuple[list[Span], int]]:
    """Projection's local name -> the spans of its targets, and how many A and B are stacked."""
    found: dict[str, tuple[list[Span], int]] = {}
    slices_of = all_slices(model, tp.rank, tp.size, ep_rank=ep.rank, ep_size=ep.size)
    for local, slices in slices_of.items():
        count = 1
        if model.moe is not None and is_expert_parameter(local):
            count = model.moe.num_experts // ep.size
        spans: list[Span] = []
        for piece in slices[: len(slices) // count]:
            if (own := adapter.targets.get(piece.name)) is not None:
                spans.append(_span(piece, own, spans))
        if spans:
            found[local.removesuffix(".weight")] = spans, 1 if adapter.shares_experts else count
    return found


def _span(piece: Slice, own: LowRank, before: Sequence[Span]) -> Span:
    """Place a target, or a part of one, behind the spans before it."""
    part = part_name(piece.name)
    parts = [span for span in before if span.part == part]
    ranks = max((span.ranks.stop for span in before), default=0)
    return Span(
        part=part,
        key=key64(*piece.name.encode()),
        first=piece.offset,
        rows=piece.rows,
        first_b=sum(span.rows for span in parts),
        first_rank=parts[0].first_rank if parts else ranks,
        rank=own.rank,
        scale=own.scale,
    )


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *holders, last = path.split(".")
    for name in holders:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)


@torch.no_grad()
def merged(
    tensor: Tensor, slices: Sequence[Slice], adapter: Adapter, tensors: LocalTensors
) -> Tensor:
    """Return W + scale B A, rounded once from float32 to the dtype of W.

    Args:
        tensor, slices: a tensor of the base on this rank, whole or a shard.
        tensors: the adapter's tensors on this rank, which cover the boxes of `slices`.
    """
    out = tensor.to(torch.float32, copy=True)
    held = _boxes(tensors)
    for piece in slices:
        if (own := adapter.targets.get(piece.name)) is None:
            continue
        name_a, name_b = adapter.factors(piece.name)
        [(a, of_a)] = held[name_a]
        b, of_b = next(one for one in held[name_b] if _holds(one[1], piece))
        rows = slice(piece.start[0] - of_b.start[0], piece.stop[0] - of_b.start[0])
        columns = slice(piece.start[1] - of_a.start[1], piece.stop[1] - of_a.start[1])
        box = out[piece.offset : piece.offset + piece.rows]
        box.addmm_(b[rows].float(), a[:, columns].float(), alpha=own.scale)
    return out.to(tensor.dtype)


def _holds(part: Slice, piece: Slice) -> bool:
    """Whether a part of B has the rows of a box of its matrix."""
    return part.start[0] <= piece.start[0] and piece.stop[0] <= part.stop[0]


def _boxes(tensors: LocalTensors) -> Mapping[str, list[tuple[Tensor, Slice]]]:
    """Global name -> the boxes that are held here."""
    found: dict[str, list[tuple[Tensor, Slice]]] = {}
    for tensor, slices in tensors.values():
        for piece in slices:
            if piece.name != SCORE:
                rows = tensor[piece.offset : piece.offset + piece.rows]
                found.setdefault(piece.name, []).append((rows, piece))
    return found
