"""Figures of the CUDA path that need no clock: launches, synchronisations, bytes, memory.

Runs under the stand-in, without values: `python figures.py decode` prints one JSON line. Weights
have the shapes of a 1.5B model and no content, so nothing is read, and a figure takes seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fake_gpu import stand_in
from fake_gpu.moved_bytes import Bytes, elementwise, gigabytes
from spmdrl.algorithms.policy_loss import clipped_policy_loss
from spmdrl.batch import Batch, from_rows
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.runner import Runner
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import OWN, Request, SamplingParams
from spmdrl.training import torch_backend
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import start_world, stop_world

Counts = dict[str, int]

LARGE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 151645,
    "bos_token_id": 151643,
}
SYNCS = ("stream_sync", "device_sync", "event_sync", "memcpy_sync")
LAUNCHES = ("kernel", "product", "memset", "graph_launch")


def counted(work: Callable[[], Any]) -> Counts:
    """Count what `work` asks of the device."""
    with stand_in.counting() as found:
        work()
    return {name: found.get(name, 0) for name in (*stand_in.kinds(), *found)}


def total(found: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(found[name] for name in names)


def large_model(content: Mapping[str, Any] = LARGE) -> ModelConfig:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(content))
        return read_config(directory)


def make_engine(
    device: torch.device, adapter: Adapter | None = None, **options: Any
) -> NativeEngine:
    engine = NativeEngine(
        large_model(),
        options=NativeOptions(cuda_graphs=True, prefill_tokens=8192, **options),
        device=device,
        dtype=torch.bfloat16,
        adapter=adapter,
    )
    for name in engine.weights.table():
        engine.allocate(name)
    return engine


def requests(
    count: int, group: int, new: int | Callable[[int], int], *, prompt: int = 128
) -> list[Request]:
    """`count` prompts of `prompt` tokens with `group` samples, each of `new` tokens exactly."""
    found = []
    for i in range(count):
        length = new(i) if callable(new) else new
        sampling = SamplingParams(max_tokens=length, ignore_eos=True)
        tokens = (i + 3, *range(10, 9 + prompt))
        found.append(
            Request(tokens=tokens, prompt_id=i, samples=tuple(range(group)), sampling=sampling)
        )
    return found


def decode(device: torch.device) -> dict[str, Any]:
    """Cost of one more decode step of 64 samples."""
    return decode_step(make_engine(device, max_running=64))


def together(device: torch.device) -> dict[str, Any]:
    """The same with prompts of two pages, which the samples of each share."""
    return decode_step(make_engine(device, max_running=64), prompt=512)


def adapter() -> Adapter:
    return make_adapter(find_targets(large_model(), ["all"]), rank=16, alpha=32)


def adapted(device: torch.device) -> dict[str, Any]:
    """Cost of one more decode step of 64 samples with an adapter."""
    return decode_step(make_engine(device, adapter(), max_running=64))


def by_row(device: torch.device) -> dict[str, Any]:
    """Cost of one more decode step of 64 samples with two adapters and without, by turns."""
    engine = make_engine(device, adapter(), max_running=64)
    engine.add_adapter("judge", engine.new_adapter("judge", adapter()))
    return decode_step(engine, OWN, "judge", None)


def decode_step(engine: NativeEngine, *adapters: str | None, prompt: int = 128) -> dict[str, Any]:
    """Cost of one more decode step: the difference of two calls."""
    short, long = 6, 14
    names = adapters or (OWN,)

    def call(new: int) -> Counts:
        given = enumerate(requests(8, 8, new, prompt=prompt))
        asked = [replace(one, adapter=names[i % len(names)]) for i, one in given]
        return counted(lambda: engine.generate(asked, seed=0, step=0))

    call(long)  # captures, and makes the cache of the longest
    less, more = call(short), call(long)
    step = {name: (more[name] - less.get(name, 0)) / (long - short) for name in more}
    return {
        "syncs": total(step, SYNCS),
        "launches": total(step, LAUNCHES),
        "graph_nodes": step["graph_nodes"],
        "h2d": step["h2d"],
        "d2h": step["d2h"],
        "pageable": step["pageable_h2d"] + step["pageable_d2h"],
        "illegal": more["illegal"],
    }


def capture(device: torch.device) -> dict[str, Any]:
    """Captures of a colocated step: 256 samples that end by and by, after the weights moved."""
    engine = make_engine(device, max_running=256)
    call = requests(32, 8, lambda i: 2 + i)
    engine.generate(call, seed=0, step=0)
    engine.release_graphs()
    found = counted(lambda: engine.generate(call, seed=0, step=1))
    return {
        "captures": found["capture"],
        "device_syncs": found["device_sync"],
        "frees": found["free"],
        "pool_gb": gigabytes(engine.graph_bytes()),
        "illegal": found["illegal"],
    }


def release(device: torch.device) -> dict[str, Any]:
    """Memory that is left allocated when the cache is released, before Python collects garbage."""
    engine = make_engine(device, max_running=64)
    gc.collect()
    gc.disable()
    start, start_held = torch.cuda.memory_allocated(), held_bytes()
    caches, peak = [], 0
    for prompt in (128, 640, 1200):
        torch.cuda.reset_peak_memory_stats()
        engine.generate(requests(8, 8, 4, prompt=prompt), seed=0, step=0)
        caches.append(engine.cache_bytes())
        mapped = caches[-1] if engine.keeps_cache_address else 0
        peak = max(peak, torch.cuda.max_memory_allocated() - start + mapped)
    engine.release_cache()
    engine.release_graphs()
    left = held_bytes() - start_held
    gc.collect()
    return {
        "caches_gb": [gigabytes(n) for n in caches],
        "peak_gb": gigabytes(peak),
        "left_gb": gigabytes(left),
        "left_after_gc_gb": gigabytes(held_bytes() - start_held),
    }


def held_bytes() -> int:
    """Bytes of tensors, and of what is on the device without torch's allocator: mapped memory."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated() + total - free - torch.cuda.memory_reserved()


def trained_rows(rows: int, group: int, prompt: int, response: int) -> Batch:
    length = prompt + response
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(5, 100_000, (prompt,), generator=generator).tolist()
        for _ in range(rows // group)
    ]
    tokens = [
        prompts[i // group] + torch.randint(5, 100_000, (response,), generator=generator).tolist()
        for i in range(rows)
    ]
    index = torch.arange(rows)
    batch = from_rows(
        tokens,
        rows={"prompt_ids": index // group, "prompt_lengths": torch.full((rows,), prompt)},
    )
    total_tokens = rows * length
    mask = torch.arange(total_tokens) % length >= prompt
    noise = torch.randn(total_tokens, generator=generator)
    columns = {"loss_mask": mask, "advantages": noise, "rollout_logprobs": noise - 3.0}
    return batch.with_columns(tokens=columns | {"weights": mask.float()})


def policy_loss(given: LossInput) -> Any:
    return clipped_policy_loss(
        given["logprobs"],
        given["entropy"],
        given.columns,
        given.columns["weights"],
        AlgorithmSection(),
        given.row,
    )


def make_backend(
    device: torch.device, model: ModelConfig | None = None, **changes: Any
) -> TorchBackend:
    torch_backend.fill_leaves = lambda leaves, checkpoint: None  # type: ignore[assignment]
    plain: dict[str, Any] = {"microbatch_tokens": 8192, "param_dtype": torch.bfloat16}
    options = TrainOptions(**plain, **changes, total_steps=10)
    return TorchBackend(
        Mesh("policy", [0], {}, "cuda"),
        model or large_model(),
        None,  # type: ignore[arg-type]
        options,
        device,
    )


def train(backend: TorchBackend, batch: Batch) -> None:
    normaliser = float(batch.tokens["loss_mask"].sum())
    backend.forward_backward(batch, policy_loss, next_token(), normaliser=normaliser)


def update(device: torch.device, **changes: Any) -> dict[str, Any]:
    """A second minibatch of two microbatches of 8 samples of 512 + 896 tokens, its optimizer step,
    and what is left when the backend is dropped.
    """
    start = torch.cuda.memory_allocated()
    backend = make_backend(device, **changes)
    states = torch.cuda.memory_allocated() - start
    one, two = trained_rows(8, 8, 512, 896), trained_rows(16, 8, 512, 896)

    train(backend, one)
    backend.optim_step()
    torch.cuda.reset_peak_memory_stats()
    less = counted(partial(train, backend, one))
    more = counted(partial(train, backend, two))
    step = counted(backend.optim_step)
    peak = torch.cuda.max_memory_allocated() - start
    with Bytes() as moved:
        train(backend, one)
    micro = {name: more[name] - less.get(name, 0) for name in more}
    del backend
    return {
        "states_gb": gigabytes(states),
        "peak_gb": gigabytes(peak),
        "microbatch_launches": total(micro, LAUNCHES),
        "microbatch_syncs": total(micro, SYNCS),
        "microbatch_pageable_h2d": micro["pageable_h2d"],
        "optimizer_launches": total(step, LAUNCHES),
        "optimizer_syncs": total(step, SYNCS),
        "left_gb": gigabytes(torch.cuda.memory_allocated() - start),
        "gb_by_operation": {n: gigabytes(b) for n, b in moved.by_name.most_common(24)},
        "moved_gb": gigabytes(sum(moved.by_name.values())),
        "gb_by_kernel": {n: gigabytes(b) for n, b in moved.of_kernels.most_common()},
        **elementwise(moved),
    }


def compiled(device: torch.device) -> dict[str, Any]:
    """The same with compiled layers."""
    return update(device, compile="blocks")


FIGURES = {
    "decode": decode,
    "together": together,
    "adapted": adapted,
    "by_row": by_row,
    "capture": capture,
    "release": release,
    "update": update,
    "compiled": compiled,
}


def after(owner: type, method: str, more: Callable[[Any], None]) -> None:
    """Let `more` follow every call of a method, on its object."""
    inner = getattr(owner, method)

    def outer(itself: Any, *arguments: Any, **words: Any) -> Any:
        result = inner(itself, *arguments, **words)
        more(itself)
        return result

    setattr(owner, method, outer)


def hold_oneself(runner: Runner) -> None:
    runner.itself = runner  # type: ignore[attr-defined]


def hook_that_holds(backend: TorchBackend) -> None:
    def hold(_: Tensor) -> None:
        assert backend is not None

    parameter = backend._leaves[0].parameter
    parameter.register_post_accumulate_grad_hook(hold)  # type: ignore[no-untyped-call]


FAULTS: Mapping[str, tuple[type, str, Callable[[Any], None]]] = {
    "synchronisation": (Runner, "run", lambda _: torch.cuda.synchronize()),
    "launch": (Runner, "run", lambda _: torch.zeros(1, device="cuda")),
    "cycle": (Runner, "__init__", hold_oneself),
    "hook": (TorchBackend, "__init__", hook_that_holds),
}
"""Faults of a change that the budgets must notice: a synchronisation or a launch more in
every engine step, a cycle of references that keeps the cache until garbage is collected, a hook
that keeps the whole backend.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", default=FIGURES)
    parser.add_argument("--fault", choices=FAULTS)
    words = parser.parse_args()
    if words.fault is not None:
        after(*FAULTS[words.fault])
    world = start_world(device="cuda")
    for name in words.figures:
        print(json.dumps({"figure": name, **FIGURES[name](world.device)}), flush=True)
    stop_world()
