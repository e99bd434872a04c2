"""Roles as planned: their kinds and backends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flow_cases import write_config
from role_specs import specs_of
from spmdrl.commands.evaluate import check_policys_adapter, rollout_only, whose_responses
from spmdrl.config.load import load_config
from spmdrl.models.adapters import find_targets, make_adapter
from spmdrl.models.config import read_config
from spmdrl.models.files.adapter_sources import FreshAdapter
from spmdrl.models.files.merge import whole_slice
from spmdrl.models.files.peft_export import write_adapter
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembly.assembly import open_models, plan_models
from tiny_model import make_tiny_model


def test_an_unknown_kind_is_refused_and_the_nearest_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    model = read_config(tmp_path / "model")
    specs = specs_of(load_config(path), model)
    assert {name: spec.backend for name, spec in specs.items()} == {
        "policy": "torch",
        "rollout": "native",
    }
    config = load_config(path, ["roles.critic={kind: polcy}"])
    with pytest.raises(ValueError, match=r"roles\.critic\.kind=polcy: .*did you mean policy\?"):
        specs_of(config, model)


def test_the_responding_model_is_named_and_the_trained_one(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tmp_path / "start", tmp_path / "run")
    exported = tmp_path / "run" / "model"

    def said(*words: str) -> str:
        return whose_responses(rollout_only(load_config(path, words)))

    assert said() == f"the responses are those of {tmp_path / 'start'}"
    exported.mkdir(parents=True)
    assert said().endswith(
        f"{tmp_path / 'start'}; for those of the trained model set model.path={exported}"
    )
    assert said(f"model.path={exported}") == f"the responses are those of {exported}"
    own = said(f"roles.rollout.model={tmp_path / 'other'}")
    assert own.endswith(
        f"{tmp_path / 'other'}; for those of the trained model set roles.rollout.model={exported}"
    )
    (exported / "adapter_config.json").touch()
    assert said().endswith(f"set roles.policy.adapter.path={exported}")
    with_adapter = said(f"roles.policy.adapter.path={exported}")
    assert (
        with_adapter
        == f"the responses are those of {tmp_path / 'start'} with the adapter {exported}"
    )


def test_an_adapters_file_counts_and_keys_that_differ_from_it_are_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    written = make_adapter(find_targets(model, ["attention"]), rank=4, alpha=12, dropout=0.1)
    values = FreshAdapter(model, written, seed=1)
    tensors = ((name, torch.zeros(values.shape(name))) for name in values.names)
    adapter = tmp_path / "adapter"
    write_adapter(tensors, model, written, adapter, base=tmp_path / "model")

    def spec(**keys: object) -> RoleSpec:
        section = {"path": str(adapter), **keys}
        config = load_config(path, [f"roles.policy.adapter={json.dumps(section)}"])
        return specs_of(config, model)["policy"]

    assert spec().adapter == written
    agreeing = spec(rank=4, alpha=12, targets=["attention"], rslora=False)
    assert agreeing.adapter == written
    changed = spec(dropout=0.25).adapter
    assert changed is not None
    assert (changed.targets, changed.dropout) == (written.targets, 0.25)
    for key, value in {
        "rank": 16,
        "alpha": 32.0,
        "targets": ["q_proj"],
        "rslora": True,
        "init": "gaussian",
    }.items():
        with pytest.raises(ValueError, match=rf"roles\.policy\.adapter\.{key}=.*remove the key"):
            spec(**{key: value})
    with pytest.raises(ValueError, match=r"roles\.policy\.adapter\.path: .*adapter_config\.json"):
        spec(path=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"roles\.policy\.adapter\.targets: 'mpl' selects no"):
        spec(targets=["mpl"])
    words = [f"roles.policy.adapter={{path: {adapter}, rank: 16}}"]
    config = load_config(path, words)
    models = open_models(rollout_only(config))
    assert set(models) == {"rollout"}
    with pytest.raises(ValueError, match=r"roles\.policy\.adapter\.rank=16"):
        check_policys_adapter(config, models)
    none = tmp_path / "model"
    words = [f"roles.value={{adapter: {{path: {none}}}, head: file, trained: true}}"]
    with pytest.raises(ValueError, match=r"roles\.value\.adapter\.path: .*adapter_config\.json"):
        open_models(load_config(path, words))
    tiny = load_config(path, [f"roles.policy.adapter={{path: {adapter}}}", "model.tiny=true"])
    with pytest.raises(ValueError, match=r"roles\.policy\.adapter\.path=.*model\.tiny"):
        specs_of(tiny, model)


def test_experts_share_an_adapter_of_a_file_only_if_they_are_equal(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "Qwen3MoeForCausalLM")
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    targets = find_targets(model, ["experts"])
    world = SimpleNamespace(
        size=1, local_size=1, device_types=("cpu",), gpu_bytes=None, is_first=True
    )
    for form in ("shared", "each"):
        made = make_adapter(targets, rank=4, alpha=12, experts=form)
        fresh = FreshAdapter(model, made, seed=1)
        tensors = [(n, fresh.read(whole_slice(n, fresh.shape(n)))) for n in sorted(fresh.names)]
        write_adapter(tensors, model, made, tmp_path / form, base=tmp_path / "model")
        for experts in ("each", "shared"):
            section = {"path": str(tmp_path / form), "experts": experts}
            config = load_config(path, [f"roles.policy.adapter={json.dumps(section)}"])
            spec = specs_of(config, model)["policy"]
            assert spec.adapter == replace(made, shares_experts=experts == "shared")
            if form == "shared" or experts == "each":
                plan_models(config, world, open_models(config))
                continue
            unlike = (
                r"roles\.policy\.adapter\.path: .*\.experts\.1\.gate_proj\.lora_A\.weight differs"
            )
            with pytest.raises(ValueError, match=unlike):
                plan_models(config, world, open_models(config))
    config = load_config(path, ["roles.policy.adapter={experts: shared, targets: [attention]}"])
    with pytest.raises(ValueError, match=r"policy\.adapter\.experts=shared: no expert is adapted"):
        specs_of(config, model)


def test_an_adapter_of_another_model_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model(tmp_path / "model")
    made = make_adapter(find_targets(model, ["attention"]), rank=4, alpha=12)
    values = FreshAdapter(model, made, seed=1)
    tensors = [(name, torch.zeros(values.shape(name))) for name in values.names]
    told = []
    for base in ("other", "model"):
        make_tiny_model(tmp_path / base)
        write_adapter(tensors, model, made, tmp_path / "adapter", base=tmp_path / base)
        path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
        adapter = f"{{path: {tmp_path / 'adapter'}}}"
        words = [f"roles.policy.adapter={adapter}", f"roles.reference={{adapter: {adapter}}}"]
        config = load_config(path, [*words, "algorithm.kl_coef=0.1"])
        for rank in (0, 1):
            caplog.clear()
            world = SimpleNamespace(
                size=1, local_size=1, device_types=("cpu",), gpu_bytes=None, is_first=rank == 0
            )
            plan_models(config, world, open_models(config))
            told.append([r.message for r in caplog.records if "base_model_name" in r.message])
    assert [len(lines) for lines in told] == [1, 0, 0, 0]
    assert "the adapter is right only if they are the same model" in told[0][0]
