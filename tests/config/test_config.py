"""From YAML files, overrides and the environment to a checked `Config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.config.data_sets import (
    held_out_sets,
    is_rewarded,
    response_tokens,
    rows_read,
    takes_turns,
    train_sources,
)
from spmdrl.config.load import load_config
from spmdrl.config.shipped_flows import shipped_flows
from spmdrl.planning.token_bounds import step_sizes

BASE = """
steps: 10
run_dir: runs/test
model: {path: models/toy}
roles: {policy: {tp: 2}, rollout: {ranks: same as policy}}
data:
  train: {source: "reasoning_gym:chain_sum"}
  prompts_per_step: 4
rewards:
- {function: exact}
- {function: format, weight: 0.5}
"""


def write(folder: Path, **files: str) -> Path:
    """Files `NAME.yaml`; the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, base=BASE)


def test_values_have_their_types(base: Path) -> None:
    config = load_config(base, ["train.lr=1e-5", "evaluation.k=[1,2]", "evaluation.num_samples=2"])
    assert config.train.lr == 1e-5
    assert config.evaluation.k == (1, 2)
    assert config.roles["policy"].tp == 2
    assert config.rewards[1].weight == 0.5
    assert (config.role_kind("policy"), config.model_path("policy")) == (
        "policy",
        Path("models/toy"),
    )


def test_later_files_win_and_overrides_win_over_all(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="includes: [base.yaml, sub/other.yaml]\nseed: 3\n",
        base=BASE + "seed: 1\nflow: one\ntrain: {lr: 0.1, epochs: 7}\n",
    )
    (tmp_path / "sub").mkdir()
    # an include is relative to the file that names it
    write(tmp_path / "sub", other="includes: [deep.yaml]\nseed: 2\nflow: two\n", deep="steps: 5\n")
    config = load_config(path, ["train.lr=0.2"])
    assert (config.seed, config.flow, config.steps) == (3, "two", 5)
    assert (config.train.lr, config.train.epochs) == (0.2, 7)


def test_environment_gives_value_default_and_type(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_STEPS", "12")
    monkeypatch.delenv("MY_LR", raising=False)
    monkeypatch.setenv("MY_RUN", "runs/other")
    text = BASE.replace("steps: 10", "steps: ${MY_STEPS:3}").replace("runs/test", "${MY_RUN}/a")
    path = write(base.parent, env=text + "# ${UNSET} in a comment\ntrain: {lr: '${MY_LR:1e-3}'}\n")
    config = load_config(path, ["seed=${MY_STEPS}", "model.tiny=${MY_TINY:true}"])
    assert (config.steps, config.train.lr, config.run_dir) == (12, 1e-3, "runs/other/a")
    assert (config.seed, config.model.tiny) == (12, True)
    with pytest.raises(ValueError, match=r"\$\{MY_NONE\} is not set.*\$\{MY_NONE:default\}"):
        load_config(path, ["seed=${MY_NONE}"])


def test_interpolation_follows_overrides(base: Path) -> None:
    path = write(
        base.parent, link=BASE + "seed: ${steps}\nsampling: {max_tokens: '${data.group_size}'}\n"
    )
    config = load_config(path, ["steps=33", "data.group_size=5"])
    assert (config.seed, config.sampling.max_tokens) == (33, 5)
    with pytest.raises(ValueError, match=r"no\.such"):
        load_config(path, ["run_dir=${no.such}"])


def test_overrides_reach_into_lists_and_new_roles(base: Path) -> None:
    config = load_config(
        base, ["rewards.1.weight=2", "roles.other.ranks=0,2", "data.train.task={min_terms: 3}"]
    )
    assert [reward.weight for reward in config.rewards] == [1.0, 2.0]
    assert config.roles["other"].ranks == "0,2"
    assert config.data.train.task == {"min_terms": 3}
    assert load_config(base, ["rewards=[]", "flow=sft"]).rewards == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", r"unknown key 'train\.lrr'; did you mean 'train\.lr'\?"),
        ("trian.lr=1", r"unknown key 'trian'; did you mean 'train'\?"),
        ("lr=1", r"unknown key 'lr'; did you mean 'train\.lr'\?"),
        ("tp=1", r"unknown key 'tp'; did you mean 'roles\.NAME\.tp'\?"),
        ("roles.policy.dp_shrad=1", r"'roles\.policy\.dp_shrad'; .* 'roles\.policy\.dp_shard'"),
        ("rewards.1.wieght=1", r"'rewards\.1\.wieght'; did you mean 'rewards\.1\.weight'"),
        (
            "evaluation.sets.x={data: {sorce: x}}",
            r"evaluation\.sets\.x: unknown key 'data\.train\.sorce'; .*'data\.train\.source'",
        ),
        (
            "evaluation.sets.x={data: {}, num_sample: 2}",
            r"unknown key 'evaluation\.num_sample'; did you mean 'evaluation\.num_samples'",
        ),
        (
            "evaluation.sets.x={data: {}, sampling: {top_q: 2}}",
            r"sets\.x: unknown key 'sampling\.top_q'",
        ),
        ("evaluation.sets.x={data: a.jsonl}", r"sets\.x\.data='a\.jsonl' must be a mapping"),
        ("evaluation.sets.x={}", r"evaluation\.sets\.x has no data"),
        (
            "evaluation.sets.x={data: {}, k: [3]}",
            r"sets\.x: evaluation\.k=\[3\]: with num_samples=1",
        ),
        ("evaluation.sets={x y: {data: {}}}", r"sets\.x y: a set's name holds letters"),
        ("data.mix=[{sorce: x}]", r"data\.mix\.0: unknown key 'data\.train\.sorce'"),
        ("data.mix=[{weight: 0}]", r"data\.mix\.0: data\.train\.weight=0: .*greater than 0"),
        ("model.xyz=1", r"unknown key 'model\.xyz'; the keys there are attention, cpu_products"),
        ("steps=many", r"steps='many': .*valid integer"),
        ("roles.policy.ranks=[0]", r"roles\.policy\.ranks=\[0\]: .*string or: .*integer"),
        ("roles.policy.dp_shard=some", r"roles\.policy\.dp_shard='some': .*integer.* 'all'"),
        ("steps=0", r"steps=0: .*greater than or equal to 1"),
        ("steps=???", "steps"),
        ("noequals", "key=value"),
        ("=3", "key=value"),
        ("rewards.x=3", r"override 'rewards\.x=3'"),
        ("rewards.7.weight=3", r"override 'rewards\.7\.weight=3'"),
        ("steps={", "override 'steps={'"),
    ],
)
def test_a_bad_override_is_explained(base: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(base, [override])
    assert len(str(caught.value).splitlines()) <= 8


def test_all_problems_are_listed_at_once(base: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.lr") as caught:
        load_config(base, ["train.lr=-1", "sampling.top_q=1", "data.train={}", "steps=x"])
    assert [key in str(caught.value) for key in ("train.lr", "sampling.top_q", "steps")] == [
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.num_minibatches=9"], ["train.num_minibatches=9", "data.prompts_per_step=4"]),
        (
            ["roles.policy.train.num_minibatches=9"],
            ["roles.policy.train.num_minibatches=9", "data.prompts_per_step=4"],
        ),
        (
            ["algorithm.kl_coef=0.1", "roles.reference.train.epochs=2"],
            ["roles.reference.train.epochs=2", "reference is not trained", "leave the key out"],
        ),
        (
            ["algorithm.overlong_buffer=64", "sampling.max_tokens=64"],
            ["algorithm.overlong_buffer=64", "sampling.max_tokens=64"],
        ),
        (["flow=ppo", "roles.value={}", "algorithm.kl_estimator=k1"], ["flow=ppo", "do grpo"]),
        (["algorithm.gamma=0.9"], ["algorithm.gamma=0.9 with flow=grpo", "ppo"]),
        (["preference.beta=0.3"], ["preference.beta=0.3 with flow=grpo", "dpo, online_dpo"]),
        (["flow=sft", "lag=1"], ["lag=1 with flow=sft"]),
        (
            ["algorithm.old_logprobs=rollout", "algorithm.importance_cap=2.0"],
            ["old_logprobs=rollout with importance_cap=2.0", "importance_cap=null"],
        ),
        (["algorithm.kl_coef=0.1"], ["algorithm.kl_coef=0.1", "roles=['policy', 'rollout']"]),
        (["data.group_size=1"], ["flow=grpo", "data.group_size=1"]),
        (
            ["data.group_size=1", "data.prompts_per_step=1"],
            ["data.prompts_per_step=1", "data.group_size=1"],
        ),
        (["evaluation.k=[1,8]"], ["evaluation.k=[1, 8]: with num_samples=1, pass@8"]),
    ],
)
def test_crossed_rules_name_both_keys_and_values(
    base: Path, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(base, overrides)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_role_can_be_taken_away_and_an_unused_reference_is_refused(base: Path) -> None:
    config = load_config(base, ["algorithm.kl_coef=0.1", "roles.reference.tp=1"])
    assert "reference" in config.roles
    with pytest.raises(ValueError, match="is configured but unused"):
        load_config(base, ["roles.reference.tp=1"])
    assert "reference" not in load_config(base, ["roles.reference=null"]).roles
    words = ["evaluation.sets.a={data: {}}", "evaluation.sets.b={data: {}}"]
    assert list(load_config(base, [*words, "evaluation.sets.a=null"]).evaluation.sets) == ["b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "includes: [a.yaml]\n"}, "includes itself: .*a.yaml -> .*a.yaml"),
        ({"a": "includes: [b.yaml]\n", "b": "includes: [a.yaml]\n"}, "includes itself"),
        ({"a": "includes: [gone.yaml]\n"}, r"no config file .*gone\.yaml \(included by .*a\.yaml"),
        ({"a": "includes: b.yaml\n"}, r"includes='b\.yaml' must be a list"),
        ({"a": "steps: [1\n"}, r"a\.yaml: "),
        ({"a": "steps: 1\nsteps: 2\n"}, r"a\.yaml: .*duplicate key steps"),
        ({"a": "- steps\n"}, r"a\.yaml: .*top level"),
        ({"a": "steps: ${}\n"}, r"a\.yaml: "),
        ({"a": "includes: [b.yaml]\nrewards: {x: 1}\n", "b": "rewards: [1]\n"}, "does not fit"),
        ({"a": ""}, "'steps' is required"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load_config(write(tmp_path, **files))


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml")


def test_sets_build_on_the_sections_that_they_belong_to(base: Path) -> None:
    sets = {
        "a": "{data: {source: other.jsonl}, sampling: {temperature: 0}, k: [2], num_samples: 2}",
        "b": "{data: {share: 2/2}, rewards: [{function: math}], kind: prompts}",
    }
    words = [f"evaluation.sets.{name}={text}" for name, text in sets.items()]
    config = load_config(
        base,
        [
            *words,
            "data.train.share=1/2",
            "data.train.template='{prompt}!'",
            "evaluation.sampling={max_tokens: 7}",
            "evaluation.held_out=3",
            "data.mix=[{source: more.jsonl, weight: 0.5, prompt_column: q}]",
        ],
    )
    found = held_out_sets(config)
    assert list(found) == ["held_out", "a", "b"] and found["held_out"].data is None
    a, b = found["a"].data, found["b"].data
    assert a is not None and b is not None
    # another source has its own rows, and is read alike
    assert (a.source, a.share, a.template) == ("other.jsonl", "all", "{prompt}!")
    assert (b.source, b.share) == (config.data.train.source, "2/2")
    assert (found["a"].sampling.temperature, found["a"].sampling.max_tokens) == (0, 7)
    assert (found["a"].k, found["b"].k, found["b"].sampling.temperature) == ((2,), (1,), 1.0)
    assert [r.function for r in found["b"].rewards] == ["math"]
    assert [r.function for r in found["a"].rewards] == ["exact", "format"]
    train, more = train_sources(config)
    assert (train.weight, train.share) == (1.0, "1/2")
    assert (more.weight, more.share, more.prompt_column) == (0.5, "all", "q")


def test_optimizer_steps(base: Path) -> None:
    words: list[Any] = ["train.epochs=3", "train.num_minibatches=2"]
    assert load_config(base, words).num_optimizer_steps("policy") == 60
    own = load_config(base, [*words, "roles.policy.train.epochs=1"])
    assert own.num_optimizer_steps("policy") == 20
    ppo = ["flow=ppo", "roles.value={}", "roles.reference={}", "algorithm.value_warmup_steps=4"]
    waits = load_config(base, [*words, *ppo])
    assert (waits.num_optimizer_steps("policy"), waits.num_optimizer_steps("value")) == (36, 60)
    never = load_config(base, [*words, *ppo, "algorithm.value_warmup_steps=11"])
    assert never.num_optimizer_steps("policy") == 0


def test_lengths_count_all_turns_and_their_answers(base: Path) -> None:
    turns = "rollout.turns={kind: a:B, max_turns: 3}"
    words = ["sampling.max_tokens=16", "data.train.max_tokens=100"]

    def rows(*more: str) -> list[int]:
        return [rows.longest for rows in rows_read(load_config(base, [*words, *more]))]

    assert rows() == [116]
    assert rows(turns) == [148]
    assert rows(turns, "rollout.turns.max_tokens=60") == [160]
    mixed = "data.mix=[{max_tokens: 50, turns: {kind: a:B, max_tokens: 90}}]"
    assert rows(mixed) == [140]
    config = load_config(base, [*words, mixed])
    assert step_sizes(config).row_tokens == 190, "a bound over all sources"
    assert (takes_turns(config), response_tokens(config)) == (True, 90)
    none = load_config(base, [*words, turns, "data.train.turns=null"])
    assert (takes_turns(none), response_tokens(none)) == (False, 16)
    held = "evaluation.sets.x={data: {}, sampling: {max_tokens: 20}}"
    assert rows(turns, held) == [148, 160]
    described = rows_read(load_config(base, [*words, turns]))[0].describe()
    assert "rollout.turns.max_turns=3 x sampling.max_tokens=16 make 148" in described


def test_turns_may_be_the_only_rewards(base: Path) -> None:
    turns = "rollout.turns={kind: a:B}"
    config = load_config(base, [turns, "rewards=[]", "algorithm.refill_attempts=2"])
    assert is_rewarded(config) and not config.rewards
    with pytest.raises(ValueError, match="compares the samples of a group"):
        load_config(base, [turns, "rewards=[]", "data.group_size=1"])


def test_a_trainer_of_ones_own_may_read_any_key(base: Path) -> None:
    words = ["algorithm.gamma=0.9", "trainer=my_module:MyTrainer"]
    assert load_config(base, words).algorithm.gamma == 0.9


def test_every_algorithm_key_is_read_by_some_flow() -> None:
    keys = [row.algorithm_keys for row in shipped_flows()]
    assert frozenset().union(*keys) == set(AlgorithmSection.model_fields)
