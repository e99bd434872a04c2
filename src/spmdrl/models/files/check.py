"""`spmdrl check-model`: finds errors and oddities in a model's directory, weights included."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.families import CLASSIFICATION
from spmdrl.models.files.inspection import HEAD, WithTiedHead, inspect
from spmdrl.models.files.tokenizer_files import TOKENIZER_CONFIG, notes
from spmdrl.models.files.tokenizers import check_tokenizer, load_tokenizer
from spmdrl.models.files.weight_files import PLAIN, Checkpoint, open_checkpoint
from spmdrl.models.sharding import SCORE, Head, Slice, global_shapes


@dataclass(kw_only=True)
class Findings:
    """Findings about a directory.

    Args:
        summary: one line about the model.
        errors: reasons to refuse it, as whole lines that name file and key or tensor.
        notes: oddities that are no reason to refuse it.
    """

    summary: str = ""
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        errors = [f"error: {text}" for text in self.errors]
        notes = [f"note: {text}" for text in self.notes]
        verdict = "the model is refused" if errors else "the model is loaded"
        return [*([self.summary] if self.summary else []), *notes, *errors, verdict]


def check_directory(path: str | Path) -> Findings:
    """Read all of a Hugging Face directory: configuration, every weight, tokenizer."""
    found = Findings()
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


def _check_weights(path: Path, model: ModelConfig, found: Findings) -> None:
    try:
        checkpoint = open_checkpoint(path)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
        return
    head = _head(model, checkpoint)
    report = inspect(model, checkpoint, head)
    found.errors += report.errors
    found.notes += report.notes
    files = {entry.file for entry in checkpoint.entries.values()}
    dtypes = sorted({entry.dtype for entry in checkpoint.entries.values()})
    found.summary = (
        f"{path}: {model.architecture}{' with a scalar head' if head == 'score' else ''}, "
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


def _head(model: ModelConfig, checkpoint: Checkpoint) -> Head:
    """Return the head that the directory's model has."""
    named = str(model.source["architectures"][0])
    is_scalar = CLASSIFICATION in named or (
        SCORE in checkpoint.names and HEAD not in checkpoint.names and not model.tie_embeddings
    )
    return "score" if is_scalar else "lm"
