"""Time of forward and backward passes with and without `train.compile`, in turns, in one process:
median, least and most, of the clock and of the processor (of all threads).

python benchmarks/compiled_layers.py --model models/SmolLM2-135M-Instruct --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import read_config
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import start_world, stop_world


def rows_of(lengths: list[int], vocabulary: int) -> Batch:
    tokens = [torch.randint(0, vocabulary, (length,)).tolist() for length in lengths]
    none = torch.zeros(len(lengths), dtype=torch.int64)
    batch = from_rows(
        tokens, rows={"prompt_ids": torch.arange(len(lengths)), "prompt_lengths": none}
    )
    mask = torch.ones(batch.num_tokens, dtype=torch.bool)
    mask[batch.offsets()[:-1]] = False
    return batch.with_columns(tokens={"loss_mask": mask})


def loss(given: LossInput) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -given["logprobs"].sum(), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512, help="of a row; one of a microbatch")
    parser.add_argument("--repeats", type=int, default=5)
    words = parser.parse_args()
    world = start_world()
    model = read_config(words.model)
    backend = TorchBackend(
        Mesh("policy", [0], {}, world.device.type),
        model,
        RandomCheckpoint(model, 0),
        TrainOptions(compile="blocks"),
        world.device,
    )
    layers = list(backend.body.decoder.layers)
    pieces = [layer.pieces for layer in layers]

    def timed(is_compiled: bool, length: int) -> tuple[float, float]:
        for layer, own in zip(layers, pieces, strict=True):
            layer.pieces = own if is_compiled else None
        rows = rows_of([length], model.vocab_size)
        start, start_cpu = time.perf_counter(), time.process_time()
        backend.forward_backward(rows, loss, next_token(), normaliser=float(length))
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - start_cpu

    first = timed(True, words.tokens)
    timed(False, words.tokens)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for repeat in range(words.repeats):
        for is_compiled in found:
            found[is_compiled].append(timed(is_compiled, words.tokens + repeat))
    report: dict[str, object] = {"tokens": words.tokens, "first_s": first}
    for name, times in zip(("plain", "compiled"), found.values(), strict=True):
        for kind, own in zip(("s", "cpu_s"), zip(*times, strict=True), strict=True):
            report[f"{name}_{kind}"] = [statistics.median(own), min(own), max(own)]
    print(json.dumps(report, default=float))
    stop_world()


if __name__ == "__main__":
    main()
