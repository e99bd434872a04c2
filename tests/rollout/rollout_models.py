"""Naive decoding, and engines of the contract's tiny models, for the native engine's tests."""

from __future__ import annotations

from typing import Any

import torch

from agreement import assert_same
from noise import gumbel
from spmdrl.distributed.parallel import Parallel
from spmdrl.keyed_random import key64, key_tensor
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import fill
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Completion, Finish, Request
from spmdrl.testing.engine_models import (
    ARCHITECTURES,
    EOS,
    VOCAB,
    StateDict,
    dense,
    hugging_face_model,
    prompts_of,
    request,
    spell,
    tiny_model,
)
from tiny_model import load_into

__all__ = [
    "ARCHITECTURES",
    "EOS",
    "VOCAB",
    "assert_same",
    "dense",
    "hugging_face_model",
    "prompts_of",
    "request",
    "spell",
    "tiny_model",
]


def make_engine(
    model: ModelConfig, source: StateDict, tp: Parallel | None = None, **options: Any
) -> NativeEngine:
    engine = NativeEngine(
        model,
        tp=tp,
        options=NativeOptions(**{"block_size": 8, **options}),
        texts=TokenTexts(decode=spell, decode_all=spell),
    )
    table = engine.weights.table()
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), source)
    return engine


@torch.no_grad()
def naive(
    model: ModelConfig, source: StateDict, asked: Request, sample: int, *, seed: int, step: int
) -> Completion:
    """One sample by computing the whole sequence anew for every token; margins included."""
    decoder = Decoder(model, device="cpu")
    load_into(decoder, source)
    tokens, logprobs, margins = list(asked.tokens), [], []
    sampling = asked.sampling
    for _ in range(sampling.max_tokens):
        hidden = decoder(torch.tensor(tokens), torch.arange(len(tokens)), dense)
        logits = hidden[-1] @ decoder.head_weight().T
        scores = logits
        if not sampling.is_greedy:
            logits = logits / sampling.temperature
            key = key_tensor(
                [key64(seed, step, asked.prompt_id, sample, len(tokens))], torch.device("cpu")
            )
            scores = logits + gumbel(key, 0, model.vocab_size)[0]
        best = scores.topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        margins.append(float(best.values[0] - best.values[1]))
        if tokens[-1] in model.eos_ids and not sampling.ignore_eos:
            break
    done = tokens[-1] in model.eos_ids and not sampling.ignore_eos
    return Completion(
        tokens=tuple(tokens[len(asked.tokens) :]),
        logprobs=tuple(logprobs),
        finish=Finish.STOP if done else Finish.LENGTH,
        margins=tuple(margins),
    )
