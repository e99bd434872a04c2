"""The converted SmolLM2-135M-Instruct: logits, tokenizer and a sensible answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.tokenizers import check_tokenizer, load_tokenizer
from tiny_model import load_into

ROOT = Path(__file__).parents[2]
MODEL = Path(os.environ.get("SPMDRL_TEST_MODEL", ROOT / "models" / "SmolLM2-135M-Instruct"))
pytestmark = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(),
    reason=f"{MODEL} is missing: scripts/test.sh converts it, or set SPMDRL_TEST_MODEL",
)


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def prompt(tokenizer: Any) -> str:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def test_tokenizer() -> None:
    tokenizer = load_tokenizer(MODEL)
    check_tokenizer(tokenizer, open_model(MODEL)[0])
    assert tokenizer.tokenize("In 1234 they're") == ["In", "Ġ", *"1234", "Ġthey", "'re"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert prompt(tokenizer).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of `mkldnn.flags`, on any CPU build
def test_logits_and_answer_equal_transformers() -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(MODEL)
    config, checkpoint = open_model(MODEL)
    assert (config.attention.num_heads, config.attention.num_kv_heads, config.num_layers) == (
        9,
        3,
        30,
    )
    assert config.architecture == "LlamaForCausalLM" and config.tie_embeddings
    decoder = Decoder(config, device="cpu")
    load_into(decoder, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    text = prompt(tokenizer) + "The capital of France is Paris.<|im_end|>"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(tokens).logits[0]
        hidden = decoder(tokens[0], torch.arange(tokens.shape[1]), dense)
        logits = hidden @ decoder.head_weight().T
        with torch.backends.mkldnn.flags(enabled=False):  # products as transformers computes them
            alike = decoder(tokens[0], torch.arange(tokens.shape[1]), dense)
    assert (alike @ decoder.head_weight().T - expected).abs().max() <= 1e-4
    # logits reach 28: float32 itself is up to 1e-4 from float64, and oneDNN rounds in another order
    assert (logits - expected).abs().max() <= 3e-4
    answer = tokenizer("The capital of France is Paris.<|im_end|>")["input_ids"]
    # Greedy at every place of the answer gives the next token of it.
    assert logits[-len(answer) - 1 : -1].argmax(-1).tolist() == answer
