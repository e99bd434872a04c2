"""Shapes of models with random weights, and bytes and operations computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.files.hf import fill
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Request, SamplingParams

_QWEN_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_QWEN_1_5B = {
    **_QWEN_0_5B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
_LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Sizes that take the same kernels, for a rehearsal."""

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "0.5B": _QWEN_0_5B,
    "1.5B": _QWEN_1_5B,
    "8B": _LLAMA_8B,
}
"""Qwen2.5-0.5B and 1.5B, and Llama-3.1-8B: tied and untied heads, groups of 7, 6 and 4."""

BFLOAT16_BYTES = 2


def source_of(name: str, *, small: bool) -> dict[str, Any]:
    """Return the keys of config.json of a shape, or of a tiny model of its family."""
    return {**SHAPES[name], **(_SMALL if small else {})}


def model_of(name: str, *, small: bool) -> ModelConfig:
    return parse_config(source_of(name, small=small), origin=name)


class DeviceWeights:
    """Random weights that are drawn where they are used: a `TensorSource` on the GPU.

    Norms are ones, the rest is normal with deviation 0.02, as transformers initialises.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._shapes, self._device = global_shapes(model, "lm"), device

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, part: Slice) -> Tensor:
        drawn = torch.empty(part.size, device=self._device)
        if part.name.endswith("norm.weight"):
            return drawn.fill_(1.0)
        return drawn.normal_(0.0, DEVIATION)


DEVIATION = 0.02


def make_engine(
    model: ModelConfig, device: torch.device, *, cuda_graphs: bool, weights: NativeEngine | None
) -> NativeEngine:
    """Make a bfloat16 engine with random weights, or with another engine's."""
    options = NativeOptions(cuda_graphs=cuda_graphs, max_running=256, prefill_tokens=8192)
    engine = NativeEngine(model, options=options, device=device, dtype=torch.bfloat16)
    table = engine.weights.table()
    if weights is not None:
        for name, (tensor, _) in weights.local_tensors().items():
            engine.adopt(name, tensor)
        return engine
    source = DeviceWeights(model, device)
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), source)
    return engine


@dataclass(frozen=True, kw_only=True)
class Load:
    """A generation: `samples` of them, groups of `group` with a common prompt."""

    samples: int
    prompt: int
    response: int
    group: int = 8

    def requests(self, sampling: SamplingParams | None = None) -> list[Request]:
        """Make requests for different prompts, whose samples all reach the full length."""
        if sampling is None:
            sampling = SamplingParams(max_tokens=self.response, ignore_eos=True)
        return [
            Request(
                tokens=(i + 3, *(5 + j % 400 for j in range(self.prompt - 1))),
                prompt_id=i,
                samples=tuple(range(min(self.group, self.samples))),
                sampling=sampling,
            )
            for i in range(max(1, self.samples // self.group))
        ]

    @property
    def context(self) -> float:
        """Mean tokens that a decode step's samples attend to."""
        return self.prompt + self.response / 2


def parameters(model: ModelConfig) -> dict[str, int]:
    """Number of values of every parameter, by its Hugging Face name."""
    return {name: math.prod(shape) for name, shape in global_shapes(model, "lm").items()}


def read_per_step(model: ModelConfig) -> int:
    """Bytes of bfloat16 weights that a decode step reads: an embedding only if it is the head."""
    sizes = parameters(model)
    unread = 0 if model.tie_embeddings else sizes["model.embed_tokens.weight"]
    return BFLOAT16_BYTES * (sum(sizes.values()) - unread)


def cache_per_token(model: ModelConfig) -> int:
    """Bytes of keys and values of a token in all layers."""
    return (
        2
        * model.num_layers
        * model.attention.num_kv_heads
        * model.attention.head_dim
        * BFLOAT16_BYTES
    )


def body_and_head(model: ModelConfig) -> tuple[int, int]:
    """Return the values of parameters in products of every token, and those of the head."""
    sizes = parameters(model)
    apart = sum(n for name, n in sizes.items() if "embed_tokens" in name or "lm_head" in name)
    return sum(sizes.values()) - apart, model.vocab_size * model.hidden_size


def attention_flops(model: ModelConfig, lengths: Iterable[tuple[int, int]]) -> float:
    """Operations of causal attention's forward pass in all layers.

    Args:
        lengths: queries and keys of every sequence, aligned at the end.
    """
    seen = sum(q * k - q * (q - 1) / 2 for q, k in lengths)
    return 4 * model.num_layers * model.attention.num_heads * model.attention.head_dim * seen
