"""The rollout's engine: its requirements on the configuration, its sizes, its construction."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spmdrl.config import Config
from spmdrl.config_sets import held_out_sets, rows_read
from spmdrl.distributed.mesh import Mesh, format_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.generation import GRAPHS, KV_CACHE
from spmdrl.models.config import ModelConfig
from spmdrl.models.token_texts import TokenTexts
from spmdrl.passes import WEIGHTS
from spmdrl.placement import Placement
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import RolloutEngine
from spmdrl.rollout.vllm_engine import VllmEngine, check_model
from spmdrl.rollout.vllm_model import VOCAB_MULTIPLE
from spmdrl.rollout.vllm_requests import BLOCK_MULTIPLE, LEAST_TEMPERATURE, VllmOptions
from spmdrl.rollout.vllm_versions import check_version, installed_version

log = logging.getLogger(__name__)

_LEAST_LENGTH = 64
"""Tokens of a sequence that every engine must serve: the canary's rows are shorter."""


def is_vllm(config: Config, name: str) -> bool:
    return config.rollout.engine == "vllm" and config.role_kind(name) == "rollout"


def vocab_multiple(config: Config, name: str) -> int:
    """Multiple to which the role's vocabulary is padded."""
    return VOCAB_MULTIPLE if is_vllm(config, name) else 1


def shares_tensors(config: Config, name: str, device: torch.device) -> bool:
    """Whether the rollout can compute with the policy's own tensors. vLLM's graphs hold addresses
    of tensors that vLLM made.
    """
    return not is_vllm(config, name) or device.type == "cpu"


def check_engine(
    config: Config,
    placements: Mapping[str, Placement],
    shapes: Mapping[str, ModelConfig],
    size: int,
) -> None:
    """Refuse placements that vLLM cannot use, and sampling that it would do differently.

    Args:
        size: number of ranks of the world.

    Raises:
        ValueError: the placement or sampling does not suit vLLM; the keys are named.
    """
    rollouts = [name for name in placements if is_vllm(config, name)]
    if rollouts:
        _check_sampling(config)
    if len(rollouts) > 1:
        raise ValueError(
            f"rollout.engine=vllm with the rollouts {rollouts}: a process has one vLLM, so take "
            "all but one away, or set rollout.engine=native"
        )
    for name in rollouts:
        placement = placements[name]
        if placement.ranks != tuple(range(size)):
            raise ValueError(
                f"rollout.engine=vllm with roles.{name}.ranks={config.roles[name].ranks!r} (ranks "
                f"{format_ranks(placement.ranks)} of {size}): vLLM lays its groups over all ranks "
                f"of the world, so set roles.{name}.ranks=all, or rollout.engine=native"
            )
        if placement.degrees["cp"] > 1:
            raise ValueError(
                f"rollout.engine=vllm with roles.{name}.cp={placement.degrees['cp']}: an engine "
                f"has tensor parallelism alone, so set roles.{name}.tp instead"
            )
        tp, vocabulary = placement.degrees["tp"], shapes[name].vocab_size
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


def check_installed(config: Config, name: str, shape: ModelConfig) -> None:
    """Refuse a vLLM that is missing, has an unsuitable version, or lacks the role's model.

    Raises:
        ValueError: vLLM cannot be used; the message tells the fix.
    """
    if not is_vllm(config, name):
        return
    wanted = "cpu" in (config.device, config.roles[name].device)
    device_type = "cpu" if wanted or not torch.cuda.is_available() else "cuda"
    check_version(installed_version(), torch.__version__, on_cuda=device_type == "cuda")
    check_model(shape, device_type)


def engine_parts(
    config: Config, name: str, device: torch.device, *, captures_graphs: bool
) -> tuple[str, ...]:
    """Parts of the rollout that its calls need on the device."""
    if is_vllm(config, name) and device.type == "cuda":
        return (WEIGHTS,)  # the cache comes and goes with them
    return (WEIGHTS, KV_CACHE, *[GRAPHS] * captures_graphs)


# Sizes


def longest_sequence(config: Config, shape: ModelConfig) -> int:
    """Tokens of the longest prompt with response that configuration and model allow."""
    lengths = [rows.longest for rows in rows_read(config) if rows.sampling is not None]
    return min(max(_LEAST_LENGTH, *lengths), shape.max_position)


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Size of vLLM's key-value cache, which is made at start and never grows.

    Args:
        num_bytes: size on one rank.
        longest: tokens of the longest sequence that it can hold.
    """

    num_bytes: int
    longest: int


def vllm_cache(
    config: Config,
    shape: ModelConfig,
    dtype: torch.dtype,
    device_type: str,
    *,
    num_replicas: int,
    tp: int,
) -> CacheSize:
    """`rollout.kv_cache_gb`; `auto`: all that a step's samples can need, on a CPU at most 2 GB."""
    rollout, length = config.rollout, longest_sequence(config, shape)
    multiple = BLOCK_MULTIPLE[device_type]
    block = -(-rollout.block_size // multiple) * multiple
    heads = max(1, shape.num_kv_heads // tp)
    block_bytes = 2 * shape.num_layers * heads * shape.head_dim * dtype.itemsize * block
    if rollout.kv_cache_gb == "auto":
        samples = config.data.prompts_per_step * config.data.group_size
        running = min(-(-samples // num_replicas), rollout.max_running)
        needed = running * -(-length // block)
        most = int(2e9) // block_bytes if device_type == "cpu" else needed
        blocks = max(min(needed, most), -(-length // block)) + 1  # vLLM keeps one for itself
    else:
        blocks = max(int(rollout.kv_cache_gb * 1e9) // block_bytes, 2)
    return CacheSize(num_bytes=blocks * block_bytes, longest=min(length, (blocks - 1) * block))


# Construction


def make_engine(
    config: Config,
    name: str,
    shape: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    texts: TokenTexts | None,
    *,
    sleeps: bool,
) -> RolloutEngine | None:
    """Make the rollout's engine on this rank; None outside it. Every rank calls it.

    Args:
        texts: texts of tokens, or None for no stop texts and only the ends of text of `shape`.
        sleeps: on CUDA, its weights do not stay on the device.
    """
    if not mesh.is_member:
        return None
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    ep = Parallel(rank=mesh.coordinate("ep"), size=mesh.size("ep"))
    eos = ends_of_text(shape, texts)
    if is_vllm(config, name):
        if device.type == "cpu":
            log.info(
                "vLLM cannot free memory on a CPU: roles.%s.memory is keep for all its parts", name
            )
        return VllmEngine(
            shape,
            options=_vllm_options(config, shape, mesh, device, dtype, sleeps=sleeps),
            tp=tp,
            device=device,
            dtype=dtype,
            eos_token_ids=eos,
            texts=texts,
        )
    return NativeEngine(
        shape,
        tp=tp,
        ep=ep,
        options=_native_options(config, device),
        device=device,
        dtype=dtype,
        eos_token_ids=eos,
        texts=texts,
    )


def ends_of_text(shape: ModelConfig, texts: TokenTexts | None) -> tuple[int, ...]:
    """The tokens that end a response: those of the model's files and of its tokenizer."""
    named = [*shape.eos_ids, *[end.token for end in ([] if texts is None else texts.ends)]]
    return tuple(i for i in dict.fromkeys(named) if 0 <= i < shape.vocab_size)


def _native_options(config: Config, device: torch.device) -> NativeOptions:
    rollout, keep = config.rollout, config.checkpoint.journal_kv
    return NativeOptions(
        kv_cache_gb=rollout.kv_cache_gb,
        block_size=rollout.block_size,
        max_running=rollout.max_running,
        prefill_tokens=rollout.prefill_tokens,
        cuda_graphs=rollout.cuda_graphs,
        keeps_aborted=device.type == "cpu" if keep == "auto" else keep,
    )


def _vllm_options(
    config: Config,
    shape: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sleeps: bool,
) -> VllmOptions:
    replicas, tp = len(mesh.replicas()), mesh.size("tp")
    cache = vllm_cache(config, shape, dtype, device.type, num_replicas=replicas, tp=tp)
    return VllmOptions(
        kv_cache_bytes=cache.num_bytes,
        max_length=cache.longest,
        block_size=config.rollout.block_size,
        max_running=config.rollout.max_running,
        prefill_tokens=config.rollout.prefill_tokens,
        cuda_graphs=config.rollout.cuda_graphs,
        sleeps=sleeps,
        cache_mend=_mend(config),
    )


def _mend(config: Config) -> str:
    if config.rollout.kv_cache_gb == "auto":
        return (
            "vLLM is started for data.train.max_tokens and sampling.max_tokens (or those of "
            "evaluation), raise them"
        )
    return f"raise rollout.kv_cache_gb={config.rollout.kv_cache_gb}"
