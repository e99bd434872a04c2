"""Hugging Face directories: streamed sharded loads, random tiny weights.

A rank reads only the slices that it holds, one at a time; a full copy of the weights is never made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig, read_config, tiny
from .decoder import Decoder
from .sharding import SCORE, Head, Slice, global_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HeadInit = Literal["file", "normal", "zero"]
"""Where a scalar head's weights come from."""

class TensorSource(Protocol):
    """Global tensors by Hugging Face name, read slice by slice."""

    @property
    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, part: Slice) -> Tensor:
        """The values of `part`, in the source's dtype, on the CPU; shape `part.size`."""
        ...


class Checkpoint:
    """The safetensors files of a directory; files are mapped only while a slice is read."""

    def __init__(self, path: Path, files: dict[str, Path]) -> None:
        self.path = path
        self._files = files

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        with _open(self._file(name)) as handle:
            return tuple(self._get(handle, name).get_shape())

    def read(self, part: Slice) -> Tensor:
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        with _open(self._file(part.name)) as handle:
            held = self._get(handle, part.name)
            shape = tuple(held.get_shape())
            if shape != part.shape:
                raise ValueError(
                    f"{self._file(part.name)}: tensor {part.name!r} has shape {shape}, "
                    f"config.json asks for {part.shape}"
                )
            values: Tensor = held[box]
            return values

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self._files[name]

    def _get(self, handle: Any, name: str) -> Any:
        try:
            return handle.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]} has no tensor {name!r}") from error


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The weights of a Hugging Face directory (one safetensors file, or several with an index).

    Raises:
        ValueError: neither is there, or a file that the index names is missing or damaged.
    """
    directory = Path(path)
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: directory / file for name, file in weight_map.items()}
        for name, file in files.items():
            if not file.is_file():
                raise ValueError(f"{file} is missing, {index} says that it holds {name!r}")
        for file in sorted(set(files.values())):
            with _open(file):
                pass
        return Checkpoint(directory, files)
    if not single.is_file():
        raise ValueError(
            f"{directory} has neither {SINGLE} nor {INDEX}: give the directory of a Hugging Face "
            "model with safetensors weights (`spmdrl convert` makes one of a GGUF file)"
        )
    with _open(single) as handle:
        return Checkpoint(directory, dict.fromkeys(handle.keys(), single))


class RandomCheckpoint:
    """Random weights for `config`: a function of (seed, tensor name), so alike on every layout."""

    def __init__(self, config: ModelConfig, seed: int, head: Head = "lm") -> None:
        self._shapes = global_shapes(config, head)
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
    """float32 [shape]: ones for a norm's weight, else normal with deviation 0.02."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator) * 0.02


class WithNewScore:
    """A language model's weights with a scalar head of its own, alike on every layout.

    Args:
        body: everything but the head; a head that it has is not used.
        head_init: `normal` draws from N(0, 1 / (D + 1)) (Stiennon et al. 2020,
            https://arxiv.org/abs/2009.01325), as a function of the seed; `zero` is zeros.
    """

    def __init__(
        self,
        body: TensorSource,
        config: ModelConfig,
        head_init: Literal["normal", "zero"],
        seed: int,
    ) -> None:
        self._body = body
        self._score = torch.zeros(1, config.hidden_size)
        if head_init == "normal":
            scale = (config.hidden_size + 1) ** -0.5 / 0.02
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
) -> tuple[ModelConfig, TensorSource]:
    """Configuration and weights of a directory, checked against each other.

    Args:
        head_init: a scalar head comes from the `file`, or is made anew (see `WithNewScore`).
        use_tiny: only config.json is read: a tiny model of that architecture, random weights.

    Raises:
        ValueError: a missing tensor, naming it and the directory.
    """
    config = read_config(path)
    if use_tiny:
        config = tiny(config)
        return config, RandomCheckpoint(config, seed, head)
    checkpoint = open_checkpoint(path)
    if head == "score" and head_init != "file":
        check_weights(config, checkpoint, None)
        return config, WithNewScore(checkpoint, config, head_init, seed)
    check_weights(config, checkpoint, head)
    return config, checkpoint


def check_weights(config: ModelConfig, checkpoint: Checkpoint, head: Head | None = "lm") -> None:
    """ValueError naming directory and tensor unless every tensor of the model is there.

    A tied model's `lm_head.weight` may be in the file; it is not used. Without `head` the body
    alone is checked.
    """
    wanted = global_shapes(config, head or "lm").keys()
    missing = sorted(wanted - checkpoint.names - ({"lm_head.weight"} if head is None else set()))
    if missing == ["lm_head.weight"]:
        found = "it holds a scalar head (score.weight), so it is a reward or value model"
        tied = "if the embeddings are tied, config.json must say tie_word_embeddings: true"
        raise ValueError(
            f"{checkpoint.path} has no tensor 'lm_head.weight': "
            f"{found if SCORE in checkpoint.names else tied}"
        )
    if missing == [SCORE]:
        raise ValueError(
            f"{checkpoint.path} has no tensor {SCORE!r}: a reward or value model has a scalar head "
            "of that name; train one with the flow reward_model, or give the role a new head with "
            "roles.NAME.head=normal (or zero)"
        )
    if head == "score" and not missing and checkpoint.shape(SCORE) != (1, config.hidden_size):
        raise ValueError(
            f"{checkpoint.path}: tensor {SCORE!r} has shape {checkpoint.shape(SCORE)}, a scalar "
            f"head has {(1, config.hidden_size)}: one label (num_labels: 1)"
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{checkpoint.path} has no tensor {missing[0]!r}{more}")


@torch.no_grad()
def fill(params: Iterable[tuple[Tensor, tuple[Slice, ...]]], checkpoint: TensorSource) -> None:
    """Copy each slice to its rows of the local tensor (any device and dtype), one at a time."""
    for tensor, held in params:
        for part in held:
            tensor[part.offset : part.offset + part.rows].copy_(checkpoint.read(part))


def load_into(decoder: Decoder, checkpoint: TensorSource) -> None:
    """Fill a decoder's local parameters (plain tensors on a real device) from a checkpoint."""
    parameters = dict(decoder.named_parameters())
    held = decoder.slices()
    fill(((tensor, held[name]) for name, tensor in parameters.items()), checkpoint)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error
