"""Models by their names on the Hugging Face hub, in the cache of huggingface_hub."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

from spmdrl.models.fields import read_json

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_OTHERS = ("original/*", "metal/*", "onnx/*", "consolidated*")
"""Files of the same weights in other formats."""

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_hub_name(name: str | Path) -> bool:
    """Whether a text can only be a name on the hub, `org/name`.

    What exists here is a file or a directory, and so is what is within a directory that exists.
    """
    text = str(name)
    return _NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def local_directory(name: str | Path, *, download: bool = True) -> Path:
    """Return the directory of a model: itself, or its place in huggingface_hub's cache.

    The cache is asked first, without the network. A missing model is downloaded by one process of
    a node, while the others wait for its lock, unless HF_HUB_OFFLINE is set.

    Args:
        name: a directory, or `org/name`.
        download: whether to download at all.

    Raises:
        ValueError: a model of this name is neither in the cache nor can it be downloaded; the
            message has the command that downloads it.
    """
    if not is_hub_name(name):
        return Path(name)
    found = _cached(str(name))
    if found is not None:
        return found
    # importing it takes a third of a second, and most models are directories
    from huggingface_hub import constants, is_offline_mode

    where = f"{name} is no directory here, and no complete model of that name is in the cache"
    cache = Path(constants.HF_HUB_CACHE)
    fix = f"`hf download {name}`, with the same HF_HOME, on a machine with network access"
    if not download or is_offline_mode():
        reason = " (HF_HUB_OFFLINE is set)" if download else ""
        raise ValueError(f"{where} {cache}{reason}: download it with {fix}")
    cache.mkdir(parents=True, exist_ok=True)
    lock = cache / f".spmdrl-{str(name).replace('/', '--')}.lock"
    with lock.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        found = _cached(str(name))
        if found is None:
            _download(str(name), f"{where} {cache}, and downloading it failed", fix)
            found = _cached(str(name))
    if found is None:
        raise ValueError(f"{where} {cache}: it has no config.json or no weights that can be read")
    return found


def _cached(name: str) -> Path | None:
    """Return the directory of a complete model in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name, local_files_only=True, allow_patterns=[*_FILES], ignore_patterns=[*_OTHERS]
        )
    except LocalEntryNotFoundError:
        return None
    return Path(found) if _is_complete(Path(found)) else None


def _is_complete(directory: Path) -> bool:
    """Whether config.json and weights are present, with every file that their index names."""
    held = [directory / name for name in _WEIGHTS if (directory / name).is_file()]
    if not held or not (directory / "config.json").is_file():
        return False
    indices = [file for file in held[:1] if file.suffix == ".json"]
    named = {name for index in indices for name in read_json(index).get("weight_map", {}).values()}
    return all((directory / name).is_file() for name in named)


def _download(name: str, where: str, fix: str) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, allow_patterns=[*_FILES], ignore_patterns=[*_OTHERS])
    # its errors and those of its HTTP library have no common class
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where} ({type(error).__name__}: {first}): download it with {fix}"
        ) from (error)
