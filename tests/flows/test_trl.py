"""DPO, IPO, KTO and SimPO on one batch: losses, gradients and implicit rewards are those of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from spmdrl.algorithms.direct_preference import kto_baseline
from spmdrl.batch import Batch, from_rows
from spmdrl.config.algorithms import PreferenceSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.flows.preference_terms import BASELINE, REFERENCE, pair_loss, with_pair_shares
from spmdrl.models.files.hf import open_model
from spmdrl.training.options import TrainOptions
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from tiny_model import make_tiny_model

# another project's warnings are not ours
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = {
    "prompt": ["How far is it?", "Name a colour.", "Why?", "Count to three."],
    "chosen": ["Two miles", "Green is one of them", "Because", "1 2 3"],
    "rejected": ["No", "Seven", "I do not know why at all", "3"],
}
CASES: dict[str, PreferenceSection] = {
    "dpo": PreferenceSection(loss="dpo", beta=0.3),
    "dpo per token": PreferenceSection(loss="dpo", beta=0.5, length_normalise=True),
    "ipo": PreferenceSection(loss="ipo", beta=0.3),
    "kto": PreferenceSection(loss="kto", beta=0.3, kto_weights=(1.0, 1.3)),
    "simpo": PreferenceSection(loss="simpo", beta=2.0, margin=0.6, label_smoothing=0.1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trl")
    make_tiny_model(root / "policy")
    make_tiny_model(root / "reference", seed=1)
    return root


def their_trainer(root: Path, config: PreferenceSection) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "policy")
    tokenizer.pad_token = "<|im_end|>"
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(root / name) for name in ("policy", "reference")
    )
    data = PAIRS
    common: dict[str, Any] = {
        "output_dir": str(root / "out"),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8 if config.loss == "kto" else 4,
        "beta": config.beta,
    }
    given: dict[str, Any] = {"model": policy, "ref_model": reference, "processing_class": tokenizer}
    if config.loss == "kto":
        from trl import KTOConfig, KTOTrainer

        data = {
            "prompt": [*PAIRS["prompt"], *PAIRS["prompt"]],
            "completion": [*PAIRS["chosen"], *PAIRS["rejected"]],
            "label": [True] * 4 + [False] * 4,
        }
        up, down = config.kto_weights
        arguments = KTOConfig(**common, desirable_weight=up, undesirable_weight=down)
        return KTOTrainer(**given, args=arguments, train_dataset=Dataset.from_dict(data))
    if config.loss == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        del given["ref_model"]
        arguments = CPOConfig(
            **common,
            loss_type="simpo",
            cpo_alpha=0.0,
            simpo_gamma=config.margin,
            label_smoothing=config.label_smoothing,
        )
        return CPOTrainer(**given, args=arguments, train_dataset=Dataset.from_dict(data))
    from trl import DPOConfig, DPOTrainer

    kind = "sigmoid_norm" if config.length_normalise else "sigmoid"
    arguments = DPOConfig(**common, loss_type=["ipo" if config.loss == "ipo" else kind])
    return DPOTrainer(**given, args=arguments, train_dataset=Dataset.from_dict(data))


def theirs(root: Path, config: PreferenceSection) -> tuple[dict[str, float], dict[str, Tensor]]:
    """TRL's loss, norm of its gradient and implicit rewards; and the batch that it made."""
    trainer = their_trainer(root, config)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    if config.loss == "simpo":
        loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    else:
        loss = trainer.compute_loss(model, batch)
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    loss.backward()
    norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    found = {name: float(metrics[f"rewards/{name}"]) for name in ("chosen", "rejected", "margins")}
    return {"loss": loss.item(), "norm": float(torch.stack(norms).norm()), **found}, batch


def sequences(ids: Tensor, attention: Tensor, completion: Tensor) -> list[tuple[list[int], int]]:
    """(tokens, prompt length) of padded rows."""
    rows = []
    for tokens, real, answer in zip(ids, attention.bool(), completion.bool(), strict=True):
        rows.append((tokens[real].tolist(), int((real & ~answer).sum())))
    return rows


def our_rows(batch: dict[str, Tensor], *, kl: bool = False) -> Batch:
    """TRL's batch, without its padding: pair by pair, the chosen row first."""
    if "chosen_labels" in batch:
        found = []
        for side in ("chosen", "rejected"):
            names = (f"{side}_input_ids", f"{side}_attention_mask")
            labels = batch[f"{side}_labels"] != -100
            found += sequences(*(batch[name] for name in names), labels)
    else:
        prefix = "KL_" if kl else ""
        names = ("input_ids", "attention_mask", "completion_mask")
        found = sequences(*(batch[prefix + name] for name in names))
    count = len(found) // 2
    if "label" in batch and not kl:
        order = torch.argsort(~batch["label"].bool(), stable=True).tolist()
        found = [found[i] for i in order]
    paired = [found[i + side * count] for i in range(count) for side in (0, 1)]
    lengths = torch.tensor([prompt for _, prompt in paired])
    return from_rows(
        [tokens for tokens, _ in paired],
        rows={
            # of KTO's mismatched rows nothing is a pair
            "prompt_ids": torch.arange(2 * count)
            if kl
            else torch.arange(count).repeat_interleave(2),
            "sample_index": torch.tensor([0, 1] * count),
            "preference": torch.tensor([1.0, 0.0] * count).double(),
            "prompt_lengths": lengths,
        },
    )


def ours(
    world: World, root: str, name: str, batch: Batch, others: Batch | None
) -> dict[str, float]:
    config = CASES[name]
    mesh = Mesh("policy", [0], {}, "cpu")
    options = TrainOptions(microbatch_tokens=100, clip_norm=1e9)
    backends = {}
    for role in ("policy", "reference"):
        shape, weights = open_model(Path(root) / role)
        backends[role] = TorchBackend(
            mesh, shape, weights, options, torch.device("cpu"), trainable=role == "policy"
        )

    def sums(role: str, rows: Batch) -> Tensor:
        return rows.row_sum(backends[role].forward(rows, next_token())["logprobs"].double())

    columns = {REFERENCE: sums("reference", batch)}
    if others is not None:
        drift = (sums("policy", others) - sums("reference", others)).mean().item()
        columns[BASELINE] = torch.full((len(batch),), kto_baseline(drift)).double()
    rows = with_pair_shares(batch.with_columns(rows=columns))
    found = backends["policy"].forward_backward(
        rows,
        pair_loss(config),
        next_token(),
        normaliser=float(rows["loss_share"].sum()),
        whole_groups=True,
    )
    pairs = found["tokens"]
    return {
        "loss": found["loss"],
        "norm": backends["policy"].optim_step().grad_norm,
        "chosen": found["reward_chosen"] / pairs,
        "rejected": found["reward_rejected"] / pairs,
        "margins": found["margin"] / pairs,
    }


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_rewards_equal_trl(models, name):
    expected, made = theirs(models, CASES[name])
    others = our_rows(made, kl=True) if name == "kto" else None
    (found,) = run_ranks(ours, 1, str(models), name, our_rows(made), others)
    for key, value in expected.items():
        scale = 1e-4 if key == "norm" else 1e-5
        assert found[key] == pytest.approx(value, rel=scale, abs=1e-5), key
    assert abs(expected["margins"]) > 0.01 and expected["norm"] > 0
