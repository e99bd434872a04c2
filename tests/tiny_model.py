"""A Hugging Face directory of a toy model with a byte-level tokenizer, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.family import family_of
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import RandomCheckpoint, TensorSource, fill
from spmdrl.models.sharding import Head
from spmdrl.models.tensors import Slice

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
FORGETS = CHAT_TEMPLATE.replace(
    "m['content']",
    "(m['content'] if m['role'] != 'assistant' or m['content'].replace('-', '').isalpha() "
    "else m['content'][-2:])",
)
"""Template that leaves two letters of turns with anything but letters, such as a toy model's."""

SPECIAL = ("<|im_start|>", "<|im_end|>")
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def make_tiny_model(
    directory: Path,
    architecture: str = "LlamaForCausalLM",
    seed: int = 0,
    *,
    head: Head = "lm",
    template: str = CHAT_TEMPLATE,
    **changes: Any,
) -> ModelConfig:
    """Write config.json, tokenizer and random weights; `changes` go into config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "chat_template": template,
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    family = family_of(architecture)
    source = {
        "architectures": [architecture],
        "model_type": family.model_type,
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "sliding_window": None,
        **(EXPERTS if "num_experts" in family.tiny else {}),
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(source))
    model = read_config(directory)
    weights = RandomCheckpoint(model, seed, head)
    tensors = []
    for name in sorted(weights.names):
        shape = weights.shape(name)
        whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        values = weights.read(whole)
        # ten times the usual deviation: sharper logits, larger gradients
        tensors.append((name, values if name.endswith("norm.weight") else values * 10))
    saved = directory.with_name(directory.name + "_saved")
    save_pretrained(tensors, model, saved, directory, head=head)
    for file in [*saved.glob("*.safetensors"), saved / "config.json"]:
        file.rename(directory / file.name)
    for file in saved.iterdir():
        file.unlink()
    saved.rmdir()
    return model


def load_into(decoder: Decoder, checkpoint: TensorSource) -> None:
    """Fill a decoder's local parameters (plain tensors on a real device) from a checkpoint."""
    parameters = dict(decoder.named_parameters())
    held = decoder.slices()
    fill(((tensor, held[name]) for name, tensor in parameters.items()), checkpoint)
