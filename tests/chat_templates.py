"""Chat templates of the kinds that models have, written for the tests, and tokenizers for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Family:
    """Args:
    special: special tokens, of which the last ends a turn.
    words: other added tokens.
    """

    template: str
    special: tuple[str, ...]
    words: tuple[str, ...] = ()


_CALLS = (  # Hermes: the calls stand behind the content
    "{%- for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments if c.function.arguments is string else "
    "c.function.arguments | tojson }}"
    "}\n</tool_call>{% endfor -%}"
)
_RESULTS = (  # results that follow each other share a turn of the user
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif -%}"
)
_TOOLS = (
    "{%- if tools %}<|im_start|>system\n{{ tools | map('tojson') | join('\n') }}<|im_end|>\n"
    "{% endif -%}"
)
_CHATML = ("<|im_start|>", "<|im_end|>")
_HERMES = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

FAMILIES = MappingProxyType(
    {
        "chatml": Family(
            template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            special=_CHATML,
        ),
        "hermes": Family(
            template=_TOOLS + "{%- for m in messages %}"
            "{%- if m.role == 'tool' %}" + _RESULTS + "{%- else %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}" + _CALLS + "<|im_end|>\n{% endif %}{% endfor -%}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            special=_CHATML,
            words=_HERMES,
        ),
        "thinking": Family(  # thoughts before the last question are dropped, empty ones written
            template=_TOOLS + "{%- set ns = namespace(last=0) %}{% for m in messages %}"
            "{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
            "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
            "{%- for m in messages %}{% if m.role == 'tool' %}" + _RESULTS + "{% elif m.role == "
            "'assistant' %}{% set parts = m.content.split('</think>') %}<|im_start|>assistant\n"
            "{% if loop.index0 > ns.last %}<think>\n{{ parts[0].split('<think>')[-1].strip() "
            "if parts | length > 1 else '' }}\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}"
            + _CALLS
            + "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endif %}{% endfor -%}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
            "{% endif %}{% endif %}",
            special=_CHATML,
            words=(*_HERMES, "<think>", "</think>"),
        ),
        "headers": Family(  # Llama 3: headers, a trimmed content, a date
            template="{{ bos_token }}{{ '<|start_header|>system<|end_header|>\n\n' }}"
            "{{ date_string or strftime_now('%d %b %Y') }}<|eot|>"
            "{%- for m in messages %}<|start_header|>"
            "{{ 'ipython' if m.role == 'tool' else m.role }}"
            "<|end_header|>\n\n{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
            '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
            "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}"
            "{% endif %}<|eot|>{% endfor -%}"
            "{% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\n\n' }}"
            "{% endif %}",
            special=("<|start_header|>", "<|end_header|>", "<|eom|>", "<|eot|>"),
        ),
        "brackets": Family(  # Mistral: tools before the last question, calls as one list
            template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
            "{% if tools and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
            "[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}"
            "{% if m.tool_call_id is undefined or m.tool_call_id | length != 9 %}"
            "{{ raise_exception('an id of a call has nine letters') }}{% endif %}"
            '[RESULTS]{"content": {{ m.content | tojson }}, "id": "{{ m.tool_call_id }}"}[/RESULTS]'
            "{% elif m.tool_calls %}[CALLS][{% for c in m.tool_calls %}"
            "{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]</s>"
            "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
            "{% else %}{{ raise_exception('only user, tool and assistant') }}{% endif %}"
            "{% endfor %}",
            special=(
                "[INST]",
                "[/INST]",
                "[TOOLS]",
                "[/TOOLS]",
                "[CALLS]",
                "[RESULTS]",
                "[/RESULTS]",
                "</s>",
            ),
        ),
        "model": Family(  # Gemma: no system and no tools, roles alternate
            template="{{ bos_token }}{% for m in messages %}"
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must be user and assistant in turn') }}{% endif %}"
            "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
            "<end_turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
            special=("<turn>", "<end_turn>"),
        ),
        "channels": Family(  # gpt-oss: channels, other ends for calls and for the last turn
            template="{% set ns = namespace(name=none) %}<|start|>system<|message|>S<|end|>"
            "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
            "{% set c = m.tool_calls[0].function %}{% set ns.name = c.name %}"
            "<|start|>assistant to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
            "{{ c.arguments | tojson }}<|call|>{% elif m.role == 'assistant' %}"
            "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
            "{% elif m.role == 'tool' %}{% if ns.name is none %}"
            "{{ raise_exception('a result of no call') }}{% endif %}"
            "<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>"
            "{{ m.content | tojson }}<|end|>{% else %}"
            "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
            special=(
                "<|start|>",
                "<|message|>",
                "<|channel|>",
                "<|call|>",
                "<|return|>",
                "<|end|>",
            ),
        ),
        "roles": Family(  # no special tokens at all, and no end of a turn
            template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            special=("</s>",),
        ),
    }
)


def byte_tokenizer(family: Family, merges: Sequence[str] = ()) -> Any:
    """Byte-level BPE as GPT-2's, a token for each byte and for the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate([*alphabet, *merges])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[(m[0], m[1:]) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _made(core, family)


def space_tokenizer(family: Family) -> Any:
    """Pieces as sentencepiece makes them: a space before every text, unknown letters as bytes, and
    the added tokens among the pieces, as Llama 2 has them.
    """
    added = [*family.special, *family.words]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    letters = [chr(code) for code in range(33, 127)]
    words = ["\u2581", "\u2581a", "he", *added]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((b, -20.0) for b in bytes_)]
    pieces += [(letter, -5.0) for letter in letters] + [(word, -3.0) for word in words]
    core = Tokenizer(models.Unigram(vocab=pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _made(core, family, unk_token="<unk>")


def _made(core: Tokenizer, family: Family, **names: str) -> Any:
    core.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    core.add_tokens([AddedToken(t, normalized=False) for t in family.words])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=family.special[-1], **names
    )
    made.chat_template = family.template
    return made
