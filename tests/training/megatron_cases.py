"""Megatron backends of tiny models on these ranks, and what transformers makes of the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from backend_runs import TEMPERATURE, train
from torch import Tensor
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config

from moe_models import by_file_name
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.model_classes import CAUSAL
from spmdrl.models.sharding import Head
from spmdrl.models.tensors import Slice
from spmdrl.planning.systems.megatron import import_backend
from spmdrl.training.megatron.checks import MegatronOptions
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

CPU = torch.device("cpu")

KINDS: dict[str, ModelConfig] = {
    "llama": tiny_config("LlamaForCausalLM", num_hidden_layers=4),
    # tied embeddings of an odd vocabulary, biases
    "qwen2": tiny_config(
        "Qwen2ForCausalLM", num_hidden_layers=4, tie_word_embeddings=True, vocab_size=101
    ),
    "qwen3": tiny_config("Qwen3ForCausalLM", num_hidden_layers=4, vocab_size=103),
    # in four chunks with 1, 2, 2 and 1 layers
    "uneven": tiny_config("Qwen3ForCausalLM", num_hidden_layers=6, vocab_size=103),
    "windowed": tiny_config("MistralForCausalLM", num_hidden_layers=2, sliding_window=3),
}
EXPERTS: dict[str, ModelConfig] = {
    # layer 2 is dense
    "qwen3_moe": tiny_config(
        "Qwen3MoeForCausalLM",
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[2],
    ),
    "mixtral": tiny_config(
        "MixtralForCausalLM",
        num_hidden_layers=4,
        num_local_experts=4,
        rms_norm_eps=1e-5,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        vocab_size=101,
    ),
}
KINDS |= EXPERTS

Case = tuple[dict[str, int], MegatronOptions, dict[str, Any]]
"""Degrees, how Megatron cuts, and what of `options` differs."""


def case(
    vpp: int = 1, sp: bool = False, given: dict[str, Any] | None = None, **degrees: int
) -> Case:
    return degrees, MegatronOptions(vpp=vpp, sp=sp), given or {}


def make_backend(
    world: World,
    model: ModelConfig,
    made: Case,
    *,
    role: str = "policy",
    trainable: bool = True,
    head: Head = "lm",
    checkpoint: Any = None,
    adapter: Adapter | None = None,
    base: Any = None,
) -> Any:
    degrees, megatron, changes = made
    return import_backend()(
        Mesh(role, range(world.size), degrees, "cpu"),
        model,
        LivelyCheckpoint(model) if checkpoint is None else checkpoint,
        options(**changes),
        CPU,
        megatron,
        trainable=trainable,
        head=head,
        adapter=adapter,
        base=base,
    )


def share(batch: Batch, mesh: Mesh) -> Batch:
    """Whole groups, in turn to each replica."""
    replica, count = mesh.coordinate("dp"), mesh.size("dp")
    groups = (batch["prompt_ids"] - 100).tolist()
    return batch.select([i for i, group in enumerate(groups) if group % count == replica])


def probe_rows() -> Batch:
    return make_rows([6, 3, 9, 4], 3, seed=5, seconds=True)


def gradients(backend: Any) -> LocalTensors:
    """Of `probe_rows`, divided by 7; they are cleared again."""
    rows = share(probe_rows(), backend.mesh)
    backend.forward_backward(rows, loss_fn, next_token(TEMPERATURE), normaliser=7.0)
    if isinstance(backend, TorchBackend):
        return {
            n: (g, s)
            for (n, g), s in zip(backend._take_gradients().items(), _slices(backend), strict=True)
        }
    backend._optimizer.reduce()
    from spmdrl.models.flat_pieces import flat_pieces

    found: LocalTensors = {}
    for shard, flat in backend._optimizer.gradients():
        for piece in flat_pieces(shard.parameter, shard.start, shard.start + len(flat)):
            values = flat[piece.start - shard.start : piece.stop - shard.start]
            name = f"{shard.parameter.name}:{piece.start}"
            found[name] = (values.reshape(piece.shape).clone(), piece.slices)
    backend._optimizer.clear()
    return found


def _slices(backend: TorchBackend) -> list[tuple[Slice, ...]]:
    return [leaf.slices for leaf in backend._trained]


def record_of(backend: Any) -> dict[str, Any]:
    """What `probe_rows` say, their gradients, and three optimizer steps."""
    rows = share(probe_rows(), backend.mesh)
    probe = backend.forward(rows, next_token(TEMPERATURE))
    found = {"probe": {n: probe[n] for n in ("logprobs", "entropy")}, "rows": rows}
    return {**found, "gradients": gradients(backend), **train(backend)}


def run_cases(world: World, cases: list[tuple[str, Case]]) -> list[dict[str, Any]]:
    return [record_of(make_backend(world, KINDS[kind], made)) for kind, made in cases]


def torch_records(world: World, kinds: Iterable[str] = tuple(KINDS)) -> dict[str, dict[str, Any]]:
    """The torch backend's record of these kinds of models."""
    found = {}
    for kind in kinds:
        config = KINDS[kind]
        mesh = Mesh("policy", [0], {}, "cpu")
        backend = TorchBackend(mesh, config, LivelyCheckpoint(config), options(), CPU)
        found[kind] = record_of(backend)
    return found


def reference_model(config: ModelConfig) -> Any:
    """transformers' model of `LivelyCheckpoint`."""
    family = config.architecture.removesuffix(CAUSAL)
    given = getattr(transformers, f"{family}Config")(**config.source)
    given._experts_implementation = "eager"
    model = getattr(transformers, config.architecture)(given).float().eval()
    checkpoint = LivelyCheckpoint(config)
    held: dict[str, Any] = dict(model.named_parameters())
    if config.moe is not None:
        held = by_file_name({name: p.data for name, p in held.items()}, config)
    with torch.no_grad():
        for name in checkpoint.names:
            shape = checkpoint.shape(name)
            whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
            held[name].copy_(checkpoint.read(whole))
    return model


def reference(config: ModelConfig) -> dict[str, Any]:
    """Log-probabilities and entropies [T] of `probe_rows`, logits by row, and gradients by name."""
    model, rows = reference_model(config), probe_rows()
    logprobs, entropy, logits = [], [], []
    for tokens in torch.split(rows["tokens"], rows.lengths.tolist()):
        found = model(tokens[None], use_cache=False).logits[0]
        scores = torch.log_softmax(found / TEMPERATURE, -1)[:-1]
        zero = scores.new_zeros(1)
        logprobs.append(torch.cat((zero, scores.gather(1, tokens[1:, None])[:, 0])))
        entropy.append(torch.cat((zero, -(scores.exp() * scores).sum(-1))))
        logits.append(found.detach())
    mask = rows["loss_mask"]
    columns = {"logprobs": torch.cat(logprobs), "entropy": torch.cat(entropy)}
    given = LossInput(
        outputs={name: column[mask] for name, column in columns.items()},
        columns={n: c[mask] for n, c in rows.tokens.items()},
        rows=rows.rows,
        row=rows.row_of_token()[mask],
        num_rows=len(rows),
    )
    (loss_fn(given)[0] / 7).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = by_file_name(found, config) if config.moe is not None else found
    masked: dict[str, Tensor] = {n: (c.detach() * mask) for n, c in columns.items()}
    return {"columns": masked, "logits": logits, "gradients": found}
