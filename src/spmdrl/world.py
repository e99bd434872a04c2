"""`World`: this process's place in the job; only it makes and ends the default process group."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store


log = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
WAIT_S = 30.0
MIN_ADDRESSES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank, size, local rank and device of this process, and the device type of every rank.

    `torchrun` (or `srun` with the same variables) sets RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE and the rendezvous; without them the world is this one process. Ranks are
    numbered node by node, `local_size` of them on each.

    `store` is the launcher's; code that waits on it needs its own connection (`connect`).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    device_types: tuple[str, ...]
    store: Store
    gpu_bytes: int | None = None
    """Bytes that were free at the start on the fullest GPU of all ranks; None: no rank has one."""

    @property
    def is_first(self) -> bool:
        """True on rank 0: for console, progress bars and files, never around a collective."""
        return self.rank == 0

    def connect(self, prefix: str) -> Store:
        """Open a new connection to the store, with its own keys: a wait blocks a shared one."""
        # documented, but torch's stubs have neither
        own = self.store.clone()  # type: ignore[attr-defined]
        store: Store = dist.PrefixStore(prefix, own)  # type: ignore[attr-defined]
        return store

    @property
    def node(self) -> int:
        return self.rank // self.local_size

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that timings of phases are exact."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Facts that a rank tells the others before the process group exists."""

    device_type: str
    local_rank: int
    local_size: int
    gpu_bytes: int = 0


def start_world(
    *, timeout_s: float = 1800.0, device: str = "auto", expandable_segments: bool = True
) -> World:
    """Pick the device and join the default process group: gloo, and NCCL where all ranks have CUDA.

    Ranks exchange their device types through the store before the group is made.

    Args:
        expandable_segments: see `set_up_allocator`.

    Raises:
        ValueError: torchrun's variables are incomplete, or `device` is neither auto, cpu nor cuda,
            or is cuda without a GPU; on all ranks: see `check_seats`.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: it must be auto, cpu or cuda")
    raise_file_limit()
    check_address_space()
    adopt_srun()
    environment = os.environ
    launched = _is_launched()
    rank = int(environment["RANK"]) if launched else 0
    size = int(environment["WORLD_SIZE"]) if launched else 1
    local_rank = int(environment["LOCAL_RANK"]) if launched else 0
    local_size = int(environment.get("LOCAL_WORLD_SIZE", size)) if launched else 1
    chosen = _choose_device(device, local_rank, local_size)
    if chosen.type == "cuda" and expandable_segments:
        reason = set_up_allocator(chosen)
        if reason is not None and rank == 0:
            log.warning("memory segments have a fixed size: %s", reason)
    timeout = timedelta(seconds=timeout_s)
    with _saying_what_it_waits_for(launched):
        store = _open_store(launched, timeout)
    seat = Seat(
        device_type=chosen.type,
        local_rank=local_rank,
        local_size=local_size,
        gpu_bytes=free_bytes(chosen),
    )
    with _saying_what_it_waits_for(launched):
        seats = _exchange_seats(store, rank, size, seat)
    check_seats(seats)
    device_types = tuple(seat.device_type for seat in seats)
    backend = world_backend(device_types)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    if "nccl" in backend and size > 1:
        # NCCL makes a group's communicator at its first use, which all ranks must join: the world's
        # would else be the messages of a weight sync, which only some ranks send or receive.
        dist.all_reduce(torch.zeros(1, device=chosen))
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        device=chosen,
        device_types=device_types,
        store=store,
        gpu_bytes=min((seat.gpu_bytes for seat in seats if seat.gpu_bytes), default=None),
    )


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one.

    Ranks are connected by sockets, in every group that they share: some hundreds of ranks need more
    than 1024, the usual soft limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # refused if the hard limit exceeds the system's (fs.nr_open), even without a change
    with suppress(ValueError):
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_address_space() -> None:
    """ValueError: `ulimit -v` leaves less than `MIN_ADDRESSES`; libraries crash without it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    used = pages * resource.getpagesize()
    if limit - used < MIN_ADDRESSES:
        raise ValueError(
            f"ulimit -v is {limit // 1024} kB, and {used // 1024} are in use before a model is "
            f"loaded: raise it to {(used + MIN_ADDRESSES) // 1024} and what models need, or to "
            "unlimited"
        )


def adopt_srun() -> None:
    """Set torchrun's variables from those of `srun`, whose tasks are the ranks if
    SPMDRL_LAUNCH=srun.

    Raises:
        ValueError: this is not a task of srun, or rank 0's address is not set.
    """
    if os.environ.get("SPMDRL_LAUNCH") != "srun":
        return
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in (*names, "RANKS_PER_NODE") if name not in os.environ]
    if missing:
        raise ValueError(
            f"SPMDRL_LAUNCH=srun, but {missing} are not set: start the ranks with srun, as "
            "scripts/slurm/train.sbatch does, or unset SPMDRL_LAUNCH"
        )
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["RANKS_PER_NODE"]


def _is_launched() -> bool:
    """Whether a launcher set the variables of a rank; ValueError if it set only some of them."""
    names = RANK_VARIABLES
    given = [name for name in names if name in os.environ]
    # only an address may be left over; a rank or a size means that a launcher was at work
    launched = any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if launched and len(given) < len(names):
        missing = sorted(set(names) - set(given))
        raise ValueError(
            f"{given} are set but {missing} are not: start the ranks with torchrun, or, for one "
            f"rank, with env {' '.join(f'-u {name}' for name in given)}"
        )
    return launched


@contextmanager
def _saying_what_it_waits_for(launched: bool) -> Iterator[None]:
    """Print once, after `WAIT_S`, that ranks are awaited: the variables may be of an old job."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    shown = " ".join(f"{name}={os.environ.get(name)}" for name in names)

    def say() -> None:
        print(
            f"spmdrl: waits for the other ranks ({shown}); if these variables are left over from "
            f"another job, start with env {' '.join(f'-u {name}' for name in RANK_VARIABLES)}",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(WAIT_S, say)
    timer.daemon = True
    if launched:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _choose_device(device: str, local_rank: int, local_size: int) -> torch.device:
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device: set device to cpu or auto")
    if on_cuda:
        chosen = torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1))
        torch.cuda.set_device(chosen)
        return chosen
    set_cpu_threads(local_size)
    return torch.device("cpu")


def set_up_allocator(device: torch.device) -> str | None:
    """Let the segments of torch's allocator grow, before anything is allocated: parts of all sizes
    that come and go would fragment segments of fixed sizes.

    A user's own setting (`ALLOCATOR_VARIABLES`) stays as it is.

    Returns: why segments cannot grow here, if they cannot.
    """
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return None
    try:
        # torch asks it before it maps memory, and crashes in a container that lacks it
        ctypes.CDLL("libnvidia-ml.so.1")
        _set_allocator("expandable_segments:True")
        torch.empty(1, device=device)  # drivers of some virtual machines cannot map memory
    except (OSError, RuntimeError) as error:
        _set_allocator("expandable_segments:False")
        return str(error).splitlines()[0]
    return None


def _set_allocator(settings: str) -> None:
    # torch.cuda.memory._set_allocator_settings, which calls it, is deprecated since torch 2.13
    torch._C._accelerator_setAllocatorSettings(settings)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of the device that nobody uses, this process included; 0 for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _open_store(launched: bool, timeout: timedelta) -> Store:
    """Open the launcher's store, or a new one for a single process."""
    if not launched:
        # documented as torch.distributed.TCPStore, but torch's stubs do not re-export it
        return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)  # type: ignore[attr-defined]
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store


def _exchange_seats(store: Store, rank: int, size: int, seat: Seat) -> tuple[Seat, ...]:
    """Exchange the seats of all ranks; in rank order."""
    keys = [f"device/{other}" for other in range(size)]
    words = (seat.device_type, seat.local_rank, seat.local_size, seat.gpu_bytes)
    store.set(keys[rank], " ".join(map(str, words)))
    store.wait(keys)
    seats = []
    for value in store.multi_get(keys):
        device_type, *numbers = value.decode().split()
        local_rank, local_size, gpu_bytes = map(int, numbers)
        seats.append(
            Seat(
                device_type=device_type,
                local_rank=local_rank,
                local_size=local_size,
                gpu_bytes=gpu_bytes,
            )
        )
    # rank 0 may host the store: if it failed before the others have read, they would lose the
    # connection instead of raising the same error. And they must not wait after reading, since
    # rank 0 may be the first to leave.
    if store.add("device/read", 1) == size:
        store.set("device/all_read", "")
    if rank == 0:
        store.wait(["device/all_read"])
    return tuple(seats)


def check_seats(seats: Sequence[Seat]) -> None:
    """ValueError unless ranks are numbered node by node, with the same number on each."""
    first: dict[int, int] = {}
    for rank, seat in enumerate(seats):
        first.setdefault(seat.local_size, rank)
    if len(first) > 1:
        shown = ", ".join(f"{count} on rank {rank}" for count, rank in first.items())
        raise ValueError(
            f"nodes have different numbers of ranks (LOCAL_WORLD_SIZE is {shown}): start equally "
            "many on every node"
        )
    for rank, seat in enumerate(seats):
        if seat.local_rank != rank % seat.local_size or len(seats) % seat.local_size:
            raise ValueError(
                f"rank {rank} of {len(seats)} has LOCAL_RANK={seat.local_rank} and "
                f"LOCAL_WORLD_SIZE={seat.local_size}: ranks must be numbered node by node, equally "
                "many on each, and LOCAL_WORLD_SIZE must be their number on a node"
            )


def world_backend(device_types: Sequence[str]) -> str:
    """The backend of the default process group, equal on all ranks."""
    return "cpu:gloo,cuda:nccl" if set(device_types) == {"cuda"} else "gloo"


def stop_world() -> None:
    """Leave the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_cpu_threads(local_size: int) -> None:
    """Use cores / ranks threads, unless the user set OMP_NUM_THREADS.

    torchrun itself sets OMP_NUM_THREADS=1 for several ranks, so 1 does not count as the user's
    choice then.
    """
    wish = os.environ.get("OMP_NUM_THREADS")
    if wish is not None and not (wish == "1" and local_size > 1):
        return
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // max(local_size, 1)))


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's global generators alike on every rank.

    The project itself draws keyed numbers (`spmdrl.keyed_random`); this makes libraries that draw
    from the global generators draw the same numbers in every run.
    """
    random.seed(seed)
    torch.manual_seed(seed)
