"""Log-probabilities of whole responses by the reference: asked in every step, or cached.

A loss on pairs needs one number of the reference per row, so those of a whole data set fit into a
small file. With `preference.reference: cache` they are computed before the first step, for the rows
that the run will draw and the held-out ones; without `roles.reference` the policy computes them,
which at that time still is the reference.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from spmdrl.atomic_files import replace_file
from spmdrl.batch import Batch
from spmdrl.config.sections import Config
from spmdrl.data.order import DataSet, home_rows
from spmdrl.distributed.reduce import broadcast_object, gather_objects, world_any
from spmdrl.flows.preference_terms import REFERENCE
from spmdrl.roles.handles import Policy, Reference
from spmdrl.run.run import Run

log = logging.getLogger(__name__)

CACHE_FILE = "reference.safetensors"
REFERENCE_ROLE = "reference"
KEY_BYTES = 16
CHUNK = 4096
"""Items per call; a held-out set that fits is computed whole, packed as in evaluations."""

Sums = dict[bytes, float]
"""Digest of a row -> log-probability of its response."""


class ReferenceSums(Protocol):
    """Adds the row column `ref_sums`, float64 [B], to home rows. Every rank calls it."""

    def add(self, batch: Batch) -> Batch: ...


class AskedSums:
    """Asks `roles.reference` at each call, at the given temperature."""

    def __init__(self, reference: Reference, temperature: float = 1.0) -> None:
        self._reference, self._temperature = reference, temperature

    def add(self, batch: Batch) -> Batch:
        logprobs = self._reference.logprobs(batch, self._temperature)["ref_logprobs"]
        return batch.with_columns(rows={REFERENCE: batch.row_sum(logprobs.double())})


class CachedSums:
    """Computes the sums of some data sets at the start, and keeps them in a file in `run_dir`.

    Args:
        sets: data sets, each with the indices of the items that will be asked for.

    Raises:
        ValueError: the file comes from another reference; or it lacks rows, and the policy, which
            was the reference, has been trained since.
        OSError: the file could not be written (raised on every rank).
    """

    def __init__(self, run: Run, sets: Sequence[tuple[DataSet, Sequence[int]]]) -> None:
        self._run, self._path = run, run.directory / CACHE_FILE
        self._made_by = reference_identity(run.config)
        self._sums = self._read()
        known = frozenset(self._sums)
        for data, items in sets:
            for at in range(0, len(items), CHUNK):
                self._learn(home_rows(run.world, data, items[at : at + CHUNK]))
        self._share(known)

    def add(self, batch: Batch) -> Batch:
        sums = [self._sums[key] for key in row_keys(batch)]
        return batch.with_columns(rows={REFERENCE: torch.tensor(sums, dtype=torch.float64)})

    def _learn(self, batch: Batch) -> None:
        keys = row_keys(batch)
        first, _ = distinct_rows(batch)
        missing = [i for i in first if keys[i] not in self._sums]
        if not world_any(bool(missing)):
            return
        rows = batch.select(missing)
        if REFERENCE_ROLE in self._run.config.roles:
            column = self._run.role(REFERENCE_ROLE, Reference).logprobs(rows)["ref_logprobs"]
        elif self._run.steps_done > 0:
            raise ValueError(
                f"{self._path} lacks rows of the data, and the policy, which was the reference, "
                f"has made {self._run.steps_done} steps since: bring the file back, or add "
                "roles.reference with the model that the run began with"
            )
        else:
            column = self._run.role("policy", Policy).logprobs(rows)["logprobs"]
        found = rows.row_sum(column.double()).tolist()
        self._sums |= zip((keys[i] for i in missing), found, strict=True)

    def _share(self, known: Collection[bytes]) -> None:
        """Give every rank what the others computed; the first rank writes all of it."""
        own = {key: value for key, value in self._sums.items() if key not in known}
        if world_any(bool(own)):
            for part in gather_objects(own):
                self._sums |= part
        computed = len(self._sums) - len(known)
        log.info("reference: %d rows computed, %d read from %s", computed, len(known), self._path)
        if not computed:
            return
        failure = None
        if self._run.world.is_first:
            try:
                replace_file(self._path, encode(self._sums, self._made_by))
            except OSError as error:
                failure = str(error)
        if (failure := broadcast_object(failure, 0)) is not None:
            raise OSError(failure)

    def _read(self) -> Sums:
        found: Sums | str = {}
        if self._run.world.is_first and self._path.is_file():
            found = self._decoded()
        found = broadcast_object(found, 0)
        if isinstance(found, str):
            raise ValueError(
                f"{self._path} {found}, and the reference is {self._made_by}: remove the file, or "
                "use another run_dir"
            )
        return found

    def _decoded(self) -> Sums | str:
        """Content of the file, or what is wrong with it as part of a sentence."""
        try:
            return decode(self._path.read_bytes(), self._made_by)
        # a cut or foreign file: whatever JSON and safetensors raise is reported with its name
        except Exception as error:
            return f"cannot be read ({type(error).__name__}: {error})"


def row_keys(batch: Batch) -> list[bytes]:
    """Digests of the rows' prompts and responses."""
    parts = torch.split(batch["tokens"], batch.lengths.tolist())
    keys = []
    for tokens, start in zip(parts, batch["prompt_lengths"].tolist(), strict=True):
        digest = hashlib.blake2b(digest_size=KEY_BYTES, key=str(start).encode())
        digest.update(tokens.numpy().tobytes())
        keys.append(digest.digest())
    return keys


def distinct_rows(batch: Batch) -> tuple[list[int], Tensor]:
    """Find the first of equal rows (responses that several pairs share), and each row's place among
    those: int64 `[B]`. Each is then computed once, and packed alike by policy and reference.
    """
    number: dict[bytes, int] = {}
    first: list[int] = []
    place = []
    for i, key in enumerate(row_keys(batch)):
        if key not in number:
            number[key] = len(first)
            first.append(i)
        place.append(number[key])
    return first, torch.tensor(place, dtype=torch.int64)


def reference_identity(config: Config) -> str:
    """Directory of the reference, with a digest of its files' names, sizes and first megabytes."""
    named = REFERENCE_ROLE in config.roles
    directory = config.model_path(REFERENCE_ROLE) if named else Path(config.model.path)
    digest = hashlib.blake2b(f"{config.model.tiny} {config.model.dtype}".encode(), digest_size=8)
    for file in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
    return f"{directory.resolve()} ({digest.hexdigest()})"


def encode(sums: Sums, made_by: str) -> bytes:
    """Encode sums as a safetensors file: keys uint8 [n, 16], sums float64 [n]."""
    keys = torch.frombuffer(bytearray(b"".join(sums)), dtype=torch.uint8)
    tensors = {
        "keys": keys.view(len(sums), KEY_BYTES),
        "sums": torch.tensor(list(sums.values()), dtype=torch.float64),
    }
    content: bytes = save(tensors, metadata={"reference": made_by})
    return content


def decode(content: bytes, made_by: str) -> Sums | str:
    """Sums that `encode` was given; for another reference, what is wrong, in words."""
    size = int.from_bytes(content[:8], "little")
    found = str(json.loads(content[8 : 8 + size])["__metadata__"]["reference"])
    if found != made_by:
        return f"holds log-probabilities of {found}"
    tensors = load(content)
    keys = tensors["keys"].numpy().tobytes()
    count = len(tensors["sums"])
    split = [keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(count)]
    return dict(zip(split, tensors["sums"].tolist(), strict=True))
