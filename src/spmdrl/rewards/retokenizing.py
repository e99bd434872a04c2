"""Rows for a reward model with its own tokenizer, written like those that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from spmdrl.data.encode import ResponseEncoder, make_encoder
from spmdrl.data.prompts import Prompt
from spmdrl.data.row_problems import BadRow
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.rewards.scorer import Retokenize


def retokenizer(role: str, directory: Path, now: datetime, *, chat: bool) -> Retokenize:
    """Function (prompt, response, whether it was cut) -> tokens, as the flow `reward_model` makes
    them: a conversation up to the end of the response's turn, raw text up to the end-of-text token.
    A cut response gets no end. If the chat template rewrites a response (by leaving out its
    thinking, say), the tokens are those that the template writes.

    Args:
        chat: whether prompts are conversations.
        now: the time that the chat template is given.

    Raises:
        ValueError: the tokenizer has no end of text, or no chat template for conversations.
    """
    tokenizer = load_tokenizer(directory)
    key = f"roles.{role}.retokenize=true"
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{key}: the tokenizer of {directory} has no eos_token to end responses")
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"{key}: prompts are conversations, but the tokenizer of {directory} has no chat "
            "template to read them by: give it one, or set data.train.chat (and that of evaluation "
            "sets) to false"
        )
    raw = make_encoder(str(directory), tokenizer, chat=False, now=now)
    talks: dict[str, ResponseEncoder] = {}

    def talk(options: Mapping[str, Any]) -> ResponseEncoder:
        """Encoder of conversations whose prompts gave the template these variables."""
        key = json.dumps(options, sort_keys=True, default=str)
        if chat and key not in talks:
            talks[key] = make_encoder(
                str(directory), tokenizer, chat=True, now=now, options=options
            )
        return talks.get(key, raw)

    talk({})  # a template that cannot be used is an error at the start

    def encode(prompt: Prompt, response: str, is_cut: bool) -> Sequence[int]:
        encoder = talk(prompt.options) if prompt.messages else raw
        asked = prompt.messages or ({"role": "user", "content": prompt.text},)
        said = {"role": "assistant", "content": response}
        tools = prompt.tools if encoder.has_tools else ()
        try:
            return encoder.read_last([*asked, said], tools, is_cut=is_cut)
        except BadRow as error:
            raise ValueError(f"{key}, prompt {prompt.prompt_id}: {error}") from error

    return encode
