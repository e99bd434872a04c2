"""A real model: the engine's greedy tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rollout_models import assert_same, request

from spmdrl.models.files.hf import fill, open_model
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import Completion, Finish

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
PROMPTS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "What is 7 + 5?",
    "Write one sentence about the sea.",
    "Who wrote Hamlet?",
    "Explain in two sentences why the sky is blue.",
    "List the days of the week.",
    "Translate 'good morning' into French.",
    "How many legs does a spider have?",
    "Write a haiku about autumn leaves.",
    "What is the largest planet of our solar system, and how large is it?",
    "Give me a short recipe for pancakes.",
    "A farmer has 12 sheep and sells 5. How many are left?",
    "Describe a cat to someone who has never seen one.",
    "What is photosynthesis?",
    "Tell me a joke.",
)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="models/SmolLM2-135M-Instruct is not there")
@pytest.mark.parametrize(
    ("count", "limit"), [(8, 32), pytest.param(16, 64, marks=pytest.mark.full)]
)
def test_greedy_tokens_of_smollm2_equal_transformers(count: int, limit: int) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(MODEL)
    prompts = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        )
        for text in PROMPTS[:count]
    ]
    config, checkpoint = open_model(MODEL)
    engine = NativeEngine(config)
    table = engine.weights.table()
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), checkpoint)
    asked = [
        request(p, i, temperature=0, max_tokens=limit, margins=True) for i, p in enumerate(prompts)
    ]
    found = engine.generate(asked, seed=0, step=0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    longest = max(len(p) for p in prompts)
    end = config.eos_ids[0]
    ids = torch.tensor([[end] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit)
    for i, row in enumerate(out[:, longest:].tolist()):
        stop = next((j for j, token in enumerate(row) if token in config.eos_ids), None)
        tokens = tuple(row if stop is None else row[: stop + 1])
        finish = Finish.LENGTH if stop is None else Finish.STOP
        expected = Completion(tokens=tokens, logprobs=(), finish=finish)
        assert_same(found[i][0], expected, PROMPTS[i])
