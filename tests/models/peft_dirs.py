"""PEFT directories made by PEFT, and logits of both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import ExpertsForm
from spmdrl.models.attention import PackedAttention, make_kernel
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.adapter_sources import WithAdapter
from spmdrl.models.files.hf import fill, open_model
from spmdrl.models.files.peft import open_adapter, read_adapter
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.low_rank import Applied
from spmdrl.models.sharding import SCORE, Head
from spmdrl.models.spans import Span
from tiny_model import load_into

TOKENS = torch.randint(264, (40,), generator=torch.Generator().manual_seed(2))


def theirs(base: Path, head: Head = "lm") -> Any:
    """Transformers' model of a directory."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if head == "lm":
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=1
    )


def their_logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(TOKENS[None]).logits[0]
    return logits


def make_peft(base: Path, out: Path, head: Head = "lm", **fields: Any) -> Tensor:
    """Write an adapter with random A, B and head; return PEFT's logits."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], **fields}
    kind = "CAUSAL_LM" if head == "lm" else "SEQ_CLS"
    model = get_peft_model(theirs(base, head), LoraConfig(task_type=kind, **given))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(out)
    return their_logits(model)


def load_peft(base: Path, directory: Path, head: Head = "lm") -> Tensor:
    """Load a directory onto its base with PEFT; return PEFT's logits."""
    from peft import PeftModel

    return their_logits(PeftModel.from_pretrained(theirs(base, head), directory))


def our_logits(
    base: Path, directory: Path | None, head: Head = "lm", experts: ExpertsForm = "each"
) -> Tensor:
    """Return the logits (of the last token if it is a scalar head) of the project's decoder."""
    with torch.no_grad():
        if directory is None:
            return _logits(_decoder(base, head), [], head)
        return _logits(*_adapted(base, directory, head, experts), head)


def our_gradients(base: Path, directory: Path) -> dict[str, Tensor]:
    """Return the gradients of the logits' squares by name of A and B."""
    decoder, [applied] = _adapted(base, directory, "lm")
    _logits(decoder.requires_grad_(False), [applied], "lm").square().mean().backward()
    tables, found = applied.weights.tables(), dict[str, list[Tensor]]()
    for name, parameter in applied.weights.named_parameters():
        assert parameter.grad is not None
        for piece in tables[name]:
            rows = parameter.grad[piece.offset : piece.offset + piece.rows]
            found.setdefault(piece.name, []).append(rows)
    return {name: torch.cat(parts) for name, parts in found.items()}


def their_gradients(base: Path, directory: Path) -> dict[str, Tensor]:
    """Return PEFT's gradients of the logits' squares by its names in files."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(theirs(base), directory, is_trainable=True)
    wrapped(TOKENS[None]).logits.square().mean().backward()
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }


def _adapted(
    base: Path, directory: Path, head: Head, experts: ExpertsForm = "each"
) -> tuple[Decoder, list[Applied]]:
    decoder = _decoder(base, head, "file" if head == "lm" else "zero")
    adapter = read_adapter(directory, decoder.model, head=head, experts=experts)
    weights = AdapterWeights(decoder.model, adapter, device="cpu", head=head == "score")
    tables = weights.tables()
    source = open_adapter(directory, decoder.model, head=head, experts=experts)
    fill(((p.data, tables[name]) for name, p in weights.named_parameters()), source)
    if head == "score":
        full = WithAdapter(open_model(base, head="score", head_init="zero")[1], source)
        assert SCORE in full.names
        load_into(decoder, full)
    return decoder, [Applied(weights=weights)]


def _decoder(base: Path, head: Head, head_init: Any = "file") -> Decoder:
    model, source = open_model(base, head=head, head_init=head_init)
    decoder = Decoder(model, device="cpu", head=head)
    load_into(decoder, source)
    return decoder


def _logits(decoder: Decoder, adapters: list[Applied], head: Head) -> Tensor:
    attend = PackedAttention(
        [Span(q_start=0, q_stop=len(TOKENS), own=(0, len(TOKENS)))],
        make_kernel("blocked"),
        options=attention_options(decoder.model),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    hidden = decoder(TOKENS, torch.arange(len(TOKENS)), attend, adapters=adapters)
    logits = hidden @ decoder.head_weight().T
    return logits if head == "lm" else logits[-1]
