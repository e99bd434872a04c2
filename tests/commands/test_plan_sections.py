"""`spmdrl plan` without GPUs: its numbers by hand, for each kind of data and roles of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import spmdrl.planning.from_shapes as module
from flow_cases import write_config
from spmdrl.commands.cli import main
from spmdrl.commands.plan import plan_text
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import read_config
from spmdrl.models.sharding import global_shapes
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    make_tiny_model(root / "model")
    return root


def planned(root: Path, ranks: int = 2, words: list[str] | None = None, **sections: Any) -> str:
    path = write_config(root / "c.yaml", root / "model", root, **sections)
    return plan_text(load_config(path, words or []), ranks)


def numbers(text: str, role: str | None = None) -> dict[str, str]:
    """The derived quantities of a step, or of a role: name -> value, how it comes about."""
    block = text.split("# derived")[1].split("# roles")[0].split("\n\n")
    lines = next(
        part.splitlines()[1:] for part in block if role is None or part.startswith(f"{role}:")
    )
    return {line[:28].strip(): line[29:].strip() for line in lines}


PAIRS = {
    "flow": "reward_model",
    "roles": {"policy": None, "rollout": None, "reward": {"head": "zero", "trained": True}},
    "rewards": [],
    "data": {"prompts_per_step": 7, "train": {"source": "pairs.jsonl", "max_tokens": 100}},
    "train": {"microbatch_tokens": 500, "num_minibatches": 2},
}


def test_conversations_have_no_groups(root):
    data = {"prompts_per_step": 10, "train": {"source": "talk.jsonl", "max_tokens": 100}}
    train = {"microbatch_tokens": 250, "epochs": 3}
    text = planned(root, flow="sft", data=data, train=train, rewards=[], roles={"rollout": None})
    found = numbers(text)
    assert found["conversations per step"].startswith("10 ")
    assert found["most tokens per step"].startswith("1,000 ")
    assert not [name for name in found if "sample" in name or "prompt" in name]
    policy = numbers(text, "policy")
    assert policy["optimizer steps per step"].startswith("3 ")
    assert policy["conversations per minibatch"].startswith("10 ")
    # five conversations on each of two replicas, two of 99 tokens in 250
    assert policy["microbatches per minibatch"].startswith("3 ")


def test_pairs_are_two_answers_and_stay_together(root):
    text = planned(root, **PAIRS)
    found = numbers(text)
    assert found["pairs per step"].startswith("7 ") and found["responses per step"].startswith(
        "14 "
    )
    assert found["most tokens per step"].startswith("1,400 ")
    reward = numbers(text, "reward")
    assert reward["pairs per minibatch"].startswith("3 or 4 ")
    assert reward["most tokens per minibatch"].startswith("800 ")
    # two pairs of 200 tokens on each of two replicas, in 500 tokens
    assert reward["microbatches per minibatch"].startswith("1 ")


def test_roles_have_their_own_train_section(root):
    value = {"train": {"epochs": 4, "num_minibatches": 5, "share_prompts": False}}
    text = planned(
        root,
        flow="ppo",
        roles={"value": value, "reference": {}, "policy": {}, "rollout": {}},
        algorithm={"kl_coef": 0.1, "value_warmup_steps": 1},
        train={"microbatch_tokens": 300, "epochs": 2},
    )
    policy, own = numbers(text, "policy"), numbers(text, "value")
    assert policy["optimizer steps per step"].startswith("2 ")
    assert policy["most optimizer steps in all"].startswith("4 "), "one of three steps is a warm-up"
    assert "16 x" not in policy["most tokens per minibatch"]
    # 5 groups, a prompt of 96 and four answers of 10 tokens
    assert policy["most tokens per minibatch"].startswith("680 ")
    assert own["optimizer steps per step"].startswith("20 ")
    assert "roles.value.train.epochs=4" in own["optimizer steps per step"]
    assert own["most optimizer steps in all"].startswith("60 ")
    assert own["prompts per minibatch"].startswith("1 ")
    # four rows of 105 tokens, two at a time
    assert own["most tokens per minibatch"].startswith("424 ")
    assert own["microbatches per minibatch"].startswith("2 ")
    # three groups on a replica, two of 132 tokens at a time
    assert numbers(text, "reference")["microbatches per reading"].startswith("2 ")


def test_compared_samples_alone_are_updated(root):
    roles = {"policy": {}, "rollout": {}, "reference": {}}
    for words, tokens in ((["preference.pairs=best_worst"], 580), (["preference.pairs=all"], 680)):
        text = planned(root, words=words, flow="online_dpo", roles=roles)
        policy = numbers(text, "policy")
        assert policy["most tokens per minibatch"].startswith(f"{tokens} ")
        # three groups on a replica, of 96 + 2 x 9 or 96 + 4 x 9 tokens
        roomy = planned(
            root, words=[*words, "train.microbatch_tokens=342"], flow="online_dpo", roles=roles
        )
        count = 1 if tokens == 580 else 2
        assert numbers(roomy, "reference")["microbatches per reading"].startswith(f"{count} ")


def test_ranks_with_one_plan_are_named_together(root):
    text = planned(root, 4, ["roles.policy.ranks=0-1", "roles.rollout.ranks=1-3"])
    assert "memory of rank 0:" in text and "memory of ranks 2-3:" in text
    assert "memory of rank 2:" not in text
    assert text.count("policy.optimizer") == 2, "once for rank 0, once for rank 1"


def test_nodes_reach_the_plan_of_weights(root, monkeypatch):
    seen = []
    plan_roles = module.plan_roles

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(args[4])
        return plan_roles(*args, **options)

    monkeypatch.setattr(module, "plan_roles", spy)
    path = write_config(root / "c.yaml", root / "model", root)
    assert "# derived, on 4 ranks (2 nodes of 2)" in plan_text(load_config(path), 4, 2)
    plan_text(load_config(path), 4)
    assert seen == [2, 4]
    with pytest.raises(ValueError, match="--ranks 4 with --ranks-per-node 3"):
        plan_text(load_config(path), 4, 3)


def test_what_is_not_there_is_listed(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text("import math\n\ndef main(run): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "here.jsonl").write_text("")
    good = {"flow": "my.py:main", "data": {"train": {"source": "here.jsonl", "max_tokens": 96}}}
    assert "not found" not in planned(root, **good)
    reward = {"function": "broken.py:reward"}
    bad = planned(root, words=["data.train.source=gone.jsonl"], **good, rewards=[reward])
    bad = bad.split("# not found from here")[1]
    assert "rewards.0.function=broken.py:reward: broken.py cannot be imported: ZeroDiv" in bad
    assert f"data.train.source=gone.jsonl: there is no file {tmp_path}/gone.jsonl" in bad
    typo = planned(root, **{**good, "flow": "my.py:mian"}).split("# not found from here")[1]
    assert "flow=my.py:mian: my.py has no 'mian'; did you mean 'main'?" in typo


def test_the_configuration_comes_last_and_where_it_is_asked_for(root, capsys):
    path = write_config(root / "c.yaml", root / "model", root)
    assert main(["plan", str(path), "--ranks", "2"]) == 0
    derived = capsys.readouterr().out
    assert derived.startswith("# derived, on 2 ranks (1 node)\n")
    assert "# resolved" not in derived
    assert main(["plan", str(path), "--ranks", "2", "--resolved", "seed=77"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(derived.rstrip("\n"))
    resolved = yaml.safe_load(text.split("# resolved configuration\n")[1])
    assert Config.model_validate(resolved) == load_config(path, ["seed=77"])


def test_adapters_are_counted_and_a_shared_base_once(root):
    roles = {
        "policy": {"adapter": {"rank": 2, "targets": ["q_proj", "down_proj"]}},
        "reference": {"base": "policy"},
        "value": {"base": "policy", "head": "zero", "adapter": {"rank": 1, "targets": ["q_proj"]}},
    }
    text = planned(root, flow="ppo", roles=roles, algorithm={"kl_coef": 0.05})
    model = read_config(root / "model")
    shapes = global_shapes(model)
    per_layer = [
        shapes[f"model.layers.0.{x}.weight"] for x in ("self_attn.q_proj", "mlp.down_proj")
    ]
    added = 2 * model.num_layers * sum(map(sum, per_layer))
    policy, value = numbers(text, "policy"), numbers(text, "value")
    assert policy["adapter's matrices"].split("   ") == [
        str(2 * model.num_layers),
        "rank 2, roles.policy.adapter",
    ]
    assert policy["adapter's parameters"].startswith(f"{added:,} ")
    assert policy["values trained per rank"].startswith(f"{added:,} ")
    assert policy["base"].endswith("per rank, used in place by reference, value, rollout")
    own = model.num_layers * sum(per_layer[0]) + model.hidden_size
    assert value["values trained per rank"].startswith(f"{own:,} ")
    for found in (value, numbers(text, "reference")):
        assert re.match(r"shared +policy\.base, [\d.]+ MB per rank", found["base"])
    assert re.match(r"unmerged +its engine computes", numbers(text, "rollout")["policy's adapter"])
    assert "adapter" not in planned(root)
