"""Our trainer's computation of a model: log-probabilities, logits and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.attention import PackedAttention, make_kernel, resolve_attention
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.linear import wide_linear
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.routing import Routing
from spmdrl.models.sharding import global_shapes
from spmdrl.models.softcap import cap_logits
from spmdrl.training.options import TrainOptions
from spmdrl.training.packing import pack
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend

CPU = torch.device("cpu")
ONE_STREAM = 1 << 30
GRADIENT = "exp_avg/"
"""AdamW's first moment, which is the gradient itself if its beta is 0."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Results of one pass: log-probabilities [T], 0 outside the loss, and gradients by name."""

    logprobs: Tensor
    gradients: dict[str, Tensor]


def make_trainer(
    mesh: Mesh, model: ModelConfig, source: TensorSource, *, share: bool, budget: int = ONE_STREAM
) -> TorchBackend:
    """Make a backend in float32 whose optimizer moves nothing.

    Args:
        share: whether rows of one prompt compute it once.
        budget: tokens of a stream; 1: every row by itself.

    Raises:
        ValueError: the mesh's degrees do not fit the model.
    """
    options = TrainOptions(
        microbatch_tokens=budget,
        share_prompts=share,
        betas=(0.0, 0.999),
        lr=1e-30,
        clip_norm=math.inf,
    )
    return TorchBackend(mesh, model, source, options, CPU)


def train(backend: TorchBackend, rows: Batch, count: int) -> tuple[Tensor, LocalTensors]:
    """Return log-probabilities and this rank's gradients of their sum divided by `count`."""
    readout = next_token(entropy=False)
    logprobs = backend.forward(rows, readout)["logprobs"]
    backend.forward_backward(rows, _sum, readout, normaliser=float(count))
    backend.optim_step()
    state = backend.state_tensors()
    return logprobs, {n: value for n, value in state.items() if n.startswith(GRADIENT)}


def _sum(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    return given["logprobs"].sum(), {}


def whole(parts: Iterable[LocalTensors], model: ModelConfig) -> dict[str, Tensor]:
    """Assemble the global tensors from all ranks' parts; NaN where none has a value."""
    shapes = global_shapes(model)
    found: dict[str, Tensor] = {}
    for part in parts:
        for tensor, slices in part.values():
            for piece in slices:
                if piece.name not in found:
                    found[piece.name] = torch.full(shapes[piece.name], math.nan)
                box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
                rows = tensor[piece.offset : piece.offset + piece.rows]
                found[piece.name][box] = rows.reshape(piece.size)
    return found


def train_once(
    mesh: Mesh,
    model: ModelConfig,
    source: TensorSource,
    rows: Batch,
    count: int,
    *,
    share: bool,
    budget: int = ONE_STREAM,
) -> Trained:
    """Compute a pass with a new backend in this process."""
    backend = make_trainer(mesh, model, source, share=share, budget=budget)
    logprobs, gradients = train(backend, rows, count)
    return Trained(logprobs=logprobs, gradients=whole([gradients], model))


@torch.no_grad()
def logits_of(backend: TorchBackend, rows: Batch) -> tuple[Tensor, ...]:
    """Compute every row's logits [T, V], all rows packed in one stream."""
    # with one more token the row's last one is read as well
    end = rows["tokens"].new_zeros(1)
    texts = [torch.cat((part, end)) for part in torch.split(rows["tokens"], rows.lengths.tolist())]
    longer = Batch(
        lengths=rows.lengths + 1,
        tokens={"tokens": torch.cat(texts)},
        rows={"prompt_lengths": torch.ones_like(rows.lengths)},
    )
    [stream] = pack(longer, budget_tokens=ONE_STREAM, share_prompts=False)
    decoder, model = backend.body.decoder, backend.model
    kernel = make_kernel(resolve_attention("auto", CPU, torch.float32))
    options = attention_options(model)
    attend = PackedAttention(stream.spans, kernel, options=options, dtype=torch.float32, device=CPU)
    routing = None if model.moe is None else Routing(model)
    hidden = decoder(stream.tokens, stream.positions, attend, routing=routing)
    logits = wide_linear(hidden[stream.predict], decoder.head_weight()).float()
    logits = cap_logits(logits, model.logit_softcap)
    # rows come in the order of the stream
    return torch.split(logits[stream.destination.argsort()], rows.lengths.tolist())
