"""Published figures of cards, and the ceilings of the machine that predictions rest on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

_A100 = "https://www.nvidia.com/en-us/data-center/a100/ (specifications)"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/ (specifications; half of the sparse rates)"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/ (specifications; half of the sparse rates)"
_B200 = "https://www.nvidia.com/en-us/data-center/hgx/ (HGX B200, an eighth; half of sparse rates)"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/ (specifications; half of the sparse rates)"


@dataclass(frozen=True, kw_only=True)
class Card:
    """Published figures of a card.

    Args:
        words: words of torch's device name, all of which must occur.
        bf16_tflops, fp32_tflops: dense products, in 10^12 operations per second.
        memory_tb_s: memory bandwidth, in 10^12 bytes per second.
        bus_gb_s: the host's bus in one direction, in 10^9 bytes per second: half of the
            bidirectional figure.
    """

    words: tuple[str, ...]
    bf16_tflops: float
    fp32_tflops: float
    memory_tb_s: float
    bus_gb_s: float
    source: str

    def ceilings(self) -> dict[str, float]:
        """Return the figures by the names of `Ceilings`."""
        return {
            "copy_tb_s": self.memory_tb_s,
            "bf16_tflops": self.bf16_tflops,
            "fp32_tflops": self.fp32_tflops,
            "to_host_gb_s": self.bus_gb_s,
            "to_device_gb_s": self.bus_gb_s,
        }


def _card(*words: str, figures: tuple[float, float, float, float], source: str) -> Card:
    bf16, fp32, memory, bus = figures
    return Card(
        words=words,
        bf16_tflops=bf16,
        fp32_tflops=fp32,
        memory_tb_s=memory,
        bus_gb_s=bus,
        source=source,
    )


CARDS = (
    _card("A100", "80GB", "PCIe", figures=(312, 19.5, 1.935, 32), source=_A100),
    _card("A100", "80GB", figures=(312, 19.5, 2.039, 32), source=_A100),
    _card("A100", figures=(312, 19.5, 1.555, 32), source=_A100),
    _card("H100", "PCIe", figures=(756, 51, 2.0, 64), source=_H100),
    _card("H100", "NVL", figures=(835, 60, 3.9, 64), source=_H100),
    _card("H100", figures=(989, 67, 3.35, 64), source=_H100),
    _card("H200", "NVL", figures=(835, 60, 4.8, 64), source=_H200),
    _card("H200", figures=(989, 67, 4.8, 64), source=_H200),
    _card("B200", figures=(2250, 75, 8.0, 64), source=_B200),
    _card("L40S", figures=(362, 91.6, 0.864, 32), source=_L40S),
)
"""The first whose words all occur in a device's name is the device's."""


def card_of(name: str) -> Card | None:
    """Return the card of torch's device name; None if the table lacks it."""
    found = (card for card in CARDS if all(word in name for word in card.words))
    return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Ceilings of a machine; None: neither measured nor published.

    Args:
        copy_tb_s: bytes read and written by a copy on the device, in 10^12 per second.
        bf16_tflops, fp32_tflops: large products, in 10^12 operations per second.
        node_us: a node of a CUDA graph that does next to nothing.
        launch_us: the host's time for an operation outside a graph.
        capture_us: capture and instantiation of a graph, per node.
        to_host_gb_s, to_device_gb_s: large copies of page-locked memory, in 10^9 bytes per second.
        fill_gb_s: the host's first writes into fresh pages, in 10^9 bytes per second.
    """

    copy_tb_s: float | None = None
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    node_us: float | None = None
    launch_us: float | None = None
    capture_us: float | None = None
    to_host_gb_s: float | None = None
    to_device_gb_s: float | None = None
    fill_gb_s: float | None = None

    @classmethod
    def of(cls, measured: Mapping[str, float], card: Card | None) -> Ceilings:
        """Take what was measured, and for the rest what the card's maker publishes."""
        values = {**({} if card is None else card.ceilings()), **measured}
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def read_s(self, num_bytes: float) -> float | None:
        """Seconds to read or write so many bytes of the device's memory."""
        return None if self.copy_tb_s is None else num_bytes / self.copy_tb_s / 1e12

    def product_s(self, operations: float) -> float | None:
        """Seconds of bfloat16 products of so many floating-point operations."""
        return None if self.bf16_tflops is None else operations / self.bf16_tflops / 1e12


def scaled(seconds: float | None, factor: float) -> float | None:
    """Convert seconds to another unit, if they are known."""
    return None if seconds is None else seconds * factor


def total(*seconds: float | None) -> float | None:
    """Add seconds; None if one is unknown."""
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None
