"""`spmdrl check-collectives`: planted faults are named with both lines; shipped flows have none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import parting_flows
from flow_cases import questions, write_config
from parting_flows import line_of
from spmdrl.commands.check_collectives import Comparison, check_collectives
from spmdrl.commands.cli import main
from spmdrl.config.load import load_config
from spmdrl.training.packing import empty_microbatch
from spmdrl.training.torch_backend import TorchBackend
from tiny_model import make_tiny_model

FLOWS = Path(parting_flows.__file__)
DISJOINT = ["roles.policy.ranks=0-1", "roles.rollout.ranks=2-3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A configuration of GRPO on sums, and data of the other kinds."""
    root = tmp_path_factory.mktemp("collectives")
    make_tiny_model(root / "model")
    make_tiny_model(root / "moe", "Qwen3MoeForCausalLM")
    write_config(
        root / "grpo.yaml", root / "model", root / "run", data=questions(root / "sums.jsonl")
    )
    text = "Tom has {0} apples and buys {0} more. How many apples has he now?"
    rows = [
        {"prompt": text.format(i), "chosen": f"He has {2 * i}.", "rejected": "Many."}
        for i in range(160)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def compare(place: Path, num_ranks: int, *words: str, **sections: object) -> Comparison:
    path = place / "grpo.yaml"
    if sections:
        data = questions(place / "sums.jsonl")
        path = place / f"other_{len(list(place.iterdir()))}.yaml"
        write_config(path, place / "model", place / "run", **{"data": data, **sections})
    return check_collectives(load_config(path, list(words)), num_ranks)


AFTER = "after the fault"


@pytest.mark.parametrize(
    ("fault", "words", "lines"),
    [
        ("branch", [], ("branch", AFTER)),
        ("counts", [], ("counts", AFTER)),
        ("swapped", [], ("swapped", "swapped")),
        ("skipped", DISJOINT, ("skipped", AFTER)),
        ("failing", [], ("failing", AFTER)),
    ],
)
def test_a_planted_fault_is_named_with_both_lines(place, fault, words, lines) -> None:
    found = compare(place, 4, f"flow={FLOWS}:{fault}", *words)
    first = found.findings[0]
    shown = [{line for file, line, _ in side.stack if file == str(FLOWS)} for side in first.sides]
    assert len(shown) == 2
    for mark in lines:
        own = {line_of(mark)}
        assert any(own <= numbers for numbers in shown), (mark, shown)
    assert sorted(rank for side in first.sides for rank in side.ranks) == (
        [0, 1] if fault == "swapped" else [0, 1, 2, 3]
    )
    text = found.describe()
    for mark in lines:
        assert f"parting_flows.py:{line_of(mark)} (" in text


def test_a_role_with_different_numbers_of_microbatches_is_named(place, monkeypatch) -> None:
    def paced(self, microbatches):
        return microbatches + [empty_microbatch()] * (self.mesh.coordinate("dp") == 3)

    # in place of the agreement on the most microbatches, which FSDP2's collectives need
    monkeypatch.setattr(TorchBackend, "_paced", paced)
    found = compare(place, 4, "roles.policy.dp_shard=all")
    sides = {side.ranks: side for side in found.findings[0].sides}
    assert sides.keys() == {(0, 1, 2), (3,)}
    # FSDP2 gathers the weights of one more microbatch
    assert sides[3,].text.startswith("all_gather_single of float32")
    assert not sides[0, 1, 2].text.startswith("all_gather_single")
    for file, line, _ in (sides[3,].stack[0], sides[0, 1, 2].stack[0]):
        assert f"{Path(file).name}:{line} (" in found.describe()


def test_the_command_ends_with_2_where_ranks_part(place, capsys) -> None:
    words = ["check-collectives", str(place / "grpo.yaml"), "--ranks", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*words, f"flow={FLOWS}:branch"])
    assert ended.value.code == 2
    out = capsys.readouterr().out
    assert re.search(r"^collective \d+ of group 0 of ranks 0-1:$", out, re.M)
    assert main([*words, "roles.policy.ranks=0-3"]) == 2
    assert "roles.policy.ranks" in capsys.readouterr().err
    assert main([*words, f"flow={FLOWS}:nothing"]) == 0
    assert "in every group all ranks call the same" in capsys.readouterr().out


def test_pipeline_stages_are_refused(place) -> None:
    with pytest.raises(ValueError, match=r"roles\.policy\.pp=2: .*: compare with roles"):
        compare(place, 4, "roles.policy.pp=2", "train.backend=megatron")


OWN = "same as policy"
PAIRS = {"prompts_per_step": 16}
ROLES = {
    "ppo": ("policy", "reference", "reward", "value", "rollout"),
    "ppo_disjoint": ("policy", "reference", "reward", "value", "rollout"),
    "dpo": ("policy", "reference"),
    "online_dpo": ("policy", "reference", "reward", "rollout"),
    "sft": ("policy",),
    "reward_model": ("reward",),
    "tp": ("policy", "reference", "rollout"),
    "cp": ("policy", "reference", "rollout"),
    "ep": ("policy", "reference", "rollout"),
    "grpo": ("policy", "reference", "rollout"),
    "judge": ("policy", "reference", "rollout"),
}


def sections_of(case: str, place: Path, num_ranks: int) -> dict[str, object]:
    """Sections of the configuration of a shipped flow on some layout."""
    # null takes a role of the other configuration away
    roles: dict[str, Any] = {"policy": None, "rollout": None, **{name: {} for name in ROLES[case]}}
    sections: dict[str, object] = {"roles": roles, "evaluation": {"held_out": 4}}
    flow = case if case in ("dpo", "online_dpo", "sft", "reward_model") else "grpo"
    if case == "judge":
        flow = "online_dpo"
        own = {"max_tokens": 64}
        roles["judge"] = {"ranks": f"{num_ranks // 2}-{num_ranks - 1}", "tp": 2, "judge": own}
        sections |= {"preference": {"judge": "judge"}, "rewards": [{"role": "judge"}]}
    flow = "ppo" if case.startswith("ppo") else flow
    sections["flow"] = flow
    for name in ("policy", "reference", "value", "reward"):
        if roles.get(name) is not None and case not in ("sft", "cp"):
            roles[name]["dp_shard"] = "all"
    for name in ("reward", "value"):
        if roles.get(name) is not None:
            roles[name]["head"] = "normal"
    if flow == "reward_model":
        roles["reward"]["trained"] = True
    if flow in ("dpo", "sft", "reward_model", "online_dpo"):
        source: dict[str, Any] = {"source": str(place / "pairs.jsonl"), "max_tokens": 256}
        source |= {"prompt_column": "prompt", "answer_column": None}
        if flow == "sft":
            source["columns"] = {"response": "chosen"}
        sections["data"] = {"train": source, "prompts_per_step": 16, "group_size": 4}
    if flow in ("dpo", "sft", "reward_model"):
        sections["rewards"], sections["sampling"] = [], {}
    if case != "judge" and flow in ("ppo", "online_dpo"):
        sections["rewards"] = [{"role": "reward"}]
    if flow == "grpo":
        sections["algorithm"] = {"kl_coef": 0.01}
    half = num_ranks // 2
    if case == "ppo_disjoint":
        roles["policy"] |= {"ranks": f"0-{half - 1}", "tp": 2}
        roles["value"] |= {"ranks": OWN}
        roles["reference"] |= {"ranks": f"{half}-{num_ranks - 1}"}
        roles["reward"] |= {"ranks": f"{half}-{num_ranks - 1}", "tp": 2}
        roles["rollout"] |= {"ranks": f"{half}-{num_ranks - 1}", "tp": 2}
        sections |= {"lag": 1, "algorithm": {"importance_cap": 2.0}}
    if case == "tp":
        roles["policy"] |= {"tp": 2}
        roles["rollout"] |= {"tp": 4}
        sections["train"] = {"num_minibatches": 2}
    if case == "cp":
        roles["policy"] |= {"cp": 2}
    if case == "ep":
        sections["model"] = {"path": str(place / "moe")}
        roles["policy"] |= {"ep": 4}
        roles["rollout"] |= {"tp": 2, "ep": 2}
    return sections


FEW = [("ppo_disjoint", 4), ("tp", 4)]
MANY = [(case, size) for case in ROLES for size in (4, 16, 64) if (case, size) not in FEW]


@pytest.mark.parametrize(
    ("case", "num_ranks"), [*FEW, *(pytest.param(*one, marks=pytest.mark.full) for one in MANY)]
)
def test_ranks_of_a_shipped_flow_call_the_same(place, case, num_ranks) -> None:
    found = compare(place, num_ranks, **sections_of(case, place, num_ranks))
    assert found.findings == (), found.describe()
    assert found.notes == (), found.describe()
    assert found.num_collectives > 50
