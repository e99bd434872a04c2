"""`rollout.turns`: the configuration of samples that take several turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from spmdrl.config.algorithms import Section
from spmdrl.config.data import Place


class TurnsSection(Section):
    """The turns of a rollout's samples: who answers them, and their limits."""

    kind: Place = Field(
        description="Answer a sample's turns with an object of this class, module:Class or "
        "path/to/file.py:Class (`spmdrl.api.TurnEnvironment`), or of a kind that is shipped."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Make the objects with these keyword arguments."
    )
    max_turns: int = Field(
        8, ge=1, description="End a sample after this many turns of the model, at least 1."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="End a sample that has no room for its next turn within this many tokens after "
        "the prompt, those of answers included, at least 1; null takes max_turns x "
        "sampling.max_tokens, which is a single turn's limit.",
    )
    history: Literal["kept", "rendered"] = Field(
        "kept",
        description="Draw and train each turn after the tokens that were there (kept), or after "
        "the conversation as the chat template renders it (rendered): where that is not what was "
        "there, the sample continues with it as another part of its row, which has its reward.",
    )
    workers: int = Field(
        8, ge=1, description="Run the objects in this many subprocesses per replica, at least 1."
    )
    timeout_s: float = Field(
        30.0,
        gt=0,
        description="End a call of an object that takes longer than this, in seconds, above 0.",
    )
    memory_gb: float = Field(
        4.0, gt=0, description="Let objects add this much memory to a subprocess, in GB, above 0."
    )
    failed_reward: float = Field(
        0.0, description="Give this reward to a turn whose object failed, any number; it ends."
    )
    seconds: float | None = Field(
        None,
        gt=0,
        description="End a sample after this much time, in seconds, above 0; results then depend "
        "on time, and the log says so. null sets no limit.",
    )

    def room(self, max_tokens: int) -> int:
        """Most tokens of a sample after its prompt.

        Args:
            max_tokens: most tokens of a turn.
        """
        return self.max_turns * max_tokens if self.max_tokens is None else self.max_tokens


def turns_key(
    turns: Mapping[str, Any] | None, options: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """A text that is equal for equal turns, rendered alike; "" for none.

    Args:
        turns: all keys of a `TurnsSection`, as JSON.
        options: the source's `chat_template_kwargs`.
    """
    if turns is None:
        return ""
    return json.dumps([turns, dict(options)] if options else turns, sort_keys=True)
