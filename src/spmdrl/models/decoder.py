"""The decoder that assembles the layers of any family (`models/families/`) from `models/blocks/`.

The torch train backend and the native rollout engine share this definition. It works on a packed
stream of T tokens and leaves attention to the caller (`Attend`), who knows which tokens belong
together and where keys and values are kept. Parameters are this rank's tensor-parallel part,
fused: `layers.{i}.attention.qkv.weight` has the rows of q, k, v, and `mlp.gate_up.weight` those of
gate and up; `spmdrl.models.sharding` describes them in Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.blocks.dense_mlp import Mlp
from spmdrl.models.blocks.mixers import make_mixer
from spmdrl.models.blocks.moe import Moe
from spmdrl.models.blocks.projections import Build, Embedding, Norm, Projection
from spmdrl.models.blocks.softmax_attention import Attend, Attention
from spmdrl.models.compiled import CompiledPieces
from spmdrl.models.config import ModelConfig
from spmdrl.models.fused import Sum, later_sum
from spmdrl.models.low_rank import Added, Applied, added_to
from spmdrl.models.rope import Rope, RopeConfig, inverse_frequencies, make_rope
from spmdrl.models.routing import Routing
from spmdrl.models.sharding import Head, all_slices
from spmdrl.models.specs import GatedDelta, LatentAttention, Mixer, MoeMlp
from spmdrl.models.tensors import Slice

R = TypeVar("R")
Recompute = Literal["none", "layer"]


class Layer(nn.Module):
    """One decoder layer, the unit of FSDP2's `fully_shard` and of recomputation.

    A mixed-precision policy must have `cast_forward_inputs=False`: `rope` stays float32.
    """

    def __init__(self, model: ModelConfig, index: int, build: Build) -> None:
        super().__init__()
        self.spec, self.index = model.layers[index], index
        hidden = model.hidden_size

        def norm(*kinds: str) -> Norm | None:
            return build.rms_norm(hidden) if self.spec.norms in kinds else None

        self.input_norm = norm("before", "around")
        self.attention = make_mixer(self.spec.mixer, hidden, build)
        self.attention_out_norm = norm("after", "around")
        self.post_norm = norm("before", "around")
        self.mlp: Mlp | Moe
        if isinstance(self.spec.mlp, MoeMlp):
            self.mlp = Moe(self.spec.mlp, hidden, build)
        else:
            self.mlp = Mlp(self.spec.mlp, hidden, build)
        self.mlp_out_norm = norm("after", "around")
        self.pieces: CompiledPieces | None = None
        """Functions that compute it around attention and experts, where a backend sets them."""

    def forward(
        self,
        x: Tensor | Sum,
        rope: Rope | None,
        attend: Attend,
        routing: Routing | None = None,
        recompute: bool = False,
        adapters: Sequence[Applied] = (),
    ) -> Tensor | Sum:
        """Compute the layer's residual stream [T, D]; a `Sum` waits for the next layer's norm."""
        if not recompute:
            return self.run(x, rope, attend, routing, adapters)
        # Checkpoint inside forward, so that FSDP unshards the layer once for both passes.
        result: Tensor = checkpoint(
            self._whole,
            *(x, rope, attend, routing, adapters),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return result

    def run(
        self,
        x: Tensor | Sum,
        rope: Rope | None,
        attend: Attend,
        routing: Routing | None,
        adapters: Sequence[Applied],
    ) -> Tensor | Sum:
        if self.pieces is not None:
            return self._by_pieces(self.pieces, x, rope, attend, routing, adapters)
        # no name holds what attention gave: inference frees it before the MLP, its peak of memory
        x, normed = _entered(self.input_norm, x)
        x, normed = _entered(
            self.post_norm,
            self._added(
                x,
                _normed(
                    self.attention_out_norm,
                    self.attention(normed, rope, attend, self.index, adapters),
                ),
            ),
        )
        if isinstance(self.mlp, Moe):
            out: Tensor = self.mlp(normed, self.index, routing, adapters)
        else:
            out = self.mlp(normed, self.index, adapters)
        return self._added(x, _normed(self.mlp_out_norm, out))

    def _by_pieces(
        self,
        pieces: CompiledPieces,
        x: Tensor | Sum,
        rope: Rope | None,
        attend: Attend,
        routing: Routing | None,
        adapters: Sequence[Applied],
    ) -> Sum:
        """Compute `run`; what differs between layers stays outside the compiled functions."""
        spec, attention, index = self.spec, self.attention, self.index
        assert isinstance(attention, Attention)

        def added(name: str) -> Added:
            return added_to(adapters, f"layers.{index}.{name}")

        stream, out = (x.x, x.out) if isinstance(x, Sum) else (x, None)
        to_qkv = added("attention.qkv")
        stream, heads = pieces.enter(spec, self.input_norm, attention, stream, out, rope, to_qkv)
        attended = attention.attended(index, heads, attend)
        norms, to_out = (self.attention_out_norm, self.post_norm), added("attention.out")
        between = attention, stream, attended, heads.gate
        if isinstance(self.mlp, Moe):
            stream, normed = pieces.leave(spec, norms, *between, to_out)
            out = _normed(self.mlp_out_norm, self.mlp(normed, index, routing, adapters))
        else:
            to_mlp = added("mlp.gate_up"), added("mlp.down")
            every = (*norms, self.mlp_out_norm)
            stream, out = pieces.finish(spec, every, *between, self.mlp, (to_out, *to_mlp))
        return Sum(x=stream, out=out, scale=spec.residual_scale)

    def _whole(self, *given: Any) -> Tensor:
        """Compute `run`'s sum: where layers keep their inputs, two would be kept for one."""
        found = self.run(*given)
        return found.total() if isinstance(found, Sum) else found

    def _added(self, x: Tensor, out: Tensor) -> Tensor | Sum:
        return later_sum(x, out, self.spec.residual_scale)


def _entered(norm: Norm | None, x: Tensor | Sum) -> tuple[Tensor, Tensor]:
    """Return the residual stream and its norm; itself, where there is none."""
    if isinstance(x, Sum):
        if norm is not None:
            return norm.of_sum(x)
        x = x.total()
    return x, _normed(norm, x)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    out: Tensor = norm(x)
    return out


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
        build = Build(norm=model.norm, tp=tp, ep=ep, blocks=blocks, dtype=dtype, device=device)
        vocab, hidden = model.vocab_size // tp.size, model.hidden_size
        self.embed_tokens = Embedding(vocab, hidden, build)
        self.layers = nn.ModuleList(Layer(model, i, build) for i in range(model.num_layers))
        self.norm = build.rms_norm(hidden)
        self.head: Projection | None = None
        if head == "score":
            self.head = build.projection(1, hidden, bias=model.score_bias)
        elif not model.tie_embeddings:
            self.head = build.projection(vocab, hidden)
        self.kind = head
        self._ropes = Ropes(model)

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
        ropes = self._ropes.at(positions)
        x = self.embed_tokens(tokens)
        if self.model.embedding_scale != 1.0:
            # rounded as transformers rounds it
            x = x * torch.tensor(self.model.embedding_scale, dtype=x.dtype).item()
        for layer, rope in zip(self.layers, ropes, strict=True):
            x = layer(x, rope, attend, routing, again, adapters)
        hidden = _entered(self.norm, x)[1]
        if self.model.logit_scale != 1.0 and self.kind == "lm":
            hidden = hidden * self.model.logit_scale
        return hidden if finish is None else finish(hidden, self.head_weight())

    def compile_layers(self) -> None:
        """Let torch's compiler make what layers compute before and after attention, when they first
        do.
        """
        pieces = CompiledPieces()
        for layer in self.layers:
            assert isinstance(layer, Layer), layer
            layer.pieces = pieces

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


class Ropes:
    """Tables of a model's rotary embeddings, one for each kind that its layers have.

    They are computed once per forward pass: cheaper than one layer's norm, and no table of all
    positions must be kept or enlarged.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._kinds = [_rope_of(spec.mixer) for spec in model.layers]
        self._frequencies: dict[tuple[RopeConfig, int], Tensor] = {}

    def at(self, positions: Tensor) -> list[Rope | None]:
        """Return each layer's rope at these positions [T]; None for one without."""
        made = {kind: self._make(*kind, positions) for kind in set(self._kinds) if kind is not None}
        return [None if kind is None else made[kind] for kind in self._kinds]

    def _make(self, rope: RopeConfig, dims: int, positions: Tensor) -> Rope:
        held = self._frequencies.get((rope, dims))
        if held is None or held.device != positions.device:
            values = inverse_frequencies(rope, dims)
            # An inference tensor made here could not be used by a later training step.
            with torch.inference_mode(False):
                held = torch.tensor(values, device=positions.device)
            self._frequencies[rope, dims] = held
        return make_rope(positions, held, rope)


def _rope_of(mixer: Mixer) -> tuple[RopeConfig, int] | None:
    """Return a mixer's rope and the dims of a head that it may turn."""
    if isinstance(mixer, GatedDelta) or mixer.rope is None:
        return None
    return mixer.rope, mixer.rope_dim if isinstance(mixer, LatentAttention) else mixer.head_dim
