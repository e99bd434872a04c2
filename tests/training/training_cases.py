"""Options and log-probabilities computed row by row without any packing, for the tiny models and
rows of the contract.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.models.decoder import Decoder
from spmdrl.testing.cases import VOCAB as VOCAB
from spmdrl.testing.cases import LivelyCheckpoint as LivelyCheckpoint
from spmdrl.testing.cases import loss_fn as loss_fn
from spmdrl.testing.cases import make_rows as make_rows
from spmdrl.testing.cases import tiny_config as tiny_config
from spmdrl.testing.subject import TOTAL_STEPS, TRAIN
from spmdrl.training.options import TrainOptions


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{**TRAIN, "total_steps": TOTAL_STEPS, **changes})


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def naive_logprobs(decoder: Decoder, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of every token [T], row by row; 0 at each row's first token."""
    logprobs, entropy = [], []
    for tokens in torch.split(batch["tokens"], batch.lengths.tolist()):
        hidden = decoder(tokens, torch.arange(len(tokens)), dense)
        scores = torch.log_softmax(hidden @ decoder.head_weight().T / temperature, -1)[:-1]
        zero = scores.new_zeros(1)
        logprobs.append(torch.cat((zero, scores.gather(1, tokens[1:, None])[:, 0])))
        entropy.append(torch.cat((zero, -(scores.exp() * scores).sum(-1))))
    return torch.cat(logprobs), torch.cat(entropy)
