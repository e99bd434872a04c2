"""Ends of responses: how long rows may become, and which tokens end a response."""

from __future__ import annotations

import logging

from spmdrl.config.data_sets import rows_read
from spmdrl.config.sections import Config
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.planning.engines import ends_of_text
from spmdrl.role_spec import RoleSpec

log = logging.getLogger(__name__)


def check_lengths(config: Config, spec: RoleSpec) -> None:
    """Raise ValueError if the longest row exceeds the model's positions."""
    positions = spec.model.max_position
    for rows in rows_read(config):
        if rows.longest > positions:
            raise ValueError(
                f"{rows.describe()}, but the model of roles.{spec.name} has {positions} positions"
            )


def check_ends(config: Config, spec: RoleSpec, texts: TokenTexts) -> None:
    """Warn of the tokens that end a response if the rollout's model and its tokenizer differ.

    Raises:
        ValueError: only the maximum length would end a response.
    """
    files = f"{spec.path}/config.json and generation_config.json"
    ends = ends_of_text(spec.model, texts)
    if not ends:
        _check_stops(config, files)
        return
    named = [token for token in ends if token in spec.model.eos_ids]
    others = [end for end in texts.ends if end.token in ends and end.token not in named]
    if others:
        more = " and ".join(f"{end.text!r} ({end.token}), {end.source}" for end in others)
        said = f"name {named} as eos_token_id" if named else "name no eos_token_id"
        log.warning("%s %s, not %s: a response ends with each of them", files, said, more)


def _check_stops(config: Config, files: str) -> None:
    for rows in rows_read(config):
        sampling = rows.sampling
        if sampling is not None and not sampling.stop and not sampling.stop_token_ids:
            raise ValueError(
                f"no token ends a response: {files} name no eos_token_id, and the tokenizer has no "
                f"eos_token. Name one there, or set {rows.sampling_key}.stop or "
                f"{rows.sampling_key}.stop_token_ids"
            )
