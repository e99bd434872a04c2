"""Conversations for supervised fine-tuning: only the responses have a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.data.encode import EndingTokenizer, make_encoder
from spmdrl.data.examples import (
    CALL_ALONE,
    EMPTY_RESPONSE,
    Example,
    RowProgress,
    Unusable,
    check_part,
    read_examples,
    read_mark,
    unreported,
)
from spmdrl.data.item_set import ItemSet
from spmdrl.data.messages import (
    Messages,
    checked_messages,
    opening,
    prompt_key,
    read_responses,
    with_system,
)
from spmdrl.data.rows import Row
from spmdrl.data.source import DataSource
from spmdrl.data.tool_messages import CALLS


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Args:
    text: the first user message, before any template.
    tokens: int32 ids of the whole conversation, up to the end of its last response.
    responses: (start, stop) of each response in `tokens`, its end-of-turn token included.
    mark: digest of its row, see `data.identity`.
    """

    text: str
    tokens: Sequence[int]
    responses: tuple[tuple[int, int], ...]
    mark: bytes = b""

    @property
    def loss_mask(self) -> list[bool]:
        """Whether each token belongs to a response."""
        mask = [False] * len(self.tokens)
        for start, stop in self.responses:
            mask[start:stop] = [True] * (stop - start)
        return mask

    @property
    def token_lists(self) -> tuple[Sequence[int], ...]:
        return (self.tokens,)

    @classmethod
    def rows(cls, items: Sequence[Conversation], first_id: int) -> Batch:
        """Make one row per conversation: `tokens`, `loss_mask` (the responses), `prompt_ids` from
        `first_id` on, `sample_index` (0), `prompt_lengths` (tokens before the first response),
        `response_lengths` (tokens in the mask).
        """
        spoken = [sum(stop - start for start, stop in item.responses) for item in items]
        batch = from_rows(
            [item.tokens for item in items],
            rows={
                "prompt_ids": torch.arange(first_id, first_id + len(items)),
                "sample_index": torch.zeros(len(items), dtype=torch.int64),
                "prompt_lengths": torch.tensor(
                    [item.responses[0][0] for item in items], dtype=torch.int64
                ),
                "response_lengths": torch.tensor(spoken, dtype=torch.int64),
            },
        )
        mask = torch.tensor([flag for item in items for flag in item.loss_mask], dtype=torch.bool)
        return batch.with_columns(tokens={"loss_mask": mask})


def load_conversations(
    source: DataSource, tokenizer: EndingTokenizer, report: RowProgress = unreported
) -> ItemSet[Conversation]:
    """Load conversations from a column of messages, or from a prompt and a response.

    The column `messages` is read if `source.columns` names it; otherwise the prompt's column and
    `response` (a text, or a conversation that ends in it). Conversations are left out, counted and
    logged if a response is empty, or only calls tools and the chat template writes no calls, or if
    they exceed `max_tokens`. One whose earlier turns the template rewrites becomes several items.

    Raises:
        ValueError: see `data.examples.read_examples`; no chat template, or no end-of-text token.
    """
    options = source.chat_template_kwargs
    encoder = make_encoder(
        source.source, tokenizer, chat=source.chat, now=source.now, options=options
    )
    whole = "messages" in source.columns
    if whole and not source.chat:
        raise ValueError(
            f"data source {source.source!r}: columns.messages holds conversations: set chat to true"
        )

    def make(row: Row) -> Example[Conversation]:
        text, messages = _whole(row, source) if whole else _prompt_and_response(row, source)
        check_part(source, text)
        spoken = [m for m in messages if m["role"] == "assistant"]
        silent = [
            m
            for m in spoken
            if not m["content"].strip() and not (m.get(CALLS) and encoder.writes_calls)
        ]
        if silent:
            raise Unusable(CALL_ALONE if any(m.get(CALLS) for m in silent) else EMPTY_RESPONSE)
        rows = encoder.encode(messages, encoder.tools_of(row))
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        mark = read_mark(row)
        items = tuple(
            Conversation(text=text, tokens=own.tokens, responses=own.responses, mark=mark)
            for own in rows
        )
        longest = max(len(own.tokens) for own in rows)
        return Example(prompt=prompt_key(messages[:first]), items=items, tokens=longest)

    needed = ["messages" if whole else "response"]
    found = read_examples(source, needed, make, encoder.template, report)
    return ItemSet(Conversation, *found)


def _whole(row: Row, source: DataSource) -> tuple[str, Messages]:
    column = source.column("messages")
    messages = checked_messages(row.get(column), column, source)
    return opening(messages), with_system(messages, source)


def _prompt_and_response(row: Row, source: DataSource) -> tuple[str, Messages]:
    asked = read_responses(row, [source.column("response")], source)
    return asked.text, [*asked.messages, asked.answers[0]]
