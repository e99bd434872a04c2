"""`World`: this process's place in the job. It alone makes and ends the default process group."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank, size, local rank and device of this process.

    `torchrun` (or `srun` with the same variables) gives RANK, WORLD_SIZE, LOCAL_RANK and the
    rendezvous; without them the world is this one process.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on rank 0: for console, progress bars and files, never around a collective."""
        return self.rank == 0

    @property
    def node(self) -> int:
        return self.rank // self.local_size

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that a phase's seconds are its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_world(*, timeout_s: float = 1800.0, device: str = "auto") -> World:
    """Join the default process group (gloo; with NCCL where CUDA is) and pick the device.

    Raises:
        ValueError: torchrun's variables are incomplete, `device` is neither auto, cpu nor cuda, or
            it is cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: it must be auto, cpu or cuda")
    environment = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in environment]
    # an address alone may be left over; a rank or a size means that a launcher was at work
    launched = any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if launched and len(given) < len(names):
        missing = sorted(set(names) - set(given))
        raise ValueError(f"{given} are set but {missing} are not: start the ranks with torchrun")
    rank = int(environment["RANK"]) if launched else 0
    size = int(environment["WORLD_SIZE"]) if launched else 1
    local_rank = int(environment["LOCAL_RANK"]) if launched else 0
    local_size = int(environment.get("LOCAL_WORLD_SIZE", size)) if launched else 1
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device: set device to cpu or auto")
    if on_cuda:
        chosen = torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1))
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        set_cpu_threads(local_size)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # documented as torch.distributed.TCPStore, but torch's stubs do not re-export it
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=chosen)


def stop_world() -> None:
    """Leave the default process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_cpu_threads(local_size: int) -> None:
    """Cores / ranks threads, unless OMP_NUM_THREADS was set by the user.

    torchrun sets OMP_NUM_THREADS=1 itself when it starts several ranks and says so; a value of 1
    with several ranks is thus not taken as the user's wish where more cores are there.
    """
    wish = os.environ.get("OMP_NUM_THREADS")
    if wish is not None and not (wish == "1" and local_size > 1):
        return
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // max(local_size, 1)))


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's global generators alike on every rank.

    Nothing in the project draws from them on purpose (draws are keyed, see `spmdrl.keyed`); this
    keeps libraries that do from differing between runs.
    """
    random.seed(seed)
    torch.manual_seed(seed)
