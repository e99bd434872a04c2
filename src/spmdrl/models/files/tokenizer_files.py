"""Comparison of a tokenizer with its files, from which libraries sometimes make a different one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spmdrl.models.fields import read_json

TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
ADDED, NAMED = "added_tokens.json", "special_tokens_map.json"

_PROBE = " Is it 12.5%?  Yes:\n\tdon't, naïve 漢字 \N{GRINNING FACE}"


def refuse_changed(directory: Path, tokenizer: Any) -> None:
    """Raise ValueError if `transformers` makes a tokenizer that loses letters which tokenizer.json
    keeps (a tokenizer_class may override its rules for spaces and bytes), or one whose tokens are
    drawn at random.
    """
    file = directory / TOKENIZER
    if not file.is_file() or not tokenizer.is_fast:
        return
    written, core = _of_file(file), tokenizer.backend_tokenizer
    # not every kind of model has this attribute
    rate = getattr(core.model, "dropout", None)
    if rate:
        raise ValueError(
            f"{file}: model.dropout is {rate}, which draws tokens at random: set it to null"
        )
    ids, want = _encode(core, _PROBE), _encode(written, _PROBE)
    if ids == want or want is None or written.decode(want) != _PROBE:
        return
    if ids is not None and core.decode(ids) == _PROBE:
        return
    raise ValueError(
        f"{directory / TOKENIZER_CONFIG}: tokenizer_class "
        f"{read_json(directory / TOKENIZER_CONFIG).get('tokenizer_class')!r} makes another "
        f"tokenizer of {TOKENIZER}, which loses letters: set it to 'PreTrainedTokenizerFast'"
    )


def notes(directory: Path, tokenizer: Any) -> tuple[str, ...]:
    """Describe contradictions between the tokenizer's files, or with the tokenizer made of them."""
    return tuple(_notes(directory, tokenizer))


def _notes(directory: Path, tokenizer: Any) -> Iterator[str]:
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    file = directory / TOKENIZER
    if not file.is_file() or not tokenizer.is_fast:
        return
    written = _of_file(file)
    known = written.get_vocab(with_added_tokens=True)
    for text in sorted(vocabulary.keys() - known.keys(), key=lambda text: vocabulary[text]):
        yield (
            f"{file} has no token {text!r}, which is special by {TOKENIZER_CONFIG}: it gets the "
            f"new id {vocabulary[text]}, and no meaning to the model"
        )
    end = tokenizer.eos_token if tokenizer.eos_token in known else ""
    probe = f"{end}{_PROBE}{end}"
    want = _encode(written, probe)
    if want is not None and tokenizer(probe, add_special_tokens=False)["input_ids"] != want:
        yield (
            f"{directory / TOKENIZER_CONFIG}: the tokenizer that is made by it gives some texts "
            f"other tokens than {TOKENIZER} by itself"
        )
    for source, index, text in _claims(directory):
        if known.get(text, index) != index:
            yield f"{source}: {text!r} has the id {index}, in {file} {known[text]}, which counts"
    yield from _names(directory, tokenizer)


def _claims(directory: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield ids of tokens that files other than tokenizer.json give: file, id, text."""
    config = directory / TOKENIZER_CONFIG
    for key, token in (read_json(config).get("added_tokens_decoder") or {}).items():
        yield config, int(key), token["content"] if isinstance(token, dict) else token
    added = directory / ADDED
    if added.is_file():
        for text, index in read_json(added).items():
            if type(index) is int:
                yield added, index, text


def _names(directory: Path, tokenizer: Any) -> Iterator[str]:
    """Yield notes on special tokens that two files name differently."""
    if not (directory / NAMED).is_file():
        return
    given, other = read_json(directory / TOKENIZER_CONFIG), read_json(directory / NAMED)
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        first, second = (_content(values.get(key)) for values in (given, other))
        if first and second and first != second:
            used = tokenizer.special_tokens_map.get(key)
            yield (
                f"{directory / TOKENIZER_CONFIG} has {key} {first!r}, {directory / NAMED} has "
                f"{second!r}: {str(used)!r} counts"
            )


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _encode(core: Tokenizer, text: str) -> list[int] | None:
    """Return the ids; None if the tokenizer has none for some letter."""
    try:
        return list(core.encode(text, add_special_tokens=False).ids)
    # the library raises a bare Exception if an unknown token is missing
    except Exception:
        return None


def _of_file(file: Path) -> Tokenizer:
    written = Tokenizer.from_file(str(file))
    # transformers sets both again for every text
    written.no_truncation()
    written.no_padding()
    return written
