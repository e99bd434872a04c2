"""Scalar heads under the names that reward and value models of the hub have: one linear row.

The project's name space has `score.weight` and `score.bias`; files that call them otherwise are
read under these names. The hub has score (transformers, OpenRLHF, Skywork), v_head.summary (TRL),
v_head (DeepSpeed-Chat), value_head, regression_head (UltraRM, Eurus), score_head (Beaver).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spmdrl.models.config import ModelConfig
from spmdrl.models.files.stored_tensors import Entry, read_header
from spmdrl.models.files.weight_files import Checkpoint
from spmdrl.models.model_classes import class_name, is_labelled
from spmdrl.models.sharding import SCORE, SCORE_BIAS

HEAD_NAMES = (
    *("score", "classifier", "v_head", "v_head.summary", "value_head", "value_head.summary"),
    *("reward_head", "regression_head", "regression_layer", "score_head", "rm_head"),
)
"""Modules that are read as a scalar head."""

OWN_FILE = "value_head.safetensors"
"""The file in which LLaMA-Factory keeps a head apart from the model."""

_CHOICES = (
    "score with a role of your own (roles.NAME.kind=module:Class), or give this one a new head "
    "with roles.NAME.head=normal (or zero) and train it"
)


@dataclass(frozen=True, kw_only=True)
class ScalarHead:
    """A directory's weights with its scalar head under the project's names.

    Args:
        model: the configuration, which knows whether the head has a bias.
        checkpoint: the weights.
        module: the head's name in the files; None if there is none.
        errors: reasons to refuse it as a scalar head.
        remarks: what is done with it, for the log.
    """

    model: ModelConfig
    checkpoint: Checkpoint
    module: str | None = None
    errors: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The head's tensors in the files; none if there is no head that can be read."""
        if self.module is None or self.errors:
            return frozenset()
        return frozenset({f"{self.module}.weight", f"{self.module}.bias"})

    @property
    def description(self) -> str:
        """The head's tensors as the files name them."""
        return f"{self.module}.weight{' and .bias' if self.model.score_bias else ''}"


def find_scalar_head(model: ModelConfig, checkpoint: Checkpoint) -> ScalarHead:
    """Find the scalar head among a directory's tensors, by names and shapes, without values.

    Raises:
        ValueError: a file of its own is damaged.
    """
    entries = _with_own_file(checkpoint)
    found = _modules(model, entries)
    if not found:
        return ScalarHead(model=model, checkpoint=checkpoint)
    if len(found) > 1:
        names = " and ".join(f"{name}.weight" for name in found)
        problem = f"{checkpoint.path} holds several heads ({names}): remove all but one"
        return ScalarHead(model=model, checkpoint=checkpoint, errors=(problem,))
    [module] = found
    errors = tuple(_errors(model, entries, module))
    weight, bias = f"{module}.weight", f"{module}.bias"
    renamed = {weight: SCORE, bias: SCORE_BIAS}
    notes = checkpoint.notes
    remarks: tuple[str, ...] = ()
    if module != "score" and not errors:
        remarks = (f"{checkpoint.path}: the scalar head {module!r} is read as {SCORE!r}",)
    if not errors and all(isinstance(model.source.get(k), float) for k in ("mean", "std")):
        notes = (
            *notes,
            f"{checkpoint.path}: the score is not normalised by config.json's mean, std",
        )
    entries = {renamed.get(name, name): entry for name, entry in entries.items()}
    return ScalarHead(
        model=replace(model, score_bias=bias in entries or SCORE_BIAS in entries),
        checkpoint=Checkpoint(checkpoint.path, entries, notes),
        module=module,
        errors=errors,
        remarks=remarks,
    )


def _with_own_file(checkpoint: Checkpoint) -> Mapping[str, Entry]:
    file = checkpoint.path / OWN_FILE
    own = read_header(file) if file.is_file() else {}
    return {**own, **checkpoint.entries}


def _modules(model: ModelConfig, entries: Mapping[str, Entry]) -> list[str]:
    """List the heads that the tensors belong to; one that config.json names comes before others."""
    known = [*HEAD_NAMES]
    named = model.source.get("value_head_prefix")  # OpenRLHF
    if isinstance(named, str) and named:
        known.insert(0, named)
    roots = {name.partition(".")[0] for name in known}
    held = sorted(name for name in entries if name.partition(".")[0] in roots)
    linear = [name for name in dict.fromkeys(known) if f"{name}.weight" in entries]
    if named in linear:
        return [str(named)]
    if is_labelled(class_name(model.source)) and "score" in linear:
        return ["score"]
    # what is no linear row belongs to a head of several layers
    taken = tuple(f"{name}.{kind}" for name in linear for kind in ("weight", "bias"))
    deeper = {name.partition(".")[0] for name in held if name not in taken}
    return [*linear, *sorted(deeper - {name.partition(".")[0] for name in linear})]


def _errors(model: ModelConfig, entries: Mapping[str, Entry], module: str) -> list[str]:
    """Explain why a head is no linear row with at most a bias."""
    root = module.partition(".")[0]
    own = {f"{module}.weight", f"{module}.bias"}
    others = sorted(n for n in entries if n.startswith(f"{root}.") and n not in own)
    weight = entries.get(f"{module}.weight")
    if others or weight is None:
        return [
            f"{entries[others[0]].file}: the head {root!r} is of several layers "
            f"({', '.join(others)}), and only one linear row is read (w h + b): {_CHOICES}"
        ]
    source, errors = model.source, []
    if isinstance(source.get("reward_token_id"), int):
        errors.append(
            f"{weight.file.parent / 'config.json'}: reward_token_id={source['reward_token_id']}: "
            f"its score is read at a token that rows here do not end with: {_CHOICES}"
        )
    rows = (1, model.hidden_size)
    if weight.shape != rows:
        labels = source.get("id2label")
        names = ", ".join(map(str, labels.values())) if isinstance(labels, dict) else ""
        errors.append(
            f"{weight.file}: tensor '{module}.weight' has shape {weight.shape}, a scalar head has "
            f"{rows}: one label (num_labels: 1)"
            + (f"; these are {weight.shape[0]} labels{f' ({names})' if names else ''}: {_CHOICES}")
            * (len(weight.shape) == 2 and weight.shape[0] > 1)
        )
    bias = entries.get(f"{module}.bias")
    if bias is not None and bias.shape != (1,) and not errors:
        errors.append(
            f"{bias.file}: tensor '{module}.bias' has shape {bias.shape}, that of a scalar head "
            "has (1,)"
        )
    if not errors and (count := _num_labels(model)) not in (None, 1):
        errors.append(
            f"{weight.file}: tensor '{module}.weight' is one row, but config.json has {count} "
            "labels (id2label, num_labels): set num_labels: 1 there, and remove id2label, label2id"
        )
    return errors


def _num_labels(model: ModelConfig) -> int | None:
    """Count the labels of one of `transformers`' own classes, where config.json names them."""
    source = model.source
    if not is_labelled(class_name(source)):
        return None
    labels, count = source.get("id2label"), source.get("num_labels")
    if isinstance(labels, dict):
        return len(labels)
    return count if isinstance(count, int) else None


_OTHER_CODE = re.compile(r"^(model\.|lm_head\.)|rotary_emb\.inv_freq$|position_ids$")


def foreign_parts(model: ModelConfig, checkpoint: Checkpoint) -> str | None:
    """Explain which tensors a class of the hub's own code scores with, besides head and body."""
    name = class_name(model.source)
    if is_labelled(name) or not name.endswith(("RewardModel", "ForScore")):
        return None
    own = {SCORE, SCORE_BIAS}
    others = [n for n in sorted(checkpoint.names - own) if not _OTHER_CODE.search(n)]
    if not others:
        return None
    return (
        f"{checkpoint.entries[others[0]].file}: tensor {others[0]!r} may change the score of "
        f"{name}, whose code is not run: {_CHOICES}"
    )
