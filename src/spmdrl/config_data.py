"""The sections of a configuration that say what is read: training data and held-out sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from spmdrl.amounts import Amount, read_amount, read_share
from spmdrl.config_algorithms import Section


def with_home(place: str) -> str:
    """A path with the user's home directory in place of a leading `~`, or `~NAME`.

    Raises:
        ValueError: there is none.
    """
    if not place.startswith("~"):
        return place
    found = os.path.expanduser(place)
    if found.startswith("~"):
        raise ValueError(f"{place.split('/')[0]} has no home directory here: write the path out")
    return found


Place = Annotated[str, AfterValidator(with_home)]
"""A path, or what may name a file: `~` is the user's home directory."""


class PromptsSection(Section):
    source: Place = Field(description="reasoning_gym:TASK | FILE.jsonl | FILE.parquet | hub:NAME")
    task: dict[str, Any] = Field(default_factory=dict, description="reasoning-gym parameters")
    size: int | None = Field(None, ge=1, description="rows to use")
    split: str = Field("train", description="split of a hub data set")
    seed: int = Field(0, description="of a reasoning-gym task")
    prompt_column: str = Field("question", description="column of the question")
    answer_column: str | None = Field(
        "answer",
        description="column of the reference answer, or a field of one "
        "(reward_model.ground_truth); null: none",
    )
    answer_pattern: str | None = Field(None, description="regex, group 1 is the answer")
    template: str = Field(
        "{prompt}", description="text around the question, which replaces {prompt}"
    )
    system: str | None = Field(
        None, description="system prompt; null: what the chat template does without"
    )
    chat: bool = Field(True, description="use the chat template")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="names of the columns response, messages, chosen, rejected, margin, where they "
        "differ",
    )
    part: str = Field("all", description="all, 2/3: the second of three parts, or 2-3/4, by prompt")
    unique: bool = Field(False, description="leave out prompts that were there before")
    max_tokens: int = Field(
        1024,
        ge=1,
        description="longer prompts are left out and counted; of conversations and preference "
        "pairs: longer rows, answers included",
    )
    keep_shortest: Annotated[str, BeforeValidator(read_share)] = Field(
        "100%",
        description="share of the rows, the shortest, that is kept where max_tokens allows them; "
        "longer ones are left out and counted",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be used is an error, or counted and skipped"
    )


DataKind = Literal["prompts", "conversations", "preferences"]

FLOW_DATA: Mapping[str, DataKind] = {
    "sft": "conversations",
    "reward_model": "preferences",
    "dpo": "preferences",
    "online_dpo": "prompts",
    "grpo": "prompts",
    "ppo": "prompts",
}
"""Shipped flow -> what a row of its data is."""


class DataSection(Section):
    kind: DataKind | None = Field(
        None, description="what a row of the data is; default: what the flow needs"
    )
    train: PromptsSection
    mix: tuple[dict[str, Any], ...] = Field(
        (),
        description="sources beside data.train: each a weight (data.train's is 1) and the keys of "
        "data.train that differ",
    )
    prompts_per_step: int = Field(ge=1, description="groups per step")
    group_size: int = Field(8, ge=1, description="samples per prompt")


class EvaluationSection(Section):
    held_out: Annotated[Amount, BeforeValidator(read_amount)] = Field(
        0,
        description="questions kept out of data.train, the set held_out: a count, or a share (10%)",
    )
    max_items: int | None = Field(
        None,
        ge=1,
        description="questions, conversations or pairs of a held-out set, at most, where "
        "evaluation.held_out is no count; null: all",
    )
    sets: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="NAME: {data: keys of data.train that differ, kind, rewards, and any of "
        "threshold, num_samples, k, sampling, against, max_items}",
    )
    threshold: float = Field(1.0, description="reward from which on an answer counts as right")
    every: int = Field(0, ge=0, description="steps; 0: only before and after")
    before: bool = Field(True, description="before the first step")
    after: bool = Field(True, description="after the last step")
    num_samples: int = Field(1, ge=1, description="answers per prompt")
    k: tuple[int, ...] = Field((1,), description="pass@k")
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="keys of sampling that differ"
    )
    against: Place | None = Field(
        None,
        description="win rate against the answers of a JSONL file that an evaluation wrote, or "
        "start: those before the first step",
    )

    @field_validator("sets", mode="before")
    @classmethod
    def _drop_removed_sets(cls, sets: Any) -> Any:
        """`evaluation.sets.NAME: null` takes away a set that an included file has."""
        return without_null(sets)


def without_null(values: Any) -> Any:
    """A mapping without what is null in it; anything else as it is."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if value is not None}
