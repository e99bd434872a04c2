"""`AdapterDropout`: the dropout of an adapter's inputs in the passes of an update.

The key of a token's mask is a chain of the run's seed, the role, the number of optimizer steps that
the role has made, the prompt's id, the sample and the token's position. They are known wherever a
token is computed: by data, tensor and context parallelism, in any packing, and after a resume.
The rows say which prompt and sample they are of (`prompt_ids`, `sample_index`). The sample of a
prompt's tokens is -1, since one computation of a prompt may serve several rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.keyed_random import chain, chain_all, key64
from spmdrl.memory.host_copies import to_device
from spmdrl.models.adapters import Adapter, adapter_shapes
from spmdrl.models.config import ModelConfig
from spmdrl.models.dropout import Dropout, column_hashes
from spmdrl.training.context import LocalStream
from spmdrl.training.options import TrainOptions

COLUMNS = ("prompt_ids", "sample_index")


class AdapterDropout:
    """Makes the dropout of each pass.

    Args:
        role: name of the role that trains.
        seed: the run's seed.
    """

    def __init__(
        self, role: str, model: ModelConfig, adapter: Adapter, seed: int, device: torch.device
    ) -> None:
        self._role, self._rate = role, adapter.dropout
        self._key = key64(seed, *role.encode())
        widest = max(shape[1] for shape in adapter_shapes(model, adapter).values())
        self._columns = column_hashes(widest, device)

    def keys(self, rows: Batch, step: int) -> Tensor:
        """Compute the keys of the rows' tokens, int64 [T].

        Args:
            step: number of optimizer steps before this update.

        Raises:
            ValueError: the rows lack a column.
        """
        for name in COLUMNS:
            if name not in rows.rows:
                raise ValueError(
                    f"roles.{self._role}.adapter.dropout={self._rate} needs the row column "
                    f"{name!r}, and the rows have {sorted(rows.rows)}: add it, or set it to 0"
                )
        return token_keys(rows, chain(self._key, step))

    def make(self, keys: Tensor, stream: LocalStream) -> Dropout:
        """Make the dropout of a pass over a stream of the rows that have these keys."""
        # tokens of no row (padding, an empty microbatch) have the key 0
        padded = torch.cat((keys, keys.new_zeros(1)))
        [own] = to_device([padded[stream.origin]], self._columns.device)
        return Dropout(rate=self._rate, keys=own, columns=self._columns)


def make_dropout(
    role: str,
    model: ModelConfig,
    adapter: Adapter | None,
    options: TrainOptions,
    device: torch.device,
) -> AdapterDropout | None:
    """Make the dropout of a role's adapter, if it has any.

    Args:
        adapter: the adapter that the role trains, or None.
    """
    if adapter is None or adapter.dropout == 0:
        return None
    return AdapterDropout(role, model, adapter, options.seed, device)


def token_keys(rows: Batch, key: int) -> Tensor:
    """Compute the key of every token of the rows, int64 [T]."""
    row = rows.row_of_token()
    position = torch.arange(rows.num_tokens) - rows.offsets()[:-1][row]
    sample = rows["sample_index"][row].masked_fill(position < rows["prompt_lengths"][row], -1)
    keys = chain_all(torch.full_like(position, key), rows["prompt_ids"][row])
    return chain_all(chain_all(keys, sample), position)
