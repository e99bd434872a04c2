"""The token at which a reward model's score is read: by its class, or by roles.NAME.readout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hub_heads import linear_head, make_hub_model
from role_specs import specs_of
from spmdrl.config.load import parse_config
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.hf import open_model
from spmdrl.planning.layouts import check_model
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembly.role_weights import readout_lines

SET = {
    "steps": 1,
    "run_dir": "run",
    "data": {"train": {"source": "rows.jsonl"}, "prompts_per_step": 2, "group_size": 1},
}
CLASS = ["LlamaForSequenceClassification"]


def config(**reward: object) -> Config:
    return parse_config(
        {
            "flow": "ppo",
            "model": {"path": "m"},
            "rewards": [{"role": "reward"}],
            "roles": {"policy": {}, "reference": {}, "value": {}, "rollout": {}, "reward": reward},
            **SET,
        },
        "a test",
    )


def spec_of(model: ModelConfig, **reward: object) -> RoleSpec:
    return specs_of(config(**reward), model)["reward"]


def test_the_class_decides_and_the_key_overrides(tmp_path):
    made = make_hub_model(tmp_path / "m", linear_head("score"), CLASS, pad_token_id=1)
    model = read_config(made)
    assert spec_of(model).skipped == 1
    assert spec_of(model, readout="last").skipped is None
    [line] = readout_lines([spec_of(model)])
    assert "the last token that is not pad_token_id 1, as LlamaForSequenceClassification" in line
    assert "the token before the end is read; roles.reward.readout=last reads the end" in line
    [line] = readout_lines([spec_of(model, readout="last")])
    assert line.endswith("read at the last token (roles.reward.readout=last)")
    assert specs_of(config(), model)["value"].skipped is None

    other = read_config(
        make_hub_model(
            tmp_path / "o", linear_head("v_head"), ["LlamaForRewardModel"], pad_token_id=1
        )
    )
    assert spec_of(other).skipped is None
    assert spec_of(other, readout="before_padding").skipped == 1
    none = replace(other, pad_id=None)
    with pytest.raises(ValueError, match=r"roles.reward.readout=before_padding.*no pad_token_id"):
        check_model(spec_of(none, readout="before_padding"), {}, replays_routing=False)


def test_what_cannot_hold_a_bias_is_refused_by_name(tmp_path):
    made = make_hub_model(tmp_path / "m", linear_head("v_head.summary", bias=True))
    model, _ = open_model(made, head="score")
    check_model(spec_of(model), {}, replays_routing=False)
    with pytest.raises(
        ValueError, match=r"roles.reward.base=policy.*bias.*roles.reward.head=normal"
    ):
        check_model(spec_of(model, base="policy", trained=False), {}, replays_routing=False)
    adapted = spec_of(model, adapter={"rank": 2}, trained=True)
    with pytest.raises(ValueError, match=r"roles.reward.adapter.*bias"):
        check_model(adapted, {}, replays_routing=False)
