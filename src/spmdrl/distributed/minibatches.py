"""Membership of rows in minibatches: fixed for the world before rows are assigned to ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from spmdrl.distributed.exchange import RowTable
from spmdrl.keyed_random import key64


def into_minibatches(
    num_minibatches: int, *, seed: int, step: int
) -> Callable[[RowTable, int], RowTable]:
    """An `arrange` that cuts the atoms, in keyed random order, into equal minibatches.

    Membership depends only on (seed, step, atom id). Sizes differ by at most one atom; with fewer
    atoms than minibatches, there are as many minibatches as atoms.
    """

    def arrange(table: RowTable, num_replicas: int) -> RowTable:
        atoms = sorted(set(table.atom.tolist()), key=lambda atom: key64(seed, step, atom))
        count = min(num_minibatches, len(atoms))
        of_atom = {a: i * count // len(atoms) for i, a in enumerate(atoms)}
        minibatch = torch.tensor([of_atom[a] for a in table.atom.tolist()], dtype=torch.int64)
        return replace(table, minibatch=minibatch)

    return arrange


def split_groups_if_few(table: RowTable, num_replicas: int) -> RowTable:
    """An `arrange` that keeps groups whole unless there are fewer groups than replicas."""
    if len(set(table.atom.tolist())) >= num_replicas:
        return table
    return replace(table, atom=torch.arange(len(table.atom)))
