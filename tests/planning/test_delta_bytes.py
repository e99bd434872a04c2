"""Working memory of layers of the gated delta rule; `test_activation_bytes` measures training."""

from __future__ import annotations

from pathlib import Path

import torch

from allocations import Allocations
from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.models.blocks.delta_rule import DeltaInputs
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.specs import GatedDelta
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.planning.delta_bytes import recurrent_mixers, step_bytes
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.native.recurrent import RecurrentStates, StateShape
from spmdrl.rollout.native.scheduler import StepPlan

MODEL = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
SAMPLES = 16


def spec_of(model: ModelConfig, tp: int = 1) -> RoleSpec:
    return RoleSpec(
        name="policy",
        kind="policy",
        section=RoleSection(),
        train=TrainSection.model_validate({"recompute": "layer"}),
        placement=Placement(
            ranks=tuple(range(tp)),
            degrees={"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": tp},
        ),
        path=Path("model"),
        model=model,
        device_type="cuda",
        dtype=torch.bfloat16,
        trained=True,
        backend="torch",
        is_tiny=False,
    )


def test_kernels_need_much_less_than_plain_torch(tmp_path, monkeypatch):
    spec = spec_of(parse_config(MODEL))
    plain = [working_bytes(spec, 100_000, backward=backward) for backward in (False, True)]
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    kernels = [working_bytes(spec, 100_000, backward=backward) for backward in (False, True)]
    assert all(few < 0.6 * many for few, many in zip(kernels, plain, strict=True))
    two = working_bytes(spec_of(spec.model, tp=2), 100_000, backward=True)
    assert 0.5 * kernels[1] < two < 0.9 * kernels[1]


def test_models_without_such_layers_count_none():
    model = parse_config({**MODEL, "layer_types": ["full_attention", "full_attention"]})
    assert recurrent_mixers(model) == [] and step_bytes(model, 1) == 0


def test_a_decode_step_has_one_copy_of_its_states():
    model = parse_config(MODEL)
    [mixer] = recurrent_mixers(model)
    shape = StateShape(
        layers={1: mixer},
        num_slots=SAMPLES,
        tp_size=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    states = RecurrentStates(shape)
    none = torch.zeros(0, dtype=torch.int64)
    states.prepare(
        StepPlan(copies=[], decodes=[], chunks=[]),
        [torch.arange(SAMPLES), none, none],
    )
    inputs = random_inputs(mixer)
    with torch.inference_mode(), Allocations() as found:
        states.recur(1, inputs)
    held = SAMPLES * step_bytes(model, 1)
    windows = inputs.mixed.nbytes * 2 * (mixer.conv_size + 1)
    assert held <= found.peak <= held + windows


def random_inputs(mixer: GatedDelta) -> DeltaInputs:
    channels = 2 * mixer.num_heads * mixer.head_dim + mixer.num_v_heads * mixer.v_dim
    return DeltaInputs(
        mixed=torch.randn(SAMPLES, channels),
        conv_weight=torch.randn(channels, mixer.conv_size),
        decay=-torch.rand(SAMPLES, mixer.num_v_heads),
        beta=torch.rand(SAMPLES, mixer.num_v_heads),
        num_heads=mixer.num_heads,
        head_dim=mixer.head_dim,
    )
