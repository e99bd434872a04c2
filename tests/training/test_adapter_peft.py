"""Adapters on the train backend against PEFT, on the same model of transformers in float32."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_backends import CPU, EXPERTS, mesh_of
from torch import Tensor, nn
from training_cases import VOCAB, dense, loss_fn, make_rows, options

from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.keyed_random import chain, key64
from spmdrl.models.adapters import Adapter, LowRank, adapter_shapes, find_targets
from spmdrl.models.dropout import Dropout, column_hashes
from spmdrl.models.files.hf import open_model
from spmdrl.models.tensors import Slice
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

TEMPERATURE, NORMALISER = 0.8, 7.0
SEED, RATE = 11, 0.4
ATTENTION = {"q_proj": 3, "k_proj": 3, "v_proj": 5, "o_proj": 2}
RANKS = {
    "Llama": {**ATTENTION, "gate_proj": 2, "down_proj": 4},
    "Qwen3": {**ATTENTION, "gate_proj": 2, "up_proj": 2, "down_proj": 4},
    "Qwen3Moe": ATTENTION,
    "Qwen3Moe experts": {"q_proj": 3},
    "Qwen3Moe shared": {"q_proj": 3},
}
EXPERT_RANK, EXPERT_ALPHA = 3, 4
ALPHA = {name: 2.0 + i for i, name in enumerate(RANKS["Qwen3"])}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def peft_model(kind: str, directory: Path) -> Any:
    """A random model, which is saved, in PEFT with a random adapter."""
    import peft
    import transformers

    family, _, experts = kind.partition(" ")
    extra = {**EXPERTS, "norm_topk_prob": True} if family == "Qwen3Moe" else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **extra)
    config.architectures = [f"{family}ForCausalLM"]
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    model.save_pretrained(directory)
    found = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=EXPERT_RANK,
            lora_alpha=EXPERT_ALPHA,
            target_parameters=[f"mlp.experts.{part}_proj" for part in ("gate_up", "down")]
            if experts
            else None,
            target_modules=sorted(RANKS[kind]),
            rank_pattern=RANKS[kind],
            alpha_pattern={name: ALPHA[name] for name in RANKS[kind]},
        ),
    )
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                if experts == "shared" and ".experts" in name:
                    parameter.copy_(equal_copies(name, parameter))
    return found


def equal_copies(name: str, parameter: Tensor) -> Tensor:
    """The A or B of stacked experts, with the first expert's values for all of them."""
    count = EXPERTS["num_experts"]
    if "lora_A" in name:
        return parameter.view(count, -1, parameter.shape[1])[:1].expand(count, -1, -1).flatten(0, 1)
    return parameter.view(len(parameter), -1, count)[:, :, :1].expand(-1, -1, count).flatten(1)


def by_our_names(model: Any, gradients: bool = False) -> dict[str, Tensor]:
    """The adapter's values, or their gradients."""
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        a, b = (
            (matrix.weight.grad if gradients else matrix.weight).detach().clone()
            for matrix in (module.lora_A["default"], module.lora_B["default"])
        )
        name = path.removeprefix("base_model.model.")
        if ".experts" in name:
            found |= of_experts(name.partition(".experts")[0], module.parameter_name, a, b)
        else:
            found |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return found


def of_experts(block: str, parameter: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Each expert's matrices, from PEFT's A [experts x rank, in] and B [out, rank x experts]; gate
    and up have one A there.
    """
    count, found = EXPERTS["num_experts"], {}
    parts = ("down_proj",) if parameter == "down_proj" else ("gate_proj", "up_proj")
    for number in range(count):
        own = b.view(len(b), -1, count)[:, :, number].contiguous()
        for part, rows in zip(parts, own.chunk(len(parts)), strict=True):
            module = f"{block}.experts.{number}.{part}"
            found[f"{module}.lora_A.weight"] = a.view(count, -1, a.shape[1])[number]
            found[f"{module}.lora_B.weight"] = rows
    return found


def with_shared_a(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of each expert's A of gate and up, replaced by their sum: that of one A of both."""
    shared = {}
    for name, gradient in gradients.items():
        pair = [name.replace(".up_proj.", f".{part}.") for part in ("gate_proj", "up_proj")]
        if ".experts." in name and ".up_proj.lora_A." in name:
            shared |= dict.fromkeys(pair, gradients[pair[0]] + gradient)
    return gradients | shared


def in_one(tensors: dict[str, Tensor], *, total: bool) -> dict[str, Tensor]:
    """The experts' tensors as those that all share: the first one, or the sum of all."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        if own not in found:
            found[own] = tensor
        elif total:
            found[own] = found[own] + tensor
    return found


class WithTensors:
    """A model's weights, and tensors by name."""

    def __init__(self, base: Any, tensors: dict[str, Tensor]) -> None:
        self._base, self._tensors = base, tensors
        self.names = base.names | set(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape) if name in self._tensors else self._base.shape(name)

    def read(self, part: Slice) -> Tensor:
        if part.name not in self._tensors:
            return self._base.read(part)
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return self._tensors[part.name][box]


class Masked(nn.Module):
    """Dropout that replaces PEFT's: the masks of one matrix in the row that is being computed."""

    def __init__(self, name: str, row: list[Dropout]) -> None:
        super().__init__()
        self.number, self.row = key64(*name.encode()), row

    def forward(self, x: Tensor) -> Tensor:
        return self.row[-1].apply(x[0], self.number, 0)[None]


def mask_dropouts(model: Any) -> list[Dropout]:
    """Replace the dropouts; the last entry of the list that is returned serves all of them."""
    row: list[Dropout] = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            weight = f"{name.removeprefix('base_model.model.')}.weight"
            module.lora_dropout["default"] = Masked(weight, row)
    return row


def row_dropouts(rows: Batch, step: int) -> list[Dropout]:
    """The masks of each row, from keys that are made one by one."""
    found, columns = [], column_hashes(64, CPU)
    for number, length in enumerate(rows.lengths.tolist()):
        prompt, sample, first = (
            int(rows[name][number]) for name in ("prompt_ids", "sample_index", "prompt_lengths")
        )
        role = key64(SEED, *b"policy")
        keys = [
            chain(role, step, prompt, -1 if place < first else sample, place)
            for place in range(length)
        ]
        found.append(Dropout(rate=RATE, keys=torch.tensor(keys), columns=columns))
    return found


def theirs(model: Any, rows: Batch, dropouts: bool = False) -> dict[str, Any]:
    """PEFT's logits, log-probabilities, loss and gradients, row by row."""
    every, logprobs, entropy = [], [], []
    masks = iter(row_dropouts(rows, step=0))
    row = mask_dropouts(model) if dropouts else []
    for tokens in torch.split(rows["tokens"], rows.lengths.tolist()):
        row.append(next(masks))
        logits = model(input_ids=tokens[None]).logits[0]
        every.append(logits.detach())
        scores = torch.log_softmax(logits / TEMPERATURE, -1)[:-1]
        zero = scores.new_zeros(1)
        logprobs.append(torch.cat((zero, scores.gather(1, tokens[1:, None])[:, 0])))
        entropy.append(torch.cat((zero, -(scores.exp() * scores).sum(-1))))
    mask = rows["loss_mask"]
    outputs = {"logprobs": torch.cat(logprobs)[mask], "entropy": torch.cat(entropy)[mask]}
    given = LossInput(
        outputs=outputs,
        columns={n: c[mask] for n, c in rows.tokens.items()},
        rows=rows.rows,
        row=rows.row_of_token()[mask],
        num_rows=len(rows),
    )
    loss = loss_fn(given)[0] / NORMALISER
    loss.backward()
    return {
        "logits": torch.cat(every),
        "logprobs": outputs["logprobs"].detach(),
        "loss": float(loss.detach()),
        "gradients": by_our_names(model, gradients=True),
    }


def adapter_for(kind: str, path: Path) -> Adapter:
    model, _ = open_model(path)
    targets: dict[str, LowRank] = {}
    for name in find_targets(model, tuple(RANKS[kind])):
        part = name.split(".")[-2]
        rank = RANKS[kind][part]
        targets[name] = LowRank(rank=rank, scale=ALPHA[part] / rank)
    if " " in kind:
        own = LowRank(rank=EXPERT_RANK, scale=EXPERT_ALPHA / EXPERT_RANK)
        targets |= dict.fromkeys(find_targets(model, ["experts"]), own)
    return Adapter(targets=targets, shares_experts=kind.endswith(" shared"))


def ours(
    world: World,
    kind: str,
    path: Path,
    tensors: dict[str, Tensor],
    rows: Batch,
    dropout: float = 0.0,
) -> dict[str, Any]:
    config, weights = open_model(path)
    adapter = replace(adapter_for(kind, path), dropout=dropout)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == adapter_shapes(config, adapter)
    backend = TorchBackend(
        mesh_of(world, {}),
        config,
        WithTensors(weights, tensors),
        options(microbatch_tokens=40, seed=SEED, recompute="layer"),
        CPU,
        adapter=adapter,
    )
    logits, decoder = [], backend.body.decoder
    with torch.no_grad():
        for tokens in torch.split(rows["tokens"], rows.lengths.tolist()):
            places = torch.arange(len(tokens))
            hidden = decoder(tokens, places, dense, adapters=backend._weights.applied())
            logits.append(hidden @ decoder.head_weight().T)
    readout = next_token(TEMPERATURE)
    found = backend.forward(rows, readout)["logprobs"][rows["loss_mask"]]
    sums = backend.forward_backward(rows, loss_fn, readout, normaliser=NORMALISER)
    gradients = {}
    for leaf in backend._trained:
        gradient = leaf.gradient()
        assert gradient is not None
        for piece in leaf.slices:
            gradients[piece.name] = gradient[piece.offset : piece.offset + piece.rows]
    return {
        "logits": torch.cat(logits),
        "logprobs": found,
        "loss": sums["loss"],
        "gradients": with_shared_a(gradients),
    }


@pytest.mark.parametrize("kind", RANKS)
def test_logits_losses_and_gradients_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    model = peft_model(kind, tmp_path)
    rows = make_rows([6, 3, 9], 3, seconds=True)
    expected, values = theirs(model, rows), by_our_names(model)
    if is_shared := kind.endswith(" shared"):
        values = in_one(values, total=False)
        expected["gradients"] = in_one(expected["gradients"], total=True)
    [found] = run_ranks(ours, 1, kind, tmp_path, values, rows)
    for name in ("logits", "logprobs"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        # an expert may have no token
        assert gradient.abs().max() > 1e-3 or ".experts." in name, name
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-5)
    used = [gradient.abs().max() > 1e-3 for gradient in expected["gradients"].values()]
    assert sum(used) > 0.7 * len(used)
    of_experts = 0 if " " not in kind else 6 if is_shared else 6 * EXPERTS["num_experts"]
    assert len(expected["gradients"]) == 2 * (2 * len(RANKS[kind]) + of_experts)


def test_dropout_is_that_of_peft_with_the_same_masks(tmp_path: Path) -> None:
    model = peft_model("Llama", tmp_path)
    rows = make_rows([6, 3, 9], 3, seconds=True)
    expected = theirs(model, rows, dropouts=True)
    [found] = run_ranks(ours, 1, "Llama", tmp_path, by_our_names(model), rows, RATE)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-5)
    assert (found["logprobs"] - expected["logprobs"]).abs().max() > 0.01, "passes without"
