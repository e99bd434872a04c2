"""`pytorch_model.bin`: refused with the command that converts it, and what that command does."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spmdrl.commands.cli import main
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.pickles import convert_pickles
from spmdrl.models.files.weight_files import SINGLE
from tiny_model import make_tiny_model

PICKLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def unsafe(directory: Path, *, tied: bool = True) -> dict[str, Tensor]:
    """Make a directory whose weights are in one pickle; return them."""
    make_tiny_model(directory, tie_word_embeddings=tied)
    weights = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    if tied:
        weights[HEAD] = weights[EMBEDDING]
    torch.save(weights, directory / PICKLE)
    return weights


def test_a_pickle_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = unsafe(tmp_path / "m")
    out = f"{tmp_path}/m-safetensors"
    with pytest.raises(ValueError, match=rf"`spmdrl convert {tmp_path}/m m-safetensors`") as caught:
        open_model(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert main(["convert", f"{tmp_path}/m", out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    found = load_file(Path(out) / SINGLE)
    del weights[HEAD]  # the embedding's storage
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert {f.name for f in Path(out).iterdir()} == {
        *(f.name for f in (tmp_path / "m").iterdir() if f.name != PICKLE),
        SINGLE,
    }
    open_model(out)
    with pytest.raises(ValueError, match="is read for the conversion"):
        convert_pickles(tmp_path / "m", tmp_path / "m")
    # where both kinds of files are present, the safe one is read, as transformers reads it
    shutil.copyfile(Path(out) / SINGLE, tmp_path / "m" / SINGLE)
    open_model(tmp_path / "m")
    assert main(["convert", f"{tmp_path}/m", out]) == 2


def test_shards_of_pickles_are_converted_as_their_index_says(tmp_path: Path) -> None:
    weights = unsafe(tmp_path / "m", tied=False)
    (tmp_path / "m" / PICKLE).unlink()
    # views of one storage that are no whole tensors of it
    both = torch.stack((weights[EMBEDDING], weights[HEAD]))
    first = {EMBEDDING: both[0], HEAD: both[1]}
    second = {name: t.t().contiguous().t() for name, t in weights.items() if name not in first}
    files = {"a.bin": first, "b.bin": second}
    for file, held in files.items():
        torch.save(held, tmp_path / "m" / file)
    names = {name: file for file, held in files.items() for name in held}

    def index(changes: dict[str, str]) -> None:
        text = json.dumps({"metadata": {}, "weight_map": {**names, **changes}})
        (tmp_path / "m" / INDEX).write_text(text)

    index({})
    with pytest.raises(ValueError, match=r"index.json is a pickle, which is not read"):
        open_model(tmp_path / "m")
    convert_pickles(tmp_path / "m", tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    index({HEAD: "c.bin"})
    with pytest.raises(ValueError, match=rf"c.bin is missing, .* says that it holds '{HEAD}'"):
        convert_pickles(tmp_path / "m", tmp_path / "other")
    index({HEAD: "b.bin"})
    with pytest.raises(ValueError, match=rf"a.bin holds, and the index does not name, .*'{HEAD}'"):
        convert_pickles(tmp_path / "m", tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit",))


def test_pickles_of_other_things_than_tensors_are_refused(tmp_path: Path) -> None:
    unsafe(tmp_path / "m")
    file = tmp_path / "m" / PICKLE

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            convert_pickles(tmp_path / "m", tmp_path / "out")
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)

    torch.save({"x": Runs()}, file)
    refused(r"pytorch_model.bin is no readable pickle of tensors alone: it asks for exec")
    file.write_bytes(pickle.dumps(Runs(), protocol=2))
    refused("no readable pickle of tensors alone")
    file.write_bytes(b"")
    refused("no readable pickle of tensors alone")
    torch.save({"model": {"x": torch.ones(1)}}, file)
    refused(r"holds 'model', which is no tensor")
    torch.save([torch.ones(1)], file)
    refused(r"holds list, not tensors by name")
    torch.save({"x": torch.ones(1, dtype=torch.complex64)}, file)
    refused(r"tensor 'x' \(torch.complex64\) fits no safetensors file")
    torch.save({"x": torch.ones(2, 2)}, file, _use_new_zipfile_serialization=False)
    convert_pickles(tmp_path / "m", tmp_path / "out")  # the format of old files is read as well
    assert load_file(tmp_path / "out" / SINGLE).keys() == {"x"}
