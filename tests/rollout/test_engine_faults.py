"""Engines with planted faults: the contract of engines catches each, and names the clause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_candidates import NATIVE

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Completion, Finish
from spmdrl.rollout.rounds import by_rounds
from spmdrl.testing.engine_contract import check_engine
from spmdrl.world import World

pytestmark = pytest.mark.contract

FORGOTTEN = "layers.1.mlp.down.weight"


class IgnoresATensor(NativeEngine):
    """Computes with the first values that one tensor ever had."""

    first: torch.Tensor | None = None

    def keep_first(self) -> None:
        tensor = self.local_tensors()[FORGOTTEN][0]
        if self.first is None:
            self.first = tensor.clone()
        tensor.copy_(self.first)

    def generate(self, requests: Any, **options: Any) -> list[list[Completion]]:
        self.keep_first()
        return super().generate(requests, **options)

    def score(self, sequences: Any, **options: Any) -> list[list[float]]:
        self.keep_first()
        return super().score(sequences, **options)


class AsksItsNeighbours(NativeEngine):
    """Draws by a key that counts the requests of the call."""

    def generate(self, requests: Any, *, seed: int, **options: Any) -> list[list[Completion]]:
        return super().generate(requests, seed=seed + len(requests), **options)


class CountsItsCalls(NativeEngine):
    """Draws by a generator that moves from call to call."""

    calls = 0

    def generate(self, requests: Any, *, seed: int, **options: Any) -> list[list[Completion]]:
        self.calls += 1
        return super().generate(requests, seed=seed + self.calls, **options)


class IgnoresTheTemperature(NativeEngine):
    """Draws and reports at temperature 1."""

    def generate(self, requests: Any, **options: Any) -> list[list[Completion]]:
        plain = [
            replace(one, sampling=one.sampling.model_copy(update={"temperature": 1.0}))
            if not one.sampling.is_greedy
            else one
            for one in requests
        ]
        return super().generate(plain, **options)


class DropsTheLastToken(NativeEngine):
    """Leaves out the token that ended a sample."""

    def generate(self, requests: Any, **options: Any) -> list[list[Completion]]:
        return [
            [
                replace(c, tokens=c.tokens[:-1], logprobs=c.logprobs[:-1])
                if c.finish.text == "stop"
                else c
                for c in group
            ]
            for group in super().generate(requests, **options)
        ]


class KeepsItsCache(NativeEngine):
    """Frees nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.release_cache = lambda: None


class StoresItsOwn(NativeEngine):
    """Copies what it adopts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        take = self.adopt
        self.adopt = lambda name, tensor: take(name, tensor.clone())


class ForgetsHowFarItWas(NativeEngine):
    """Resumes an aborted call from its start, by other keys."""

    def generate(
        self, requests: Any, *, seed: int, state: Mapping[str, Any] | None = None, **options: Any
    ) -> list[list[Completion]]:
        return super().generate(requests, seed=seed + (state is not None), **options)


class ForgetsWhatItSaid(NativeEngine):
    """Draws each turn from the prompt and the last answer alone."""

    def generate(
        self, requests: Any, *, turns: Any = None, **options: Any
    ) -> list[list[Completion]]:
        def draw(asked: Any, numbers: Any, progress: Any) -> list[list[Completion]]:
            heads = {own.prompt_id: own.tokens for own in requests}
            cut = []
            for own in asked:
                head, last = heads[own.prompt_id], own.tokens[-3:]
                shorter = own.tokens if own.tokens == head else (*head, *last)
                cut.append(replace(own, tokens=shorter))
            return NativeEngine.generate(self, cut, **options)

        if turns is None:
            return super().generate(requests, **options)
        options.pop("should_stop", None)
        return by_rounds(draw, requests, turns, Lockstep(Parallel(), torch.device("cpu")))


class AnswersAnewWhatItResumes(NativeEngine):
    """Resumes a call within turns from its prompts' first turn on."""

    def generate(self, requests: Any, *, seed: int, **options: Any) -> list[list[Completion]]:
        anew = [replace(own, begun=tuple(emptied(c) for c in own.begun)) for own in requests]
        return super().generate(anew, seed=seed, **options)


def emptied(begun: Completion) -> Completion:
    if begun.finish is not Finish.ABORTED or not begun.given:
        return begun
    first = begun.given[0][0]
    return replace(
        begun,
        tokens=begun.tokens[:first],
        logprobs=begun.logprobs[:first],
        given=(),
        waits=None,
        turn_limit=4,
        parts=(),
    )


class WaitsForTheWorld(NativeEngine):
    """Ends every call with a barrier of the whole world."""

    def generate(self, requests: Any, **options: Any) -> list[list[Completion]]:
        found = super().generate(requests, **options)
        dist.barrier()
        return found


FAULTS: dict[type[NativeEngine], tuple[str, str]] = {
    IgnoresATensor: ("every loaded tensor counts", "model.layers.1.mlp.down_proj.weight"),
    AsksItsNeighbours: ("samples do not depend on neighbours", "prompt 100"),
    CountsItsCalls: ("seed step prompt and sample key the draws", "for the same keys"),
    IgnoresTheTemperature: ("logprobs are those of the trainer", "'temperature': 0.7"),
    DropsTheLastToken: ("stop texts and tokens end a sample", "stop_token_ids"),
    KeepsItsCache: ("parts leave and return", "after release_cache 0, seen"),
    StoresItsOwn: ("adopted weights are the trainers storage", "norm.weight"),
    ForgetsHowFarItWas: ("aborted calls resume", "resumed"),
    ForgetsWhatItSaid: ("turns continue the tokens that were there", "tokens of prompt"),
    AnswersAnewWhatItResumes: ("calls stopped within turns resume", "tokens stopped after"),
}
"""Engine -> a clause that does not hold, and a part of its error."""


def made(fault: type[NativeEngine]) -> Any:
    def make(model: Any, *, tp: Any, texts: Any, **options: Any) -> NativeEngine:
        given = {"block_size": 8, "keeps_aborted": True, **options}
        return fault(model, tp=tp, texts=texts, options=NativeOptions(**given))

    return make


def broken(world: World) -> dict[str, dict[str, str]]:
    """Fault -> the errors of the clauses that it breaks."""
    found = {}
    for fault, (clause, _) in FAULTS.items():
        candidate = replace(NATIVE, name=fault.__name__, make=made(fault))
        report = check_engine(candidate, world, only=[clause])
        errors = {v.clause: str(v.error) for v in report.verdicts if v.error is not None}
        found[fault.__name__] = errors
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, str]]:
    return run_ranks(broken, 1)[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_and_named(errors: dict[str, dict[str, str]], fault: Any) -> None:
    clause, words = FAULTS[fault]
    assert clause in errors[fault.__name__]
    error = errors[fault.__name__][clause]
    assert fault.__name__ in error and words in error, error


def waits(world: World) -> None:
    candidate = replace(NATIVE, make=made(WaitsForTheWorld), patience_s=3.0)
    check_engine(candidate, world, only=["ranks outside take no part"]).require()


def test_a_wait_for_ranks_outside_is_named() -> None:
    """The barrier is joined by the contract's own gathering of findings, which thus ends late."""
    with pytest.raises(AssertionError, match="it waits for a rank outside"):
        run_ranks(waits, 2)
