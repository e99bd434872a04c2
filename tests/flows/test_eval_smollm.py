"""`spmdrl eval` with a real model: greedy answers are those of transformers, with pass@1."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from harness import run_ranks
from spmdrl.commands.evaluate import evaluate
from spmdrl.config.load import load_config
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TOKENS = 24
ROWS = (  # in the format of GSM8K
    ("A box holds 6 eggs. How many eggs are in 4 boxes?", "6 * 4 = 24\n#### 24"),
    ("Ann has 15 dollars and spends 7. How much is left?", "15 - 7 = 8\n#### 8"),
    ("A train goes 60 miles in an hour. How far does it go in 3 hours?", "#### 180"),
    ("Tom reads 12 pages a day. How many days does he need for 48 pages?", "#### 4"),
)


def serve(world: World, words: list[str]) -> dict[str, float]:
    config = load_config(ROOT / "configs" / "eval_gsm8k.yaml", words)
    with start_reward_server() as server:
        return evaluate(config, world, server)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="models/SmolLM2-135M-Instruct is not there")
@pytest.mark.full
def test_greedy_answers_equal_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS))
    words = [
        f"run_dir={tmp_path}",
        f"model.path={MODEL}",
        "evaluation.sets.samples=null",
        f"evaluation.sets.greedy.data.source={data}",
        f"sampling.max_tokens={TOKENS}",
    ]
    metrics = run_ranks(serve, 2, words, timeout_s=300)[0]
    lines = (tmp_path / "evaluation" / "greedy.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for (question, _), record in zip(ROWS, records, strict=True):
        asked = f"{question}\nReason step by step, and put the final answer within \\boxed{{}}."
        assert record["prompt"] == asked
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)
        expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert record["response"] == expected
    right = [record["reward"] >= 1 for record in records]
    assert metrics["eval/greedy/pass@1"] == sum(right) / len(right)
    error = metrics["eval/greedy/pass@1/standard_error"]
    mean = sum(right) / len(right)
    assert error == pytest.approx(math.sqrt(mean * (1 - mean) / (len(right) - 1)))
