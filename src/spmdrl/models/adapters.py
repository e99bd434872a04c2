"""`Adapter`: low-rank additions to some matrices of a model, and their place in its name space.

To y = W x an adapter adds scale * B (A x), with A [rank, in] and B [out, rank] (LoRA: Hu et al.
2021, https://arxiv.org/abs/2106.09685, section 4.1). A and B are global tensors as W is, named
after it: `...q_proj.weight` has `...q_proj.lora_A.weight` and `...q_proj.lora_B.weight`, which are
PEFT's names after its prefix. They are cut as W is: where tensor parallelism cuts the rows of W it
cuts those of B, and where it cuts the columns of W it cuts those of A. FSDP cuts neither, since
they are small.

A rank holds the A of a fused projection's targets in one tensor, below one another, and the B of
each target in a tensor of its own: `layers.0.attention.qkv.lora_A`, `...qkv.lora_B.q_proj`. Every
expert has an A and B of its own; those of a rank's experts are stacked, expert by expert:
`layers.0.mlp.experts.gate_up.lora_A`, `...gate_up.lora_B.gate_proj`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import GlobalTensor, TpSplit, fused_tensors

Groups = Mapping[str, tuple[str, ...]]

TARGET_GROUPS: Groups = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Name of a group of targets -> the modules of a layer that it stands for, outside experts."""

EXPERTS = "experts"
"""The group of all matrices of all experts."""

_WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """The addition to one matrix.

    Args:
        rank: rows of A and columns of B, at least 1.
        scale: factor of B A; alpha / rank, or alpha / sqrt(rank) (rank-stabilised: Kalajdzievski
            2023, https://arxiv.org/abs/2312.03732).
    """

    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The additions to a model's matrices, without their values.

    Args:
        targets: Hugging Face name of a weight -> its addition, in the model's order; not empty.
        dropout: probability with which an update zeroes an element of x before A.
    """

    targets: Mapping[str, LowRank]
    dropout: float = 0.0


def make_adapter(
    names: Sequence[str],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Adapter:
    """Make an adapter with one rank and scale for all its targets.

    Args:
        names: Hugging Face names of the targets' weights.
    """
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    return Adapter(
        targets={name: LowRank(rank=rank, scale=scale) for name in names}, dropout=dropout
    )


def lora_names(weight: str) -> tuple[str, str]:
    """Name A and B of a target's weight."""
    module = weight.removesuffix(_WEIGHT)
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def is_lora_name(name: str) -> bool:
    """Whether a global tensor is an adapter's A or B."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def possible_targets(model: ModelConfig) -> tuple[str, ...]:
    """Name the weights that an adapter can add to: attention's projections, MLPs' and experts'."""
    known = {module for modules in TARGET_GROUPS.values() for module in modules}
    return tuple(
        tensor.name
        for tensors in fused_tensors(model).values()
        for tensor in tensors
        if tensor.expert is not None
        or (tensor.name.endswith(_WEIGHT) and part_name(tensor.name) in known)
    )


def find_targets(model: ModelConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """Name the weights that groups and patterns select, in the model's order.

    Args:
        targets: each a key of `TARGET_GROUPS`, `experts`, `all`, or a pattern over names of modules
            (`*` matches any text), of which the last part is enough: `q_proj`, `*.layers.0.*`.

    Raises:
        ValueError: one of them selects nothing, or some experts of a layer; it is named, with what
            there is.
    """
    known = possible_targets(model)
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in known if _selects(target, name.removesuffix(_WEIGHT))]
        if not found:
            raise ValueError(
                f"{target!r} selects no matrix of {model.architecture}: give "
                f"{', '.join((*TARGET_GROUPS, EXPERTS, 'all'))}, or patterns over names such as "
                f"{known[0].removesuffix(_WEIGHT)!r}"
            )
        chosen.update(found)
    check_experts(model, dict.fromkeys(chosen))
    return tuple(name for name in known if name in chosen)


def _selects(target: str, module: str) -> bool:
    last = module.rpartition(".")[2]
    if target == "all":
        return True
    if target == EXPERTS or target in TARGET_GROUPS:
        is_expert = is_expert_target(module)
        return is_expert if target == EXPERTS else not is_expert and last in TARGET_GROUPS[target]
    return target == last or fnmatch.fnmatchcase(module, target)


def is_expert_target(name: str) -> bool:
    """Whether a module or weight is one expert's."""
    return ".experts." in name


def share_of_tokens(model: ModelConfig, name: str) -> float:
    """Return the share of tokens that a weight computes for, where routing is even."""
    if model.moe is None or not is_expert_target(name):
        return 1.0
    return model.moe.top_k / model.moe.num_experts


def check_experts(model: ModelConfig, targets: Mapping[str, object]) -> None:
    """Refuse an adapter of some experts of a layer only, or with unlike ranks or scales for them.

    Raises:
        ValueError: the experts of a layer are not adapted alike; one is named.
    """
    for tensors in fused_tensors(model).values():
        alike: dict[str, tuple[str, object]] = {}
        for tensor in tensors:
            if tensor.expert is None:
                break
            own = (tensor.name in targets, targets.get(tensor.name))
            first, as_first = alike.setdefault(part_name(tensor.name), (tensor.name, own))
            if own != as_first:
                raise ValueError(
                    f"{tensor.name} is not adapted as {first} is: all experts of a layer need "
                    "adapters of one rank and scale"
                )


def adapter_tensors(model: ModelConfig, adapter: Adapter) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map an adapter's local names to their tensors, as `sharding.fused_tensors` does a model's."""
    table: dict[str, tuple[GlobalTensor, ...]] = {}
    for local, tensors in fused_tensors(model).items():
        targets = [tensor for tensor in tensors if tensor.name in adapter.targets]
        if not targets:
            continue
        module = local.removesuffix(_WEIGHT)
        pairs = [_pair(tensor, adapter.targets[tensor.name].rank) for tensor in targets]
        table[f"{module}.lora_A"] = tuple(a for a, _ in pairs)
        stacked: dict[str, list[GlobalTensor]] = {}
        for target, (_, b) in zip(targets, pairs, strict=True):
            stacked.setdefault(f"{module}.lora_B.{part_name(target.name)}", []).append(b)
        table |= {name: tuple(tensors) for name, tensors in stacked.items()}
    return table


def part_name(weight: str) -> str:
    """Name a target within its fused projection: `q_proj`."""
    return weight.removesuffix(_WEIGHT).rpartition(".")[2]


def adapter_shapes(model: ModelConfig, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return an adapter's name space: Hugging Face name -> global shape."""
    table = adapter_tensors(model, adapter)
    return {tensor.name: tensor.shape for tensors in table.values() for tensor in tensors}


def _pair(target: GlobalTensor, rank: int) -> tuple[GlobalTensor, GlobalTensor]:
    rows, columns = target.shape
    name_a, name_b = lora_names(target.name)
    by_columns = target.split is TpSplit.COLUMNS
    return (
        GlobalTensor(
            name=name_a,
            shape=(rank, columns),
            split=TpSplit.COLUMNS if by_columns else TpSplit.NONE,
            expert=target.expert,
        ),
        GlobalTensor(
            name=name_b,
            shape=(rows, rank),
            split=TpSplit.NONE if by_columns else target.split,
            expert=target.expert,
        ),
    )
