"""Readouts: the head, the places and the columns by which a pass over rows reads a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from spmdrl.models.sharding import Head

Places = Literal["loss_tokens", "rows"]


@dataclass(frozen=True, kw_only=True)
class Readout:
    """Args:
    columns: names of the columns that are read, in order; each is float32 [N].
    head: the head that the model must have.
    places: `loss_tokens` reads once per token of the loss mask, at the place before it (the state
        in which the token was chosen), into token columns. `rows` reads once per row, at its last
        token (see `skipped`), into row columns.
    temperature: divisor of the logits.
    skipped: with `rows`, the token that is passed over at a row's end: the last token that is
        another one is read; None reads the last token.
    """

    columns: tuple[str, ...]
    head: Head
    places: Places
    temperature: float = 1.0
    skipped: int | None = None

    @property
    def is_per_token(self) -> bool:
        return self.places == "loss_tokens"


def next_token(temperature: float = 1.0, *, entropy: bool = True) -> Readout:
    """Read `logprobs`, log p(x_t | x_<t), and if wanted the distribution's `entropy` at loss
    tokens, which takes another pass over all logits.
    """
    return Readout(
        columns=("logprobs", "entropy") if entropy else ("logprobs",),
        head="lm",
        places="loss_tokens",
        temperature=temperature,
    )


VALUES = Readout(columns=("values",), head="score", places="loss_tokens")
"""`values`: V(x_<t), the value of the state in which loss token t was chosen."""

SCORES = Readout(columns=("scores",), head="score", places="rows")
"""`scores`: the scalar of a whole row, read at its last token."""


def scores(skipped: int | None = None) -> Readout:
    """Read `scores` at each row's last token that is not `skipped`."""
    return replace(SCORES, skipped=skipped)
