"""Conversations of samples as messages, for reward functions that ask for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.batch import Batch
from spmdrl.data.prompts import Prompt
from spmdrl.roles.turn_calls import HEARD, OPENING, heard_texts

Message = Mapping[str, Any]


def conversation(
    prompt: Prompt,
    turns: Sequence[tuple[str, Sequence[Message]]],
    opening: Sequence[Message] | None = None,
) -> list[dict[str, Any]]:
    """Return the messages of a sample, each with `role` and `content`: those of its prompt, then
    each turn and what answered it.

    Args:
        turns: text of a turn, and the messages that the model read next.
        opening: what the sample's environment begins with; None: the prompt of the data.
    """
    begin: Sequence[Message] = prompt.messages if opening is None else opening
    if not begin:  # a prompt without a chat template
        begin = [{"role": "user", "content": prompt.text}]
    messages: list[dict[str, Any]] = [dict(message) for message in begin]
    for text, answer in turns:
        messages.append({"role": "assistant", "content": text})
        messages += [dict(message) for message in answer]
    return messages


def conversations(
    batch: Batch, texts: Sequence[str], turns: Sequence[Sequence[Mapping[str, Any]]] | None
) -> list[list[dict[str, Any]]]:
    """Return the conversation of each row of a rollout.

    Args:
        texts: the rows' response texts.
        turns: the turns of each row (`Scorer.turns`); None: none took any.
    """
    prompts: Sequence[Prompt] = batch.objects["prompt"]
    if turns is None:
        return [conversation(p, [(text, ())]) for p, text in zip(prompts, texts, strict=True)]
    openings = batch.objects.get(OPENING, [None] * len(prompts))
    answers = _answers(batch)
    found = []
    for prompt, opening, own, heard in zip(prompts, openings, turns, answers, strict=True):
        told = [*heard, *[()] * (len(own) - len(heard))]
        both = [(turn["text"], answer) for turn, answer in zip(own, told, strict=True)]
        found.append(conversation(prompt, both, opening))
    return found


def _answers(batch: Batch) -> list[list[Sequence[Message]]]:
    """Read, for each row, the messages after each of its turns that were answered."""
    if HEARD not in batch.ragged:  # rows of a user's own environment
        return [[] for _ in range(len(batch))]
    return [[json.loads(own[place]) for place in sorted(own)] for own in heard_texts(batch)]
