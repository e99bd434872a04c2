"""Random numbers as pure functions of a key: the same on any rank, batch or device.

A key is a chain of integers (run seed, step, prompt id, sample, token position) hashed to 64 bits.
Noise over the vocabulary is a hash of the key and the token id, so a sampled token depends neither
on the rank that serves the request nor on the rest of the batch (invariant 7 of the design).

The 64-bit mixer is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"). The 32-bit mixer of the noise is ours: two multiplications and one shift over a unique
token hash that is computed once; tests/test_keyed_random.py checks the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NOISE_VERSION = 2
"""Version of the numbers drawn here and of the breaking of ties (`rollout.native.sampler`): runs
of different versions draw different tokens from equal keys."""

_MASK = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

# The noise's constants, which its kernel for GPUs (`models.kernels.cuda.sampling`) has too.
ID_OFFSET = _GOLDEN >> 32
MURMUR_1 = 0x85EBCA6B
MURMUR_2 = 0xC2B2AE35
NOISE_MULTIPLIER = 0x2C1B3C6D  # odd, from Wang's and Wellons' searches for 32-bit mixers
TINY = 2.0**-32
HUGE = 24.0


def key64(*parts: int) -> int:
    """The key of a chain of integers (any sign): a 64-bit hash as a signed int."""
    return chain(0, *parts)


def chain(key: int, *parts: int) -> int:
    """`key64(*a, *b) == chain(key64(*a), *b)`: a key extended by more integers."""
    state = key & _MASK
    for part in parts:
        state = _splitmix(state ^ _splitmix(part & _MASK))
    return _signed(state)


def _splitmix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def chain_all(keys: Tensor, part: Tensor | int) -> Tensor:  # keys int64 [...], part int64 [...]
    """`chain` of every key by one more integer, int64 [...]."""
    if isinstance(part, Tensor):
        return _splitmix_all(keys ^ _splitmix_all(part))
    return _splitmix_all(keys ^ _signed(_splitmix(part & _MASK)))


def _splitmix_all(x: Tensor) -> Tensor:
    """`_splitmix` of int64 numbers, whose sums and products wrap."""
    x = x + _signed(_GOLDEN)
    for shift, multiplier in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shifted(x, shift)) * _signed(multiplier)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> bits) & (_MASK >> bits)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


class Noise:
    """Exponential noise over a slice of the vocabulary, in buffers that are reused.

    Args:
        vocab_start: the first token id of the slice.
        vocab_size: number of token ids in it.
    """

    def __init__(self, vocab_start: int, vocab_size: int, device: torch.device) -> None:
        self.index_hash = token_hash(
            torch.arange(vocab_start, vocab_start + vocab_size, device=device)
        )
        self._buffers = (
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=torch.float32, device=device),
        )

    def exponential(self, keys: Tensor) -> Tensor:  # keys int64 [B]
        """Exponential(1) noise, float32 `[B, V]`; overwritten by the next call."""
        rows, vocabulary = keys.shape[0], self.index_hash.shape[0]
        if self._buffers[0].shape[0] < rows:
            self._buffers = tuple(  # type: ignore[assignment]
                b.new_empty(rows, vocabulary) for b in self._buffers
            )
        a, b, out = (buffer[:rows] for buffer in self._buffers)
        low, high = _halves(keys)
        torch.bitwise_xor(self.index_hash, low, out=a)
        return _finish(a, b, high, out)


def token_hash(tokens: Tensor) -> Tensor:  # tokens int64 [...], 0 to 2^32 - 1
    """A 32-bit hash of token ids, int32 `[...]`; no two ids have the same hash.

    Two ids with one hash would have the same noise under every key, and the less likely of them
    would never be drawn. So this is a bijection: murmur3's finaliser (Appleby 2011, public domain,
    MurmurHash3.cpp, `fmix32`) of the id plus a constant, without which id 0 would be 0.
    """
    x = (tokens + ID_OFFSET) & _MASK_32
    x = ((x ^ (x >> 16)) * MURMUR_1) & _MASK_32
    x = ((x ^ (x >> 13)) * MURMUR_2) & _MASK_32
    x = x ^ (x >> 16)
    return torch.where(x >> 31 == 1, x - (1 << 32), x).to(torch.int32)


def exponential_at(
    keys: Tensor,  # int64 [B]
    hashes: Tensor,  # int32 [B, K], from `token_hash`
) -> Tensor:
    """`Noise.exponential` at chosen token ids: float32 `[B, K]`."""
    low, high = _halves(keys)
    mixed = hashes ^ low
    return _finish(mixed, torch.empty_like(mixed), high, torch.empty_like(mixed).float())


def bits_at(
    keys: Tensor,  # int64 [B]
    hashes: Tensor,  # int32 [K], from `token_hash`
) -> Tensor:
    """Hash each key with each number: 32 random bits, int32 `[B, K]`."""
    low, high = _halves(keys)
    mixed = hashes ^ low
    return _mix(mixed, torch.empty_like(mixed), high)


def key_tensor(keys: Iterable[int], device: torch.device) -> Tensor:
    """Keys as int64 `[B]`."""
    return torch.tensor(list(keys), dtype=torch.int64, device=device)


def _halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The low 32 bits, and the high 32 bits made odd: each int32 `[B, 1]`."""
    halves = keys.contiguous().view(torch.int32).view(-1, 2)  # little-endian on every target
    return halves[:, :1].contiguous(), halves[:, 1:] | 1


def _mix(x: Tensor, scratch: Tensor, multiplier: Tensor) -> Tensor:
    """Mix int32 bits in place; products wrap.

    The shift is arithmetic, which adding (unlike xor) tolerates, so no mask is needed.
    """
    x.mul_(multiplier)
    torch.bitwise_right_shift(x, 15, out=scratch)
    return x.add_(scratch).mul_(NOISE_MULTIPLIER)


def _finish(x: Tensor, scratch: Tensor, multiplier: Tensor, out: Tensor) -> Tensor:
    """int32 bits -> Exponential(1) in `out`.

    u has 31 bits and its sign is dropped, so -log1p(-u) resolves the small values (which win) to
    2^-31.
    """
    out.copy_(_mix(x, scratch, multiplier))
    out.abs_().mul_(-(2.0**-31))
    return out.log1p_().neg_().clamp_(TINY, HUGE)
