"""Comparison of a model directory's configuration with its files, reported when it is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.config_reading import resolved
from spmdrl.models.files.model_entries import NEXT_TOKENS
from spmdrl.models.files.peft_config import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from spmdrl.models.files.scalar_head import HEAD_NAMES, ScalarHead, foreign_parts
from spmdrl.models.files.stored_tensors import PLAIN, dtype_error
from spmdrl.models.files.weight_files import Checkpoint
from spmdrl.models.model_classes import class_name, is_scalar_class
from spmdrl.models.quantisation import QUANTIZATION
from spmdrl.models.sharding import SCORE, Head, global_shapes
from spmdrl.models.tensors import Slice

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_QUANTISED = re.compile(
    r"scales?$|scale_inv$|zeros?$|zero_point$|qweight$|g_idx$|absmax$|quant_|packed$|\.SCB$|"
    r"amax$|weight_shape$|weight_format$|_blocks$"
)
_ADAPTER = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.|\.adapters?[._]")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "moe_intermediate_size",
)

_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE)
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Inspection: `errors` are reasons to refuse the directory, `notes` are oddities that a user
    should see, `remarks` say what is usual for such a directory.
    """

    errors: tuple[str, ...]
    notes: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def refuse(self, path: Path) -> None:
        """Raise ValueError with the first error, and the command that shows the others."""
        if self.errors:
            others = len(self.errors) - 1
            more = f" (and {others} more: `spmdrl check-model {path}` lists them)" if others else ""
            raise ValueError(self.errors[0] + more)


def inspect(model: ModelConfig, checkpoint: Checkpoint, head: Head | None) -> Inspection:
    """Inspect names, shapes, dtypes and files, without reading a weight.

    Args:
        head: the head that will be read; None for only the body, whatever head there is.
    """
    wanted = dict(global_shapes(model, head or "lm"))
    if head is None:
        wanted.pop(HEAD, None)
    unexpected = sorted(checkpoint.names - wanted.keys())
    refused, odd = [], []
    for name in unexpected:
        reason = _reason(name, model)
        if reason is not None:
            refused.append(f"{checkpoint.entries[name].file}: tensor {name!r} {reason}")
        elif not _is_known(name, model, head):
            odd.append(name)
    notes = list(checkpoint.notes)
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        notes.append(f"{checkpoint.path}: the tensor {odd[0]!r}{more} is of no use to the model")
    foreign, quantised = _files(checkpoint.path)
    defaults = resolved(model.source, model.family.config_type, str(checkpoint.path))
    given = {"num_experts" if k == "num_local_experts" else k for k in model.source}
    absent = [k for k in _SIZES if defaults.get(k) is not None and k not in given]
    taken = f" (without {', '.join(absent)} in config.json, defaults count)" if absent else ""
    missing = [text + taken for text in _missing(checkpoint, wanted, unexpected)]
    shaped = list(_shaped(model, checkpoint, head, wanted, taken))
    return Inspection(
        errors=(*foreign, *refused, *missing, *shaped),
        notes=(*notes, *quantised, *_ids(model, checkpoint.path)),
    )


def _reason(name: str, model: ModelConfig) -> str | None:
    """Explain why a tensor that the model lacks makes the directory another model's; else None."""
    if _QUANTISED.search(name):
        return (
            f"belongs to quantised weights, which config.json's {QUANTIZATION} does not describe: "
            "give the directory of the model in float weights"
        )
    if _ADAPTER.search(name):
        return (
            "belongs to an adapter: give the base as the model and the adapter as "
            "roles.NAME.adapter.path, each in a directory of its own as PEFT saves it"
        )
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= model.num_layers:
        count = model.num_layers
        return (
            f"is of layer {layer[1]}, config.json has num_hidden_layers={count}; layers for "
            f"multi-token prediction need {NEXT_TOKENS}={int(layer[1]) - count + 1} there"
        )
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert is not None and (model.moe is None or int(expert[1]) >= model.moe.num_experts):
        count = 0 if model.moe is None else model.moe.num_experts
        return f"is of expert {expert[1]}, config.json has {count} experts"
    if not name.startswith(("model.", "lm_head.")) or name == HEAD:
        return None
    if name.endswith(".bias"):
        return f"is a bias that {model.architecture} does not have here"
    return f"is none of {model.architecture} as config.json describes it"


def _is_known(name: str, model: ModelConfig, head: Head | None) -> bool:
    """Whether an unused tensor is usual: another head, a tied one, or one that sizes determine."""
    is_tied = name == HEAD and model.tie_embeddings
    return is_tied or head is None or (head, name) == ("score", HEAD)


def _files(path: Path) -> tuple[list[str], list[str]]:
    foreign = [
        f"{path / file} is of an adapter, which is not loaded with the weights: move it to a "
        "directory of its own, and give that as roles.NAME.adapter.path or merge it with `spmdrl "
        "convert MODEL OUT --merge ADAPTER`; or remove it"
        for file in _ADAPTER_FILES
        if (path / file).exists()
    ]
    quantised = [
        f"{path / file} is of a quantised format, but config.json names none: it is not read"
        for file in _QUANTISED_FILES
        if (path / file).exists()
    ]
    return foreign[:1], quantised


def _ids(model: ModelConfig, path: Path) -> Iterator[str]:
    """Yield notes on ids of special tokens that have no row in the embedding."""
    given = {"eos_token_id": model.eos_ids, "bos_token_id": (model.bos_id,)}
    for key, ids in given.items():
        for token in ids:
            if token is not None and token >= model.vocab_size:
                yield (
                    f"{path}: {key} {token} has no row in the embedding (vocab_size "
                    f"{model.vocab_size}): it has no effect"
                )


def _missing(
    checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]], unexpected: list[str]
) -> list[str]:
    missing = sorted(wanted.keys() - checkpoint.names)
    if not missing:
        return []
    if missing == [HEAD]:
        found = "it holds a scalar head, so it is a reward or value model"
        tied = "if the embeddings are tied, config.json must say tie_word_embeddings: true"
        heads = {f"{name}.weight" for name in HEAD_NAMES}
        hint = found if heads & checkpoint.names else tied
        return [f"{checkpoint.path} has no tensor {HEAD!r}: {hint}"]
    if missing == [SCORE]:
        return [
            f"{checkpoint.path} has no tensor {SCORE!r}: a reward or value model has a scalar head "
            f"of that name, or of {', '.join(HEAD_NAMES[1:])}; train one with the flow "
            "reward_model, or give the role a new head with roles.NAME.head=normal (or zero)"
        ]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    tail = missing[0].removeprefix("model.")
    like = next((name for name in unexpected if name.endswith(f".{tail}") or name == tail), None)
    hint = "" if like is None else f": it holds {like!r}, under another prefix"
    return [f"{checkpoint.path} has no tensor {missing[0]!r}{more}{hint}"]


def _shaped(
    model: ModelConfig,
    checkpoint: Checkpoint,
    head: Head | None,
    wanted: dict[str, tuple[int, ...]],
    taken: str,
) -> Iterator[str]:
    """Yield errors about tensors of another shape or dtype than the model's."""
    for name in sorted(wanted.keys() & checkpoint.names):
        entry, shape = checkpoint.entries[name], wanted[name]
        if entry.dtype not in PLAIN:
            yield f"{entry.file}: tensor {name!r} {dtype_error(entry.dtype)}"
        if entry.shape == shape:
            continue
        yield (
            f"{entry.file}: tensor {name!r} has shape {entry.shape}, config.json asks for "
            f"{shape}{taken}"
        )
    if head == "lm" and model.tie_embeddings and HEAD in checkpoint.names:
        entry = checkpoint.entries[HEAD]
        if entry.shape != wanted[EMBEDDING] or entry.dtype not in PLAIN:
            yield (
                f"{entry.file}: tensor {HEAD!r} ({entry.dtype}, {entry.shape}) is not the tied "
                f"embedding ({wanted[EMBEDDING]}): {_UNTIE}"
            )


def head_of(found: ScalarHead) -> Head:
    """Return the head that a directory's model has: a scalar one by its class or its tensors."""
    names, is_tied = found.checkpoint.names, found.model.tie_embeddings
    has_scalar = found.module is not None and HEAD not in names and not is_tied
    return "score" if is_scalar_class(class_name(found.model.source)) or has_scalar else "lm"


def inspect_scalar(found: ScalarHead) -> Inspection:
    """Inspect a directory that is read with its scalar head."""
    if found.errors:
        report = inspect(found.model, found.checkpoint, None)
        return replace(report, errors=(*found.errors, *report.errors))
    report = replace(inspect(found.model, found.checkpoint, "score"), remarks=found.remarks)
    foreign = foreign_parts(found.model, found.checkpoint)
    return report if foreign is None else replace(report, errors=(foreign, *report.errors))


_UNTIE = "where the model has a head of its own, set tie_word_embeddings: false in config.json"


class WithTiedHead:
    """Weights of a tied model whose files also hold a head, which must equal the embedding.

    They are compared slice by slice, when the embedding is read.
    """

    def __init__(self, body: Checkpoint) -> None:
        self._body = body

    @property
    def names(self) -> frozenset[str]:
        return self._body.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._body.shape(name)

    def read(self, part: Slice) -> Tensor:
        values = self._body.read(part)
        if part.name == EMBEDDING:
            head = self._body.read(replace(part, name=HEAD))
            wide = torch.promote_types(values.dtype, head.dtype)
            if not torch.equal(values.to(wide), head.to(wide)):
                raise ValueError(
                    f"{self._body.entries[HEAD].file}: tensor {HEAD!r} differs from {EMBEDDING!r}, "
                    f"although tie_word_embeddings is true: {_UNTIE}"
                )
        return values
