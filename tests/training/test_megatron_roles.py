"""What a Megatron role does beside equal numbers: heads, resuming, dtypes, memory, neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_runs import compare, train
from megatron_cases import CPU, Case, case, make_backend
from test_readout import READOUTS, LivelyScores, share_of
from test_readout import loss_fn as scalar_loss
from test_readout import reference as scalar_reference
from test_readout import rows as scalar_rows
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.config.rules import check_rules
from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.storages import live_bytes
from spmdrl.models.adapters import find_targets, make_adapter
from spmdrl.models.config import read_config
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_checkpoint
from spmdrl.models.flat_pieces import flat_pieces
from spmdrl.models.megatron_chunks import Cut, Parameter, chunk_layers, rank_chunks
from spmdrl.models.megatron_layout import megatron_layout, megatron_state_layout
from spmdrl.models.tensors import Slice
from spmdrl.training.megatron import checks
from spmdrl.training.megatron.checks import (
    MegatronOptions,
    check_adapter,
    check_installed,
    check_megatron,
    model_cut,
)
from spmdrl.training.readout import VALUES, next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.weights.views import full_tensors
from spmdrl.world import World
from tiny_model import make_tiny_model

pytestmark = pytest.mark.megatron

SCALAR: dict[int, list[Case]] = {
    2: [case(tp=2, sp=True), case(pp=2, given={"microbatch_tokens": 20}), case(cp=2)],
    4: [case(tp=2, pp=2), case(pp=2, dp_shard=2, given={"share_prompts": False})],
}


def run_scalar(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for made in cases:
        found: dict[str, Any] = {}
        for name, readout in READOUTS.items():
            backend = make_backend(
                world,
                tiny_config(),
                made,
                role="value",
                head="score",
                checkpoint=LivelyScores(tiny_config()),
            )
            own = share_of(scalar_rows(), backend.mesh)
            found[f"{name} before"] = backend.forward(own, readout)[name]
            sums = backend.forward_backward(own, scalar_loss, readout, normaliser=7.0)
            norm = backend.optim_step().grad_norm
            found |= {f"{name} loss": sums["loss"], f"{name} norm": norm}
        place = {"replica": backend.mesh.coordinate("dp"), "replicas": backend.mesh.size("dp")}
        results.append(found | place)
    return results


@pytest.mark.parametrize("world_size", SCALAR)
def test_scalar_heads_equal_row_by_row(world_size):
    expected, batch = scalar_reference(tiny_config()), scalar_rows()
    for ranks in zip(*run_ranks(run_scalar, world_size, SCALAR[world_size]), strict=True):
        for found in ranks:
            mine = [i for i in range(len(batch)) if i // 3 % found["replicas"] == found["replica"]]
            whole = batch.with_columns(
                tokens={"values": expected["values before"]},
                rows={"scores": expected["scores before"]},
            ).select(mine)
            for name in READOUTS:
                for what in ("loss", "norm"):
                    key = f"{name} {what}"
                    assert found[key] == pytest.approx(expected[key], rel=1e-4), key
                torch.testing.assert_close(
                    found[f"{name} before"], whole[name], rtol=1e-4, atol=1e-5
                )


def neighbours(world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    """A policy of tp2 x pp2 and a frozen reference of dp4 beside a value model of tp4."""
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4, vocab_size=101)
    policy = make_backend(world, config, case(tp=2, pp=2))
    value = make_backend(
        world,
        tiny_config(num_attention_heads=8, num_key_value_heads=4),
        case(tp=4, sp=True),
        role="value",
        head="score",
        checkpoint=_ScalarCheckpoint(),
    )
    reference = make_backend(world, config, case(dp_replicate=4), trainable=False)
    rows = make_rows([5, 2], 2, seed=9)
    value.forward(rows, VALUES)
    record = train(policy)
    before = reference.forward(rows, next_token(0.8))["logprobs"]
    torch.testing.assert_close(before, record["before"], rtol=1e-5, atol=1e-5)
    sums = value.forward_backward(scalar_rows(), scalar_loss, VALUES, normaliser=7.0)
    return record, {"loss": sums["loss"], "norm": value.optim_step().grad_norm}


class _ScalarCheckpoint:
    def __init__(self) -> None:
        config = tiny_config(num_attention_heads=8, num_key_value_heads=4)
        self._plain = LivelyCheckpoint(config)
        self.names = self._plain.names | {"score.weight"}

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, 32) if name == "score.weight" else self._plain.shape(name)

    def read(self, part: Slice) -> torch.Tensor:
        if part.name != "score.weight":
            return self._plain.read(part)
        return torch.linspace(-1, 1, 32)[None, part.start[1] : part.stop[1]]


def alone(world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4, vocab_size=101)
    mesh = Mesh("policy", [0], {}, "cpu")
    policy = TorchBackend(mesh, config, LivelyCheckpoint(config), options(), CPU)
    scalar = tiny_config(num_attention_heads=8, num_key_value_heads=4)
    value = TorchBackend(mesh, scalar, _ScalarCheckpoint(), options(), CPU, head="score")
    sums = value.forward_backward(scalar_rows(), scalar_loss, VALUES, normaliser=7.0)
    return train(policy), {"loss": sums["loss"], "norm": value.optim_step().grad_norm}


def test_roles_of_different_layouts_train_in_one_process():
    (expected, wanted), ranks = run_ranks(alone, 1)[0], run_ranks(neighbours, 4)
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4, vocab_size=101)
    compare([record for record, _ in ranks], expected, config)
    for _, found in ranks:
        assert found == pytest.approx(wanted, rel=1e-5)


def half_precision(world: World) -> None:
    """bfloat16 weights with sharded float32 masters follow the float32 run."""
    wide = make_backend(world, tiny_config(), case(dp_shard=2, given={"lr": 1e-3}))
    given = {"lr": 1e-3, "param_dtype": torch.bfloat16}
    half = make_backend(world, tiny_config(), case(dp_shard=2, given=given))
    rows = make_rows([4, 6], 2, seed=world.rank)
    for _ in range(3):
        norms = []
        for backend in (wide, half):
            backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            norms.append(backend.optim_step().grad_norm)
        assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert all(t.dtype == torch.bfloat16 for t, _ in half.local_tensors().values())
    for name, (tensor, _) in wide.local_tensors().items():
        # Adam moves a weight by up to lr a step, whatever the gradient's rounding
        gap = (half.local_tensors()[name][0].float() - tensor).abs() - tensor.abs() / 128
        assert gap.max() < 7e-3, name


def memory(world: World) -> None:
    """Between updates there are no gradients; the optimizer's state is a share of the whole."""
    backend = make_backend(world, tiny_config(), case(dp_shard=2))
    buffers = [b.grad_data for b in backend._optimizer._buffers()]
    assert live_bytes(buffers) == 0
    weights, state = (live_bytes(tensors) for tensors in backend.parts().values())
    assert state <= 1.1 * weights, "two moments, each shared by two ranks"
    rows = make_rows([4], 2)
    backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=1.0)
    assert live_bytes(buffers) >= 0.9 * weights
    backend.optim_step()
    assert live_bytes(buffers) == 0


def torch_stays(world: World) -> None:
    """Megatron's modules alone are told of the CPU."""
    backend = make_backend(world, tiny_config(), case(tp=2), trainable=False)
    assert backend.forward(make_rows([4], 2), next_token(1.0))["logprobs"].sum() < 0
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")
    assert torch.nn.Parameter(torch.zeros(1)).type() == "torch.FloatTensor"


def two_ranks(world: World) -> None:
    half_precision(world)
    memory(world)
    torch_stays(world)


def test_dtypes_and_memory():
    run_ranks(two_ranks, 2)


def test_flat_ranges_are_boxes_that_cover_them():
    whole = Slice(name="w", shape=(5, 8), start=(0, 4), stop=(5, 8), offset=0)
    parameter = Parameter(name="w", module_name="w", shape=(5, 4), slices=(whole,))
    flat = torch.arange(20)
    for start in range(20):
        for stop in range(start + 1, 21):
            pieces = flat_pieces(parameter, start, stop)
            assert len(pieces) <= 3
            assert [p.start for p in pieces][1:] == [p.stop for p in pieces][:-1]
            assert (pieces[0].start, pieces[-1].stop) == (start, stop)
            for piece in pieces:
                [held] = piece.slices
                rows, columns = (slice(a, b) for a, b in zip(held.start, held.stop, strict=True))
                expected = torch.full((5, 8), -1)
                expected[:, 4:] = flat.view(5, 4)
                box = flat[piece.start : piece.stop].view(piece.shape)
                assert torch.equal(expected[rows, columns], box)


@pytest.mark.parametrize("tied", [True, False])
def test_state_is_held_once_by_the_shards_of_every_rank(tied):
    config = tiny_config(vocab_size=101, tie_word_embeddings=tied)
    degrees = {"pp": 2, "dp_replicate": 1, "dp_shard": 3, "cp": 1, "tp": 2}
    cut = Cut(tp=2, pp=2)
    layout = megatron_state_layout(config, range(12), degrees, cut)
    count: dict[str, torch.Tensor] = {}
    for table in layout.values():
        for held in table.values():
            for s in held.slices:
                box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
                count.setdefault(s.name, torch.zeros(s.shape, dtype=torch.int64))[box] += 1
    for name, found in count.items():
        copies = 2 if name.endswith("norm.weight") or (tied and "embed" in name) else 1
        assert (found == copies).all(), name


def test_all_tp_ranks_have_the_same_parameters_in_common() -> None:
    """Their gradients are averaged over tp: also where the last rank has no token at all."""
    config = tiny_config(vocab_size=5, num_key_value_heads=4)
    common = [
        [parameter.name for parameter in chunk if parameter.is_replicated]
        for rank in range(4)
        for chunk in rank_chunks(config, Cut(tp=4), rank, 0)
    ]
    assert len(common) == 4 and common[0].count("norm.weight") == 1
    assert all(names == common[0] for names in common)


def exported(world: World, source: str, out: str, made: Case) -> None:
    config, checkpoint = read_config(source), open_checkpoint(source)
    backend = make_backend(world, config, made, checkpoint=checkpoint)
    degrees = backend.mesh.degrees
    cut = model_cut(degrees, made[1], CPU)
    layout = megatron_layout(config, range(4), degrees, cut, torch.float32)
    gathered = full_tensors(layout, backend.local_tensors())
    if world.is_first:
        save_pretrained(gathered, config, out, source)  # type: ignore[arg-type]
    else:
        list(gathered)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("architecture", "given", "made"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, case(tp=2, pp=2)),
        ("Qwen3ForCausalLM", {"tie_word_embeddings": False}, case(tp=2, pp=2)),
        ("Qwen3MoeForCausalLM", EXPERTS, case(tp=2, pp=2, ep=2, sp=True)),
    ],
)
def test_hugging_face_files_come_back_bit_for_bit(tmp_path, architecture, given, made):
    make_tiny_model(tmp_path / "model", architecture, vocab_size=265, **given)
    run_ranks(exported, 4, str(tmp_path / "model"), str(tmp_path / "back"), made)
    before, after = (open_checkpoint(tmp_path / name) for name in ("model", "back"))
    assert before.names == after.names
    for name in before.names:
        shape = before.shape(name)
        whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        assert torch.equal(before.read(whole), after.read(whole)), name


def test_chunks_that_do_not_divide_the_layers_leave_room_for_embedding_and_head() -> None:
    def cut(layers: int, pp: int, vpp: int = 1) -> list[list[int]]:
        model = tiny_config(num_hidden_layers=layers)
        check_megatron("policy", model, {**DEGREES, "pp": pp}, MegatronOptions(vpp=vpp))
        places = [(chunk, stage) for chunk in range(vpp) for stage in range(pp)]
        own = Cut(pp=pp, vpp=vpp)
        return [list(chunk_layers(model, own, stage, chunk)) for chunk, stage in places]

    assert cut(6, 4) == cut(6, 2, vpp=2) == [[0], [1, 2], [3, 4], [5]]
    assert cut(6, 2) == [[0, 1, 2], [3, 4, 5]]
    found = cut(126, 16)  # Llama 3.1 405B
    assert [len(layers) for layers in found] == [7, *[8] * 14, 7]
    assert [layer for layers in found for layer in layers] == list(range(126))
    with pytest.raises(ValueError, match=r"pp=8 does not divide .*layers=6, nor 8, where"):
        cut(6, 8)  # two stages would have no layer


DEGREES = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "ep": 1}


@pytest.mark.parametrize(
    ("degrees", "given", "match"),
    [
        ({"tp": 4}, {}, r"roles.policy.tp=4 does not divide .*num_key_value_heads=2"),
        ({"tp": 3}, {}, r"tp=3 .*num_attention_heads=4, num_key_value_heads=2"),
        ({"pp": 4}, {}, r"roles.policy.pp=4 does not divide .*num_hidden_layers=2"),
        ({"pp": 2}, {"vpp": 2}, r"pp=2 x roles.policy.megatron.vpp=2 .*num_hidden_layers=2"),
        ({}, {"vpp": 2}, r"megatron.vpp=2 with roles.policy.pp=1"),
        ({}, {"sp": True}, r"megatron.sp=true with roles.policy.tp=1"),
        ({"ep": 2}, {}, r"roles.policy: ep=2, but Qwen3ForCausalLM has no experts"),
    ],
)
def test_degrees_that_megatron_cannot_cut_by_are_refused(degrees, given, match):
    with pytest.raises(ValueError, match=match):
        check_megatron("policy", tiny_config(), {**DEGREES, **degrees}, MegatronOptions(**given))


@pytest.mark.parametrize(
    ("degrees", "sp", "match"),
    [
        ({"ep": 3, "dp_shard": 3}, False, r"roles.policy: ep=3 does not divide .*num_experts=4"),
        ({"tp": 2}, False, r"roles.policy.tp=2 with roles.policy.megatron.sp=false"),
        ({"ep": 2, "dp_replicate": 2}, False, r"ep=2 with tp=1 leaves 2 parts .*which are 1"),
        ({"tp": 2, "moe": 15}, True, r"divides each expert over 2 ranks.*intermediate_size=15"),
    ],
)
def test_degrees_that_do_not_divide_the_experts_are_refused(degrees, sp, match):
    moe = {**EXPERTS, "moe_intermediate_size": degrees.pop("moe", 16)}
    config, options = tiny_config("Qwen3MoeForCausalLM", **moe), MegatronOptions(sp=sp)
    with pytest.raises(ValueError, match=match):
        check_megatron("policy", config, {**DEGREES, **degrees}, options)


def test_adapters_over_layers_that_take_none_are_refused(monkeypatch) -> None:
    adapter = make_adapter(find_targets(tiny_config(), ["q_proj"]), rank=2, alpha=2)
    check_adapter("policy", adapter, plain_base="reference", device=CPU)
    moe = tiny_config("Qwen3MoeForCausalLM", **EXPERTS)
    experts = make_adapter(find_targets(moe, ["all"]), rank=2, alpha=2)
    with pytest.raises(ValueError, match=r"experts as targets .*adapter\.targets to attention, or"):
        check_adapter("policy", experts, plain_base=None, device=CPU)
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    on_cuda = torch.device("cuda")
    check_adapter("policy", adapter, plain_base=None, device=on_cuda)
    with pytest.raises(
        ValueError, match=r"roles\.policy\.base=reference .*share the base of policy"
    ):
        check_adapter("policy", adapter, plain_base="reference", device=on_cuda)


def test_a_missing_or_other_megatron_is_refused(monkeypatch):
    check_installed("policy")
    monkeypatch.setattr(checks, "version", lambda name: "0.15.0")
    with pytest.raises(ValueError, match=r"needs megatron-core 0.16.1, which is installed as 0.15"):
        check_installed("policy")

    def missing(name: str) -> str:
        raise checks.PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", missing)
    with pytest.raises(ValueError, match=r"roles.policy: .*is not installed: install spmdrl"):
        check_installed("policy")


@pytest.mark.parametrize(
    ("role", "name", "match"),
    [
        ({"pp": 2}, "policy", r"roles.policy.pp=2 with train.backend=torch.*backend: megatron"),
        ({"megatron": {"sp": True}}, "policy", r"roles.policy.megatron.sp=true with train.backend"),
        ({"pp": 2}, "rollout", r"roles.rollout.pp=2: rollout is a rollout"),
    ],
)
def test_pipelines_without_megatron_are_refused(role, name, match):
    config = {
        "steps": 1,
        "run_dir": "runs/test",
        "model": {"path": "models/toy"},
        "roles": {"policy": {}, "rollout": {}, name: role},
        "data": {"train": {"source": "x"}, "prompts_per_step": 4},
        "rewards": [{"function": "math"}],
    }
    with pytest.raises(ValueError, match=match):
        check_rules(Config.model_validate(config), trains=False)
    with pytest.raises(ValueError, match="vpp"):
        Config.model_validate({**config, "roles": {"policy": {"megatron": {"vpp": 0}}}})
