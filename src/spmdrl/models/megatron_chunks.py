"""Parameters of a model's chunks on a Megatron rank, as slices of the Hugging Face name space.

Local parameters have the names that `sharding` gives them, so that a rollout on the same rank can
use those that are equal. The differences are:

- QKV is interleaved: for each key/value head the rows of its queries, of the key, of the value.
- The vocabulary is padded to a multiple of tp; no slice covers the padding.
- A pipeline stage holds whole layers, in `vpp` runs of them (interleaved schedule). Where these do
  not divide the layers, embedding and head count as a layer each.
- Experts are separate parameters, not stacked.

An adapter's parameters, and a scalar head with them, are a chunk's own: the base beside them does
not train.

All functions here are pure, and depend on Megatron only by the way it cuts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from spmdrl.models.adapters import Adapter, adapter_tensors
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Head, all_slices, fused_tensors
from spmdrl.models.tensors import Slice, in_layer, restrict
from spmdrl.models.widths import first_alike

EMBEDDING, HEAD, _NORM = "embed_tokens.weight", "head.weight", "norm.weight"
_EMBEDDING_MODULE, _HEAD_MODULE = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Numbers of parts that a role's model is cut into.

    Args:
        ep: number of parts of the experts, see `distributed.mesh`.
        vpp: number of runs of layers on each pipeline rank.
        fused_norms: whether norms belong to the projection after them (TransformerEngine).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    fused_norms: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a model chunk.

    Args:
        name: name as in `sharding`, with the layer's number in the whole model.
        module_name: Megatron's name, with the layer's number in the chunk.
        shared: whether it is the embedding of a tied model, which two pipeline stages hold.
        is_expert: whether it is an expert and other ranks hold others (ep > 1).
        is_added: whether it is of an adapter.
    """

    name: str
    module_name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    shared: bool = False
    is_expert: bool = False
    is_added: bool = False

    @property
    def is_replicated(self) -> bool:
        """Whether every tp rank holds it, since tensor parallelism does not divide it. It always
        divides experts; a rank with only padding of the vocabulary holds no slice of it.
        """
        return bool(self.slices) and not self.is_expert and all(s.is_whole for s in self.slices)

    @property
    def has_share(self) -> bool:
        """Whether each tp rank computes a share of its gradient, and the sum is the whole. A before
        a column-parallel matrix has its share through the rank's own outputs (and, with sequence
        parallelism, tokens), B after a row-parallel one that of the rank's own inputs.
        """
        return self.is_added and self.is_replicated


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive parameters of a chunk: a layer's, or those before or after all layers. Layers are
    alike, and of those that are, all parts have the same rows.

    Args:
        rows: the parameters, named as in the first layer of the model that is alike and as in the
            first layer of a chunk.
        kinds: for each row the index of the first one that is alike: a layer's experts are.
        layer: the layer's number in the model; None for the others, whose rows have their names.
        first: that of the first layer that is alike.
        number: the layer's number in the chunk.
    """

    rows: tuple[Parameter, ...]
    kinds: tuple[int, ...]
    layer: int | None = None
    first: int = 0
    number: int = 0

    def renamed(self, name: str) -> str:
        """The name of this layer's tensor that has `name` in the first layer."""
        return name if self.layer is None else in_layer(name, self.first, self.layer)

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters with their own names."""
        if self.layer is None:
            yield from self.rows
            return
        for row in self.rows:
            module = row.module_name.removeprefix(_FIRST_MODULE)
            yield replace(
                row,
                name=self.renamed(row.name),
                module_name=f"decoder.layers.{self.number}.{module}",
                slices=tuple(replace(s, name=self.renamed(s.name)) for s in row.slices),
            )


_FIRST_MODULE = "decoder.layers.0."


def padded_vocab(model: ModelConfig, tp: int) -> int:
    """Return the size of the vocabulary with padding, which tp divides."""
    return -(-model.vocab_size // tp) * tp


def counts_ends(num_layers: int, chunks: int) -> bool:
    """Return whether embedding and head count as a layer each, so that the first and the last of
    the chunks have one layer less: where the number of chunks divides the layers only then.
    """
    whole = num_layers + 2
    return num_layers % chunks > 0 and whole % chunks == 0 and whole >= 2 * chunks


def chunk_layers(model: ModelConfig, cut: Cut, pp_rank: int, chunk: int) -> range:
    """Return a chunk's layers: stage p has the p-th part of each of `vpp` parts of the model."""
    count = cut.pp * cut.vpp
    ends = int(counts_ends(model.num_layers, count))
    size = (model.num_layers + 2 * ends) // count
    first = (chunk * cut.pp + pp_rank) * size - ends
    return range(max(first, 0), min(first + size, model.num_layers))


def rank_chunks(
    model: ModelConfig,
    cut: Cut,
    tp_rank: int,
    pp_rank: int,
    head: Head = "lm",
    *,
    ep_rank: int = 0,
    with_score: bool = True,
) -> list[tuple[Parameter, ...]]:
    """List the chunks of one rank, each with its parameters in the order of Megatron's modules.

    Args:
        with_score: whether a scalar head is among them, see `adapter_chunks`.
    """
    chunks = rank_parts(model, cut, tp_rank, pp_rank, head, ep_rank=ep_rank, with_score=with_score)
    return [tuple(row for part in parts for row in part.parameters()) for parts in chunks]


def rank_parts(
    model: ModelConfig,
    cut: Cut,
    tp_rank: int,
    pp_rank: int,
    head: Head = "lm",
    *,
    ep_rank: int = 0,
    with_score: bool = True,
) -> list[tuple[Part, ...]]:
    """List the chunks of `rank_chunks` by parts; this takes as long as one layer of each kind."""
    firsts, layer_cut = first_alike(model), replace(cut, pp=1, vpp=1)
    chunks = []
    for chunk in range(cut.vpp):
        parts: list[Part] = []
        if pp_rank == 0 and chunk == 0:
            parts.append(whole_part([_vocab(model, cut, tp_rank, EMBEDDING, _EMBEDDING_MODULE)]))
        for number, layer in enumerate(chunk_layers(model, cut, pp_rank, chunk)):
            alike = _layer_part(model, layer_cut, tp_rank, ep_rank, firsts[layer])
            parts.append(replace(alike, layer=layer, number=number))
        if pp_rank == cut.pp - 1 and chunk == cut.vpp - 1:
            parts.append(whole_part(_last_rows(model, cut, tp_rank, head, with_score=with_score)))
        if model.tie_embeddings and head == "lm" and cut.pp > 1:
            parts = [_sharing(part) for part in parts]
        chunks.append(tuple(parts))
    return chunks


def whole_part(rows: Iterable[Parameter]) -> Part:
    """Return a part of rows that have their own names."""
    rows = tuple(rows)
    return Part(rows=rows, kinds=tuple(range(len(rows))))


def _sharing(part: Part) -> Part:
    """Mark the embedding of a tied model."""
    if part.layer is not None:
        return part
    return replace(part, rows=tuple(replace(r, shared=r.name == EMBEDDING) for r in part.rows))


def _last_rows(
    model: ModelConfig, cut: Cut, tp_rank: int, head: Head, *, with_score: bool
) -> list[Parameter]:
    """List what the last chunk holds after its layers."""
    ends = {name: t for name, t in fused_tensors(model, head).items() if name in (_NORM, HEAD)}
    held = all_slices(model, tp_rank, cut.tp, head, table=ends)
    rows = [_plain(held, _NORM, "decoder.final_layernorm.weight")]
    if head == "score":
        if with_score:
            rows.append(_plain(held, HEAD, _HEAD_MODULE))
    elif not model.tie_embeddings:
        rows.append(_vocab(model, cut, tp_rank, HEAD, _HEAD_MODULE))
    elif cut.pp > 1:
        rows.append(_vocab(model, cut, tp_rank, EMBEDDING, _HEAD_MODULE))
    return rows


def adapter_chunks(
    model: ModelConfig,
    cut: Cut,
    tp_rank: int,
    pp_rank: int,
    adapter: Adapter,
    head: Head = "lm",
) -> list[tuple[Parameter, ...]]:
    """List what each chunk of one rank holds over its base: an adapter's matrices, and in the last
    a scalar head. They are in the order of the forward pass.

    Their names are those of `adapters.adapter_tensors`; modules cannot have dots in names.
    """
    chunks = []
    for chunk in range(cut.vpp):
        own = chunk_adapter(model, adapter, chunk_layers(model, cut, pp_rank, chunk))
        table = dict(adapter_tensors(model, own))
        is_last = pp_rank == cut.pp - 1 and chunk == cut.vpp - 1
        if is_last and head == "score":
            table[HEAD] = fused_tensors(model, "score")[HEAD]
        held = all_slices(model, tp_rank, cut.tp, table=table)
        rows = [_plain(held, name, name.replace(".", "_")) for name in held]
        chunks.append(tuple(replace(row, is_added=row.name != HEAD) for row in rows))
    return chunks


def chunk_adapter(model: ModelConfig, adapter: Adapter, layers: range) -> Adapter:
    """Return the part of an adapter that is in these layers; it may have no target."""
    prefixes = tuple(f"layers.{layer}." for layer in layers)
    inside = {
        tensor.name
        for local, tensors in fused_tensors(model).items()
        if local.startswith(prefixes)
        for tensor in tensors
    }
    targets = {name: added for name, added in adapter.targets.items() if name in inside}
    return replace(adapter, targets=targets)


def _plain(held: Mapping[str, tuple[Slice, ...]], name: str, module_name: str) -> Parameter:
    slices = held[name]
    shape = (sum(s.rows for s in slices), *slices[0].size[1:])
    return Parameter(name=name, module_name=module_name, shape=shape, slices=slices)


def _vocab(model: ModelConfig, cut: Cut, tp_rank: int, name: str, module_name: str) -> Parameter:
    """Make a parameter with rows of a padded vocabulary; the last ranks may have only padding."""
    [tensor] = fused_tensors(model)[name]
    rows = padded_vocab(model, cut.tp) // cut.tp
    whole = Slice(name=tensor.name, shape=tensor.shape, start=(0, 0), stop=tensor.shape, offset=0)
    slices = restrict([whole], tp_rank * rows, (tp_rank + 1) * rows)
    shape = (rows, model.hidden_size)
    return Parameter(name=name, module_name=module_name, shape=shape, slices=slices)


@lru_cache(maxsize=256)  # every rank and every stage asks for those of its layers
def _layer_part(model: ModelConfig, cut: Cut, tp_rank: int, ep_rank: int, layer: int) -> Part:
    """Return a layer as if it were the first of its chunk."""
    local = f"layers.{layer}"
    table = {n: t for n, t in fused_tensors(model).items() if n.startswith(f"{local}.")}
    held = all_slices(model, tp_rank, cut.tp, ep_rank=ep_rank, ep_size=cut.ep, table=table)
    rows = tuple(_layer(model, cut, held, local))
    firsts: dict[object, int] = {}
    kinds = []
    for number, row in enumerate(rows):
        boxes = tuple((s.shape, s.start, s.stop, s.offset) for s in row.slices)
        kinds.append(firsts.setdefault((row.shape, row.is_expert, boxes), number))
    return Part(rows=rows, kinds=tuple(kinds), layer=layer, first=layer)


def _layer(
    model: ModelConfig, cut: Cut, held: Mapping[str, tuple[Slice, ...]], local: str
) -> Iterator[Parameter]:
    input_norm, post_norm = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    has_experts = f"{local}.mlp.router.weight" in held
    if cut.fused_norms:
        input_norm = "self_attention.linear_qkv.layer_norm_weight"
        if not has_experts:
            post_norm = "mlp.linear_fc1.layer_norm_weight"

    def plain(name: str, module_name: str) -> Parameter:
        return _plain(held, f"{local}.{name}", f"{_FIRST_MODULE}{module_name}")

    if not cut.fused_norms:
        yield plain("input_norm.weight", input_norm)
    yield plain("attention.out.weight", "self_attention.linear_proj.weight")
    if cut.fused_norms:
        yield plain("input_norm.weight", input_norm)
    for kind in ("weight", *["bias"] * model.attention.qkv_bias):
        whole = plain(f"attention.qkv.{kind}", f"self_attention.linear_qkv.{kind}")
        yield replace(whole, slices=_interleave(model, whole.slices))
    if model.attention.qk_norm != "none":
        yield plain("attention.q_norm.weight", "self_attention.q_layernorm.weight")
        yield plain("attention.k_norm.weight", "self_attention.k_layernorm.weight")
    yield plain("post_norm.weight", post_norm)
    if has_experts:
        yield plain("mlp.router.weight", "mlp.router.weight")
        yield from _experts(model, cut, held, local)
        return
    yield plain("mlp.gate_up.weight", "mlp.linear_fc1.weight")
    yield plain("mlp.down.weight", "mlp.linear_fc2.weight")


def _experts(
    model: ModelConfig, cut: Cut, held: Mapping[str, tuple[Slice, ...]], local: str
) -> Iterator[Parameter]:
    """Yield this rank's experts: modules one after another, or (TransformerEngine) weights of one
    grouped module, first all fc1 and then all fc2.
    """
    assert model.moe is not None
    count = model.moe.num_experts // cut.ep
    kinds = (("gate_up", "linear_fc1"), ("down", "linear_fc2"))

    parts = {kind: _equal_parts(held[f"{local}.mlp.experts.{kind}"], count) for kind, _ in kinds}

    def one(expert: int, kind: str, module: str) -> Parameter:
        rows, own = parts[kind][expert]
        name = f"local_experts.{expert}.{module}.weight"
        if cut.fused_norms:
            name = f"{module}.weight{expert}"
        return Parameter(
            name=f"{local}.mlp.experts.{expert}.{kind}",
            module_name=f"{_FIRST_MODULE}mlp.experts.{name}",
            shape=(rows, own[0].size[1]),
            slices=own,
            is_expert=cut.ep > 1,
        )

    if cut.fused_norms:
        yield from (one(expert, *kind) for kind in kinds for expert in range(count))
    else:
        yield from (one(expert, *kind) for expert in range(count) for kind in kinds)


def _equal_parts(slices: Sequence[Slice], count: int) -> list[tuple[int, tuple[Slice, ...]]]:
    """Divide slices, which are below one another, into parts of equally many rows: the rows, and
    the slices of each part. There can be hundreds of experts, so each looks at its own slices only.
    """
    rows = sum(piece.rows for piece in slices) // count
    starts = [piece.offset for piece in slices]
    found = []
    for first in range(0, count * rows, rows):
        near = slices[bisect_right(starts, first) - 1 : bisect_left(starts, first + rows)]
        found.append((rows, restrict(near, first, first + rows)))
    return found


def _interleave(model: ModelConfig, slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """Reorder slices of q, k and v, which are below one another, by key/value head."""
    groups = slices[1].rows // model.attention.head_dim
    result, offset = [], 0
    for group in range(groups):
        for part in slices:
            rows = part.rows // groups
            first = part.offset + group * rows
            for piece in restrict([part], first, first + rows):
                result.append(replace(piece, offset=offset))
                offset += piece.rows
    return tuple(result)
