"""What a run reads before it starts: tokenizer, prompts, reward functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdrl.config import Config, PromptsSection, SamplingSection
from spmdrl.data.prompts import Prompt, PromptSet, PromptSource, load_prompts
from spmdrl.data.split import split, without_overlap
from spmdrl.models.hf import load_tokenizer
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import RewardServer
from spmdrl.rollout.sampling import SamplingParams

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tokenizer, its decoder (special tokens left out), and the prompts."""

    tokenizer: Any
    decode: Callable[[Sequence[int]], str]
    train: PromptSet
    held_out: Sequence[Prompt]


def read_inputs(config: Config) -> Inputs:
    """Read and tokenise everything; ValueError as `data.load_prompts` and `data.split`."""
    tokenizer = load_tokenizer(config.model.path)
    train = load_prompts(prompt_source(config.data.train), tokenizer)
    held_out: Sequence[Prompt] = ()
    evaluation = config.evaluation
    if evaluation.data is not None:
        own = load_prompts(prompt_source(evaluation.data), tokenizer)
        held_out, note = without_overlap(own, train.texts())
        log.info("%s", note)
    elif evaluation.held_out > 0:
        parts = split(train, num_held_out=evaluation.held_out, seed=config.seed)
        train, held_out = parts.train, parts.held_out
        log.info("%s", parts.note)
    if len(train) < config.data.prompts_per_step:
        raise ValueError(
            f"data.prompts_per_step={config.data.prompts_per_step}, but data.train has "
            f"{len(train)} prompts ({config.data.train.source})"
        )
    decode = make_decoder(tokenizer)
    return Inputs(tokenizer=tokenizer, decode=decode, train=train, held_out=held_out)


def make_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids -> text, special tokens left out."""

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    return decode


def prompt_source(section: PromptsSection) -> PromptSource:
    parameters = dict(section.task)
    if section.source.startswith("hub:"):
        parameters.setdefault("split", section.split)
    return PromptSource(
        source=section.source,
        parameters=parameters,
        size=section.size,
        seed=section.seed,
        prompt_column=section.prompt_column,
        answer_column=section.answer_column,
        answer_pattern=section.answer_pattern,
        template=section.template,
        system=section.system,
        chat=section.chat,
        max_prompt_tokens=section.max_tokens,
        on_bad_row=section.on_bad_row,
    )


def reward_specs(config: Config) -> list[RewardSpec]:
    """One component per entry of `rewards`, named after its function (numbered when repeated)."""
    if not config.rewards:
        raise ValueError("rewards is empty: name at least one function, e.g. {function: math}")
    specs: list[RewardSpec] = []
    for section in config.rewards:
        base = section.function.rpartition(":")[2]
        taken = sum(spec.name.split("#")[0] == base for spec in specs)
        specs.append(
            RewardSpec(
                name=f"{base}#{taken + 1}" if taken else base,
                function=section.function,
                weight=section.weight,
                parameters=section.options,
            )
        )
    return specs


def make_pool(config: Config, server: RewardServer, run_dir: Path, rank: int) -> RewardPool:
    """This rank's reward workers; ValueError when a function cannot be loaded."""
    pool = config.reward_pool
    return RewardPool(
        server,
        reward_specs(config),
        num_workers=pool.num_workers,
        timeout_s=pool.timeout_s,
        memory_mb=round(pool.memory_gb * 1000),
        failed=pool.failed_reward,
        output=run_dir / f"rewards_rank_{rank:05d}.log",
    )


def sampling_params(section: SamplingSection) -> SamplingParams:
    return SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        max_tokens=section.max_tokens,
        stop=section.stop,
        stop_token_ids=section.stop_token_ids,
    )


def evaluation_sampling(config: Config) -> SamplingParams:
    """The training's sampling, with what `evaluation` says otherwise."""
    wish = {
        "temperature": config.evaluation.temperature,
        "max_tokens": config.evaluation.max_tokens,
    }
    given = {key: value for key, value in wish.items() if value is not None}
    return sampling_params(config.sampling.model_copy(update=given))


def check_lengths(config: Config, role: str, max_position: int) -> None:
    """ValueError when the longest prompt and answer exceed the model's positions."""
    answers = {"sampling.max_tokens": config.sampling.max_tokens}
    pairs = [("data.train.max_tokens", config.data.train.max_tokens, answers)]
    evaluation = config.evaluation
    if evaluation.max_tokens is not None:
        answers = {"evaluation.max_tokens": evaluation.max_tokens}
    if evaluation.data is not None:
        pairs.append(("evaluation.data.max_tokens", evaluation.data.max_tokens, answers))
    elif evaluation.held_out > 0:
        pairs.append(("data.train.max_tokens", config.data.train.max_tokens, answers))
    for prompt_key, prompt, limits in pairs:
        for key, answer in limits.items():
            if prompt + answer > max_position:
                raise ValueError(
                    f"{prompt_key}={prompt} and {key}={answer} make {prompt + answer} tokens, but "
                    f"the model of roles.{role} has {max_position} positions"
                )
