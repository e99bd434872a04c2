"""Configuration sections that define the input: training data and held-out sets."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from spmdrl.config.algorithms import Section
from spmdrl.config.amounts import Amount, read_amount, read_share


def with_home(place: str) -> str:
    """Replace a path's leading `~` or `~NAME` by the home directory. ValueError: there is none."""
    if not place.startswith("~"):
        return place
    found = os.path.expanduser(place)
    if found.startswith("~"):
        raise ValueError(f"{place.split('/')[0]} has no home directory here: write the path out")
    return found


Place = Annotated[str, AfterValidator(with_home)]
"""A path, or a text that may name a file: `~` is the user's home directory."""


class PromptsSection(Section):
    source: Place = Field(description="reasoning_gym:TASK | FILE.jsonl | FILE.parquet | hub:NAME.")
    task: dict[str, Any] = Field(default_factory=dict, description="Parameters of reasoning-gym.")
    size: int | None = Field(None, ge=1, description="Rows to use, at least 1.")
    split: str = Field("train", description="Split of a hub data set.")
    seed: int = Field(0, description="Seed of a reasoning-gym task.")
    prompt_column: str = Field("question", description="Column of the question.")
    answer_column: str | None = Field(
        "answer",
        description="Column of the reference answer, or a field of one "
        "(reward_model.ground_truth); null: none.",
    )
    answer_pattern: str | None = Field(None, description="Regex whose group 1 is the answer.")
    template: str = Field(
        "{prompt}", description="Text around the question, which replaces {prompt}."
    )
    system: str | None = Field(
        None, description="System prompt; null: what the chat template does without one."
    )
    chat: bool = Field(True, description="Apply the chat template.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names of the columns response, messages, chosen, rejected, margin, where "
        "they differ.",
    )
    part: str = Field("all", description="Part of the prompts: all, 2/3 (second of three), 2-3/4.")
    unique: bool = Field(False, description="Leave out prompts that occurred before.")
    max_tokens: int = Field(
        1024,
        ge=1,
        description="Most tokens of a prompt (of conversations and preference pairs: of a row "
        "with its answers), at least 1; longer ones are left out and counted.",
    )
    keep_shortest: Annotated[str, BeforeValidator(read_share)] = Field(
        "100%",
        description="Share of the rows to keep, the shortest, above 0% and at most 100%; "
        "max_tokens holds as well, longer ones are left out and counted.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="Treat a row that cannot be used as an error, or count and skip it."
    )


DataKind = Literal["prompts", "conversations", "preferences"]


class DataSection(Section):
    kind: DataKind | None = Field(
        None, description="Kind of the rows; by default what the flow needs."
    )
    train: PromptsSection
    mix: tuple[dict[str, Any], ...] = Field(
        (),
        description="Sources in addition to data.train: each a weight (data.train's is 1) and "
        "the keys of data.train that differ.",
    )
    prompts_per_step: int = Field(ge=1, description="Prompts, conversations or pairs per step.")
    group_size: int = Field(8, ge=1, description="Samples per prompt, at least 1.")


class EvaluationSection(Section):
    held_out: Annotated[Amount, BeforeValidator(read_amount)] = Field(
        0,
        description="Questions kept out of data.train as the set held_out: a count or a share "
        "(10%).",
    )
    max_items: int | None = Field(
        None,
        ge=1,
        description="Most questions, conversations or pairs of a held-out set, where "
        "evaluation.held_out is not a count; null: all.",
    )
    sets: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Held-out sets, NAME: {data: keys of data.train that differ, kind, "
        "rewards, and any of threshold, num_samples, k, sampling, against, max_items}.",
    )
    threshold: float = Field(1.0, description="Least reward at which a response counts as right.")
    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after.")
    before: bool = Field(True, description="Evaluate before the first step.")
    after: bool = Field(True, description="Evaluate after the last step.")
    num_samples: int = Field(1, ge=1, description="Responses per prompt, at least 1.")
    k: tuple[int, ...] = Field((1,), description="Values of k in pass@k.")
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `sampling` that differ in evaluation."
    )
    against: Place | None = Field(
        None,
        description="Opponent of a win rate: a JSONL file that an evaluation wrote, or start: "
        "the responses before the first step.",
    )

    @field_validator("sets", mode="before")
    @classmethod
    def _drop_removed_sets(cls, sets: Any) -> Any:
        """Drop sets set to null: `evaluation.sets.NAME: null` removes an included file's set."""
        return without_null(sets)


def without_null(values: Any) -> Any:
    """A mapping without its null values; any other value unchanged."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if value is not None}
