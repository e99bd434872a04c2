"""Damaged model files: each is read, or refused in one line that names the file; no traceback."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import VALUES, Mutant, of_directory, of_gguf
from test_gguf import write_gguf

from spmdrl.models.config import parse_config, read_config
from spmdrl.models.config_reading import resolved
from spmdrl.models.decoder import Decoder
from spmdrl.models.family import families
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.gguf import convert_gguf
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.tokenizers import check_tokenizer, load_tokenizer
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from tiny_model import load_into, make_tiny_model

EACH = 20
"""Of so many mutants the quick run takes one."""


def make_start(directory: Path) -> None:
    """A model in two files, with all files that a directory may have."""
    make_tiny_model(directory / "whole", tie_word_embeddings=False)
    config, weights = open_model(directory / "whole")
    tensors = [
        (n, weights.read(Slice(name=n, shape=s, start=(0,) * len(s), stop=s, offset=0)))
        for n, s in global_shapes(config).items()
    ]
    save_pretrained(
        tensors, config, directory / "start", directory / "whole", max_shard_bytes=75_000
    )


def use(directory: Path) -> None:
    """What a run does with a model's directory."""
    config, weights = open_model(directory)
    decoder = Decoder(config, device="cpu")
    load_into(decoder, weights)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, config)
    tokenizer.decode(tokenizer("ab")["input_ids"])
    assert all(torch.isfinite(p).all() for p in decoder.parameters())


def outcome(mutant: Mutant, directory: Path) -> str:
    """`read`, `refused`, or what is wrong with the message."""
    try:
        if any(file.endswith(".gguf") for file in mutant.files):
            convert_gguf(directory / mutant.files[0], directory / "out")
        else:
            use(directory)
    except (ValueError, OSError) as error:
        text = str(error)
        if "\n" in text or not any(file in text for file in mutant.files):
            return f"{mutant.name}: {type(error).__name__}: {text!r}"
        return "refused"
    # whatever else is raised would reach users as a traceback
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{mutant.name}: TRACEBACK {type(error).__name__}: {error}"
    return "read"


def sweep(start: Path, mutants: list[Mutant], scratch: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for mutant in mutants:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(start, scratch)
        mutant.change(scratch)
        result = outcome(mutant, scratch)
        print(f"{result}: {mutant.name}" if result == "read" else result)
        found[result] += 1
    print(f"{len(mutants)} mutants: {dict(found)}")
    return found


def check(found: Counter[str], mutants: list[Mutant]) -> None:
    wrong = [text for text in found if text not in ("read", "refused")]
    assert wrong == [], "\n".join(wrong[:50])
    assert found["refused"] > len(mutants) // 3


def gguf_start(directory: Path) -> Path:
    directory.mkdir()
    more = {"llama.rope.scaling.factor": 2.0, "tokenizer.ggml.add_bos_token": True}
    write_gguf(directory / "m.gguf", more=more)
    return directory


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_sample_of_damaged_files_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    run(tmp_path, kind, EACH)


@pytest.mark.parametrize("architecture", sorted(families()))
def test_every_key_of_every_family_is_read_or_refused_by_name(architecture: str) -> None:
    model_type = families()[architecture].model_type
    defaults = resolved({}, model_type, "config.json")
    source: dict[str, Any] = {
        **{key: value for key, value in defaults.items() if value is not None},
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": 2,
        **({"layer_types": ["full_attention"] * 2} if defaults.get("layer_types") else {}),
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 64,
    }
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 1.0}
    if model_type == "phi3":  # whose class takes no yarn
        rope = {"rope_type": "longrope", **{f"{n}_factor": [1.0] * 48 for n in ("short", "long")}}
    source["rope_scaling"] = rope
    parse_config(source)
    for value in VALUES.values():
        changed = [{**source, key: value} for key in (*source, "layer_types", "bos_token_id")]
        changed += [{**source, "rope_scaling": {**rope, key: value}} for key in (*rope, "truncate")]
        for one in changed:
            try:
                parse_config(one)
            except ValueError as error:
                assert "config.json" in str(error) and "\n" not in str(error)
        try:
            parse_config(source, generation={"eos_token_id": value})
        except ValueError as error:
            assert "generation_config.json: eos_token_id" in str(error)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_all_damaged_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    run(tmp_path, kind, 1)


def run(root: Path, kind: str, each: int) -> None:
    if kind == "gguf":
        start = gguf_start(root / "start")
        mutants = list(of_gguf(start / "m.gguf"))[::each]
    else:
        make_start(root)
        start = root / "start"
        assert read_config(start).eos_ids
        mutants = list(of_directory(start))[::each]
    check(sweep(start, mutants, root / "scratch"), mutants)
