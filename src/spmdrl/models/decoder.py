"""The decoder of Llama 2/3, SmolLM2, Qwen2/2.5, Qwen3, Mistral, and of Qwen3-MoE and Mixtral.

The torch train backend and the native rollout engine share this definition. It works on a packed
stream of T tokens and leaves attention to the caller (`Attend`), who knows which tokens belong
together and where keys and values are kept. Parameters are this rank's tensor-parallel part,
fused: `layers.{i}.attention.qkv.weight` has the rows of q, k, v, and `mlp.gate_up.weight` those of
gate and up; `spmdrl.models.sharding` describes them in Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spmdrl.distributed.parallel import Parallel, copy_to, reduce_from
from spmdrl.models.config import ModelConfig
from spmdrl.models.fused import rms_norm, swiglu
from spmdrl.models.linear import Blocked
from spmdrl.models.low_rank import Added, Applied, adapted_linear, added_to
from spmdrl.models.moe import Moe
from spmdrl.models.rope import inverse_frequencies, rope_tables, rotate
from spmdrl.models.routing import Routing
from spmdrl.models.sharding import Head, Slice, all_slices, local_kv_heads

R = TypeVar("R")
Recompute = Literal["none", "layer"]


class Attend(Protocol):
    """Attention of one layer over the packed tokens; scores are scaled by d ** -0.5."""

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [T, H_local, d], after rope
        k: Tensor,  # [T, KVH_local, d], after rope
        v: Tensor,  # [T, KVH_local, d]; q, k, v are strided views, d contiguous
    ) -> Tensor:  # [T, H_local, d]
        ...


class Projection(nn.Module):
    """Projection y = x W^T (+ b), whose storage is not initialised: weights are filled later.

    `blocked` is the weight as laid out by `linear.in_blocks`; code that sets it keeps it current.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None
        self.blocked: Blocked | None = None

    def forward(self, x: Tensor, added: Added = ()) -> Tensor:
        return adapted_linear(x, self.weight, self.bias, added, self.blocked)


class Norm(nn.Module):
    """Root-mean-square norm over the last dim (Zhang & Sennrich 2019), float32 inside.

    With `tp` each rank applies the weight only to its own heads, and its gradients are summed.
    """

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor, tp: Parallel | None = None) -> Tensor:
        weight = self.weight if tp is None else copy_to(self.weight, tp.group)
        return rms_norm(x, weight, self.eps)


class Embedding(nn.Module):
    """Vocabulary-parallel embedding: each rank looks up its own rows, and the results are summed.

    `blocked` serves a tied head, see `Projection`.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        tp: Parallel,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
        self.blocked: Blocked | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.group is None:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows
        absent = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(absent, 0), self.weight)
        return reduce_from(found.masked_fill(absent.unsqueeze(-1), 0), self.tp.group)


class Attention(nn.Module):
    def __init__(
        self,
        model: ModelConfig,
        tp: Parallel,
        blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.tp, self.head_dim, self.blocks = tp, model.head_dim, blocks
        self.heads = model.num_heads // tp.size
        self.kv_heads = local_kv_heads(model, tp.size)
        q_rows, kv_rows = self.heads * model.head_dim, self.kv_heads * model.head_dim
        self.qkv = Projection(
            q_rows + 2 * kv_rows,
            model.hidden_size,
            bias=model.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if model.qk_norm:
            self.q_norm = Norm(model.head_dim, model.rms_norm_eps, dtype=dtype, device=device)
            self.k_norm = Norm(model.head_dim, model.rms_norm_eps, dtype=dtype, device=device)
        self.out = Projection(model.hidden_size, q_rows, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        layer: int,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:
        to_qkv = added_to(adapters, f"layers.{layer}.attention.qkv")
        to_out = added_to(adapters, f"layers.{layer}.attention.out")
        qkv = self._in_order(self.qkv(copy_to(x, self.tp.group), to_qkv))
        # Splits, not slices: a split's backward is one copy, each slice's is a tensor of zeros.
        qk, v = torch.split(qkv, [self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = torch.split(qk, [self.heads, self.kv_heads], dim=1)
            qk = torch.cat((self.q_norm(q, self.tp), self.k_norm(k, self.tp)), dim=1)
        q, k = torch.split(rotate(qk, *rope), [self.heads, self.kv_heads], dim=1)
        out = attend(layer, q, k, v)
        return reduce_from(self.out(out.reshape(x.shape[0], -1), to_out), self.tp.group)

    def _in_order(self, qkv: Tensor) -> Tensor:  # [T, rows] -> [T, H + 2 KVH, d]
        """Arrange all heads of q, then of k, then of v."""
        if self.blocks == 1:
            return qkv.view(len(qkv), -1, self.head_dim)
        heads, kv_heads = self.heads // self.blocks, self.kv_heads // self.blocks
        parts = qkv.view(len(qkv), self.blocks, -1, self.head_dim)
        q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=2)
        return torch.cat((q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)), dim=1)


class Mlp(nn.Module):
    def __init__(
        self,
        model: ModelConfig,
        tp: Parallel,
        blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.tp, self.blocks = tp, blocks
        width, hidden = model.intermediate_size // tp.size, model.hidden_size
        self.gate_up = Projection(2 * width, hidden, dtype=dtype, device=device)
        self.down = Projection(hidden, width, dtype=dtype, device=device)

    def forward(self, x: Tensor, layer: int, adapters: Sequence[Applied] = ()) -> Tensor:
        to_gate_up = added_to(adapters, f"layers.{layer}.mlp.gate_up")
        to_down = added_to(adapters, f"layers.{layer}.mlp.down")
        gate_up = self.gate_up(copy_to(x, self.tp.group), to_gate_up)
        parts = swiglu(gate_up.view(len(gate_up) * self.blocks, -1))  # a block's gate and up each
        return reduce_from(self.down(parts.view(len(gate_up), -1), to_down), self.tp.group)


class Layer(nn.Module):
    """One decoder layer, the unit of FSDP2's `fully_shard` and of recomputation.

    A mixed-precision policy must have `cast_forward_inputs=False`: `rope` stays float32.
    """

    def __init__(
        self,
        model: ModelConfig,
        index: int,
        tp: Parallel,
        ep: Parallel,
        blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.index = index
        hidden, eps = model.hidden_size, model.rms_norm_eps
        self.input_norm = Norm(hidden, eps, dtype=dtype, device=device)
        self.attention = Attention(model, tp, blocks, dtype=dtype, device=device)
        self.post_norm = Norm(hidden, eps, dtype=dtype, device=device)
        self.mlp: Mlp | Moe
        if model.moe is not None and index in model.moe.layers:
            self.mlp = Moe(model, tp, ep, dtype=dtype, device=device)
        else:
            self.mlp = Mlp(model, tp, blocks, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        routing: Routing | None = None,
        recompute: bool = False,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:
        if not recompute:
            return self.run(x, rope, attend, routing, adapters)
        # Checkpoint inside forward, so that FSDP unshards the layer once for both passes.
        result: Tensor = checkpoint(
            self.run,
            *(x, rope, attend, routing, adapters),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return result

    def run(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        routing: Routing | None,
        adapters: Sequence[Applied],
    ) -> Tensor:
        x = x + self.attention(self.input_norm(x), rope, attend, self.index, adapters)
        normed = self.post_norm(x)
        if isinstance(self.mlp, Moe):
            out: Tensor = self.mlp(normed, self.index, routing, adapters)
        else:
            out = self.mlp(normed, self.index, adapters)
        return x + out


class Decoder(nn.Module):
    """Decoder from token ids to hidden states after the final norm, with the head's weight.

    Args:
        config: the global model.
        tp: this rank's place in the tensor-parallel group; `check_tp` checks the degree.
        ep: this rank's part of the experts, and the group with which tokens are exchanged for the
            other parts (see `Moe`).
        dtype: dtype of all parameters. Norms and rope are always computed in float32.
        device: device of the (uninitialised) parameters; `meta` for none yet.
        head: "lm" adds `head.weight` unless the embeddings are tied; "score" adds one row, which
            every tensor-parallel rank holds.
        blocks: number of blocks of fused projections, see `sharding.all_slices`.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        tp: Parallel | None = None,
        ep: Parallel | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
        head: Head = "lm",
        blocks: int = 1,
    ) -> None:
        super().__init__()
        tp = Parallel() if tp is None else tp
        ep = Parallel() if ep is None else ep
        self.model, self.tp, self.ep, self.blocks = model, tp, ep, blocks
        vocab, hidden = model.vocab_size // tp.size, model.hidden_size
        self.embed_tokens = Embedding(vocab, hidden, tp=tp, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Layer(model, i, tp, ep, blocks, dtype=dtype, device=device)
            for i in range(model.num_layers)
        )
        self.norm = Norm(hidden, model.rms_norm_eps, dtype=dtype, device=device)
        self.head: Projection | None = None
        if head == "score":
            self.head = Projection(1, hidden, dtype=dtype, device=device)
        elif not model.tie_embeddings:
            self.head = Projection(vocab, hidden, dtype=dtype, device=device)
        self.kind = head
        self._frequencies: Tensor | None = None

    @overload
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        finish: None = None,
        *,
        recompute: Recompute = "none",
        routing: Routing | None = None,
        adapters: Sequence[Applied] = (),
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        finish: Callable[[Tensor, Tensor], R],
        *,
        recompute: Recompute = "none",
        routing: Routing | None = None,
        adapters: Sequence[Applied] = (),
    ) -> R: ...

    def forward(
        self,
        tokens: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64, each token's place in its own sequence
        attend: Attend,
        finish: Callable[[Tensor, Tensor], R] | None = None,
        *,
        recompute: Recompute = "none",
        routing: Routing | None = None,
        adapters: Sequence[Applied] = (),
    ) -> Tensor | R:
        """Compute hidden states [T, D] after the final norm, or the result of `finish` on them.

        `finish(hidden [T, D], head_weight [V_local, D])` runs inside forward, where FSDP2 has
        gathered the head's weight. Hidden states are the same on every tensor-parallel rank. Pass
        them through `copy_to(hidden, tp.group)` for a product with the local rows of the head, and
        for nothing else.

        `recompute="layer"` keeps only each layer's input for the backward pass. `routing` holds the
        experts to choose and those that were chosen. `adapters` are added to the weights.
        """
        again = recompute == "layer" and torch.is_grad_enabled()
        rope = self.rope(positions)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rope, attend, routing, again, adapters)
        hidden: Tensor = self.norm(x)
        return hidden if finish is None else finish(hidden, self.head_weight())

    def slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return the slices of the global tensors that every parameter holds."""
        tp, ep = self.tp, self.ep
        return all_slices(
            self.model,
            tp.rank,
            tp.size,
            self.kind,
            ep_rank=ep.rank,
            ep_size=ep.size,
            blocks=self.blocks,
        )

    def head_weight(self) -> Tensor:
        """Return the head's weight: [V_local, D], the embedding's if tied; [1, D] if scalar."""
        return self.head_holder.weight

    @property
    def head_holder(self) -> Embedding | Projection:
        """The module whose weight is the head's."""
        return self.embed_tokens if self.head is None else self.head

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cos and sin for `rotate`, each [T, 1, d] float32, once per forward pass: cheaper
        than one layer's norm, and no table of all positions must be kept or enlarged.
        """
        if self._frequencies is None or self._frequencies.device != positions.device:
            values = inverse_frequencies(self.model.rope, self.model.head_dim)
            # An inference tensor made here could not be used by a later training step.
            with torch.inference_mode(False):
                self._frequencies = torch.tensor(values, device=positions.device)
        return rope_tables(positions, self._frequencies, self.model.rope.attention_factor)
