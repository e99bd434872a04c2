"""What is trained on a trajectory of turns: loss and gradient are those of rows built by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import options

from harness import run_ranks
from spmdrl.algorithms.policy_loss import loss_weights
from spmdrl.batch import Batch, from_rows
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.flows.advantage_terms import token_advantages
from spmdrl.flows.policy_terms import policy_loss
from spmdrl.models.config import read_config
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.roles.generation_rows import Generation
from spmdrl.rollout.protocol import SamplingParams
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from tiny_model import make_tiny_model
from turn_sources import KEY, opens, prompts_of, rollout_of

ALGORITHM = AlgorithmSection(credit="turn", loss_mean="sequence_mean")
GENERATION = Generation(
    seed=4, step=1, group_size=3, sampling=SamplingParams(max_tokens=6, support=True, top_k=20)
)


def sampled(world: World, path: Path) -> tuple[Batch, Batch]:
    """Rows of a rollout, and the same ones put together by hand from what its turns were told."""
    rollout = rollout_of(world, path)
    batch = rollout.generate(prompts_of(world), GENERATION)
    rewards = batch.row_sum(batch["turn_rewards"]) + batch["sample_index"] / 8
    batch = batch.with_columns(rows={"rewards": rewards})
    told = rollout.turns[KEY].source.told
    sequences, masks, turn_rewards, ends = [], [], [], []
    for number, sample in zip(
        batch["prompt_ids"].tolist(), batch["sample_index"].tolist(), strict=True
    ):
        tokens = list(opens([{"number": number}])[0].tokens)
        mask, own = [False] * len(tokens), [0.0] * len(tokens)
        for drawn, given, reward in told[number, sample]:
            tokens += [*drawn, *given]
            mask += [True] * len(drawn) + [False] * len(given)
            own += [0.0] * (len(drawn) - 1) + [reward] + [0.0] * len(given)
        sequences.append(tokens)
        masks += mask
        turn_rewards += own
        ends.append(sum(reward for _, _, reward in told[number, sample]) + sample / 8)
    built = from_rows(
        sequences,
        rows={
            "prompt_ids": batch["prompt_ids"],
            "prompt_lengths": torch.tensor([mask_start(m) for m in split(masks, sequences)]),
            "rewards": torch.tensor(ends, dtype=torch.float32),
        },
    ).with_columns(
        tokens={"loss_mask": torch.tensor(masks), "turn_rewards": torch.tensor(turn_rewards)}
    )
    assert max(len(turns) for turns in told.values()) == 3
    return batch, built


def split(flat: list[bool], sequences: list[list[int]]) -> list[list[bool]]:
    found, start = [], 0
    for sequence in sequences:
        found.append(flat[start : start + len(sequence)])
        start += len(sequence)
    return found


def mask_start(mask: list[bool]) -> int:
    return mask.index(True)


def gradient(
    path: Path, mesh: Mesh, batch: Batch, drawn: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the first moments of a first optimizer step, which are a tenth of the gradient.

    Args:
        drawn: the rollout's log-probabilities, so that the loss depends on the policy's.
    """
    advantages = token_advantages(batch, ALGORITHM, 60)
    weights = loss_weights(batch.lengths, batch["loss_mask"], ALGORITHM.loss_mean, max_tokens=60)
    rows = batch.keep(("tokens", "loss_mask", "prompt_lengths", "prompt_ids"))
    rows = rows.with_columns(
        tokens={"advantages": advantages, "loss_weights": weights, "old_logprobs": drawn}
    )
    given = options(clip_norm=1e9)
    backend = TorchBackend(
        mesh, read_config(path), open_checkpoint(path), given, torch.device("cpu")
    )
    found = backend.forward_backward(
        rows, policy_loss(ALGORITHM), next_token(1.0, entropy=True), normaliser=12.0
    )
    backend.optim_step()
    moments = {n: t.clone() for n, t in states(backend).items() if n.startswith("exp_avg/")}
    return found["loss"], moments


def states(backend: TorchBackend) -> dict[str, Tensor]:
    return {
        name: held[0] if isinstance(held, tuple) else held
        for name, held in backend.state_tensors().items()
    }


def observed(batch: Batch) -> Batch:
    """Fault: what was given is trained on."""
    place = torch.arange(batch.num_tokens) - batch.offsets()[:-1][batch.row_of_token()]
    return batch.with_columns(
        tokens={"loss_mask": place >= batch["prompt_lengths"][batch.row_of_token()]}
    )


def shifted(batch: Batch) -> Batch:
    """Fault: a mask is one token early."""
    mask = batch["loss_mask"].roll(-1)
    return batch.with_columns(tokens={"loss_mask": mask})


def tokenised_again(batch: Batch, path: Path) -> Batch:
    """Fault: the turns before the last are read as text and tokenised again."""
    tokenizer = load_tokenizer(path)
    tokens = batch["tokens"].clone()
    for start, end in zip(batch.offsets()[:-1].tolist(), batch.offsets()[1:].tolist(), strict=True):
        text = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        size = min(len(again), end - start)
        tokens[start : start + size] = torch.tensor(again[:size])
    return batch.with_columns(tokens={"tokens": tokens})


def compared(world: World, path: Path) -> dict[str, Any]:
    batch, built = sampled(world, path)
    drawn = batch["rollout_logprobs"]
    mesh = Mesh("policy", range(1), {}, "cpu")
    wanted, expected = gradient(path, mesh, built, drawn)
    faults: dict[str, Callable[[Batch], Batch]] = {
        "none": lambda rows: rows,
        "observed": observed,
        "shifted": shifted,
        "tokenised again": lambda rows: tokenised_again(rows, path),
    }
    found: dict[str, Any] = {}
    for name, fault in faults.items():
        loss, moments = gradient(path, mesh, fault(batch), drawn)
        assert moments.keys() == expected.keys() and len(moments) > 5
        same = all(torch.equal(moments[n], expected[n]) for n in expected)
        found[name] = (loss == wanted, same)
    found["moved"] = max(float(tensor.abs().max()) for tensor in expected.values())
    return found


def test_a_trajectory_trains_as_the_row_built_by_hand(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("turn_gradients") / "model"
    make_tiny_model(path)
    (found,) = run_ranks(compared, 1, path)
    assert found.pop("moved") > 0
    assert found.pop("none") == (True, True), "bit for bit"
    assert found == dict.fromkeys(found, (False, False)), "each planted fault is seen"
