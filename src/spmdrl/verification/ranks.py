"""Two processes that compute a model in every layout, for comparison with one.

They are forked from a server that has imported torch already, as soon as it has.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.files.hf import open_model
from spmdrl.models.local_shards import LocalTensors
from spmdrl.verification.sampling import Found, make_engine, requests_of, sample
from spmdrl.verification.texts import Texts
from spmdrl.verification.trainer import make_trainer, train

SIZE = 2
LAYOUTS: Mapping[str, Mapping[str, int]] = {
    "tp2": {"tp": 2},
    "cp2": {"cp": 2},
    "ep2": {"dp_replicate": 2, "ep": 2},
    "dp_shard2": {"dp_shard": 2},
}
TIMEOUT_S = 300.0
PRELOAD = ["spmdrl.verification.ranks", "torch.distributed.fsdp", "torch._dynamo", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Results of one rank in one layout.

    Args:
        refused: why the layout is not offered; then there is nothing else.
        replica: number of the replica whose rows these are.
        logprobs: those of its rows.
        gradients: its parts of the gradients.
        sampled: completions of its requests; None where the layout has no engine of its own.
    """

    refused: str = ""
    replica: int = 0
    logprobs: Tensor | None = None
    gradients: LocalTensors | None = None
    sampled: Found | None = None


def compute_layouts(directory: Path, texts: Texts) -> dict[str, list[Share] | str]:
    """Compute every layout on two processes; return each rank's share, or how it failed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with TemporaryDirectory(prefix="spmdrl_verify_") as place:
        arguments = (Path(place), directory, texts)
        ranks = [context.Process(target=_run, args=(rank, *arguments)) for rank in range(SIZE)]
        for process in ranks:
            process.start()
        _wait(ranks)
        return {name: _read(Path(place), name) for name in LAYOUTS}


def _wait(ranks: list[Any]) -> None:
    """Wait for all; where one has failed, the others may wait for it, and are ended."""
    for process in ranks:
        while process.is_alive():
            process.join(0.2)
            if any(other.exitcode for other in ranks):
                break
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


def _read(place: Path, name: str) -> list[Share] | str:
    files = [place / f"{name}.{rank}" for rank in range(SIZE)]
    if all(file.is_file() for file in files):
        return [torch.load(file, weights_only=False) for file in files]
    failures = sorted(place.glob("failure.*"))
    said = [file.read_text(encoding="utf-8").strip().splitlines()[-1] for file in failures]
    return f"failed: {said[0] if said else 'a rank ended without a word'}"


def _run(rank: int, place: Path, directory: Path, texts: Texts) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/meeting",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        for name, degrees in LAYOUTS.items():
            torch.save(_share(degrees, directory, texts), place / f"{name}.part.{rank}")
            (place / f"{name}.part.{rank}").rename(place / f"{name}.{rank}")
        dist.destroy_process_group()
    # told by the process that waits for this one
    except BaseException:
        (place / f"failure.{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from None


def _share(degrees: Mapping[str, int], directory: Path, texts: Texts) -> Share:
    model, source = open_model(directory)
    mesh = Mesh("policy", range(SIZE), degrees, "cpu")
    replica, num_replicas = mesh.coordinate("dp"), mesh.size("dp")
    try:
        trainer = make_trainer(mesh, model, source, share=True)
    except ValueError as error:
        return Share(refused=str(error))
    rows = texts.rows.select(rows_of_replica(texts, replica, num_replicas))
    logprobs, gradients = train(trainer, rows, texts.num_read)
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    ep = Parallel(group=mesh.group("exchange"), rank=mesh.coordinate("ep"), size=mesh.size("ep"))
    sampled: Found | None = None
    if tp.size > 1 or ep.size > 1:
        engine = make_engine(model, source, tp=tp, ep=ep)
        sampled = sample(engine, requests_of(texts)[replica::num_replicas])
    return Share(replica=replica, logprobs=logprobs, gradients=gradients, sampled=sampled)


def rows_of_replica(texts: Texts, replica: int, num_replicas: int) -> list[int]:
    """Return the rows of a replica; those of one prompt stay together."""
    groups = texts.rows["prompt_ids"].tolist()
    return [row for row, group in enumerate(groups) if group % num_replicas == replica]
