"""Reading and writing Hugging Face directories."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import ModelConfig, parse_config, read_config, tiny
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import (
    RandomCheckpoint,
    fill,
    open_checkpoint,
    open_model,
)
from spmdrl.models.files.inspection import inspect
from spmdrl.models.files.tokenizers import check_tokenizer, load_tokenizer
from spmdrl.models.files.weight_files import INDEX, SINGLE
from spmdrl.models.sharding import all_slices, global_shapes
from spmdrl.models.tensors import Slice, restrict
from tiny_model import load_into

SOURCE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
}


def config_of(**changes: Any) -> ModelConfig:
    return parse_config({**SOURCE, **changes})


def tensors_of(model: ModelConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    source = RandomCheckpoint(model, seed)
    for name, shape in global_shapes(model).items():
        yield name, source.read(whole(name, shape))


def whole(name: str, shape: tuple[int, ...]) -> Slice:
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000])
def test_transformers_loads_what_is_saved(tmp_path: Path, tied: bool, max_shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(tie_word_embeddings=tied)
    out = tmp_path / "model"
    save_pretrained(tensors_of(config), config, out, None, max_shard_bytes=max_shard_bytes)
    assert (out / INDEX).exists() == (max_shard_bytes < 1 << 30)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 3}
    model = AutoModelForCausalLM.from_pretrained(out)
    state = model.state_dict()
    for name, tensor in tensors_of(config):
        assert torch.equal(state[name], tensor), name
    read, checkpoint = open_model(out)
    assert read == config
    for name, tensor in tensors_of(config):
        assert torch.equal(checkpoint.read(whole(name, tuple(tensor.shape))), tensor)


def test_sharded_loads_hold_the_same_values(tmp_path: Path) -> None:
    """Each tp rank's decoder, and the rows of FSDP-like shards, against slices of the whole."""
    config = config_of()
    save_pretrained(tensors_of(config), config, tmp_path / "m", None, max_shard_bytes=9_000)
    checkpoint = open_checkpoint(tmp_path / "m")
    one = Decoder(config, device="cpu")
    load_into(one, checkpoint)
    parameters = dict(one.named_parameters())
    for rank in range(2):
        two = Decoder(config, tp=Parallel(rank=rank, size=2), device="cpu")
        load_into(two, checkpoint)
        down = parameters["layers.1.mlp.down.weight"]
        assert torch.equal(two.layers[1].mlp.down.weight, down.chunk(2, dim=1)[rank])
        assert torch.equal(two.head_weight(), one.head_weight().chunk(2)[rank])
    for name, held in all_slices(config, 0, 1).items():
        rows = parameters[name].shape[0]
        shard = torch.empty(rows - rows // 3, *parameters[name].shape[1:], dtype=torch.bfloat16)
        fill([(shard, restrict(held, rows // 3, rows))], checkpoint)
        assert torch.equal(shard, parameters[name][rows // 3 :].bfloat16()), name


def test_boxes_of_three_dims_fill_rows_of_two(tmp_path: Path) -> None:
    stack, conv = torch.randn(3, 4, 5), torch.randn(6, 1, 3)
    save_file({"stack": stack, "conv": conv}, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    held = tuple(
        Slice(
            name="stack",
            shape=(3, 4, 5),
            start=(expert, 1, 2),
            stop=(expert + 1, 3, 5),
            offset=2 * place,
        )
        for place, expert in enumerate((2, 0))
    )
    rows, channels = torch.zeros(5, 3), torch.zeros(4, 3)
    fill([(rows, held)], checkpoint)
    assert torch.equal(rows[:4], torch.cat((stack[2, 1:3, 2:], stack[0, 1:3, 2:])))
    assert not rows[4].any()
    fill([(channels, (replace(whole("conv", (6, 1, 3)), start=(2, 0, 0)),))], checkpoint)
    assert torch.equal(channels, conv[2:, 0])


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    config = tiny(config_of())
    one, two = dict(tensors_of(config, 1)), dict(tensors_of(config, 2))
    again = dict(tensors_of(config, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], two[name])
    assert not torch.equal(one[name], one[name.replace("up", "gate")])
    assert (one["model.norm.weight"] == 1).all()
    rows = replace(whole(name, tuple(one[name].shape)), start=(5, 0))
    assert torch.equal(RandomCheckpoint(config, 1).read(rows), one[name][5:])


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    config = config_of()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
    save_pretrained(tensors_of(config), config, tmp_path / "m", None, max_shard_bytes=20_000)
    first = min((tmp_path / "m").glob("model-*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{first.name} is no readable safetensors"):
        open_checkpoint(tmp_path / "m")
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing, .*model.embed_tokens.weight"):
        open_checkpoint(tmp_path / "m")
    del_name = "model.layers.1.mlp.up_proj.weight"
    some = {name: t for name, t in tensors_of(config) if name != del_name}
    save_file(some, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=f"has no tensor '{del_name}'"):
        inspect(config, open_checkpoint(tmp_path), "lm").refuse(tmp_path)
    with pytest.raises(ValueError, match=r"tie_word_embeddings: true"):
        del some["lm_head.weight"]
        save_file({**some, del_name: torch.zeros(48, 32)}, tmp_path / SINGLE)
        inspect(config, open_checkpoint(tmp_path), "lm").refuse(tmp_path)


def test_shapes_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    config = config_of()
    save_pretrained(tensors_of(config), config, tmp_path / "m", None)
    decoder = Decoder(config_of(intermediate_size=64), device="cpu")
    with pytest.raises(ValueError, match=r"gate_proj.weight' has shape \(48, 32\).*\(64, 32\)"):
        load_into(decoder, open_checkpoint(tmp_path / "m"))


def test_wrong_tensors_are_not_saved(tmp_path: Path) -> None:
    config = config_of()
    out = tmp_path / "m"
    given = dict(tensors_of(config))
    missing = {name: t for name, t in given.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' was not given"):
        save_pretrained(missing.items(), config, out, None)
    with pytest.raises(ValueError, match="'extra' is no tensor of this model"):
        save_pretrained([*given.items(), ("extra", torch.ones(1))], config, out, None)
    with pytest.raises(ValueError, match=r"has shape \(5,\), the model's is \(32,\)"):
        save_pretrained({**given, "model.norm.weight": torch.ones(5)}.items(), config, out, None)
    assert list(tmp_path.iterdir()) == []


def test_a_save_replaces_an_older_directory(tmp_path: Path) -> None:
    config = config_of()
    out = tmp_path / "m"
    for seed in (1, 2):
        (out / "stale").mkdir(parents=True, exist_ok=True)
        save_pretrained(tensors_of(config, seed), config, out, None)
        saved = load_file(out / SINGLE)
        assert all(torch.equal(saved[name], t) for name, t in tensors_of(config, seed))
        assert not (out / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def _save_with_a_file_limit(out: str, limit_bytes: int) -> None:
    """Writes beyond the limit fail as on a full disk (EFBIG instead of ENOSPC)."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    config = config_of()
    try:
        save_pretrained(tensors_of(config, 2), config, out, None)
    except OSError as error:
        os._exit(3 if "untouched" in str(error) else 4)
    os._exit(0)


def test_a_failed_write_leaves_the_older_directory_as_it_was(tmp_path: Path) -> None:
    import multiprocessing as mp

    config = config_of()
    out = tmp_path / "m"
    save_pretrained(tensors_of(config, 1), config, out, None)
    context = mp.get_context("spawn")
    process = context.Process(target=_save_with_a_file_limit, args=(str(out), 50_000))
    process.start()
    process.join()
    assert process.exitcode == 3
    saved = load_file(out / SINGLE)
    assert all(torch.equal(saved[name], t) for name, t in tensors_of(config, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_tokenizer_and_embedding_must_fit(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=r"no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(65)}, unk_token="w0")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"})
    )
    tokenizer = load_tokenizer(tmp_path)
    check_tokenizer(tokenizer, config_of(vocab_size=65))
    with pytest.raises(ValueError, match="65 token ids, but the model's embedding has 64 rows"):
        check_tokenizer(tokenizer, config_of())


def test_tokenizer_files_travel_with_a_saved_model(tmp_path: Path) -> None:
    config = config_of()
    start = tmp_path / "start"
    start.mkdir()
    (start / "tokenizer.json").write_text("{}")
    (start / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    save_pretrained(tensors_of(config), config, tmp_path / "m", start)
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "m").eos_ids == (3, 4)
