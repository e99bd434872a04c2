"""An adapter's additions equal a dense product with W + scale B A, values and gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spmdrl.distributed.parallel import Parallel
from spmdrl.models import low_rank_products
from spmdrl.models.adapter_weights import AdapterWeights, merged
from spmdrl.models.adapters import (
    Adapter,
    LowRank,
    adapter_shapes,
    check_experts,
    find_targets,
    make_adapter,
)
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.decoder import Decoder
from spmdrl.models.family import family_of
from spmdrl.models.files.hf import fill
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.models.low_rank import Applied
from spmdrl.models.low_rank_products import put_product
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from tiny_model import load_into, make_tiny_model

RANKS = {"q_proj": 3, "k_proj": 2, "v_proj": 4, "o_proj": 5, "gate_proj": 2, "down_proj": 3}
RANKS |= {"qkv_proj": 3, "gate_up_proj": 2, "in_proj_qkv": 3, "in_proj_z": 2, "out_proj": 4}

ARCHITECTURES = ["LlamaForCausalLM", "Phi3ForCausalLM"]
"""Models with a matrix for each projection, and with fused ones, which are one target."""


@dataclasses.dataclass
class Values:
    """Adapter values by name, as a file would have them."""

    tensors: dict[str, Tensor]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, part: Slice) -> Tensor:
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return self.tensors[part.name][box]


def uneven(model: ModelConfig) -> Adapter:
    """Targets of unlike ranks; `up_proj` is none, so a fused projection has a gap."""
    targets = {}
    for name in find_targets(model, ["all"]):
        part = name.split(".")[-2]
        if part in RANKS:
            targets[name] = LowRank(rank=RANKS[part], scale=0.5 + RANKS[part])
    return Adapter(targets=targets)


def values_of(model: ModelConfig, adapter: Adapter) -> Values:
    generator = torch.Generator().manual_seed(5)
    return Values(
        {
            name: torch.randn(shape, generator=generator) * 0.1
            for name, shape in adapter_shapes(model, adapter).items()
        }
    )


def weights_of(decoder: Decoder, adapter: Adapter, values: Values) -> AdapterWeights:
    weights = AdapterWeights(
        decoder.model, adapter, tp=decoder.tp, blocks=decoder.blocks, device="cpu"
    )
    tables = weights.tables()
    fill(((p.data, tables[name]) for name, p in weights.named_parameters()), values)
    return weights


def tiny_decoder(path: Path, blocks: int = 1) -> Decoder:
    decoder = Decoder(read_config(path), device="cpu", blocks=blocks)
    load_into(decoder, open_checkpoint(path))
    return decoder


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No attention: the products are what is tested."""
    return q + v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


TOKENS = torch.arange(12)


def dense_product(
    path: Path, adapter: Adapter, values: Values
) -> tuple[Decoder, Tensor, dict[str, Tensor]]:
    """A decoder with W + scale B A in place of W, its outputs, and A and B with gradients."""
    dense = tiny_decoder(path).requires_grad_(False)
    tables = dense.slices()
    leaves: dict[str, Tensor] = {}
    for name, value in values.tensors.items():
        leaves[name] = value.clone().requires_grad_()
    for local, parameter in list(dense.named_parameters()):
        rows = []
        for piece in tables[local]:
            own = parameter[piece.offset : piece.offset + piece.rows].detach()
            if piece.name in adapter.targets:
                a, b = (leaves[name] for name in adapter.factors(piece.name))
                part = (b @ a)[piece.start[0] : piece.stop[0]]
                own = own + adapter.targets[piece.name].scale * part
            rows.append(own)
        module, _, leaf = local.rpartition(".")
        holder = dense.get_submodule(module)
        del holder._parameters[leaf]
        setattr(holder, leaf, torch.cat(rows))
    expected = dense(TOKENS, TOKENS, attend)
    expected.pow(3).sum().backward()
    return dense, expected, leaves


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_additions_equal_the_dense_product(tmp_path, blocks, architecture):
    model = make_tiny_model(tmp_path / "model", architecture)
    adapter = uneven(model)
    values = values_of(model, adapter)
    decoder = tiny_decoder(tmp_path / "model", blocks=blocks).requires_grad_(False)
    weights = weights_of(decoder, adapter, values)
    out = decoder(TOKENS, TOKENS, attend, adapters=[Applied(weights=weights)])
    out.pow(3).sum().backward()

    _, expected, leaves = dense_product(tmp_path / "model", adapter, values)

    assert not torch.allclose(expected, decoder(TOKENS, TOKENS, attend), atol=1e-2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        again = decoder(TOKENS, TOKENS, attend, adapters=[Applied(weights=weights)])
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    found = weights.tables()
    for name, parameter in weights.named_parameters():
        for piece in found[name]:
            gradient = parameter.grad[piece.offset : piece.offset + piece.rows]
            whole = leaves[piece.name].grad
            torch.testing.assert_close(
                gradient,
                whole[piece.start[0] : piece.stop[0]],
                rtol=1e-3,
                atol=1e-4 * float(whole.abs().max()),
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_additions_by_torchs_products(tmp_path, monkeypatch, architecture):
    """The same where torch scales and adds in the product, as on GPUs."""
    monkeypatch.setattr(low_rank_products, "serves", lambda *_: False)
    test_additions_equal_the_dense_product(tmp_path, 1, architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_put_or_added(dtype):
    """Memory that is not added to may hold anything before."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 3, generator=random).to(dtype) for n in (5, 2))
    expected = 1.5 * a.double() @ b.double().t()
    held = torch.full((5, 4), torch.nan, dtype=dtype)
    for times in (1, 2):
        put_product(held[:, 1:3], a, b, 1.5, adds=times == 2)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            held[:, 1:3].double(), times * expected, rtol=tolerance, atol=tolerance
        )
    assert held[:, [0, 3]].isnan().all()


def test_rows_choose_their_adapter(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    decoder = tiny_decoder(tmp_path / "model").requires_grad_(False)
    one = weights_of(decoder, uneven(model), values_of(model, uneven(model)))
    plain = make_adapter(find_targets(model, ["q_proj"]), rank=2, alpha=3)
    other = weights_of(decoder, plain, values_of(model, plain))
    rows = (torch.arange(12) % 2).float()[:, None]
    with torch.no_grad():
        mixed = decoder(
            TOKENS,
            TOKENS,
            attend,
            adapters=[Applied(weights=one, rows=rows), Applied(weights=other, rows=1 - rows)],
        )
        odd = decoder(TOKENS, TOKENS, attend, adapters=[Applied(weights=one)])
        even = decoder(TOKENS, TOKENS, attend, adapters=[Applied(weights=other)])
    torch.testing.assert_close(mixed[1::2], odd[1::2])
    torch.testing.assert_close(mixed[::2], even[::2])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "Qwen3_5ForCausalLM"])
@pytest.mark.parametrize("tp", [1, 2])
def test_merged_parts_are_parts_of_the_merged_whole(tmp_path, tp, architecture):
    """A rank's merge of its slices equals its slices of the whole merge, also where one target has
    queries, keys and values of a recurrence, each cut by itself.
    """
    model = make_tiny_model(tmp_path / "model", architecture, **family_of(architecture).tiny)
    adapter = uneven(model)
    values = values_of(model, adapter)
    whole = tiny_decoder(tmp_path / "model")
    dense = plain_values(whole)
    for target, own in adapter.targets.items():
        a, b = (values.tensors[name] for name in adapter.factors(target))
        dense[target] = dense[target] + own.scale * (b @ a)
    for rank in range(tp):
        decoder = Decoder(model, tp=Parallel(rank=rank, size=tp), device="cpu")
        fill(
            ((p.data, decoder.slices()[name]) for name, p in decoder.named_parameters()),
            Values({n: v.detach() for n, v in plain_values(whole).items()}),
        )
        weights = weights_of(decoder, adapter, values)
        held = {n: (p.data, weights.tables()[n]) for n, p in weights.named_parameters()}
        for local, parameter in decoder.named_parameters():
            pieces = decoder.slices()[local]
            found = merged(parameter.data, pieces, adapter, held)
            for piece in pieces:
                box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
                part = found[piece.offset : piece.offset + piece.rows]
                wanted = dense[piece.name][box].reshape(part.shape)
                torch.testing.assert_close(part, wanted, atol=1e-6, rtol=1e-6)


def plain_values(decoder: Decoder) -> dict[str, Tensor]:
    tables, found = decoder.slices(), {}
    for local, parameter in decoder.named_parameters():
        for piece in tables[local]:
            rows = parameter.data[piece.offset : piece.offset + piece.rows]
            found.setdefault(piece.name, []).append(rows)
    shapes = global_shapes(decoder.model)
    return {name: torch.cat(parts).view(shapes[name]) for name, parts in found.items()}


def test_targets_are_groups_names_or_patterns(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    every = find_targets(model, ["all"])
    assert len(every) == 7 * model.num_layers
    assert find_targets(model, ["attention", "mlp"]) == every
    assert find_targets(model, ["q_proj"]) == tuple(n for n in every if ".q_proj." in n)
    assert find_targets(model, ["*.layers.1.mlp.*"]) == every[-3:]
    said = "'query' selects no matrix of LlamaForCausalLM: give attention, mlp, all, or patterns"
    with pytest.raises(ValueError, match=said):
        find_targets(model, ["all", "query"])


def test_groups_stand_for_projections_by_any_name(tmp_path):
    tiny = family_of("Qwen3NextForCausalLM").tiny
    model = make_tiny_model(tmp_path / "next", "Qwen3NextForCausalLM", **tiny)
    delta, attention = (
        [f"model.layers.{i}.{part}.weight" for part in parts]
        for i, parts in enumerate(
            (
                [f"linear_attn.{part}" for part in ("in_proj_qkvz", "in_proj_ba", "out_proj")],
                [f"self_attn.{part}_proj" for part in "qkvo"],
            )
        )
    )
    assert find_targets(model, ["attention"]) == (*delta, *attention)
    shared = [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    assert find_targets(model, ["mlp"]) == tuple(
        f"model.layers.{i}.mlp.{part}.weight" for i in range(2) for part in shared
    )
    phi = make_tiny_model(tmp_path / "phi", "Phi3ForCausalLM")
    assert find_targets(phi, ["all"])[:2] == (
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    )


@pytest.mark.parametrize("form", ["stacked", "transposed"])
@pytest.mark.parametrize("target", ["all", "experts", "gate_up_proj", "*.layers.1.mlp.*"])
def test_experts_in_one_tensor_are_refused_by_name(tmp_path, form, target):
    model = make_tiny_model(tmp_path / "model", "Qwen3MoeForCausalLM")
    assert model.moe is not None
    moe = dataclasses.replace(model.moe, form=form)
    layers = tuple(dataclasses.replace(layer, mlp=moe) for layer in model.layers)
    stacked = dataclasses.replace(model, layers=layers)
    with pytest.raises(ValueError, match=r"selects .*mlp\.experts\.gate_up_proj, which holds"):
        find_targets(stacked, [target])
    assert len(find_targets(stacked, ["attention"])) == 2 * 4


@pytest.mark.parametrize("target", ["all", "experts", "down_proj", "mlp"])
def test_a_refusal_names_only_targets_that_the_model_has(tmp_path, target):
    model = make_tiny_model(tmp_path / "model", "GptOssForCausalLM", sliding_window=16)
    with pytest.raises(ValueError, match=r"give attention, or patterns .*self_attn\.q_proj'$"):
        find_targets(model, [target])
    assert len(find_targets(model, ["attention"])) == model.num_layers * 4


@pytest.mark.parametrize("experts", ["each", "shared"])
@pytest.mark.parametrize("targets", [["experts"], ["all"], ["up_proj", "q_proj"]])
def test_experts_equal_the_dense_products(tmp_path, targets, experts):
    model = make_tiny_model(tmp_path / "model", "Qwen3MoeForCausalLM", num_experts=4)
    adapter = make_adapter(find_targets(model, targets), rank=3, alpha=4.5, experts=experts)
    values = values_of(model, adapter)
    decoder = tiny_decoder(tmp_path / "model").requires_grad_(False)
    weights = weights_of(decoder, adapter, values)
    out = decoder(TOKENS, TOKENS, attend, adapters=[Applied(weights=weights)])
    out.pow(3).sum().backward()

    dense, expected, leaves = dense_product(tmp_path / "model", adapter, values)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    of_experts = {"each": ".experts.3.up_proj.lora_A.", "shared": ".experts.up_proj.lora_A."}
    assert all(
        any(own in n for n in leaves) == (form == experts) for form, own in of_experts.items()
    )
    for name, parameter in weights.named_parameters():
        for piece in weights.tables()[name]:
            found = parameter.grad[piece.offset : piece.offset + piece.rows]
            torch.testing.assert_close(found, leaves[piece.name].grad, atol=1e-4, rtol=1e-4)
    own = {n: (p.data, weights.tables()[n]) for n, p in weights.named_parameters()}
    tables = decoder.slices()
    for local, parameter in tiny_decoder(tmp_path / "model").named_parameters():
        if any(piece.name in adapter.targets for piece in tables[local]):
            found = merged(parameter.data, tables[local], adapter, own)
            holder, _, leaf = local.rpartition(".")
            torch.testing.assert_close(found, getattr(dense.get_submodule(holder), leaf))

    with torch.no_grad():
        rows = (TOKENS % 2 == 0).float()[:, None]
        masked = decoder(TOKENS, TOKENS, attend, adapters=[Applied(weights=weights, rows=rows)])
        plain = decoder(TOKENS, TOKENS, attend)
    torch.testing.assert_close(masked[::2], expected[::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked[1::2], plain[1::2], atol=1e-5, rtol=1e-5)


def test_experts_of_a_layer_are_adapted_alike(tmp_path):
    model = make_tiny_model(tmp_path / "model", "Qwen3MoeForCausalLM")
    with pytest.raises(
        ValueError, match=r"experts\.1\.gate_proj.* not adapted as .*experts\.0\.gate"
    ):
        find_targets(model, ["*.experts.0.*"])
    names = find_targets(model, ["*.layers.1.mlp.experts.*"])
    assert len(names) == 8 * 3
    targets = {name: LowRank(rank=2, scale=1.0) for name in names}
    targets[names[-1]] = LowRank(rank=3, scale=1.0)
    with pytest.raises(ValueError, match="one rank and scale"):
        check_experts(model, targets)
    assert not any(".experts." in name for name in find_targets(model, ["attention"]))
