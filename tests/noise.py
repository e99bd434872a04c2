"""Gumbel noise, from the exponential noise that samplers draw with."""

from __future__ import annotations

from torch import Tensor

from spmdrl.keyed_random import Noise


def gumbel(keys: Tensor, vocab_start: int, vocab_size: int) -> Tensor:  # keys int64 [B]
    """Gumbel(0, 1) noise of token ids `vocab_start ...`: float32 `[B, vocab_size]`.

    A slice of a larger call's result is equal: noise depends only on the key and the token id.
    """
    return Noise(vocab_start, vocab_size, keys.device).exponential(keys).log_().neg_()
