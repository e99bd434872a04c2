"""`EngineCandidate`: an engine that is held to the contract. `EngineSubject`: it on these ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.mesh import format_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.models.local_shards import LocalTensors, Table
from spmdrl.rollout.protocol import Completion, Request, RolloutEngine
from spmdrl.testing.clause import Finding, Findings
from spmdrl.testing.engine_models import SIZES, StateDict, spell, tiny_model, trainer_decoder
from spmdrl.weights.layout import model_layout
from spmdrl.world import World

SEED, STEP = 11, 2
"""Keys of the draws, where a clause does not choose its own."""

BOUND = 1e-4
"""Largest difference of log-probabilities in float32, in nats, that is rounding."""

EngineFeature = Literal["ranks_of_its_own", "resumed_calls", "freed_caches", "turns"]
"""Abilities that an engine may lack: to be made on some of the world's ranks only; to resume an
aborted call from its own state, bit for bit; to free its cache without its weights; to take turns
(`generate` then has the keyword `turns`, a `Turns` or None)."""


class MakeEngine(Protocol):
    """Function that makes an engine without weights, on the CPU in float32."""

    def __call__(
        self, model: ModelConfig, *, tp: Parallel, texts: TokenTexts, **options: Any
    ) -> RolloutEngine:
        """Make the engine of this rank of the group `tp`.

        Args:
            texts: texts of tokens, for stop texts.
            options: keys of the configuration's section `rollout`.
        """


@dataclass(frozen=True, kw_only=True)
class EngineCandidate:
    """A rollout engine that is held to the contract.

    Args:
        name: its name in reports.
        make: makes one; it is closed before the next is made.
        vocab_multiple: it pads the rows of the vocabulary to a multiple of this.
        lacks: abilities that it does not have.
        patience_s: seconds after which a call that waits for other ranks counts as hanging.
    """

    name: str
    make: MakeEngine
    vocab_multiple: int = 1
    lacks: frozenset[EngineFeature] = frozenset()
    patience_s: float = 30.0


class EngineSubject:
    """A candidate on all ranks of the world as one tensor-parallel group.

    Every rank runs every clause. An engine is used again where the next clause asks for the same
    one, with weights that are loaded anew.
    """

    def __init__(self, candidate: EngineCandidate, world: World) -> None:
        self.candidate, self.world = candidate, world
        group = dist.group.WORLD if world.size > 1 else None
        self.tp = Parallel(group=group, rank=world.rank, size=world.size)
        self.texts = TokenTexts(decode=spell, decode_all=spell)
        self._models: dict[str, tuple[ModelConfig, StateDict]] = {}
        self._engine: RolloutEngine | None = None
        self._asked: object = None
        self._held: LocalTensors = {}

    def has(self, feature: str) -> bool:
        return feature not in self.candidate.lacks

    def describe(self) -> str:
        ranks = format_ranks(range(self.world.size))
        return f"{self.candidate.name} on ranks {ranks}: tp={self.tp.size}"

    def model(self, name: str = "Llama") -> tuple[ModelConfig, StateDict]:
        """Return the tiny model of an architecture, made once."""
        if name not in self._models:
            self._models[name] = tiny_model(name, **SIZES)
        return self._models[name]

    def decoder(self, name: str = "Llama") -> Decoder:
        """Make the trainer's module of a model."""
        return trainer_decoder(*self.model(name))

    def table(self, name: str = "Llama") -> Table:
        """Return this rank's tensors as the sync's plan expects them of a rollout."""
        layout = model_layout(
            self.model(name)[0],
            range(self.tp.size),
            {"dp_replicate": 1, "tp": self.tp.size},
            torch.float32,
            vocab_multiple=self.candidate.vocab_multiple,
        )
        return layout[self.tp.rank]

    def engine(self, name: str = "Llama", **options: Any) -> RolloutEngine:
        """Return an engine of that model with its weights, and these options of `rollout`."""
        model, source = self.model(name)
        if self._engine is None or self._asked != (name, options):
            self.close()
            self._engine = self.candidate.make(model, tp=self.tp, texts=self.texts, **options)
            self._asked = (name, options)
            self._held = {
                local: (self._engine.allocate(local), held.slices)
                for local, held in self.table(name).items()
            }
        self.load(source)
        return self._engine

    @property
    def held(self) -> LocalTensors:
        """The tensors that `allocate` gave: what a sync writes into."""
        return self._held

    def load(self, source: TensorSource) -> None:
        """Write weights into the engine, as a sync does: in place, without a word to it."""
        fill(self._held.values(), source)

    def close(self) -> None:
        """End the engine; the next one is made anew."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._asked = None
        self._held = {}


def generate(
    engine: RolloutEngine, asked: Sequence[Request], **options: Any
) -> list[list[Completion]]:
    """Generate with the contract's seed and step."""
    return engine.generate(asked, seed=SEED, step=STEP, **options)


def tokens_of(found: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    """Return the tokens by request and sample."""
    return [[completion.tokens for completion in group] for group in found]


def scores_by(engine: RolloutEngine, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the engine's scores of all rows, one after the other."""
    return torch.tensor([value for row in engine.score(rows) for value in row])


def stop_after(count: int) -> Callable[[], bool]:
    """Make a `should_stop` that is True from the `count`-th question on."""
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(0)
        return len(asked) >= count

    return should_stop


def expect(holds: bool, expected: str, seen: str) -> Findings:
    """Find a fact that does not hold."""
    if not holds:
        yield Finding(expected=expected, seen=seen)


def refused(call: Callable[[], object], *words: str) -> Findings:
    """Find that a call raises no ValueError, or one whose text lacks one of the words."""
    named = f"a refusal that names {', '.join(map(repr, words))}"
    try:
        call()
    except ValueError as error:
        lacking = [word for word in words if word not in str(error)]
        yield from expect(not lacking, named, repr(str(error)))
    else:
        yield Finding(expected=named, seen="none")
