"""Verdict on measured speeds: which nodes are slow, compared with the others and with a plan."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from spmdrl.commands.node_speed import RankSpeed
from spmdrl.planning.forecast.machine import Machine

SPEED_FILE = "preflight.json"
DRIFT = 0.85
"""Least rate of a rank's last products, as a share of its first ones."""

_FEW = 16
"""Most ranks of which each is compared with the others only, and not with all of them."""

_LESS = 0.5
"""Factor of the limits for disks: nodes write at the same time, and share what they write to."""

FIGURES = {
    "flops": ("products", 1e12, "TFLOP/s"),
    "copy": ("copies in memory", 1e9, "GB/s"),
    "host": ("copies from the host", 1e9, "GB/s"),
    "disk": ("writes to the disk", 1e9, "GB/s"),
}
"""Field of `RankSpeed` -> its name in sentences, unit, and the unit's name."""


@dataclass(frozen=True, kw_only=True)
class SpeedLimits:
    """Limits below which a rank makes its node bad.

    Args:
        share: least share of the median of the other ranks (half of it for the disk).
        least: field of `RankSpeed` -> least value, in the units of `FIGURES`.
    """

    share: float
    least: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PlannedSpeed:
    """Speeds of one rank that a plan assumes, in the units of `RankSpeed`.

    Args:
        machine: the name of the machine.
        intra, inter: bytes per second that a rank sends within its node and to other nodes.
    """

    machine: str
    flops: float
    copy: float
    host: float
    intra: float
    inter: float


def planned_speed(machine: Machine) -> PlannedSpeed:
    """Speeds that a plan for this machine assumes: peaks times the shares that software reaches."""
    device, shares = machine.device, machine.shares
    dtype = "bfloat16" if device.kind == "cuda" else "float32"
    return PlannedSpeed(
        machine=device.name,
        flops=device.flops[dtype] * shares.flops["matmul"],
        copy=device.memory_rate * shares.memory,
        host=machine.link_rate("host"),
        intra=machine.link_rate("node"),
        inter=machine.link_rate("network"),
    )


def judge_speeds(
    speeds: Sequence[RankSpeed],
    nodes: Sequence[str],
    limits: SpeedLimits,
    plan: PlannedSpeed | None = None,
) -> tuple[list[str], list[str]]:
    """Return sentences, and the names of slow nodes.

    Args:
        speeds, nodes: each rank's speeds and the name of its node, in rank order.
        plan: adds what was planned to the sentence of each figure.
    """
    lines: list[str] = []
    slow: dict[str, None] = {}
    for figure in FIGURES:
        values = _values(speeds, figure)
        if not values:
            continue
        lines.append(_summary(figure, values, plan))
        for rank, text in _slow_ranks(figure, values, limits):
            slow[nodes[rank]] = None
            lines.append(f"{nodes[rank]}, rank {rank}: {text}")
    for rank, one in enumerate(speeds):
        if one.clocks:
            slow[nodes[rank]] = None
            lines.append(f"{nodes[rank]}, rank {rank}: lowered clocks: {', '.join(one.clocks)}")
        if one.disk_error is not None:
            slow[nodes[rank]] = None
            lines.append(f"{nodes[rank]}, rank {rank}: no file could be written: {one.disk_error}")
        if one.drift < DRIFT:
            # not bad by itself: another process may have come
            lines.append(
                f"{nodes[rank]}, rank {rank}: products became slower, the last ones run at "
                f"{one.drift:.2f} of the first ones' rate"
            )
    return lines, list(slow)


def _values(speeds: Sequence[RankSpeed], figure: str) -> dict[int, float]:
    found = {rank: vars(one)[figure] for rank, one in enumerate(speeds)}
    return {rank: value for rank, value in found.items() if value is not None}


def _summary(figure: str, values: Mapping[int, float], plan: PlannedSpeed | None) -> str:
    name, unit, unit_name = FIGURES[figure]
    least, middle = min(values.values()) / unit, median(values.values()) / unit
    planned = ""
    if plan is not None and figure in vars(plan):
        planned = f"; {plan.machine} is planned with {vars(plan)[figure] / unit:.3g}"
    return f"{name}: {middle:.3g} {unit_name} in the median, {least:.3g} at least{planned}"


def _slow_ranks(
    figure: str, values: Mapping[int, float], limits: SpeedLimits
) -> Iterator[tuple[int, str]]:
    name, unit, unit_name = FIGURES[figure]
    share = limits.share * (_LESS if figure == "disk" else 1.0)
    least = limits.least.get(figure, 0.0)
    middle = median(values.values())
    for rank, value in values.items():
        if len(values) <= _FEW:
            middle = median([v for r, v in values.items() if r != rank] or [value])
        shown = f"{name} at {value / unit:.3g} {unit_name}"
        if value < share * middle:
            yield rank, f"{shown}, {value / middle:.2f} of the other ranks' median"
        if value / unit < least:
            yield rank, f"{shown}, below {least:g}"


def speed_file(
    speeds: Sequence[RankSpeed],
    nodes: Sequence[str],
    links: Mapping[str, object],
    bad: Sequence[str],
    plan: PlannedSpeed | None,
) -> str:
    """All figures as JSON: per rank in operations and bytes per second, of links in GB/s."""
    ranks = [
        {"rank": rank, "node": node, **asdict(one)}
        for rank, (one, node) in enumerate(zip(speeds, nodes, strict=True))
    ]
    content = {
        "written": round(time.time(), 1),
        "bad": list(bad),
        "plan": None if plan is None else asdict(plan),
        "ranks": ranks,
        "links_gb_s": links,
    }
    return json.dumps(content, indent=1) + "\n"
