"""Values of configurations that are kept: as `transformers` has them, without importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spmdrl.models import config_cache
from spmdrl.models.config_cache import kept
from spmdrl.models.config_reading import resolved

SOURCE = {"architectures": ["LlamaForCausalLM"], "vocab_size": 77, "hidden_size": 64}
SOURCE |= {"num_attention_heads": 4, "num_hidden_layers": 3, "model_type": "llama"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spmdrl" / "configs"


@pytest.mark.usefixtures("cache")
def test_the_second_reading_imports_nothing_and_finds_the_same(cache: Path) -> None:
    first = resolved(SOURCE, "llama", "config.json")
    assert first["head_dim"] == 16 and len(list(cache.iterdir())) == 1
    assert resolved(SOURCE, "llama", "config.json") == first
    code = (
        "import sys; from spmdrl.models.config import parse_config; "
        f"model = parse_config({SOURCE}); assert model.attention.head_dim == 16; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    other = resolved({**SOURCE, "head_dim": 32}, "llama", "config.json")
    assert other["head_dim"] == 32 and len(list(cache.iterdir())) == 2


def test_what_is_refused_and_what_is_no_plain_value_is_not_kept(cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mine\.json"):
            resolved({**SOURCE, "hidden_size": "wide"}, "llama", "mine.json")
    calls: list[int] = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"a": object()}

    for _ in range(2):
        kept("llama", SOURCE, make)
    assert len(calls) == 2 and not list(cache.iterdir())


def test_without_a_cache_everything_is_read_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.write_text("no directory")
    assert kept("llama", SOURCE, lambda: {"a": 1}) == {"a": 1}
    cache.unlink()
    monkeypatch.setattr(config_cache, "version", lambda name: "6.0.dev0")
    config_cache._reader.cache_clear()
    assert kept("llama", SOURCE, lambda: {"a": 1}) == {"a": 1}
    config_cache._reader.cache_clear()
    assert not cache.exists()
