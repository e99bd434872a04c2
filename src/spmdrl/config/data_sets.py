"""Complete data sets of a configuration: `data.mix` and `evaluation.sets` with inherited keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from spmdrl.config.algorithms import Section
from spmdrl.config.data import DataKind, PassAt, Place, PromptsSection
from spmdrl.config.faults import ConfigError, Fault
from spmdrl.config.sections import (
    Config,
    RewardSection,
    SamplingSection,
)

ROWS = ("task", "size", "split", "seed", "share", "unique", "keep_shortest")
"""Keys of `data.train` that choose rows: a set with its own source does not inherit them."""

HELD_OUT = "held_out"
"""Name of the set that `evaluation.held_out` takes out of data.train."""

START = "start"
"""Value of `against` for the run's own responses before its first step."""


class WeightedSource(PromptsSection):
    weight: float = Field(
        1.0,
        gt=0,
        description="Draw this share of a step, relative to the other sources' weights, above 0.",
    )


class HeldOutSet(Section):
    """A held-out set with all its settings.

    Args:
        data: its source; None: questions kept out of data.train.
        kind: kind of its rows; None: that of the flow's data.
    """

    data: PromptsSection | None = None
    kind: DataKind | None = None
    rewards: tuple[RewardSection, ...] = ()
    threshold: float = 1.0
    num_samples: int = Field(1, ge=1)
    k: PassAt = (1,)
    sampling: SamplingSection = SamplingSection()
    against: Place | None = None
    max_items: int | None = Field(None, ge=1)


def train_sources(config: Config) -> list[WeightedSource]:
    """Sources of training data: `data.train`, then those of `data.mix`."""
    mixed = [mixed_source(config, entry) for entry in config.data.mix]
    return [WeightedSource.model_validate(config.data.train.model_dump()), *mixed]


def uses_chat(config: Config) -> bool:
    """Whether any data go through the chat template."""
    own = [described.data for described in held_out_sets(config).values()]
    return any(section.chat for section in (*train_sources(config), *own) if section is not None)


@dataclass(frozen=True, kw_only=True)
class RowsRead:
    """Rows that a run reads.

    Args:
        data_key, data_tokens: key of the section that describes them, and its max_tokens.
        sampling_key, sampling: settings for responses to them; None: the rows hold their own.
    """

    data_key: str
    data_tokens: int
    sampling_key: str = ""
    sampling: SamplingSection | None = None

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return self.data_tokens + (0 if self.sampling is None else self.sampling.max_tokens)

    def describe(self) -> str:
        """Derivation of `longest`, as part of a sentence."""
        data = f"{self.data_key}.max_tokens={self.data_tokens}"
        if self.sampling is None:
            return f"{data} allows rows of {self.longest} tokens"
        responses = f"{self.sampling_key}.max_tokens={self.sampling.max_tokens}"
        return f"{data} and {responses} make {self.longest} tokens"


def rows_read(config: Config) -> list[RowsRead]:
    """List the rows of training, then those of each held-out set; responses to held-out prompts
    are counted only if there is a rollout to sample them.
    """
    kind, samples = config.data_kind(), "rollout" in map(config.role_kind, config.roles)
    sources = train_sources(config)
    longest = max(range(len(sources)), key=lambda i: sources[i].max_tokens)
    key = "data.train" if longest == 0 else f"data.mix.{longest - 1}"
    found = [
        _rows(key, sources[longest], "sampling", config.sampling if kind == "prompts" else None)
    ]
    for name, described in held_out_sets(config).items():
        sampled = samples and (described.kind or kind) == "prompts"
        sampling = described.sampling if sampled else None
        where = f"evaluation.sets.{name}"
        if described.data is not None:
            found.append(_rows(f"{where}.data", described.data, f"{where}.sampling", sampling))
        elif sampling is not None:
            found.append(_rows(key, sources[longest], "evaluation.sampling", sampling))
    return found


def _rows(
    key: str, data: PromptsSection, sampling_key: str, sampling: SamplingSection | None
) -> RowsRead:
    return RowsRead(
        data_key=key,
        data_tokens=data.max_tokens,
        sampling_key=sampling_key,
        sampling=sampling,
    )


def mixed_source(config: Config, entry: Mapping[str, Any]) -> WeightedSource:
    """One entry of `data.mix`."""
    return WeightedSource.model_validate(_like_train(config, entry))


def described_sets(config: Config) -> dict[str, dict[str, Any]]:
    """The keys given for each held-out set, `held_out` first.

    Raises:
        ConfigError: `data` or `sampling` of a set is not a mapping.
    """
    own: dict[str, dict[str, Any]] = {HELD_OUT: {}} if config.evaluation.held_out else {}
    for name, given in config.evaluation.sets.items():
        for key in ("data", "sampling"):
            if not isinstance(given.get(key, {}), Mapping):
                where = f"evaluation.sets.{name}.{key}"
                fix = f"give keys, as {where}: {{...}}"
                message = f"{where}={given[key]!r} must be a mapping of keys: {fix}"
                fault = Fault(key=where, value=given[key], message=message, fix=fix)
                raise ConfigError([fault])
    return own | config.evaluation.sets


def held_out_sets(config: Config) -> dict[str, HeldOutSet]:
    """The held-out sets by name."""
    return {name: held_out_set(config, given) for name, given in described_sets(config).items()}


def held_out_set(config: Config, given: Mapping[str, Any]) -> HeldOutSet:
    """Complete the given keys of a set with those of the sections that it inherits from."""
    shared = {"threshold", "num_samples", "k", "against", "max_items"}
    completed = {
        "rewards": config.model_dump(include={"rewards"})["rewards"],
        **config.evaluation.model_dump(include=shared),
        **given,
        "sampling": set_sampling(config, given),
        "data": set_data(config, given),
    }
    return HeldOutSet.model_validate(completed)


def set_sampling(config: Config, given: Mapping[str, Any]) -> SamplingSection:
    changes = config.evaluation.sampling | given.get("sampling", {})
    values = config.sampling.model_dump() | changes
    return SamplingSection.model_validate(values)


def set_data(config: Config, given: Mapping[str, Any]) -> PromptsSection | None:
    if "data" not in given:
        return None
    return PromptsSection.model_validate(_like_train(config, given["data"]))


def _like_train(config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    kept = config.data.train.model_dump(exclude=set(ROWS) if "source" in given else None)
    return kept | dict(given)
