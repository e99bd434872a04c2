"""Runs a function on N gloo ranks, as N processes of a fork server that has imported torch already.

The server imports torch once and starts no threads, so a rank costs milliseconds to start. A rank
that raises ends the test with its traceback; a rank that hangs ends it at the timeout.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "transformers",
    "omegaconf",
    "pydantic",
    "torch._dynamo",  # which `fully_shard` imports
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "spmdrl.run.assembly.assembly",
    "spmdrl.flows.grpo",
    "transformers.models.auto.tokenization_auto",
    # left out by the server where they are not installed
    "reasoning_gym",
    # where torch has CUDA its import starts it, and a fork of such a server has none
    *([] if torch.version.cuda else ["megatron.core.models.gpt"]),
]
"""Not `datasets`: it starts a thread."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float = 120.0,
    device: str = "cpu",
) -> list[Any]:
    """`function(world, *arguments)` on ranks 0 to world_size - 1; their return values in order."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # here and not in rank 0: a port that is looked for first may be taken when rank 0 binds it
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    ranks = [
        context.Process(
            target=_rank, args=(function, rank, world_size, store.port, device, answers, arguments)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, answers, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        answers.close()


def _collect(ranks: list[Any], answers: Any, deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        try:
            rank, value, failure = answers.get(timeout=0.5)
        except queue.Empty:
            dead = [i for i, p in enumerate(ranks) if p.exitcode not in (None, 0)]
            if dead and answers.empty():
                codes = [ranks[i].exitcode for i in dead]
                raise AssertionError(f"ranks {dead} died (exit codes {codes})") from None
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(ranks))) - set(results))
                raise AssertionError(f"ranks {missing} gave no answer in {timeout_s} s") from None
            continue
        if failure is not None:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        results[rank] = pickle.loads(value)
    return [results[i] for i in range(len(ranks))]


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    device: str,
    answers: Any,
    arguments: Any,
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
    )
    from spmdrl.world import start_world, stop_world

    torch.set_num_threads(1)
    try:
        world = start_world(timeout_s=100, device=device)
        torch.set_num_threads(1)
        value = function(world, *arguments)
        stop_world()
        # plain pickle copies tensors; the queue's own would send a handle that dies with the rank
        answers.put((rank, pickle.dumps(value), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
