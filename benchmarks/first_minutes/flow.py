"""Stage `flow`: GRPO steps of a model with random weights, and the engine's gap to the trainer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from first_minutes.cards import Ceilings, scaled
from first_minutes.cases import Case, Outcome, Setting
from first_minutes.shapes import (
    DEVIATION,
    DeviceWeights,
    Load,
    attention_flops,
    body_and_head,
    cache_per_token,
    model_of,
    read_per_step,
)
from first_minutes.training import Shape
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.tensors import Slice
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import start_world, stop_world

NAME, STEPS, PROMPTS, GROUP = "0.5B", 3, 8, 8
REWARD = Path(__file__).parents[1] / "step_reward.py"
_HALF = 2.0**-8
"""Largest relative error of rounding to bfloat16, whose significands have 8 bits."""


def cases(setting: Setting) -> Iterator[Case]:
    yield Case(name=f"GRPO, {NAME}, {STEPS} steps", run=lambda: grpo(setting))


def grpo(setting: Setting) -> Outcome:
    """Run the shipped flow; the figures are medians of the steps after the first.

    Predictions: a decode step reads weights and cache once; an update has six operations per
    parameter and token. The gap is that of all sampled tokens; the canary ends the run if its own
    is too large. Engine and trainer round each layer's two additions to the residual stream on
    their own, relative errors that add like the root of their number; a logit has the deviation of
    the head's weights times the root of the width.
    """
    model = model_of(NAME, small=setting.small)
    response = 8 if setting.small else 256
    with tempfile.TemporaryDirectory() as directory, start_reward_server() as server:
        root = Path(directory)
        make_model(root / "model", model, setting)
        config = load_config(str(write_config(root, response)), [])
        world = start_world(device="cuda")
        train(config, world, server)
        stop_world()
        records = [r for r in read_metrics(root / "run" / "metrics.jsonl") if "reward" in r]
    later = records[1:]
    measured = {f"{p}_s": median(r[f"seconds/{p}"] for r in later) for p in ("rollout", "update")}
    measured["step_s"] = median(r["seconds/step"] for r in later)
    measured["rollout_gap"] = max(r["rollout_gap"] for r in records)
    measured["peak_gb"] = max(r["memory/peak_gb"] for r in records)
    gap = _HALF * (2 * model.num_layers) ** 0.5 * DEVIATION * model.hidden_size**0.5
    return Outcome(
        predicted={
            "rollout_s": rollout_s(setting.ceilings, model, response),
            "update_s": update_s(setting.ceilings, model, response),
            "rollout_gap": gap,
        },
        measured=measured,
        facts={
            "steps": len(records),
            "rollout_gap_max": max(r["rollout_gap_max"] for r in records),
            "prompts": PROMPTS,
            "samples": PROMPTS * GROUP,
            "response": response,
        },
    )


def rollout_s(ceilings: Ceilings, model: ModelConfig, response: int) -> float | None:
    load = Load(samples=PROMPTS * GROUP, prompt=32, response=response, group=GROUP)
    read = read_per_step(model) + load.samples * load.context * cache_per_token(model)
    return scaled(ceilings.read_s(read), response)


def update_s(ceilings: Ceilings, model: ModelConfig, response: int) -> float | None:
    shape = Shape(rows=PROMPTS * GROUP, prompt=32, response=response, group=GROUP)
    body, head = body_and_head(model)
    products = 6 * (body * shape.tokens + head * shape.rows * response)
    return ceilings.product_s(products + 3.5 * attention_flops(model, shape.sequences()))


def make_model(directory: Path, model: ModelConfig, setting: Setting) -> None:
    """Write a Hugging Face directory: random weights, and a tokenizer of bytes with empty places.

    Every id of the vocabulary has a text, so that whatever the model samples can be decoded.
    """
    tokenizer_dir = directory.with_name("tokenizer")
    tokenizer_dir.mkdir()
    ends = ["<|endoftext|>", "<|im_end|>"]  # special tokens of the family
    tokens = [*ends, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{i}" for i in range(len(tokens), model.vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ends)
    tokenizer.save(str(tokenizer_dir / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ends[1]}
    (tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(about))
    weights = DeviceWeights(model, setting.device)
    save_pretrained(
        ((name, weights.read(_whole(name, weights.shape(name)))) for name in sorted(weights.names)),
        model,
        directory,
        tokenizer_dir,
        dtype=torch.bfloat16,
    )


def _whole(name: str, shape: tuple[int, ...]) -> Slice:
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)


def write_config(root: Path, response: int) -> Path:
    """Write questions and a GRPO configuration without anything that needs the network."""
    rows = [{"question": f"What is {i} + {7 * i}?", "answer": str(8 * i)} for i in range(64)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {
        "flow": "grpo",
        "steps": STEPS,
        "run_dir": str(root / "run"),
        "device": "cuda",
        "model": {"path": str(root / "model")},
        "roles": {"policy": {}, "rollout": {}},
        "data": {
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "train": {"source": str(root / "questions.jsonl"), "chat": False, "max_tokens": 96},
        },
        "rewards": [{"function": f"{REWARD}:spread"}],
        "sampling": {"max_tokens": response},
        "log": {"tensorboard": False, "progress": False, "text_samples": 0},
        "checkpoint": {"export": False, "resume": False},
    }
    path = root / "grpo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
