"""The rollout role: responses to prompts, from an engine on the role's ranks."""

from __future__ import annotations

from collections import Counter

import torch

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.minibatches import split_groups_if_few
from spmdrl.distributed.reduce import agreed
from spmdrl.distributed.row_bytes import Column
from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.routing import EXPERT_CHOICES, choices_dtype
from spmdrl.roles.calls import Call, role_method
from spmdrl.roles.generation_rows import Generation, run_generation
from spmdrl.roles.ledger import Interrupted, Stint
from spmdrl.roles.model_calls import WEIGHTS, row_order, those_in
from spmdrl.roles.turn_calls import (
    NO_TURNS,
    TURN_ROW,
    AllTurns,
    described,
    rooms,
    turn_columns,
    with_openings,
)
from spmdrl.roles.turn_metrics import turn_metrics
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import OWN, RolloutEngine
from spmdrl.training.packing import PART_START, part_bounds
from spmdrl.training.support import SUPPORT

KV_CACHE, GRAPHS = "kv_cache", "graphs"
"""Parts of an engine, as a `residency` section names them; graphs if decode steps are captured."""


class Rollout:
    """The engine: `generate(prompts, generation)` returns one row per sample.

    Args:
        memory: memory moves of this rank.
        parts: the parts that a call needs on the device.
        turns: the turns that samples take; without any a sample has one.

    `version` is the policy's at the engine's last sync: the number of its optimizer steps.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        model: ModelConfig,
        engine: RolloutEngine | None,
        memory: CallMemory | None = None,
        parts: tuple[str, ...] = (WEIGHTS, KV_CACHE),
        turns: AllTurns = NO_TURNS,
    ) -> None:
        self.turns, self._turn_counts = turns, Counter[str]()
        self._turn_sums: dict[str, float] = {}
        self.name, self.mesh, self.model = name, mesh, model
        self.engine, self.memory = engine, memory
        self.parts, self.version = parts, 0

    def add_adapter(self, name: str, adapter: Adapter, values: TensorSource) -> None:
        """Let the engine apply another adapter of its base, which `Generation.adapters` can name.

        Every rank of the world calls it. No engine has the adapter if it is refused on a rank.

        Args:
            values: its tensors, as `open_adapter` reads them from a file.

        Raises:
            ValueError: the engine does not hold the base apart from the policy's adapter, or the
                values do not fit; on every rank.
        """
        engine = self.engine

        def filled() -> AdapterWeights | None:
            if engine is None:
                return None
            if not isinstance(engine, NativeEngine):
                raise ValueError(f"adapter {name!r}: only rollout.engine=native applies several")
            made = engine.new_adapter(name, adapter)
            tables = made.tables()
            fill(((p.data, tables[local]) for local, p in made.named_parameters()), values)
            return made

        weights = agreed(ValueError, filled)
        if weights is not None and isinstance(engine, NativeEngine):
            engine.add_adapter(name, weights)

    def turn_metrics(self, batch: Batch) -> dict[str, float]:
        """Metrics of a step's rows that took turns (`turn_metrics`), with what was counted while
        they were answered since the last time; none without turns. Every rank calls it.
        """
        counts, self._turn_counts = self._turn_counts, Counter()
        sums, self._turn_sums = self._turn_sums, {}
        return turn_metrics(batch, counts, sums) if self.turns else {}

    @role_method
    def logprobs(
        self, batch: Batch, temperature: float = 1.0, *, adapter: str | None = OWN
    ) -> Call[Batch]:
        """Adds the token column `engine_logprobs`: each token's log-probability under this engine's
        softmax of logits / temperature, given the tokens before it (0 for the first, and for that
        of each part of a row).

        Args:
            adapter: see `Generation.adapters`.
        """
        named = {} if adapter == OWN else {"adapter": adapter}

        def compute(rows: Batch, stint: Stint) -> Batch:
            assert self.engine is not None, f"role {self.name!r} has no engine on this rank"
            lengths = [stop - first for own in part_bounds(rows) for first, stop in own]
            sequences = torch.split(rows["tokens"], lengths)
            rows_of = [tuple(sequence.tolist()) for sequence in sequences]
            if adapter == OWN:
                scored = self.engine.score(rows_of, temperature=temperature)
            else:
                adapters = [adapter] * len(rows_of)
                scored = self.engine.score(rows_of, temperature=temperature, adapters=adapters)
            flat = [value for values in scored for value in (0.0, *values)]
            column = torch.tensor(flat, dtype=torch.float32)
            return Batch(lengths=rows.lengths, tokens={"engine_logprobs": column})

        return Call(
            role=self,
            method="logprobs",
            batch=batch,
            needs=("tokens", *those_in(batch, (PART_START,))),
            returns=(Column(name="engine_logprobs"),),
            compute=compute,
            finish=lambda home: home,
            uses=tuple((self.name, part) for part in self.parts),
            order=row_order(batch),
            settings={"temperature": temperature, **named},
        )

    @role_method
    def generate(self, prompts: Batch, generation: Generation) -> Call[Batch]:
        """Generate `group_size` rows of prompt and response for each prompt.

        `prompts` are home rows with the token column `tokens` and the row column `prompt_ids`
        (unique in the step). Results have the token columns `tokens`, `rollout_logprobs` and
        `loss_mask`, the row columns `prompt_ids`, `sample_index`, `prompt_lengths`,
        `response_lengths`, `finish` (a `Finish`) and `weight_version`; with
        `sampling.experts` and `.margins` also the token columns `expert_choices` and `margins`,
        with `sampling.support` the ragged column `support_ids`. The prompts' own row and Python
        columns are repeated for every sample.

        Where samples take turns, their prompts are those that environments begin with; results also
        have the token column `turn_rewards`, the row columns `num_turns` and `turn_end`, and the
        conversation's messages in the ragged column `turn_messages` and the Python column `opening`
        (`turn_calls`), and `loss_mask` and `response_lengths` are of sampled tokens alone. With
        `rollout.turns.history: rendered` the token column `part_start` marks where a context begins
        that is not what was there (`training.packing`).
        """
        if self.turns:
            prompts = with_openings(prompts, self.turns)
        size = generation.group_size * len(generation.adapters)
        repeated = prompts.select(torch.arange(len(prompts)).repeat_interleave(size))
        samples = torch.arange(size).repeat(len(prompts))
        batch = repeated.with_columns(rows={"sample_index": samples})
        version = self.version
        experts = _expert_column(self.model) if generation.sampling.experts else ()

        def compute(rows: Batch, stint: Stint) -> Batch | Interrupted:
            assert self.engine is not None, f"role {self.name!r} has no engine on this rank"
            done = run_generation(self.engine, rows, generation, self.turns, experts, stint)
            for own in self.turns.values():
                self._turn_counts.update(own.counts())
                for name, value in own.metrics().items():
                    self._turn_sums[name] = self._turn_sums.get(name, 0.0) + value
            if isinstance(done, Interrupted):
                return done
            return done.with_columns(rows={"weight_version": torch.full((len(rows),), version)})

        def finish(home: Batch) -> Batch:
            return home.with_columns(rows=batch.rows, objects=batch.objects)

        return Call(
            role=self,
            method="generate",
            batch=batch,
            needs=("tokens", "prompt_ids", "sample_index", *[TURN_ROW] * bool(self.turns)),
            returns=_columns(generation, experts, self.turns),
            compute=compute,
            finish=finish,
            uses=tuple((self.name, part) for part in self.parts),
            cost=batch.lengths + rooms(batch, self.turns, generation.sampling.max_tokens),
            atom=batch["prompt_ids"],
            order=row_order(batch),
            arrange=split_groups_if_few,
            settings={**generation.settings(), **described(self.turns)},
        )


def _columns(
    generation: Generation, experts: tuple[Column, ...], turns: AllTurns
) -> tuple[Column, ...]:
    """Columns that come home from a call."""
    return (
        Column(name="tokens", dtype=torch.int64),
        Column(name="rollout_logprobs"),
        Column(name="loss_mask", dtype=torch.bool),
        *[Column(name="margins")] * generation.sampling.margins,
        *[Column(name=SUPPORT, kind="ragged", dtype=torch.int32)] * generation.sampling.support,
        Column(name="prompt_lengths", kind="row", dtype=torch.int64),
        Column(name="response_lengths", kind="row", dtype=torch.int64),
        Column(name="finish", kind="row", dtype=torch.int64),
        Column(name="weight_version", kind="row", dtype=torch.int64),
        *experts,
        *turn_columns(turns),
    )


def _expert_column(model: ModelConfig) -> tuple[Column, ...]:
    """The column `expert_choices`; ValueError for a model without experts."""
    moe = model.moe
    if moe is None:
        raise ValueError(f"sampling.experts: {model.architecture} has no experts to record")
    dtype, shape = choices_dtype(moe.num_experts), (len(model.moe_layers), moe.top_k)
    return (Column(name=EXPERT_CHOICES, dtype=dtype, shape=shape),)
