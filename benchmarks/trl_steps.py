"""Steps of TRL's trainers, as peers.py and adapters.py time them: each in a process of its own.

No KL, no recomputation, no checkpoints, float32. What a step did is counted where it happens: rows
by what the trainer hands to rewards or to the model, tokens as the trainer's own log counts them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

TOKENS = "num_tokens"
"""TRL's name of the tokens so far, those of prompts among them."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The work of one step.

    Args:
        data: JSONL with `question` (GRPO), or `prompt`, `chosen` and `rejected` (DPO).
        prompts: questions or pairs of a step.
        group_size: samples of a question.
        max_tokens: limit of a response.
        steps: how many are measured, after one that is not.
        directory: what the trainer may write to.
        lora: rank and alpha of an adapter of all matrices; None: all weights train.
        ranks: processes that share the step.
    """

    model: str
    data: Path
    prompts: int
    group_size: int = 1
    max_tokens: int = 1
    steps: int = 2
    directory: Path = Path()
    lora: tuple[int, int] | None = None
    ranks: int = 1


def grpo(step: Step) -> dict[str, Any]:
    """Time steps of GRPOTrainer."""
    from trl import GRPOConfig, GRPOTrainer

    scored: list[int] = []

    def spread(completions: list[Any], **columns: Any) -> list[float]:
        scored.append(len(completions))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [(len(text) % 7) / 7 for text in texts]

    tokenizer = load_tokenizer(step.model)
    config = GRPOConfig(
        **settings(step, step.group_size, step.prompts // step.ranks),
        num_generations=step.group_size,
        max_completion_length=step.max_tokens,
        beta=0.0,
    )
    prompts = [said(tokenizer, "user", row["question"]) for row in rows_of(step)]
    trainer = GRPOTrainer(
        reward_funcs=spread, **common(step, tokenizer, config, {"prompt": prompts})
    )
    return timed(trainer, step, lambda: sum(scored) * step.ranks // (step.steps + 1))


def dpo(step: Step, pairs_at_once: int) -> dict[str, Any]:
    """Time steps of DPOTrainer against the model at the start, which is computed in every step.

    Args:
        pairs_at_once: pairs of a forward pass; the step adds up their gradients.
    """
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(step.model)
    at_once = min(pairs_at_once, step.prompts)
    config = DPOConfig(
        **settings(step, at_once, step.prompts // at_once // step.ranks), max_length=None, beta=0.1
    )
    columns = {
        name: [said(tokenizer, role, row[name]) for row in rows_of(step)]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }
    trainer = DPOTrainer(**common(step, tokenizer, config, columns))
    collated: list[int] = []
    collate = trainer.data_collator

    def counted(pairs: list[Any]) -> Any:
        collated.append(2 * len(pairs))
        return collate(pairs)

    trainer.data_collator = counted
    return timed(trainer, step, lambda: sum(collated) * step.ranks // (step.steps + 1))


def settings(step: Step, batch: int, accumulate: int) -> dict[str, Any]:
    """Keys that the configurations of all trainers have."""
    import torch

    return {
        "output_dir": str(step.directory),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": step.steps + 1,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def common(step: Step, tokenizer: Any, config: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that all trainers take."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    adapter: dict[str, Any] = {}
    if step.lora is not None:
        from peft import LoraConfig

        rank, alpha = step.lora
        adapter["peft_config"] = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    return {
        "model": AutoModelForCausalLM.from_pretrained(step.model, dtype=torch.float32),
        "processing_class": tokenizer,
        "args": config,
        "train_dataset": Dataset.from_dict(dict(columns)),
        **adapter,
    }


def timed(trainer: Any, step: Step, rows: Callable[[], int]) -> dict[str, Any]:
    """Train, and return the figures of the steps after the first."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each step ends."""

        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    counts = [log[TOKENS] for log in trainer.state.log_history if TOKENS in log]
    parameter = next(iter(trainer.model.parameters()))
    return {
        "seconds": statistics.median(differences(ends)),
        "tokens": statistics.median(differences(counts)),
        "gb": step.ranks * resident_peak() / 1e9,
        "rows": rows(),
        "updates": trainer.state.global_step,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows_of(step: Step) -> list[dict[str, Any]]:
    lines = step.data.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def said(tokenizer: Any, role: str, text: str) -> Any:
    """A text as a message of a role; the text alone for models without a chat template."""
    return text if tokenizer.chat_template is None else [{"role": role, "content": text}]


def resident_peak() -> int:
    """Read the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
