"""Construction of a rollout's or a judge's engine on this rank."""

from __future__ import annotations

import logging

import torch

from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.planning.engines import (
    ends_of_text,
    longest_served,
    samples_per_replica,
    vllm_cache,
)
from spmdrl.planning.questions import judge_section
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions, why_graphs_go
from spmdrl.rollout.protocol import RolloutEngine
from spmdrl.rollout.vllm_engine import VllmEngine
from spmdrl.rollout.vllm_requests import VllmOptions

log = logging.getLogger(__name__)


def make_engine(
    config: Config,
    spec: RoleSpec,
    mesh: Mesh,
    device: torch.device,
    texts: TokenTexts | None,
    *,
    sleeps: bool,
    cache_bytes: int | None = None,
) -> RolloutEngine | None:
    """Make the role's engine on this rank; None outside it. Every rank calls it.

    Args:
        texts: texts of tokens, or None for no stop texts and only the model's ends of text.
        sleeps: on CUDA, its weights do not stay on the device.
        cache_bytes: the native engine's cache in the memory plan; None: no bound.
    """
    if not mesh.is_member:
        return None
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    ep = Parallel(group=mesh.group("exchange"), rank=mesh.coordinate("ep"), size=mesh.size("ep"))
    eos = ends_of_text(spec.model, texts)
    if spec.is_vllm:
        if device.type == "cpu":
            log.info(
                "vLLM cannot free memory on a CPU: roles.%s.residency is keep for all its parts",
                spec.name,
            )
        return VllmEngine(
            spec.model,
            options=_vllm_options(config, spec, sleeps=sleeps),
            tp=tp,
            device=device,
            dtype=spec.dtype,
            eos_token_ids=eos,
            texts=texts,
        )
    engine = NativeEngine(
        spec.model,
        tp=tp,
        ep=ep,
        options=_native_options(config, spec, cache_bytes),
        device=device,
        dtype=spec.dtype,
        eos_token_ids=eos,
        texts=texts,
        adapter=spec.adapter,
        weights_leave=sleeps,
    )
    if engine.captures_graphs:
        reason = why_graphs_go(spec.model, device)
        log.info(
            "roles.%s: its graphs %s",
            spec.name,
            "stay while cache and weights are away"
            if reason is None
            else f"go with them: {reason}",
        )
    return engine


def _native_options(config: Config, spec: RoleSpec, cache_bytes: int | None) -> NativeOptions:
    keep = config.checkpoint.journal_kv
    own = {"kv_cache_gb": judge_section(config, spec.name).kv_cache_gb} if spec.is_judge else {}
    return NativeOptions(
        **{**config.rollout.model_dump(), **own},
        keeps_aborted=spec.device_type == "cpu" if keep == "auto" else keep,
        samples=samples_per_replica(config, spec),
        longest=longest_served(config, spec),
        planned_bytes=cache_bytes,
    )


def _vllm_options(config: Config, spec: RoleSpec, *, sleeps: bool) -> VllmOptions:
    cache = vllm_cache(config, spec)
    return VllmOptions(
        **config.rollout.model_dump(),
        kv_cache_bytes=cache.num_bytes,
        max_length=cache.longest,
        sleeps=sleeps,
    )
