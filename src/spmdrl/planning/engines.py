"""Engines of rollouts and judges: their requirements on the configuration, and their sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spmdrl.config.data_sets import held_out_sets, rows_read
from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import format_ranks
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.models.widths import cached_values
from spmdrl.planning.questions import questions_of
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.generation import GRAPHS, KV_CACHE
from spmdrl.roles.model_calls import WEIGHTS
from spmdrl.rollout.vllm_engine import check_model
from spmdrl.rollout.vllm_model import VOCAB_MULTIPLE
from spmdrl.rollout.vllm_requests import BLOCK_MULTIPLE, LEAST_TEMPERATURE
from spmdrl.rollout.vllm_versions import check_version, installed_version

log = logging.getLogger(__name__)

_LEAST_LENGTH = 64
"""Tokens of a sequence that every engine must serve: the canary's rows are shorter."""


def vocab_multiple(spec: RoleSpec) -> int:
    """Multiple to which the role's vocabulary is padded."""
    return VOCAB_MULTIPLE if spec.is_vllm else 1


def shares_tensors(spec: RoleSpec) -> bool:
    """Whether the rollout can compute with the policy's own tensors. vLLM's graphs hold addresses
    of tensors that vLLM made.
    """
    return not spec.is_vllm or spec.device_type == "cpu"


def check_engine(config: Config, specs: Mapping[str, RoleSpec], size: int) -> None:
    """Refuse placements that vLLM cannot use, and sampling that it would do differently.

    Args:
        size: number of ranks of the world.

    Raises:
        ValueError: the placement or sampling does not suit vLLM; the keys are named.
    """
    rollouts = [name for name, spec in specs.items() if spec.is_vllm]
    if rollouts:
        _check_sampling(config)
    if len(rollouts) > 1:
        raise ValueError(
            f"rollout.engine=vllm with the rollouts {rollouts}: a process has one vLLM, so take "
            "all but one away, or set rollout.engine=native"
        )
    for name in rollouts:
        spec = specs[name]
        placement = spec.placement
        if placement.ranks != tuple(range(size)):
            raise ValueError(
                f"rollout.engine=vllm with roles.{name}.ranks={spec.section.ranks!r} (ranks "
                f"{format_ranks(placement.ranks)} of {size}): vLLM lays its groups over all ranks "
                f"of the world, so set roles.{name}.ranks=all, or rollout.engine=native"
            )
        if placement.degrees["cp"] > 1:
            raise ValueError(
                f"rollout.engine=vllm with roles.{name}.cp={placement.degrees['cp']}: an engine "
                f"has only tensor parallelism, so set roles.{name}.tp instead"
            )
        tp, vocabulary = placement.degrees["tp"], spec.model.vocab_size
        padded = -(-vocabulary // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        if padded % tp:
            raise ValueError(
                f"rollout.engine=vllm with roles.{name}.tp={tp}: it does not divide the "
                f"{padded:,} rows to which vLLM pads the vocabulary of {vocabulary:,}"
            )


def _check_sampling(config: Config) -> None:
    sampled = {"sampling": config.sampling}
    for name, described in held_out_sets(config).items():
        sampled[f"evaluation.sets.{name}.sampling"] = described.sampling
    for key, sampling in sampled.items():
        if sampling.min_p > 0 and sampling.top_p < 1:
            raise ValueError(
                f"rollout.engine=vllm with {key}.min_p={sampling.min_p} and {key}.top_p="
                f"{sampling.top_p}: vLLM cuts min_p first, which leaves other tokens than the "
                "order of this project: set one of them"
            )
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"rollout.engine=vllm with {key}.temperature={sampling.temperature}: vLLM takes 0 "
                f"(greedy) or at least {LEAST_TEMPERATURE}"
            )


def check_installed(spec: RoleSpec) -> None:
    """Refuse a vLLM that is missing, has an unsuitable version, or lacks the role's model.

    Raises:
        ValueError: vLLM cannot be used; the message tells the fix.
    """
    if spec.is_vllm:
        on_cuda = spec.device_type == "cuda"
        check_version(installed_version(), torch.__version__, on_cuda=on_cuda)
        check_model(spec.model, spec.device_type)


def engine_parts(spec: RoleSpec, *, captures_graphs: bool) -> tuple[str, ...]:
    """Parts of the engine that its calls need on the device."""
    if spec.is_vllm and spec.device_type == "cuda":
        return (WEIGHTS,)  # the cache comes and goes with them
    return (WEIGHTS, KV_CACHE, *[GRAPHS] * captures_graphs)


# Sizes


def longest_served(config: Config, spec: RoleSpec) -> int:
    """Tokens of the longest prompt with response, or question with answer, of an engine."""
    if not spec.is_judge:
        return longest_sequence(config, spec.model.max_position)
    asked = questions_of(config, spec.name, spec.model.max_position)
    return asked.prompt_tokens + asked.answer_tokens


def longest_sequence(config: Config, max_position: int) -> int:
    """Tokens of the longest prompt with response that configuration and model allow."""
    lengths = [rows.longest for rows in rows_read(config) if rows.sampling is not None]
    return min(max([_LEAST_LENGTH, *lengths]), max_position)


def samples_per_replica(config: Config, spec: RoleSpec) -> int:
    """Samples of a training step that one replica of the rollout generates, rounded up; a judge's
    answers in the call that asks most.
    """
    if spec.is_judge:
        asked = questions_of(config, spec.name, spec.model.max_position)
        return -(-asked.largest_call // spec.placement.num_replicas)
    samples = config.data.prompts_per_step * config.data.group_size
    return -(-samples // spec.placement.num_replicas)


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Size of vLLM's key-value cache, which is made at start and never grows.

    Args:
        num_bytes: size on one rank.
        longest: tokens of the longest sequence that it can hold.
    """

    num_bytes: int
    longest: int


def vllm_cache(config: Config, spec: RoleSpec) -> CacheSize:
    """`rollout.kv_cache_gb`; `auto`: all that a step's samples can need, on a CPU at most 2 GB."""
    model, tp, on_cpu = spec.model, spec.placement.degrees["tp"], spec.device_type == "cpu"
    rollout, length = config.rollout, longest_sequence(config, model.max_position)
    multiple = BLOCK_MULTIPLE[spec.device_type]
    block = -(-rollout.block_size // multiple) * multiple
    block_bytes = cached_values(model, tp) * spec.dtype.itemsize * block
    if rollout.kv_cache_gb == "auto":
        running = min(samples_per_replica(config, spec), rollout.max_running)
        needed = running * -(-length // block)
        most = int(2e9) // block_bytes if on_cpu else needed
        blocks = max(min(needed, most), -(-length // block)) + 1  # vLLM keeps one for itself
    else:
        blocks = max(int(rollout.kv_cache_gb * 1e9) // block_bytes, 2)
    return CacheSize(num_bytes=blocks * block_bytes, longest=min(length, (blocks - 1) * block))


def ends_of_text(model: ModelConfig, texts: TokenTexts | None) -> tuple[int, ...]:
    """The tokens that end a response: those of the model's files and of its tokenizer."""
    named = [*model.eos_ids, *[end.token for end in ([] if texts is None else texts.ends)]]
    return tuple(i for i in dict.fromkeys(named) if 0 <= i < model.vocab_size)
