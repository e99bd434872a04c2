"""Adapters on the Megatron backend equal the torch backend's; roles share a base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backend_runs import assemble, compare
from megatron_cases import CPU, KINDS, Case, case, make_backend, record_of, share
from torch import Tensor
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapter_weights import merged
from spmdrl.models.adapters import Adapter, LowRank, adapter_shapes, find_targets
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import fill
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.megatron_chunks import Cut, Parameter, adapter_chunks, rank_chunks
from spmdrl.models.megatron_layout import megatron_layout, megatron_state_layout
from spmdrl.models.sharding import SCORE, Head, global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.testing.cases import WithAdded, value_loss
from spmdrl.training.megatron.checks import model_cut
from spmdrl.training.readout import VALUES, next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from sweeps import swept

pytestmark = pytest.mark.megatron

SHORT = {"microbatch_tokens": 20}
LAYOUTS: dict[int, list[Case]] = {
    1: [case(), case(given={"recompute": "layer", **SHORT})],
    2: [
        case(tp=2),
        case(tp=2, sp=True, given={"recompute": "layer", **SHORT}),
        case(pp=2, given=SHORT),
        case(pp=2, vpp=2, given={"microbatch_tokens": 30, "recompute": "layer"}),
        case(cp=2),
        case(dp_shard=2),
    ],
    4: [
        case(tp=2, pp=2, vpp=2, sp=True, given=SHORT),
        case(tp=2, cp=2, sp=True),
        case(tp=2, dp_shard=2),
    ],
}
EXPERTS: dict[int, list[Case]] = {
    1: [],
    2: [case(dp_shard=2, ep=2), case(tp=2, ep=2, sp=True, given={"recompute": "layer"})],
    4: [case(tp=2, pp=2, ep=2, sp=True, given=SHORT)],
}
RANKS = {"q_proj": 3, "k_proj": 2, "v_proj": 4, "o_proj": 5, "gate_proj": 2, "down_proj": 3}


def uneven(model: ModelConfig) -> Adapter:
    """Targets of unlike ranks: a fused projection with a gap, and a layer without any."""
    targets = {}
    for name in find_targets(model, ["attention", "mlp"]):
        *_, layer, _, part, _ = name.split(".")
        if part in RANKS and layer != "1":
            targets[name] = LowRank(rank=RANKS[part], scale=0.5 + RANKS[part])
    return Adapter(targets=targets)


def last_layer(model: ModelConfig) -> Adapter:
    """All but one chunk of a pipeline have nothing that trains."""
    names = find_targets(model, [f"*.layers.{model.num_layers - 1}.*"])
    return Adapter(targets={name: LowRank(rank=3, scale=1.5) for name in names})


def dropped(model: ModelConfig) -> Adapter:
    return replace(uneven(model), dropout=0.3)


ADAPTERS = {"uneven": uneven, "last": last_layer, "dropped": dropped}
DROPPED: dict[int, list[Case]] = {
    1: [case()],
    2: [*LAYOUTS[2][:2], *LAYOUTS[2][3:5]],
    4: [LAYOUTS[4][1]],
}
Work = list[tuple[str, str, Case]]
"""Kinds of models, kinds of adapters, and layouts."""


BRIEF: list[Case] = [LAYOUTS[1][1], LAYOUTS[2][1], LAYOUTS[2][3], EXPERTS[2][1], LAYOUTS[4][0]]
"""Layouts that are tried every time, without dropout but once."""


def brief_work_of(size: int) -> Work:
    found = [one for one in work_of(size) if one[2] in BRIEF and one[1] != "dropped"]
    return [*found, *(one for one in work_of(size)[-1:] if size == 2)]


def work_of(size: int) -> Work:
    dense: Work = [("qwen2", "uneven", made) for made in LAYOUTS[size]]
    experts: Work = [("qwen3_moe", "uneven", made) for made in EXPERTS[size]]
    last: Work = [("qwen2", "last", LAYOUTS[2][3])] if size == 2 else []
    masked: Work = [("qwen2", "dropped", made) for made in DROPPED[size]]
    return dense + experts + last + masked


def on_megatron(world: World, work: Work) -> list[dict[str, Any]]:
    records = []
    for kind, name, made in work:
        model, adapter = KINDS[kind], ADAPTERS[name](KINDS[kind])
        source = WithAdded(model, adapter)
        backend = make_backend(world, model, made, checkpoint=source, adapter=adapter)
        records.append(record_of(backend))
    return records


def torch_role(
    model: ModelConfig, adapter: Adapter | None, seed: int = 0, **given: Any
) -> TorchBackend:
    source = WithAdded(model, adapter, seed=seed)
    mesh = Mesh("policy", [0], {}, "cpu")
    return TorchBackend(mesh, model, source, options(**given), CPU, adapter=adapter)


def on_torch(world: World) -> dict[tuple[str, str], dict[str, Any]]:
    pairs = [("qwen2", "uneven"), ("qwen3_moe", "uneven"), ("qwen2", "last"), ("qwen2", "dropped")]
    found = {}
    for kind, name in pairs:
        adapter = ADAPTERS[name](KINDS[kind])
        found[kind, name] = record_of(torch_role(KINDS[kind], adapter))
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], dict[str, Any]]:
    """The torch backend's record on one rank."""
    found: dict[tuple[str, str], dict[str, Any]] = run_ranks(on_torch, 1)[0]
    return found


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("size", swept(LAYOUTS, [2]))
def test_layouts_equal_the_torch_backend(expected: Any, size: int, every: bool) -> None:
    """Log-probabilities, every gradient, norms, and weights and moments after three steps."""
    work = work_of(size) if every else brief_work_of(size)
    results = run_ranks(on_megatron, size, work, timeout_s=280)
    for number, (kind, name, made) in enumerate(work):
        print(kind, name, made)
        model, adapter = KINDS[kind], ADAPTERS[name](KINDS[kind])
        ranks, wanted = [found[number] for found in results], expected[kind, name]
        shapes = adapter_shapes(model, adapter)
        gradients = assemble([record["gradients"] for record in ranks], shapes)
        for tensor, gradient in assemble([wanted["gradients"]], shapes).items():
            assert gradient.abs().max() > 1e-4, tensor
            error = (gradients[tensor] - gradient).norm() / gradient.norm()
            assert error < 1e-4, (tensor, error)
        if name != "dropped":
            compare(ranks, wanted, model, adapter)
            continue
        # zeroed inputs make gradients large, and steps that are clipped by them enlarge rounding
        for record in ranks:
            for (_, done), (_, other) in zip(record["steps"], wanted["steps"], strict=True):
                assert done.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


def test_only_the_adapter_changes_and_has_state(expected: Any) -> None:
    work = [("qwen2", "uneven", case(tp=2))]
    for [record] in run_ranks(on_megatron, 2, work):
        source = WithAdded(KINDS["qwen2"], uneven(KINDS["qwen2"]))
        for name, (tensor, slices) in record["weights"].items():
            for piece in slices:
                before = source.read(piece)
                same = torch.equal(tensor[piece.offset : piece.offset + piece.rows], before)
                assert same == ("lora" not in name), name
        assert record["state"] and all("lora" in name for name in record["state"])


def half_precision(world: World, made: Case) -> tuple[LocalTensors, float]:
    """Gradients in bfloat16, and the norm of a step; the base has no float32 of its own."""
    model = KINDS["qwen2"]
    adapter = uneven(model)
    degrees, megatron, changes = made
    given = (degrees, megatron, {**changes, "param_dtype": torch.bfloat16})
    backend = make_backend(
        world, model, given, checkpoint=WithAdded(model, adapter), adapter=adapter
    )
    record = record_of(backend)
    parts = backend.parts()
    assert set(parts) == {"base", "weights", "optimizer"}
    assert {t.dtype for t in (*parts["base"], *parts["weights"])} == {torch.bfloat16}
    assert not any(hasattr(p, "main_grad") for c in backend._chunks for p in c.parameters())
    trained = sum(tensor.numel() for tensor in parts["weights"])
    # masters and two moments
    assert sum(tensor.numel() for tensor in parts["optimizer"]) == 3 * trained
    assert record["steps"][0][1].grad_norm > 0
    return record["gradients"], record["steps"][0][1].grad_norm


def half_on_torch(world: World) -> tuple[LocalTensors, float]:
    model = KINDS["qwen2"]
    record = record_of(torch_role(model, uneven(model), param_dtype=torch.bfloat16))
    return record["gradients"], record["steps"][0][1].grad_norm


HALF = {"tp2": case(tp=2), "tp2 sp": case(tp=2, sp=True), "pp2": case(pp=2)}


@pytest.mark.parametrize("layout", swept(HALF, []))
def test_bfloat16_is_as_far_from_float32_as_on_the_torch_backend(
    expected: Any, layout: str
) -> None:
    shapes = adapter_shapes(KINDS["qwen2"], uneven(KINDS["qwen2"]))
    exact = assemble([expected["qwen2", "uneven"]["gradients"]], shapes)
    [(gradients, norm)] = run_ranks(half_on_torch, 1)
    wanted = assemble([gradients], shapes)

    def far(found: Tensor, name: str) -> float:
        return float((found - exact[name]).norm() / exact[name].norm())

    ranks = run_ranks(half_precision, 2, HALF[layout])
    found = assemble([part for part, _ in ranks], shapes)
    for name, gradient in wanted.items():
        assert far(found[name], name) < 2 * far(gradient, name) + 0.01 < 0.25, name
    assert all(own == pytest.approx(norm, rel=0.02) for _, own in ranks)


def over_one_base(world: World, made: Case) -> None:
    """Policy, value and reference in turn, on one base and on bases of their own."""
    model = KINDS["qwen2"]
    wide, narrow = uneven(model), last_layer(model)

    def role(seed: int, adapter: Adapter | None, **given: Any) -> Any:
        source = WithAdded(model, adapter, seed=seed)
        return make_backend(world, model, made, checkpoint=source, adapter=adapter, **given)

    policy = role(1, wide)
    value = role(2, narrow, head="score", base=policy)
    reference = role(0, None, trainable=False, base=policy)
    judge = role(3, wide, head="score", base=policy, trainable=False)
    pairs = [
        (policy, role(1, wide)),
        (value, role(2, narrow, head="score")),
        (reference, role(0, None, trainable=False)),
        (judge, role(3, wide, head="score", trainable=False)),
    ]
    base = policy.parts()["base"]
    for one in (value, reference, judge):
        assert [t.data_ptr() for t in one.parts()["weights"][: len(base)]] == [
            t.data_ptr() for t in base
        ]
    rows = share(make_rows([6, 3, 9], 2), policy.mesh)
    seen = []
    for _ in range(2):
        for one, other in pairs:
            readout = VALUES if one.head == "score" else next_token(0.8)
            (column,) = readout.columns[:1]
            found, wanted = (each.forward(rows, readout)[column] for each in (one, other))
            assert torch.equal(found, wanted)
            seen.append(found)
            if one in (reference, judge):
                assert one.state_tensors() == {}
                continue
            loss = value_loss if one.head == "score" else loss_fn
            sums = [
                each.forward_backward(rows, loss, readout, normaliser=9.0) for each in (one, other)
            ]
            done = [each.optim_step() for each in (one, other)]
            assert sums[0] == sums[1] and done[0] == done[1] and done[0].grad_norm > 0
    assert torch.equal(seen[2], seen[6]), "the reference stays"
    assert not torch.equal(seen[0], seen[4]) and not torch.equal(seen[0], seen[2])
    for one, other in pairs:
        assert one.local_tensors().keys() == other.local_tensors().keys()
        for name, (tensor, slices) in other.local_tensors().items():
            assert torch.equal(one.local_tensors()[name][0], tensor), name
            assert one.local_tensors()[name][1] == slices
        assert one.state_tensors().keys() == other.state_tensors().keys()


SHARED = {
    "tp2 sp": case(tp=2, sp=True, given={"recompute": "layer"}),
    "pp2": case(pp=2, given={"param_dtype": torch.bfloat16}),
    "pp2 vpp2": case(pp=2, vpp=2, given=SHORT),
}


@pytest.mark.parametrize("layout", swept(SHARED, []))
def test_roles_on_one_base_do_what_they_do_on_their_own(layout: str) -> None:
    run_ranks(over_one_base, 2, SHARED[layout], timeout_s=200)


def tables(world: World, cases: list[Case]) -> None:
    """The computed layouts, against what the backends hold."""
    for kind in ("qwen2", "qwen3_moe"):
        model = KINDS[kind]
        adapter = uneven(model)
        for made in cases:
            for head in ("lm", "score"):
                source = WithAdded(model, adapter)
                backend = make_backend(
                    world, model, made, checkpoint=source, adapter=adapter, head=head
                )
                degrees = backend.mesh.degrees
                cut = model_cut(degrees, made[1], CPU, is_plain=True)
                place = (model, range(world.size), degrees, cut)
                frozen = frozenset(global_shapes(model, head)) - {SCORE}
                table = megatron_layout(
                    *place, torch.float32, head, frozen=frozen, adapter=adapter
                )[world.rank]
                tensors = backend.local_tensors()
                assert set(tensors) == set(table)
                for name, held in table.items():
                    tensor, slices = tensors[name]
                    assert tuple(tensor.shape) == held.shape and tensor.dtype == held.dtype
                    assert slices == held.slices
                    assert held.frozen == (
                        bool(slices) and "lora" not in name and slices[0].name != SCORE
                    )
                state = megatron_state_layout(*place, head, adapter=adapter)[world.rank]
                own = backend.state_tensors()
                assert {f"weights/{name}" for name in state} == {
                    name for name in own if name.startswith("weights/")
                }
                for name, held in state.items():
                    tensor, slices = own[f"exp_avg/{name}"]
                    assert (tuple(tensor.shape), slices) == (held.shape, held.slices), name


def test_layouts_are_those_that_plans_compute() -> None:
    cases = [case(tp=2, sp=True), case(pp=2, vpp=2), case(dp_shard=2)]
    run_ranks(tables, 2, cases, timeout_s=200)


def torch_steps(world: World) -> tuple[LocalTensors, list[float]]:
    """State after two steps, and the norms of the next two."""
    model = KINDS["qwen2"]
    backend, rows = torch_role(model, uneven(model)), make_rows([4, 6], 2)

    def step() -> float:
        backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
        return backend.optim_step().grad_norm

    step(), step()
    saved = {name: (tensor.clone(), s) for name, (tensor, s) in backend.state_tensors().items()}
    return saved, [step(), step()]


class Whole:
    """A source of whole tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.names = frozenset(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, part: Slice) -> Tensor:
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return self._tensors[part.name][box]


def resumed(world: World, made: Case, state: LocalTensors) -> list[float]:
    """Norms of two steps from the torch backend's state, on another start."""
    model = KINDS["qwen2"]
    adapter = uneven(model)
    source = WithAdded(model, adapter, seed=9)
    backend = make_backend(world, model, made, checkpoint=source, adapter=adapter)
    with torch.no_grad():
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            saved = [held for name, held in state.items() if name.startswith(f"{kind}/")]
            whole = assemble([dict(enumerate(saved))], adapter_shapes(model, adapter))
            own = [h for name, h in backend.state_tensors().items() if name.startswith(f"{kind}/")]
            fill(own, Whole(whole))
    backend.restored({"num_steps": 2, "num_skipped": 0})
    rows, norms = make_rows([4, 6], 2), []
    for _ in range(2):
        backend.forward_backward(
            share(rows, backend.mesh), loss_fn, next_token(1.0), normaliser=9.0
        )
        norms.append(backend.optim_step().grad_norm)
    return norms


@pytest.mark.full
def test_a_state_of_the_torch_backend_continues_here() -> None:
    [(state, norms)] = run_ranks(torch_steps, 1)
    for made in (case(tp=2), case(pp=2), case(dp_shard=2)):
        for found in run_ranks(resumed, 2, made, state):
            assert found == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("head", ["lm", "score"])
def test_merged_parts_are_parts_of_the_merged_whole(head: Head) -> None:
    """Also where queries, keys and values are interleaved, and layers are on another stage."""
    model, cut = KINDS["qwen3"], Cut(tp=2, pp=2, vpp=2)
    adapter = uneven(model)
    source = WithAdded(model, adapter)

    def held_of(chunks: list[tuple[Parameter, ...]]) -> LocalTensors:
        rows = [row for chunk in chunks for row in chunk]
        held = {row.name: (torch.zeros(row.shape), row.slices) for row in rows}
        fill(held.values(), source)
        return held

    whole = held_of(rank_chunks(model, Cut(), 0, 0, head))
    values = held_of(adapter_chunks(model, Cut(), 0, 0, adapter))
    dense = assemble(
        [{n: (merged(t, s, adapter, values), s) for n, (t, s) in whole.items()}],
        global_shapes(model, head),
    )
    changed = {
        name for name in dense if not torch.equal(dense[name], source.read(_all(dense, name)))
    }
    assert changed == set(adapter.targets)
    for tp_rank in range(2):
        for pp_rank in range(2):
            base = held_of(rank_chunks(model, cut, tp_rank, pp_rank, head))
            added = held_of(adapter_chunks(model, cut, tp_rank, pp_rank, adapter, head))
            for name, (tensor, slices) in base.items():
                found = merged(tensor, slices, adapter, added)
                for piece in slices:
                    box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
                    part = found[piece.offset : piece.offset + piece.rows]
                    torch.testing.assert_close(part, dense[piece.name][box], msg=name)


def _all(tensors: dict[str, Tensor], name: str) -> Slice:
    shape = tuple(tensors[name].shape)
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)


def refused(world: World) -> None:
    model = tiny_config()
    adapter = uneven(model)

    def role(adapter: Adapter | None, **given: Any) -> Any:
        source = WithAdded(model, adapter)
        return make_backend(world, model, case(), checkpoint=source, adapter=adapter, **given)

    with pytest.raises(ValueError, match=r"roles\.policy\.base.*trains its weights: give it"):
        role(adapter, base=role(None))
    still = role(None, trainable=False, head="score")
    with pytest.raises(ValueError, match=r"it would train the weights it borrows: give it"):
        role(None, base=role(None, trainable=False))
    with pytest.raises(ValueError, match=r"without a language model's head"):
        role(adapter, base=still)


def test_bases_that_cannot_be_shared_are_refused() -> None:
    run_ranks(refused, 1)
