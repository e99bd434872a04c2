"""Plans of roles on DeepSpeed: bytes of ZeRO's stages, messages of a step, and refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flow_cases import write_config
from forecast_cases import machine_of
from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.planning.forecast.shapes import rank_shapes
from spmdrl.planning.forecast.streams import Stream
from spmdrl.planning.forecast.train_work import TrainRank, update_work
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.host_memory import host_memory
from spmdrl.planning.layouts import check_model
from spmdrl.planning.parts import table_bytes
from spmdrl.planning.suggest.space import make_space
from spmdrl.planning.systems.registry import train_system
from spmdrl.planning.systems.train_memory import TrainMemory
from spmdrl.role_spec import RoleSpec

RANKS = 4
MODEL = parse_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
WHOLE = 2 * (32 * 16) + 16 + 2 * (2 * 16 + 16 * 32 + 32 + 16 * 16 + 3 * 16 * 24)
"""Values of the model: embedding, head, norms, and q, k, v with biases, o, and the MLP's."""


def words_of(stage: int, *more: str, dtype: str = "bfloat16") -> list[str]:
    zero = ["train.backend=deepspeed", f"train.deepspeed.stage={stage}"]
    return [*zero, f"model.dtype={dtype}", *more]


def specs(tmp_path: Path, *words: str, size: int = RANKS) -> dict[str, RoleSpec]:
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path, flow="grpo")
    return dict(specs_of(load_config(path, list(words)), MODEL, size))


def memory_of(spec: RoleSpec) -> TrainMemory:
    system = train_system(spec)
    layout = system.layout(spec)
    return system.memory(spec, layout[0], system.state_layout(spec, layout)[0])


def test_the_model_has_as_many_values(tmp_path: Path) -> None:
    spec = specs(tmp_path, *words_of(2))["policy"]
    assert table_bytes(train_system(spec).layout(spec)[0]) == 2 * WHOLE


@pytest.mark.parametrize(("stage", "dtype"), [(s, d) for s in (1, 2, 3) for d in ("bf", "f")])
def test_bytes_of_the_stages(tmp_path: Path, stage: int, dtype: str) -> None:
    name = {"bf": "bfloat16", "f": "float32"}[dtype]
    spec = specs(tmp_path, *words_of(stage, dtype=name))["policy"]
    found, own = memory_of(spec), WHOLE // RANKS
    is_wide = dtype == "f"
    assert found.optimizer == 12 * own  # masters, also of float32 weights, and moments
    sums = {
        1: 4 * WHOLE + (8 * own if is_wide else 0),
        2: (8 if is_wide else 4) * own,
        3: 8 * own,
    }
    assert found.gradients == sums[stage]
    size = 4 if is_wide else 2
    bucket = WHOLE * (4 if is_wide else 6)  # no larger than all gradients, and sent in float32
    live, largest = size * WHOLE, 2 * 24 * 16
    assert found.reads == (live if stage == 3 else 0)
    passes = {1: size * WHOLE, 2: bucket, 3: live + 4 * WHOLE + largest * (size + 4)}
    assert found.passes == passes[stage]
    assert not found.offloads and not found.host


def test_offloaded_parts_are_on_the_host(tmp_path: Path) -> None:
    words = words_of(2, "train.deepspeed.offload=optimizer")
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path, flow="grpo")
    config = load_config(path, words)
    models = dict.fromkeys(config.roles, MODEL)

    def planned(changed: list[str]) -> tuple[dict[str, int], int]:
        given = load_config(path, changed)
        plan = plan_from_shapes(given, RANKS, RANKS, device_type="cpu", models=models)
        parts = plan.memory[0].plan.parts
        sizes = {part.name: part.num_bytes for part in parts if part.role == "policy"}
        return sizes, host_memory(given, plan, RANKS, RANKS).offloaded

    kept, nothing = planned(words_of(2))
    away, held = planned(words)
    own = WHOLE // RANKS
    assert kept == {"weights": 2 * WHOLE, "optimizer": 12 * own} and nothing == 0
    assert away == {"weights": 2 * WHOLE, "optimizer": 0}
    # masters and moments; gradients, and sums of them; weights in their dtype; a parameter on its
    # way there
    assert held == RANKS * ((12 + 4 + 4 + 2) * own + 2 * 2 * 24 * 16)


def test_a_user_s_buckets_count(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    words = words_of(2, f"train.deepspeed.config={tmp_path}/ds.json")
    assert memory_of(specs(tmp_path, *words)["policy"]).passes == 6 * 1000


def test_the_rollout_computes_with_whole_weights_of_the_policy(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path, flow="grpo")
    config = load_config(path, words_of(2))
    models = dict.fromkeys(config.roles, MODEL)
    plan = plan_from_shapes(config, RANKS, RANKS, device_type="cpu", models=models)
    [sync] = plan.syncs.values()
    assert not sync.moves


STREAM = Stream(tokens=64, pairs=0, places=64, microbatches=3, rows=1)


def sent(spec: RoleSpec, model: ModelConfig = MODEL) -> dict[str, float]:
    """Bytes over links of an update of three microbatches, and to the host."""
    system = train_system(spec)
    layout = system.layout(spec)
    rank = TrainRank(
        spec=spec,
        shapes=rank_shapes(model, spec.placement.degrees, spec.head, spec.adapter),
        table=layout[0],
        states=system.state_layout(spec, layout)[0],
        node_size=RANKS,
    )
    return {str(link): value for link, value in update_work(rank, STREAM).link_bytes.items()}


def test_messages_of_the_stages(tmp_path: Path) -> None:
    """A ring passes (n - 1) / n of the bytes for a gather or a scatter, twice that for a sum."""
    ring, norm = (RANKS - 1) / RANKS, 2 * 8 * (RANKS - 1) / RANKS

    def node(stage: int, dtype: str, *more: str) -> float:
        return sent(specs(tmp_path, *words_of(stage, *more, dtype=dtype))["policy"])["node"] - norm

    assert node(1, "float32") == pytest.approx(ring * WHOLE * (4 + 4))
    assert node(1, "bfloat16") == pytest.approx(ring * WHOLE * (2 * 4 + 2))
    # shapes of forecasts leave out norms and biases
    assert node(2, "bfloat16") == pytest.approx(ring * WHOLE * (3 * 4 + 2), rel=0.05)
    # gathers for each pass, and once a sum, per microbatch
    assert node(3, "bfloat16") == pytest.approx(ring * WHOLE * 3 * (2 * 2 + 4), rel=0.05)
    spread = node(2, "bfloat16", "roles.policy.dp_shard=2")
    assert spread == node(2, "bfloat16")


def test_an_offloaded_update_goes_over_the_host(tmp_path: Path) -> None:
    words = words_of(2, "train.deepspeed.offload=optimizer")
    found = sent(specs(tmp_path, *words)["policy"])
    assert found["host"] == (4 + 2) * WHOLE / RANKS
    assert found["copy"] == 32 * WHOLE / RANKS
    assert not {"host", "copy"} & sent(specs(tmp_path, *words_of(2))["policy"]).keys()


def test_a_search_keeps_the_stage_and_divides_what_can_be(tmp_path: Path) -> None:
    """Context parallelism is tried for long rows only."""
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path, flow="grpo")
    config = load_config(path, words_of(2, "sampling.max_tokens=20000"))
    space = make_space(config, dict.fromkeys(config.roles, MODEL), machine_of(nodes=1))
    keys = {word.partition("=")[0] for words in space.blocks["policy"] for word in words}
    tried = {f"roles.policy.{axis}" for axis in ("tp", "cp", "dp_shard")}
    assert keys == tried
    every = [word for block in space.blocks.values() for options in block for word in options]
    assert every and not any("deepspeed" in word for word in every)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roles.policy.pp=2"], r"roles\.policy\.pp=2"),
        (["train.deepspeed.offload=all"], r"offload=all needs stage 3"),
        (
            ["train.deepspeed.offload=optimizer", "roles.policy.residency={optimizer: host}"],
            r"roles\.policy\.residency\.optimizer=host with train\.deepspeed\.offload=optimizer",
        ),
        (["roles.policy.tp=3"], r"roles\.policy.*3"),
        (["train.deepspeed.config=no.json"], r"train\.deepspeed\.config=no\.json.*no such file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found = specs(tmp_path, *words_of(2), *words, size=6)
        check_model(found["policy"], found, replays_routing=False)


def test_experts_are_not_divided(tmp_path: Path) -> None:
    given: dict[str, Any] = {**MODEL.source, "architectures": ["Qwen3MoeForCausalLM"]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = parse_config({**given, **experts})
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path, flow="grpo")
    config = load_config(path, [*words_of(2), "roles.policy.ep=2"])
    found = specs_of(config, model, RANKS)
    with pytest.raises(ValueError, match=r"roles\.policy\.ep=2 with train\.backend=deepspeed"):
        check_model(found["policy"], found, replays_routing=False)
    assert found["policy"].dtype is torch.bfloat16
