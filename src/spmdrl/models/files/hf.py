"""Hugging Face directories: streamed sharded loads, random tiny weights.

A rank reads only the slices that it holds, one at a time, and never makes a copy of all weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig, read_config, tiny
from spmdrl.models.files.expert_forms import one_by_one
from spmdrl.models.files.hub import local_directory
from spmdrl.models.files.inspection import HEAD, WithTiedHead, inspect, inspect_scalar
from spmdrl.models.files.scalar_head import find_scalar_head
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.models.local_shards import local_box
from spmdrl.models.sharding import SCORE, Head, global_shapes
from spmdrl.models.tensors import Slice

HeadInit = Literal["file", "normal", "zero"]
"""Sources of a scalar head's weights."""


class TensorSource(Protocol):
    """Global tensors by Hugging Face name, read slice by slice."""

    @property
    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, part: Slice) -> Tensor:
        """Read the values of `part`, in the source's dtype, on the CPU, with shape `part.size`."""


class RandomCheckpoint:
    """Random weights for `config`: a function of (seed, tensor name), equal on every layout."""

    def __init__(self, model: ModelConfig, seed: int, head: Head = "lm") -> None:
        self._shapes = global_shapes(model, head)
        self._seed = seed

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, part: Slice) -> Tensor:
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return random_tensor(part.name, part.shape, self._seed)[box]


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Make a float32 tensor: ones for a norm's weight, otherwise normal with deviation 0.02."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator) * 0.02


class WithNewScore:
    """A language model's weights with a new scalar head, equal on every layout.

    Args:
        body: the weights except the head; a head that it has is not used.
        head_init: `normal` draws from N(0, 1 / (D + 1)) (Stiennon et al. 2020,
            https://arxiv.org/abs/2009.01325), as a function of the seed; `zero` is zeros.
    """

    def __init__(
        self,
        body: TensorSource,
        model: ModelConfig,
        head_init: Literal["normal", "zero"],
        seed: int,
    ) -> None:
        self._body = body
        self._score = torch.zeros(1, model.hidden_size)
        if head_init == "normal":
            scale = (model.hidden_size + 1) ** -0.5 / 0.02
            self._score = random_tensor(SCORE, tuple(self._score.shape), seed) * scale

    @property
    def names(self) -> frozenset[str]:
        return self._body.names | {SCORE}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._score.shape) if name == SCORE else self._body.shape(name)

    def read(self, part: Slice) -> Tensor:
        if part.name != SCORE:
            return self._body.read(part)
        return self._score[tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))]


def open_model(
    path: str | Path,
    *,
    head: Head = "lm",
    head_init: HeadInit = "file",
    use_tiny: bool = False,
    seed: int = 0,
    warn: Callable[[str], None] | None = None,
    inform: Callable[[str], None] | None = None,
) -> tuple[ModelConfig, TensorSource]:
    """Open configuration and weights of a directory, and check them against each other.

    Args:
        path: the directory, or a name on the Hugging Face hub (see `local_directory`).
        head_init: take a scalar head from the `file`, or make a new one (see `WithNewScore`).
        use_tiny: read only config.json and make a tiny random model of that architecture.
        warn: callback with each oddity of the directory that is no reason to refuse it.
        inform: callback with what is done with a directory that is as usual.

    Raises:
        ValueError: a tensor is missing, unknown or quantised; the message names it and the file.
    """
    path = local_directory(path)
    config = read_config(path)
    if use_tiny:
        config = tiny(config)
        return config, RandomCheckpoint(config, seed, head)
    checkpoint = one_by_one(open_checkpoint(path), config)
    if head == "score" and head_init == "file":
        found = find_scalar_head(config, checkpoint)
        config, checkpoint, report = found.model, found.checkpoint, inspect_scalar(found)
    else:
        report = inspect(config, checkpoint, "lm" if head == "lm" else None)
    report.refuse(checkpoint.path)
    if warn is not None:
        for note in report.notes:
            warn(note)
    if inform is not None:
        for remark in report.remarks:
            inform(remark)
    if head == "score" and head_init != "file":
        return config, WithNewScore(checkpoint, config, head_init, seed)
    if head == "lm" and config.tie_embeddings and HEAD in checkpoint.names:
        return config, WithTiedHead(checkpoint)
    return config, checkpoint


@torch.no_grad()
def fill(params: Iterable[tuple[Tensor, tuple[Slice, ...]]], checkpoint: TensorSource) -> None:
    """Copy each slice to its rows of the local tensor (any device and dtype), one at a time."""
    for tensor, held in params:
        for part in held:
            local_box(tensor, part).copy_(checkpoint.read(part))
