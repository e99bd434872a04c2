"""The check that a node's host has room for what a run keeps there, before anything is loaded.

Page-locked memory is taken at once and cannot be swapped: where there is too little of it, the
kernel kills a rank, without a word of what was missing.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import agreed
from spmdrl.planning.host_memory import host_memory
from spmdrl.planning.plan import RolePlan
from spmdrl.world import World

log = logging.getLogger(__name__)


def check_host(config: Config, plan: RolePlan, world: World) -> None:
    """Compare what the plan keeps on the fullest node's host with what is free here; on GPUs only.

    Raises:
        ValueError: parts that are away from the device do not fit; on every rank.
    """
    if "cuda" not in plan.devices.values():
        return
    need = host_memory(config, plan, world.size, world.local_size)
    held = need.arenas + need.offloaded
    free = free_host_bytes()

    def check() -> None:
        if free is not None and held > free:
            raise ValueError(
                f"parts that stay on the host or move there need {held / 1e9:.0f} GB on a node, "
                f"and {free / 1e9:.0f} GB are free: give the job more host memory (--mem), or more "
                "ranks a role (dp_shard); spmdrl plan says what takes it"
            )

    agreed(ValueError, check)
    if world.is_first and free is not None and held + need.checkpoint > free:
        log.warning(
            "a checkpoint copies %.0f GB of masters and moments to a node's host, which has %.0f "
            "GB free and holds %.0f GB of parts: the first one may end the run; give the job more "
            "host memory (--mem)",
            need.checkpoint / 1e9,
            free / 1e9,
            held / 1e9,
        )


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take on its host; None if nothing tells.

    The least of the kernel's `MemAvailable` and of what the limits of its control groups leave
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, `memory.max` and `memory.current`).

    Args:
        root: directory that has `proc` and `sys`.
    """
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    for group in _groups(root):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with suppress(OSError, ValueError):  # "max": no limit
                most = int((group / limit).read_text(encoding="utf-8"))
                taken = int((group / used).read_text(encoding="utf-8"))
                found.append(max(0, most - taken))
    return min(found, default=None)


def _groups(root: Path) -> list[Path]:
    """Directories of the process's control groups that bound memory, and of those above them."""
    found: list[Path] = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            own = top / path.lstrip("/")
            found += [own, *(above for above in own.parents if above.is_relative_to(top))]
    return found
