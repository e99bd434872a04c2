"""`Dropout`: keyed masks of the inputs of an adapter's matrices.

Whether an element is zeroed is a function of its token's key, of the matrix and of the element's
column: it depends neither on the rank that computes it nor on the tokens around it, and a backward
pass computes the mask again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.keyed_random import bits_at, chain_all, token_hash


@dataclass(frozen=True, kw_only=True, eq=False)
class Dropout:
    """The masks of one pass over a packed stream of tokens.

    Args:
        rate: probability of an element to be zeroed, at least 0 and below 1.
        keys: int64 [T], one for each token.
        columns: see `column_hashes`; as many as the widest input has columns.
    """

    rate: float
    keys: Tensor
    columns: Tensor

    def apply(
        self,
        x: Tensor,  # [T, C]
        matrix: int,
        first_column: int,
    ) -> Tensor:  # [T, C]
        """Zero elements of the input of a matrix, and divide the others by 1 - rate.

        The gradient of x is the same function of the result's gradient.

        Args:
            matrix: number of the matrix among all of the model.
            first_column: place of x's columns among those of the matrix.
        """
        columns = self.columns[first_column : first_column + x.shape[1]]
        bits = bits_at(chain_all(self.keys, matrix), columns)
        least = round(self.rate * 2**32) - 2**31
        return torch.where(bits >= least, x, 0).mul_(1 / (1 - self.rate))


def column_hashes(count: int, device: torch.device) -> Tensor:
    """Compute the hashes of columns 0 to count - 1, int32."""
    return token_hash(torch.arange(count, device=device))
