"""`spmdrl check-model`: finds errors and oddities in a model's directory, weights included."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.expert_forms import one_by_one
from spmdrl.models.files.inspection import (
    HEAD,
    WithTiedHead,
    head_of,
    inspect,
    inspect_scalar,
)
from spmdrl.models.files.peft import open_peft, other_base
from spmdrl.models.files.peft_config import ADAPTER_CONFIG, read_lora_file
from spmdrl.models.files.scalar_head import ScalarHead, find_scalar_head
from spmdrl.models.files.stored_tensors import PLAIN
from spmdrl.models.files.tokenizer_files import TOKENIZER_CONFIG, notes
from spmdrl.models.files.tokenizers import check_tokenizer, load_tokenizer
from spmdrl.models.files.weight_files import Checkpoint, open_checkpoint
from spmdrl.models.model_classes import read_place
from spmdrl.models.sharding import SCORE, Head, global_shapes
from spmdrl.models.tensors import Slice

CONFIG = "config.json"


@dataclass(kw_only=True)
class Findings:
    """Findings about a directory.

    Args:
        summary: one line about the model.
        errors: reasons to refuse it, as whole lines that name file and key or tensor.
        notes: oddities that are no reason to refuse it.
        what: what the directory holds.
    """

    summary: str = ""
    what: str = "model"
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        errors = [f"error: {text}" for text in self.errors]
        notes = [f"note: {text}" for text in self.notes]
        verdict = f"the {self.what} is {'refused' if errors else 'loaded'}"
        return [*([self.summary] if self.summary else []), *notes, *errors, verdict]


def check_directory(path: str | Path, base: str | Path | None = None) -> Findings:
    """Read all of a Hugging Face directory: configuration, every weight, tokenizer.

    Args:
        base: the base of a PEFT directory; None: the one that its configuration names.
    """
    found = Findings()
    if (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / CONFIG).is_file():
        found.what = "adapter"
        try:
            _check_adapter(Path(path), base, found)
        except (ValueError, OSError) as error:
            found.errors.append(str(error))
        return found
    try:
        model = read_config(path)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
        return found
    _check_weights(Path(path), model, found)
    if not (Path(path) / TOKENIZER_CONFIG).is_file():
        found.notes.append(f"{path} has no {TOKENIZER_CONFIG}: it holds no tokenizer")
        return found
    try:
        tokenizer = load_tokenizer(path)
        check_tokenizer(tokenizer, model)
        found.notes += notes(Path(path), tokenizer)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
    return found


def _check_adapter(path: Path, base: str | Path | None, found: Findings) -> None:
    """Read all of a PEFT directory, and compare it with its base's configuration.

    Raises:
        ValueError: it is refused.
        OSError: a file cannot be read.
    """
    file = read_lora_file(path)
    if base is None and file.base is not None and (Path(file.base) / CONFIG).is_file():
        base = file.base
    if base is None:
        raise ValueError(
            f"{file.origin}: its base ({file.base}) is no directory here: give one with --base"
        )
    model = read_config(base)
    opened = open_peft(path, model, head="score")
    found.notes += other_base(file, base)
    adapter, tensors = opened.adapter, opened.tensors
    dtypes = sorted({entry.dtype for entry in tensors.file.entries.values()})
    ranks = sorted({own.rank for own in adapter.targets.values()})
    scales = sorted({own.scale for own in adapter.targets.values()})
    found.summary = (
        f"{path}: adapter of {base}, rank {', '.join(map(str, ranks))}, scale "
        f"{', '.join(f'{scale:g}' for scale in scales)}, {len(adapter.targets)} matrices, "
        f"{len(tensors.names)} tensors ({', '.join(dtypes)})"
        f"{' with a scalar head' if SCORE in tensors.names else ''}"
    )
    adds = False
    for name in sorted(tensors.names):
        shape = tensors.shape(name)
        whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        try:
            values = tensors.read(whole)
        except ValueError as error:
            found.errors.append(str(error))
        else:
            adds = adds or (name.endswith(".lora_B.weight") and bool(values.any()))
    if not adds:
        found.notes.append(f"{path}: every B is zero: the adapter adds nothing (untrained)")


def _check_weights(path: Path, model: ModelConfig, found: Findings) -> None:
    try:
        checkpoint = one_by_one(open_checkpoint(path), model)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
        return
    scalar = find_scalar_head(model, checkpoint)
    head = head_of(scalar)
    if head == "score":
        model, checkpoint, report = scalar.model, scalar.checkpoint, inspect_scalar(scalar)
    else:
        rest = {n: own for n, own in checkpoint.entries.items() if n not in scalar.names}
        report = inspect(model, Checkpoint(path, rest, checkpoint.notes), head)
    found.errors += report.errors
    found.notes += [*report.notes, *report.remarks]
    files = {entry.file for entry in checkpoint.entries.values()}
    dtypes = sorted({entry.dtype for entry in checkpoint.entries.values()})
    found.summary = (
        f"{path}: {model.architecture}{_heads(scalar, head)}, "
        f"{model.num_layers} layers, {len(checkpoint.names)} tensors ({', '.join(dtypes)}) in "
        f"{len(files)} {'file' if len(files) == 1 else 'files'}"
    )
    is_doubled = head == "lm" and model.tie_embeddings and HEAD in checkpoint.names
    source = WithTiedHead(checkpoint) if is_doubled else checkpoint
    zeros: list[str] = []
    for name, shape in global_shapes(model, head).items():
        entry = checkpoint.entries.get(name)
        if entry is None or entry.shape != shape or entry.dtype not in PLAIN:
            continue
        try:
            values = source.read(
                Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
            )
        except ValueError as error:
            found.errors.append(str(error))
        else:
            zeros += [] if values.any() else [f"{entry.file}: tensor {name!r}"]
    if zeros:
        more = f" and {len(zeros) - 1} more" if len(zeros) > 1 else ""
        found.notes.append(f"{zeros[0]}{more} is zero throughout: was it downloaded whole?")


def _heads(scalar: ScalarHead, head: Head) -> str:
    """Say which scalar head the directory has, and where a reward model's score is read."""
    if scalar.module is None or scalar.errors:
        return " with a scalar head" if head == "score" else ""
    place = read_place(scalar.model.source, scalar.model.pad_id)
    text = f" with a scalar head ({scalar.description}; a reward is read at {place})"
    return text if head == "score" else f" with logits, and{text.removeprefix(' with')}"
