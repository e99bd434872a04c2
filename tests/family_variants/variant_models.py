"""Tiny random models of every variant of a family, made with transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DROP = "a key that is left out of config.json"
FULL, SLIDING, LINEAR_LAYER = "full_attention", "sliding_attention", "linear_attention"

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class FamilyVariants:
    """A family's variants.

    Args:
        base: keys of every variant, besides `SIZES`.
        variants: further keys of each; `edits` are changes of config.json after it was written, in
            which `DROP` leaves a key out. With a `vision_config` the other keys are those of the
            text model in a model of images and text, of its own `model_type`.
        quick: the two that every run of the tests verifies.
    """

    model_type: str
    base: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    quick: tuple[str, str]

    def write(self, name: str, directory: Path) -> None:
        """Write a variant as transformers saves it."""
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        keys = {**SIZES, **self.base, **self.variants[name]}
        edits, model_type = keys.pop("edits", {}), keys.pop("model_type", self.model_type)
        if "vision_config" in keys:
            own = ("vision_config", "mm_tokens_per_image")
            outer = {key: keys.pop(key) for key in own if key in keys}
            keys = {"text_config": {**keys, "model_type": self.model_type}, **outer}
        config = CONFIG_MAPPING[model_type](**keys)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        randomise(model)
        directory.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(directory)
        if edits:
            file = directory / "config.json"
            content = {**json.loads(file.read_text()), **edits}
            kept = {key: value for key, value in content.items() if value is not DROP}
            file.write_text(json.dumps(kept, indent=2, sort_keys=True))


@torch.no_grad()
def randomise(model: Any, seed: int = 1) -> None:
    """Move every weight away from what it starts with: an error about a norm's weight of 1, or a
    bias of 0, would not be seen. Logits differ by some nats, so that greedy tokens mean something.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    vocabulary = model.get_input_embeddings().weight.shape[0]
    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):
            # decays start at up to e^-16 a token: rounding of what they depend on counts 16 times
            parameter.zero_()
        if parameter.ndim == 1:
            parameter.add_(noise(parameter, 0.3))
        elif parameter.shape[0] == vocabulary:
            parameter.copy_(noise(parameter, 0.5))
        else:
            parameter.copy_(noise(parameter, 1.2 / parameter.shape[-1] ** 0.5))
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.add_(noise(buffer, 0.1))
