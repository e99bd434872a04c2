"""Tiny mixture-of-experts models of transformers, random throughout, and their tensors by file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig, parse_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "head_dim": 24,
        },
    ),
    # neither all layers with experts nor normalised weights
    "qwen3_sparse": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # all experts in one tensor, with biases
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "layer_types": ["full_attention"] * 3,
            "swiglu_limit": 1.0,
        },
    ),
    # a dense layer, corrections, groups, shared experts
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.7,
        },
    ),
}


def reference_model(name: str) -> Any:
    import transformers

    kind, extra = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **extra})
    config.architectures = [f"{kind}ForCausalLM"]
    # as it multiplies on any machine
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def config_of(model: Any) -> ModelConfig:
    return parse_config(model.config.to_dict())


def by_file_name(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Stacked experts (of the model or of its gradients) under the names that files have."""
    if model.moe is not None and model.moe.form != "each":
        return tensors
    found = {}
    block, gate, up, down = {
        "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
        "Glm4MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
        "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    }[model.architecture]
    for name, tensor in tensors.items():
        layer, _, last = name.partition(".mlp.experts.")
        if not last:
            is_router = name.endswith(".mlp.gate.weight")
            found[name.replace(".mlp.", f".{block}.") if is_router else name] = tensor
            continue
        for number, expert in enumerate(tensor):
            here = f"{layer}.{block}.experts.{number}"
            if last == "down_proj":
                found[f"{here}.{down}.weight"] = expert
            else:
                found[f"{here}.{gate}.weight"], found[f"{here}.{up}.weight"] = expert.chunk(2)
    return found
