"""Rewards of rows that took turns: texts of turns, sums, and functions that ask for the turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from spmdrl.batch import from_rows
from spmdrl.data.prompts import Prompt
from spmdrl.models.files.token_texts import token_texts
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.scorer import Scorer
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model

FUNCTION = "def count(response, turns, bonus=0):\n    return len(turns) + len(response) / 100\n"
TURNS = [[("ab", 0.5, "saw <|im_end|>"), ("STOPc", 0.25, "")], [("xyz", -1.0, "")]]


def scored(world: World, root: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(root / "model")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    sequences, masks, rewards = [], [], []
    for turns in TURNS:
        tokens, mask, own = ids("ask"), [False] * 3, [0.0] * 3
        for text, reward, given in turns:
            drawn, answer = [*ids(text), 1], ids(given)
            tokens += drawn + answer
            mask += [True] * len(drawn) + [False] * len(answer)
            own += [0.0] * (len(drawn) - 1) + [reward] + [0.0] * len(answer)
        sequences.append(tokens)
        masks += mask
        rewards += own
    prompt = Prompt(
        prompt_id=0, text="ask", messages=(), tokens=(), answer="1", entry={"x": 1}, turns="{}"
    )
    batch = from_rows(
        sequences,
        rows={
            "prompt_ids": torch.tensor([0, 0]),
            "sample_index": torch.tensor([0, 1]),
            "num_turns": torch.tensor([2, 1]),
            "response_lengths": torch.tensor([0, 0]),
        },
        objects={"prompt": [prompt, prompt]},
    ).with_columns(tokens={"loss_mask": torch.tensor(masks), "turn_rewards": torch.tensor(rewards)})
    texts = token_texts(tokenizer, chat=True)
    with start_reward_server() as server:
        specs = [RewardSpec(name="count", function=f"{root / 'own.py'}:count", weight=2.0)]
        with RewardPool(server, specs, columns=("x", "turns")) as pool:
            found = Scorer(pool, texts, ["STOP"]).score(batch)
    alone = Scorer(None, texts).score(batch)
    return {
        "turns": found.objects["turns"],
        "response": found.objects["response"],
        "rewards": found["rewards"].tolist(),
        "of turns": found["reward/turns"].tolist(),
        "count": found["reward/count"].tolist(),
        "alone": alone["rewards"].tolist(),
    }


def test_rows_of_turns_are_scored(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "own.py").write_text(FUNCTION)
    (found,) = run_ranks(scored, 1, tmp_path)
    assert found["turns"] == [
        [
            {"text": "ab", "reward": 0.5, "given": "saw <|im_end|>"},
            {"text": "", "reward": 0.25, "given": ""},  # up to its stop text
        ],
        [{"text": "xyz", "reward": -1.0, "given": ""}],
    ]
    assert found["response"] == ["ab\n", "xyz"]
    assert found["of turns"] == [0.75, -1.0] == found["alone"]
    assert found["count"] == pytest.approx([2.03, 1.03])
    assert found["rewards"] == pytest.approx([2 * 2.03 + 0.75, 2 * 1.03 - 1])
