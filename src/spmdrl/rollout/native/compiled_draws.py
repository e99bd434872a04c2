"""Drawing of tokens on a CPU in few passes over the logits, by kernels compiled from `draws.c`.

Softmax and logarithms are torch's, so that tokens, log-probabilities and margins equal those of
`Sampler` without a compiler to the bit.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.keyed_random import HUGE, NOISE_MULTIPLIER, TINY
from spmdrl.models.kernels import c_code

_I, _F, _P, _N = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int

_GRAIN = 1 << 15
"""Logits of a draw from which on threads share it, as torch's operations do."""


class CompiledDraws:
    """Draws of rows without truncation.

    Args:
        hashes: hash of every token's id, int32 [V].
        code: `draws.c`.
    """

    def __init__(self, hashes: Tensor, code: ctypes.CDLL) -> None:
        self._hashes, self._code = hashes, code
        self._noise = torch.empty(0)
        self._unasked = torch.empty(0)
        code.uniform_noise.argtypes = (_P, _P, _I, _I, _P, _N)
        code.best_scores.argtypes = (_P, _P, _I, _I, _F, _F, _P, _P, _P, _N)
        code.uniform_noise.restype = code.best_scores.restype = None

    def __call__(
        self, logits: Tensor, keys: Tensor, margins: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token from each row.

        Args:
            logits: float32 [n, V].
            keys: int64 [n], side by side.
            margins: whether they are asked for; they are infinite otherwise.

        Returns: tokens int64 [n], log-probabilities and margins float32 [n].
        """
        n, width = logits.shape
        assert keys.is_contiguous() and keys.dtype == torch.int64
        if self._unasked.shape[0] < n:
            self._noise, self._unasked = torch.empty(n, width), torch.full((n,), torch.inf)
        threads = torch.get_num_threads() if n * width >= _GRAIN else 1
        # softmax writes side by side, whatever the logits' strides
        probabilities = torch.softmax(logits, -1).contiguous()
        noise = self._noise[:n]
        place = noise.data_ptr()
        self._code.uniform_noise(self._hashes.data_ptr(), keys.data_ptr(), n, width, place, threads)
        noise.log1p_()
        tokens, chosen = torch.empty(n, dtype=torch.int64), torch.empty(n)
        leads = torch.empty(n, 2) if margins and width > 1 else None
        self._code.best_scores(
            probabilities.data_ptr(),
            place,
            n,
            width,
            TINY,
            HUGE,
            tokens.data_ptr(),
            chosen.data_ptr(),
            None if leads is None else leads.data_ptr(),
            threads,
        )
        if leads is None:
            return tokens, chosen.log_(), self._unasked[:n]
        best, second = leads.log_().unbind(1)
        return tokens, chosen.log_(), best - second


def compiled_draws(hashes: Tensor) -> CompiledDraws | None:
    """Compile the kernels for a vocabulary; None without a compiler, or for another device."""
    if hashes.device.type != "cpu":
        return None
    code = c_code.load(Path(__file__).with_name("draws.c"), MULTIPLIER=NOISE_MULTIPLIER)
    return None if code is None else CompiledDraws(hashes, code)
