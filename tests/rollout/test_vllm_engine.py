"""The contract of engines with vLLM, in one process; and that it leaves the process as it was."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from typing import Any

import contract
import numpy as np
import pytest
import torch
import torch.distributed as dist
from rollout_models import prompts_of, request, spell

from harness import run_ranks
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.rollout.vllm_engine import VllmEngine
from spmdrl.world import World
from vllm_cases import make_vllm, needs_vllm

PATCHED = ((torch, "Event"), (torch, "set_num_threads"), (torch.Tensor, "pin_memory"))
"""Some of what vLLM replaces on a CPU."""


def process_state() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "functions": [getattr(space, name) for space, name in PATCHED],
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": np.random.get_state()[1].tolist(),
        "frozen objects": gc.get_freeze_count(),
        "default group": dist.get_world_size(),
    }


class Engines:
    """A maker of engines: one at a time, made again only where another one is asked for."""

    def __init__(self) -> None:
        self._asked: object = None
        self._models: dict[str, Any] = {}
        self.engine: VllmEngine | None = None

    def __call__(self, name: str = "Llama", **options: Any) -> VllmEngine:
        if name not in self._models:
            self._models[name] = contract.model(name)
        config, source = self._models[name]
        if self._asked != (name, options):
            self.close()
            self.engine = make_vllm(
                config, source, texts=TokenTexts(decode=spell, decode_all=spell), **options
            )
            self._asked = (name, options)
        assert self.engine is not None
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = self._asked = None


def checks(world: World) -> dict[str, str | None]:
    """What went wrong, by check."""
    torch.set_num_threads(1)
    engines = Engines()
    results: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(engines)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
    engines.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert float(total) == world.size, "the trainer's process group is gone"
    return results


def the_process_is_as_it_was(make: contract.Maker) -> None:
    """After vLLM was made, after it was used, and after it was closed."""
    make("Mistral")  # transformers draws random numbers for the model
    make.close()
    before = process_state()
    asked = [request(prompts_of(20)[0], 0, 2, max_tokens=5)]
    steps = [
        lambda: make("Mistral"),
        lambda: contract.generate(make("Mistral"), asked),
        lambda: make("Mistral").score([(7, 8, 9)]),
        make.close,
    ]
    for number, step in enumerate(steps):
        step()
        after = process_state()
        assert before == after, (number, [key for key in before if before[key] != after[key]])


def what_vllm_does_otherwise_is_refused(make: contract.Maker) -> None:
    cases = [
        ({"margins": True}, r"sampling\.margins=True"),
        ({"temperature": 0.001}, r"sampling.temperature=0.001.*at least 0.01"),
        ({"min_p": 0.1, "top_p": 0.9}, r"sampling.min_p=0.1 with top_p=0.9"),
    ]
    for sampling, message in cases:
        with pytest.raises(ValueError, match=message):
            contract.generate(make(), [request(prompts_of(3)[0], 0, max_tokens=9, **sampling)])


CHECKS = {
    "the_process_is_as_it_was": the_process_is_as_it_was,
    **contract.CHECKS,
    "what_vllm_does_otherwise_is_refused": what_vllm_does_otherwise_is_refused,
}


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, str | None]]:
    [found] = run_ranks(checks, 1, timeout_s=400)
    yield found


@needs_vllm
@pytest.mark.parametrize("name", CHECKS)
def test_contract(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]
