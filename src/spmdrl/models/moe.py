"""Mixture-of-experts layers: every token is routed to its top-k experts, and none is dropped.

Ranks hold whole experts or parts of them, as described by `sharding`. Tokens are the same on all
tensor-parallel ranks, so each of these computes the experts that it has a part of, and results are
summed as after any row-parallel product. Experts on ranks with other tokens are reached by an
exchange: a token goes to the rank with the same tp coordinate that has the expert, and returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spmdrl.distributed.parallel import (
    Parallel,
    all_to_all_rows,
    copy_to,
    exchange_counts,
    reduce_from,
)
from spmdrl.models.config import ModelConfig
from spmdrl.models.expert_products import RowsAdded, adapted_grouped, added_to_experts, of_rows
from spmdrl.models.experts import MoeConfig
from spmdrl.models.fused import swiglu
from spmdrl.models.linear import Groups, grouped_gemm_is_usable, linear
from spmdrl.models.low_rank import Applied
from spmdrl.models.routing import Routing


def has_fixed_shapes(
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether a pass without gradient has the same shapes whatever experts are chosen, so that it
    can be captured as a CUDA graph; `shapes` are those of a rank's parameters, by local name.
    """
    widths = {shape[1] for name, shape in shapes.items() if name.endswith(".mlp.experts.down")}
    return model.moe is None or grouped_gemm_is_usable(dtype, device, model.hidden_size, *widths)


class Router(nn.Module):
    """Probabilities over all experts [T, E], in float32 so that close choices are told apart."""

    def __init__(
        self, model: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        assert model.moe is not None
        shape = (model.moe.num_experts, model.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float()).softmax(dim=-1)


class Moe(nn.Module):
    """Router and experts of one layer.

    Args:
        ep: this rank's part of the experts, `ep.rank` of `ep.size`; `ep.group` has the ranks with
            other tokens (and the same tp coordinate) that hold other parts, in their order.
    """

    def __init__(
        self,
        model: ModelConfig,
        tp: Parallel,
        ep: Parallel,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        assert model.moe is not None
        self.tp, self.moe = tp, model.moe
        self.router = Router(model, dtype=dtype, device=device)
        self.experts = Experts(model, tp, ep, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,  # [T, D]
        layer: int,
        routing: Routing | None,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:  # [T, D]
        chosen, weights = choose_experts(self.router(x), self.moe, layer, routing)
        group = self.tp.group
        experts = f"layers.{layer}.mlp.experts"
        added = (
            added_to_experts(adapters, f"{experts}.gate_up"),
            added_to_experts(adapters, f"{experts}.down"),
        )
        out = self.experts(copy_to(x, group), chosen, copy_to(weights.to(x.dtype), group), added)
        return reduce_from(out, group)


def choose_experts(
    probabilities: Tensor,  # [T, E]
    moe: MoeConfig,
    layer: int,
    routing: Routing | None,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts, and their weights: int64 and float32 [T, K]."""
    if routing is None:
        chosen = probabilities.topk(moe.top_k, dim=-1).indices
    else:
        chosen = routing.choose(layer, probabilities.detach())
        probabilities = routing.balanced(layer, probabilities, chosen)
    weights = probabilities.gather(1, chosen)
    return chosen, weights / weights.sum(dim=-1, keepdim=True) if moe.normalise else weights


_Added = tuple[RowsAdded, RowsAdded]
"""Additions to gate_up and to down."""


class Experts(nn.Module):
    """This rank's experts, stacked: `gate_up` has each one's rows of gate and up, `down` of down.

    It is a separate module because FSDP2 shards it over other ranks than the rest of the layer.
    """

    def __init__(
        self,
        model: ModelConfig,
        tp: Parallel,
        ep: Parallel,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        assert model.moe is not None
        ep_tp = math.gcd(tp.size, ep.size)
        self.ep, self.num_columns, self.column = ep, ep_tp, ep.rank % ep_tp
        self.hidden, self.count = model.hidden_size, model.moe.num_experts // ep.size
        self.width = model.moe.intermediate_size // (tp.size // ep_tp)
        rows = (self.count * 2 * self.width, self.count * self.hidden)
        self.gate_up = nn.Parameter(torch.empty(rows[0], self.hidden, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(rows[1], self.width, dtype=dtype, device=device))

    def forward(
        self,
        x: Tensor,  # [T, D]
        chosen: Tensor,  # int64 [T, K]
        weights: Tensor,  # [T, K]
        added: _Added = ((), ()),  # to gate_up and down
    ) -> Tensor:  # [T, D], only of the experts in this tp rank's column
        top_k = chosen.shape[1]
        key, num_keys = self._keys(chosen.flatten())
        order = key.argsort(stable=True)
        counts = torch.zeros(num_keys + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add_(0, key, torch.ones_like(key))[:-1]
        if self.ep.group is not None:
            order, out = self._exchange(x, order, top_k, counts.view(-1, self.count), added)
        elif self._counts_on_device(x) and not (torch.is_grad_enabled() and self.num_columns > 1):
            # For CUDA graphs: no wait for the device, and the same shapes whatever is chosen. Not
            # for a backward if some rows belong to no group: their gradients are undefined.
            token = order // top_k
            added = _of_rows(added, token)
            out = self._run(x.index_select(0, token), Groups(counts=counts), added)
            if self.num_columns > 1:
                absent = key.index_select(0, order) == num_keys
                out = out.masked_fill(absent[:, None], 0)
        else:
            sizes = counts.tolist()
            order = order[: sum(sizes)]
            token = order // top_k
            rows, added = x.index_select(0, token), _of_rows(added, token)
            out = self._run(rows, Groups(counts=counts, sizes=sizes), added)
        by_choice = out.new_zeros(chosen.numel(), self.hidden).index_copy(0, order, out)
        return (by_choice.view(*chosen.shape, -1) * weights[:, :, None]).sum(dim=1)

    def _keys(self, expert: Tensor) -> tuple[Tensor, int]:
        """Compute the keys by which rows are sorted, and the number of keys: by the rank that has
        the expert, then by expert. Experts of other tp ranks get the number of keys as their key.
        """
        part, within = expert // self.count, expert % self.count
        row, column = part // self.num_columns, part % self.num_columns
        num_keys = self.ep.size // self.num_columns * self.count
        absent = column != self.column
        return (row * self.count + within).masked_fill(absent, num_keys), num_keys

    def _counts_on_device(self, x: Tensor) -> bool:
        return grouped_gemm_is_usable(x.dtype, x.device, self.hidden, self.width)

    def _exchange(
        self,
        x: Tensor,
        order: Tensor,
        top_k: int,
        sent: Tensor,
        added: _Added,
    ) -> tuple[Tensor, Tensor]:
        """Send rows to the ranks that have their experts, and back; `sent` [ranks, E]: counts."""
        assert self.ep.group is not None
        # engines, whose rows may have different adapters, exchange no rows
        assert all(factors is None for own in added for _, factors in own)
        got = exchange_counts(sent, self.ep.group)
        ours = got.sum(0)
        sizes = torch.cat((sent.sum(1), got.sum(1), ours)).tolist()  # one wait for the device
        count = len(sent)
        sent_sizes, got_sizes, sizes = sizes[:count], sizes[count : 2 * count], sizes[2 * count :]
        order = order[: sum(sent_sizes)]
        rows = x.index_select(0, order // top_k)
        rows = all_to_all_rows(rows, sent_sizes, got_sizes, self.ep.group)
        # rows come rank by rank, each sorted by expert
        expert = torch.arange(self.count, device=x.device).repeat(len(got))
        by_expert = expert.repeat_interleave(got.flatten()).argsort(stable=True)
        out = self._run(rows.index_select(0, by_expert), Groups(counts=ours, sizes=sizes), added)
        out = out.new_empty(out.shape).index_copy(0, by_expert, out)
        return order, all_to_all_rows(out, got_sizes, sent_sizes, self.ep.group)

    def _run(self, rows: Tensor, groups: Groups, added: _Added) -> Tensor:  # [N, D] -> [N, D]
        gate_up = self.gate_up.view(self.count, 2 * self.width, self.hidden)
        down = self.down.view(self.count, self.hidden, self.width)
        hidden = swiglu(adapted_grouped(rows, gate_up, added[0], groups))
        return adapted_grouped(hidden, down, added[1], groups)


def _of_rows(added: _Added, token: Tensor) -> _Added:
    return of_rows(added[0], token), of_rows(added[1], token)
