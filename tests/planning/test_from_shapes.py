"""Plans of worlds that do not exist: a host without GPUs plans for GPUs as they would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flow_cases import write_config
from spmdrl.config.load import load_config
from spmdrl.planning import parts
from spmdrl.planning.from_shapes import plan_from_shapes, read_models
from spmdrl.planning.margins import CONTEXT_BYTES
from spmdrl.planning.parts import HeldModel, uses_graphs
from tiny_model import make_tiny_model

GPU = 24 * 10**9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    make_tiny_model(root / "model")
    return root


def test_the_device_is_the_callers(root: Path) -> None:
    config = load_config(write_config(root / "c.yaml", root / "model", root), [])
    on_cpu = plan_from_shapes(config, 2, 2, device_type="cpu")
    assert on_cpu.specs["policy"].dtype == torch.float32
    assert on_cpu.memory[0].plan.capacity is None
    on_gpu = plan_from_shapes(config, 2, 2, device_type="cuda", device_bytes=GPU)
    assert on_gpu.specs["policy"].dtype == torch.bfloat16
    assert on_gpu.memory[0].plan.capacity == on_gpu.margin.room(GPU - CONTEXT_BYTES)
    graphs = [part.name for part in on_gpu.memory[0].plan.parts if part.role == "rollout"]
    assert graphs == ["weights", "kv_cache", "graphs"]
    off = load_config(root / "c.yaml", ["rollout.cuda_graphs=false"])
    plan = plan_from_shapes(off, 2, 2, device_type="cuda", device_bytes=GPU)
    held = HeldModel(
        spec=plan.specs["rollout"],
        layout=plan.layouts["rollout"],
        state_layout=plan.state_layouts["rollout"],
    )
    assert not uses_graphs(off, held) and uses_graphs(config, held)


def test_graphs_hold_what_may_come_back_elsewhere(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a policy that the engine computes with; where nothing is mapped its own."""
    config = load_config(write_config(root / "c.yaml", root / "model", root), [])

    def held(size: int, *words: str) -> tuple[tuple[str, str], ...]:
        asked = load_config(root / "c.yaml", list(words))
        plan = plan_from_shapes(asked, size, size, device_type="cuda", device_bytes=GPU)
        [graphs] = [one for one in plan.memory[0].plan.parts if one.name == "graphs"]
        assert graphs.is_capture
        return graphs.holds

    assert config.rollout.cuda_graphs
    assert held(1) == (("policy", "weights"),)
    assert held(2, "roles.policy.dp_shard=2") == ()
    monkeypatch.setattr(parts, "why_graphs_go", lambda model, device: "told so")
    assert held(1) == (("rollout", "weights"), ("rollout", "kv_cache"))


def test_models_are_read_once_or_given(root: Path) -> None:
    config = load_config(write_config(root / "c.yaml", root / "model", root), [])
    models = read_models(config)
    gone = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(root / "gone")})}
    )
    with pytest.raises(ValueError, match="gone"):
        plan_from_shapes(gone, 2, 2, device_type="cpu")
    plan = plan_from_shapes(gone, 2, 2, device_type="cpu", models=models)
    assert plan.specs["policy"].model == models["policy"]
