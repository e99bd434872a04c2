"""Tiny models with lively weights, rows of tokens, and losses, for contracts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch, from_rows
from spmdrl.models.adapters import Adapter, adapter_shapes, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.files.hf import RandomCheckpoint, TensorSource, random_tensor
from spmdrl.models.sharding import SCORE, buffer_names, global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.training.packing import PART_START
from spmdrl.training.protocol import LossInput

VOCAB = 98
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def tiny_config(kind: str = "Qwen3ForCausalLM", **changes: Any) -> ModelConfig:
    """Make the configuration of a tiny model; `changes` are keys of its config.json."""
    sizes = {
        "architectures": [kind],
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": None,
    }
    return parse_config({**sizes, **changes})


def tiny_experts(**changes: Any) -> ModelConfig:
    """Make the configuration of a tiny mixture of experts."""
    return tiny_config("Qwen3MoeForCausalLM", **EXPERTS, **changes)


class LivelyCheckpoint:
    """Random weights ten times those of `RandomCheckpoint`, norms too: far from uniform logits."""

    def __init__(self, model: ModelConfig, seed: int = 0) -> None:
        self._plain = RandomCheckpoint(model, seed)
        self.names, self.shape = self._plain.names, self._plain.shape

    def read(self, part: Slice) -> Tensor:
        values = self._plain.read(part)
        if part.name.endswith("norm.weight"):
            return values + 0.3 * torch.arange(part.start[0], part.stop[0]).sin()
        return values * 10


class WithAdded:
    """A model's lively weights, and random values of an adapter and of a scalar head.

    Args:
        seed: that of the adapter and the head; the model's weights are the same for any.
        base: the model's weights, by default a `LivelyCheckpoint`.
    """

    def __init__(
        self,
        model: ModelConfig,
        adapter: Adapter | None = None,
        *,
        seed: int = 0,
        base: TensorSource | None = None,
    ) -> None:
        self._base = LivelyCheckpoint(model) if base is None else base
        self._shapes = {} if adapter is None else adapter_shapes(model, adapter)
        self._shapes[SCORE] = (1, model.hidden_size)
        self._seed = seed
        self.names = self._base.names | set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._base.shape(name)

    def read(self, part: Slice) -> Tensor:
        if part.name not in self._shapes:
            return self._base.read(part)
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return self.whole(part.name)[box]

    def whole(self, name: str) -> Tensor:
        """Return an adapter's tensor, or the scalar head."""
        return random_tensor(name, self._shapes[name], self._seed) * 10


def tiny_adapter(model: ModelConfig, *targets: str, **given: Any) -> Adapter:
    """Make an adapter of all matrices, or of `targets`, with a rank that no degree divides."""
    names = find_targets(model, targets or ("all",))
    return make_adapter(names, **{"rank": 3, "alpha": 4.5, **given})


def trained_shapes(
    model: ModelConfig, head: Any, adapter: Adapter | None
) -> dict[str, tuple[int, ...]]:
    """Return the global shapes of what trains: all weights, or an adapter and a scalar head."""
    if adapter is None:
        whole = global_shapes(model, head)
        return {name: shape for name, shape in whole.items() if name not in buffer_names(model)}
    added = dict(adapter_shapes(model, adapter))
    return added | ({SCORE: (1, model.hidden_size)} if head == "score" else {})


def make_rows(
    prompts: list[int], samples: int, *, seed: int = 0, longest: int = 12, seconds: bool = False
) -> Batch:
    """Make `samples` rows for each prompt length, with the token column `weight`.

    Args:
        longest: tokens of the longest response.
        seconds: whether to add a loss mask that leaves out every third token of the response.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=generator).tolist()

    sequences, lengths, ids, sample_index = [], [], [], []
    for i, prompt_length in enumerate(prompts):
        prompt = draw(prompt_length)
        for sample in range(samples):
            response = int(torch.randint(1, longest + 1, (1,), generator=generator))
            sequences.append(prompt + draw(response))
            lengths.append(prompt_length)
            ids.append(100 + i)
            sample_index.append(sample)
    batch = from_rows(
        sequences,
        rows={
            "prompt_lengths": torch.tensor(lengths, dtype=torch.int64),
            "prompt_ids": torch.tensor(ids, dtype=torch.int64),
            "sample_index": torch.tensor(sample_index, dtype=torch.int64),
        },
    )
    columns = {"weight": torch.randn(batch.num_tokens, generator=generator)}
    if seconds:
        place = torch.cat([torch.arange(n) for n in batch.lengths.tolist()])
        prompt_of = batch["prompt_lengths"].repeat_interleave(batch.lengths)
        columns["loss_mask"] = (place >= prompt_of) & (place % 3 != 2)
    return batch.with_columns(tokens=columns)


def in_parts(batch: Batch) -> Batch:
    """Let a part begin at the second token of each response of at least three, without loss."""
    prompts, starts = batch["prompt_lengths"], batch.offsets()[:-1]
    begins = torch.zeros(batch.num_tokens, dtype=torch.bool)
    begins[(starts + prompts + 1)[batch.lengths - prompts > 2]] = True
    place = torch.arange(batch.num_tokens) - starts.repeat_interleave(batch.lengths)
    mask = (place >= prompts.repeat_interleave(batch.lengths)) & ~begins
    return batch.with_columns(tokens={PART_START: begins, "loss_mask": mask})


def with_loss_shares(batch: Batch) -> Batch:
    """Add the row column that the balance loss of experts needs."""
    return batch.with_columns(rows={"loss_share": (batch["sample_index"] + 1).double()})


def loss_fn(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss that is not linear in logprobs, and has an entropy term."""
    weight = given.columns["weight"]
    assert len(given.rows["prompt_ids"]) == given.num_rows
    ratio = (given["logprobs"] - given["logprobs"].detach()).exp()
    terms = weight * ratio + 0.1 * given["logprobs"].square() - 0.05 * given["entropy"]
    metrics = {
        "tokens": torch.tensor(float(len(weight)), dtype=torch.float64),
        "entropy": given["entropy"].detach().double().sum(),
        "weight_max": weight.abs().max().double() if len(weight) else torch.tensor(0.0).double(),
    }
    return terms.sum(), metrics


def value_loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss of values that is not linear in them."""
    terms = given.columns["weight"] * given["values"].square() + 0.3 * given["values"]
    return terms.sum(), {"tokens": torch.tensor(float(len(terms))).double()}


def score_loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss of rows' scores that is not linear in them."""
    terms = given["scores"].square() + 0.3 * given["scores"]
    return terms.sum(), {"rows": torch.tensor(float(len(terms))).double()}


def linear_loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss that is linear in the column `weight`."""
    return (given.columns["weight"] * given["logprobs"]).sum(), {}


def without_signal(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `loss_fn` times 0, as where all rewards of a group are equal."""
    loss, metrics = loss_fn(given)
    return loss * 0.0, metrics


def not_finite(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss whose gradient is not a number."""
    return given["logprobs"].sum() * float("nan"), {}


def without_column(batch: Batch, name: str) -> Batch:
    """Return the batch without a row column."""
    return replace(batch, rows={n: c for n, c in batch.rows.items() if n != name})
