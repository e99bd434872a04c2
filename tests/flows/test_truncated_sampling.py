"""With top-k, top-p and min-p, trainer and engine speak of one distribution: ratios are 1."""

from __future__ import annotations

from pathlib import Path

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from tiny_model import make_tiny_model

ROLLOUT = "algorithm.old_logprobs=rollout"
CAPPED = ["algorithm.importance_cap=2", "algorithm.old_logprobs=trainer"]
KL = ["algorithm.kl_coef=0.01", "roles.reference={}"]
CASES = [
    ["sampling.top_k=5", ROLLOUT],
    ["sampling.top_p=0.7", ROLLOUT],
    ["sampling.top_k=5000", ROLLOUT, "roles.policy.tp=2"],
    ["sampling.top_p=0.7", *CAPPED, *KL],
    ["sampling.top_p=0.7", *CAPPED, *KL, "roles.policy.tp=2", "train.microbatch_tokens=90"],
    ["sampling.min_p=0.3", *CAPPED, "roles.policy.cp=2", "sampling.temperature=0.7"],
]


def test_an_unmoved_policy_has_the_ratio_one(tmp_path: Path) -> None:
    """Whatever the source of old log-probabilities, the layout, and how many tokens survive."""
    make_tiny_model(tmp_path / "model")
    sections = {"steps": 1, "data": questions(tmp_path / "q.jsonl"), "train": {"lr": 1e-6}}
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", **sections)
    cases = [(str(path), [*words, f"run_dir={tmp_path / str(i)}"]) for i, words in enumerate(CASES)]
    found = [records[0] for records in run_ranks(run_configs, 2, cases, str(tmp_path))[0]]
    for words, record in zip(CASES, found, strict=True):
        assert abs(record["ratio"] - 1) < 1e-5, words
        assert record["rollout_gap"] < 1e-5 and record["clip_fraction"] == 0, words
        assert abs(record.get("tis_weight", 1.0) - 1) < 1e-5, words
        assert abs(record.get("ref_kl", 0.0)) < 1e-6, words
    one, other = found[3], found[4]  # the same on one rank and on two, in other microbatches
    assert abs(one["grad_norm"] / other["grad_norm"] - 1) < 1e-4
