"""Sources of an adapter's values: drawn anew, and together with those of its base."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from spmdrl.models.adapters import Adapter, adapter_shapes
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.tensors import Slice

AdapterInit = Literal["kaiming", "gaussian"]
"""Distributions that A is drawn from."""


class FreshAdapter:
    """A new adapter's values: A random, B zero, so that it adds nothing yet.

    They are a function of (seed, tensor name), equal on every layout.

    Args:
        init: `kaiming` draws A uniformly within 1 / sqrt(inputs), `gaussian` from a normal
            distribution of deviation 1 / rank; both as PEFT does.
    """

    def __init__(
        self, model: ModelConfig, adapter: Adapter, seed: int, init: AdapterInit = "kaiming"
    ) -> None:
        self._shapes = adapter_shapes(model, adapter)
        self._seed, self._init = seed, init

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, part: Slice) -> Tensor:
        """Make the values of `part` in float32."""
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        if part.name.endswith(".lora_B.weight"):
            return torch.zeros(part.size)
        digest = hashlib.sha256(f"{self._seed}/{part.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rank, inputs = part.shape
        if self._init == "gaussian":
            values = torch.randn(part.shape, generator=generator) / rank
        else:
            values = (torch.rand(part.shape, generator=generator) * 2 - 1) / inputs**0.5
        return values[box]


class WithAdapter:
    """The values of a base and of an adapter as one source; the adapter's count where both have one
    (a scalar head).
    """

    def __init__(self, base: TensorSource, adapter: TensorSource) -> None:
        self._base, self._adapter = base, adapter

    @property
    def names(self) -> frozenset[str]:
        return self._base.names | self._adapter.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def read(self, part: Slice) -> Tensor:
        return self._of(part.name).read(part)

    def _of(self, name: str) -> TensorSource:
        return self._adapter if name in self._adapter.names else self._base
