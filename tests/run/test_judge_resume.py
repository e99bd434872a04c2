"""A run that stops while its judge answers resumes as if it never had."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_exact_resume import check

from spmdrl.memory.json_tensors import tensor_json
from sweeps import swept
from tiny_model import make_tiny_model

READERS = Path(__file__).parents[1] / "judging.py"
JUDGE = (
    "{template: '{prompt}|{response}', pair_template: '{response_a}|{response_b}', "
    f"parse: '{READERS}:weight', pair_parse: '{READERS}:winner', max_tokens: 12, temperature: 1}}"
)


def stopped_calls(checkpoint: Path) -> set[str]:
    """Calls that a checkpoint has a part of."""
    found = set()
    for file in checkpoint.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if key.endswith("journal/contents"):
                calls = tensor_json(tensor)["calls"]
                found |= {call["name"] for call in calls if call["part"] is not None}
    return found


CASES = {
    # the judge's own rank stops at its first tokens of a score
    "scores": (["rewards=[{role: judge}]"], "100 18"),
    "pairs": (
        ["flow=online_dpo", "roles.reference={}", "rewards=[]", "preference.judge=judge"],
        "100 22",
    ),
}


@pytest.mark.parametrize("name", swept(CASES, ["pairs"]))
def test_a_judge_resumes_within_its_answers(tmp_path: Path, name: str) -> None:
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "other", seed=5)
    own, stop = CASES[name]
    roles = {
        "policy": {},
        "rollout": {},
        "judge": {"model": str(tmp_path / "other"), "ranks": 1},
    }
    words = [*own, f"roles.judge.judge={JUDGE}"]
    (saved,) = check(tmp_path, name, 2, [stop], words, roles=roles)
    path = tmp_path / name / stop.replace(" ", "_") / "checkpoints" / saved
    assert stopped_calls(path) == {"judge.generate"}
