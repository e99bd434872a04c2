"""PEFT directories: adapter_config.json and the tensors of adapter_model.safetensors.

PEFT names tensors after its wrapped model: `base_model.model.` and our name. What it would load
with a warning (tensors that match no module, or are missing) is refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spmdrl.models.adapters import (
    Adapter,
    ExpertsForm,
    LowRank,
    adapter_shapes,
    check_experts,
    is_lora_name,
    possible_targets,
)
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.files.peft_config import (
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    LoraFile,
    read_lora_file,
)
from spmdrl.models.files.peft_experts import SharedExperts, Stack, WithStacks, find_stacks
from spmdrl.models.files.stored_tensors import PLAIN, StoredTensor, dtype_error, read_header
from spmdrl.models.files.weight_files import Checkpoint
from spmdrl.models.sharding import SCORE, Head, global_shapes

PREFIX = "base_model.model."
"""Start of PEFT's names, before the base model's."""

_WEIGHT = ".weight"
_LORA = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB])(\.(?P<adapter>[^.]+))?\.weight")
_SCORE = re.compile(r"score(\.modules_to_save(\.(?P<adapter>[^.]+))?)?\.weight")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch.compile, FSDP and checkpointing leave."""

_HEAD_MODULE, _EMBEDDING_MODULE = "lm_head", "model.embed_tokens"


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """A PEFT directory that fits a model.

    Args:
        file: its configuration.
        tensors: its tensors by our names; the scalar head's too, if it has one.
    """

    file: LoraFile
    adapter: Adapter
    tensors: WithStacks


def read_adapter(
    path: str | Path, model: ModelConfig, *, head: Head = "lm", experts: ExpertsForm = "each"
) -> Adapter:
    """Read an adapter without its values: configuration, and names and shapes of its tensors.

    Args:
        head: `score` allows the adapter a scalar head.
        experts: whether all experts of a layer share one A and B.

    Raises:
        ValueError: see `open_peft`.
    """
    return open_peft(path, model, head=head, experts=experts).adapter


def open_adapter(
    path: str | Path,
    model: ModelConfig,
    *,
    head: Head = "lm",
    experts: ExpertsForm = "each",
    base: str | Path | None = None,
    warn: Callable[[str], None] | None = None,
) -> TensorSource:
    """Open an adapter's tensors, by our names; the scalar head's too, if it has one.

    Args:
        head: `score` allows the adapter a scalar head.
        experts: whether all experts of a layer share one A and B; all of them are read then, and
            must be equal.
        base: directory of the model, compared with the name of the one that it was trained on.
        warn: callback with each oddity that is no reason to refuse the directory.

    Raises:
        ValueError: see `open_peft`; or experts that shall share A and B have unlike ones in the
            file, and the first of these is named.
    """
    opened = open_peft(path, model, head=head, experts=experts)
    if warn is not None and base is not None:
        for note in other_base(opened.file, base):
            warn(note)
    if not opened.adapter.shares_experts:
        return opened.tensors
    shared = SharedExperts(opened.tensors, opened.adapter)
    if (unlike := shared.find_unlike()) is not None:
        raise ValueError(
            f"{Path(path) / ADAPTER_WEIGHTS}: {unlike[1]} differs from {unlike[0]}, and experts "
            "that share A and B have equal copies in files: read it without experts: shared"
        )
    return shared


def other_base(file: LoraFile, base: str | Path) -> list[str]:
    """Make the note about an adapter that was trained on a model of another name, if it was."""
    if file.base is None or Path(file.base).name == Path(base).absolute().name:
        return []
    return [
        f"{file.origin}: base_model_name_or_path is {file.base!r}, and the base here is {base}: "
        "the adapter is right only if they are the same model"
    ]


def open_peft(
    path: str | Path, model: ModelConfig, *, head: Head = "lm", experts: ExpertsForm = "each"
) -> PeftFiles:
    """Read a PEFT directory but for its values, and compare it with a model.

    Args:
        head: `score` allows the adapter a scalar head.
        experts: whether all experts of a layer share one A and B in the adapter that is described;
            the tensors are those of the file, where every expert has its own.

    Raises:
        ValueError: a file is missing or damaged, a field has a value without meaning here, or
            tensors and fields do not fit each other or the model; the message names the file, the
            field or tensor, and the fix.
        OSError: a file cannot be read.
    """
    file = read_lora_file(path)
    weights = _weights_file(Path(path))
    entries = _by_our_names(weights)
    stacks = find_stacks(file, model)
    targets = _targets(file, model, stacks)
    adapter = Adapter(targets=targets, dropout=file.dropout)
    try:
        check_experts(model, targets)
    except ValueError as error:
        raise ValueError(f"{file.origin}: {error}") from None
    ours = dict(adapter_shapes(model, adapter))
    stacked = frozenset[str]().union(*(stack.names for stack in stacks))
    shapes = {name: shape for name, shape in ours.items() if name not in stacked}
    for stack in stacks:
        shapes |= stack.shapes
    if file.has_head and (SCORE in entries or file.saved):
        shapes[SCORE] = ours[SCORE] = (1, model.hidden_size)
        if head != "score":
            raise ValueError(
                f"{file.origin}: the adapter has a scalar head (score.weight), so it is one of a "
                "reward or value model: give it to such a role"
            )
    _check_names(weights, file, entries, shapes, model)
    _check_shapes(weights, entries, shapes)
    return PeftFiles(
        file=file,
        adapter=replace(adapter, shares_experts=experts == "shared"),
        tensors=WithStacks(Checkpoint(Path(path), entries), stacks, ours),
    )


def _low_rank(file: LoraFile, name: str) -> LowRank:
    rank, alpha = file.rank_of(name), file.alpha_of(name)
    return LowRank(rank=rank, scale=alpha / (math.sqrt(rank) if file.rslora else rank))


def _weights_file(path: Path) -> Path:
    file = path / ADAPTER_WEIGHTS
    if file.is_file():
        return file
    if (path / ADAPTER_PICKLE).is_file():
        raise ValueError(
            f"{path / ADAPTER_PICKLE} is a pickle, as PEFT wrote before 0.6, and only "
            f"{ADAPTER_WEIGHTS} is read: load the directory with PEFT and save it again "
            "(save_pretrained)"
        )
    others = sorted(other.name for other in path.glob("adapter_model*"))
    found = f"; it has {', '.join(others)}" if others else ""
    raise ValueError(f"{file} does not exist{found}: give the directory of a PEFT adapter")


def _by_our_names(file: Path) -> dict[str, StoredTensor]:
    """Read the header; a key that is no adapter's tensor is refused."""
    entries: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    adapters: set[str | None] = set()
    for key, entry in read_header(file).items():
        own = key
        for wrapper in _WRAPPERS:
            own = own.replace(wrapper, "")
        own = own.removeprefix(PREFIX)
        if (found := _LORA.fullmatch(own)) is not None:
            name = f"{found['module']}.{found['factor']}{_WEIGHT}"
        elif (found := _SCORE.fullmatch(own)) is not None:
            name = SCORE
        else:
            raise ValueError(f"{file}: tensor {key!r} {_foreign(own)}")
        adapters.add(found["adapter"])
        if name in entries:
            raise ValueError(f"{file}: {key!r} and {keys[name]!r} are both {name!r}")
        entries[name], keys[name] = entry, key
    if len(named := {name for name in adapters if name is not None}) > 1:
        raise ValueError(
            f"{file} holds several adapters ({', '.join(sorted(named))}): save one of them with "
            "PEFT (save_pretrained, selected_adapters)"
        )
    return entries


def _foreign(key: str) -> str:
    """Explain why a tensor is no A or B of a matrix."""
    merge = "merge the adapter into its base with PEFT (merge_and_unload)"
    if "lora_embedding_" in key:
        return f"adapts an embedding, which no adapter here does: {merge}"
    if "lora_magnitude_vector" in key:
        return f"is of DoRA, which is not offered: {merge}"
    if key.endswith(".bias"):
        return f"is a trained bias, which is not read: {merge}"
    if key in ("model.embed_tokens.weight", "lm_head.weight"):
        return (
            f"is a whole embedding, which PEFT saves if it was trained or resized: {merge}, or "
            "save it again with save_embedding_layers=False if it was neither"
        )
    return "is no A or B of an adapter: save the directory with PEFT (save_pretrained)"


def _targets(file: LoraFile, model: ModelConfig, stacks: Sequence[Stack]) -> dict[str, LowRank]:
    """Return the additions that the configuration describes."""
    possible = possible_targets(model)
    others = sorted({name.rpartition(".")[0] for name in global_shapes(model)} | {_HEAD_MODULE})
    modules = [name.removesuffix(_WEIGHT) for name in possible]
    for module in (_HEAD_MODULE, _EMBEDDING_MODULE):
        if file.selects(module, is_linear=False):
            tied = ", which are tied here" if model.tie_embeddings else ""
            raise ValueError(
                f"{file.origin}: target_modules selects {module}, and embeddings and head{tied} "
                "are not adapted: exclude it, and train the adapter without it"
            )
    stack_of = {name: stack.name for stack in stacks for each in stack.weights for name in each}
    chosen = {
        name: _low_rank(file, stack_of.get(name, module))
        for name, module in zip(possible, modules, strict=True)
        if name in stack_of or file.selects(module)
    }
    if not chosen:
        raise ValueError(
            f"{file.origin}: target_modules selects no matrix of {model.architecture}: names are "
            f"such as {modules[0]!r}"
        )
    for field, entry in file.unused([*modules, *others], [stack.name for stack in stacks]):
        raise ValueError(
            f"{file.origin}: {field} has {entry!r}, which names no module of this model: remove "
            "it, or give the model that the adapter is of"
        )
    return chosen


def _check_names(
    weights: Path,
    file: LoraFile,
    entries: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    model: ModelConfig,
) -> None:
    """Refuse tensors that PEFT would ignore, and missing ones, which it would make up."""
    strange = sorted(entries.keys() - shapes.keys())
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"{weights}: tensor {strange[0]!r}{more} {_reason(strange[0], file, model)}"
        )
    missing = sorted(shapes.keys() - entries.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        field = "modules_to_save" if missing[0] == SCORE else "target_modules, target_parameters"
        raise ValueError(
            f"{weights} has no tensor {missing[0]!r}{more}, although {file.origin} selects it "
            f"({field}): the adapter is of another model, or was not saved whole"
        )


def _reason(name: str, file: LoraFile, model: ModelConfig) -> str:
    """Explain why a model and a configuration have no place for a tensor."""
    if name == SCORE:
        return f"is a scalar head, which {file.origin} does not name: add score to modules_to_save"
    module = re.sub(r"\.lora_[AB]\.weight$", "", name)
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    if layer is not None and int(layer[1]) >= model.num_layers:
        return f"is of layer {layer[1]}, and the model has {model.num_layers} layers"
    if f"{module}{_WEIGHT}" in possible_targets(model):
        return f"is of a module that {file.origin} does not select (target_modules): name it there"
    if re.search(r"\.(gate|router)$", module):
        return (
            "is of a router, which is no target here: merge the adapter into its base with PEFT "
            "(merge_and_unload), or train without it"
        )
    if ".mlp.experts" in module:
        return f"is of experts that {file.origin} does not select (target_parameters)"
    return f"adds to no matrix of {model.architecture} as config.json describes it"


def _check_shapes(
    weights: Path,
    entries: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.dtype not in PLAIN:
            raise ValueError(f"{weights}: tensor {name!r} {dtype_error(entry.dtype)}")
        if entry.shape == shape:
            continue
        if name == SCORE:
            hint = "a scalar head has one label (num_labels: 1)"
        elif is_lora_name(name) and _rank_differs(name, entry.shape, shape):
            hint = "r and rank_pattern do not describe it"
        else:
            hint = "the adapter is of another model"
        raise ValueError(
            f"{weights}: tensor {name!r} has shape {entry.shape}, and the model and "
            f"adapter_config.json ask for {shape}: {hint}"
        )


def _rank_differs(name: str, given: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a factor of a matrix of these sizes has another rank only."""
    if len(given) != 2:
        return False
    width = 1 if name.endswith(".lora_A.weight") else 0
    return given[width] == shape[width]


def peft_name(name: str) -> str:
    """Return PEFT's name of a tensor of an adapter."""
    return f"{PREFIX}{name}"
