"""Identity of a run's data in its checkpoints, and warnings for a run resumed with other data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from spmdrl.checkpoint.load import resume_point
from spmdrl.config.data_sets import HELD_OUT, train_sources
from spmdrl.config.sections import Config
from spmdrl.data.chat import templates
from spmdrl.data.identity import (
    rows_digest,
    set_identity,
    text_digest,
    tokenizer_digest,
)
from spmdrl.data.order import stream_of
from spmdrl.distributed.reduce import broadcast_object, gather_objects
from spmdrl.run.inputs import AnySet, Inputs

log = logging.getLogger(__name__)


def first_start(config: Config, root: Path) -> datetime:
    """Time at which a resumed run was first started, by its first rank's clock; now for a new run.

    So a chat template writes the same date on every rank and after every resume. Every rank of the
    world calls it.

    Args:
        root: the directory of the checkpoints.
    """
    found = resume_point(root) if config.checkpoint.resume else None
    kept = None if found is None else found[1].get("data", {}).get("now")
    now: datetime = broadcast_object(datetime.now().replace(microsecond=0), 0)
    if kept is not None:
        now = datetime.fromisoformat(kept)
    log.info("chat templates that write the date are told %s, when the run first started", now)
    return now


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """Identity of the data that this start reads.

    Args:
        names: the training data's sources, as the configuration names them.
    """

    config: Config
    inputs: Inputs
    names: tuple[str, ...]

    @cached_property
    def sources(self) -> dict[str, AnySet]:
        """Training data by source, without the held-out items."""
        found, first = {}, 0
        for name, (count, _) in zip(self.names, self.inputs.shares, strict=True):
            found[name] = self.inputs.train[first : first + count]
            first += count
        return found

    @cached_property
    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps, equal on all ranks."""
        tokenizer = self.inputs.tokenizer
        return {
            "train": {
                name: {**asdict(set_identity(data)), "weight": weight}
                for (name, data), (_, weight) in zip(
                    self.sources.items(), self.inputs.shares, strict=True
                )
            },
            "held_out": {
                name: asdict(set_identity(data)) for name, data in self.inputs.held_out.items()
            },
            "prompts_per_step": self.config.data.prompts_per_step,
            "tokenizer": tokenizer_digest(tokenizer),
            "template": text_digest(templates(tokenizer)),
            "now": self.inputs.now.isoformat() if self.inputs.tell_time else None,
        }

    def check_ranks(self) -> None:
        """Raise ValueError on every rank if some rank has read other data than the first one."""
        states = gather_objects(self.state)
        for rank, state in enumerate(states):
            for key in ("tokenizer", "template", "train", "held_out"):
                if state[key] != states[0][key]:
                    raise ValueError(
                        f"rank {rank} has read another {key} than rank 0 ({state[key]} and "
                        f"{states[0][key]}): all ranks must see the same files"
                    )

    def differences(self, saved: Mapping[str, Any], steps_done: int) -> list[str]:
        """Sentences on what differs from a checkpoint's data, and on prompts that repeat for it."""
        now = self.state
        texts = [
            f"the {what} is another than the checkpoint's"
            for key, what in (("tokenizer", "tokenizer"), ("template", "chat template"))
            if saved[key] != now[key]
        ]
        is_encoded_alike = not texts and saved["now"] == now["now"]
        of_train = self._of_train(saved["train"], tokens=is_encoded_alike)
        texts += of_train
        order = [saved["prompts_per_step"], _shares(saved["train"]), list(saved["train"])]
        if of_train or order != [
            now["prompts_per_step"],
            _shares(now["train"]),
            list(now["train"]),
        ]:
            texts += self._repeats(saved, steps_done)
        for name in saved["held_out"].keys() & now["held_out"].keys():
            if saved["held_out"][name]["rows"] != now["held_out"][name]["rows"]:
                trained = ", some of which may have been trained on" if name == HELD_OUT else ""
                texts.append(
                    f"the held-out set {name!r} holds other rows than before{trained}: eval/{name} "
                    "does not continue where it was"
                )
        return texts

    def _of_train(self, saved: Mapping[str, Any], *, tokens: bool) -> list[str]:
        texts = []
        sections = dict(zip(self.names, train_sources(self.config), strict=True))
        for name in saved.keys() & self.state["train"].keys():
            before, after = saved[name], self.state["train"][name]
            where = f"{name} ({sections[name].source})"
            if before["rows"] == after["rows"]:
                if tokens and before["tokens"] != after["tokens"]:
                    texts.append(f"{where} has the same rows, which become other tokens")
            elif self._begins_with(name, before):
                texts.append(f"{where} had {before['count']} rows and has {after['count']}")
            else:
                texts.append(
                    f"{where} holds other rows: it had {before['count']} and has {after['count']}"
                )
        return texts

    def _begins_with(self, name: str, before: Mapping[str, Any]) -> bool:
        marks = self.sources[name].marks()[: before["count"]]
        return len(marks) == before["count"] and bool(rows_digest(marks) == before["rows"])

    def _repeats(self, saved: Mapping[str, Any], steps_done: int) -> list[str]:
        """Sentence on how many of the coming prompts were drawn before, if that can be known."""
        if steps_done == 0:
            return []
        train = saved["train"]
        why = "what a step draws depends on the rows, their number and data.prompts_per_step"
        if not all(n in self.sources and self._begins_with(n, train[n]) for n in train):
            return [f"{why}: which prompts of earlier steps come again is not known"]
        seed = self.config.seed
        places = _places(train, self.state["train"])
        old = stream_of(seed, _shares(train), saved["prompts_per_step"])
        new = stream_of(seed, _shares(self.state["train"]), self.state["prompts_per_step"])
        drawn = {places[i] for i in old.passed(steps_done)}
        coming = set(new.following(steps_done))
        never = len(self.inputs.train) - len(drawn | coming)
        usual = len(self.inputs.train) - len({*new.passed(steps_done), *coming})
        again = f"{len(drawn & coming)} of the {len(coming)} prompts left in this pass come again"
        if never > usual:
            again += f", {never - usual} are passed over"
        return [f"{why}: {again}"] if drawn & coming or never > usual else []


def data_identity(config: Config, inputs: Inputs) -> DataIdentity:
    """Identify a run's data. Every rank of the world calls it.

    Raises:
        ValueError: ranks have read different data (raised on every rank).
    """
    names = ("data.train", *(f"data.mix.{i}" for i in range(len(config.data.mix))))
    identity = DataIdentity(config=config, inputs=inputs, names=names)
    identity.check_ranks()
    return identity


def _shares(train: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(source["count"], source["weight"]) for source in train.values()]


def _places(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[int]:
    """New index of each old item, given that every source still begins with its old items."""
    firsts, first = {}, 0
    for name, source in after.items():
        firsts[name] = first
        first += source["count"]
    return [firsts[name] + i for name, source in before.items() for i in range(source["count"])]
