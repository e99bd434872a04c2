"""The Megatron backend equals the torch backend and transformers, on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_runs import assemble, compare
from megatron_cases import (
    EXPERTS,
    KINDS,
    Case,
    case,
    make_backend,
    probe_rows,
    reference,
    run_cases,
    torch_records,
)
from training_cases import loss_fn

from harness import run_ranks
from spmdrl.batch import from_rows
from spmdrl.models.sharding import global_shapes
from spmdrl.training.packing import pack
from spmdrl.training.readout import next_token
from spmdrl.world import World
from sweeps import asked, swept

pytestmark = pytest.mark.megatron

SHORT = {"microbatch_tokens": 20}
LAYOUTS: dict[int, dict[str, Case]] = {
    1: {"tp1": case(), "tp1 recompute": case(given={"recompute": "layer", **SHORT})},
    2: {
        "tp2": case(tp=2),
        "tp2 sp": case(tp=2, sp=True, given=SHORT),
        "pp2": case(pp=2, given=SHORT),
        "pp2 vpp2": case(pp=2, vpp=2, given={"microbatch_tokens": 30, "recompute": "layer"}),
        "cp2": case(cp=2),
        "dp2 sharded": case(dp_shard=2),
        "dp2": case(dp_replicate=2, given={"share_prompts": False}),
    },
    4: {
        "tp2 pp2": case(tp=2, pp=2),
        "tp2 pp2 vpp2 sp": case(tp=2, pp=2, vpp=2, sp=True, given=SHORT),
        "tp2 cp2 sp": case(tp=2, cp=2, sp=True, given={"recompute": "layer"}),
        "pp2 cp2": case(pp=2, cp=2),
        "pp2 dp2 sharded": case(pp=2, dp_shard=2, given=SHORT),
        "dp2 x dp2 sharded": case(dp_replicate=2, dp_shard=2),
    },
}
MOE: dict[int, dict[str, Case]] = {
    1: {"tp1": case(given={"recompute": "layer", **SHORT})},
    2: {
        "ep2": case(dp_shard=2, ep=2),
        "tp2 ep2": case(tp=2, ep=2, sp=True, given=SHORT),
        "tp2": case(tp=2, sp=True, given={"recompute": "layer"}),
        "pp2 vpp2": case(pp=2, vpp=2, given=SHORT),
    },
    4: {
        "tp2 ep4": case(tp=2, dp_shard=2, ep=4, sp=True),
        "tp2 pp2 ep2": case(tp=2, pp=2, ep=2, sp=True, given=SHORT),
        "pp2 vpp2 ep2": case(pp=2, vpp=2, dp_shard=2, ep=2, given={"recompute": "layer"}),
        "cp2 ep2": case(cp=2, dp_replicate=2, ep=2),
    },
}
UNEVEN: dict[int, dict[str, Case]] = {
    1: {},
    2: {"pp2 vpp2": LAYOUTS[2]["pp2 vpp2"]},
    4: {"pp4": case(pp=4, given=SHORT)},
}
"""Chunks that do not divide the layers: the first and the last have one less."""


def layouts_of(kind: str) -> dict[int, dict[str, Case]]:
    if kind in EXPERTS:
        return MOE
    if kind == "windowed":
        return {1: {}, 2: {"tp2 sp": LAYOUTS[2]["tp2 sp"]}, 4: {}}
    return UNEVEN if kind == "uneven" else LAYOUTS


CASES = [
    (size, kind, name) for size in LAYOUTS for kind in KINDS for name in layouts_of(kind)[size]
]
BRIEF: dict[str, tuple[str, ...]] = {
    "qwen2": ("tp2 sp", "pp2 vpp2", "cp2", "dp2 sharded"),
    "qwen3_moe": ("tp2 ep2",),
    "uneven": ("pp2 vpp2",),
}
"""Layouts that are tried every time: most of the kind that differs most, and one of experts."""


def marked(key: tuple[int, str, str]) -> Any:
    _, kind, name = key
    brief = name in BRIEF.get(kind, ())
    return pytest.param(*key, marks=() if brief else pytest.mark.full)


@pytest.fixture(scope="module")
def expected(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """By kind: the torch backend's record on one rank, and transformers' (`hf`)."""
    kinds = sorted(asked(request, "kind")) or list(KINDS)
    found: dict[str, dict[str, Any]] = run_ranks(torch_records, 1, kinds)[0]
    return {kind: {**record, "hf": reference(KINDS[kind])} for kind, record in found.items()}


@pytest.fixture(scope="module")
def records(request: pytest.FixtureRequest) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
    """The record of all ranks for each case that is asked for; one launch for each world size."""
    wanted = asked(request, "size", "kind", "name")
    found = {}
    for size in LAYOUTS:
        names = [key for key in CASES if key[0] == size and key in wanted]
        cases = [(kind, layouts_of(kind)[size][name]) for _, kind, name in names]
        ranks = run_ranks(run_cases, size, cases, timeout_s=280) if cases else []
        for number, key in enumerate(names):
            found[key] = [rank[number] for rank in ranks]
    return found


@pytest.mark.parametrize(("size", "kind", "name"), [marked(key) for key in CASES])
def test_layouts_equal_the_torch_backend_and_transformers(expected, records, size, kind, name):
    config, ranks, hf = KINDS[kind], records[size, kind, name], expected[kind]["hf"]
    rows = expected[kind]["rows"]
    order = {tuple(row.tokens["tokens"].tolist()): i for i, row in enumerate(rows.split_rows())}
    for record in ranks:
        own = [order[tuple(r.tokens["tokens"].tolist())] for r in record["rows"].split_rows()]
        whole = rows.with_columns(tokens=hf["columns"]).select(own)
        for column in ("logprobs", "entropy"):
            torch.testing.assert_close(record["probe"][column], whole[column], rtol=1e-4, atol=1e-4)
    gradients = assemble([record["gradients"] for record in ranks], global_shapes(config))
    for parameter, wanted in hf["gradients"].items():
        torch.testing.assert_close(
            gradients[parameter], wanted, rtol=1e-4, atol=1e-4, msg=parameter
        )
    compare(ranks, expected[kind], config)


def test_the_torch_backend_equals_transformers_too(expected):
    for kind, record in expected.items():
        own = assemble([record["gradients"]], global_shapes(KINDS[kind]))
        for parameter, wanted in record["hf"]["gradients"].items():
            torch.testing.assert_close(own[parameter], wanted, rtol=1e-4, atol=1e-4)


def copies_and_state(world: World) -> list[dict[str, torch.Tensor]]:
    """Weights that both tp ranks hold, after steps with unlike gradients on them; and where AdamW's
    state lies.
    """
    found = []
    for kind, sp in (("qwen3", False), ("qwen3_moe", True)):
        backend = make_backend(world, KINDS[kind], case(tp=2, sp=sp))
        optimizer, rows = backend._optimizer, probe_rows()
        # under another default device, as a GPU's is not the CPU: the state is where its master is
        with torch.device("meta"):
            optimizer._start()
        for shard in optimizer.shards:
            for name, tensor in optimizer._state[shard.master].items():
                assert tensor.device == shard.master.device, name
        for _ in range(2):
            backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            for shard in optimizer.shards:
                gradient = dict(backend._chunks[0].named_parameters())
                held = gradient[shard.parameter.module_name].main_grad
                held.mul_(1 + 1e-3 * world.rank * shard.parameter.is_replicated)
            backend.optim_step()
        copies = [s for s in optimizer.shards if s.parameter.is_replicated]
        found.append({s.parameter.name: s.values.clone() for s in copies})
    return found


def test_copies_of_tensor_parallel_ranks_stay_copies_and_state_lies_with_its_master() -> None:
    one, other = run_ranks(copies_and_state, 2)
    assert any("router" in name for name in one[1])
    for a, b in zip(one, other, strict=True):
        assert any("norm" in name for name in a)
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), name


def logits_of_rows(world: World, kind: str) -> list[torch.Tensor]:
    """Of the probe's rows, each alone, on one rank."""
    rows = probe_rows()
    backend = make_backend(world, KINDS[kind], case(), trainable=False)
    split = torch.split(rows["tokens"], rows.lengths.tolist())
    return [hidden_logits(backend, tokens) for tokens in split]


def hidden_logits(backend: Any, tokens: torch.Tensor) -> torch.Tensor:
    rows = from_rows([tokens.tolist()], rows={"prompt_lengths": torch.ones(1, dtype=torch.int64)})
    [microbatch] = pack(rows, budget_tokens=1000, share_prompts=False, places="rows")
    item = backend._item(microbatch, rows)
    with torch.no_grad():
        hidden = backend._chunks[0](
            item.tokens, item.positions, None, packed_seq_params=item.params
        )
    return hidden[0] @ backend._head_weight()[0].t()


@pytest.mark.parametrize("kind", swept(KINDS, BRIEF))
def test_logits_equal_transformers(expected, kind):
    [found] = run_ranks(logits_of_rows, 1, kind)
    for own, wanted in zip(found, expected[kind]["hf"]["logits"], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
