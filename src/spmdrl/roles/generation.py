"""The rollout role: responses to prompts, from an engine on the role's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from spmdrl.batch import Batch, Ragged, from_rows
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.minibatches import split_groups_if_few
from spmdrl.distributed.reduce import agreed
from spmdrl.distributed.row_bytes import Column
from spmdrl.keyed_random import NOISE_VERSION
from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.routing import EXPERT_CHOICES, choices_dtype
from spmdrl.roles.calls import Call, role_method
from spmdrl.roles.kept import PartialResult
from spmdrl.roles.ledger import Interrupted, Stint
from spmdrl.roles.model_calls import WEIGHTS, row_order
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import (
    OWN,
    Completion,
    Finish,
    Request,
    RolloutEngine,
    SamplingParams,
)
from spmdrl.training.support import SUPPORT

KV_CACHE, GRAPHS = "kv_cache", "graphs"
"""Parts of an engine, as a `residency` section names them; graphs if decode steps are captured."""

_NOTHING = Completion(tokens=(), logprobs=(), finish=Finish.ABORTED)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sampling of a rollout: `group_size` responses per prompt, keyed by (seed, step, prompt).

    Args:
        adapters: the adapters that each prompt is answered with, `group_size` times each: the
            policy's (`OWN`), None for the base alone, or names of `Rollout.add_adapter`. Sample
            `i` has the adapter `i // group_size`.
    """

    seed: int
    step: int
    group_size: int
    sampling: SamplingParams
    adapters: tuple[str | None, ...] = field(default=(OWN,), repr=False)

    def adapter_of(self, sample: int) -> str | None:
        """Return the adapter of the sample with this index."""
        return self.adapters[sample // self.group_size]

    def settings(self) -> Mapping[str, Any]:
        """Return the values that identify the call's configuration."""
        named = {} if self.adapters == (OWN,) else {"adapters": self.adapters}
        return {"generation": self, "noise": NOISE_VERSION, **named}


class Rollout:
    """The engine: `generate(prompts, generation)` returns one row per sample.

    Args:
        memory: memory moves of this rank.
        parts: the parts that a call needs on the device.

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
    ) -> None:
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

    @role_method
    def logprobs(
        self, batch: Batch, temperature: float = 1.0, *, adapter: str | None = OWN
    ) -> Call[Batch]:
        """Adds the token column `engine_logprobs`: each token's log-probability under this engine's
        softmax of logits / temperature, given the tokens before it (0 for the first).

        Args:
            adapter: see `Generation.adapters`.
        """
        named = {} if adapter == OWN else {"adapter": adapter}

        def compute(rows: Batch, stint: Stint) -> Batch:
            assert self.engine is not None, f"role {self.name!r} has no engine on this rank"
            sequences = torch.split(rows["tokens"], rows.lengths.tolist())
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
            needs=("tokens",),
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
        """
        size = generation.group_size * len(generation.adapters)
        repeated = prompts.select(torch.arange(len(prompts)).repeat_interleave(size))
        samples = torch.arange(size).repeat(len(prompts))
        batch = repeated.with_columns(rows={"sample_index": samples})
        version = self.version
        experts = _expert_column(self.model) if generation.sampling.experts else ()

        def compute(rows: Batch, stint: Stint) -> Batch | Interrupted:
            assert self.engine is not None, f"role {self.name!r} has no engine on this rank"
            done = _run_generation(self.engine, rows, generation, experts, stint)
            if isinstance(done, Interrupted):
                return done
            return done.with_columns(rows={"weight_version": torch.full((len(rows),), version)})

        def finish(home: Batch) -> Batch:
            return home.with_columns(rows=batch.rows, objects=batch.objects)

        return Call(
            role=self,
            method="generate",
            batch=batch,
            needs=("tokens", "prompt_ids", "sample_index"),
            returns=(
                Column(name="tokens", dtype=torch.int64),
                Column(name="rollout_logprobs"),
                Column(name="loss_mask", dtype=torch.bool),
                *[Column(name="margins")] * generation.sampling.margins,
                *[Column(name=SUPPORT, kind="ragged", dtype=torch.int32)]
                * generation.sampling.support,
                Column(name="prompt_lengths", kind="row", dtype=torch.int64),
                Column(name="response_lengths", kind="row", dtype=torch.int64),
                Column(name="finish", kind="row", dtype=torch.int64),
                Column(name="weight_version", kind="row", dtype=torch.int64),
                *experts,
            ),
            compute=compute,
            finish=finish,
            uses=tuple((self.name, part) for part in self.parts),
            cost=batch.lengths + generation.sampling.max_tokens,
            atom=batch["prompt_ids"],
            order=row_order(batch),
            arrange=split_groups_if_few,
            settings=generation.settings(),
        )


def _expert_column(model: ModelConfig) -> tuple[Column, ...]:
    """The column `expert_choices`; ValueError for a model without experts."""
    moe = model.moe
    if moe is None:
        raise ValueError(f"sampling.experts: {model.architecture} has no experts to record")
    dtype, shape = choices_dtype(moe.num_experts), (len(model.moe_layers), moe.top_k)
    return (Column(name=EXPERT_CHOICES, dtype=dtype, shape=shape),)


def _run_generation(
    engine: RolloutEngine,
    rows: Batch,
    generation: Generation,
    experts: tuple[Column, ...],
    stint: Stint,
) -> Batch | Interrupted:
    """Generate for this replica's rows; rows of one prompt and adapter become one request."""
    sequences = torch.split(rows["tokens"], rows.lengths.tolist())
    samples = rows["sample_index"].tolist()
    places: dict[tuple[int, str | None], list[int]] = {}
    for row, prompt_id in enumerate(rows["prompt_ids"].tolist()):
        places.setdefault((prompt_id, generation.adapter_of(samples[row])), []).append(row)
    begun = {} if stint.begun is None else _begun(stint.begun)
    requests = [
        Request(
            tokens=tuple(sequences[group[0]].tolist()),
            prompt_id=prompt_id,
            samples=tuple(samples[row] for row in group),
            sampling=generation.sampling,
            begun=tuple(begun.get((prompt_id, samples[row]), _NOTHING) for row in group)
            if begun
            else (),
            adapter=adapter,
        )
        for (prompt_id, adapter), group in places.items()
    ]

    def report(num_tokens: int, num_done: int) -> None:
        stint.beat()
        stint.report(num_done, len(rows))

    generated = engine.generate(
        requests,
        seed=generation.seed,
        step=generation.step,
        progress=report,
        should_stop=stint.should_stop,
        state=None if stint.begun is None else stint.begun.state,
    )
    by_row: dict[int, Completion] = {}
    for group, completions in zip(places.values(), generated, strict=True):
        by_row.update(zip(group, completions, strict=True))
    completions = [by_row[row] for row in range(len(rows))]
    batch = _completed(rows, completions, with_margins=generation.sampling.margins)
    if generation.sampling.support:
        batch = batch.with_columns(ragged={SUPPORT: _supports(rows, completions)})
    for column in experts:
        none = torch.empty((0, *column.shape), dtype=column.dtype)
        chosen = [c.experts for c in completions if c.experts is not None]
        if len(chosen) < len(completions):
            raise ValueError(
                "algorithm.routing_replay=true, but the rollout's engine records no experts: set "
                "rollout.engine=native, or the other to false"
            )
        batch = batch.with_columns(tokens={column.name: torch.cat([none, *chosen])})
    if any(completion.finish is Finish.ABORTED for completion in completions):
        return Interrupted(part=PartialResult(rows=batch, state=engine.aborted_state()))
    return batch


def _begun(part: PartialResult) -> dict[tuple[int, int], Completion]:
    """(prompt id, sample) -> the tokens that a stopped call has drawn of it."""
    if part.rows is None:
        return {}
    found = {}
    for row in part.rows.split_rows():
        mask = row["loss_mask"]
        key = int(row["prompt_ids"]), int(row["sample_index"])
        found[key] = Completion(
            tokens=tuple(row["tokens"][mask].tolist()),
            logprobs=tuple(row["rollout_logprobs"][mask].tolist()),
            finish=Finish(int(row["finish"])),
            margins=tuple(row["margins"][mask].tolist()) if "margins" in row else (),
            experts=row.tokens.get(EXPERT_CHOICES),
            support=row.ragged[SUPPORT].select(mask.nonzero().flatten())
            if SUPPORT in row.ragged
            else None,
        )
    return found


def _supports(prompts: Batch, completions: list[Completion]) -> Ragged:
    """The tokens that each token was drawn from; none for a prompt's tokens."""
    counts, values = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int32)]
    for length, completion in zip(prompts.lengths.tolist(), completions, strict=True):
        if completion.support is None:
            raise ValueError("sampling.support=True, but the rollout's engine records no tokens")
        counts += [torch.zeros(length, dtype=torch.int32), completion.support.counts]
        values.append(completion.support.values)
    return Ragged(counts=torch.cat(counts), values=torch.cat(values))


def _completed(prompts: Batch, completions: list[Completion], *, with_margins: bool) -> Batch:
    sequences, logprobs, masks, margins = [], [], [], []
    for prompt, completion in zip(
        torch.split(prompts["tokens"], prompts.lengths.tolist()), completions, strict=True
    ):
        zeros = [0.0] * len(prompt)
        sequences.append([*prompt.tolist(), *completion.tokens])
        logprobs += [*zeros, *completion.logprobs]
        masks += [False] * len(prompt) + [True] * len(completion.tokens)
        margins += [*zeros, *completion.margins]
    counts = torch.tensor([len(c.tokens) for c in completions], dtype=torch.int64)
    batch = from_rows(sequences)
    asked = {"margins": torch.tensor(margins, dtype=torch.float32)} if with_margins else {}
    return replace(
        batch,
        tokens={
            **batch.tokens,
            **asked,
            "rollout_logprobs": torch.tensor(logprobs, dtype=torch.float32),
            "loss_mask": torch.tensor(masks, dtype=torch.bool),
        },
        rows={
            "prompt_lengths": prompts.lengths,
            "response_lengths": counts,
            "finish": torch.tensor([c.finish for c in completions], dtype=torch.int64),
            # identifies the rows if the call is stopped
            "prompt_ids": prompts["prompt_ids"],
            "sample_index": prompts["sample_index"],
        },
    )
