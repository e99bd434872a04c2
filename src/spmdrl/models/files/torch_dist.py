"""Megatron's distributed checkpoints (`torch_dist`) as tensors by their Hugging Face names.

Such a directory is one of `torch.distributed.checkpoint`, whose global tensors do not depend on the
ranks that wrote them; megatron-core is not needed to read it. Layers are stacked along a leading
dim, or numbered if they differ; experts are stacked along the next dim. Only the required parts of
a tensor are read, and at most one layer's tensor is kept.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.sharding import global_shapes

_WHOLE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}
_LAYER = {
    "input_layernorm": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "post_attention_layernorm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "self_attn.o_proj": ("self_attention.linear_proj.weight",),
    "self_attn.q_norm": ("self_attention.q_layernorm.weight",),
    "self_attn.k_norm": ("self_attention.k_layernorm.weight",),
    "mlp.down_proj": ("mlp.linear_fc2.weight",),
}
"""Name within a layer -> Megatron's; the first of two if norms are fused into projections."""


_STATE = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param")
"""Prefixes of tensors that belong to the state of the training, not to the model."""

_PADDED_TO = (*range(1, 65), *(128 << i for i in range(7)))
"""Numbers that the vocabulary's rows may be a multiple of: tp here, 128 tp in Megatron-LM."""


@dataclass(frozen=True, kw_only=True)
class _FilePlace:
    """A tensor of the checkpoint, and the indices of its leading dims (layer, expert)."""

    key: str
    at: tuple[int, ...] = ()


def is_torch_dist(path: str | Path) -> bool:
    return Path(path, ".metadata").is_file()


def convert_torch_dist(source: str | Path, like: str | Path, out_dir: str | Path) -> None:
    """Write `out_dir` as a Hugging Face directory with the weights of `source`.

    Args:
        source: directory of the checkpoint, which must be trusted: its index is a pickle.
        like: a Hugging Face directory of the same architecture and sizes, which gives the
            configuration and the tokenizer.

    Raises:
        ValueError: `source` lacks a tensor, has one that is not converted, or one of another
            shape; the message names it.
    """
    model = read_config(like)
    checkpoint = TorchDist(source, model)
    checkpoint.check()
    tensors = ((name, checkpoint.read(name)) for name in global_shapes(model))
    save_pretrained(tensors, model, out_dir, like)


class TorchDist:
    """The directory `path`, read as the model that `model` describes.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, path: str | Path, model: ModelConfig) -> None:
        if not is_torch_dist(path):
            raise ValueError(
                f"{path} has no .metadata: give the directory of one checkpoint (iter_0000100, "
                "say), saved with --ckpt-format torch_dist"
            )
        self._path, self._model = Path(path), model
        self._reader = FileSystemReader(path)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        # a damaged pickle raises errors of any kind
        except Exception as error:
            raise ValueError(
                f"{path}/.metadata cannot be read: {type(error).__name__}: {error}"
            ) from error
        self._reader.set_up_storage_reader(self._metadata, True)
        self._last: tuple[str, tuple[int, ...], Tensor] | None = None

    def check(self) -> None:
        """Raise ValueError unless all tensors are converted, with all layers and experts."""
        model = self._model
        places = [self._place(name) for name in global_shapes(model)]
        counts: dict[str, tuple[int, ...]] = {}
        for place in places:
            counts[place.key] = tuple(
                max(a, b + 1)
                for a, b in zip_longest(counts.get(place.key, ()), place.at, fillvalue=0)
            )
        for key, held in self._metadata.state_dict_metadata.items():
            is_state = key.startswith(_STATE) or key.endswith("_extra_state")
            if is_state or not isinstance(held, TensorStorageMetadata):
                continue
            if key not in counts:
                raise ValueError(
                    f"{self._path}: the tensor {key!r} {tuple(held.size)} has no place in the "
                    f"given configuration ({model.architecture}): the checkpoint is of another "
                    "model"
                )
            stacked = tuple(held.size[: len(counts[key])])
            if stacked != counts[key]:
                raise ValueError(
                    f"{self._path}: the tensor {key!r} is of {stacked} layers (and experts), the "
                    f"given configuration has {counts[key]}: the checkpoint is of another model"
                )

    def read(self, name: str) -> Tensor:
        """Read the whole tensor of a Hugging Face name."""
        shape, place = global_shapes(self._model)[name], self._place(name)
        found = self._part(name, self._tensor(place))
        if place.key in (_WHOLE["model.embed_tokens.weight"], _WHOLE["lm_head.weight"]):
            found = self._without_padding(place.key, found, shape[0])
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{self._path} has {tuple(found.shape)} for {name}, which is {shape} in the given "
                "configuration: the checkpoint is of another model"
            )
        return found

    def _without_padding(self, key: str, found: Tensor, rows: int) -> Tensor:
        """Remove a vocabulary's padding, which must reach a multiple of one of `_PADDED_TO`."""
        count = len(found)
        if any(count % k == 0 and rows <= count < rows + k for k in _PADDED_TO):
            return found[:rows]
        raise ValueError(
            f"{self._path}: the tensor {key!r} has {count} rows, the given configuration has "
            f"vocab_size={rows}: more than padding; give a --like of the same vocabulary"
        )

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """Return the part of the checkpoint's (perhaps fused) tensor that is the named one."""
        model = self._model
        last = name.split(".")[-2]
        if last in ("q_proj", "k_proj", "v_proj"):
            per_group = model.attention.num_heads // model.attention.num_kv_heads
            groups = whole.view(
                model.attention.num_kv_heads,
                per_group + 2,
                model.attention.head_dim,
                *whole.shape[1:],
            )
            parts = dict(zip("qkv", torch.split(groups, [per_group, 1, 1], dim=1), strict=True))
            return parts[last[0]].reshape(-1, *whole.shape[1:])
        if last in ("gate_proj", "w1"):
            return whole.chunk(2)[0]
        return whole.chunk(2)[1] if last in ("up_proj", "w3") else whole

    def _place(self, name: str) -> _FilePlace:
        """Find the checkpoint's tensor that holds the tensor of a Hugging Face name."""
        if name in _WHOLE:
            return _FilePlace(key=_WHOLE[name])
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert match is not None, name
        layer, inner, kind = int(match[1]), match[2], match[3]
        if inner in _LAYER:
            return self._find(layer, *_LAYER[inner])
        if inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return self._find(layer, f"self_attention.linear_qkv.{kind}")
        if inner in ("mlp.gate_proj", "mlp.up_proj"):
            return self._find(layer, "mlp.linear_fc1.weight")
        family = self._model.family
        if inner == family.module("mlp.router"):
            return self._find(layer, "mlp.router.weight")
        number = re.search(r"\.experts\.(\d+)\.", inner)
        assert number is not None, name
        down = family.module("mlp.experts.down").format(number[1])
        is_down = inner == down
        fused = f"mlp.experts.experts.linear_fc{2 if is_down else 1}.weight"
        return self._find(layer, fused, expert=int(number[1]))

    def _find(self, layer: int, *names: str, expert: int | None = None) -> _FilePlace:
        """Find the first of `names` that exists, stacked over all layers or for this layer only."""
        inner = () if expert is None else (expert,)
        for name in names:
            for place in (
                _FilePlace(key=f"decoder.layers.{name}", at=(layer, *inner)),
                _FilePlace(key=f"decoder.layers.{layer}.{name}", at=inner),
            ):
                if place.key in self._metadata.state_dict_metadata:
                    return place
        raise ValueError(
            f"{self._path} has no tensor decoder.layers.{names[0]} of layer {layer}: the "
            "checkpoint is of another model, or of another format"
        )

    def _tensor(self, place: _FilePlace) -> Tensor:
        """Read a tensor, or return it if it is the one that was read last."""
        key, at = place.key, place.at
        if self._last is not None and self._last[:2] == (key, at):
            return self._last[2]
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{self._path} has no tensor {key}")
        sizes = found.size[len(at) :]
        target = torch.empty((*(1 for _ in at), *sizes), dtype=found.properties.dtype)
        offsets = torch.Size((*at, *(0 for _ in sizes)))
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=target.shape)
        items = create_read_items_for_chunk_list(key, found, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        # files that are missing, cut or of another checkpoint raise errors of any kind
        except Exception as error:
            raise ValueError(
                f"{self._path}: the tensor {key!r} cannot be read: {type(error).__name__}: {error}"
            ) from error
        self._last = (key, at, target.view(sizes))
        return self._last[2]


class _Into(LoadPlanner):
    """Planner that reads into one tensor; the caller makes the rest of the plan."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("no bytes were asked for")

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
