"""Speeds of one rank's device, host and disk, measured in some seconds before a run."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from spmdrl.world import World

SECONDS = 4.0
"""Usual seconds of products, and at most of writing; thermal limits need some to show."""

_SIZE = {"cpu": 1024, "cuda": 8192}  # of square products, by device type
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
_DISK_BLOCK, _DISK_BYTES = 1 << 23, 1 << 28

THROTTLED = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's bits of clocks that are lowered for a fault (nvmlClocksEventReasons); a power cap (0x4) is
usual under load."""


@dataclass(frozen=True, kw_only=True)
class RankSpeed:
    """Speeds of one rank, while all ranks measure at the same time.

    Args:
        flops: dense products per second, the median over some seconds.
        drift: products per second of the last third of that time over those of the first third.
        copy: bytes per second, read and written, of a copy within the device's memory.
        host: bytes per second from page-locked host memory to the device; None: it is the host.
        disk: bytes per second that the node's first rank wrote to the run's directory, with fsync;
            None on other ranks, if no directory was given, or after an error.
        disk_error: error of that writing.
        clocks: reasons for lowered clocks, as far as the system reports them.
    """

    flops: float
    drift: float
    copy: float
    host: float | None
    disk: float | None
    disk_error: str | None
    clocks: tuple[str, ...]


def measure_speed(world: World, directory: Path | None, seconds: float = SECONDS) -> RankSpeed:
    """Measure this rank's speeds. Every rank of the world calls it.

    Args:
        directory: where to write for the disk's speed; None: nothing is written.
        seconds: seconds of products; copies take a quarter of it, and writing at most as long.
    """
    before = _throttle_count()
    dist.barrier()
    rates, reasons = _product_rates(world, seconds)
    third = math.ceil(len(rates) / 3)
    dist.barrier()
    copy = _copy_rate(world, seconds / 4)
    host = _host_rate(world, seconds / 4) if world.device.type == "cuda" else None
    dist.barrier()
    disk, disk_error = None, None
    if directory is not None and world.local_rank == 0:
        try:
            disk = _disk_rate(directory, seconds)
        except OSError as error:  # the others wait for this rank's figures
            disk_error = str(error)
    if _throttle_count() > before:
        reasons = (*reasons, "the CPU counted thermal slowdowns")
    return RankSpeed(
        flops=median(rates),
        drift=median(rates[-third:]) / median(rates[:third]),
        copy=copy,
        host=host,
        disk=disk,
        disk_error=disk_error,
        clocks=reasons,
    )


def _product_rates(world: World, seconds: float) -> tuple[list[float], tuple[str, ...]]:
    """Products per second of repeated products, and reasons for low clocks at their end."""
    kind = world.device.type
    size, dtype = _SIZE[kind], torch.bfloat16 if kind == "cuda" else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=world.device) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # the first call loads libraries
    world.synchronize()
    rates: list[float] = []
    asked = None
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or len(rates) < 3:
        if kind == "cuda" and asked is None and passed > seconds / 2:
            asked = _ask_clocks(world.device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        world.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return rates, () if asked is None else _reasons(asked)


def _ask_clocks(device: torch.device) -> subprocess.Popen[str] | None:
    """Start nvidia-smi for the device; None if it is not installed."""
    words = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"]
    words += ["--query-gpu=clocks_throttle_reasons.active", "--format=csv,noheader"]
    try:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _reasons(asked: subprocess.Popen[str]) -> tuple[str, ...]:
    try:
        text = asked.communicate(timeout=10)[0].strip()
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        return ("nvidia-smi gave no answer in 10 s",)
    return throttle_reasons(text)


def throttle_reasons(text: str) -> tuple[str, ...]:
    """Name the faults in nvidia-smi's `clocks_throttle_reasons.active`, such as
    `0x0000000000000020`; none if the GPU does not report them.
    """
    try:
        bits = int(text, 16)
    except ValueError:
        return ()
    return tuple(name for bit, name in THROTTLED.items() if bits & bit)


def _throttle_count() -> int:
    """Thermal slowdowns of all cores since the boot, as far as Linux counts them."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    return sum(int(file.read_text()) for file in files)


def _copy_rate(world: World, seconds: float) -> float:
    source = torch.ones(_COPY_BYTES[world.device.type], dtype=torch.uint8, device=world.device)
    return 2 * _best_copy(world, torch.zeros_like(source), source, seconds)


def _host_rate(world: World, seconds: float) -> float:
    source = torch.ones(_COPY_BYTES["cpu"], dtype=torch.uint8).pin_memory()
    return _best_copy(world, torch.zeros_like(source, device=world.device), source, seconds)


def _best_copy(world: World, target: torch.Tensor, source: torch.Tensor, seconds: float) -> float:
    """Bytes per second of the median copy; both tensors have been written before."""
    rates: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 3:
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        world.synchronize()
        rates.append(source.nbytes / (time.perf_counter() - start))
    return median(rates)


def _disk_rate(directory: Path, seconds: float) -> float:
    """Bytes per second of one file, fsync included."""
    directory.mkdir(parents=True, exist_ok=True)
    file, block = directory / f".spmdrl-disk-{secrets.token_hex(4)}", os.urandom(_DISK_BLOCK)
    written = 0
    began = time.perf_counter()
    try:
        with file.open("wb", buffering=0) as out:
            while written < _DISK_BYTES and time.perf_counter() - began < seconds:
                written += out.write(block)
            os.fsync(out.fileno())
        return written / (time.perf_counter() - began)
    finally:
        file.unlink(missing_ok=True)
