"""Rewards of rows that took turns: texts of turns, sums, and functions that ask for the turns."""

from __future__ import annotations

import json
from dataclasses import replace
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
from spmdrl.roles.turn_calls import HEARD, heard_column
from spmdrl.world import World
from tiny_model import make_tiny_model

FUNCTIONS = """
import json

def count(response, turns, bonus=0):
    return len(turns) + len(response) / 100

def talk(messages, **columns):
    with open(__file__ + ".json", "a") as file:
        print(json.dumps([messages, sorted(columns)]), file=file)
    return len(messages)
"""
OPENING = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "really"}]
ANSWER = [{"role": "tool", "content": "saw <|im_end|>", "name": "eye"}]
TURNS = [[("ab", 0.5, "saw <|im_end|>"), ("STOPc", 0.25, "")], [("xyz", -1.0, "")]]


def scored(world: World, root: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(root / "model")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    sequences, masks, rewards = [], [], []
    starts: list[list[int]] = []
    for turns in TURNS:
        tokens, mask, own = ids("ask"), [False] * 3, [0.0] * 3
        starts.append([])
        for text, reward, given in turns:
            drawn, answer = [*ids(text), 1], ids(given)
            if given:
                starts[-1].append(len(masks) + len(mask) + len(drawn))
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
        specs = [
            RewardSpec(name="count", function=f"{root / 'own.py'}:count", weight=2.0),
            RewardSpec(name="talk", function=f"{root / 'own.py'}:talk", weight=0.0),
        ]
        heard = heard_column(starts, [{0: json.dumps(ANSWER)}, {}], len(masks))
        told = batch.with_columns(ragged={HEARD: heard}, objects={"opening": [OPENING, None]})
        with RewardPool(server, specs, num_workers=1, columns=("x", "turns")) as pool:
            found = Scorer(pool, texts, ["STOP"]).score(told)
            plain = told.select([1])
            rest = {n: c for n, c in plain.rows.items() if n != "num_turns"}
            Scorer(pool, texts).score(
                replace(plain, rows={**rest, "response_lengths": plain.row_sum(plain["loss_mask"])})
            )
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
    (tmp_path / "own.py").write_text(FUNCTIONS)
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
    lines = (tmp_path / "own.py.json").read_text().splitlines()
    said, others, alone = ([json.loads(line)[0]] for line in lines)
    turn = {"role": "assistant", "content": "xyz"}
    assert said[0] == [
        *OPENING,
        {"role": "assistant", "content": "ab"},
        *ANSWER,
        {"role": "assistant", "content": ""},
    ]
    # the prompt of the data, where no environment has begun the sample
    assert others[0] == alone[0] == [{"role": "user", "content": "ask"}, turn]
    assert json.loads(lines[0])[1] == ["answer", "entry", "prompt", "response", "turns", "x"]
