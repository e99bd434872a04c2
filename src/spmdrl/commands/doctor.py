"""`spmdrl doctor`: checks of every node of a job, and of the network between them, before a run.

Each rank reports what it finds, and all ranks compare the reports. A node is bad if one of its
ranks has a problem, if it differs from most other nodes, or if it is slow.
"""

from __future__ import annotations

import os
import platform
import resource
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from spmdrl.atomic_files import replace_file
from spmdrl.commands.hardware import Accelerator, find_accelerator, unsupported, untested
from spmdrl.commands.node_links import between_nodes, within_nodes
from spmdrl.commands.node_speed import SECONDS, RankSpeed, measure_speed
from spmdrl.commands.slow_nodes import (
    SPEED_FILE,
    PlannedSpeed,
    SpeedLimits,
    judge_speeds,
    speed_file,
)
from spmdrl.distributed.reduce import broadcast_object, gather_objects
from spmdrl.sandbox.run import unusable
from spmdrl.world import World

MAX_SKEW_S = 2.0
MIN_SHM_GB, MIN_TMP_GB = 1.0, 1.0
MIN_FILES, FILES_PER_RANK = 512, 12
"""Open files that a rank needs: for libraries, shards and a few connections; and per rank of the
world, two for each of six roles over all ranks."""
MAX_TMP_PATH = 80
"""Most characters of TMPDIR: socket paths have 107 bytes at most, and libraries extend it."""
MIN_FREE_GPU = 0.9
"""Least free share of a GPU's memory; if it is smaller, another process uses the GPU."""
CANARY_S = 15.0

SLOW_LINK = 0.5
"""Least bandwidth between two nodes, as a share of the median over all pairs."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Findings of one rank.

    Args:
        node: the scheduler's name of the host.
        versions: names and values that must be equal on all nodes.
        problems: problems of this rank, as sentences.
        notes: sentences that are printed, but do not make a node bad.
    """

    rank: int
    node: str
    versions: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of all checks: `lines` to print, and the names of `bad` nodes to leave out."""

    lines: tuple[str, ...]
    bad: tuple[str, ...]


def doctor(
    world: World,
    *,
    shared: Path | None,
    min_intra: float = 0.0,
    min_inter: float = 0.0,
    limits: SpeedLimits | None = None,
    plan: PlannedSpeed | None = None,
    seconds: float = SECONDS,
) -> Diagnosis:
    """Check all nodes. Every rank of the world calls it and gets the same diagnosis.

    Args:
        shared: a directory that all nodes should share; it also gets the figures, as
            `SPEED_FILE`; None: not checked, and no disk is measured.
        min_intra, min_inter: least bus bandwidth of an all-reduce within a node and between two
            nodes, in GB/s (1e9 bytes); below it a node is bad.
        limits: limits of the speeds of ranks; None: those are not measured.
        plan: speeds that a plan assumes, to be written as well.
        seconds: see `measure_speed`.
    """
    problems, notes = hardware_findings(world.device, find_accelerator(world.device))
    problems += [*local_problems(world), *_skew(world)]
    if world.local_rank == 0:
        notes += sandbox_findings()
    if shared is not None:
        problems += _canary(world, shared)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    speed = None
    if limits is not None:
        # a directory that cannot be written is a problem already
        speed = measure_speed(world, None if problems else shared, seconds)
    own = Report(
        rank=world.rank,
        node=node,
        versions=versions(world),
        problems=tuple(problems),
        notes=tuple(notes),
    )
    reports: list[Report] = gather_objects(own)
    nodes = [reports[first].node for first in range(0, world.size, world.local_size)]
    intra = within_nodes(world)
    inter = between_nodes(world)
    if limits is not None and len(inter) > 2:
        min_inter = max(min_inter, SLOW_LINK * median(inter.values()))
    found = diagnose(reports, nodes, intra, inter, min_intra=min_intra, min_inter=min_inter)
    if speed is None or limits is None:
        return found
    speeds: list[RankSpeed] = gather_objects(speed)
    lines, slow = judge_speeds(speeds, [r.node for r in reports], limits, plan)
    bad = tuple(dict.fromkeys([*found.bad, *slow]))
    if shared is not None and world.is_first:
        links = {
            "intra": intra,
            "inter": {f"{nodes[a]} {nodes[b]}": v for (a, b), v in inter.items()},
        }
        content = speed_file(speeds, [r.node for r in reports], links, bad, plan)
        replace_file(shared / SPEED_FILE, content.encode())
    return Diagnosis(lines=(*found.lines, *lines), bad=bad)


def diagnose(
    reports: Sequence[Report],
    nodes: Sequence[str],
    intra: Sequence[float],
    inter: Mapping[tuple[int, int], float],
    *,
    min_intra: float = 0.0,
    min_inter: float = 0.0,
) -> Diagnosis:
    """Derive the diagnosis from the reports and the measurements.

    Args:
        nodes: names of the nodes in rank order.
        intra: GB/s within each node; empty if nodes have one rank.
        inter: GB/s between pairs of nodes, by their indices.
    """
    lines, bad = [], dict.fromkeys(r.node for r in reports if r.problems)
    for report in reports:
        texts = (*report.problems, *report.notes)
        lines += [f"{report.node}, rank {report.rank}: {text}" for text in texts]
    for name in reports[0].versions:
        usual, _ = Counter(r.versions[name] for r in reports).most_common(1)[0]
        for report in reports:
            if report.versions[name] != usual:
                bad[report.node] = None
                lines.append(
                    f"{report.node}, rank {report.rank}: {name} is {report.versions[name]}, "
                    f"and {usual} on most ranks"
                )
    for index, speed in enumerate(intra):
        lines.append(f"{nodes[index]}: all-reduce within the node {speed:.2f} GB/s")
        if speed < min_intra:
            bad[nodes[index]] = None
            lines.append(f"{nodes[index]}: that is below {min_intra:g} GB/s")
    slow: Counter[int] = Counter()
    for (a, b), speed in inter.items():
        lines.append(f"{nodes[a]} and {nodes[b]}: all-reduce between them {speed:.2f} GB/s")
        if speed < min_inter:
            slow.update((a, b))
            lines.append(f"{nodes[a]} and {nodes[b]}: that is below {min_inter:g} GB/s")
    # of a slow pair, blame the node that is slow with all its partners, or else both
    partners = Counter(index for pair in inter for index in pair)
    for a, b in inter:
        if inter[a, b] < min_inter:
            guilty = [i for i in (a, b) if slow[i] == partners[i]] or [a, b]
            bad.update(dict.fromkeys(nodes[i] for i in guilty))
    return Diagnosis(lines=tuple(lines), bad=tuple(bad))


def versions(world: World) -> dict[str, str]:
    """Names and values that must be equal on all nodes."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release().split("-")[0],
    }
    if world.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(world.device)
        found["cuda"] = str(torch.version.cuda)
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().splitlines()[0] if driver.is_file() else "unknown"
    return found


def hardware_findings(
    device: torch.device, found: Accelerator | None
) -> tuple[list[str], list[str]]:
    """Return problems and notes on a rank's accelerator: only one in use can be a problem."""
    if found is None:
        return [], []
    reason, note = unsupported(found), untested(found)
    used = device.type == found.kind
    problems = [reason] if reason is not None and used else []
    notes = [text for text in (None if used else reason, note) if text is not None]
    return problems, notes


def sandbox_findings() -> list[str]:
    """Return a note where programs in responses (`function: code`) cannot be confined."""
    reason = unusable()
    if reason is None:
        return []
    return [
        f"the reward `code` cannot confine programs here: {reason}: user namespaces must be "
        "allowed (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, or the "
        "container's seccomp profile)"
    ]


def local_problems(world: World) -> list[str]:
    """Problems that this rank can find by itself."""
    problems = []
    for place, least in (("/dev/shm", MIN_SHM_GB), (tempfile.gettempdir(), MIN_TMP_GB)):
        free = shutil.disk_usage(place).free / 1e9 if Path(place).is_dir() else 0.0
        if free < least:
            problems.append(f"{place} has {free:.2f} GB free, less than {least:g}")
    if len(tempfile.gettempdir()) > MAX_TMP_PATH:
        problems.append(f"TMPDIR={tempfile.gettempdir()} has more than {MAX_TMP_PATH} characters")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    least = MIN_FILES + FILES_PER_RANK * world.size
    if files != resource.RLIM_INFINITY and files < least:
        problems.append(f"ulimit -Hn is {files}, less than the {least} of {world.size} ranks")
    if world.device.type == "cuda":
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked != resource.RLIM_INFINITY:
            problems.append(f"ulimit -l is {locked // 1024} kB: page-locked memory needs unlimited")
        free_bytes, total = torch.cuda.mem_get_info(world.device)
        if free_bytes < MIN_FREE_GPU * total:
            problems.append(
                f"{world.device} has {free_bytes / 1e9:.1f} of {total / 1e9:.1f} GB free: another "
                "process uses it"
            )
    return problems


def _skew(world: World) -> list[str]:
    dist.barrier()
    clocks = gather_objects(time.time())
    middle = sorted(clocks)[len(clocks) // 2]
    skew = clocks[world.rank] - middle
    if abs(skew) <= MAX_SKEW_S:
        return []
    return [f"the clock is {skew:+.1f} s off: logs and deadlines would be wrong"]


def _canary(world: World, shared: Path) -> list[str]:
    """Check that a file that rank 0 writes becomes visible here; returns the problems."""
    file, token = shared / f".spmdrl-canary-{secrets.token_hex(4)}", secrets.token_hex(16)
    file, token = broadcast_object((file, token), 0)
    problems = []
    if world.is_first:
        try:
            shared.mkdir(parents=True, exist_ok=True)
            file.write_text(token)
        except OSError as error:
            problems.append(f"{shared} cannot be written: {error}")
    dist.barrier()
    deadline, seen = time.monotonic() + CANARY_S, ""
    while seen != token and time.monotonic() < deadline and not problems:
        with suppress(OSError):
            seen = file.read_text()
        time.sleep(0.05)
    if seen != token and not problems:
        problems.append(f"{shared} does not show what rank 0 wrote within {CANARY_S:g} s")
    dist.barrier()
    if world.is_first:
        file.unlink(missing_ok=True)
    return problems
