"""Membership of rows in minibatches: fixed for the world before rows are assigned to ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from spmdrl.distributed.exchange_plan import RowTable
from spmdrl.keyed_random import chain_all, key64


def into_minibatches(
    num_minibatches: int, *, seed: int, step: int
) -> Callable[[RowTable, int], RowTable]:
    """An `arrange` that cuts the atoms, in keyed random order, into equal minibatches.

    Membership depends only on (seed, step, atom id). Sizes differ by at most one atom; with fewer
    atoms than minibatches, there are as many minibatches as atoms.
    """

    def arrange(table: RowTable, num_replicas: int) -> RowTable:
        atoms, of_row = torch.unique(table.atom, return_inverse=True)
        keys = chain_all(torch.tensor(key64(seed, step)), atoms)
        count = min(num_minibatches, len(atoms))
        of_atom = torch.empty_like(atoms)
        of_atom[torch.argsort(keys)] = torch.arange(len(atoms)) * count // max(len(atoms), 1)
        return replace(table, minibatch=of_atom[of_row])

    return arrange


def split_groups_if_few(table: RowTable, num_replicas: int) -> RowTable:
    """An `arrange` that keeps groups whole unless there are fewer groups than replicas."""
    if len(torch.unique(table.atom)) >= num_replicas:
        return table
    return replace(table, atom=torch.arange(len(table.atom)))
