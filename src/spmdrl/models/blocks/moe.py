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
    all_to_all_rows,
    copy_to,
    exchange_counts,
    reduce_from,
)
from spmdrl.models.blocks.activations import gated, gated_halves
from spmdrl.models.blocks.expert_products import (
    RowsAdded,
    adapted_grouped,
    added_to_experts,
    of_rows,
)
from spmdrl.models.blocks.projections import Build, Projection
from spmdrl.models.config import ModelConfig
from spmdrl.models.linear import Groups, grouped_gemm_is_usable, linear
from spmdrl.models.low_rank import Applied, added_to
from spmdrl.models.routing import Routing
from spmdrl.models.specs import MoeMlp, SharedExperts


def has_fixed_shapes(
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int] | None = None,
) -> bool:
    """Whether a pass without gradient has the same shapes whatever experts are chosen, so that it
    can be captured as a CUDA graph; `shapes` are those of a rank's parameters, by local name.

    Args:
        capability: the GPU's compute capability; by default the device is asked.
    """
    if model.moe is None:
        return True
    # gate and up are side by side in rows of the form whose matrices are transposed
    parts = {".mlp.experts.down": 1, ".mlp.experts.gate_up": 1}
    if model.moe.form == "transposed":
        parts[".mlp.experts.gate_up"] = 2
    widths = {
        shape[1] // count
        for end, count in parts.items()
        for name, shape in shapes.items()
        if name.endswith(end)
    }
    return grouped_gemm_is_usable(dtype, device, model.hidden_size, *widths, capability=capability)


class Router(nn.Module):
    """Scores of all experts [T, E], in float32 so that close choices are told apart."""

    def __init__(self, spec: MoeMlp, hidden: int, build: Build) -> None:
        super().__init__()
        self.spec = spec
        self.weight = build.empty(spec.num_experts, hidden)
        self.bias = build.empty(spec.num_experts) if spec.router_bias else None
        self.correction = build.buffer(spec.num_experts) if spec.correction else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        logits = linear(x.float(), self.weight.float(), bias)
        return logits.sigmoid() if self.spec.scores == "sigmoid" else logits.softmax(dim=-1)

    def ranking(self, scores: Tensor) -> Tensor:  # [T, E]
        """Return the numbers whose largest are chosen, without gradient."""
        found = scores.detach()
        if self.correction is not None:
            found = found + self.correction
        groups = self.spec.groups
        if groups == 1:
            return found
        parts = found.view(len(found), groups, -1)
        best = parts.topk(2, dim=-1).values.sum(dim=-1)  # [T, groups]
        kept = best.topk(self.spec.top_groups, dim=-1).indices
        hidden = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        return parts.masked_fill(hidden[..., None], -math.inf).flatten(1)


class Moe(nn.Module):
    """The module of a `MoeMlp`: router, experts, and an MLP that all tokens take, if there is one.

    Args:
        build: its `ep` is this rank's part of the experts, `ep.rank` of `ep.size`; `ep.group` has
            the ranks with other tokens (and the same tp coordinate) that hold other parts, in
            their order.
    """

    def __init__(self, spec: MoeMlp, hidden: int, build: Build) -> None:
        super().__init__()
        self.spec, self.tp = spec, build.tp
        self.router = Router(spec, hidden, build)
        self.experts = Experts(spec, hidden, build)
        self.shared: SharedMlp | None = None
        self.shared_gate: Projection | None = None
        if spec.shared is not None:
            self.shared = SharedMlp(spec, spec.shared, hidden, build)
            if spec.shared.gate:
                self.shared_gate = build.projection(1, hidden)

    def forward(
        self,
        x: Tensor,  # [T, D]
        layer: int,
        routing: Routing | None,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:  # [T, D]
        scores = self.router(x)
        ranking = self.router.ranking(scores)
        chosen, weights = choose_experts(scores, ranking, self.spec, layer, routing)
        group = self.tp.group
        experts = f"layers.{layer}.mlp.experts"
        added = (
            added_to_experts(adapters, f"{experts}.gate_up"),
            added_to_experts(adapters, f"{experts}.down"),
        )
        copied = copy_to(x, group)
        out = self.experts(copied, chosen, copy_to(weights.to(x.dtype), group), added)
        if self.shared is not None:
            own = self.shared(copied, layer, adapters)
            if self.shared_gate is not None:
                # every rank gates its own part of the sum
                gate = self.shared_gate(x)
                own = own * copy_to(torch.sigmoid(gate), group)
            out = out + own
        return reduce_from(out, group)


def choose_experts(
    scores: Tensor,  # [T, E]
    ranking: Tensor,  # [T, E]
    spec: MoeMlp,
    layer: int,
    routing: Routing | None,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by `ranking`, and their weights: int64 and float32 [T, K]."""
    if routing is None:
        chosen = ranking.topk(spec.top_k, dim=-1).indices
    else:
        chosen = routing.choose(layer, ranking)
        scores = routing.balanced(layer, scores, chosen)
    weights = scores.gather(1, chosen)
    if spec.normalise:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + _LEAST_SUM if spec.scores == "sigmoid" else total)
    return chosen, weights if spec.scale == 1.0 else weights * spec.scale


_LEAST_SUM = 1e-20
"""Keeps the sum of sigmoids above 0."""


class SharedMlp(nn.Module):
    """The MLP of every token; its result is a part of the sum over tensor-parallel ranks."""

    def __init__(self, moe: MoeMlp, spec: SharedExperts, hidden: int, build: Build) -> None:
        super().__init__()
        self.activation, self.blocks = moe.activation, build.blocks
        width = spec.width // build.tp.size
        self.gate_up = build.projection(2 * width, hidden)
        self.down = build.projection(hidden, width)

    def forward(self, x: Tensor, layer: int, adapters: Sequence[Applied]) -> Tensor:
        to_gate_up = added_to(adapters, f"layers.{layer}.mlp.shared.gate_up")
        to_down = added_to(adapters, f"layers.{layer}.mlp.shared.down")
        gate_up = self.gate_up(x, to_gate_up)
        # a block's gate and up each
        parts = gated(gate_up.view(len(gate_up) * self.blocks, -1), self.activation)
        out: Tensor = self.down(parts.view(len(gate_up), -1), to_down)
        return out


_Added = tuple[RowsAdded, RowsAdded]
"""Additions to gate_up and to down."""


class Experts(nn.Module):
    """This rank's experts, stacked: `gate_up` has each one's rows of gate and up, `down` of down.

    It is a separate module because FSDP2 shards it over other ranks than the rest of the layer.
    """

    def __init__(self, spec: MoeMlp, hidden: int, build: Build) -> None:
        super().__init__()
        tp, ep = build.tp, build.ep
        ep_tp = math.gcd(tp.size, ep.size)
        self.spec = spec
        self.ep, self.num_columns, self.column = ep, ep_tp, ep.rank % ep_tp
        self.hidden, self.count = hidden, spec.num_experts // ep.size
        self.parts = tp.size // ep_tp  # ranks over which one expert's width is divided
        self.width = spec.width // self.parts
        wide, narrow = (2 * self.width, hidden), (hidden, self.width)
        if spec.form == "transposed":
            wide, narrow = (hidden, 2 * self.width), (self.width, hidden)
        self.gate_up = build.empty(self.count * wide[0], wide[1])
        self.down = build.empty(self.count * narrow[0], narrow[1])
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if spec.expert_bias:
            self.gate_up_bias = build.empty(self.count, 2 * self.width)
            self.down_bias = build.empty(self.count, hidden)

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

    def serve(self) -> None:
        """Compute this rank's experts for the rows of the other ranks of `ep.group`."""
        assert self.ep.group is not None
        none = torch.zeros(0, dtype=torch.int64, device=self.gate_up.device)
        sent = none.new_zeros(self.ep.size // self.num_columns, self.count)
        self._exchange(self.gate_up.new_empty(0, self.hidden), none, 1, sent, ((), ()))

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
        gate_up = self.gate_up.view(self.count, -1, self.gate_up.shape[1])
        down = self.down.view(self.count, -1, self.down.shape[1])
        is_transposed = self.spec.form == "transposed"
        if is_transposed:
            gate_up, down = gate_up.mT, down.mT
        both = adapted_grouped(rows, gate_up, added[0], groups)
        if self.gate_up_bias is not None:
            both = both + _bias_of_rows(self.gate_up_bias, groups, len(rows))
        if is_transposed:  # gate and up alternate
            hidden = gated_halves(both[:, ::2], both[:, 1::2], self.spec.activation)
        else:
            hidden = gated(both, self.spec.activation)
        out = adapted_grouped(hidden, down, added[1], groups)
        if self.down_bias is not None:
            # The ranks that share an expert's width each add their part of the bias, and each
            # gets the whole gradient, as of a parameter that all of them hold.
            whole = self.down_bias
            bias = whole + (whole / self.parts - whole).detach()
            out = out + _bias_of_rows(bias, groups, len(rows))
        return out


def _bias_of_rows(bias: Tensor, groups: Groups, count: int) -> Tensor:  # [E, N] -> [count, N]
    """Repeat each expert's bias for its rows; rows of no group get the last one's."""
    ends = groups.counts.cumsum(0)
    place = torch.arange(count, device=bias.device)
    expert = torch.searchsorted(ends, place, right=True).clamp(max=len(bias) - 1)
    return bias.index_select(0, expert)


def serve_experts(decoder: nn.Module) -> None:
    """Take part in a pass of the ranks that this one exchanges tokens with, without tokens of its
    own: compute its experts for theirs, layer by layer.
    """
    for module in decoder.modules():
        if isinstance(module, Experts):
            module.serve()


def _of_rows(added: _Added, token: Tensor) -> _Added:
    return of_rows(added[0], token), of_rows(added[1], token)
