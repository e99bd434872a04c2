"""Tiny random models and naive decoding, for the engine's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agreement import assert_same
from noise import gumbel
from spmdrl.distributed.parallel import Parallel
from spmdrl.keyed_random import key64, key_tensor
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import fill
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.models.sharding import Slice
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Completion, Finish, Request, SamplingParams
from tiny_model import load_into

__all__ = ["assert_same"]

VOCAB = 128
EOS = 5

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"num_key_value_heads": 4},
    "Qwen3": {"head_dim": 24},
    "Mistral": {"sliding_window": None, "num_key_value_heads": 1},
}


def hugging_face_model(name: str, **changes: Any) -> Any:
    """transformers' tiny model of that architecture, with lively random weights."""
    import transformers

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "pad_token_id": EOS,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **ARCHITECTURES[name], **changes})
    config.architectures = [f"{name}ForCausalLM"]
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model


class StateDict:
    """Global tensors in memory, read slice by slice."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def read(self, part: Slice) -> Tensor:
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return self._tensors[part.name][box]


def tiny_model(name: str = "Llama", **changes: Any) -> tuple[ModelConfig, StateDict]:
    model = hugging_face_model(name, **changes)
    return parse_config(model.config.to_dict()), StateDict(dict(model.state_dict()))


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


def spell(tokens: Sequence[int]) -> str:
    """Every token as three letters."""
    return "".join(f"{token:03d}" for token in tokens)


def prompts_of(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(6, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def request(tokens: tuple[int, ...], prompt_id: int, samples: int = 1, **sampling: Any) -> Request:
    return Request(
        tokens=tokens,
        prompt_id=prompt_id,
        samples=tuple(range(samples)),
        sampling=SamplingParams(**sampling),
    )


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


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
