"""Tokenizers of Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmdrl.models.config import ModelConfig
from spmdrl.models.fields import (
    Fields,
    is_pointer,
    kind_of,
    pointer_error,
    read_json,
    refuse_pointer,
)
from spmdrl.models.files.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG, refuse_changed

_JSON = (
    TOKENIZER_CONFIG,
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space")


def load_tokenizer(path: str | Path) -> Any:
    """Load transformers' tokenizer of a directory, without running code from it.

    Raises:
        ValueError: there is none, or one of its files is damaged; the message names the file.
    """
    # transformers takes a second to import, and most uses of this module need no tokenizer.
    from transformers import AutoTokenizer

    directory = Path(path)
    if not (directory / TOKENIZER_CONFIG).is_file():
        raise ValueError(f"{directory} has no {TOKENIZER_CONFIG}: it holds no tokenizer")
    _check_config(directory / TOKENIZER_CONFIG)
    _check_templates(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        # some faults show only when it is used
        tokenizer("a")
    # the libraries raise errors of any kind, and most name no file
    except Exception as error:
        raise ValueError(_diagnosis(directory, error)) from error
    refuse_changed(directory, tokenizer)
    _check_syntax(directory, tokenizer.chat_template)
    return tokenizer


def _check_syntax(directory: Path, template: Any) -> None:
    """Raise ValueError if a chat template has a syntax error."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    named = template if isinstance(template, dict) else {"": template}
    for name, text in named.items():
        try:
            if text:
                render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=text)
        except TemplateSyntaxError as error:
            file = next((f for f in _template_files(directory) if f.is_file()), None)
            what = f" {name!r}" if name else ""
            raise ValueError(
                f"{file or directory / TOKENIZER_CONFIG}: the chat template{what} is none: line "
                f"{error.lineno}: {error.message}"
            ) from error
        # a template's errors for messages are reported when rows are read
        except Exception:
            continue


def _check_config(file: Path) -> None:
    """Raise ValueError for values that the library accepts here and fails on later."""
    fields = Fields(values=read_json(file), origin=str(file))
    for key in _TOKENS:
        if key in fields and not _is_token(fields.value(key)):
            raise fields.wrong(key, "a text, an object with its content, or null")
    for key in _FLAGS:
        if key in fields and not fields.is_null(key):
            fields.flag(key)
    if "model_max_length" in fields and not fields.is_null("model_max_length"):
        fields.number("model_max_length", above=0.0)
    if "tokenizer_class" in fields and not fields.is_null("tokenizer_class"):
        fields.text("tokenizer_class")
    if "chat_template" in fields:
        _check_template(fields)
    if "added_tokens_decoder" in fields:
        for index, token in fields.section("added_tokens_decoder").items():
            if not index.isdecimal() or token is None or not _is_token(token):
                raise ValueError(
                    f"{file}: added_tokens_decoder has {kind_of(token)} for {index!r}, which is no "
                    "token of an id"
                )


def _is_token(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("content"), str)
    return value is None or isinstance(value, str)


def _check_template(fields: Fields) -> None:
    value = fields.value("chat_template")
    named = value if isinstance(value, list) else []
    are_texts = all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
        for one in named
    )
    is_mapping = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
    is_plain = value is None or isinstance(value, str)
    if not (is_plain or is_mapping or (isinstance(value, list) and are_texts)):
        raise fields.wrong("chat_template", "a text, or a list of objects with name and template")


def _check_templates(directory: Path) -> None:
    """Raise ValueError if a chat template's file is not text."""
    for file in _template_files(directory):
        if file.is_file():
            refuse_pointer(file)
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def _template_files(directory: Path) -> tuple[Path, ...]:
    return (directory / "chat_template.jinja", *directory.glob("additional_chat_templates/*"))


def _diagnosis(directory: Path, error: Exception) -> str:
    """Name the file that the library cannot read, as far as that can be found out."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig

    files = [directory / name for name in _JSON if (directory / name).is_file()]
    for other in ("tokenizer.model", "merges.txt"):
        if (directory / other).is_file() and is_pointer(directory / other):
            return pointer_error(directory / other)
    for file in files:
        try:
            read_json(file)
        except ValueError as damaged:
            return str(damaged)
    if (directory / TOKENIZER).is_file():
        try:
            Tokenizer.from_file(str(directory / TOKENIZER))
        # its errors are bare Exceptions
        except Exception as wrong:
            return f"{directory / TOKENIZER} is no tokenizer: {_one_line(wrong)}"
    elif not any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        return f"{directory} has no file {TOKENIZER}, and none that it could be made of"
    if (directory / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        # a wrong value of any key
        except Exception as wrong:
            return f"{directory / 'config.json'}: {_one_line(wrong)}"
    names = ", ".join(file.name for file in files)
    return f"{directory}: no tokenizer can be made of {names}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else text[:397] + '...'}"


def check_tokenizer(tokenizer: Any, model: ModelConfig) -> None:
    """Raise ValueError if the tokenizer has ids without embedding row (the reverse is usual)."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    size = 1 + max(vocabulary.values(), default=-1)
    if size > model.vocab_size:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has {size} token ids, but the model's "
            f"embedding has {model.vocab_size} rows (vocab_size): they do not belong together"
        )
    if size == 0:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no tokens")


def difference(first: Any, second: Any) -> str | None:
    """Describe the difference of two tokenizers' ids, as part of a sentence; None if equal.

    Chat templates may differ: only the meaning of ids counts.
    """
    one, two = first.get_vocab(), second.get_vocab()
    if one == two:
        return None
    if len(one) != len(two):
        return f"{len(one)} and {len(two)} token ids"
    text = min((t for t in one if two.get(t) != one[t]), key=lambda t: one[t])
    return f"{text!r} has the id {one[text]} in one and {two.get(text)} in the other"
