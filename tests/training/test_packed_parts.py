"""Rows whose samples have parts train as rows built by hand, one for each part, which share the
sample's advantage.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_turn_gradients import states
from torch import Tensor
from training_cases import make_rows, options

from harness import run_ranks
from spmdrl.algorithms.policy_loss import loss_weights
from spmdrl.batch import Batch, from_rows
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.flows.advantage_terms import token_advantages
from spmdrl.flows.policy_terms import policy_loss
from spmdrl.models.config import read_config
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.training.packing import PART_START, Microbatch, pack
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World
from tiny_model import make_tiny_model

PROMPTS = ([7, 8, 9], [7, 8, 9], [11, 12], [11, 12])
"""Two groups of two samples."""

PARTS = (
    [([7, 8, 9], [20, 21, 22]), ([7, 8, 9, 22, 30], [23, 24]), ([7, 8, 9, 22, 24, 31], [25])],
    [([7, 8, 9], [26, 27])],
    [([11, 12], [28, 29, 20]), ([13, 12, 20, 32], [33, 34])],
    [([11, 12], [35, 36]), ([11, 12, 36, 37], [38, 39, 40])],
)
"""Sample -> its parts: context, and tokens sampled after it. One context begins otherwise."""

REWARDS = (1.0, 0.0, 0.25, 0.75)
ALGORITHM = AlgorithmSection(advantage_std=False)


def masked(parts: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[bool], list[bool]]:
    tokens, mask, starts = [], [], []
    for number, (context, drawn) in enumerate(parts):
        tokens += context + drawn
        mask += [False] * len(context) + [True] * len(drawn)
        starts += [number > 0] + [False] * (len(context) + len(drawn) - 1)
    return tokens, mask, starts


def made(samples: list[int], rows: list[list[tuple[list[int], list[int]]]]) -> Batch:
    """Rows of these parts each.

    Args:
        samples: the sample that each row belongs to.
    """
    columns = [masked(own) for own in rows]
    return from_rows(
        [tokens for tokens, _, _ in columns],
        rows={
            "prompt_ids": torch.tensor([number // 2 for number in samples]),
            "prompt_lengths": torch.tensor([len(PROMPTS[number]) for number in samples]),
            "rewards": torch.tensor([REWARDS[number] for number in samples]),
        },
    ).with_columns(
        tokens={
            "loss_mask": torch.tensor([value for _, mask, _ in columns for value in mask]),
            PART_START: torch.tensor([value for _, _, own in columns for value in own]),
        }
    )


def in_parts() -> Batch:
    return made([0, 1, 2, 3], list(PARTS))


def by_hand() -> tuple[Batch, list[int]]:
    """A row for each part, and the sample of each."""
    samples = [number for number, parts in enumerate(PARTS) for _ in parts]
    rows = made(samples, [[part] for parts in PARTS for part in parts])
    return rows.keep([name for name in rows.columns() if name != PART_START]), samples


def streams(found: list[Microbatch]) -> list[list[object]]:
    names = ("tokens", "positions", "origin", "predict", "targets", "destination")
    return [[*(getattr(m, name).tolist() for name in names), m.spans] for m in found]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1000, 12])
def test_parts_are_laid_out_as_rows(share: bool, budget: int) -> None:
    batch, (rows, samples) = in_parts(), by_hand()
    found = pack(batch, budget_tokens=budget, share_prompts=share)
    wanted = pack(
        rows,
        budget_tokens=budget,
        share_prompts=share,
        # where they do not fit, no sample is cut
        atom=None if budget == 1000 else torch.tensor(samples),
    )
    if budget == 1000:
        assert streams(found) == streams(wanted) and len(found) == 1
        assert found[0].rows.tolist() == [0, 1, 2, 3]
        owner = [samples[row] for row in wanted[0].rows[wanted[0].row].tolist()]
        assert found[0].rows[found[0].row].tolist() == owner
    else:
        assert len(found) > 1
        assert sorted(row for m in found for row in m.rows.tolist()) == [0, 1, 2, 3]
        read = torch.cat([m.destination for m in found]).sort()[0]
        assert torch.equal(read, torch.cat([m.destination for m in wanted]).sort()[0])


def test_a_row_is_read_in_its_last_part() -> None:
    (found,) = pack(in_parts(), budget_tokens=100, share_prompts=True, places="last_tokens")
    (wanted,) = pack(
        made([0, 1, 2, 3], [[parts[-1]] for parts in PARTS]),
        budget_tokens=100,
        share_prompts=True,
        places="last_tokens",
    )
    for name in ("tokens", "positions", "spans", "predict", "targets", "destination", "row"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name


def test_a_column_without_parts_changes_nothing() -> None:
    batch = make_rows([5, 3], 3)
    none = batch.with_columns(tokens={PART_START: torch.zeros(batch.num_tokens, dtype=torch.bool)})
    for budget in (20, 1000):
        found, wanted = (
            pack(rows, budget_tokens=budget, share_prompts=True) for rows in (none, batch)
        )
        assert streams(found) == streams(wanted)
        assert [m.row.tolist() for m in found] == [m.row.tolist() for m in wanted]


def test_a_loss_token_without_a_context_is_refused() -> None:
    batch = in_parts()
    mask = batch["loss_mask"] | batch[PART_START]
    with pytest.raises(ValueError, match="row 0: the first token of a part is in the loss mask"):
        pack(batch.with_columns(tokens={"loss_mask": mask}), budget_tokens=9, share_prompts=True)


def trained(path: Path, rows: Batch, columns: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the first moments of a first optimizer step, which are a tenth of the gradient."""
    backend = TorchBackend(
        Mesh("policy", range(1), {}, "cpu"),
        read_config(path),
        open_checkpoint(path),
        options(clip_norm=1e9),
        torch.device("cpu"),
    )
    found = backend.forward_backward(
        rows.with_columns(tokens=columns),
        policy_loss(ALGORITHM),
        next_token(1.0, entropy=True),
        normaliser=12.0,
    )
    backend.optim_step()
    moments = {n: t.clone() for n, t in states(backend).items() if n.startswith("exp_avg/")}
    return found["loss"], moments


def compared(world: World, path: Path) -> dict[str, bool]:
    batch, (rows, samples) = in_parts(), by_hand()
    advantages = token_advantages(batch, ALGORITHM, 60)
    centred = torch.tensor(REWARDS)[samples] - 0.5  # both groups' mean
    own = centred.repeat_interleave(rows.lengths) * rows["loss_mask"]
    assert torch.equal(advantages, own), "each sample counts once"
    counted = token_advantages(rows, ALGORITHM, 60)  # fault: each part counts
    weights = loss_weights(batch.lengths, batch["loss_mask"], ALGORITHM.loss_mean, max_tokens=60)
    columns = {"loss_weights": weights, "old_logprobs": torch.linspace(-5, -4, batch.num_tokens)}
    loss, wanted = trained(path, rows, {**columns, "advantages": own})
    found = {"moved": max(float(tensor.abs().max()) for tensor in wanted.values()) > 0}
    for name, given, taken in (
        ("parts", batch, advantages),
        ("counted per part", rows, counted),
        ("one context", batch.keep([n for n in batch.columns() if n != PART_START]), advantages),
    ):
        other, moments = trained(path, given, {**columns, "advantages": taken})
        assert moments.keys() == wanted.keys() and len(moments) > 5
        same = all(torch.equal(moments[n], wanted[n]) for n in wanted)
        found[name] = same and other == loss
    return found


def test_a_sample_in_parts_trains_as_rows_built_by_hand(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    (found,) = run_ranks(compared, 1, tmp_path / "model")
    assert found == {
        "parts": True,
        "counted per part": False,
        "one context": False,
        "moved": True,
    }
