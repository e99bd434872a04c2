"""Preference pairs: a prompt, a chosen response and a rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

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
from spmdrl.data.messages import prompt_key, read_responses
from spmdrl.data.row_problems import BadRow, shown
from spmdrl.data.rows import Row
from spmdrl.data.source import DataSource
from spmdrl.data.tool_messages import CALLS

HUGE = 3.4e38
"""Bound on the size of a margin, so that it fits into float32."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Args:
    text: the first user message, before any template.
    chosen_text, rejected_text: the responses as written in the data.
    prompt: int32 ids, the chat template's generation prompt included.
    chosen, rejected: int32 ids, each with the token that ends a turn.
    margin: amount by which the chosen response is better; 0 if the data do not say.
    mark: digest of its row, see `data.identity`.
    """

    text: str
    chosen_text: str
    rejected_text: str
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float
    mark: bytes = b""

    @property
    def token_lists(self) -> tuple[Sequence[int], ...]:
        return self.prompt, self.chosen, self.rejected

    @classmethod
    def rows(cls, items: Sequence[Pair], first_id: int) -> Batch:
        """Make two rows per pair, chosen first: `tokens`, `loss_mask` (the response), `prompt_ids`
        (equal in a pair, from `first_id` on), `sample_index` (0 chosen, 1 rejected),
        `prompt_lengths`, `response_lengths`, `margin` float32, and the Python column `prompt_text`.
        """
        both = [
            (item.prompt, response) for item in items for response in (item.chosen, item.rejected)
        ]
        batch = from_rows(
            [[*prompt, *response] for prompt, response in both],
            rows={
                "prompt_ids": torch.arange(first_id, first_id + len(items)).repeat_interleave(2),
                "sample_index": torch.tensor([0, 1] * len(items), dtype=torch.int64),
                "prompt_lengths": torch.tensor([len(p) for p, _ in both], dtype=torch.int64),
                "response_lengths": torch.tensor([len(a) for _, a in both], dtype=torch.int64),
                "margin": torch.tensor(
                    [item.margin for item in items], dtype=torch.float32
                ).repeat_interleave(2),
            },
            objects={"prompt_text": [item.text for item in items for _ in range(2)]},
        )
        said = [[False] * len(prompt) + [True] * len(response) for prompt, response in both]
        mask = torch.tensor([flag for row in said for flag in row], dtype=torch.bool)
        return batch.with_columns(tokens={"loss_mask": mask})


def mismatched(pairs: ItemSet[Pair]) -> ItemSet[Pair]:
    """Pair every prompt with the responses of the next item that has another prompt, for KTO's
    estimate of the KL. Responses are cut so that no row is longer than the longest of these.

    Raises:
        ValueError: all items have the same prompt.
    """
    count = len(pairs)
    following = [0] * count
    place = next((i for i, item in enumerate(pairs) if item.prompt != pairs[-1].prompt), None)
    if place is None:
        raise ValueError(f"{count} pairs have one prompt: there are no responses to another")
    for i in reversed(range(count)):
        following[i] = place
        if i > 0 and pairs[i - 1].prompt != pairs[i].prompt:
            place = i
    longest = max(len(i.prompt) + max(len(i.chosen), len(i.rejected)) for i in pairs)
    return ItemSet(
        Pair,
        [
            replace(
                item,
                chosen_text=other.chosen_text,
                rejected_text=other.rejected_text,
                chosen=other.chosen[: longest - len(item.prompt)],
                rejected=other.rejected[: longest - len(item.prompt)],
            )
            for item, other in ((pairs[i], pairs[j]) for i, j in enumerate(following))
        ],
        pairs.left_out,
    )


def load_preferences(
    source: DataSource, tokenizer: EndingTokenizer, report: RowProgress = unreported
) -> ItemSet[Pair]:
    """Load pairs from the columns of the prompt, `chosen`, `rejected`, and `margin` if it is named.

    Responses are texts, or the last messages of conversations; then the prompt's column may be
    missing, and the messages before the response are the prompt (the same on both sides). Pairs
    with equal responses, with an empty one, or with more than `max_tokens` on a side are left out,
    counted and logged; so are prompts that leave no room for responses.

    Raises:
        ValueError: see `data.examples.read_examples`; no chat template, or no end-of-text token.
    """
    options = source.chat_template_kwargs
    encoder = make_encoder(
        source.source, tokenizer, chat=source.chat, now=source.now, options=options
    )
    columns = [source.column("chosen"), source.column("rejected")]

    def make(row: Row) -> Example[Pair]:
        asked = read_responses(row, columns, source)
        check_part(source, asked.text)
        chosen_text, rejected_text = asked.responses
        for answer in asked.answers:
            if not answer["content"].strip() and not (answer.get(CALLS) and encoder.writes_calls):
                raise Unusable(CALL_ALONE if answer.get(CALLS) else EMPTY_RESPONSE)
        margin = _margin(row, source)
        tools = encoder.tools_of(row)
        prompt, chosen = encoder.encode_last([*asked.messages, asked.answers[0]], tools)
        _, rejected = encoder.encode_last([*asked.messages, asked.answers[1]], tools)
        if chosen == rejected:  # also if only the space around them differs
            raise Unusable("with equal responses")
        pair = Pair(
            text=asked.text,
            chosen_text=chosen_text,
            rejected_text=rejected_text,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            margin=margin,
            mark=read_mark(row),
        )
        return Example(
            prompt=prompt_key(asked.messages),
            items=(pair,),
            tokens=len(prompt) + max(len(chosen), len(rejected)),
            prompt_tokens=len(prompt),
        )

    margins = ["margin"] if "margin" in source.columns else []
    found = read_examples(source, ["chosen", "rejected", *margins], make, encoder.template, report)
    return ItemSet(Pair, *found)


def _margin(row: Row, source: DataSource) -> float:
    if "margin" not in source.columns:
        return 0.0
    column = source.columns["margin"]
    value = row.get(column)
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < HUGE:
        raise BadRow(f"column {column!r} holds no number of float32 but {shown(value)}")
    return float(value)
