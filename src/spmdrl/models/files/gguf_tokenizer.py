"""The tokenizer of a GGUF file, rebuilt from its vocabulary and merges."""

from __future__ import annotations

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from spmdrl.models.fields import Fields

_PREFIX = "tokenizer.ggml."
_KNOWN = (
    *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"),
)
"""Keys that are read, or that llama.cpp ignores for byte-level BPE; other keys change tokens."""


def build_tokenizer(fields: Fields) -> Tokenizer:
    """Build byte-level BPE from GGUF's vocabulary, merges, token types and pre-tokenizer.

    `tokenizer.ggml.pre: smollm` means GPT-2's splits with every digit separate (llama.cpp's
    LLAMA_VOCAB_PRE_TYPE_SMOLLM); without the digit rule numbers get other tokens than in training.
    """
    pre_key, add_key = "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
    kind = fields.text("tokenizer.ggml.model")
    pre = fields.text(pre_key) if pre_key in fields else "gpt-2"
    splits: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    if kind != "gpt2" or pre not in splits:
        raise ValueError(
            f"{fields.origin}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported are 'gpt2' with {', '.join(splits)}"
        )
    if "tokenizer.ggml.add_eos_token" in fields and fields.flag("tokenizer.ggml.add_eos_token"):
        raise ValueError(
            f"{fields.origin}: tokenizer.ggml.add_eos_token=true is not converted from GGUF: every "
            "prompt would end"
        )
    for key, value in fields.values.items():
        rule = key.removeprefix(_PREFIX)
        if rule != key and value and rule not in _KNOWN and not rule.endswith("_token_id"):
            raise ValueError(f"{fields.origin}: the key {key!r} is not converted from GGUF")
    tokens = token_list(fields)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        i = next(i for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(
            f"{fields.origin}: tokenizer.ggml.tokens has {tokens[i]!r} twice, at {i} and at "
            f"{vocab[tokens[i]]}"
        )
    merges = _merges(fields)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[pre], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    for token, given in zip(tokens, fields.integers("tokenizer.ggml.token_type"), strict=True):
        if given in special:
            control = given == TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=control, normalized=False)])
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
        "model_max_length": fields.integer("llama.context_length"),
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
