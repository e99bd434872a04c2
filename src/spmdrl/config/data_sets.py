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
from spmdrl.config.turns import TurnsSection

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


def train_sections(config: Config) -> list[PromptsSection]:
    """Sections of the training data's sources: `data.train`, then those of `data.mix`."""
    return [config.data.train, *(mixed_source(config, entry) for entry in config.data.mix)]


def train_sources(config: Config) -> list[WeightedSource]:
    """`train_sections` with their weights and all keys of their turns."""
    sources = [WeightedSource.model_validate(own.model_dump()) for own in train_sections(config)]
    return [source.model_copy(update=_whole_turns(config, source)) for source in sources]


def longest_prompt(config: Config) -> int:
    """The most tokens of a row of the training data's sources, without responses to it."""
    return max(section.max_tokens for section in train_sections(config))


def uses_chat(config: Config) -> bool:
    """Whether any data go through the chat template."""
    own = [described.data for described in held_out_sets(config).values()]
    return any(section.chat for section in (*train_sections(config), *own) if section is not None)


@dataclass(frozen=True, kw_only=True)
class RowsRead:
    """Rows that a run reads.

    Args:
        data_key, data_tokens: key of the section that describes them, and its max_tokens.
        sampling_key, sampling: settings for responses to them; None: the rows hold their own.
        turns: the turns that responses take; None: they take one.
    """

    data_key: str
    data_tokens: int
    sampling_key: str = ""
    sampling: SamplingSection | None = None
    turns: TurnsSection | None = None

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return self.data_tokens + (0 if self.sampling is None else self.response_tokens)

    @property
    def response_tokens(self) -> int:
        assert self.sampling is not None, self.data_key
        return _room(self.turns, self.sampling)

    def describe(self) -> str:
        """Derivation of `longest`, as part of a sentence."""
        data = f"{self.data_key}.max_tokens={self.data_tokens}"
        if self.sampling is None:
            return f"{data} allows rows of {self.longest} tokens"
        return f"{data} and {self.describe_responses()} make {self.longest} tokens"

    def describe_responses(self) -> str:
        """The keys that make `response_tokens`."""
        assert self.sampling is not None, self.data_key
        turn = f"{self.sampling_key}.max_tokens={self.sampling.max_tokens}"
        if self.turns is None:
            return turn
        if self.turns.max_tokens is None:
            return f"rollout.turns.max_turns={self.turns.max_turns} x {turn}"
        return f"rollout.turns.max_tokens={self.turns.max_tokens}"


def rows_read(config: Config) -> list[RowsRead]:
    """List the rows of training, then those of each held-out set; responses to held-out prompts
    are counted only if there is a rollout to sample them.
    """
    kind, samples = config.data_kind(), "rollout" in map(config.role_kind, config.roles)
    found = [_longest_train(config, "sampling", config.sampling if kind == "prompts" else None)]
    for name, described in held_out_sets(config).items():
        sampled = samples and (described.kind or kind) == "prompts"
        sampling = described.sampling if sampled else None
        where = f"evaluation.sets.{name}"
        if described.data is not None:
            found.append(
                _rows(config, f"{where}.data", described.data, f"{where}.sampling", sampling)
            )
        elif sampling is not None:
            found.append(_longest_train(config, "evaluation.sampling", sampling))
    return found


def _longest_train(config: Config, sampling_key: str, sampling: SamplingSection | None) -> RowsRead:
    """The rows of training, of the source with the longest ones."""
    rows = [
        _rows(config, f"data.mix.{i - 1}" if i else "data.train", source, sampling_key, sampling)
        for i, source in enumerate(train_sections(config))
    ]
    return max(rows, key=lambda own: own.longest)


def _rows(
    config: Config,
    key: str,
    data: PromptsSection,
    sampling_key: str,
    sampling: SamplingSection | None,
) -> RowsRead:
    return RowsRead(
        data_key=key,
        data_tokens=data.max_tokens,
        sampling_key=sampling_key,
        sampling=sampling,
        turns=turns_of(config, data),
    )


def turns_of(config: Config, data: PromptsSection) -> TurnsSection | None:
    """Complete the turns of samples for a source's rows; None: they take one.

    Raises:
        ValidationError: keys of `data.turns` are wrong, or make no turns without others.
    """
    if data.turns is None or not data.turns:
        return None if data.turns is None else config.rollout.turns
    shared = config.rollout.turns
    return TurnsSection.model_validate(
        {**({} if shared is None else shared.model_dump()), **data.turns}
    )


def _whole_turns(config: Config, data: PromptsSection) -> dict[str, Any]:
    """The value of `data.turns` with all its keys; None without turns."""
    turns = turns_of(config, data)
    return {"turns": None if turns is None else turns.model_dump(mode="json")}


def takes_turns(config: Config) -> bool:
    """Whether samples of the training data take several turns."""
    return any(turns_of(config, source) is not None for source in train_sections(config))


def set_takes_turns(config: Config, held_out: HeldOutSet) -> bool:
    """Whether samples of a held-out set take several turns, which give rewards."""
    sources = train_sections(config) if held_out.data is None else [held_out.data]
    return any(turns_of(config, source) is not None for source in sources)


def turns_of_set(config: Config, held_out: HeldOutSet) -> list[str]:
    """Kinds and options of what answers the turns of a held-out set's samples, in words, and
    whether they are rendered.
    """
    sources = train_sections(config) if held_out.data is None else [held_out.data]
    found = [turns for source in sources if (turns := turns_of(config, source)) is not None]
    return list(dict.fromkeys(f"turns {t.kind} {t.options}{_rendered(t)}" for t in found))


def _rendered(turns: TurnsSection) -> str:
    return " rendered" if turns.history == "rendered" else ""


def is_rewarded(config: Config) -> bool:
    """Whether samples of the training data have rewards, of functions, roles or turns."""
    return bool(config.rewards) or takes_turns(config)


def response_tokens(config: Config) -> int:
    """The most tokens after a prompt of the training data: those of a sample's turns and of their
    answers, or `sampling.max_tokens`.
    """
    sources = train_sections(config)
    return max(_room(turns_of(config, source), config.sampling) for source in sources)


def set_response_tokens(config: Config, held_out: HeldOutSet) -> int:
    """The most tokens after a prompt of a held-out set, as `response_tokens`."""
    sources = train_sections(config) if held_out.data is None else [held_out.data]
    return max(_room(turns_of(config, source), held_out.sampling) for source in sources)


def _room(turns: TurnsSection | None, sampling: SamplingSection) -> int:
    return sampling.max_tokens if turns is None else turns.room(sampling.max_tokens)


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
    data = set_data(config, given)
    shared = {"threshold", "num_samples", "k", "against", "max_items"}
    completed = {
        "rewards": config.model_dump(include={"rewards"})["rewards"],
        **config.evaluation.model_dump(include=shared),
        **given,
        "sampling": set_sampling(config, given),
        "data": None if data is None else data.model_copy(update=_whole_turns(config, data)),
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
