"""Mixtures of experts against transformers, on the same safetensors in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_decoder import check_gradients, dense, reference_logits, tokens_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import run_ranks
from moe_models import CASES, SIZES, by_file_name, config_of, reference_model
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel, copy_to
from spmdrl.models import linear
from spmdrl.models.blocks.moe import Experts, has_fixed_shapes
from spmdrl.models.blocks.projections import Build
from spmdrl.models.config import parse_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_model
from spmdrl.models.linear import Groups, grouped_gemm, grouped_linear
from spmdrl.models.routing import Routing, choices_dtype, pack_choices, unpack_choices
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.verification.trainer import whole
from spmdrl.world import World
from tiny_model import load_into

LENGTH = 60


def logits_of(decoder: Decoder, tokens: Tensor, routing: Routing | None = None) -> Tensor:
    with torch.no_grad():
        hidden = decoder(tokens, torch.arange(len(tokens)), dense, routing=routing)
        return hidden @ decoder.head_weight().T


@pytest.mark.parametrize("name", CASES)
def test_directories_go_both_ways_with_equal_logits(name: str, tmp_path: Path) -> None:
    """transformers -> files -> decoder -> files -> transformers."""
    import transformers

    model = reference_model(name)
    model.save_pretrained(tmp_path / "theirs")
    config, weights = open_model(tmp_path / "theirs")
    assert weights.names >= set(global_shapes(config))
    decoder = Decoder(config, device="cpu")
    load_into(decoder, weights)
    tokens = tokens_of(LENGTH)
    expected = reference_logits(model, tokens)
    assert (logits_of(decoder, tokens) - expected).abs().max() <= 1e-4

    held = decoder.slices()
    local = {name: (p.detach(), held[name]) for name, p in decoder.named_parameters()}
    tensors = whole([local], config)
    save_pretrained(tensors.items(), config, tmp_path / "ours", None, max_shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert (reference_logits(again.eval(), tokens) - expected).abs().max() <= 1e-4


def decoder_of(
    model: Any, *, tp: Parallel | None = None, ep: Parallel | None = None
) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder with the model's weights, and these by file name."""
    config = config_of(model)
    weights = by_file_name(dict(model.state_dict()), config)
    decoder = Decoder(config, tp=tp, ep=ep, device="cpu")
    load_into(decoder, Weights(weights))
    return decoder, weights


class Weights:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.names = frozenset(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, part: Slice) -> Tensor:
        return self._tensors[part.name][tuple(map(slice, part.start, part.stop))]


def expected_gradients(model: Any, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
    (model(tokens[None]).logits[0] * weight).sum().backward()
    return by_file_name({n: p.grad for n, p in model.named_parameters()}, config_of(model))


def weight_of(length: int) -> Tensor:
    return torch.randn(length, 96, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_gradients_equal_transformers(name: str, recompute: Any) -> None:
    model, tokens, weight = reference_model(name), tokens_of(24), weight_of(24)
    expected = expected_gradients(model, tokens, weight)
    decoder, _ = decoder_of(model)
    routing = Routing(decoder.model)
    decoder(
        tokens,
        torch.arange(24),
        dense,
        lambda hidden, head: (hidden @ head.T * weight).sum(),
        recompute=recompute,
        routing=routing,
    ).backward()
    check_gradients(decoder, expected)
    fixed = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert all(name.endswith("router.correction") for name in fixed)


# degrees of two and four ranks: experts over tp, over ranks with other tokens, over both
RANKS = {
    2: [{"tp": 2}, {"tp": 2, "ep": 2}, {"dp_replicate": 2, "ep": 2}],
    4: [
        {"tp": 2, "dp_replicate": 2, "ep": 2},
        {"tp": 2, "dp_replicate": 2, "ep": 4},
        {"tp": 4, "ep": 2},
        {"dp_replicate": 4, "ep": 2},
    ],
}


def fits(name: str, degrees: dict[str, int]) -> bool:
    """Whether tp divides the key-value heads."""
    heads = (SIZES | CASES[name][1])["num_key_value_heads"]
    assert isinstance(heads, int)
    return heads % degrees.get("tp", 1) == 0


def on_ranks(world: World, name: str) -> list[dict[str, int]]:
    """Logits and gradients of every layout, each replica with tokens of its own."""
    model, tokens, weight = reference_model(name), tokens_of(24), weight_of(24)
    expected = expected_gradients(model, tokens, weight)
    wanted = reference_logits(model, tokens)
    served = []
    for degrees in RANKS[world.size]:
        mesh = Mesh("policy", range(world.size), degrees, "cpu")
        tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
        ep = Parallel(
            group=mesh.group("exchange"), rank=mesh.coordinate("ep"), size=mesh.size("ep")
        )
        if not fits(name, degrees):
            continue
        decoder, _ = decoder_of(model, tp=tp, ep=ep)
        # unequal parts, causal attention over all that came before
        bounds = [24 * i * (i + 1) // (mesh.size("dp") * (mesh.size("dp") + 1)) for i in range(5)]
        first, last = bounds[mesh.coordinate("dp")], bounds[mesh.coordinate("dp") + 1]
        logits = decoder(
            tokens[:last],
            torch.arange(last),
            dense,
            lambda hidden, head, group=tp.group: copy_to(hidden, group) @ head.T,
            recompute="layer",
        )
        vocab = slice(96 * tp.rank // tp.size, 96 * (tp.rank + 1) // tp.size)
        assert (logits - wanted[:last, vocab]).abs().max() <= 1e-4
        (logits * weight[:last, vocab])[first:].sum().backward()
        for local, parameter in decoder.named_parameters():
            group = mesh.group("edp" if ".experts." in local else "reduce")
            if group is not None and parameter.requires_grad:
                dist.all_reduce(parameter.grad, group=group)
        check_gradients(decoder, expected)
        served.append(degrees)
    return served


SERVED = [
    *(("qwen3_moe", 2), ("mixtral", 2), ("mixtral", 4), ("gpt_oss", 2), ("glm4_moe", 2)),
    pytest.param("gpt_oss", 4, marks=pytest.mark.full),
    pytest.param("glm4_moe", 4, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "size"), SERVED)
def test_parallel_layouts_equal_transformers(name: str, size: int) -> None:
    served = run_ranks(on_ranks, size, name)
    assert served == [[d for d in RANKS[size] if fits(name, d)]] * size


def test_grouped_products_by_loop_and_by_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((9, 8), (4, 16, 8)))
    grad = torch.randn(9, 16, generator=generator)
    counts = torch.tensor([3, 0, 5, 1])
    expert = torch.repeat_interleave(torch.arange(4), counts)
    wanted = torch.einsum("nk,nmk->nm", x, weight[expert])
    found = []
    for product in (
        lambda a, b: grouped_linear(a, b, Groups(counts=counts)),
        lambda a, b: grouped_linear(a, b, Groups(counts=counts, sizes=counts.tolist())),
        lambda a, b: grouped_gemm(a, b, counts),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(a, b)
        torch.testing.assert_close(out, wanted)
        out.backward(grad)
        found.append((a.grad, b.grad))
    for a, b in found:
        torch.testing.assert_close(a, torch.einsum("nm,nmk->nk", grad, weight[expert]))
        torch.testing.assert_close(b[2], grad[3:8].T @ x[3:8])
        assert not b[1].any()


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_gradients_of_frozen_experts_are_not_computed(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, plain = 0, linear.product

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return plain(a, b)

    monkeypatch.setattr(linear, "product", counted)
    x = torch.randn(9, 8).requires_grad_(trained == "x")
    weight = torch.randn(4, 16, 8).requires_grad_(trained == "weight")
    counts = torch.tensor([3, 0, 5, 1])
    grouped_linear(x, weight, Groups(counts=counts, sizes=counts.tolist())).sum().backward()
    assert count == 6  # three experts have rows: forward, and one gradient
    assert (x.grad is None) == (trained == "weight")


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "parts"])
def test_fixed_shapes_give_the_same(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs capture it: one kernel, and rows of absent experts computed by nobody."""
    config = config_of(reference_model("mixtral"))
    assert config.moe is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 64, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(11)])
    weights = torch.rand(11, 2, generator=generator)
    found = []
    for is_usable in (False, True):
        monkeypatch.setattr(
            "spmdrl.models.blocks.moe.grouped_gemm_is_usable", lambda *_, u=is_usable: u
        )
        monkeypatch.setattr(
            "spmdrl.models.linear.grouped_gemm_is_usable", lambda *_, u=is_usable: u
        )
        total = torch.zeros(11, 64)
        for rank in range(parts):
            place = Parallel(rank=rank, size=parts)
            build = Build(norm=config.norm, tp=place, ep=place, device="cpu")
            experts = Experts(config.moe, config.hidden_size, build)
            held = range(4 * rank // parts, 4 * (rank + 1) // parts)
            with torch.no_grad():
                for number, expert in enumerate(held):
                    fill = torch.Generator().manual_seed(expert)
                    for parameter in (experts.gate_up, experts.down):
                        rows = parameter.shape[0] // len(held)
                        box = parameter[number * rows : (number + 1) * rows]
                        box.copy_(torch.randn(box.shape, generator=fill) * 0.1)
                total += experts(x, chosen, weights)
        found.append(total)
    torch.testing.assert_close(found[1], found[0])
    assert found[0].abs().max() > 0.01


@pytest.mark.parametrize(
    ("architecture", "key"),
    [("GptOssForCausalLM", "intermediate_size"), ("Qwen3MoeForCausalLM", "moe_intermediate_size")],
)
def test_widths_that_no_kernel_takes_are_not_captured(architecture: str, key: str) -> None:
    for width in (12, 16):
        experts = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, key: width}
        model = parse_config({**SIZES, **experts, "architectures": [architecture]})
        shapes = {n: tuple(p.shape) for n, p in Decoder(model).named_parameters()}
        fixed = has_fixed_shapes(model, shapes, torch.bfloat16, torch.device("cuda"), (9, 0))
        assert fixed == (width % 8 == 0), width


@pytest.mark.parametrize("needs_grad", [True, False])
def test_nothing_waits_for_the_device_where_no_expert_is_elsewhere(
    needs_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: what asks for some, and so would wait for a GPU, is an error."""
    for module in ("blocks.moe", "linear"):
        monkeypatch.setattr(f"spmdrl.models.{module}.grouped_gemm_is_usable", lambda *_: True)
    config = config_of(reference_model("mixtral"))
    with FakeTensorMode(), torch.set_grad_enabled(needs_grad):
        build = Build(norm=config.norm, dtype=torch.bfloat16, device="cpu")
        assert config.moe is not None
        experts = Experts(config.moe, config.hidden_size, build)
        x = torch.randn(11, 64, dtype=torch.bfloat16)
        out = experts(x, torch.zeros(11, 2, dtype=torch.int64), torch.ones(11, 2).bfloat16())
        assert out.shape == (11, 64)


def test_choices_are_packed() -> None:
    chosen = torch.tensor([[0, 254], [-1, -1], [7, 3]])
    assert (choices_dtype(255), choices_dtype(256)) == (torch.uint8, torch.int16)
    for num_experts in (255, 400):
        assert torch.equal(unpack_choices(pack_choices(chosen, num_experts)), chosen)


def test_given_choices_are_taken_and_weighted_by_the_routers_own_probabilities() -> None:
    model = reference_model("qwen3_moe")
    decoder, _ = decoder_of(model)
    config, tokens = decoder.model, tokens_of(12)
    assert config.moe is not None
    given = torch.tensor([[5, 1, 2], [0, 3, 7]]).repeat(12, 1, 1)
    given[4] = -1
    probabilities, layers = [], [decoder.layers[0].mlp, decoder.layers[2].mlp]
    handed: list[Tensor] = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _, __, out: probabilities.append(out))
        layer.experts.register_forward_pre_hook(lambda _, args: handed.extend(args[1:]))
    routing = Routing(config, given=given)
    logits = logits_of(decoder, tokens, routing)
    plain = Routing(config)
    assert (logits_of(decoder, tokens, plain) - logits).abs().max() > 1e-2
    used, weights = handed[0], handed[1]
    assert torch.equal(used[:4], given[:4, 0]) and torch.equal(used[5:], given[5:, 0])
    assert torch.equal(used[4], probabilities[0][4].topk(3).indices)
    own = probabilities[0].gather(1, used)
    torch.testing.assert_close(weights, own / own.sum(1, keepdim=True))
    assert torch.equal(routing.chosen()[:4], given[:4])
    changed = sum(
        len(set(given[t, number].tolist()) - set(p[t].topk(3).indices.tolist()))
        for t in range(12)
        for number, p in enumerate(probabilities[:2])
        if t != 4
    )
    assert 0 < routing.num_changed(torch.arange(12)) == changed
