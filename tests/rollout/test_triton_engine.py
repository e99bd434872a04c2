"""The native engine with Triton's kernels, interpreted on the CPU, draws what torch's draws.

Every model serves the same calls twice in one process: by torch's operations, and with the kernels
as on a GPU. Only what torch has no kernel for on a CPU, attention over pages of steps with prompt
chunks, is `paged` in both. Graphs of decode steps are replaced by their calls (`Called`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from rollout_models import EOS, VOCAB, assert_same, make_engine, prompts_of, request, tiny_model
from test_paged_options import paged

from kernel_proofs import interpreter, launched
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.kernels import cpu, gpu
from spmdrl.models.sharding import global_shapes
from spmdrl.rollout.native import varlen, workspace
from spmdrl.rollout.protocol import Completion
from spmdrl.testing.engine_models import StateDict

Run = Callable[..., Any]

LAYER = {"turn_and_store_heads", "attend_split", "add_norm_row", "swiglu_block"}
"""Kernels of a decode step's layer."""

DRAWS = {"draw_slice", "combine_slices"}
"""Kernels that draw tokens."""

OTHER_MLPS = ("Gemma2", "GptOss")
"""Models whose MLPs are no SwiGLU."""


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    pytest.importorskip("triton")
    with interpreter() as run:
        yield run


class Called:
    """`DecodeGraphs` without graphs: steps are padded, and called."""

    def __init__(self, max_running: int, device: torch.device) -> None:
        self.max_running = max_running
        self.results: list[int] = []
        self.pool_bytes = 0

    def size_for(self, num_samples: int) -> int:
        return num_samples + 1  # one idle row

    def run(self, size: int, inputs: Any, forward: Any, variant: Any, *, idle: Any) -> Any:
        assert [x.shape for x in idle()] == [x.shape for x in inputs]
        self.results.append(len(found := forward(*inputs)))
        assert all(len(x) == size for x in found)
        return found

    def drop(self) -> None:
        pass


def drawn_model() -> tuple[ModelConfig, StateDict]:
    """Make a model with norms of heads, without transformers, whose import takes seconds."""
    config = parse_config(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "eos_token_id": EOS,
        }
    )
    shapes, tensors = global_shapes(config, "lm"), {}
    random = torch.Generator().manual_seed(1)
    for name, shape in sorted(shapes.items()):
        drawn = torch.randn(shape, generator=random)
        tensors[name] = 1 + 0.3 * drawn if name.endswith("norm.weight") else drawn * 0.2
    return config, StateDict(tensors)


def served(
    name: str,
    changes: dict[str, Any],
    lengths: Sequence[int],
    samplings: Sequence[dict[str, Any]] = ({},),
    in_graph: int | None = None,
    split: int | None = None,
    **sampling: Any,
) -> None:
    """Serve a call by torch's operations and by the kernels, and compare what comes.

    Args:
        name: the model, for `tiny_model`; empty: `drawn_model`.
        samplings: what requests ask for in addition to `sampling`, by turns.
        in_graph: steps are captured, and so many of them draw their tokens in the graph.
        split: keys of a split; rows that share so many in their pages read them together.
    """
    torch.set_num_threads(1)
    workspace.pages_are_usable = lambda *_: True
    workspace.BLOCK_MULTIPLE = 1
    workspace.DecodeGraphs = Called
    varlen.varlen_attn = lambda: paged
    model, source = tiny_model(name, **changes) if name else drawn_model()
    asked = [
        request(p, i, 1 + i % 2, margins=True, **{**sampling, **samplings[i % len(samplings)]})
        for i, p in enumerate(prompts_of(*lengths))
    ]
    names: set[str] = set()
    launched(names)
    found: list[list[Completion]] = []
    cpu._rows, gpu.runs_on = (lambda: None), (lambda device: False)
    with shares(split) as shared:
        for _ in range(2):
            captures = in_graph is not None and bool(found)
            engine = make_engine(model, source, prefill_tokens=16, cuda_graphs=captures)
            given = engine.generate(asked, seed=3, step=1)
            found.append([c for group in given for c in group])
            assert bool(names) == (len(found) == 2), names
            gpu.runs_on = lambda device: True
    expected_names = (LAYER | DRAWS) - ({"swiglu_block"} if name in OTHER_MLPS else set())
    if split is not None:
        expected_names ^= {"attend_split", "attend_together"}
        assert max(shared) >= split, shared
    assert names >= expected_names, expected_names - names
    for place, (expected, own) in enumerate(zip(*found, strict=True)):
        assert_same(own, expected, (name, place))
        assert same_support(own, expected), (own.support, expected.support)
    graphs = engine._workspace._graphs
    if in_graph is not None:
        assert isinstance(graphs, Called)
        assert graphs.results.count(3) == in_graph, graphs.results


@contextmanager
def shares(split: int | None) -> Iterator[set[int]]:
    """Let splits have so many keys, and collect the numbers of keys that rows are told to share."""
    from spmdrl.models.kernels.cuda import cascade, decode

    found: set[int] = set()
    size, attend = decode.SPLIT, cascade.cascade_attention

    def watching(*operands: Any, sharing: torch.Tensor, **others: Any) -> torch.Tensor:
        found.update(sharing[2].tolist())
        return attend(*operands, sharing=sharing, **others)

    decode.SPLIT, cascade.cascade_attention = split or size, watching
    try:
        yield found
    finally:
        decode.SPLIT, cascade.cascade_attention = size, attend


def same_support(own: Completion, other: Completion) -> bool:
    if own.support is None or other.support is None:
        return own.support is other.support
    return torch.equal(own.support.values, other.support.values)


def test_a_model_is_served_alike(interpreted: Run) -> None:
    interpreted(partial(served, max_tokens=3, ignore_eos=True), "", {}, (3, 9))


MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "support": True},
    {"top_k": 5, "support": True, "max_tokens": 2},
    {"temperature": 0.0},
)


def test_rows_of_every_kind_are_drawn_alike_in_one_batch(interpreted: Run) -> None:
    """Rows with top-k are drawn by torch; once they have ended the graph draws all others."""
    asked = partial(served, samplings=MIXED, ignore_eos=True, in_graph=1)
    interpreted(partial(asked, max_tokens=3), "", {}, (3, 2, 4))


def test_samples_of_a_prompt_read_it_together(interpreted: Run) -> None:
    """Two samples of a prompt of three pages, of which two are full, and one of another; one that
    ends early leaves the other alone.
    """
    asked = partial(served, samplings=({}, {"max_tokens": 2}), ignore_eos=True, split=16)
    interpreted(partial(asked, max_tokens=3), "", {}, (3, 20))


@pytest.mark.full
def test_a_planted_share_of_pages_that_are_not_full(interpreted: Run) -> None:
    interpreted(shares_too_much)


def shares_too_much() -> None:
    """Tell the kernel that samples of a prompt share their own pages, too, where their first tokens
    lie.
    """
    from spmdrl.rollout.native import rows

    plain = rows.find_sharing

    def planted(*operands: Any) -> Any:
        found = plain(*operands)
        found[2:] += 16 * (found[2:] > 0)
        return found

    rows.find_sharing = planted
    try:
        with pytest.raises(AssertionError):
            served("", {}, (3, 31), ignore_eos=True, split=16, max_tokens=4)
    finally:
        rows.find_sharing = plain


@pytest.mark.full
@pytest.mark.parametrize(
    "name, changes",
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 7}),
        (
            "Gemma2",
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 9,
                "attn_logit_softcapping": None,
            },
        ),
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_models_are_served_alike(
    interpreted: Run, name: str, changes: dict[str, Any], temperature: float
) -> None:
    sampling = {"max_tokens": 10, "temperature": temperature, "ignore_eos": True}
    interpreted(partial(served, **sampling), name, changes, (3, 24, 40))
