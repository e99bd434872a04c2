"""Multi-head latent attention: a vector of which every head's keys and values are made, and one key
with rope that all heads share.

A trainer computes every head's keys and values. An engine keeps the latent vectors in their place
and multiplies queries and results by the heads' matrices instead (DeepSeek-V2,
https://arxiv.org/abs/2405.04434, section 2.1.2): q . (K c) = (K^T q) . c and sum p (V c) =
V sum p c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from spmdrl.distributed.parallel import copy_to
from spmdrl.models.blocks.projections import Build, Norm, Projection
from spmdrl.models.blocks.softmax_attention import Attend
from spmdrl.models.low_rank import Added, Applied, adapted_linear, added_to
from spmdrl.models.rope import Rope
from spmdrl.models.specs import LatentAttention, NormSpec
from spmdrl.models.tensors import GlobalTensor, TpSplit


class LatentMixer(nn.Module):
    """The module of a `LatentAttention`; tensor parallelism divides heads, and every rank computes
    the latent vectors.
    """

    def __init__(self, spec: LatentAttention, hidden: int, build: Build) -> None:
        super().__init__()
        self.spec, self.tp = spec, build.tp
        self.heads = spec.num_heads // build.tp.size
        own = replace(build, norm=NormSpec(eps=spec.norm_eps))
        self.q_down: Projection | None = None
        self.q_down_norm: Norm | None = None
        if spec.q_rank is not None:
            self.q_down = build.projection(spec.q_rank, hidden, bias=spec.bias)
            self.q_down_norm = own.rms_norm(spec.q_rank)
        self.q_up = build.projection(self.heads * spec.head_dim, spec.q_rank or hidden)
        self.kv_down = build.projection(spec.kv_rank + spec.rope_dim, hidden, bias=spec.bias)
        self.kv_down_norm = own.rms_norm(spec.kv_rank)
        self.kv_up = Expansion(spec, self.heads, build)
        self.out = build.projection(hidden, self.heads * spec.v_dim, bias=spec.bias)

    def forward(
        self,
        x: Tensor,  # [T, D]
        rope: Rope | None,
        attend: Attend,
        layer: int,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:  # [T, D]
        assert rope is not None, "the shared key has positions"
        place = f"layers.{layer}.attention"
        plain, turned = self._queries(x, rope, place, adapters)
        latents = self._latents(x, rope, added_to(adapters, f"{place}.kv_down"))
        vectors, key = torch.split(latents, [self.spec.kv_rank, self.spec.rope_dim], dim=1)
        added = added_to(adapters, f"{place}.kv_up", merges=False)
        if attend.takes_latents:
            q = torch.cat((self.kv_up.of_queries(plain, added), turned), dim=2)
            found = attend(layer, q, latents[:, None], vectors[:, None])
            out = self.kv_up.of_results(found, added)
        else:
            k, v = self.kv_up(vectors, added)
            shared = key[:, None].expand(-1, self.heads, -1)
            q, k = torch.cat((plain, turned), dim=2), torch.cat((k, shared), dim=2)
            out = attend(layer, q, k, v)
        return self.out.reduced(out.flatten(1), self.tp, added_to(adapters, f"{place}.out"))

    def _queries(
        self, x: Tensor, rope: Rope, place: str, adapters: Sequence[Applied]
    ) -> tuple[Tensor, Tensor]:
        """Compute the parts without and with rope: [T, H_local, nope_dim] and [.., rope_dim]."""
        inputs = x
        if self.q_down is not None and self.q_down_norm is not None:
            inputs = self.q_down_norm(self.q_down(x, added_to(adapters, f"{place}.q_down")))
        q = self.q_up(copy_to(inputs, self.tp.group), added_to(adapters, f"{place}.q_up"))
        sizes = [self.spec.nope_dim, self.spec.rope_dim]
        plain, turned = torch.split(q.view(len(q), self.heads, -1), sizes, dim=2)
        return plain, rope.turn(turned)

    def _latents(self, x: Tensor, rope: Rope, added: Added) -> Tensor:
        """Compute the latent vectors and the key with rope: [T, kv_rank + rope_dim]."""
        both = self.kv_down(x, added)
        vectors, key = torch.split(both, [self.spec.kv_rank, self.spec.rope_dim], dim=1)
        key = rope.turn(key[:, None]).flatten(1)
        # every rank's heads take a part in the gradient
        return copy_to(torch.cat((self.kv_down_norm(vectors), key), dim=1), self.tp.group)


class Expansion(nn.Module):
    """The matrices [nope_dim, kv_rank] and [v_dim, kv_rank] that make each head's keys and values
    of latent vectors, head by head below one another.

    It is no `Projection`: an engine never multiplies by the whole of it, so that it needs no copy
    in blocks.
    """

    def __init__(self, spec: LatentAttention, heads: int, build: Build) -> None:
        super().__init__()
        self.heads, self.sizes = heads, [spec.nope_dim, spec.v_dim]
        self.weight = build.empty(heads * sum(self.sizes), spec.kv_rank)

    def forward(self, vectors: Tensor, added: Added) -> tuple[Tensor, Tensor]:  # [T, kv_rank]
        """Compute keys [T, H_local, nope_dim] and values [T, H_local, v_dim]."""
        both = adapted_linear(vectors, self.weight, None, added)
        k, v = torch.split(both.view(len(both), self.heads, -1), self.sizes, dim=2)
        return k, v

    def of_queries(self, q: Tensor, added: Added) -> Tensor:
        """Compute K^T q of every head, without gradient: [T, H_local, nope_dim] -> [T, H_local,
        kv_rank].
        """
        rows = q.transpose(0, 1)
        out = torch.bmm(rows, self._by_head(self.weight, 0))
        for addition, how in added:
            [b] = addition.b_weights()
            inner = torch.bmm(rows, self._by_head(b, 0))
            out += _of_rows(inner, how) @ (addition.lora_A * addition.spans[0].scale)
        return out.transpose(0, 1)

    def of_results(self, found: Tensor, added: Added) -> Tensor:
        """Compute V c of every head, without gradient: [T, H_local, kv_rank] -> [T, H_local,
        v_dim].
        """
        rows = found.transpose(0, 1)
        out = torch.bmm(rows, self._by_head(self.weight, 1).mT)
        for addition, how in added:
            [b] = addition.b_weights()
            inner = rows @ (addition.lora_A * addition.spans[0].scale).t()
            out += torch.bmm(_of_rows(inner, how), self._by_head(b, 1).mT)
        return out.transpose(0, 1)

    def _by_head(self, weight: Tensor, part: int) -> Tensor:
        """View the rows of keys (0) or values (1) of every head: [H_local, rows, columns]."""
        return torch.split(weight.view(self.heads, sum(self.sizes), -1), self.sizes, dim=1)[part]


def _of_rows(inner: Tensor, how: Applied | None) -> Tensor:  # [H, T, rank]
    """Zero the rows that an adapter does not apply to."""
    return inner if how is None or how.rows is None else inner * how.rows


def latent_tensors(spec: LatentAttention, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names of a layer's attention to its tensors, named by `family.STANDARD`'s keys."""
    table: dict[str, tuple[GlobalTensor, ...]] = {}

    def one(local: str, *shape: int, split: TpSplit = TpSplit.NONE, name: str = "") -> None:
        tensor = GlobalTensor(name=f"attention.{name or local}", shape=shape, split=split)
        table[f"attention.{local}"] = (tensor,)

    def down(local: str, rows: int, normed: int) -> None:
        one(f"{local}.weight", rows, hidden)
        if spec.bias:
            one(f"{local}.bias", rows)
        one(f"{local}_norm.weight", normed)

    q_rows = spec.num_heads * spec.head_dim
    if spec.q_rank is None:
        one("q_up.weight", q_rows, hidden, split=TpSplit.ROWS, name="q.weight")
    else:
        down("q_down", spec.q_rank, spec.q_rank)
        one("q_up.weight", q_rows, spec.q_rank, split=TpSplit.ROWS)
    down("kv_down", spec.kv_rank + spec.rope_dim, spec.kv_rank)
    rows = spec.num_heads * (spec.nope_dim + spec.v_dim)
    one("kv_up.weight", rows, spec.kv_rank, split=TpSplit.ROWS)
    one("out.weight", hidden, spec.num_heads * spec.v_dim, split=TpSplit.COLUMNS)
    if spec.bias:
        one("out.bias", hidden)
    return table
