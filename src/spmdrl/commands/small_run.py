"""A run made small: the configuration's roles, placements and flow, with tiny models, few and short
rows, and rewards that are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any

from spmdrl.config.data_sets import START
from spmdrl.config.roles import JUDGE, RoleSection
from spmdrl.config.sections import Config
from spmdrl.data.conversations import Conversation
from spmdrl.data.item_set import ItemSet
from spmdrl.data.preferences import Pair
from spmdrl.data.prompts import PromptSet
from spmdrl.models.config import ModelConfig, read_config, resized, tiny
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.models.rope import tiny_rope
from spmdrl.placement import Placement
from spmdrl.planning.questions import judge_section
from spmdrl.rewards.judging import RewardJob, RewardResult
from spmdrl.rewards.pool import Called, RewardPool
from spmdrl.rewards.rubric import Encode
from spmdrl.role_spec import HEADS
from spmdrl.run.assembly.assembly import Model
from spmdrl.run.inputs import AnySet, Inputs

STEPS = 2
VOCABULARY, HIDDEN, HEAD_DIM = 512, 16, 8
PROMPT_TOKENS, RESPONSE_TOKENS = 12, 6
MICROBATCH_TOKENS = 64
"""Some three rows, so that ranks have several microbatches, and not equally many."""

STOPS = tuple(range(VOCABULARY // 6))
"""Tokens that end a response, so that lengths differ."""


_SMALL_ENGINE: Mapping[str, Any] = {
    "engine": "native",
    "kv_cache_gb": "auto",
    "cuda_graphs": False,
}

_SMALL_SOURCE: Mapping[str, Any] = {"max_tokens": 2 * PROMPT_TOKENS, "turns": None}
"""Keys of a source of data that change."""


def small_config(config: Config, num_ranks: int, run_dir: str) -> Config:
    """The configuration with two steps, few and short rows, on CPUs and in `run_dir`.

    What decides which collectives are called stays as it is: roles, placements, degrees, epochs
    and minibatches, the algorithm, evaluations.

    Raises:
        ValueError: a role has pipeline stages, which torch's backend lacks.
    """
    for name, role in config.roles.items():
        if role.pp > 1:
            raise ValueError(
                f"roles.{name}.pp={role.pp}: the comparison runs torch's backend, which has no "
                f"pipeline stages: compare with roles.{name}.pp=1"
            )
    data, evaluation = config.data, config.evaluation
    most = max(config.train_section(n).num_minibatches for n in config.roles)
    prompts = min(data.prompts_per_step, max(2 * most, num_ranks))
    sampling = {"max_tokens": RESPONSE_TOKENS, "stop": (), "stop_token_ids": STOPS}
    small = {"microbatch_tokens": MICROBATCH_TOKENS, "backend": "torch"}
    return config.model_copy(
        update={
            "steps": STEPS,
            "run_dir": run_dir,
            "device": "cpu",
            "memory_gb": None,
            "roles": {name: _small_role(config, name) for name in config.roles},
            "train": config.train.model_copy(update=small),
            "rollout": config.rollout.model_copy(
                # turns call no collective, and need what answers them
                update={**_SMALL_ENGINE, "turns": None}
            ),
            "sampling": config.sampling.model_copy(update=sampling),
            "algorithm": config.algorithm.model_copy(update={"credit": "trajectory"}),
            "data": data.model_copy(
                update={
                    "prompts_per_step": prompts,
                    "group_size": min(data.group_size, 4),
                    "train": data.train.model_copy(update=_SMALL_SOURCE),
                    "mix": tuple({**m, **_SMALL_SOURCE} for m in data.mix),
                }
            ),
            "evaluation": evaluation.model_copy(
                update={
                    "every": min(evaluation.every, 1),
                    "against": START if evaluation.against == START else None,
                    "sets": {name: _small_set(given) for name, given in evaluation.sets.items()},
                    "sampling": {**evaluation.sampling, **sampling},
                }
            ),
            "checkpoint": config.checkpoint.model_copy(update={"export": False, "resume": False}),
            "log": config.log.model_copy(update={"tensorboard": False, "progress": False}),
        }
    )


def _small_train(given: Mapping[str, Any]) -> dict[str, Any]:
    small = {"microbatch_tokens": MICROBATCH_TOKENS, "backend": "torch"}
    return {key: small.get(key, value) for key, value in given.items()}


def _small_role(config: Config, own: str) -> RoleSection:
    role = config.roles[own]
    small: dict[str, Any] = {"train": _small_train(role.train), "megatron": {}}
    if config.role_kind(own) == JUDGE:
        keys = {"max_tokens": RESPONSE_TOKENS, "kv_cache_gb": "auto"}
        small["judge"] = judge_section(config, own).model_copy(update=keys)
    return role.model_copy(update=small)


def _small_set(given: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {**given.get("sampling", {}), "max_tokens": RESPONSE_TOKENS}
    small: dict[str, Any] = {**given, "sampling": sampling}
    if small.get("against") != START:
        small.pop("against", None)
    if "data" in given:
        small["data"] = {**given["data"], **_SMALL_SOURCE}
    return small


def small_models(config: Config, placements: Mapping[str, Placement]) -> dict[str, Model]:
    """A tiny random model of each role's architecture, which the roles' degrees divide.

    Raises:
        ValueError: a role's config.json is missing, or its architecture is not supported.
    """
    tp, ep = (
        math.lcm(*(placement.degrees.get(axis, 1) for placement in placements.values()))
        for axis in ("tp", "ep")
    )
    models = {}
    for name in config.roles:
        if config.is_users(name):
            continue
        model = small_model(read_config(config.model_path(name)), tp, ep)
        head = HEADS.get(config.role_kind(name), "lm")
        models[name] = Model(model=model, weights=RandomCheckpoint(model, config.seed, head))
    return models


_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
"""Keys of config.json whose values tensor parallelism divides, as well as `intermediate_size`."""


def small_model(model: ModelConfig, tp: int, ep: int) -> ModelConfig:
    """Shrink a model so that `tp` divides heads, MLP and vocabulary, and `ep` its experts."""
    shrunk = tiny(model)
    source = shrunk.source
    heads = {key: int(source[key]) for key in _HEADS if source.get(key)}
    factor = math.lcm(*(tp // math.gcd(count, tp) for count in heads.values()))
    count = heads["num_attention_heads"] * factor
    hidden = math.lcm(HIDDEN, count * HEAD_DIM)
    sizes: dict[str, Any] = {
        **{key: heads[key] * factor for key in heads},
        "hidden_size": hidden,
        "intermediate_size": math.lcm(4, tp) * 4,
        "head_dim": hidden // count,  # which some families have without a key of it
        "vocab_size": math.lcm(VOCABULARY, tp),
        **{key: math.lcm(source[key], tp) for key in _WIDTHS if source.get(key)},
    }
    sizes |= tiny_rope({**source, **sizes}, hidden // count)
    if shrunk.moe is not None:
        count = math.lcm(shrunk.moe.num_experts, ep)
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        sizes |= {name: count for name in names if name in shrunk.source}
    return replace(resized(shrunk, sizes), bos_id=0, eos_ids=(1,))


def small_inputs(inputs: Inputs, config: Config) -> Inputs:
    """The first items of every set, shortened, with token ids of the small vocabulary."""
    most = 4 * config.data.prompts_per_step
    parts: list[int] = []
    shares, start = [], 0
    for count, weight in inputs.shares:
        taken = min(count, most)
        parts += range(start, start + taken)
        shares.append((taken, weight))
        start += count
    return replace(
        inputs,
        train=_short(inputs.train.subset(parts)),
        shares=tuple(shares),
        held_out={
            name: _short(data.subset(range(min(len(data), 8))))
            for name, data in inputs.held_out.items()
        },
        rubrics={
            name: replace(rubric, encode=partial(_asked, rubric.encode))
            for name, rubric in inputs.rubrics.items()
        },
    )


def _short(data: AnySet) -> AnySet:
    if isinstance(data, PromptSet):
        lengths = (4 + i % (PROMPT_TOKENS - 3) for i in range(len(data)))
        return data.with_ids([_ids(*each) for each in zip(data.ids(), lengths, strict=True)])
    change: Callable[[Any], Any] = _SHORTEN[data.kind]
    return ItemSet(data.kind, [change(item) for item in data], data.left_out)


def _ids(tokens: Any, most: int) -> list[int]:
    """The last tokens, as ids of the small vocabulary."""
    return [int(token) % VOCABULARY for token in tokens[-most:]]


def _asked(encode: Encode, question: str) -> list[int]:
    """The last tokens of a question, which differ in length."""
    return _ids(encode(question), 4 + len(question) % (PROMPT_TOKENS - 3))


def _short_pair(pair: Pair) -> Pair:
    most = PROMPT_TOKENS // 2
    return replace(
        pair,
        prompt=_ids(pair.prompt, most),
        chosen=_ids(pair.chosen, most),
        rejected=_ids(pair.rejected, most),
    )


def _short_conversation(conversation: Conversation) -> Conversation:
    """Keep the first response and the tokens before it."""
    most = PROMPT_TOKENS // 2
    start, stop = conversation.responses[0]
    first, last = max(0, start - most), min(stop, start + most)
    tokens = _ids(conversation.tokens[first:last], 2 * most)
    return replace(conversation, tokens=tokens, responses=((start - first, last - first),))


_SHORTEN: Mapping[type, Callable[[Any], Any]] = {
    Pair: _short_pair,
    Conversation: _short_conversation,
}


class DrawnRewards(RewardPool):
    """Rewards without functions: 0 or 1 for each component, by prompt and response."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self.failed = tuple(names), 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def describe(self) -> tuple[str, ...]:
        return self._names

    @property
    def callers(self) -> Mapping[str, Called]:
        return {}

    def score(self, jobs: Sequence[RewardJob], **_: Any) -> list[RewardResult]:
        drawn = [blake2b(f"{j.prompt}\n{j.response}".encode()).digest()[0] % 2 for j in jobs]
        return [
            RewardResult(score=float(one), components=dict.fromkeys(self._names, float(one)))
            for one in drawn
        ]
