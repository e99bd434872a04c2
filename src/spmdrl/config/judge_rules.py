"""Rules on judges: where a role of this kind may be named, and which keys it has."""

from __future__ import annotations

from spmdrl.config.data_sets import is_rewarded
from spmdrl.config.roles import JUDGE
from spmdrl.config.sections import Config


def check_judges(config: Config) -> None:
    """Refuse keys of judges for other roles, keys that a judge has not, and a judge of pairs that
    is none.

    Raises:
        ValueError: such a key is set; the message names it and the fix.
    """
    for name, role in config.roles.items():
        kind, key = config.role_kind(name), f"roles.{name}"
        if kind != JUDGE:
            if role.judge is not None:
                raise ValueError(
                    f"{key}.judge={role.judge.model_dump(exclude_unset=True)}: {name} is a {kind}, "
                    f"and only a judge has questions: leave the key out, or set {key}.kind: judge"
                )
            continue
        if "base" in role.residency and role.base is None:
            raise ValueError(
                f"{key}.residency.base={role.residency['base']}: {name} is a judge, whose adapter "
                f"is merged into its weights: set {key}.residency.weights instead"
            )
    _check_pairs(config)


def judges_pairs(config: Config) -> bool:
    """Whether a judge compares the samples of a prompt."""
    return config.flow_row.pairs_samples and config.preference.judge is not None


def _check_pairs(config: Config) -> None:
    preference = config.preference
    name, flow = preference.judge, config.flow_row
    if name is None:
        return
    if flow.reads_preference and not flow.samples:
        raise ValueError(
            f"preference.judge={name} with flow={config.flow}, whose pairs are in its data: leave "
            "the key out, or set flow=online_dpo"
        )
    if name not in config.roles or config.role_kind(name) != JUDGE:
        what = f"a {config.role_kind(name)}" if name in config.roles else "no role"
        raise ValueError(
            f"preference.judge={name} is {what}: add roles.{name}.kind: judge, or name a judge"
        )
    if preference.ties == "reward" and not is_rewarded(config):
        raise ValueError(
            "preference.ties=reward with rewards=[]: nothing else orders the samples: set it to "
            "drop, or add rewards"
        )
