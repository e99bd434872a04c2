"""`Machine`: the devices, links and hosts that a plan is for, and the rates that they reach.

A GPU's numbers are its maker's, in `gpus.yaml` with their sources. Software reaches a share of
them: `Shares` has one for each kind of work. A file of one's own, or one that `spmdrl plan
--calibrate` made of a run, gives both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spmdrl.placement import DeviceType
from spmdrl.planning.forecast.work import Link, Product


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or one rank's share of a CPU.

    Args:
        flops: dense products per second by dtype, `bfloat16` and `float32`, without sparsity.
        memory_bytes: its memory.
        memory_rate: bytes per second from and to its memory.
        node_rate: bytes per second that it sends to the other devices of its node.
        host_rate: bytes per second between it and its host, in one direction.
        watts: its power under load.
    """

    name: str
    kind: DeviceType
    flops: Mapping[str, float]
    memory_bytes: int
    memory_rate: float
    node_rate: float
    host_rate: float
    watts: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of peaks that software reaches, and seconds of what has no peak.

    Args:
        flops: share of a device's products per second by kind of product.
        memory: share of a device's memory rate.
        links: share of the rate by way.
        message_s: seconds of a message by way, without its bytes.
        launch_s: seconds of the host for starting a kernel or a library call.
    """

    flops: Mapping[Product, float]
    memory: float
    links: Mapping[Link, float]
    message_s: Mapping[Link, float]
    launch_s: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Equal nodes of equal devices.

    Args:
        devices_per_node: ranks of a node, one for each device.
        network_rate: bytes per second that a device sends to other nodes (its share of the node's
            network cards).
        copy_rate: bytes per second of a copy within the host's memory.
        host_bytes: memory of a node's host.
        host_watts: power of a node without its devices.
        shares: what software reaches of these.
        phase_s: further seconds by phase of a step that no count of work explains, measured.
        overlap: share of a call's messages that its computation hides, between 0 and 1.
        phase_shares: share by phase of the forecast rate that calls reach, 1 where it is absent.
        process_bytes: host memory of a rank's process without its roles' parts: interpreter,
            libraries, data.
    """

    device: Device
    num_nodes: int
    devices_per_node: int
    network_rate: float
    copy_rate: float
    host_bytes: int
    host_watts: float
    shares: Shares
    phase_s: Mapping[str, float] = field(default_factory=dict)
    overlap: float = 0.5
    phase_shares: Mapping[str, float] = field(default_factory=dict)
    process_bytes: int = 0

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.devices_per_node

    def link_rate(self, link: Link) -> float:
        """Bytes per second that one rank reaches on a way."""
        peak = {
            "node": self.device.node_rate,
            "network": self.network_rate,
            "host": self.device.host_rate,
            "copy": self.copy_rate,
        }[link]
        return peak * self.shares.links[link]
