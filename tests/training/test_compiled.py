"""Layers compiled by torch's compiler (`train.compile`): as they train without it, from few graphs.

Graphs are made as for a run, but torch's operations compute them: Inductor takes a minute where
these take seconds. The sweeps marked `full` have Inductor's code too.
"""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from adapter_backends import adapter_of, make_role
from backend_runs import make_backend
from torch import Tensor
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from role_specs import specs_of
from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.models import compiled
from spmdrl.models.compiled import check_compiler
from spmdrl.models.config import ModelConfig
from spmdrl.planning.systems.torch_native import TorchSystem
from spmdrl.testing.backend_contract import check_backend
from spmdrl.testing.cases import tiny_experts
from spmdrl.testing.subject import Candidate, Layout
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

GRAPHS, EAGER, CODE = "eager", "aot_eager", "inductor"
"""Torch's operations compute the forward's graph, both graphs, or Inductor's code does."""
LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Args:
    graphs: the most graphs of four layers: of the first layer's entry, of the others', and of what
        follows attention, with and without gradients; and one of a single token.
    """

    experts: bool = False
    adapter: bool = False
    given: dict[str, Any] = field(default_factory=dict)
    degrees: dict[str, int] = field(default_factory=dict)
    code: str = EAGER
    graphs: int = 6


CASES = {
    "dense": Case(code=GRAPHS),
    "dense, both passes": Case(),
    "experts": Case(experts=True),
    "adapter": Case(adapter=True, graphs=8),  # the first stream has no gradient
    "recomputed": Case(given={"recompute": "layer"}),
    "bfloat16": Case(given={"param_dtype": torch.bfloat16}),
    "sharded": Case(degrees={"dp_shard": 2}, graphs=8),
    "tensor parallel": Case(degrees={"tp": 2}),
    "inductor": Case(code=CODE),
    "inductor, bfloat16": Case(given={"param_dtype": torch.bfloat16}, code=CODE),
    "inductor, sharded": Case(degrees={"dp_shard": 2}, code=CODE, graphs=8),
    "inductor, tensor parallel": Case(degrees={"tp": 2}, code=CODE),
}
Step = tuple[float, Tensor, float, Tensor]
"""Loss, every gradient, norm, log-probabilities after the update."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "dense" else [pytest.mark.full]) for n in CASES]
)
def test_compiled_layers_train_as_others_do(name: str) -> None:
    """Microbatches of many lengths, in steps whose gradients, losses and values are the same."""
    case = CASES[name]
    size = max([1, *case.degrees.values()])
    for plain, fused, graphs in run_ranks(both, size, case, timeout_s=500):
        rounded = case.given.get("param_dtype") == torch.bfloat16 and case.code == CODE
        for one, other in zip(plain, fused, strict=True):
            for a, b in zip(one, other, strict=True):
                if not rounded:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        if rounded:  # later steps add up the other rounding
            assert max(map(distance, fused[0], plain[0])) < 0.05
        early, late, breaks = graphs
        assert early == late <= case.graphs, "a graph for each length, or for each layer"
        assert breaks == {}


def distance(one: Any, other: Any) -> float:
    """Norm of the difference, as a share of the second one's."""
    a, b = torch.as_tensor(one), torch.as_tensor(other)
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def from_float32(world: World) -> tuple[float, float]:
    """Distances of the first step's gradients in bfloat16, without and with Inductor's code."""
    half = Case(given={"param_dtype": torch.bfloat16}, code=CODE)
    compiled.COMPILER = CODE
    exact = steps(world, Case(), "none")[0][0][1]
    plain, fused = (steps(world, half, how)[0][0][1] for how in ("none", "blocks"))
    return distance(plain, exact), distance(fused, exact)


@pytest.mark.full
def test_compiled_bfloat16_is_as_near_to_float32() -> None:
    """Inductor rounds fewer of the numbers between operations."""
    [(plain, fused)] = run_ranks(from_float32, 1, timeout_s=500)
    print(plain, fused)
    assert 0 < fused < 1.1 * plain < 0.1


def both(
    world: World, case: Case
) -> tuple[list[Step], list[Step], tuple[int, int, dict[str, int]]]:
    """Steps without and with compiled layers, the graphs after two and after all, and breaks."""
    from torch._dynamo.utils import counters

    compiled.COMPILER = case.code
    plain, _ = steps(world, case, "none")
    counters.clear()
    fused, graphs = steps(world, case, "blocks")
    return plain, fused, (graphs[1], graphs[-1], dict(counters["graph_break"]))


def steps(world: World, case: Case, how: str) -> tuple[list[Step], list[int]]:
    from torch._dynamo.utils import counters

    model = model_of(case)
    given = options(**case.given, compile=how)
    if case.adapter:
        mesh = Mesh("policy", range(world.size), case.degrees, "cpu")
        backend = make_role(mesh, model, adapter_of(model), given)
    else:
        backend = make_backend(world, given, model, **case.degrees)
    found, graphs = [], []
    for step in range(4):
        rows = make_rows([6 + step, 3, 9 + 2 * step], 3, seed=step)
        sums = backend.forward_backward(rows, loss_fn, next_token(), normaliser=10.0)
        own = gradients(backend)
        norm = backend.optim_step().grad_norm
        after = backend.forward(rows, next_token())["logprobs"]
        found.append((sums["loss"], own, norm, after))
        graphs.append(counters["stats"]["unique_graphs"])
    held = weakref.ref(backend)
    del backend
    gc.collect()
    assert held() is None, "graphs keep the backend"
    return found, graphs


def gradients(backend: TorchBackend) -> Tensor:
    """Every gradient of this rank, side by side."""
    found = []
    for leaf in backend._trained:
        total = backend._sums.get(leaf.name)
        own = leaf.gradient() if total is None else total.total
        if own is not None:
            found.append(own.detach().float().flatten().clone())
    assert found
    return torch.cat(found)


def model_of(case: Case) -> ModelConfig:
    make = tiny_experts if case.experts else tiny_config
    return make(num_hidden_layers=LAYERS)


def fixed(world: World) -> bool:
    """Whether microbatches of other lengths are compiled anew where lengths are fixed."""
    compile_ = torch.compile

    @functools.wraps(compile_)
    def with_fixed_lengths(*given: Any, **words: Any) -> Any:
        return compile_(*given, **{**words, "dynamic": False})

    torch.compile = with_fixed_lengths  # type: ignore[assignment]
    *_, (early, late, _) = both(world, Case(code=GRAPHS))
    return early < late


@pytest.mark.full
def test_a_graph_for_each_length_is_seen() -> None:
    assert run_ranks(fixed, 1, timeout_s=500) == [True]


COMPILED = Candidate(
    name="torch, compiled",
    train={"backend": "torch", "compile": "blocks"},
    layouts={1: (Layout(),)},
)
CLAUSES = (
    *("readouts", "float32 sums", "exact resume", "parts that leave", "adapters"),
    *("shared bases", "experts"),
)


@pytest.mark.full
@pytest.mark.contract
@pytest.mark.parametrize("clause", CLAUSES)
def test_compiled_layers_pass_the_contract(clause: str) -> None:
    [lines] = run_ranks(held, 1, clause, timeout_s=300)
    assert f"  holds   {clause}" in lines, lines


def held(world: World, clause: str) -> list[str]:
    compiled.COMPILER = EAGER
    return list(check_backend(COMPILED, world, only=[clause]).require().lines())


BASE: dict[str, Any] = {
    "steps": 1,
    "run_dir": "runs/test",
    "model": {"path": "models/toy"},
    "data": {"train": {"source": "a.jsonl"}, "prompts_per_step": 4},
    "rewards": [{"function": "exact"}],
    "train": {"compile": "blocks"},
}


@pytest.mark.parametrize(
    ("model", "policy", "words"),
    [
        (
            tiny_config(
                "DeepseekV3ForCausalLM",
                num_key_value_heads=4,
                q_lora_rank=12,
                kv_lora_rank=10,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=6,
                first_k_dense_replace=2,
            ),
            {},
            r"roles\.policy\.train\.compile=blocks: layer 0 .*policy\.train\.compile=none",
        ),
        (
            tiny_config(),
            {"adapter": {"rank": 2, "dropout": 0.1}},
            r"compile=blocks with .*adapter\.dropout=0\.1: .*set roles\.policy\.adapter\.dropout=0",
        ),
    ],
)
def test_what_is_not_compiled_is_refused(
    model: ModelConfig, policy: dict[str, Any], words: str
) -> None:
    config = Config.model_validate({**BASE, "roles": {"policy": policy, "rollout": {}}})
    specs = specs_of(config, model)
    with pytest.raises(ValueError, match=words):
        TorchSystem().check(specs["policy"], specs)
    plain = replace(specs["policy"], model=tiny_config(), adapter=None)
    TorchSystem().check(plain, specs)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        ValueError, match=r"train\.compile=blocks needs a C\+\+ compiler.*g\+\+.*CXX"
    ):
        check_compiler(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"train\.compile=blocks needs a C compiler.*gcc, clang"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"train\.compile=blocks needs Triton"):
        check_compiler(torch.device("cuda"))
