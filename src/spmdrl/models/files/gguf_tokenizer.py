"""The tokenizer of a GGUF file, rebuilt from its vocabulary and its merges or scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from spmdrl.models.fields import Fields

_PREFIX = "tokenizer.ggml."
_KNOWN = (
    *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"),
)
"""Keys that are read, or that llama.cpp ignores; other keys change tokens."""


def build_tokenizer(fields: Fields) -> Tokenizer:
    """Build the tokenizer, with its special tokens and a begin of text where the file adds one.

    Raises:
        ValueError: the file has a kind of tokenizer, or a key, that is not converted.
    """
    kind = fields.text("tokenizer.ggml.model")
    kinds: dict[str, Callable[[Fields, list[str]], Tokenizer]] = {
        "gpt2": _byte_level,
        "llama": _sentence_piece,
    }
    if kind not in kinds:
        raise ValueError(
            f"{fields.origin}: tokenizer {kind!r} is not supported; supported are "
            f"{', '.join(kinds)}"
        )
    _refuse_rules(fields)
    tokens = token_list(fields)
    tokenizer = kinds[kind](fields, _distinct(fields, tokens))
    tokenizer.add_tokens(_added(fields, tokens, kind))
    add_key = "tokenizer.ggml.add_bos_token"
    if add_key in fields and fields.flag(add_key):
        bos = token_id(fields, "bos")
        if bos is None:
            raise fields.wrong(add_key, "false where there is no tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", "$B"],
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _added(fields: Fields, tokens: list[str], kind: str) -> list[AddedToken]:
    """List the tokens that are found in a text before it is split."""
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [
        AddedToken(token, special=given == TokenType.CONTROL, normalized=False)
        for token, given in zip(tokens, fields.integers("tokenizer.ggml.token_type"), strict=True)
        # runs of blanks are found by merges
        if given in special and not (kind == "llama" and token.isspace() and " " in token)
    ]


def _refuse_rules(fields: Fields) -> None:
    if "tokenizer.ggml.add_eos_token" in fields and fields.flag("tokenizer.ggml.add_eos_token"):
        raise ValueError(
            f"{fields.origin}: tokenizer.ggml.add_eos_token=true is not converted from GGUF: every "
            "prompt would end"
        )
    for key, value in fields.values.items():
        rule = key.removeprefix(_PREFIX)
        if rule != key and value and rule not in _KNOWN and not rule.endswith("_token_id"):
            raise ValueError(f"{fields.origin}: the key {key!r} is not converted from GGUF")


def _distinct(fields: Fields, tokens: list[str]) -> list[str]:
    """Return the tokens; ValueError if one occurs twice: its second id could not be written."""
    places = {token: i for i, token in enumerate(tokens)}
    if len(places) < len(tokens):
        i = next(i for i, token in enumerate(tokens) if places[token] != i)
        raise ValueError(
            f"{fields.origin}: tokenizer.ggml.tokens has {tokens[i]!r} twice, at {i} and at "
            f"{places[tokens[i]]}"
        )
    return tokens


def _byte_level(fields: Fields, tokens: list[str]) -> Tokenizer:
    """Build byte-level BPE from GGUF's vocabulary, merges and pre-tokenizer.

    `tokenizer.ggml.pre: smollm` means GPT-2's splits with every digit separate (llama.cpp's
    LLAMA_VOCAB_PRE_TYPE_SMOLLM); without the digit rule numbers get other tokens than in training.
    """
    pre_key = "tokenizer.ggml.pre"
    pre = fields.text(pre_key) if pre_key in fields else "gpt-2"
    splits: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    if pre not in splits:
        raise ValueError(
            f"{fields.origin}: tokenizer 'gpt2' with pre-tokenizer {pre!r} is not supported; "
            f"supported is 'gpt2' with {', '.join(splits)}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(fields)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[pre], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_BLANK = "\u2581"
"""SentencePiece's mark of a blank; llama.cpp writes a blank in tokens that users define."""


def _sentence_piece(fields: Fields, tokens: list[str]) -> Tokenizer:
    """Build SentencePiece's BPE, which merges to the token with the best score, as BPE with merges;
    what has no token becomes its bytes.
    """
    for key, default in (("add_space_prefix", True), ("remove_extra_whitespaces", False)):
        name = f"{_PREFIX}{key}"
        if fields.flag(name) if name in fields else default:
            raise ValueError(
                f"{fields.origin}: {name}=true is not converted from GGUF for tokenizer 'llama'"
            )
    unknown = token_id(fields, "unknown")
    vocab = {token.replace(" ", _BLANK): i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError(f"{fields.origin}: tokenizer.ggml.tokens has a run of blanks twice")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_scored_merges(fields, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _BLANK)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _scored_merges(fields: Fields, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """List all pairs of tokens that make a token, the best first: first of all those that make
    tokens that users define, which SentencePiece never splits.
    """
    kinds, key = fields.integers(f"{_PREFIX}token_type"), f"{_PREFIX}scores"
    scores: Any = fields.value(key)
    if not isinstance(scores, list) or len(scores) != len(kinds):
        raise fields.wrong(key, f"a list of {len(kinds)} numbers, one for each token")
    found: list[tuple[bool, float, int, int, str, str]] = []
    for token, i in vocab.items():
        if kinds[i] not in (TokenType.NORMAL, TokenType.USER_DEFINED):
            continue
        is_normal = kinds[i] == TokenType.NORMAL
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((is_normal, -scores[i], -len(left), -len(right), left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _merges(fields: Fields) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    given: Any = fields.value(key)
    if not isinstance(given, list) or not all(isinstance(m, str) and " " in m for m in given):
        raise fields.wrong(key, "a list of texts with a blank in each")
    pairs = (merge.split(" ", 1) for merge in given)
    return [(first, second) for first, second in pairs]


def tokenizer_config(fields: Fields) -> dict[str, Any]:
    """Make tokenizer_config.json's content, including chat templates."""
    tokens = token_list(fields)
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.integer(f"{fields.text('general.architecture')}.context_length"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = token_id(fields, key)
        if index is not None:
            content[f"{kind}_token"] = tokens[index]
    start = "tokenizer.chat_template"
    named = [key for key in fields.values if key.startswith(f"{start}.")]
    templates = {key[len(start) + 1 :]: fields.text(key) for key in named}
    if start in fields:
        templates = {"default": fields.text(start), **templates}
    if templates.keys() == {"default"}:
        content["chat_template"] = templates["default"]
    elif templates:
        content["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return content


def token_list(fields: Fields) -> list[str]:
    """Return the vocabulary, by id."""
    key = "tokenizer.ggml.tokens"
    tokens: Any = fields.value(key)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise fields.wrong(key, "a list of texts")
    return tokens


def token_id(fields: Fields, kind: str) -> int | None:
    """Return the id of a special token (`bos`, `eos`, `padding`, ...), if the file has it."""
    key = f"tokenizer.ggml.{kind}_token_id"
    if key not in fields:
        return None
    found, count = fields.integer(key, 0), len(token_list(fields))
    if found >= count:
        raise fields.wrong(key, f"below {count}, the number of tokens")
    return found
