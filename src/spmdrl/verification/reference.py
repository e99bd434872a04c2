"""transformers' own computation of a model directory, in float32 with eager attention."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spmdrl.models.config_reading import configuration_class, model_type_of
from spmdrl.models.fields import read_json
from spmdrl.verification.texts import Texts


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """A greedy continuation, with the lead of each token's logit over the next one."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Results of transformers.

    Args:
        logits: every row's [T, V].
        gradients: those of the mean log-probability, by the name that files have for a tensor.
        greedy: each prompt's continuation, computed anew for every token.
    """

    logits: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    greedy: tuple[Greedy, ...]


def load_reference(directory: Path) -> Any:
    """Load a directory as transformers does.

    Raises:
        ValueError: its files lack tensors, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM

    source = read_json(directory / "config.json")
    config: dict[str, Any] = {}
    with _quiet():
        if "model_type" in source:
            kind = model_type_of(source, str(directory))
            if kind != source["model_type"]:  # one that transformers does not know
                own = configuration_class(kind, str(directory)).from_pretrained(directory)
                own.model_type = kind  # by which the class reads the files' names
                config = {"config": own}
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
            **config,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{directory} lacks {missing[0]!r} for transformers, which would draw it at random: "
            "there is nothing to compare with"
        )
    # experts in MXFP4 are dequantised to bfloat16, whatever dtype is asked for
    return nn.Module.float(model).eval()


def logits_of(model: Any, tokens: Sequence[int]) -> Tensor:
    """Compute one text's logits [T, V]."""
    with _precise(model):
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


@contextmanager
def _precise(model: Any) -> Iterator[None]:
    """Shorten the chunks of a gated delta rule, where the model has one.

    Over its usual 64 tokens the logarithms of decays add up to hundreds, and their float32
    differences have lost the digits that are compared.
    """
    names, rule = vars(sys.modules[type(model).__module__]), "torch_chunk_gated_delta_rule"
    if rule not in names:
        yield
        return
    usual = names[rule]
    names[rule] = functools.partial(usual, chunk_size=4)
    try:
        yield
    finally:
        names[rule] = usual


def reference_of(directory: Path, texts: Texts) -> Reference:
    """Compute everything that a directory is compared with.

    Raises:
        ValueError: see `load_reference`.
    """
    model = load_reference(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers on itself
        logits = []
        for tokens, prompt in zip(
            texts.row_tokens, texts.rows["prompt_lengths"].tolist(), strict=True
        ):
            found = logits_of(model, tokens)
            chosen = torch.tensor(tokens[prompt:])[:, None]
            logprobs = found[prompt - 1 : -1].log_softmax(-1).gather(1, chosen)
            (logprobs.sum() / texts.num_read).backward()  # type: ignore[no-untyped-call]
            logits.append(found.detach())
        gradients = _by_file_name(model)
        model.zero_grad()
        with torch.no_grad():
            greedy = tuple(_greedy(model, prompt, texts.new_tokens) for prompt in texts.prompts)
    return Reference(logits=tuple(logits), gradients=gradients, greedy=greedy)


def _by_file_name(model: Any) -> dict[str, Tensor]:
    """Return the gradients as `save_pretrained` would write tensors of these shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return {plain(n): g for n, g in revert_weight_conversion(model, found).items()}


def plain(name: str) -> str:
    """Return a tensor's name in a text model: vision-language models have one more prefix."""
    return name.replace("language_model.", "")


def _greedy(model: Any, prompt: Sequence[int], count: int) -> Greedy:
    tokens, margins = list(prompt), []
    for _ in range(count):
        best = logits_of(model, tokens)[-1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return Greedy(tokens=tuple(tokens[len(prompt) :]), margins=tuple(margins))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out transformers' progress bars and log."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
