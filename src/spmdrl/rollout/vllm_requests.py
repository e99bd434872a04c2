"""Sizes and requests in vLLM's terms, and checks of what it cannot do. It is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spmdrl.config.sections import RolloutSection
from spmdrl.keyed_random import key64
from spmdrl.rollout.protocol import MAX_SUPPORT, Request, SamplingParams

BLOCK_MULTIPLE = {"cpu": 32, "cuda": 16}
"""Multiple to which the tokens of a cache block are rounded up, by device type."""

LEAST_TEMPERATURE = 0.01
"""Least temperature above 0; vLLM raises lower ones, and reports it only in its log."""

TIES = 16
"""Tokens asked for beyond top_k, because vLLM keeps all that tie with the last one."""

SUPPORT_NEEDS_TOP_K = (
    "training on truncated samples needs the tokens that they were drawn from, and with "
    "rollout.engine=vllm only a limited number of these is known: set sampling.top_k between 1 and "
    f"{MAX_SUPPORT} (other limits may stay), or top_p=1 and min_p=0, or rollout.engine=native"
)

_SEED_BITS = 63

ENVIRONMENT: dict[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # older versions would pin the trainer's threads too
    "VLLM_CPU_KVCACHE_SPACE": None,  # it would override kv_cache_memory_bytes
    "VLLM_NO_USAGE_STATS": "1",  # a thread that reports over HTTP
}
"""Environment variables of the process while vLLM runs in it; None removes one."""


class VllmOptions(RolloutSection):
    """The section `rollout` with what the run adds to it.

    Args:
        kv_cache_bytes: bytes of one rank's cache, allocated at start.
        max_length: most tokens of prompt and response together.
        sleeps: let weights and cache leave the device between calls (`sleep`); only on CUDA.
    """

    kv_cache_bytes: int
    max_length: int
    sleeps: bool = False

    @property
    def cache_fix(self) -> str:
        """Text for messages: how to make the cache larger."""
        if self.kv_cache_gb == "auto":
            return (
                "vLLM is started for data.train.max_tokens and sampling.max_tokens (or those of "
                "evaluation), raise them"
            )
        return f"raise rollout.kv_cache_gb={self.kv_cache_gb}"


def sampling_arguments(
    sampling: SamplingParams, eos: Sequence[int], key: tuple[int, ...]
) -> dict[str, Any]:
    """Make vLLM's sampling parameters for one sample.

    All ends of text are given here, since vLLM reads fewer of them from the model. Stop texts are
    searched for outside vLLM.

    Args:
        eos: the model's ends of text.
        key: (seed, step, prompt id, sample), the key of the sample's random numbers, and the number
            of its turn from the second one on. vLLM draws them one after another, so they also
            depend on the token's place in the turn, and on nothing else.
    """
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": sorted(ends),
        "ignore_eos": True,
        "seed": None if sampling.is_greedy else key64(*key) & (2**_SEED_BITS - 1),
        "logprobs": sampling.top_k + TIES if sampling.support else 0,
        "detokenize": False,
    }


def check_sampling(requests: Sequence[Request]) -> None:
    """Refuse options that vLLM lacks or would apply differently.

    Raises:
        ValueError: a request has one; the message names the key of the first.
    """
    for request in requests:
        sampling = request.sampling
        where = f"rollout.engine=vllm, prompt_id {request.prompt_id}: sampling"
        if sampling.margins:
            raise ValueError(f"{where}.margins=True: vLLM does not tell how near a draw was")
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"{where}.temperature={sampling.temperature}: vLLM takes 0 (greedy) or at least "
                f"{LEAST_TEMPERATURE}"
            )
        if sampling.support and not 1 <= sampling.top_k <= MAX_SUPPORT:
            raise ValueError(f"{where}.top_k={sampling.top_k}: {SUPPORT_NEEDS_TOP_K}")
        if sampling.min_p > 0 and sampling.top_p < 1:
            raise ValueError(
                f"{where}.min_p={sampling.min_p} with top_p={sampling.top_p}: vLLM cuts min_p "
                "first, which leaves other tokens than the order of this project: set one of them"
            )
