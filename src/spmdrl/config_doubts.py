"""What a configuration says in vain, or against a paper: warned of once, when a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from spmdrl.config import Config, PromptsSection, TrainSection
from spmdrl.config_sets import held_out_sets

RECIPES = ("policy_loss", "loss_mean", "clip_low", "clip_high")


def doubts(config: Config) -> list[str]:
    """Sentences, each on keys that go together badly or have no effect as things are.

    What a flow of the user's own reads is not known: of it only roles and data are judged.
    """
    found = [*_of_roles(config), *_of_evaluation(config), *_of_data(config)]
    if config.trainer is None:
        found += [*_of_algorithm(config), *_of_preference(config)]
    return found


def _of_algorithm(config: Config) -> Iterator[str]:
    """Keys of `algorithm` that others switch off, or that are no paper's."""
    algorithm = config.algorithm
    if config.flow not in ("grpo", "ppo"):
        return
    if config.flow == "grpo":
        distils = not config.rewards
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
    has_buffer = algorithm.overlong_buffer > 0 or not config.rewards
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
            "(configs/gspo.yaml)"
        )


def _of_preference(config: Config) -> Iterator[str]:
    preference = config.preference
    if config.flow not in ("dpo", "online_dpo"):
        return

    def only(names: Sequence[str], needs: str, *, holds: bool) -> Iterator[str]:
        yield from _in_vain(preference, "preference", names, needs, holds)

    yield from only(["kto_weights"], "preference.loss=kto", holds=preference.loss == "kto")
    yield from only(["pairs"], "flow=online_dpo", holds=config.flow == "online_dpo")
    compares = preference.loss not in ("simpo", "orpo")
    yield from only(["reference"], "a loss with a reference", holds=compares)


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


def _of_evaluation(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    if held_out_sets(config) or not evaluation.model_fields_set - {"sets", "held_out"}:
        return
    keys = _keys("evaluation", evaluation)
    yield f"{keys}: no effect without a held-out set (evaluation.held_out or evaluation.sets)"


def _of_data(config: Config) -> Iterator[str]:
    data, kind = config.data, config.data_kind()
    if "group_size" in data.model_fields_set and kind != "prompts":
        yield f"data.group_size={data.group_size}: no effect on {kind}, which are not sampled"
    pool = config.reward_pool
    lists = [config.rewards, *(described.rewards for described in held_out_sets(config).values())]
    if pool.model_fields_set and not any(r.function for rewards in lists for r in rewards):
        yield f"{_keys('reward_pool', pool)}: no effect without a reward function"
    yield from _of_source(data.train, kind)


def _of_source(source: PromptsSection, kind: str) -> Iterator[str]:
    """Keys that only some sources have."""
    given = source.model_fields_set
    is_task, is_hub = (source.source.startswith(f"{name}:") for name in ("reasoning_gym", "hub"))

    def only(names: Sequence[str], needs: str, *, holds: bool) -> Iterator[str]:
        yield from _in_vain(source, "data.train", names, needs, holds)

    yield from only(["task", "seed"], "a source reasoning_gym:TASK", holds=is_task)
    yield from only(["split"], "a source hub:NAME", holds=is_hub)
    names = ["prompt_column", "answer_column", "columns", "answer_pattern"]
    yield from only(names, "a source with columns", holds=not is_task)
    names = ["answer_column", "answer_pattern"]
    if not is_task and "answer_column" in given and kind == "preferences":
        yield from only(names, "data of prompts", holds=False)


def _in_vain(
    section: BaseModel, where: str, names: Sequence[str], needs: str, holds: bool
) -> Iterator[str]:
    """A sentence for each key that is set though what it needs does not hold."""
    if holds:
        return
    values = section.model_dump(include=set(names) & section.model_fields_set)
    for name, value in values.items():
        if value != type(section).model_fields[name].get_default(call_default_factory=True):
            yield f"{where}.{name}={value}: no effect without {needs}"


def _keys(where: str, section: BaseModel) -> str:
    return ", ".join(f"{where}.{name}" for name in sorted(section.model_fields_set))
