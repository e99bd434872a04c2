"""Every field of PEFT's LoRA configuration, and every spelling of its tensors, has one outcome."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import VALUES
from peft import LoraConfig
from peft_dirs import make_peft, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdrl.models.adapters import LowRank
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.peft import open_adapter, read_adapter
from spmdrl.models.files.peft_config import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    OF_NO_EFFECT,
)
from spmdrl.models.tensors import Slice
from tiny_model import make_tiny_model

EFFECTS: dict[str, list[Any]] = {
    "r": [1, 40],
    "target_modules": [
        ["q_proj", "mlp.down_proj"],
        ["model.layers.1.self_attn.q_proj"],
        r".*\.1\.self_attn\.(k|o)_proj",
        "all-linear",
    ],
    "exclude_modules": [["0.self_attn.q_proj"], r".*layers\.0.*"],
    "lora_alpha": [1, 2.5],
    "lora_dropout": [0.25],
    "use_rslora": [True],
    "layers_to_transform": [1, [0]],
    "rank_pattern": [{"q_proj": 3, "^model.layers.1.self_attn.v_proj": 5}, {".*proj": 1}],
    "alpha_pattern": [{"layers.0.self_attn.(q|v)_proj": 3}],
    "init_lora_weights": [False, "gaussian", "orthogonal"],
}
"""Values with which PEFT and this project must describe the same matrices."""

REFUSED: dict[str, list[Any]] = {
    "peft_type": ["ADALORA", "LOHA", None],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only", None],
    "modules_to_save": [["embed_tokens"], ["lm_head", "score"]],
    "init_lora_weights": [
        *("pissa", "pissa_niter_16", "olora", "PiSSA", "corda", "loftq", "lora_ga", "mica"),
        *("other", 1, None),
    ],
    "layers_pattern": ["layers", ["h"]],
    "megatron_config": [{"hidden_size": 32}],
    "trainable_token_indices": [[1], {"embed_tokens": [2]}],
    "loftq_config": [{"loftq_bits": 4}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "random"}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 4}],
    "kasa_config": [{"beta": 0.1}],
    "alora_invocation_tokens": [[1, 2]],
    "use_qalora": [True],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "lora_bias": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "ensure_weight_tying": [True],
    # PEFT warns that these are ignored
    "eva_config": [{"rho": 3.0}],
    "exclude_modules": [["c_attn"], "h\\..*"],
    "rank_pattern": [{"proj": 3}, {"o_proj": 2}],
    "alpha_pattern": [{"model.layers.3.self_attn.q_proj": 1}],
    # of PEFT 0.1
    "enable_lora": [[True, False]],
    # of no PEFT
    "lora_gamma": [1, "x", [0]],
}

KEPT: dict[str, list[Any]] = {
    "task_type": ["TOKEN_CLS", "SEQ_CLS", None],
    "base_model_name_or_path": ["other/model", None],
    "revision": ["main"],
    "inference_mode": [False],
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}],
    "peft_version": ["0.99"],
    "megatron_core": ["other.core"],
    "qalora_group_size": [4],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "merge_weights": [True],
    # empty values say nothing
    "lora_gamma": [None, False, [], {}, ""],
    "target_parameters": [None, []],
    "layers_pattern": [None, [], ""],
    "exclude_modules": [None, [], ""],
    "rank_pattern": [None, {}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and PEFT's adapter of rank 4 of its q_proj and v_proj."""
    root = tmp_path_factory.mktemp("peft")
    make_tiny_model(root / "base")
    make_peft(root / "base", root / "adapter")
    return root / "base", root / "adapter"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> tuple[ModelConfig, Path]:
    shutil.copytree(made[1], tmp_path / "adapter")
    return read_config(made[0]), tmp_path / "adapter"


def put(directory: Path, **values: Any) -> None:
    file = directory / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, directory / ADAPTER_WEIGHTS)


def test_every_field_has_an_outcome() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= EFFECTS.keys() | REFUSED.keys() | KEPT.keys()
    assert OF_NO_EFFECT.keys() <= {*KEPT, "eva_config"}


CASES = [(field, value) for field, values in EFFECTS.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda x: str(x)[:40])
def test_a_field_has_pefts_effect(
    made: tuple[Path, Path], tmp_path: Path, field: str, value: Any
) -> None:
    base, _ = made
    make_peft(base, tmp_path / "a", **{field: value})
    found = read_adapter(tmp_path / "a", read_config(base))
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(theirs(base), tmp_path / "a")
    expected = {
        f"{name}.weight": LowRank(rank=module.r["default"], scale=module.scaling["default"])
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }
    assert found.targets == expected
    assert found.dropout == (value if field == "lora_dropout" else 0.0)
    # as written by hand: PEFT resolves patterns when it saves
    if field in ("target_modules", "exclude_modules", "layers_to_transform", "rank_pattern"):
        put(tmp_path / "a", **{field: value})
        assert read_adapter(tmp_path / "a", read_config(base)).targets == expected


def test_a_pattern_of_layers_names_their_list(made: tuple[Path, Path], tmp_path: Path) -> None:
    fields = {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}
    make_peft(made[0], tmp_path / "a", **fields)
    found = read_adapter(tmp_path / "a", read_config(made[0]))
    assert all(".layers.1." in name for name in found.targets)
    put(tmp_path / "a", layers_pattern=["h"])
    with pytest.raises(ValueError, match="target_modules selects no matrix"):
        read_adapter(tmp_path / "a", read_config(made[0]))


CASES = [(field, value) for field, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda x: str(x)[:40])
def test_a_field_is_refused_by_name(copy: tuple[ModelConfig, Path], field: str, value: Any) -> None:
    model, directory = copy
    put(directory, **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{field}"):
        read_adapter(directory, model)


CASES = [(field, value) for field, values in KEPT.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda x: str(x)[:40])
def test_a_field_changes_nothing(copy: tuple[ModelConfig, Path], field: str, value: Any) -> None:
    model, directory = copy
    before = read_adapter(directory, model)
    put(directory, **{field: value})
    assert read_adapter(directory, model) == before


def test_a_start_of_eva_is_plain(copy: tuple[ModelConfig, Path]) -> None:
    model, directory = copy
    before = read_adapter(directory, model)
    put(directory, init_lora_weights="eva", eva_config={"rho": 3.0})
    assert read_adapter(directory, model) == before


def test_another_base_is_noted_and_unused_targets_are_refused(
    copy: tuple[ModelConfig, Path],
) -> None:
    model, directory = copy
    notes: list[str] = []
    open_adapter(directory, model, base="/x/base", warn=notes.append)
    assert not notes, "the same last name"
    put(directory, base_model_name_or_path="o/m")
    open_adapter(directory, model, base="/x/base", warn=notes.append)
    assert len(notes) == 1
    assert "base_model_name_or_path is 'o/m', and the base here is /x/base" in notes[0]
    put(directory, target_modules=["q_proj", "v_proj", "c_attn"])
    with pytest.raises(ValueError, match="'c_attn', which names no module of this model: remove"):
        open_adapter(directory, model)
    put(directory, target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.w1"])
    with pytest.raises(ValueError, match=r"'mlp\.experts\.w1', which names no module"):
        open_adapter(directory, model)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors.update({change(name): tensor for name, tensor in old.items()})

    return apply


SPELLINGS: dict[str, Callable[[str], str]] = {
    "adapter": lambda name: name.replace(".weight", ".default.weight"),
    "named": lambda name: name.replace(".weight", ".mine.weight"),
    "compiled": lambda name: f"_orig_mod.{name}",
    "inner": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "fsdp": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "bare": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_of_names_is_read(copy: tuple[ModelConfig, Path], spelling: str) -> None:
    model, directory = copy
    part = Slice(
        name=f"{Q.removeprefix('base_model.model.')}.lora_B.weight",
        shape=(32, 4),
        start=(8, 0),
        stop=(16, 4),
        offset=0,
    )
    before = open_adapter(directory, model).read(part).clone()
    rewrite(directory, renamed(SPELLINGS[spelling]))
    assert torch.equal(open_adapter(directory, model).read(part), before)


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return apply


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (drop(f"{Q}.lora_A.weight"), r"no tensor 'model.layers.0.*lora_A.weight'"),
    "rank": (add(f"{Q}.lora_A.weight", 3, 32), r"\(3, 32\).*\(4, 32\): r and rank_pattern"),
    "base": (add(f"{Q}.lora_A.weight", 4, 48), r"\(4, 48\).*another model"),
    "flat": (add(f"{Q}.lora_A.weight", 128), r"\(128,\).*another model"),
    "empty": (add(f"{Q}.lora_B.weight", 0, 4), r"another model"),
    "deeper": (
        add(Q.replace(".0.", ".2.") + ".lora_A.weight", 4, 32),
        r"is of layer 2, and the model has 2 layers",
    ),
    "unselected": (
        add(Q.replace("q_proj", "o_proj") + ".lora_A.weight", 4, 32),
        r"does not select \(target_modules\)",
    ),
    "foreign": (
        add("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", 4, 32),
        r"adds to no matrix of LlamaForCausalLM",
    ),
    "expert": (
        add("base_model.model.model.layers.0.mlp.experts.lora_A.weight", 32, 32),
        r"is of experts that .* does not select \(target_parameters\)",
    ),
    "router": (
        add("base_model.model.model.layers.0.mlp.gate.lora_A.weight", 4, 32),
        r"is of a router",
    ),
    "embedding": (
        add("base_model.model.model.embed_tokens.weight", 264, 32),
        r"whole embedding",
    ),
    "embedding_lora": (
        add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 264),
        r"adapts an embedding",
    ),
    "dora": (add(f"{Q}.lora_magnitude_vector", 32), r"is of DoRA"),
    "bias": (add(f"{Q}.base_layer.bias", 32), r"trained bias"),
    "base_layer": (add(f"{Q}.base_layer.weight", 32, 32), r"is no A or B"),
    "head": (add("base_model.model.score.weight", 1, 32), r"add score to modules_to_save"),
    "original": (add("base_model.model.score.original_module.weight", 1, 32), r"is no A or B"),
    "twice": (add(f"{Q}.lora_A.default.weight", 4, 32), r"are both 'model\.layers\.0"),
    "several": (
        lambda tensors: renamed(
            lambda name: (
                name.replace(".weight", f".{'ab'[len(name) % 2]}.weight")
                if "q_proj.lora_A" in name
                else name.replace(".weight", ".b.weight" if "lora_B" in name else ".a.weight")
            )
        )(tensors),
        r"several adapters \(a, b\)",
    ),
    "ints": (
        lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 32).byte()}),
        r"lora_A.weight' has dtype U8",
    ),
    "none": (lambda tensors: tensors.clear(), r"has no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit_are_refused(copy: tuple[ModelConfig, Path], case: str) -> None:
    model, directory = copy
    change, message = BAD[case]
    rewrite(directory, change)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors.*{message}"):
        read_adapter(directory, model)


def test_embeddings_and_heads_are_no_targets(copy: tuple[ModelConfig, Path]) -> None:
    model, directory = copy
    for module in ("lm_head", "embed_tokens"):
        put(directory, target_modules=["q_proj", "v_proj", module])
        with pytest.raises(ValueError, match=rf"selects .*{module}.* tied here"):
            read_adapter(directory, model)


def test_a_damaged_value_is_named_when_it_is_read(copy: tuple[ModelConfig, Path]) -> None:
    model, directory = copy
    rewrite(directory, lambda t: t[f"{Q}.lora_A.weight"].__setitem__((2, 3), math.nan))
    source = open_adapter(directory, model)
    name = f"{Q.removeprefix('base_model.model.')}.lora_A.weight"
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight' has nan at \[2, 3\]"):
        source.read(Slice(name=name, shape=(4, 32), start=(0, 0), stop=(4, 32), offset=0))


def test_missing_files_say_what_to_give(copy: tuple[ModelConfig, Path], tmp_path: Path) -> None:
    model, directory = copy
    with pytest.raises(ValueError, match=rf"give the directory {directory}"):
        read_adapter(tmp_path, model)
    (directory / ADAPTER_WEIGHTS).rename(directory / ADAPTER_PICKLE)
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle.*save it again"):
        read_adapter(directory, model)
    (directory / ADAPTER_PICKLE).rename(directory / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"does not exist; it has adapter_model-00001"):
        read_adapter(directory, model)
    (directory / ADAPTER_CONFIG).unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json does not exist"):
        read_adapter(directory, model)
    with pytest.raises(ValueError, match=r"holds an adapter and no model: give its base"):
        (directory / ADAPTER_CONFIG).write_text("{}")
        read_config(directory)


def outcome(directory: Path, model: ModelConfig) -> str:
    """Open and read an adapter; return the message if it is refused."""
    try:
        source = open_adapter(directory, model)
        for name in source.names:
            shape = source.shape(name)
            source.read(
                Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
            )
    except ValueError as error:
        return str(error)
    return ""


def test_damaged_files_are_refused_without_a_traceback(copy: tuple[ModelConfig, Path]) -> None:
    model, directory = copy
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    text = json.dumps(config)
    refused = 0
    strange = {
        **VALUES,
        "pattern": "(",
        "flags": "a(?i)",
        "large": "a{99999999999}",
        "list1": ["("],
    }
    for key in config:
        for value in [*strange.values(), ...]:
            changed = {k: v for k, v in (config | {key: value}).items() if v is not ...}
            (directory / ADAPTER_CONFIG).write_text(json.dumps(changed))
            message = outcome(directory, model)
            assert not message or ADAPTER_CONFIG in message, (key, value, message)
            refused += bool(message)
    for key, value in (("rank_pattern", {"(": 2}), ("alpha_pattern", {"q_proj": "2"})):
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config | {key: value}))
        assert key in outcome(directory, model)
    for end in (0, 1, len(text) // 2, len(text) - 1):
        (directory / ADAPTER_CONFIG).write_text(text[:end])
        assert "is not valid JSON" in outcome(directory, model)
    assert refused > 100
    (directory / ADAPTER_CONFIG).write_text(text)
    file = directory / ADAPTER_WEIGHTS
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(4)
    for end in (0, 4, 8, header - 1, header, len(content) - 1):
        file.write_bytes(content[:end])
        assert ADAPTER_WEIGHTS in outcome(directory, model)
    for _ in range(200):
        place = generator.randrange(header)
        file.write_bytes(content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :])
        message = outcome(directory, model)
        assert not message or ADAPTER_WEIGHTS in message, message
