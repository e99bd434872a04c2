"""The plan's estimate of a call's working memory against what operations allocate in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allocations import Allocations
from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.planning.systems.torch_native import TorchSystem
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.weights.layout import model_layout
from spmdrl.world import World
from sweeps import asked, swept

pytestmark = pytest.mark.slow

TOKENS = 1600
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 680,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 192,
}
DELTA = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
SHAPES = {"experts": EXPERTS, "delta": DELTA}
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "experts": {},
    "delta": {},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "shard": {"dp_shard": 2},
}


def model_of(name: str) -> ModelConfig:
    return parse_config({**MODEL, **SHAPES.get(name, {})})


def rows() -> Batch:
    """`TOKENS` tokens in a few sequences, without prompts to share."""
    count = 8
    return from_rows(
        [list(range(TOKENS // count))] * count,
        rows={
            "prompt_lengths": torch.full((count,), 8),
            "prompt_ids": torch.arange(count),
            "sample_index": torch.zeros(count, dtype=torch.int64),
        },
    )


class Float32Products(TorchDispatchMode):
    """Matrix products of bfloat16 by way of float32.

    A CPU without bfloat16 instructions takes twenty times as long for some of them. `Allocations`,
    entered later, sees the same operation with the same result, and nothing of what is done here.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16:
            return (args[0].float() @ args[1].float()).bfloat16()
        return func(*args, **(kwargs or {}))


def total(given: LossInput) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return given["logprobs"].sum(), {}


Case = tuple[str, torch.dtype, str]
"""A layout of `LAYOUTS`, a dtype, what is recomputed."""

CASES: list[Case] = [
    (name, dtype, recompute)
    for name in LAYOUTS
    for dtype in (torch.float32, torch.bfloat16)
    for recompute in ("none", "layer")
]


def size_of(case: Case) -> int:
    return 2 if LAYOUTS[case[0]] else 1


def degrees_of(case: Case) -> dict[str, Any]:
    return {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, **LAYOUTS[case[0]]}


def measured(world: World, cases: list[Case]) -> list[tuple[int, int]]:
    """Peak bytes of a forward pass, and of a forward and backward pass, on this rank, by case."""
    return [measure(world, case) for case in cases]


def measure(world: World, case: Case) -> tuple[int, int]:
    name, dtype, recompute = case
    config = model_of(name)
    mesh = Mesh("policy", tuple(range(world.size)), degrees_of(case), "cpu")
    plain = TrainSection()
    options = TrainOptions(
        microbatch_tokens=TOKENS,
        recompute=recompute,  # type: ignore[arg-type]
        attention="auto",
        head_chunk=plain.head_chunk,
        lr=1e-3,
        total_steps=1,
        param_dtype=dtype,
    )
    backend = TorchBackend(mesh, config, RandomCheckpoint(config, 0), options, world.device)
    # with FSDP every rank has the same rows: its replicas compute alike
    batch = rows()
    with Float32Products(), Allocations() as forward:
        backend.forward(batch, next_token())
    with Float32Products(), Allocations() as update:
        backend.forward_backward(batch, total, next_token(), normaliser=1.0)
    return forward.peak, update.peak


def estimated(
    model: ModelConfig, degrees: dict[str, int], dtype: torch.dtype, recompute: str, backward: bool
) -> int:
    ranks = range(degrees["dp_shard"] * degrees["cp"] * degrees["tp"])
    spec = RoleSpec(
        name="policy",
        kind="policy",
        section=RoleSection(),
        train=TrainSection.model_validate({"recompute": recompute}),
        placement=Placement(ranks=tuple(ranks), degrees=degrees),
        path=Path("model"),
        model=model,
        device_type="cpu",
        dtype=dtype,
        trained=True,
        backend="torch",
        is_tiny=False,
    )
    work = working_bytes(spec, TOKENS, backward=backward)
    held = torch.float32 if degrees["dp_shard"] > 1 else dtype
    table = model_layout(model, ranks, degrees, held)[0]
    added = TorchSystem().memory(spec, table, table)
    return work + (added.passes + added.gradients if backward else added.reads)


SINGLE, HALF = torch.float32, torch.bfloat16
# each layout, with either dtype and recomputation
BRIEF = [("one", SINGLE, "none"), ("one", HALF, "layer"), ("experts", SINGLE, "layer")]
BRIEF += [("tp", HALF, "layer"), ("cp", SINGLE, "none"), ("shard", HALF, "none")]


@pytest.fixture(scope="module")
def peaks(request: pytest.FixtureRequest) -> dict[Case, list[tuple[int, int]]]:
    """Case -> peaks of each rank; the cases of one size share a world."""
    found, wanted = {}, asked(request, "name", "dtype", "recompute")
    for size in (1, 2):
        cases = [case for case in CASES if size_of(case) == size and case in wanted]
        if not cases:
            continue
        by_rank = run_ranks(measured, size, cases, timeout_s=300)
        found |= {case: [own[i] for own in by_rank] for i, case in enumerate(cases)}
    return found


@pytest.mark.parametrize(("name", "dtype", "recompute"), swept(CASES, BRIEF), ids=str)
def test_the_estimate_is_a_close_upper_bound(
    name: str, dtype: torch.dtype, recompute: str, peaks: dict[Case, list[tuple[int, int]]]
) -> None:
    case = name, dtype, recompute
    for own in peaks[case]:
        for peak, backward in zip(own, (False, True), strict=True):
            found = estimated(model_of(name), degrees_of(case), dtype, recompute, backward)
            assert peak <= found <= 1.65 * peak, (backward, peak, found)
