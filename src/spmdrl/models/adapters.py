"""`Adapter`: low-rank additions to some matrices of a model, and their place in its name space.

To y = W x an adapter adds scale * B (A x), with A [rank, in] and B [out, rank] (LoRA: Hu et al.
2021, https://arxiv.org/abs/2106.09685, section 4.1). A and B are global tensors as W is, named
after it: `...q_proj.weight` has `...q_proj.lora_A.weight` and `...q_proj.lora_B.weight`, which are
PEFT's names after its prefix. They are cut as W is: where tensor parallelism cuts the rows of W it
cuts those of B, and where it cuts the columns of W it cuts those of A. FSDP cuts neither, since
they are small.

A rank holds the A of a fused projection's targets in one tensor, below one another, and the B of
each target in a tensor of its own: `layers.0.attention.qkv.lora_A`, `...qkv.lora_B.q_proj`. Where
files hold a whole projection in one matrix (Phi-3's `qkv_proj`), it is one target. Every
expert has an A and B of its own; those of a rank's experts are stacked, expert by expert:
`layers.0.mlp.experts.gate_up.lora_A`, `...gate_up.lora_B.gate_proj`. Or all experts of a layer
share one A and B, which every rank holds, cut as an expert's matrix is; their names have no
expert's number: `...mlp.experts.gate_proj.lora_A.weight`.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import fused_tensors
from spmdrl.models.tensors import GlobalTensor, TpSplit

Groups = Mapping[str, tuple[str, ...]]

TARGET_GROUPS: Groups = {
    "attention": ("attention.",),
    "mlp": ("mlp.gate_up.", "mlp.down.", "mlp.shared."),
}
"""Name of a group of targets -> how the local names of its projections begin within a layer."""

_PROJECTION = re.compile(r"layers\.\d+\.((?:attention\.\w+|mlp\.(?:shared\.)?\w+)\.weight)")
_NO_TARGETS = ("mlp.router.weight", "mlp.shared_gate.weight")

EXPERTS = "experts"
"""The group of all matrices of all experts."""

ExpertsForm = Literal["each", "shared"]
"""Whether every expert has an A and B of its own, or all experts of a layer share one."""

_WEIGHT = ".weight"
_EXPERT = re.compile(r"\.experts\.\d+\.")


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
        shares_experts: whether all experts of a layer share one A and B for each of their matrices.
    """

    targets: Mapping[str, LowRank]
    dropout: float = 0.0
    shares_experts: bool = False

    def __hash__(self) -> int:
        return hash((tuple(self.targets.items()), self.dropout, self.shares_experts))

    def factors(self, target: str) -> tuple[str, str]:
        """Name A and B of a target."""
        return lora_names(_EXPERT.sub(".experts.", target) if self.shares_experts else target)

    @property
    def distinct(self) -> dict[str, LowRank]:
        """The targets without those that share A and B with an earlier one."""
        first: dict[tuple[str, str], str] = {}
        for target in self.targets:
            first.setdefault(self.factors(target), target)
        return {name: self.targets[name] for name in first.values()}

    @property
    def copies(self) -> dict[str, list[str]]:
        """Name of each A and B -> its names in files, where every expert has its own."""
        found: dict[str, list[str]] = {}
        for target in self.targets:
            for own, in_files in zip(self.factors(target), lora_names(target), strict=True):
                found.setdefault(own, []).append(in_files)
        return found


def make_adapter(
    names: Sequence[str],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    experts: ExpertsForm = "each",
) -> Adapter:
    """Make an adapter with one rank and scale for all its targets.

    Args:
        names: Hugging Face names of the targets' weights.
    """
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    return Adapter(
        targets={name: LowRank(rank=rank, scale=scale) for name in names},
        dropout=dropout,
        shares_experts=experts == "shared",
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
    return tuple(_possible(model))


def _possible(model: ModelConfig) -> dict[str, str]:
    """Map the weights of `possible_targets` to their local names within a layer."""
    found = {}
    for local, tensors in fused_tensors(model).items():
        for tensor in tensors:
            if tensor.expert is not None and not tensor.is_stacked:
                found[tensor.name] = "experts"
                continue
            place = _PROJECTION.fullmatch(local)
            if place is not None and place[1] not in _NO_TARGETS and len(tensor.shape) == 2:
                found[tensor.name] = place[1]
    return found


def find_targets(model: ModelConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """Name the weights that groups and patterns select, in the model's order.

    Args:
        targets: each a key of `TARGET_GROUPS`, `experts`, `all`, or a pattern over names of modules
            (`*` matches any text), of which the last part is enough: `q_proj`, `*.layers.0.*`.

    Raises:
        ValueError: one of them selects nothing, some experts of a layer, or experts that files hold
            in one tensor; it is named, with what there is.
    """
    known = _possible(model)
    chosen: set[str] = set()
    for target in targets:
        _check_stacked(model, target)
        found = _selected(known, target)
        if not found:
            raise ValueError(
                f"{target!r} selects no matrix of {model.architecture}: {_what_to_give(model)}"
            )
        chosen.update(found)
    check_experts(model, dict.fromkeys(chosen))
    return tuple(name for name in known if name in chosen)


def _selected(known: Mapping[str, str], target: str) -> list[str]:
    return [n for n, local in known.items() if _selects(target, n.removesuffix(_WEIGHT), local)]


def _what_to_give(model: ModelConfig) -> str:
    """Name the targets that a model has."""
    known = _possible(model)
    groups = [group for group in (*TARGET_GROUPS, EXPERTS) if _selected(known, group)]
    every = [] if _stacks(model) else ["all"]
    example = next(iter(known)).removesuffix(_WEIGHT)
    return f"give {', '.join(groups + every)}, or patterns over names such as {example!r}"


def _selects(target: str, module: str, local: str) -> bool:
    last = module.rpartition(".")[2]
    if target == "all":
        return True
    if target == EXPERTS:
        return is_expert_target(module)
    if target in TARGET_GROUPS:
        return local.startswith(TARGET_GROUPS[target])
    return target == last or fnmatch.fnmatchcase(module, target)


def _check_stacked(model: ModelConfig, target: str) -> None:
    """Refuse experts that files hold in one tensor."""
    for name in _stacks(model):
        if _selects(target, name, "experts"):
            raise ValueError(
                f"{target!r} selects {name}, which holds the matrices of all experts of a layer, "
                f"and adapters add to none of those: {_what_to_give(model)}"
            )


def _stacks(model: ModelConfig) -> list[str]:
    """Name the tensors that hold the matrices of all experts of a layer."""
    if model.moe is None or model.moe.form == "each":
        return []
    parts = [model.family.module(f"mlp.experts.{part}") for part in ("all_gate_up", "all_down")]
    return [f"model.layers.{layer}.{part}" for layer in model.moe_layers for part in parts]


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
        if adapter.shares_experts:
            targets = [tensor for tensor in targets if tensor.expert == targets[0].expert]
        module = local.removesuffix(_WEIGHT)
        pairs = [_pair(tensor, adapter) for tensor in targets]
        # parts of one matrix share A
        table[f"{module}.lora_A"] = tuple({(a.name, a.expert): a for a, _ in pairs}.values())
        below: dict[str, list[GlobalTensor]] = {}
        for target, (_, b) in zip(targets, pairs, strict=True):
            below.setdefault(f"{module}.lora_B.{part_name(target.name)}", []).append(b)
        table |= {name: tuple(tensors) for name, tensors in below.items()}
    return table


def part_name(weight: str) -> str:
    """Name a target within its fused projection: `q_proj`."""
    return weight.removesuffix(_WEIGHT).rpartition(".")[2]


def adapter_shapes(model: ModelConfig, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return an adapter's name space: Hugging Face name -> global shape."""
    table = adapter_tensors(model, adapter)
    return {tensor.name: tensor.shape for tensors in table.values() for tensor in tensors}


def _pair(target: GlobalTensor, adapter: Adapter) -> tuple[GlobalTensor, GlobalTensor]:
    assert len(target.shape) == 2, target.name
    (rows, columns), rank = target.shape, adapter.targets[target.name].rank
    name_a, name_b = adapter.factors(target.name)
    by_columns = target.split is TpSplit.COLUMNS
    is_shared = adapter.shares_experts and target.expert is not None
    expert = None if is_shared else target.expert
    return (
        GlobalTensor(
            name=name_a,
            shape=(rank, columns),
            split=TpSplit.COLUMNS if by_columns else TpSplit.NONE,
            expert=expert,
            every_expert=is_shared,
            num_experts=target.num_experts,
        ),
        GlobalTensor(
            name=name_b,
            shape=(rows, rank),
            split=TpSplit.NONE if by_columns else target.split,
            region=target.region,
            heads=target.heads,
            expert=expert,
            every_expert=is_shared,
            num_experts=target.num_experts,
        ),
    )
