"""Checkpoints of a mixture of experts cross its layouts; the export is one of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_saving import SAVED, check_equal, make, save, state_of, train

from flow_cases import write_config
from harness import run_ranks
from spmdrl.batch import from_rows
from spmdrl.run.exporting import export_models
from spmdrl.training.readout import next_token
from spmdrl.world import World
from tiny_model import make_tiny_model

LAYOUTS = [
    ["roles.policy.ep=2"],
    ["roles.policy.ep=2", "roles.policy.dp_shard=2"],
    ["roles.policy.tp=2"],
    ["roles.policy.ep=2", "roles.policy.tp=2", "roles.rollout.tp=2", "roles.rollout.ep=2"],
    ["roles.policy.ep=2"],
]
TOKENS = [5, 17, 200, 31, 8, 90, 12]


def cross(
    world: World, path: Path, run_dir: Path, dtype: str, layouts: list[list[str]]
) -> list[float]:
    """Every layout reads what the one before wrote, and is trained on; the last one's scores."""
    expected = {}
    for number, words in enumerate(layouts):
        saver, policy, layout = make(world, path, f"model.dtype={dtype}", *words)
        # of the state, which is float32 whatever the weights are
        layout = {
            rank: {name: replace(held, dtype=torch.float32) for name, held in table.items()}
            for rank, table in layout.items()
        }
        if number:
            found = saver.restore()
            assert (found.steps_done, found.saved, found.metrics_lines) == (number, SAVED, 7), words
            check_equal(policy, layout, expected)
        train(policy)
        save(saver, number + 1)
        expected = state_of(policy, layout)
    export_models(saver._config, saver.states._assembly, run_dir / "model")
    assert policy.backend is not None
    rows = from_rows([TOKENS], rows={"prompt_lengths": torch.tensor([1])})
    found = policy.backend.forward(rows, next_token())["logprobs"]
    return found[1:].tolist()


def test_checkpoints_cross_expert_layouts_and_the_export_is_read(tmp_path: Path) -> None:
    import transformers

    make_tiny_model(tmp_path / "model", "Qwen3MoeForCausalLM")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    scores, _ = run_ranks(cross, 2, path, tmp_path / "run", "float32", LAYOUTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    assert (torch.tensor(scores) - expected).abs().max() <= 1e-4


@pytest.mark.full
def test_bfloat16_checkpoints_keep_their_masters(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", "MixtralForCausalLM", num_experts=4)
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    # other layouts round otherwise, and send some tokens to other experts
    run_ranks(cross, 2, path, tmp_path / "run", "bfloat16", [*LAYOUTS[:2], LAYOUTS[0]])
