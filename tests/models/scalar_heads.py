"""The project's own scores of whole rows, computed plainly."""

from __future__ import annotations

from pathlib import Path

import torch

from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import open_model
from tiny_model import load_into


def decoder_of(directory: Path, **options: object) -> Decoder:
    config, weights = open_model(directory, head="score", **options)  # type: ignore[arg-type]
    decoder = Decoder(config, device="cpu", head="score")
    load_into(decoder, weights)
    return decoder


def scores(decoder: Decoder, rows: list[list[int]], skipped: int | None = None) -> torch.Tensor:
    """Score rows at their last token that is not `skipped`."""

    def dense(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    found = []
    for row in rows:
        hidden = decoder(torch.tensor(row), torch.arange(len(row)), dense)
        kept = [i for i, token in enumerate(row) if token != skipped]
        read = hidden[kept[-1] if kept else 0]
        bias = None if decoder.head is None else decoder.head.bias
        found.append((read @ decoder.head_weight().T)[0] + (0 if bias is None else bias[0]))
    return torch.stack(found).detach()
