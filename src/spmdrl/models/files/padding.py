"""The padding token of a model with a scalar head.

transformers reads a row's score at its last token that is not padding. If the end of text is also
the padding, as in many chat models, that is the token before the one that the head was trained on
(https://github.com/huggingface/transformers/issues/35352).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spmdrl.models.config import ModelConfig
from spmdrl.models.files.token_texts import special_tokens, tokenizer_ends
from spmdrl.models.files.tokenizers import load_tokenizer

log = logging.getLogger(__name__)

NEW = "<|pad|>"
"""The padding token to add if the tokenizer has none to spare and the embedding has room for it."""


def set_padding(directory: Path, model: ModelConfig, ends: Sequence[int]) -> int | None:
    """Give the tokenizer in `directory` a padding token with which no row ends; return its id.

    A usable one is kept. If no token is usable it gets none, and the result is None: transformers
    then refuses to score several rows at once, rather than scoring the wrong token.

    Args:
        ends: tokens that end a text according to the model's files.
    """
    named = model.source.get("pad_token_id")
    if not (directory / "tokenizer_config.json").is_file():
        serves = isinstance(named, int) and 0 <= named < model.vocab_size and named not in ends
        return named if serves else None
    tokenizer = load_tokenizer(directory)
    taken = {*ends, *(end.token for end in tokenizer_ends(tokenizer, chat=True))}
    found = padding_token(tokenizer, taken, model.vocab_size, named)
    if found is not None:
        text, token = found
        if text == tokenizer.pad_token:
            return token
        _write(directory, text)
        if load_tokenizer(directory).pad_token_id == token:
            log.info(
                "the exported model with a scalar head pads with %r (%d) in place of %r, which may "
                "end texts",
                *(text, token, tokenizer.pad_token),
            )
            return token
    log.warning(
        "every special token ends texts, and the embedding has no row to spare, so the exported "
        "model with a scalar head has no padding token: transformers scores one row at a time"
    )
    _write(directory, None)
    return None


def keep_padding(directory: Path, token: int) -> None:
    """Let the tokenizer in `directory` pad with the token that scores pass over, if it does not."""
    if not (directory / "tokenizer_config.json").is_file():
        return
    tokenizer = load_tokenizer(directory)
    text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    if text is None or tokenizer.pad_token_id == token:
        return
    _write(directory, text)
    log.info("the exported model with a scalar head pads with %r (%d)", text, token)


def padding_token(
    tokenizer: Any, taken: set[int], vocab_size: int, named: int | None
) -> tuple[str, int] | None:
    """Choose a special token that can pad rows, with its id: none of `taken`, with an embedding.

    In order of preference: the tokenizer's own, the one `named` by the model's configuration, one
    whose text contains "pad", the unknown token, one that the chat template does not write, any
    other, a new one.
    """
    special = special_tokens(tokenizer)
    free = {text: i for text, i in special.items() if i not in taken and 0 <= i < vocab_size}
    template = str(tokenizer.chat_template or "")
    wishes: list[Callable[[str], bool]] = [
        lambda text: text == tokenizer.pad_token,
        lambda text: free[text] == named,
        lambda text: "pad" in text.lower(),
        lambda text: text == tokenizer.unk_token,
        lambda text: text not in template and text != tokenizer.bos_token,
        lambda text: True,
    ]
    for fits in wishes:
        found = [(i, text) for text, i in free.items() if fits(text)]
        if found:
            i, text = min(found)
            return text, i
    vocabulary = tokenizer.get_vocab()
    following = 1 + max(vocabulary.values())
    if following < vocab_size and NEW not in vocabulary:
        return NEW, following
    return None


def _write(directory: Path, text: str | None) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = directory / name
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("pad_token", None)
        if text is not None:
            content["pad_token"] = text
        _dump(file, content)
    file = directory / "tokenizer.json"
    if text is None and file.is_file():  # transformers takes a missing padding token from here
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("padding") is not None:
            _dump(file, {**content, "padding": None})


def _dump(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
