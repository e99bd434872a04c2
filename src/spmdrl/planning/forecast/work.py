"""`Work`: all that a call does on one rank, counted from shapes: operations, bytes and messages.

It knows no machine; `seconds.seconds_of` says how long a machine takes for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Product = Literal["matmul", "decode", "attention"]
"""Kinds of products, which reach different shares of a device's peak: of matrices with many rows,
of weights with the few rows of a decode step, and attention's.
"""

Link = Literal["node", "network", "host", "copy"]
"""Ways of bytes: between devices of a node, between nodes, between a device and its host, and
within a host's memory.
"""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations, bytes and messages of one rank.

    Args:
        flops: floating point operations by kind of product; an addition and a multiplication are 2.
        memory_bytes: bytes that are read from and written to the device's memory.
        link_bytes: bytes that the rank sends, or receives where that is more, by way.
        messages: messages that wait for one another, by way: steps of rings and trees, not calls.
        launches: kernels, or calls of a CPU library, that start one after another; the nodes of a
            graph do not count.
    """

    flops: Mapping[Product, float] = field(default_factory=dict)
    memory_bytes: float = 0.0
    link_bytes: Mapping[Link, float] = field(default_factory=dict)
    messages: Mapping[Link, float] = field(default_factory=dict)
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            flops=_added(self.flops, other.flops),
            memory_bytes=self.memory_bytes + other.memory_bytes,
            link_bytes=_added(self.link_bytes, other.link_bytes),
            messages=_added(self.messages, other.messages),
            launches=self.launches + other.launches,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            flops=_scaled(self.flops, factor),
            memory_bytes=self.memory_bytes * factor,
            link_bytes=_scaled(self.link_bytes, factor),
            messages=_scaled(self.messages, factor),
            launches=self.launches * factor,
        )

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


NOTHING = Work()

_Key = TypeVar("_Key", bound=str)


def total(works: Iterable[Work]) -> Work:
    """The sum of works that are done one after another."""
    found = NOTHING
    for work in works:
        found += work
    return found


def _added(one: Mapping[_Key, float], other: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}


def _scaled(values: Mapping[_Key, float], factor: float) -> dict[_Key, float]:
    return {key: value * factor for key, value in values.items()}
