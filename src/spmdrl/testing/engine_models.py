"""Tiny random models that engines under test serve, and what others compute with the same weights:
transformers, and the trainer's decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.tensors import Slice
from spmdrl.rollout.protocol import Request, SamplingParams

VOCAB = 128
EOS = 5

SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""Sizes of the contract's models: some engines attend only with heads of 32 values or more."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"num_key_value_heads": 4},
    "Qwen3": {"head_dim": 24},
    "Mistral": {"sliding_window": None, "num_key_value_heads": 1},
}
"""Architecture -> its differences from the others: tied embeddings, biases, norms of heads, one
head of keys and values."""


def hugging_face_model(name: str, **changes: Any) -> Any:
    """Make transformers' model of that architecture, with random weights that give sharp logits.

    Args:
        changes: fields of its configuration.
    """
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
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, **ARCHITECTURES.get(name, {}), **changes}
    )
    config.architectures = [f"{name}ForCausalLM"]
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model


class StateDict:
    """A `TensorSource` of global tensors in memory, which a test may change."""

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

    def replaced(self, name: str, values: Tensor) -> StateDict:
        """The same tensors but for one."""
        return StateDict({**self._tensors, name: values})


def tiny_model(name: str = "Llama", **changes: Any) -> tuple[ModelConfig, StateDict]:
    """Make `hugging_face_model`'s configuration and weights, in this project's types."""
    model = hugging_face_model(name, **changes)
    return parse_config(model.config.to_dict()), StateDict(dict(model.state_dict()))


def spell(tokens: Sequence[int]) -> str:
    """Write every token as three letters."""
    return "".join(f"{token:03d}" for token in tokens)


def prompts_of(*lengths: int) -> list[tuple[int, ...]]:
    """Draw prompts of these lengths, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(6, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def request(tokens: tuple[int, ...], prompt_id: int, samples: int = 1, **sampling: Any) -> Request:
    """Make a request for the first `samples` samples of a prompt."""
    return Request(
        tokens=tokens,
        prompt_id=prompt_id,
        samples=tuple(range(samples)),
        sampling=SamplingParams(**sampling),
    )


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [T, heads, head_dim] each
    """Attend causally over one sequence, without any kernel of this project."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def trainer_decoder(model: ModelConfig, source: TensorSource) -> Decoder:
    """Make the module that train backends train, with these weights, on the CPU."""
    decoder = Decoder(model, device="cpu")
    held = decoder.slices()
    fill(((p, held[name]) for name, p in decoder.named_parameters()), source)
    return decoder


@torch.no_grad()
def logits_of(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """Compute the logits [T, V] of a sequence, all positions at once."""
    hidden = decoder(torch.tensor(tokens), torch.arange(len(tokens)), dense)
    logits: Tensor = hidden @ decoder.head_weight().T
    return logits


def scores_of(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """Compute log-probabilities [T - 1] of every token but the first."""
    logprobs = logits_of(decoder, tokens)[:-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens)[1:, None])[:, 0]


def allowed(logits: Tensor, sampling: SamplingParams) -> Tensor:  # [V]
    """Compute log-probabilities [V] of the sampling distribution: truncated in the order of
    `SamplingParams`, and renormalised.
    """
    if sampling.is_greedy:
        return logits.log_softmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        order = logits.argsort(descending=True)
        before = logits.softmax(-1)[order].cumsum(0) - logits.softmax(-1)[order]
        logits = logits.clone()
        logits[order[before >= sampling.top_p]] = -torch.inf
    if sampling.min_p > 0:
        chances = logits.softmax(-1)
        logits = logits.masked_fill(chances < sampling.min_p * chances.max(), -torch.inf)
    return logits.log_softmax(-1)
