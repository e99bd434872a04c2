"""Adapters of stacked experts, as PEFT keeps those of `target_parameters`.

`transformers` 5 holds a layer's experts in two parameters, `gate_up_proj` [E, 2 I, D] and
`down_proj` [E, D, I]. PEFT (`lora.ParamWrapper`) adapts each by one A [E r, in], expert by expert,
and one B [out, r E], whose columns have the experts innermost. Gate and up share A. Where both
parameters are adapted, those of `gate_up_proj` are within those of `down_proj` (`base_layer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spmdrl.models.adapters import Adapter, lora_names
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.peft_config import LoraFile
from spmdrl.models.files.weight_files import Checkpoint
from spmdrl.models.tensors import Slice

PARAMETERS = ("gate_up_proj", "down_proj")
"""The stacked parameters of a layer's experts."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The adapter of one stacked parameter.

    Args:
        name: the parameter's name, which patterns of ranks and alphas are compared with.
        module: the name that those of A and B begin with.
        weights: the weights of each expert, below one another in a stacked matrix.
        shape: rows and columns of one expert's stacked matrix.
        rank: rows of one expert's A.
    """

    name: str
    module: str
    weights: tuple[tuple[str, ...], ...]
    shape: tuple[int, int]
    rank: int

    @property
    def names(self) -> frozenset[str]:
        """Our names of the A and B in it."""
        return frozenset(
            own for weights in self.weights for name in weights for own in lora_names(name)
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of A and B, by name."""
        name_a, name_b = lora_names(self.module)
        columns = len(self.weights) * self.rank
        return {name_a: (columns, self.shape[1]), name_b: (self.shape[0], columns)}


def find_stacks(file: LoraFile, model: ModelConfig) -> list[Stack]:
    """Find the stacked parameters that a configuration selects."""
    found = []
    for names in _parameters(model):
        chosen = [name for name in names if file.selects_parameter(name)]
        if chosen and model.moe is not None and model.moe.form != "each":
            raise ValueError(
                f"{file.origin}: target_parameters selects {chosen[0]}, and adapters add to no "
                f"experts that the files of {model.architecture} hold in one tensor: merge it into "
                "its base with PEFT (merge_and_unload), or train without it"
            )
        for name in chosen:
            experts, _, parameter = name.rpartition(".")
            is_inner = parameter == PARAMETERS[0] and len(chosen) > 1
            weights, shape = _weights(model, name)
            found.append(
                Stack(
                    name=name,
                    module=f"{experts}.base_layer" if is_inner else experts,
                    weights=weights,
                    shape=shape,
                    rank=file.rank_of(name),
                )
            )
    return found


def _parameters(model: ModelConfig) -> Iterator[tuple[str, ...]]:
    """Yield the names of the stacked parameters of each layer."""
    for layer in model.moe_layers:
        yield tuple(f"model.layers.{layer}.mlp.experts.{own}" for own in PARAMETERS)


def _weights(model: ModelConfig, name: str) -> tuple[tuple[tuple[str, ...], ...], tuple[int, int]]:
    """Return the weights in a stacked parameter by expert, and the shape of one expert's matrix."""
    assert model.moe is not None
    family, width = model.family, model.moe.width
    is_gate_up = name.endswith(PARAMETERS[0])
    parts = ("gate", "up") if is_gate_up else ("down",)
    modules = [family.module(f"mlp.experts.{part}") for part in parts]
    layer = name.split(".mlp.experts.")[0]
    weights = tuple(
        tuple(f"{layer}.{module.format(expert)}.weight" for module in modules)
        for expert in range(model.moe.num_experts)
    )
    hidden = model.hidden_size
    return weights, (2 * width, hidden) if is_gate_up else (hidden, width)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """One weight's A or B in a stack's.

    Args:
        stored: name of the stack's A or B.
        expert: the expert's number.
        first: the first of its rows in one expert's matrix.
    """

    stack: Stack
    stored: str
    expert: int
    first: int


class WithStacks:
    """The tensors of an adapter by our names, where some are stacked in the file.

    Args:
        file: the tensors as they are in the file; those that are not stacked by our names.
        shapes: shapes of all tensors by our names.
    """

    def __init__(
        self,
        file: Checkpoint,
        stacks: Sequence[Stack],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.file, self._shapes = file, dict(shapes)
        self._places: dict[str, _Place] = {}
        for stack in stacks:
            stored_a, stored_b = stack.shapes
            for expert, names in enumerate(stack.weights):
                first = 0
                for name in names:
                    name_a, name_b = lora_names(name)
                    for own, stored in ((name_a, stored_a), (name_b, stored_b)):
                        self._places[own] = _Place(
                            stack=stack, stored=stored, expert=expert, first=first
                        )
                    first += self._shapes[name_b][0]
        self._kept: tuple[str, Tensor] | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, part: Slice) -> Tensor:
        """Read the values of `part`; see `Checkpoint.read`."""
        if part.name not in self._places:
            return self.file.read(part)
        place = self._places[part.name]
        stored = self._stored(place.stored)
        rows, columns = (slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        if part.name.endswith(".lora_A.weight"):
            first = place.expert * place.stack.rank
            return stored[first : first + place.stack.rank][rows, columns]
        own = stored.view(len(stored), place.stack.rank, -1)[:, :, place.expert]
        return own[place.first : place.first + part.shape[0]][rows, columns]

    def _stored(self, name: str) -> Tensor:
        """Read a stacked tensor; the last one is kept, since its experts are read in turn."""
        if self._kept is None or self._kept[0] != name:
            shape = self.file.shape(name)
            whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
            self._kept = name, self.file.read(whole)
        return self._kept[1]


class SharedExperts:
    """Tensors of an adapter whose experts share A and B, from a file where each has a copy.

    Args:
        each: the file's tensors, by our names.
    """

    def __init__(self, each: WithStacks, adapter: Adapter) -> None:
        self._each, self._copies = each, adapter.copies
        in_files = {name for names in self._copies.values() for name in names}
        self._copies |= {name: [name] for name in each.names - in_files}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._copies)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._each.shape(self._copies[name][0])

    def read(self, part: Slice) -> Tensor:
        """Read the values of `part`, from the first expert's copy."""
        return self._each.read(replace(part, name=self._copies[part.name][0]))

    def find_unlike(self) -> tuple[str, str] | None:
        """Return the first copy that differs from its first expert's, after the name of that."""
        for names in self._copies.values():
            first = None if len(names) == 1 else self._whole(names[0]).clone()
            for name in names[1:]:
                if first is None or not torch.equal(self._whole(name), first):
                    return names[0], name
        return None

    def _whole(self, name: str) -> Tensor:
        shape = self._each.shape(name)
        return self._each.read(
            Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        )
