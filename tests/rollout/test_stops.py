"""Stop texts are found as if all tokens were decoded after each, at a fraction of the cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spmdrl.models.files.token_texts import TokenTexts, token_texts
from spmdrl.rollout.protocol import Finish, SamplingParams
from spmdrl.rollout.stops import StopRule, StopRules, StopTexts

SPECIAL = ("<|end|>", "<|turn|>")
ADDED = ("</think>", "<tool>")


Made = tuple[TokenTexts, Any]


def finished(core: Tokenizer) -> Made:
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0])
    return token_texts(made, chat=False), made


def bytes_of_text() -> Made:
    """GPT-2's: a token is some bytes, maybe not a whole character."""
    words = [" a", "ab", "b\n", "END", " END", "nd", "\n\n", "界", "世"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    coded = [level.pre_tokenize_str(word)[0][0] for word in words]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys([*alphabet, *coded]))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return finished(core)


def byte_fallback() -> Made:
    """Llama 2's: words with their blank, single bytes for what has no token."""
    words = ["▁a", "▁b", "a", "b", "▁END", "END", "E", "ND", "\n", "▁", "界", "ab"]
    names = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], *words]
    core = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return finished(core)


def word_pieces() -> Made:
    """BERT's: a mark says that a word goes on, and blanks before points go."""
    names = ["[UNK]", "a", "b", "##a", "##b", "end", "##end", "e", "##nd", ".", "!", "界"]
    core = Tokenizer(models.WordPiece(vocab={n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(cleanup=True)
    return finished(core)


STOPS: list[tuple[str, ...]] = [
    ("END",),
    ("\n\n",),
    (" END", "b\n"),
    ("世界",),
    ("界",),
    ("🙂",),
    ("🙂!", "é"),
    ("ab",),
    ("a b",),
    ("a.",),
    ("</think>",),
    ("b</think>a",),
    ("<tool>",),
    ("<|end|>",),
    ("a<|end|>",),
    ("<|turn|>ab", "zz"),
    ("b<|turn|><|end|>",),
]


def first_end(stop: Sequence[str], texts: TokenTexts, tokens: Sequence[int]) -> int | None:
    """How many tokens there are when one of the texts is there: all decoded after each."""
    for count in range(1, len(tokens) + 1):
        some = tokens[:count]
        for text in stop:
            is_special = any(token in text for token in texts.special)
            decode = texts.decode_all if is_special else texts.decode
            if text in decode(some):
                return count
    return None


MAKERS: list[Callable[[], Made]] = [bytes_of_text, byte_fallback, word_pieces]


@pytest.mark.parametrize("make", MAKERS)
def test_stop_texts_are_found_where_all_decoded_would_show_them(
    make: Callable[[], Made],
) -> None:
    texts, tokenizer = make()
    rng = random.Random(5)
    size = max(texts.special.values()) + 1 + len(ADDED)
    rare = list(range(size))
    words = [i for i in rare if len(texts.decode_all([i])) > 1 or i in texts.special.values()]
    letters = [i for i in rare if texts.decode([i]) in set("abEND. \n!")]
    emoji = list(tokenizer("🙂世界é")["input_ids"])
    ended = 0
    for stop in STOPS:
        rules = StopRules((), texts)
        for _ in range(25):
            prompt = rng.choices(words, k=rng.randrange(4))
            own: list[int] = []
            while len(own) < 30:
                kind = rng.random()
                if kind < 0.15:
                    own += emoji[: rng.randrange(1, len(emoji) + 1)]
                else:
                    own.append(rng.choice(words if kind < 0.6 else letters or rare))
            expected = first_end(stop, texts, own)
            rule = rules.of(SamplingParams(stop=stop, max_tokens=len(own)))
            found = None
            for count in range(1, len(own) + 1):
                finish = rule.check([*prompt, *own[:count]], count)
                if finish is not None:
                    found = (finish, count)
                    break
            wanted = (Finish.LENGTH, len(own)) if expected is None else (Finish.STOP, expected)
            assert found == wanted, (stop, own)
            ended += expected is not None
            before = StopTexts(stop, texts).before(own[: found[1]])
            assert not any(text in before for text in stop)
            if expected is None:
                assert before == texts.decode(own)
    assert ended > 60


def test_a_token_is_looked_at_once_and_decoded_again_only_where_it_may_end_a_text() -> None:
    texts, _ = bytes_of_text()
    calls = []

    def decode(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return texts.decode(ids)

    counted = TokenTexts(decode=decode, decode_all=texts.decode_all)
    rule = StopRules((), counted).of(SamplingParams(stop=("</answer>",), max_tokens=10_000))
    rng = random.Random(1)
    plain = [i for i in range(256) if texts.decode([i]).isascii() and texts.decode([i]) != ">"]
    tokens = rng.choices(plain, k=2000)
    for count in range(1, len(tokens) + 1):
        assert rule.check(tokens[:count], count) is None
    assert len(calls) <= 2 * len(plain)
    assert max(calls) <= 2


def test_special_tokens_do_not_push_letters_out_of_sight() -> None:
    texts, _ = bytes_of_text()
    ids = {texts.decode([i]): i for i in range(256)}
    turn = texts.special["<|turn|>"]
    rule = StopRules((), texts).of(SamplingParams(stop=("xy",), max_tokens=100))
    tokens = [ids["x"], *[turn] * 40, ids["y"]]
    assert rule.check(tokens, len(tokens)) is Finish.STOP


def test_a_special_token_ends_by_its_id_and_is_not_in_the_text() -> None:
    """Public reports: vllm#2123, vllm#792."""
    texts, _ = bytes_of_text()
    ids = {texts.decode([i]): i for i in range(256)}
    end = texts.special["<|end|>"]
    rule = StopRules((), texts).of(SamplingParams(stop=("<|end|>",), max_tokens=9))
    own = [ids["h"], ids["i"], end]
    assert rule.check(own[:2], 2) is None and rule.check(own, 3) is Finish.STOP
    assert StopTexts(("<|end|>",), texts).before(own) == "hi"
    # special tokens within a text: the rest of it is no part of the response either
    within = [ids["h"], texts.special["<|turn|>"], ids["i"], ids["!"], end]
    assert StopTexts(("!<|end|>",), texts).before(within) == "hi"


def test_a_decoder_alone_serves_where_no_token_is_special() -> None:
    texts, _ = bytes_of_text()
    ids = {texts.decode([i]): i for i in range(256)}
    rule = StopRule(SamplingParams(stop=("hi",), max_tokens=9), (ids["!"],), texts.decode)
    assert rule.check([ids["h"], ids["i"]], 2) is Finish.STOP
    assert rule.check([ids["h"], ids["!"]], 2) is Finish.STOP
    assert rule.check([ids["i"], ids["h"]], 2) is None
