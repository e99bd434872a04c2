"""vLLM keeps the contract of engines, in one process; and it leaves the process as it was."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_candidates import VLLM, errors_of

from harness import run_ranks
from spmdrl.testing.clause import Clause, Findings, same
from spmdrl.testing.engine_contract import ENGINE_CLAUSES, check_engine
from spmdrl.testing.engine_models import prompts_of, request
from spmdrl.testing.engine_subject import EngineSubject, generate, refused
from spmdrl.world import World
from sweeps import asked, swept
from vllm_cases import needs_vllm

pytestmark = pytest.mark.contract

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


def the_process_is_as_it_was(subject: EngineSubject) -> Findings:
    """After vLLM was made, after it was used, and after it was closed."""
    subject.engine("Mistral")  # transformers draws random numbers for the model
    subject.close()
    before = process_state()
    asked = [request(prompts_of(20)[0], 0, 2, max_tokens=5)]
    steps = {
        "made": lambda: subject.engine("Mistral"),
        "used": lambda: generate(subject.engine("Mistral"), asked),
        "scored": lambda: subject.engine("Mistral").score([(7, 8, 9)]),
        "closed": subject.close,
    }
    for name, step in steps.items():
        step()
        after = process_state()
        changed = [key for key in before if before[key] != after[key]]
        yield from same(f"changes of the process after it was {name}", changed, [])


def what_vllm_does_otherwise_is_refused(subject: EngineSubject) -> Findings:
    """Options of sampling that it lacks are refused by their keys."""
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"margins": True}, ("sampling.margins=True",)),
        ({"temperature": 0.001}, ("sampling.temperature=0.001", "at least 0.01")),
        ({"min_p": 0.1, "top_p": 0.9}, ("sampling.min_p=0.1 with top_p=0.9",)),
    ]
    for sampling, words in cases:
        asked = [request(prompts_of(3)[0], 0, max_tokens=9, **sampling)]
        yield from refused(partial(generate, subject.engine(), asked), *words)


def clauses() -> list[Clause[EngineSubject]]:
    own = [the_process_is_as_it_was, what_vllm_does_otherwise_is_refused]
    first, last = (Clause(name=check.__name__.replace("_", " "), check=check) for check in own)
    return [first, *ENGINE_CLAUSES, last]


def verdicts(world: World, names: Sequence[str] = ()) -> dict[str, str | None]:
    torch.set_num_threads(1)
    found = errors_of(check_engine(VLLM, world, only=names, clauses=clauses()))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert float(total) == world.size, "the trainer's process group is gone"
    return found


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, str | None]:
    [found] = run_ranks(verdicts, 1, sorted(asked(request, "name")), timeout_s=400)
    return found


SLOW = (
    "greedy tokens are those of transformers",
    "samples do not depend on neighbours",
    "stop requests abort what is open",
    "aborted calls resume",
    "slices are those of the name space",
    "every loaded tensor counts",
)
"""Clauses that make engines of several models or with options of their own."""

NAMES = [c.name for c in clauses() if c.needs in (None, "turns")]


@needs_vllm
@pytest.mark.parametrize("name", swept(NAMES, [name for name in NAMES if name not in SLOW]))
def test_vllm_keeps_the_contract(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None


@needs_vllm
@pytest.mark.full
def test_vllm_keeps_the_contract_as_tp2() -> None:
    for found in run_ranks(verdicts, 2, timeout_s=600):
        assert [error for error in found.values() if error is not None] == []
