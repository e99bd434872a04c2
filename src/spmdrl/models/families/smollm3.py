"""SmolLM3: every fourth layer knows no positions."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import dense_mlp, norm_of, plain_attention, rope_of, windows_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mlp, rope = dense_mlp(fields, bias=fields.flag("mlp_bias")), rope_of(fields)
    layers = []
    for window, has_rope in zip(_windows(fields), _with_rope(fields), strict=True):
        attention = plain_attention(fields, rope if has_rope else None, window=window)
        layers.append(LayerSpec(mixer=attention, mlp=mlp))
    return Body(layers=tuple(layers), norm=norm_of(fields))


def _windows(fields: Fields) -> list[int | None]:
    windows = windows_of(fields)
    if any(window is not None for window in windows) and not fields.flag("use_sliding_window"):
        raise ValueError(
            f"{fields.origin}: layer_types has sliding_attention, but use_sliding_window is false: "
            "some of transformers' attentions have the window and some have not"
        )
    return windows


def _with_rope(fields: Fields) -> list[bool]:
    """Read for each layer whether it has rope: 1 in `no_rope_layers`, which may be too long."""
    flags, count = fields.integers("no_rope_layers"), fields.integer("num_hidden_layers")
    if len(flags) < count:
        raise fields.wrong("no_rope_layers", f"a list of 0 or 1 for each of {count} layers")
    return [flag != 0 for flag in flags[:count]]


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=read,
    tiny={"no_rope_layers": [1, 0]},
)
