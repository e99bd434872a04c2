"""Machines by name or from a file.

`gpus.yaml` has the GPUs that are known by name, each number with its source. A file of one's own
has the keys of one of them, and what a run measured: `shares`, `phase_s`, `phase_shares`,
`overlap`, `process_gb`, and on a CPU the number of `ranks` that shared the host. With `base: NAME`
it has only those keys that differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spmdrl.atomic_files import replace_file
from spmdrl.placement import DeviceType
from spmdrl.planning.forecast.machine import Device, Machine, Shares
from spmdrl.planning.forecast.work import Link, Product

TABLE = Path(__file__).with_name("gpus.yaml")

ALIASES: Mapping[str, str] = {
    "a100": "a100-80",
    "a800-80": "a800",
    "h100-80": "h100",
    "h100-sxm": "h100",
    "h800-80": "h800",
    "h200-141": "h200",
    "h20-96": "h20",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
}
"""Other names of GPUs in the table."""

GIGA = 10**9

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Shares(_Section):
    flops: dict[Product, Share]
    memory: Share
    links: dict[Link, Share]
    message_s: dict[Link, Seconds]
    launch_s: Seconds


class _Entry(_Section):
    """One GPU of the table, or a file of one's own."""

    name: str
    kind: DeviceType = "cuda"
    bfloat16_tflops: Positive
    float32_tflops: Positive
    memory_gb: Positive
    memory_gb_s: Positive
    node_gb_s: Positive
    host_gb_s: Positive
    watts: Positive
    network_gb_s: Positive
    copy_gb_s: Positive
    host_memory_gb: Positive
    host_watts: Annotated[float, Field(ge=0)]
    shares: _Shares
    phase_s: dict[str, Seconds] = Field(default_factory=dict)
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.5
    phase_shares: dict[str, Positive] = Field(default_factory=dict)
    process_gb: Annotated[float, Field(ge=0)] = 0.0
    ranks: Annotated[int, Field(ge=1)] | None = None
    sources: dict[str, str] = Field(default_factory=dict)


def machine_of_values(
    values: Mapping[str, Any], *, num_nodes: int, devices_per_node: int
) -> Machine:
    """The machine of `machine_values`; ValueError if a key is missing or wrong."""
    return _machine(_checked(values, "machine"), num_nodes, devices_per_node, None)


def load_machine(
    gpu: str | Path, *, num_nodes: int, devices_per_node: int, network_gb_s: float | None = None
) -> Machine:
    """Make a machine of equal nodes.

    Args:
        gpu: a name in `gpus.yaml`, or a YAML file with the same keys.
        network_gb_s: GB/s that a device sends to other nodes; None: those of the table or file.

    Raises:
        ValueError: no GPU has this name; a key of the file is missing, unknown or has a wrong
            value.
        OSError: the file cannot be read.
    """
    entry = _entry(gpu)
    if network_gb_s is not None and network_gb_s <= 0:
        raise ValueError(f"--network-gb-s {network_gb_s}: give a positive number of GB/s")
    return _machine(entry, num_nodes, devices_per_node, network_gb_s)


def _machine(
    entry: _Entry, num_nodes: int, devices_per_node: int, network_gb_s: float | None
) -> Machine:
    # a host's cores and memory are shared by its ranks, of which a file has as many as it was
    # measured with
    part = 1.0 if entry.ranks is None else entry.ranks / devices_per_node
    device = Device(
        name=entry.name,
        kind=entry.kind,
        flops={
            "bfloat16": entry.bfloat16_tflops * 1e12 * part,
            "float32": entry.float32_tflops * 1e12 * part,
        },
        memory_bytes=int(entry.memory_gb * GIGA),
        memory_rate=entry.memory_gb_s * GIGA * part,
        node_rate=entry.node_gb_s * GIGA,
        host_rate=entry.host_gb_s * GIGA,
        watts=entry.watts,
    )
    return Machine(
        device=device,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        network_rate=(network_gb_s or entry.network_gb_s) * GIGA,
        copy_rate=entry.copy_gb_s * GIGA,
        host_bytes=int(entry.host_memory_gb * GIGA * devices_per_node),
        host_watts=entry.host_watts * devices_per_node,
        shares=Shares(**dict(entry.shares)),
        phase_s=entry.phase_s,
        overlap=entry.overlap,
        phase_shares=entry.phase_shares,
        process_bytes=int(entry.process_gb * GIGA),
    )


def save_machine(machine: Machine, path: Path) -> None:
    """Write a machine's file, from which `load_machine` makes an equal one."""
    replace_file(path, yaml.safe_dump(machine_values(machine), sort_keys=False).encode())


def machine_values(machine: Machine) -> dict[str, Any]:
    """The keys and values of a machine's file."""
    device, nodes = machine.device, machine.devices_per_node
    return {
        "name": device.name,
        "kind": device.kind,
        "bfloat16_tflops": device.flops["bfloat16"] / 1e12,
        "float32_tflops": device.flops["float32"] / 1e12,
        "memory_gb": device.memory_bytes / GIGA,
        "memory_gb_s": device.memory_rate / GIGA,
        "node_gb_s": device.node_rate / GIGA,
        "host_gb_s": device.host_rate / GIGA,
        "watts": device.watts,
        "network_gb_s": machine.network_rate / GIGA,
        "copy_gb_s": machine.copy_rate / GIGA,
        "host_memory_gb": machine.host_bytes / GIGA / nodes,
        "host_watts": machine.host_watts / nodes,
        "shares": {name: _plain(share) for name, share in vars(machine.shares).items()},
        "phase_s": dict(machine.phase_s),
        "overlap": machine.overlap,
        "phase_shares": dict(machine.phase_shares),
        "process_gb": machine.process_bytes / GIGA,
        **({"ranks": nodes} if device.kind == "cpu" else {}),
    }


def known_gpus() -> list[str]:
    """Names of the GPUs in the table."""
    return list(_table()["gpus"])


def _plain(share: object) -> object:
    return dict(share) if isinstance(share, Mapping) else share


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def _entry(gpu: str | Path) -> _Entry:
    name = str(gpu).lower()
    name = ALIASES.get(name, name)
    if name in _table()["gpus"]:
        return _checked(_known_values(name), f"{TABLE.name}: {name}")
    path = Path(gpu)
    if not path.is_file():
        names = known_gpus()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"--gpu {gpu}: {hint}known are {', '.join(names)}; or give a file with their keys"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values: bfloat16_tflops, memory_gb, ...")
    if (base := values.pop("base", None)) is not None:
        known = ALIASES.get(base, base)
        if known not in _table()["gpus"]:
            raise ValueError(f"{path}: base={base!r} is not one of {', '.join(known_gpus())}")
        values = _merged(_known_values(known), values)
    return _checked({"shares": _table()["shares"]} | values, str(path))


def _known_values(name: str) -> dict[str, Any]:
    own = dict(_table()["gpus"][name])
    if (base := own.pop("base", None)) is not None:
        return _merged(_known_values(base), own)
    return {"shares": _table()["shares"]} | own


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a base with one's own over them, in sections as well."""
    found = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _checked(values: Mapping[str, Any], origin: str) -> _Entry:
    try:
        entry = _Entry.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{origin}: {key}: {first['msg']}") from None
    complete: tuple[tuple[str, Iterable[str], object], ...] = (
        ("flops", entry.shares.flops, Product),
        ("links", entry.shares.links, Link),
        ("message_s", entry.shares.message_s, Link),
    )
    for name, given, kinds in complete:
        if missing := sorted({*get_args(kinds)}.difference(given)):
            raise ValueError(f"{origin}: shares.{name}.{missing[0]}: Field required")
    return entry
