"""All lines of one model directory: our trainer and engine against transformers and each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.export import copy_tokenizer, save_pretrained
from spmdrl.models.files.hf import TensorSource, open_model
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.models.tensors import Slice
from spmdrl.verification.lines import (
    CLOSE,
    SAME,
    Line,
    difference,
    worst_gradient,
)
from spmdrl.verification.ranks import Share, compute_layouts, rows_of_replica
from spmdrl.verification.reference import (
    Reference,
    load_reference,
    plain,
    reference_of,
)
from spmdrl.verification.reference import (
    logits_of as their_logits,
)
from spmdrl.verification.sampling import (
    Found,
    differing,
    differs,
    logprob_gap,
    make_engine,
    requests_of,
    rows_of,
    sample,
    sample_tightly,
)
from spmdrl.verification.texts import Texts, draw_texts
from spmdrl.verification.trainer import (
    Trained,
    logits_of,
    make_trainer,
    train,
    train_once,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is verified, opened, with the texts for it."""

    directory: Path
    model: ModelConfig
    source: TensorSource
    texts: Texts
    mesh: Mesh


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Results of our trainer and engine in one process."""

    trained: Trained
    sampled: Found


def verify(
    directory: Path, *, layers: int | None = None, tokens: int | None = None, ranks: bool = True
) -> Iterator[Line]:
    """Verify a directory line by line.

    Args:
        layers: verify only so many of its layers, the first.
        tokens: tokens of the longest row; None: `texts.LONGEST`.
        ranks: whether to compute it on two processes as well.

    Raises:
        ValueError: the directory is refused, by us or for transformers.
    """
    with _only(directory, layers) as own, _alone() as mesh:
        model, source = open_model(own)
        texts = draw_texts(model.vocab_size, model.source, tokens, model.max_position)
        subject = Subject(directory=own, model=model, source=source, texts=texts, mesh=mesh)
        reference = reference_of(own, texts)
        trained = train_once(mesh, model, source, texts.rows, texts.num_read, share=True)
        yield from _against(subject, reference, trained)
        yield from _packing(subject, trained)
        sampled, lines = _sampling(subject, reference)
        yield from lines
        if ranks:
            yield from _layouts(subject, Ours(trained=trained, sampled=sampled))
        yield _exported(subject, reference)


def _against(subject: Subject, reference: Reference, trained: Trained) -> Iterator[Line]:
    model, texts = subject.model, subject.texts
    backend = make_trainer(subject.mesh, model, subject.source, share=False)
    logits = logits_of(backend, texts.rows)
    pairs = zip(logits, reference.logits, strict=True)
    note = f"{texts.rows.num_rows} rows of up to {int(texts.rows.lengths.max())} tokens"
    yield Line(
        name="logits", figure=max(difference(a, b) for a, b in pairs), limit=CLOSE, note=note
    )
    found = {plain(name): values for name, values in trained.gradients.items()}
    figure, worst = worst_gradient(found, reference.gradients)
    note = f"{len(found)} tensors, worst {worst}"
    yield Line(name="gradients", figure=figure, limit=CLOSE, note=note)


def _packing(subject: Subject, trained: Trained) -> Iterator[Line]:
    """Yield the lines of one stream against rows one by one, and of shared prompts."""
    plain_stream, one_by_one = (
        train_once(
            subject.mesh,
            subject.model,
            subject.source,
            subject.texts.rows,
            subject.texts.num_read,
            share=False,
            **budget,
        )
        for budget in ({}, {"budget": 1})
    )
    for name, found, wanted in (
        ("packed = unpacked", plain_stream, one_by_one),
        ("shared prompts", trained, plain_stream),
    ):
        yield _trained_line(name, found, wanted)


def _trained_line(name: str, found: Trained, wanted: Trained, note: str = "") -> Line:
    figure, worst = worst_gradient(found.gradients, wanted.gradients)
    gap = difference(found.logprobs, wanted.logprobs)
    worst = "log-probabilities" if gap >= figure else worst
    notes = [*([note] if note else []), f"worst {worst}"]
    return Line(name=name, figure=max(gap, figure), limit=CLOSE, note=", ".join(notes))


def _sampling(subject: Subject, reference: Reference) -> tuple[Found, list[Line]]:
    model, texts = subject.model, subject.texts
    requests = requests_of(texts)
    engine = make_engine(model, subject.source)
    roomy = sample(engine, requests)
    pairs = zip(roomy, reference.greedy, strict=False)  # the last request is drawn
    wrong = sum(differs(c.tokens, g.tokens, g.margins) for group, g in pairs for c in group)
    tight, preemptions = sample_tightly(model, engine, requests)
    rows = rows_of(roomy, requests)
    backend = make_trainer(subject.mesh, model, subject.source, share=False)
    logprobs, _ = train(backend, rows, rows.num_rows)
    count = f"{rows.num_rows} samples"
    lines = [
        Line(
            name="greedy tokens",
            figure=float(wrong),
            limit=0,
            note=f"{len(reference.greedy)} prompts, {texts.new_tokens} tokens each",
        ),
        Line(
            name="preempted, in chunks",
            figure=differing(tight, roomy),
            limit=0,
            note=f"{count}, {preemptions} preemptions",
        ),
        Line(
            name="engine = trainer",
            figure=logprob_gap(roomy, logprobs, rows),
            limit=CLOSE,
            note=f"{count}, nats",
        ),
    ]
    return roomy, lines


def _layouts(subject: Subject, ours: Ours) -> Iterator[Line]:
    for name, shares in compute_layouts(subject.directory, subject.texts).items():
        if isinstance(shares, str):
            yield Line(name=name, figure=math.inf, limit=CLOSE, note=shares)
        elif shares[0].refused:
            yield Line(name=name, figure=None, limit=CLOSE, note=shares[0].refused)
        else:
            yield _layout(name, subject, ours, shares)


def _layout(name: str, subject: Subject, ours: Ours, shares: list[Share]) -> Line:
    """Compare a layout's shares with one process."""
    rows, replicas = subject.texts.rows, len({share.replica for share in shares})
    starts = rows.offsets().tolist()
    logprobs = torch.full((rows.num_tokens,), math.nan)
    for share in shares:
        assert share.logprobs is not None
        own = rows_of_replica(subject.texts, share.replica, replicas)
        places = [torch.arange(starts[row], starts[row + 1]) for row in own]
        logprobs[torch.cat(places)] = share.logprobs
    parts = [share.gradients for share in shares if share.gradients is not None]
    found = Trained(logprobs=logprobs, gradients=whole(parts, subject.model))
    wrong, note = 0.0, ""
    for share in shares:
        if share.sampled is not None:
            wrong += differing(share.sampled, ours.sampled[share.replica :: replicas])
            note = "engine's tokens too"
    if wrong:
        note = f"the engine's tokens differ in {wrong:.0f} samples"
        return Line(name=name, figure=math.inf, limit=CLOSE, note=note)
    return _trained_line(name, found, ours.trained, note)


def _exported(subject: Subject, reference: Reference) -> Line:
    """Export the trainer's weights; transformers computes the same from the copy."""
    backend = make_trainer(subject.mesh, subject.model, subject.source, share=False)
    tensors = whole([backend.local_tensors()], subject.model)
    with TemporaryDirectory(prefix="spmdrl_verify_") as place:
        copy = Path(place) / "exported"
        save_pretrained(tensors.items(), subject.model, copy, None)
        theirs = load_reference(copy)
        with torch.no_grad():
            logits = [their_logits(theirs, tokens) for tokens in subject.texts.row_tokens]
    pairs = zip(logits, reference.logits, strict=True)
    return Line(name="export", figure=max(difference(a, b) for a, b in pairs), limit=SAME)


@contextmanager
def _alone() -> Iterator[Mesh]:
    """Make a mesh of this process, in a world of its own where it is in none."""
    if dist.is_initialized():
        yield Mesh("policy", [0], {}, "cpu")
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield Mesh("policy", [0], {}, "cpu")
    finally:
        dist.destroy_process_group()


@contextmanager
def _only(directory: Path, layers: int | None) -> Iterator[Path]:
    """Make a copy of the directory with its first layers; without a number, yield it itself."""
    if layers is None:
        yield directory
        return
    with TemporaryDirectory(prefix="spmdrl_verify_") as place:
        _shorten(directory, layers, Path(place))
        yield Path(place)


def _shorten(directory: Path, layers: int, out: Path) -> None:
    source = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(_fewer(source, layers)), encoding="utf-8")
    copy_tokenizer(directory, out)
    checkpoint, kept = open_checkpoint(directory), {}
    for name in checkpoint.names:
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number is None or int(number[1]) < layers:
            shape = checkpoint.shape(name)
            part = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
            kept[name] = checkpoint.read(part).clone()
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


def _fewer(source: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return config.json with fewer layers, and lists with an entry per layer cut."""
    fewer = {k: _fewer(v, layers) if isinstance(v, Mapping) else v for k, v in source.items()}
    count = source.get("num_hidden_layers")
    if isinstance(count, int):
        fewer["num_hidden_layers"] = min(layers, count)
        lists = ("layer_types", "mlp_layer_types", "no_rope_layers")
        fewer |= {key: source[key][:layers] for key in lists if isinstance(source.get(key), list)}
    return fewer
