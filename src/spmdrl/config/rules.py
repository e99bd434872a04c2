"""Rules of a configuration that involve two keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from spmdrl.config.adapter_rules import SCALAR, check_adapters
from spmdrl.config.data_sets import (
    HELD_OUT,
    START,
    held_out_sets,
    is_rewarded,
    response_tokens,
    set_takes_turns,
    takes_turns,
)
from spmdrl.config.faults import collect
from spmdrl.config.flow_rules import (
    check_best,
    check_needed,
    check_role_used,
    check_updated,
    check_used,
)
from spmdrl.config.judge_rules import check_judges, judges_pairs
from spmdrl.config.roles import JUDGE, WITH_ENGINE, RoleSection
from spmdrl.config.sections import Config, RewardSection
from spmdrl.config.training import BACKENDS, DeepspeedSection, TrainSection
from spmdrl.config.turn_rules import check_turns

KL_ERROR_LIMIT = 0.2
"""`ERROR_LIMIT` of the adaptive KL coefficient."""

UPDATE_KEYS = (
    *("epochs", "num_minibatches", "recompute", "lr", "schedule", "warmup_steps", "min_lr_ratio"),
    *("betas", "eps", "weight_decay", "clip_norm", "balance_coef"),
)
"""Keys of `train` that only updates read."""


def check_rules(config: Config, *, trains: bool) -> None:
    """Check the rules that involve two keys.

    Args:
        trains: the configuration is for training; False: only for answering prompts.

    Raises:
        ConfigError: it has a fault for each broken rule, with both keys and both values.
    """
    collect(partial(rule, config) for rule in (*RULES, *(TRAINING_RULES if trains else ())))


def _check_samples(config: Config) -> None:
    data, algorithm = config.data, config.algorithm
    samples = data.prompts_per_step * data.group_size
    if algorithm.overlong_buffer >= response_tokens(config):
        responses = f"sampling.max_tokens={config.sampling.max_tokens}"
        if takes_turns(config):
            responses = f"{response_tokens(config)} tokens of turns (rollout.turns.max_tokens)"
        raise ValueError(
            f"algorithm.overlong_buffer={algorithm.overlong_buffer} with {responses}: lower the "
            "first, so that it is below the second"
        )
    compares = config.flow_row.compares_groups and algorithm.advantage != "reinforce_pp"
    compares = compares and is_rewarded(config)
    if samples < 2 and compares:
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} x data.group_size={data.group_size} "
            "make one sample, but GRPO compares the samples of a group: raise data.group_size"
        )
    if compares and data.group_size < 2:
        raise ValueError(
            f"data.group_size={data.group_size} with flow={config.flow}: GRPO compares the "
            "samples of a group, so it needs at least 2 (algorithm.advantage=reinforce_pp needs 1)"
        )


def _check_training_samples(config: Config) -> None:
    data, algorithm, flow = config.data, config.algorithm, config.flow_row
    if flow.samples and config.sampling.temperature == 0:
        raise ValueError(
            f"sampling.temperature={config.sampling.temperature} with flow={config.flow}: greedy "
            "samples teach nothing: raise it; only evaluation.sampling.temperature may be 0"
        )
    if not flow.samples or config.trainer is not None or config.environment is not None:
        return
    if algorithm.refill_attempts and (data.group_size < 2 or not is_rewarded(config)):
        other = f"data.group_size={data.group_size}" if is_rewarded(config) else "rewards=[]"
        raise ValueError(
            f"algorithm.refill_attempts={algorithm.refill_attempts} with {other}: no group's "
            "rewards differ, so every one would be drawn again in vain: set refill_attempts to 0"
        )
    samples = data.prompts_per_step * data.group_size
    adapts = flow.adapts_kl and algorithm.kl_target is not None
    if adapts and algorithm.kl_coef == 0:
        raise ValueError(
            f"algorithm.kl_target={algorithm.kl_target} with algorithm.kl_coef="
            f"{algorithm.kl_coef}: the target steers the coefficient by factors, which never leave "
            "0: set algorithm.kl_coef above 0, or kl_target to null"
        )
    if adapts and KL_ERROR_LIMIT * samples >= algorithm.kl_horizon:
        raise ValueError(
            f"algorithm.kl_horizon={algorithm.kl_horizon} with {samples} samples a step "
            "(data.prompts_per_step x data.group_size): the coefficient could fall to 0 in one "
            f"step; the horizon must be above {KL_ERROR_LIMIT * samples:g}"
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if evaluation.held_out and HELD_OUT in evaluation.sets:
        raise ValueError(
            f"evaluation.held_out={evaluation.held_out} and evaluation.sets.{HELD_OUT}: both make "
            f"the set {HELD_OUT}, so give one of them, or the other another name"
        )
    for name, held_out in held_out_sets(config).items():
        where = "evaluation" if name not in evaluation.sets else f"evaluation.sets.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"{where}: a set's name holds letters, digits, '_', '-' and '.' only")
        if held_out.data is None and name != HELD_OUT:
            raise ValueError(f"{where} has no data: give keys of data.train that differ")
        _check_reward_list(config, held_out.rewards, f"{where}.rewards")
        if held_out.against is None:
            continue
        if not held_out.rewards and not set_takes_turns(config, held_out):
            raise ValueError(
                f"{where}.against={held_out.against} needs rewards to judge by: add some"
            )
        if held_out.against == START and not evaluation.before:
            raise ValueError(
                f"{where}.against={START} with evaluation.before=false: the responses before the "
                "first step are what it compares with"
            )


def _check_roles(config: Config) -> None:
    """Check that the roles, and their settings, are those that the shipped flow needs."""
    kinds = [config.role_kind(name) for name in config.roles]
    for name, role_section in config.roles.items():
        kind = config.role_kind(name)
        if role_section.head != "file" and kind not in SCALAR:
            raise ValueError(
                f"roles.{name}.head={role_section.head}: {name} is a {kind}, and only {SCALAR} "
                "models have a scalar head: leave the key out"
            )
        if role_section.readout != "auto" and kind != "reward":
            raise ValueError(
                f"roles.{name}.readout={role_section.readout}: {name} is a {kind}, and only a "
                "reward model reads one score per row: leave the key out"
            )
        _check_freeze(config, name)
        check_role_used(config, name)
    if kinds.count("policy") > 1:
        raise ValueError(
            f"roles={sorted(config.roles)} has {kinds.count('policy')} policies: one at most "
            "is synced to the rollout, so give the others another kind"
        )
    kl_coef = config.algorithm.kl_coef
    if kl_coef > 0 and "reference" not in config.roles:
        raise ValueError(
            f"algorithm.kl_coef={kl_coef} needs a reference, but roles={sorted(config.roles)} has "
            "none of that name: add roles.reference or set the coefficient to 0"
        )
    if kl_coef == 0 and "reference" in config.roles and config.flow_row.compares_groups:
        raise ValueError(
            f"roles.reference is configured but unused because algorithm.kl_coef={kl_coef}: raise "
            "the coefficient or remove the role (roles.reference: null)"
        )
    teacher_coef = config.algorithm.teacher_coef
    if (teacher_coef > 0) != ("teacher" in config.roles) and config.flow_row.distils:
        raise ValueError(
            f"algorithm.teacher_coef={teacher_coef} with roles={sorted(config.roles)}: distilling "
            "needs both the coefficient and roles.teacher"
        )


def _check_freeze(config: Config, name: str) -> None:
    """Refuse `freeze` of roles that are not trained."""
    given = config.roles[name].freeze
    if not given:
        return
    if not config.is_trained(name):
        raise ValueError(
            f"roles.{name}.freeze={list(given)}: {name} is not trained, so it changes nothing "
            "anyway: leave the key out"
        )


def _check_backends(config: Config) -> None:
    """Refuse unknown backends, and settings of a backend for roles that have another."""
    for name, role in config.roles.items():
        kind = config.role_kind(name)
        if kind in WITH_ENGINE or ":" in kind:
            asked = [f"roles.{name}.pp={role.pp}"] if role.pp > 1 else []
            asked += _megatron_settings(name, role)
            if asked:
                raise ValueError(
                    f"{asked[0]}: {name} is a {kind}, and only models on train.backend=megatron "
                    "have pipelines and sequence parallelism: leave the key out"
                )
            continue
        _check_backend(name, role, config.train_section(name))


def _check_backend(name: str, role: RoleSection, train: TrainSection) -> None:
    key = f"roles.{name}"
    backend, is_own = train.backend, ":" in train.backend
    if not is_own and backend not in BACKENDS:
        raise ValueError(
            f"train.backend={backend}: there is no such backend: set it to {', '.join(BACKENDS)}, "
            "or to module:Class"
        )
    if train.backend_options and not is_own:
        raise ValueError(
            f"train.backend_options={train.backend_options} with train.backend={backend}: they "
            "are for a module:Class: leave the key out"
        )
    if backend != "deepspeed" and train.deepspeed != DeepspeedSection():
        changed = next(
            f"train.deepspeed.{k}={v}"
            for k, v in train.deepspeed.model_dump().items()
            if v != getattr(DeepspeedSection(), k)
        )
        raise ValueError(
            f"{changed} with {key}.train.backend={backend}: set {key}.train.backend=deepspeed, or "
            f"set the key in {key}.train of roles on that backend only"
        )
    if backend != "torch" and train.compile != "none":
        raise ValueError(
            f"train.compile={train.compile} with {key}.train.backend={backend}: only the torch "
            f"backend compiles layers: set {key}.train.compile=none"
        )
    asked = [] if backend == "megatron" else _megatron_settings(name, role)
    if role.pp > 1 and backend in ("torch", "deepspeed"):
        asked.insert(0, f"{key}.pp={role.pp}")
    if asked:
        raise ValueError(
            f"{asked[0]} with train.backend={backend}: pipelines and sequence parallelism are "
            f"Megatron's; set {key}.train.backend: megatron, or leave the key out"
        )


def _megatron_settings(name: str, role: RoleSection) -> list[str]:
    return [f"roles.{name}.megatron.{k}={str(v).lower()}" for k, v in role.megatron.items()]


def _check_preference(config: Config) -> None:
    preference, roles, flow = config.preference, sorted(config.roles), config.flow_row
    if flow.reads_preference and not flow.samples:
        compares = preference.needs_reference
        if compares and preference.reference == "step" and "reference" not in config.roles:
            raise ValueError(
                f"preference.loss={preference.loss} needs a reference, but roles={roles} has none "
                "of that name: add roles.reference, or set preference.reference=cache (the policy "
                "before its first step)"
            )
        if not compares and "reference" in config.roles:
            raise ValueError(
                "roles.reference is configured but unused because "
                f"preference.loss={preference.loss}: remove the role (roles.reference: null)"
            )
    if flow.pairs_samples:
        if preference.loss not in ("dpo", "ipo") or preference.reference != "step":
            raise ValueError(
                f"preference.loss={preference.loss} with preference.reference="
                f"{preference.reference} in flow={flow.name}: its loss is dpo or ipo, and its "
                "samples are new in every step (preference.reference=step)"
            )
        if config.data.group_size < 2:
            raise ValueError(
                f"data.group_size={config.data.group_size} with flow={flow.name}: it compares the "
                "samples of a prompt, so it needs at least 2"
            )


def _check_experts(config: Config) -> None:
    for name in config.roles:
        coefficient = config.train_section(name).balance_coef
        if coefficient > 0 and config.is_trained(name) and config.role_kind(name) == "reward":
            raise ValueError(
                f"train.balance_coef={coefficient} for the reward model roles.{name}: it reads one "
                "token of a row, and the balance is over the tokens of a response: set "
                f"roles.{name}.train.balance_coef to 0"
            )


def _check_rewards(config: Config) -> None:
    distils = config.flow_row.distils and config.algorithm.teacher_coef > 0
    compares = distils or judges_pairs(config)
    if config.flow_row.samples and not is_rewarded(config) and not compares:
        raise ValueError(
            f"rewards=[] with flow={config.flow}: name at least one function, e.g. "
            "{function: math}, or one reward model, e.g. {role: reward}"
        )
    _check_reward_list(config, config.rewards, "rewards")
    for name, role in config.roles.items():
        if role.retokenize and config.role_kind(name) != "reward":
            raise ValueError(
                f"roles.{name}.retokenize=true: only a reward model can read texts, and {name} is "
                f"a {config.role_kind(name)}: leave the key out"
            )


def _check_reward_list(config: Config, rewards: Sequence[RewardSection], key: str) -> None:
    for number, reward in enumerate(rewards):
        where = f"{key}.{number}"
        if reward.role is None:
            continue
        if reward.role not in config.roles:
            raise ValueError(
                f"{where}.role={reward.role!r} is none of roles={sorted(config.roles)}: name one"
            )
        kind = config.role_kind(reward.role)
        if kind not in ("reward", JUDGE) and ":" not in kind:
            raise ValueError(
                f"{where}.role={reward.role!r} is a {kind}: a reward comes from a role of kind "
                "reward or judge, or of your own (module:Class)"
            )


def _check_memory(config: Config) -> None:
    for name, role in config.roles.items():
        kind = config.role_kind(name)
        for part, policy in role.residency.items():
            where = f"roles.{name}.residency.{part}={policy}"
            if part in ("kv_cache", "graphs") and kind not in WITH_ENGINE:
                raise ValueError(f"{where}: only an engine has a {part}: leave the key out")
            if part == "optimizer" and not config.is_trained(name):
                raise ValueError(f"{where}: {name} is not trained: leave the key out")
            if part != "optimizer" and policy == "stream":
                raise ValueError(
                    f"{where}: only an optimizer steps in windows while it stays on the host: use "
                    "host or auto"
                )
            if part in ("base", "weights", "optimizer") and policy == "drop" and kind != "rollout":
                raise ValueError(
                    f"{where}: nothing would bring them back; only a rollout's weights are, by "
                    "the next weight sync: use host"
                )


def _check_updates(config: Config) -> None:
    """Refuse update keys, such as epochs and minibatches, of roles that are not trained."""
    for name, role in config.roles.items():
        if not config.is_trained(name):
            for key in (key for key in UPDATE_KEYS if key in role.train):
                raise ValueError(
                    f"roles.{name}.train.{key}={role.train[key]}: {name} is not trained, so it "
                    f"has no updates: leave the key out, or set roles.{name}.trained=true"
                )
            continue
        count, prompts = config.train_section(name).num_minibatches, config.data.prompts_per_step
        if count > prompts:
            where = f"roles.{name}.train" if "num_minibatches" in role.train else "train"
            raise ValueError(
                f"{where}.num_minibatches={count} is more than data.prompts_per_step={prompts}: a "
                "minibatch holds whole groups, so lower the first"
            )


def _check_lag(config: Config) -> None:
    algorithm = config.algorithm
    if config.lag == 0 or not config.flow_row.weighs_ratios:
        return
    if algorithm.importance_cap is None and algorithm.old_logprobs != "rollout":
        raise ValueError(
            f"lag={config.lag} with algorithm.importance_cap=null and algorithm.old_logprobs="
            f"{algorithm.old_logprobs}: the samples are one update old, so correct for it: set "
            "algorithm.importance_cap (e.g. 2.0), or algorithm.old_logprobs=rollout"
        )


RULES = (
    *(check_adapters, _check_roles, _check_backends, _check_preference, _check_rewards),
    *(_check_experts, _check_memory, _check_updates, _check_lag, check_used),
    *(_check_samples, _check_evaluation, check_turns, check_judges),
)
TRAINING_RULES = (check_needed, check_updated, check_best, _check_training_samples)
"""Rules that only training needs."""
