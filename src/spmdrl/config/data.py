"""Configuration sections that define the input: training data and held-out sets."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spmdrl.config.algorithms import Basic, Section
from spmdrl.config.amounts import Amount, read_amount, read_part, read_share


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


def with_place(template: str) -> str:
    if "{prompt}" not in template:
        raise ValueError("it must contain {prompt}")
    return template


def compiled(pattern: str) -> str:
    """Check a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(str(error)) from error
    return pattern


def disjoint_share(share: str) -> str:
    """Check a share of the prompts, as `read_part` reads it."""
    read_part(share)
    return share


_OWN_VARIABLES = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "strftime_now"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        "return_assistant_tokens_mask",
    }
)


def template_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Refuse variables of a chat template that the run gives itself."""
    for name in variables:
        if name in _OWN_VARIABLES:
            raise ValueError(f"{name} is given to the chat template by the run: leave it out")
    return variables


class PromptsSection(Section):
    source: Basic[Place] = Field(
        description="Read rows from reasoning_gym:TASK | FILE.jsonl | FILE.parquet | hub:NAME, "
        "or number them for the environment of rollout.turns: seeds."
    )
    task: Basic[dict[str, Any]] = Field(
        default_factory=dict, description="Pass these parameters to the task of reasoning-gym."
    )
    size: Basic[int | None] = Field(
        None, ge=1, description="Use this many rows, at least 1; null uses all."
    )
    split: str = Field("train", description="Read this split of a hub data set.")
    seed: int = Field(
        0, description="Draw a reasoning-gym task's rows from this seed, any whole number."
    )
    prompt_column: Basic[str] = Field("question", description="Read the question from this column.")
    answer_column: Basic[str | None] = Field(
        "answer",
        description="Read the reference answer from this column, or from a field of one "
        "(reward_model.ground_truth); null reads none.",
    )
    answer_pattern: Basic[Annotated[str, AfterValidator(compiled)] | None] = Field(
        None,
        description="Take group 1 of this regular expression as the answer; null takes the whole "
        "text.",
    )
    template: Basic[Annotated[str, AfterValidator(with_place)]] = Field(
        "{prompt}", description="Put this text around the question, which replaces {prompt}."
    )
    system: str | None = Field(
        None, description="Use this system prompt; null leaves it to the chat template."
    )
    chat: bool = Field(True, description="Apply the chat template.")
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(template_variables)] = Field(
        default_factory=dict,
        description="Give the chat template these variables (enable_thinking: false).",
    )
    columns: Basic[dict[str, str]] = Field(
        default_factory=dict,
        description="Name the columns response, messages, chosen, rejected and margin, where "
        "they differ.",
    )
    share: Basic[Annotated[str, AfterValidator(disjoint_share)]] = Field(
        "all", description="Use this share of the prompts: all, 2/3 (second of three), 2-3/4."
    )
    unique: Basic[bool] = Field(False, description="Leave out prompts that occurred before.")
    max_tokens: Basic[int] = Field(
        1024,
        ge=1,
        description="Leave out and count prompts longer than this many tokens, at least 1 (of "
        "conversations and preference pairs: rows with their responses).",
    )
    keep_shortest: Basic[Annotated[str, BeforeValidator(read_share)]] = Field(
        "100%",
        description="Keep this share of the rows, the shortest, above 0% and at most 100%; "
        "max_tokens holds as well, and longer ones are left out and counted.",
    )
    on_bad_row: Basic[Literal["error", "skip"]] = Field(
        "error", description="Treat a row that cannot be used as an error, or count and skip it."
    )
    turns: dict[str, Any] | None = Field(
        default_factory=dict,
        description="Override these keys of rollout.turns for the source's rows; with kind it may "
        "have turns where rollout.turns is null; null gives it none.",
    )

    @model_validator(mode="after")
    def _has_messages(self) -> Self:
        if self.system is not None and not self.chat:
            raise ValueError(f"system={self.system!r} with chat=false: raw text has no messages")
        if self.chat_template_kwargs and not self.chat:
            raise ValueError(
                f"chat_template_kwargs={self.chat_template_kwargs} with chat=false: raw text has "
                "no chat template"
            )
        return self


DataKind = Literal["prompts", "conversations", "preferences"]


class DataSection(Section):
    kind: DataKind | None = Field(
        None, description="Read rows of this kind; null takes what the flow needs."
    )
    train: PromptsSection
    mix: tuple[dict[str, Any], ...] = Field(
        (),
        description="Draw from these sources in addition to data.train: each gives a weight "
        "(data.train's is 1) and the keys of data.train that differ.",
    )
    prompts_per_step: Basic[int] = Field(
        ge=1, description="Draw this many prompts, conversations or pairs per step, at least 1."
    )
    group_size: Basic[int] = Field(
        8, ge=1, description="Draw this many samples per prompt, at least 1."
    )


def within_samples(k: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    """Check the values of k in pass@k against `num_samples`, a field before them."""
    num_samples = info.data.get("num_samples", max(k, default=1))
    for number in k:
        if not 1 <= number <= num_samples:
            raise ValueError(
                f"with num_samples={num_samples}, pass@{number} needs at least {number} samples, "
                "and k at least 1"
            )
    return k


PassAt = Annotated[tuple[int, ...], AfterValidator(within_samples)]


class EvaluationSection(Section):
    held_out: Basic[Annotated[Amount, BeforeValidator(read_amount)]] = Field(
        0,
        description="Keep these questions of data.train out as the set held_out: a count, at "
        "least 0, or a share (10%).",
    )
    max_items: Basic[int | None] = Field(
        None,
        ge=1,
        description="Use up to this many questions, conversations or pairs of a held-out set, at "
        "least 1, where evaluation.held_out is not a count; null uses all.",
    )
    sets: Basic[dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="Evaluate on these held-out sets, NAME: {data: keys of data.train that "
        "differ, kind, rewards, and any of threshold, num_samples, k, sampling, against, "
        "max_items}.",
    )
    threshold: float = Field(
        1.0, description="Count a response as right if its reward is at least this, any number."
    )
    every: Basic[int] = Field(
        0,
        ge=0,
        description="Evaluate every N steps, at least 0; 0 evaluates only before and after.",
    )
    stop_after: int = Field(
        0,
        ge=0,
        description="End the run after this many evaluations in a row that are no better than the "
        "best one by checkpoint.keep_best, at least 0; 0 never does.",
    )
    before: Basic[bool] = Field(True, description="Evaluate before the first step.")
    after: bool = Field(True, description="Evaluate after the last step.")
    num_samples: Basic[int] = Field(
        1, ge=1, description="Draw this many responses per prompt, at least 1."
    )
    k: Basic[PassAt] = Field(
        (1,), description="Report pass@k for these k, each at least 1 and at most num_samples."
    )
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="Override these keys of `sampling` in evaluation."
    )
    against: Basic[Place | None] = Field(
        None,
        description="Count wins against this opponent: a JSONL file that an evaluation wrote, or "
        "start (the responses before the first step); null counts none.",
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
