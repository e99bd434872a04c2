"""The weights that a role starts with: its model's and, if it has one, its adapter's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.config.roles import AdapterSection, RoleSection
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import read_config
from spmdrl.models.files.adapter_sources import FreshAdapter, WithAdapter
from spmdrl.models.files.hf import HeadInit, TensorSource, fill
from spmdrl.models.files.peft import open_adapter, read_adapter
from spmdrl.models.local_shards import LocalTensors, Table
from spmdrl.models.model_classes import read_place
from spmdrl.models.sharding import SCORE, Head
from spmdrl.models.tensors import Slice
from spmdrl.planning.judge_bases import base_names
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.protocol import RolloutEngine


def head_source(name: str, section: RoleSection, path: Path, head: Head) -> HeadInit:
    """Tell where the scalar head of a role's model comes from: as `roles.NAME.head` says, but that
    an adapter's files may hold it, which then takes the place of zeros.

    Args:
        name: name of the role.
        path: directory of the model.
        head: head of the model.

    Raises:
        ValueError: the adapter's files are missing, or do not fit the model.
    """
    if section.adapter is None or section.adapter.path is None or head != "score":
        return section.head
    if section.head != "file":
        return section.head
    model = read_config(path)
    try:
        adapter = open_adapter(section.adapter.path, model, head=head)
    except ValueError as error:
        raise ValueError(f"roles.{name}.adapter.path: {error}") from None
    return "zero" if SCORE in adapter.names else "file"


def adapter_notes(specs: Iterable[RoleSpec]) -> list[str]:
    """Return one line for each adapter whose files name another base than its role has.

    Raises:
        ValueError: the files are missing, or do not fit the model.
    """
    notes: dict[str, None] = {}
    for spec in specs:
        section, base = spec.section.adapter, spec.path
        if section is None or section.path is None:
            continue
        try:
            open_adapter(
                section.path,
                spec.model,
                head=spec.head,
                experts=section.experts,
                base=base,
                warn=lambda note: notes.update({note: None}),
            )
        except ValueError as error:
            raise ValueError(f"roles.{spec.name}.adapter.path: {error}") from None
    return list(notes)


def readout_lines(specs: Iterable[RoleSpec]) -> list[str]:
    """Return one line for each reward model: at which token its score is read, and why."""
    lines = []
    for spec in specs:
        if spec.kind != "reward":
            continue
        model, given = spec.model, spec.section.readout
        place = read_place(model.source, model.pad_id)
        if given != "auto":
            at = "the last token" if spec.skipped is None else f"the last not {spec.skipped}"
            place = f"{at} (roles.{spec.name}.readout={given})"
        elif spec.skipped in model.eos_ids:
            place += (
                f", and {spec.skipped} ends texts too: the token before the end is read; "
                f"roles.{spec.name}.readout=last reads the end"
            )
        lines.append(f"roles.{spec.name}: a row's score is read at {place}")
    return lines


def role_weights(spec: RoleSpec, weights: TensorSource, seed: int) -> TensorSource:
    """Add the values of a role's adapter to those of its model.

    Args:
        weights: the model's weights.
        seed: the run's seed, of which a new adapter's values are a function.
    """
    section = spec.section.adapter
    if section is None:
        return weights
    assert spec.adapter is not None, spec.name
    if section.path is not None:
        return WithAdapter(weights, _of_file(spec, section, section.path))
    return WithAdapter(weights, FreshAdapter(spec.model, spec.adapter, seed, section.init))


def _of_file(spec: RoleSpec, section: AdapterSection, path: str) -> TensorSource:
    return open_adapter(path, spec.model, head=spec.head, experts=section.experts)


class Merged:
    """The weights of a model with an adapter merged into them, in float32 where it adds.

    Args:
        both: the values of the model and of the adapter.
    """

    def __init__(self, both: TensorSource, adapter: Adapter) -> None:
        self._both, self._adapter = both, adapter

    @property
    def names(self) -> frozenset[str]:
        added = {name for target in self._adapter.targets for name in self._adapter.factors(target)}
        return self._both.names - added

    def shape(self, name: str) -> tuple[int, ...]:
        return self._both.shape(name)

    def read(self, part: Slice) -> Tensor:
        values = self._both.read(part)
        own = self._adapter.targets.get(part.name)
        if own is None:
            return values
        name_a, name_b = self._adapter.factors(part.name)
        (first, left), (last, right) = part.start, part.stop
        a = self._box(name_a, (0, left), (own.rank, right))
        b = self._box(name_b, (first, 0), (last, own.rank))
        return torch.addmm(values.float(), b, a, alpha=own.scale)

    def _box(self, name: str, start: tuple[int, int], stop: tuple[int, int]) -> Tensor:
        shape = self._both.shape(name)
        part = Slice(name=name, shape=shape, start=start, stop=stop, offset=0)
        return self._both.read(part).float()


def fill_engine(
    spec: RoleSpec,
    engine: RolloutEngine,
    table: Table,
    weights: TensorSource,
    base: LocalTensors,
    seed: int,
) -> None:
    """Fill an engine with the weights of its model's files, but for those of a base that a judge
    shares, which it computes with in place.

    Args:
        table: the tensors that the engine needs.
        weights: the model's weights.
        base: the tensors of the role whose base it shares, if it does.
        seed: see `engine_weights`.
    """
    shared = base_names(spec, table)
    for name in shared:
        engine.adopt(name, base[name][0])
    own = ((engine.allocate(n), held.slices) for n, held in table.items() if n not in shared)
    fill(own, engine_weights(spec, weights, seed))


def engine_weights(spec: RoleSpec, weights: TensorSource, seed: int) -> TensorSource:
    """Return what a judge, or a rollout without a policy, reads: its model's weights with its
    adapter's, which are merged into them unless its engine applies it unmerged.
    """
    section = spec.section.adapter
    if section is None or spec.adapter is not None:
        return role_weights(spec, weights, seed)
    if section.path is None:  # a new adapter adds nothing
        return weights
    both = WithAdapter(weights, _of_file(spec, section, section.path))
    return Merged(both, read_adapter(section.path, spec.model, experts=section.experts))
