"""Megatron's distributed checkpoints (`torch_dist`) as tensors by their Hugging Face names.

Such a directory is one of `torch.distributed.checkpoint`, whose global tensors do not depend on the
ranks that wrote them; megatron-core is not needed to read it. Layers are stacked along a leading
dim, or numbered where they are not alike; experts are stacked behind that. Only the parts of the
tensor that is asked for are read, and at most one layer's tensor is held.
"""

from __future__ import annotations

import io
import re
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

from .config import ModelConfig, read_config
from .experts import EXPERT_NAMES
from .export import save_pretrained
from .sharding import global_shapes

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
"""Name within a layer -> Megatron's; where norms are fused into projections, the first."""


def is_torch_dist(path: str | Path) -> bool:
    return Path(path, ".metadata").is_file()


def convert_torch_dist(source: str | Path, like: str | Path, out_dir: str | Path) -> None:
    """Write `out_dir` as a Hugging Face directory with the weights of `source`.

    Args:
        source: trusted: its index is a pickle.
        like: a Hugging Face directory of the same architecture and sizes, which gives the
            configuration and the tokenizer.

    Raises:
        ValueError: `source` lacks a tensor or has another shape, naming it.
    """
    config = read_config(like)
    checkpoint = TorchDist(source, config)
    tensors = ((name, checkpoint.read(name)) for name in global_shapes(config))
    save_pretrained(tensors, config, out_dir, like)


class TorchDist:
    """The directory `path`, read as the model that `config` describes.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        if not is_torch_dist(path):
            raise ValueError(
                f"{path} has no .metadata: give the directory of one checkpoint (iter_0000100, "
                "say), saved with --ckpt-format torch_dist"
            )
        self._path, self._config = Path(path), config
        self._reader = FileSystemReader(path)
        self._metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, True)
        self._last: tuple[str, tuple[int, ...], Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """The whole tensor of that Hugging Face name."""
        shape = global_shapes(self._config)[name]
        if name in _WHOLE:
            # a vocabulary may be padded
            found = self._tensor(_WHOLE[name], ())[: shape[0]]
        else:
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
            assert match is not None, name
            found = self._of_layer(int(match[1]), match[2], match[3])
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{self._path} has {tuple(found.shape)} for {name}, which is {shape} in the given "
                "configuration: the checkpoint is of another model"
            )
        return found

    def _of_layer(self, layer: int, name: str, kind: str) -> Tensor:
        config = self._config
        names = EXPERT_NAMES.get(config.architecture)
        if name in _LAYER:
            return self._layer_tensor(layer, *_LAYER[name])
        if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            qkv = self._layer_tensor(layer, f"self_attention.linear_qkv.{kind}")
            per_group = config.num_heads // config.num_kv_heads
            groups = qkv.view(config.num_kv_heads, per_group + 2, config.head_dim, *qkv.shape[1:])
            parts = dict(zip("qkv", torch.split(groups, [per_group, 1, 1], dim=1), strict=True))
            return parts[name[-6]].reshape(-1, *qkv.shape[1:])
        if name in ("mlp.gate_proj", "mlp.up_proj"):
            gate, up = self._layer_tensor(layer, "mlp.linear_fc1.weight").chunk(2)
            return gate if name == "mlp.gate_proj" else up
        assert names is not None, name
        if f"{name}.weight" == names.router:
            return self._layer_tensor(layer, "mlp.router.weight")
        number = re.search(r"\.experts\.(\d+)\.", name)
        assert number is not None, name
        expert, plain = int(number[1]), f"{name}.weight".replace(f".{number[1]}.", ".{}.", 1)
        if plain == names.down:
            return self._layer_tensor(layer, "mlp.experts.experts.linear_fc2.weight", expert=expert)
        both = self._layer_tensor(layer, "mlp.experts.experts.linear_fc1.weight", expert=expert)
        gate, up = both.chunk(2)
        return gate if plain == names.gate else up

    def _layer_tensor(self, layer: int, *names: str, expert: int | None = None) -> Tensor:
        inner = () if expert is None else (expert,)
        for name in names:
            for key, at in (
                (f"decoder.layers.{name}", (layer, *inner)),
                (f"decoder.layers.{layer}.{name}", inner),
            ):
                if key in self._metadata.state_dict_metadata:
                    return self._tensor(key, at)
        raise ValueError(
            f"{self._path} has no tensor decoder.layers.{names[0]} of layer {layer}: the "
            "checkpoint is of another model, or of another format"
        )

    def _tensor(self, key: str, at: tuple[int, ...]) -> Tensor:
        """The global tensor at these indices of its leading dims; the last one read is kept."""
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
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        self._last = (key, at, target.view(sizes))
        return self._last[2]


class _Into(LoadPlanner):
    """Puts what is read into one tensor; everything else of a plan is made by the caller."""

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
