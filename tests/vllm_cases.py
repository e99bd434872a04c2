"""Marks of the tests that need vLLM, and how they make its engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.rollout.vllm_engine import VllmEngine
from spmdrl.rollout.vllm_requests import VllmOptions
from spmdrl.rollout.vllm_versions import check_version, installed_version


def _missing() -> str | None:
    """Why there is no vLLM to test with."""
    try:
        check_version(installed_version(), torch.__version__, on_cuda=False)
    except ValueError as error:
        return str(error)
    return None


def needs_vllm(test: Any) -> Any:
    """The mark `vllm`, and a skip with the reason where there is none that fits."""
    reason = _missing()
    return pytest.mark.vllm(pytest.mark.skipif(reason is not None, reason=reason or "")(test))


def make_vllm(
    model: ModelConfig,
    source: TensorSource | None = None,
    *,
    tp: Parallel | None = None,
    texts: TokenTexts | None = None,
    **options: Any,
) -> VllmEngine:
    """An engine in this process; with `source` its weights are filled."""
    sizes = {"kv_cache_bytes": 64 << 20, "max_length": model.max_position, **options}
    engine = VllmEngine(model, options=VllmOptions(**sizes), tp=tp, texts=texts)
    if source is not None:
        fill(engine.local_tensors().values(), source)
    return engine
