"""Configuration sections that define models and roles: what they are, and where they compute."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

# pydantic asks for this one before Python 3.12
from typing_extensions import TypedDict

from spmdrl.config.algorithms import Basic, Section
from spmdrl.config.data import Place
from spmdrl.config.judges import JudgeSection


class ModelSection(Section):
    path: Basic[Place] = Field(
        description="Read the model from this Hugging Face directory (config.json, safetensors, "
        "tokenizer), or org/name of the hub from huggingface_hub's cache."
    )
    tiny: bool = Field(False, description="Use random weights at a toy size of the architecture.")
    dtype: Basic[Literal["auto", "float32", "bfloat16"]] = Field(
        "auto", description="Compute in this dtype; auto is float32 on a CPU and bfloat16 on a GPU."
    )
    attention: Literal["auto", "blocked", "sdpa", "varlen", "flash", "flex"] = Field(
        "auto",
        description="Use this attention kernel in the trainer; auto takes the fastest that fits.",
    )
    cpu_products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Compute products of float32 matrices on CPUs in this precision, with float32 "
        "sums; bfloat16 needs AVX-512 BF16 or AMX.",
    )


PartName = Literal["base", "weights", "optimizer", "kv_cache", "graphs"]
PartResidency = Literal["keep", "host", "drop", "stream", "auto"]


class MegatronSettings(TypedDict, total=False):
    """Megatron's ways to split a role's model, in addition to the mesh."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    vpp: Annotated[int, Field(ge=1)]
    sp: bool


class AdapterSection(Section):
    """Low-rank additions that a role trains, or reads from a file, in place of its weights."""

    path: Place | None = Field(
        None,
        description="Read the adapter from this PEFT directory (and train it further where the "
        "role trains); null makes a new one.",
    )
    rank: int = Field(16, ge=1, description="Give A and B this rank, at least 1.")
    alpha: float = Field(
        32.0, gt=0, description="Multiply B A by this over rank (rslora: over its root), above 0."
    )
    targets: tuple[str, ...] = Field(
        ("all",),
        min_length=1,
        description="Add to these matrices: attention, mlp, experts, all, or names of modules such "
        "as q_proj; * matches any text.",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Set this share of the inputs of A to 0 in updates, at least 0 and below 1.",
    )
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="Draw A uniformly within 1 / sqrt(inputs), or from a normal distribution of "
        "deviation 1 / rank; B is 0.",
    )
    rslora: bool = Field(False, description="Divide alpha by the root of rank, not by rank.")
    experts: Literal["each", "shared"] = Field(
        "each",
        description="Give each expert A and B of its own, or let all experts of a layer share one "
        "for each matrix (shared; copies in the file of path must be equal).",
    )


JUDGE = "judge"
"""Kind of a role that is a generative model with an engine and fixed weights."""

WITH_ENGINE = ("rollout", JUDGE)
"""Kinds of roles that have an engine in place of a train backend."""


class RoleSection(Section):
    kind: Basic[Place | None] = Field(
        None,
        description="Give the role this kind: policy | reference | teacher | reward | value | "
        "judge | rollout | module:Class; null takes the role's name.",
    )
    model: Basic[Place | None] = Field(
        None,
        description="Read the role's model from this Hugging Face directory; null takes "
        "model.path.",
    )
    head: Basic[Literal["file", "normal", "zero"]] = Field(
        "file",
        description="Take the scalar head of a reward or value model from its file, or make a "
        "new one.",
    )
    readout: Literal["auto", "last", "before_padding"] = Field(
        "auto",
        description="Read a reward model's score at each row's last token, or at its last one that "
        "is not config.json's pad_token_id; auto follows the model's class.",
    )
    adapter: AdapterSection | None = Field(
        None,
        description="Train low-rank additions (LoRA) in place of the role's weights; {} takes the "
        "defaults, null none.",
    )
    base: str | None = Field(
        None,
        description="Share this role's base weights, without its adapter; null loads the role's "
        "own.",
    )
    trained: Basic[bool | None] = Field(
        None, description="Train the role or not; null trains policy and value only."
    )
    train: Basic[dict[str, Any]] = Field(
        default_factory=dict, description="Override these keys of `train` for the role."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="Keep these parameters of a trained role fixed, by Hugging Face name; * "
        "matches any text.",
    )
    residency: dict[PartName, PartResidency] = Field(
        default_factory=dict,
        description="Decide where base (the fixed weights under an adapter), weights, optimizer, "
        "kv_cache and graphs are between the role's calls: keep, host, drop or auto (default); "
        "an optimizer can also stay on the host and step in windows (stream).",
    )
    retokenize: bool = Field(
        False, description="Let a reward model with another tokenizer read texts instead of tokens."
    )
    judge: JudgeSection | None = Field(
        None, description="Set the questions of a judge, and how its answers are read."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Pass these keyword arguments to a module:Class."
    )
    ranks: Basic[str | int] = Field(
        "all",
        description="Place the role on these ranks: all | 0-3 | 0,2 | nodes 0-1 | same as ROLE.",
    )
    device: Literal["auto", "cpu"] = Field(
        "auto",
        description="Compute the role on this device; auto takes its ranks' GPUs, or the host if "
        "none has one.",
    )
    dp_replicate: int | None = Field(
        None,
        ge=1,
        description="Hold this many replicas, at least 1; null takes what the other degrees leave.",
    )
    dp_shard: Basic[Annotated[int, Field(ge=1)] | Literal["all"]] = Field(
        1,
        description="Shard each copy of the weights over this many ranks (FSDP2), at least 1; "
        "all takes as many as fit.",
    )
    cp: Basic[int] = Field(
        1, ge=1, description="Split sequences over this many context-parallel ranks, at least 1."
    )
    tp: Basic[int] = Field(
        1, ge=1, description="Split layers over this many tensor-parallel ranks, at least 1."
    )
    ep: Basic[int] = Field(
        1,
        ge=1,
        description="Split the experts of a MoE over this many ranks, at least 1, within tp, cp "
        "and dp.",
    )
    pp: int = Field(
        1,
        ge=1,
        description="Split the layers into this many pipeline stages, at least 1 "
        "(train.backend=megatron).",
    )
    megatron: MegatronSettings = Field(
        default_factory=MegatronSettings,
        description="Set Megatron's options: vpp, runs of layers per pipeline rank (interleaved "
        "schedule), at least 1; sp, split norms and residuals over the tp ranks.",
    )
    tp_across_nodes: bool = Field(
        False, description="Allow a tensor-parallel group to span several nodes."
    )
