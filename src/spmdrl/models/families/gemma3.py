"""Gemma 3, text (https://arxiv.org/abs/2503.19786): Gemma 2's layers with norms of queries and keys
in place of the scores' cap, and another rope in layers with a window.
"""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.families.gemma2 import NAMES, UNREAD, attention_of, body_of, layer_of
from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import FULL, SLIDING, layer_kinds, ropes_of, windows_of
from spmdrl.models.fields import Fields


def read(fields: Fields) -> Body:
    # attn_logit_softcapping is a key of the configuration that transformers does not use
    ropes, kinds = ropes_of(fields, FULL, SLIDING), layer_kinds(fields, FULL, SLIDING)
    layers = []
    for kind, window in zip(kinds, windows_of(fields), strict=True):
        attention = replace(attention_of(fields, ropes[kind], window), qk_norm="heads")
        layers.append(layer_of(fields, attention))
    return body_of(fields, layers)


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read,
    names=NAMES,
    vllm_reads_windows=True,
    unread=UNREAD,
)
