"""The engines that are held to the contract, and how a test tells what became of its clauses."""

from __future__ import annotations

from typing import Any

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.vllm_engine import VllmEngine
from spmdrl.rollout.vllm_model import VOCAB_MULTIPLE
from spmdrl.testing.clause import Report
from spmdrl.testing.engine_subject import EngineCandidate
from vllm_cases import make_vllm


def make_native(
    model: ModelConfig, *, tp: Parallel, texts: TokenTexts, **options: Any
) -> NativeEngine:
    given = {"block_size": 8, "keeps_aborted": True, **options}
    return NativeEngine(model, tp=tp, texts=texts, options=NativeOptions(**given))


def _make_vllm(
    model: ModelConfig, *, tp: Parallel, texts: TokenTexts, **options: Any
) -> VllmEngine:
    return make_vllm(model, tp=tp, texts=texts, **options)


NATIVE = EngineCandidate(name="native", make=make_native)
VLLM = EngineCandidate(
    name="vllm",
    make=_make_vllm,
    vocab_multiple=VOCAB_MULTIPLE,
    lacks=frozenset({"ranks_of_its_own", "resumed_calls", "freed_caches"}),
)


def errors_of(report: Report) -> dict[str, str | None]:
    """What each clause that applies finds: None where it holds."""
    return {
        found.clause: None if found.error is None else str(found.error)
        for found in report.verdicts
        if found.skipped is None
    }
