"""Readouts: the head, the places and the columns by which a pass over rows reads a model."""

from __future__ import annotations

from dataclasses import dataclass
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
        token, into row columns.
    temperature: divisor of the logits.
    """

    columns: tuple[str, ...]
    head: Head
    places: Places
    temperature: float = 1.0

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
