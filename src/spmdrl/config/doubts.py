"""Warnings, given once when a run starts: keys without effect, or against their paper."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import BaseModel

from spmdrl.config.adapter_rules import has_adapter, trains_adapter
from spmdrl.config.data import DataKind, PromptsSection
from spmdrl.config.data_sets import described_sets, held_out_sets, is_rewarded, mixed_source
from spmdrl.config.sections import Config
from spmdrl.config.shipped_flows import is_shipped
from spmdrl.config.training import TrainSection

PHASES = (
    *("default", "start", "sync", "rollout", "reward", "logprobs", "update", "reference"),
    *("evaluation", "checkpoint", "stopping"),
)
"""Names that `limits` can have in a shipped flow."""

COLUMNS: Mapping[DataKind, tuple[str, ...]] = {
    "prompts": ("messages",),
    "conversations": ("messages", "response"),
    "preferences": ("chosen", "rejected", "margin"),
}
"""Kind of data -> the names of `columns` that it reads."""

DRAWN = ("threshold", "num_samples", "k", "sampling", "against")
"""Keys of a held-out set for sampling and judging responses."""

RECIPES = ("policy_loss", "loss_mean", "clip_low", "clip_high")


def doubts(config: Config) -> list[str]:
    """Sentences, each on keys that fit together badly or have no effect in this configuration.

    Nobody knows which keys a user's own flow reads, so the `algorithm` keys and roles that a
    shipped flow would ignore are judged for shipped flows only.
    """
    found = [*_of_roles(config), *_of_evaluation(config), *_of_data(config)]
    found += [*_of_checkpoints(config), *_of_devices(config), *_of_adapters(config)]
    if config.trainer is None and config.environment is None and is_shipped(config.flow):
        found += _of_flow(config)
    if config.trainer is None:
        found += [*_of_algorithm(config), *_of_preference(config)]
    return found


def _of_flow(config: Config) -> Iterator[str]:
    """Roles and keys that a shipped flow never reads."""
    lists = [config.rewards, *(described.rewards for described in held_out_sets(config).values())]
    judges = {reward.role for rewards in lists for reward in rewards}
    flow = config.flow_row
    asked = {*flow.needs, *flow.asks, *judges, config.preference.judge}
    for name in config.roles:
        if name not in asked and config.role_kind(name) != "rollout":
            yield f"roles.{name}: flow={config.flow} never asks it: leave the role out"
    if flow.warms_value and "reference" in config.roles and config.algorithm.kl_coef == 0:
        yield "roles.reference: no effect without algorithm.kl_coef above 0"
    for phase in config.limits:
        if phase not in PHASES:
            yield f"limits.{phase}: no effect, for no phase has that name; there are {PHASES}"
    if "reward" in flow.updates and config.roles["reward"].retokenize:
        yield "roles.reward.retokenize=True: no effect on a reward model that is trained"
    has_groups = flow.data != "conversations"
    names = ["share_prompts"]
    yield from _in_vain(config.train, "train", names, "rows of one prompt", has_groups)
    names = ["text_samples", "rollouts"]
    yield from _in_vain(config.log, "log", names, "a flow that samples", flow.samples)


def _of_checkpoints(config: Config) -> Iterator[str]:
    section = config.checkpoint
    repeats = section.every > 0
    yield from _in_vain(section, "checkpoint", ["keep_every"], "checkpoint.every above 0", repeats)
    names = ["export_dtype"]
    exports = bool(section.export)
    yield from _in_vain(section, "checkpoint", names, "checkpoint.export", exports)
    kinds = {config.role_kind(name) for name in config.roles}
    if config.rollout.turns is not None and "rollout" not in kinds:
        yield "rollout.turns: no effect without roles.rollout"
    draws = "rollout" in kinds and config.rollout.engine == "native"
    names = ["journal_kv"]
    yield from _in_vain(
        section, "checkpoint", names, "roles.rollout with rollout.engine=native", draws
    )


def _of_adapters(config: Config) -> Iterator[str]:
    """Keys of adapters without a role that has one."""
    adapts = has_adapter(config, "policy")
    yield from _in_vain(config.rollout, "rollout", ["adapters"], "roles.policy.adapter", adapts)
    needs = "a role that trains an adapter, and checkpoint.export"
    exports = trains_adapter(config) and bool(config.checkpoint.export)
    yield from _in_vain(config.checkpoint, "checkpoint", ["export_as"], needs, exports)
    for name, role in config.roles.items():
        if role.adapter is not None:
            where, trained = f"roles.{name}.adapter", config.is_trained(name)
            yield from _in_vain(role.adapter, where, ["dropout"], "training it", trained)


def _of_devices(config: Config) -> Iterator[str]:
    """Keys of devices and groups that the run does not have."""
    names = ["cuda_graphs"]
    yield from _in_vain(
        config.rollout, "rollout", names, "a GPU (device=cpu)", config.device != "cpu"
    )
    for name, role in config.roles.items():
        if role.tp_across_nodes and role.tp == 1:
            yield f"roles.{name}.tp_across_nodes=True: no effect with roles.{name}.tp=1"


def _of_algorithm(config: Config) -> Iterator[str]:
    """Keys of `algorithm` that others switch off, or that differ from their paper."""
    algorithm, flow = config.algorithm, config.flow_row
    if not flow.weighs_ratios:
        return
    if flow.compares_groups:
        distils = not is_rewarded(config)
        compares = algorithm.advantage == "grpo" and not distils
        yield from _in_vain(algorithm, "algorithm", ["advantage_std"], "advantage=grpo", compares)
        names = ["advantage", "overlong_buffer", "overlong_penalty"]
        yield from _in_vain(algorithm, "algorithm", names, "rewards", not distils)
        has_kl = algorithm.kl_coef > 0
        names = ["kl_estimator", "kl_in"]
        yield from _in_vain(algorithm, "algorithm", names, "algorithm.kl_coef above 0", has_kl)
        if has_kl and algorithm.kl_in == "reward" and algorithm.kl_estimator != "k1":
            yield (
                f"algorithm.kl_in=reward with algorithm.kl_estimator={algorithm.kl_estimator}: its "
                "gradient through an advantage is not the KL's; k1's is"
            )
    names = ["overlong_penalty"]
    has_buffer = algorithm.overlong_buffer > 0 or not is_rewarded(config)
    yield from _in_vain(
        algorithm, "algorithm", names, "algorithm.overlong_buffer above 0", has_buffer
    )
    has_target = algorithm.kl_target is not None
    yield from _in_vain(algorithm, "algorithm", ["kl_horizon"], "algorithm.kl_target", has_target)
    yield from _of_gspo(config)


def _of_gspo(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    wide = max(algorithm.clip_low, algorithm.clip_high) > 0.01
    if algorithm.policy_loss == "gspo" and (wide or algorithm.loss_mean != "sequence_mean"):
        yield (
            f"algorithm.policy_loss=gspo with loss_mean={algorithm.loss_mean}, clip_low="
            f"{algorithm.clip_low:g} and clip_high={algorithm.clip_high:g}: the paper's mean is "
            "sequence_mean, and it clips at 3e-4 and 4e-4, for the ratio is of whole responses "
            "(configs/methods/gspo.yaml)"
        )


def _of_preference(config: Config) -> Iterator[str]:
    preference = config.preference
    if not config.flow_row.reads_preference:
        return

    def only(names: Sequence[str], needs: str, *, holds: bool) -> Iterator[str]:
        yield from _in_vain(preference, "preference", names, needs, holds)

    yield from only(["kto_weights"], "preference.loss=kto", holds=preference.loss == "kto")
    yield from only(["pairs"], "flow=online_dpo", holds=config.flow_row.pairs_samples)
    yield from only(["ties"], "preference.judge", holds=preference.judge is not None)
    yield from only(["reference"], "a loss with a reference", holds=preference.needs_reference)


def _of_roles(config: Config) -> Iterator[str]:
    kinds = {name: config.role_kind(name) for name in config.roles}
    for name in config.roles:
        if not config.is_trained(name):
            continue
        train = config.train_section(name)
        where = f"roles.{name}.train" if config.roles[name].train else "train"
        yield from _of_training(config, name, train, where)
    trained = any(config.is_trained(name) for name in config.roles)
    if not trained and config.train.model_fields_set:
        keys = _keys("train", config.train)
        yield f"{keys}: no role is trained, so only what reads log-probabilities has an effect"
    if "rollout" not in kinds.values():
        sections = (("rollout", config.rollout), ("sampling", config.sampling))
        for where, section in sections:
            if section.model_fields_set:
                yield f"{_keys(where, section)}: no effect without roles.rollout"


def _of_training(config: Config, name: str, train: TrainSection, where: str) -> Iterator[str]:
    steps = config.num_optimizer_steps(name)
    if train.warmup_steps > steps > 0:
        yield (
            f"{where}.warmup_steps={train.warmup_steps}: the run has {steps} optimizer steps of "
            f"{name}, so its rate never reaches {where}.lr={train.lr:g}"
        )
    if train.schedule == "constant" and train.min_lr_ratio > 0:
        yield (
            f"{where}.min_lr_ratio={train.min_lr_ratio:g} with {where}.schedule=constant: no "
            "effect; linear and cosine end there"
        )
    if config.role_kind(name) in ("reward", "value"):
        names = ["head_chunk"] if where != "train" or not _reads_logits(config) else []
        yield from _in_vain(train, where, names, "a head of logits", holds=False)


def _reads_logits(config: Config) -> bool:
    return any(
        config.role_kind(name) in ("policy", "reference", "teacher") for name in config.roles
    )


def _of_evaluation(config: Config) -> Iterator[str]:
    evaluation, sets = config.evaluation, held_out_sets(config)
    if sets:
        yield from _of_held_out(config)
        return
    if not evaluation.model_fields_set - {"sets", "held_out"}:
        return
    keys = _keys("evaluation", evaluation)
    yield f"{keys}: no effect without a held-out set (evaluation.held_out or evaluation.sets)"


def _of_held_out(config: Config) -> Iterator[str]:
    """Keys for sampling and judging responses, where none are sampled."""
    sets, has_rollout = held_out_sets(config), _draws(config)
    most, held_out = config.evaluation.max_items, config.evaluation.held_out
    if most is not None and isinstance(held_out, int) and not config.evaluation.sets:
        yield f"evaluation.max_items={most}: no effect on the count evaluation.held_out={held_out}"
    drawn = {name for name, s in sets.items() if (s.kind or config.data_kind()) == "prompts"}
    drawn = drawn if has_rollout else set()
    needs = "a held-out set of prompts, and a rollout"
    yield from _in_vain(config.evaluation, "evaluation", DRAWN, needs, bool(drawn))
    for name, given in described_sets(config).items():
        for key in DRAWN if name not in drawn else ():
            if key in given:
                yield f"evaluation.sets.{name}.{key}={given[key]}: no effect without {needs}"


def _draws(config: Config) -> bool:
    return any(config.role_kind(name) == "rollout" for name in config.roles)


def _of_data(config: Config) -> Iterator[str]:
    data, kind = config.data, config.data_kind()
    if "group_size" in data.model_fields_set and kind != "prompts":
        yield f"data.group_size={data.group_size}: no effect on {kind}, which are not sampled"
    pool = config.reward_pool
    lists = [config.rewards, *(described.rewards for described in held_out_sets(config).values())]
    if pool.model_fields_set and not any(r.function for rewards in lists for r in rewards):
        yield f"{_keys('reward_pool', pool)}: no effect without a reward function"
    # a held-out set inherits data.train's keys
    kinds = {kind, *(s.kind or kind for s in held_out_sets(config).values())}
    yield from _of_source(data.train, "data.train", kinds, data.train.model_fields_set)
    for number, entry in enumerate(data.mix):
        source = mixed_source(config, entry)
        yield from _of_source(source, f"data.mix.{number}", {kind}, entry)
    for name, described in held_out_sets(config).items():
        if described.data is not None:
            own = described_sets(config)[name].get("data", {})
            where, kinds = f"evaluation.sets.{name}.data", {described.kind or kind}
            yield from _of_source(described.data, where, kinds, own)


def _of_source(
    source: PromptsSection, where: str, kinds: Collection[DataKind], given: Collection[str]
) -> Iterator[str]:
    """Keys for only some sources, and keys for only some kinds of data.

    Args:
        kinds: kinds of the data that are read with the section's keys.
        given: the keys that the section sets itself.
    """
    is_task, is_hub = (source.source.startswith(f"{name}:") for name in ("reasoning_gym", "hub"))

    def only(names: Sequence[str], needs: str, *, holds: bool) -> Iterator[str]:
        own = [name for name in names if name in given]
        yield from _in_vain(source, where, own, needs, holds)

    is_made = is_task or source.source == "seeds"
    yield from only(["task"], "a source reasoning_gym:TASK", holds=is_task)
    yield from only(["seed"], "a source reasoning_gym:TASK or seeds", holds=is_made)
    yield from only(["split"], "a source hub:NAME", holds=is_hub)
    answers = ["answer_column", "answer_pattern"]
    names = ["prompt_column", "columns", *answers]
    yield from only(names, "a source with columns", holds=not is_made)
    if is_made:
        return
    yield from only(answers, "data of prompts", holds="prompts" in kinds)
    whole = "messages" in source.columns and "preferences" not in kinds
    names = ["prompt_column"]
    yield from only(names, "questions as well as columns.messages", holds=not whole)
    read = {column for kind in kinds for column in COLUMNS[kind]}
    for name in source.columns if "columns" in given else ():
        if name not in read:
            yield f"{where}.columns.{name}: no effect on {', '.join(sorted(kinds))}"


def _in_vain(
    section: BaseModel, where: str, names: Sequence[str], needs: str, holds: bool
) -> Iterator[str]:
    """A sentence for each key that differs from its default although `needs` does not hold."""
    if holds:
        return
    values = section.model_dump(include=set(names) & section.model_fields_set)
    for name, value in values.items():
        if value != type(section).model_fields[name].get_default(call_default_factory=True):
            yield f"{where}.{name}={value}: no effect without {needs}"


def _keys(where: str, section: BaseModel) -> str:
    return ", ".join(f"{where}.{name}" for name in sorted(section.model_fields_set))
