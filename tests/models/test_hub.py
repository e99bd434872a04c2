"""Names on the Hugging Face hub, resolved in a cache without a network."""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from spmdrl.commands.config_commands import load
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.hub import is_hub_name, local_directory
from spmdrl.models.files.weight_files import SINGLE
from tiny_model import make_tiny_model

NAME = "some-org/tiny.model"
HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that cannot be filled; the working directory is empty as well."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def put(cache: Path) -> Path:
    """Put a tiny model into the cache as huggingface_hub lays it out."""
    store = cache / f"models--{NAME.replace('/', '--')}"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(HASH)
    make_tiny_model(store / "snapshots" / HASH)
    return store / "snapshots" / HASH


def test_names_and_directories_are_told_apart(cache: Path) -> None:
    assert is_hub_name(NAME)
    for text in ("model", "/some/model", "./a/b", "a/b/c", "~/model", "../model", "a/.b", "a/b c"):
        assert not is_hub_name(text), text
        assert local_directory(text) == Path(text)
    Path("some-org").mkdir()
    assert not is_hub_name(NAME)  # a directory that lacks it, most likely a typing error


def test_a_model_in_the_cache_is_opened_offline(cache: Path) -> None:
    directory = put(cache)
    assert local_directory(NAME) == directory
    model, weights = open_model(NAME)
    assert model.num_layers == 2 and weights.names
    (directory / SINGLE).unlink()  # of an interrupted download
    with pytest.raises(ValueError, match=r"no complete model of that name is in the cache"):
        local_directory(NAME)


def test_a_missing_model_is_named_with_the_command_that_downloads_it(cache: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"{NAME} is no directory here, .*HF_HUB_OFFLINE.*`hf download {NAME}`"
    ) as caught:
        local_directory(NAME)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"`hf download {NAME}`"):
        local_directory(NAME, download=False)


def _download_once(cache: str, barrier: object, results: object) -> None:
    """Resolve with a hub whose download takes a while, and count the downloads."""
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, False
    lookup = huggingface_hub.snapshot_download
    downloads = 0

    def snapshot_download(name: str, *, local_files_only: bool = False, **rest: object) -> str:
        nonlocal downloads
        if not local_files_only:
            downloads += 1
            put(Path(cache))
        return str(lookup(name, local_files_only=True, **rest))  # type: ignore[arg-type]

    huggingface_hub.snapshot_download = snapshot_download  # type: ignore[assignment]
    barrier.wait()  # type: ignore[attr-defined]
    found = str(local_directory(NAME))
    results.put((found, downloads))  # type: ignore[attr-defined]


def test_processes_of_a_node_download_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    ranks = [
        context.Process(target=_download_once, args=(str(cache), barrier, results))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len({path for path, _ in found}) == 1
    assert sorted(downloads for _, downloads in found) == [0, 0, 1]


def test_a_download_that_fails_gives_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"downloading it failed \(.*`hf download {NAME}`") as e:
        local_directory(NAME)
    assert "\n" not in str(e.value)


def test_a_configuration_takes_the_directory(cache: Path) -> None:
    directory = put(cache)
    words = [f"model.path={NAME}", f"roles.reference.model={NAME}", "algorithm.kl_coef=0.1"]
    options = argparse.Namespace(name="train", config="quickstart", overrides=words, fold=False)
    config = load(options)
    assert config.model.path == str(directory)
    assert config.model_path("policy") == config.model_path("reference") == directory
    options.overrides = ["model.path=meta-llama/Llama-3.1-70B"]
    options.name = "check"
    assert load(options).model.path == "meta-llama/Llama-3.1-70B"  # its shapes are known
    options.name = "train"
    with pytest.raises(ValueError, match=r"hf download meta-llama/Llama-3\.1-70B"):
        load(options)
