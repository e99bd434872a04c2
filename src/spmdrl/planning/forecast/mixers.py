"""`MixerShape`: what the mixer of a layer computes with on one rank, counted in elements."""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.models.specs import GatedDelta, LatentAttention, Mixer, SoftmaxAttention
from spmdrl.models.tensors import heads_per_rank

_CHUNK = 64
"""Tokens of a chunk of the gated delta rule, whose tokens are multiplied with one another."""


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Args:
    matrices: elements that every token is multiplied by.
    inputs: those of them that the layer's input is multiplied by.
    operands: values of queries, keys and values, per token.
    scored: multiplications of a forward pass for a token and one that it sees.
    absorbed: the same in an engine that keeps latent vectors; 0: it keeps keys and values.
    gathered: values of a token's keys and values in a trainer.
    cached: values that an engine reads of each token that is seen.
    window: most tokens that are seen; None: all before it.
    stepped: multiplications of a forward pass for a token and its sequence's state.
    chunked: multiplications of a token in addition to these, where states are passed by chunk.
    state: values of a sequence's state, which a decode step reads and writes.
    """

    matrices: float
    inputs: float
    operands: float
    scored: float = 0.0
    absorbed: float = 0.0
    gathered: float = 0.0
    cached: float = 0.0
    window: int | None = None
    stepped: float = 0.0
    chunked: float = 0.0
    state: float = 0.0

    @property
    def engine_scored(self) -> float:
        """`scored` in an engine."""
        return self.absorbed or self.scored

    def seen(self, tokens: float, pairs: float) -> float:
        """Count the pairs of a token and one that it sees, itself included.

        Args:
            tokens, pairs: tokens of rows, and their pairs without a window; rows are taken to be
                equally long, which makes the pairs of each tokens * (tokens + 1) / 2.
        """
        if self.window is None or not tokens:
            return pairs
        length = 2 * pairs / tokens - 1
        if length <= self.window:
            return pairs
        return tokens * (self.window - self.window * (self.window - 1) / (2 * length))


def mixer_shape(mixer: Mixer, hidden: int, tp: int) -> MixerShape:
    """Count the elements of a layer's mixer on each of `tp` ranks."""
    if isinstance(mixer, SoftmaxAttention):
        return _softmax(mixer, hidden, tp)
    if isinstance(mixer, GatedDelta):
        return _delta(mixer, hidden, tp)
    return _latent(mixer, hidden, tp)


def _softmax(mixer: SoftmaxAttention, hidden: int, tp: int) -> MixerShape:
    d, heads = mixer.head_dim, mixer.num_heads // tp
    kv_heads = heads_per_rank(mixer.num_kv_heads, tp)
    inputs = hidden * d * (heads * (2 if mixer.gate else 1) + 2 * kv_heads)
    return MixerShape(
        matrices=inputs + hidden * d * heads,
        inputs=inputs,
        operands=d * (heads + 2 * kv_heads),
        scored=2 * d * heads,
        gathered=2 * d * kv_heads,
        cached=2 * d * kv_heads,
        window=mixer.options.window,
    )


def _latent(mixer: LatentAttention, hidden: int, tp: int) -> MixerShape:
    """Count every head's keys and values in a trainer, and latent vectors in an engine
    (https://arxiv.org/abs/2405.04434, section 2.1.2). Every rank computes the latent vectors.
    """
    heads, d, kept = mixer.num_heads // tp, mixer.head_dim, mixer.kv_rank + mixer.rope_dim
    inputs = hidden * (kept + (heads * d if mixer.q_rank is None else mixer.q_rank))
    expanded = heads * mixer.kv_rank * (mixer.nope_dim + mixer.v_dim)
    queries = 0 if mixer.q_rank is None else heads * d * mixer.q_rank
    keys_values = heads * (d + mixer.v_dim)
    return MixerShape(
        matrices=inputs + queries + expanded + hidden * heads * mixer.v_dim,
        inputs=inputs,
        operands=heads * d + keys_values,
        scored=keys_values,
        absorbed=heads * (kept + mixer.kv_rank),
        gathered=keys_values,
        cached=kept,
        window=mixer.options.window,
    )


def _delta(mixer: GatedDelta, hidden: int, tp: int) -> MixerShape:
    """Count those of https://arxiv.org/abs/2412.06464, section 3: a token's key meets the state
    twice and its query once; in a chunk also all keys, queries and values of the chunk.
    """
    keys, values = (mixer.num_heads * mixer.head_dim / tp, mixer.num_v_heads * mixer.v_dim / tp)
    channels = 2 * keys + values
    inputs = hidden * (channels + values + 2 * mixer.num_v_heads / tp)
    state = values * mixer.head_dim
    return MixerShape(
        matrices=inputs + hidden * values + channels * mixer.conv_size,
        inputs=inputs,
        operands=channels + values,
        stepped=3 * state,
        chunked=_CHUNK * mixer.num_v_heads / tp * (3 * mixer.head_dim + 2 * mixer.v_dim),
        state=state + channels * (mixer.conv_size - 1),
    )
