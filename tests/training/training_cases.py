"""A tiny model, rows, a loss, and log-probabilities computed row by row without any packing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.batch import Batch, from_rows
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.models.sharding import Slice
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LossInput

VOCAB = 98


def tiny_config(kind: str = "Qwen3ForCausalLM", **changes: Any) -> ModelConfig:
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


class LivelyCheckpoint:
    """Random weights ten times those of `RandomCheckpoint`, norms too: far from uniform logits."""

    def __init__(self, model: ModelConfig) -> None:
        self._plain = RandomCheckpoint(model, 0)
        self.names, self.shape = self._plain.names, self._plain.shape

    def read(self, part: Slice) -> Tensor:
        values = self._plain.read(part)
        if part.name.endswith("norm.weight"):
            return values + 0.3 * torch.arange(part.start[0], part.stop[0]).sin()
        return values * 10


def options(**changes: Any) -> TrainOptions:
    # With AdamW's usual eps a gradient of 0 up to rounding (a key's bias) moves its weight by lr.
    plain: dict[str, Any] = {"microbatch_tokens": 64, "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    return TrainOptions(**{**plain, "total_steps": 10, "head_chunk": 16, **changes})


def make_rows(
    prompts: list[int], samples: int, *, seed: int = 0, longest: int = 12, seconds: bool = False
) -> Batch:
    """`samples` rows for each prompt length, with token columns `weight` and, with `seconds`, a
    loss mask that leaves out every third token of the response.
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


def loss_fn(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Not linear in logprobs, and with an entropy term."""
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


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def naive_logprobs(decoder: Decoder, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of every token [T], row by row; 0 at each row's first token."""
    logprobs, entropy = [], []
    for tokens in torch.split(batch["tokens"], batch.lengths.tolist()):
        hidden = decoder(tokens, torch.arange(len(tokens)), dense)
        scores = torch.log_softmax(hidden @ decoder.head_weight().T / temperature, -1)[:-1]
        zero = scores.new_zeros(1)
        logprobs.append(torch.cat((zero, scores.gather(1, tokens[1:, None])[:, 0])))
        entropy.append(torch.cat((zero, -(scores.exp() * scores).sum(-1))))
    return torch.cat(logprobs), torch.cat(entropy)
