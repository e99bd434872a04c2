"""The torch backend: against row-by-row computation on one rank, and what it does itself; the rest
is in the contract (tests/testing).
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from backend_runs import TEMPERATURE, make_backend
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from training_cases import (
    LivelyCheckpoint,
    loss_fn,
    make_rows,
    naive_logprobs,
    options,
    tiny_config,
)

from harness import run_ranks
from spmdrl.models.decoder import Decoder
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from tiny_model import load_into


@pytest.mark.parametrize("degrees", [{}, {"dp_shard": 2}])
def test_a_backend_is_collected(degrees: dict[str, int]) -> None:
    """Autograd keeps hooks where Python's collector does not look."""
    assert run_ranks(dropped, degrees.get("dp_shard", 1), degrees) == [True] * (
        degrees.get("dp_shard", 1)
    )


def dropped(world: World, degrees: dict[str, int]) -> bool:
    model = tiny_config()
    backend = make_backend(world, options(param_dtype=torch.bfloat16), model, **degrees)
    assert degrees or any(leaf.has_own_master for leaf in backend._leaves)
    backend.forward_backward(make_rows([5], 2), loss_fn, next_token(), normaliser=10.0)
    backend.optim_step()
    alive = weakref.ref(backend)
    del backend
    gc.collect()
    return alive() is None


def one_rank(world: World) -> None:
    """What needs no second rank, in one launch."""
    config = tiny_config()
    rows = make_rows([6, 3, 9], 3, seconds=True)
    decoder = Decoder(config, device="cpu")
    load_into(decoder, LivelyCheckpoint(config))
    logprobs, entropy = naive_logprobs(decoder, rows, TEMPERATURE)
    mask = rows["loss_mask"]
    expected = rows.with_columns(tokens={"logprobs": logprobs, "entropy": entropy})
    given = LossInput(
        outputs={"logprobs": logprobs[mask], "entropy": entropy[mask]},
        columns={n: c[mask] for n, c in rows.tokens.items()},
        rows=rows.rows,
        row=rows.row_of_token()[mask],
        num_rows=len(rows),
    )
    loss, metrics = loss_fn(given)
    (loss / 7).backward()
    wanted = {name: p.grad for name, p in decoder.named_parameters()}
    norm = torch.cat([g.flatten().double() for g in wanted.values() if g is not None]).norm()
    for changes in (
        {},
        {"share_prompts": False},
        {"microbatch_tokens": 1},
        {"microbatch_tokens": 1000, "recompute": "layer", "head_chunk": 3},
        {"attention": "sdpa"},
    ):
        backend = make_backend(world, options(lr=1.0, **changes), config)
        found = backend.forward(rows, next_token(TEMPERATURE))
        for name in ("logprobs", "entropy"):
            assert not found[name][~mask].any()
            torch.testing.assert_close(
                found[name][mask], expected[name][mask].detach(), rtol=1e-5, atol=1e-5
            )
        sums = backend.forward_backward(rows, loss_fn, next_token(TEMPERATURE), normaliser=7.0)
        assert sums["loss"] == pytest.approx(float(loss) / 7, rel=1e-5)
        assert sums["weight_max"] == pytest.approx(float(metrics["weight_max"]))
        check_gradients(backend, wanted)
        assert backend.optim_step().grad_norm == pytest.approx(float(norm), rel=1e-6)


def check_gradients(backend: TorchBackend, wanted: dict[str, Tensor | None]) -> None:
    for leaf in backend._leaves:
        gradient = leaf.gradient()
        assert gradient is not None
        torch.testing.assert_close(gradient, wanted[leaf.name], rtol=1e-4, atol=1e-5)


def test_one_rank_equals_rows_computed_one_by_one() -> None:
    run_ranks(one_rank, 1)


def unlike_gradients(world: World) -> list[dict[str, Tensor]]:
    """Two steps with a little noise on rank 1's gradients, as atomics on CUDA make it; the
    parameters that both tp ranks hold.
    """
    config, found = tiny_config(), []
    for dtype in (torch.float32, torch.bfloat16):
        backend = make_backend(world, options(param_dtype=dtype), config, tp=2)
        rows = make_rows([4, 6], 2)
        copies = [leaf for leaf in backend._leaves if leaf.copied_over == "tp"]
        for _ in range(2):
            backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            for leaf in copies:
                own = backend._sums.get(leaf.name)
                held = leaf.parameter.grad if own is None else own.total
                assert held is not None
                held.mul_(1 + 1e-3 * world.rank)
            backend.optim_step()
        found.append({leaf.name: leaf.master.detach().clone() for leaf in copies})
    return found


def test_copies_of_tensor_parallel_ranks_stay_copies() -> None:
    one, other = run_ranks(unlike_gradients, 2)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and any("norm" in name for name in a)
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), name


def reductions(world: World) -> tuple[dict[str, int], float, float]:
    """Collectives of the backwards of one optimizer step in many microbatches on 2 x 2 ranks, by
    name; gradient norms of it and of a backend without shards.
    """
    config, norms = tiny_config(), []
    rows = make_rows([5, 6], 3, seed=world.rank)
    counts: dict[str, int] = {}
    for degrees in ({"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 4}):
        backend = make_backend(world, options(microbatch_tokens=20), config, **degrees)
        for _ in range(2):  # what a step leaves must not be in the next one
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            norm = backend.optim_step().grad_norm
        counts = counts or {event.key: event.count for event in seen.key_averages()}
        norms.append(norm)
    return counts, norms[0], norms[1]


def test_replicas_of_shards_reduce_once_a_step() -> None:
    counts, sharded, plain = run_ranks(reductions, 4)[0]
    scattered = sum(n for op, n in counts.items() if op == "c10d::_reduce_scatter_base_")
    groups = tiny_config().num_layers + 1  # what FSDP2 gathers at once: layers, and the rest
    assert scattered >= 3 * groups, "several microbatches"
    reduced = sum(n for op, n in counts.items() if op == "c10d::allreduce_")
    # and one of the number of microbatches
    assert reduced <= groups + 1, counts
    assert sharded == pytest.approx(plain, rel=1e-5)


def order_of_gathers(world: World) -> list[str]:
    """Gathers of weights, and the begin of each layer's attention and of its gradient."""
    config = tiny_config()
    backend = make_backend(world, options(), config, dp_shard=2)

    def mark(name: str) -> Any:
        def hook(*_: Any) -> None:
            with record_function(name):
                pass

        return hook

    for index, layer in enumerate(backend._decoder.layers):
        layer.attention.register_forward_pre_hook(mark(f"forward {index}"))
        layer.attention.register_full_backward_pre_hook(mark(f"backward {index}"))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        backend.forward_backward(make_rows([5], 2), loss_fn, next_token(1.0), normaliser=9.0)
    names = {"c10d::_allgather_base_": "gather"}
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    found = [names.get(e.name, e.name) for e in events]
    return [name for name in found if name.split()[0] in ("gather", "forward", "backward")]


def test_a_layers_weights_are_gathered_before_the_layer_ahead_computes() -> None:
    found = run_ranks(order_of_gathers, 2)[0]
    count = tiny_config().num_layers
    last = count - 1
    assert found[:4] == ["gather", "gather", "gather", "forward 0"], "the rest, and two layers"
    behind = found[found.index(f"backward {last}") :]
    assert found.index("forward 1") == 4 + (count > 2), found
    assert behind[:2] == [f"backward {last}", f"backward {last - 1}"], found


def taken_names(world: World) -> list[str]:
    backend, found = make_backend(world, options(), tiny_config()), []
    metrics: list[dict[str, Any]] = [
        *({name: torch.tensor(1.0)} for name in ("loss", "lr", "grad_norm", "skipped")),
        {"gap": 0.5},
        {"gap": torch.ones(2)},
    ]
    for given in metrics:
        with pytest.raises(ValueError, match="metric") as error:
            backend.forward_backward(
                make_rows([4], 2),
                lambda g, m=given: (g["logprobs"].sum(), m),
                next_token(1.0),
                normaliser=1.0,
            )
        found.append(str(error.value))
    return found


def test_metrics_of_a_loss_do_not_take_the_updates_names() -> None:
    (texts,) = run_ranks(taken_names, 1)
    for name, text in zip(("loss", "lr", "grad_norm", "skipped"), texts, strict=False):
        assert f"{name!r}" in text and "another" in text
    assert "'gap'" in texts[4] and "0.5" in texts[4] and "(2,)" in texts[5]


def refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"attention.*flash needs CUDA"):
        make_backend(world, options(attention="flash"), tiny_config())


def test_attention_that_cannot_run_here_is_refused() -> None:
    run_ranks(refused, 1)


def half_precision(world: World) -> None:
    """bfloat16 weights with float32 masters follow the float32 run; FSDP2 does too."""
    config = tiny_config()
    dtype = {"param_dtype": torch.bfloat16, "lr": 1e-3}
    whole = make_backend(world, options(lr=1e-3), config, dp_replicate=2)
    plain = make_backend(world, options(**dtype), config, dp_replicate=2)
    sharded = make_backend(world, options(**dtype), config, dp_shard=2)
    rows = make_rows([4, 6], 2, seed=world.rank)
    for _ in range(3):
        norms = []
        for backend in (whole, plain, sharded):
            backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            norms.append(backend.optim_step().grad_norm)
        assert norms[1:] == pytest.approx([norms[0]] * 2, rel=0.05)
    assert all(t.dtype == torch.bfloat16 for t, _ in plain.local_tensors().values())
    masters = {n: t for n, t in plain.state_tensors().items() if n.startswith("weights/")}
    assert len(masters) == len(plain.local_tensors())
    dtypes = {name: tensor.dtype for name, (tensor, _) in sharded.local_tensors().items()}
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrow == {name for name in dtypes if "norm" in name}, "what FSDP2 does not cut"
    for name, (tensor, _) in whole.local_tensors().items():
        master, _ = masters[f"weights/{name}"]
        assert torch.equal(master.bfloat16(), plain.local_tensors()[name][0])
        # Adam moves a weight by up to lr a step, whatever the gradient's rounding.
        assert (master - tensor).abs().max() < 7e-3
    logprobs = [b.forward(rows, next_token(1.0))["logprobs"] for b in (whole, plain, sharded)]
    assert all((x - logprobs[0]).abs().max() < 0.3 for x in logprobs)


def test_bfloat16_weights_have_float32_masters() -> None:
    run_ranks(half_precision, 2)
