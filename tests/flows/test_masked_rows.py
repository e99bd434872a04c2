"""Means count the tokens and responses that the loss mask leaves, and a step without any is no
update. (Of a report that a user's environment that masks cut responses diluted the loss.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.algorithms.advantages import group_advantages
from spmdrl.batch import Batch
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.distributed.reduce import moments
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.roles.calls import Call
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from spmdrl.world import World
from tiny_model import make_tiny_model

MAX_TOKENS = 10
MODES = ("token_mean", "sequence_mean", "fixed_length")


class MaskingEnvironment:
    """Of every four samples of a prompt, the loss counts one; in step 1 none."""

    def __init__(self, run: Run) -> None:
        self.run, self.inner = run, GroupEnvironment(run)

    def collect(self, step: int) -> Batch:
        batch = self.inner.collect(step)
        kept = (batch["sample_index"] % 4 == 0) & (step != 1)
        mask = batch["loss_mask"] & kept.repeat_interleave(batch.lengths)
        batch = batch.with_columns(tokens={"loss_mask": mask})
        names = ("lengths", "loss_mask", "rewards", "prompt_ids", "response_lengths")
        torch.save(
            {name: batch[name] for name in names[1:]} | {"lengths": batch.lengths},
            self.run.directory / f"rows_{step}_{self.run.world.rank}.pt",
        )
        return batch

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return ()

    def metrics(self) -> Metrics:
        return self.inner.metrics()


class FlatEnvironment:
    """One prompt's rewards differ, those of all others are equal; in step 1 all are."""

    def __init__(self, run: Run) -> None:
        self.inner = GroupEnvironment(run)

    def collect(self, step: int) -> Batch:
        batch = self.inner.collect(step)
        alive = (batch["prompt_ids"] == moments(batch["prompt_ids"]).minimum) & (step != 1)
        rewards = torch.where(alive, batch["sample_index"] % 2, 0).to(batch["rewards"].dtype)
        return batch.with_columns(rows={"rewards": rewards})

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return ()

    def metrics(self) -> Metrics:
        return self.inner.metrics()


def run_all(world: World, configs: list[str]) -> list[list[dict[str, float]]]:
    found = []
    with start_reward_server() as server:
        for path in configs:
            config = load_config(path, [])
            train(config, world, server)
            found.append(read_metrics(Path(config.run_dir) / "metrics.jsonl"))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, float]]]]:
    root = tmp_path_factory.mktemp("masked")
    make_tiny_model(root / "model")
    make_tiny_model(root / "scalar", head="score")
    configs = {}
    for mode in MODES:
        configs[mode] = write_config(
            root / f"{mode}.yaml",
            root / "model",
            root / mode,
            environment=f"{Path(__file__)}:MaskingEnvironment",
            data=questions(root / "questions.jsonl"),
            # an entropy bonus moves every token, so that no advantage has to
            algorithm={"loss_mean": mode, "entropy_coef": 1e-3},
            steps=2,
            checkpoint={"export": False, "every": 1, "keep_last": 9},
        )
    scalar = {"model": str(root / "scalar")}
    configs["ppo"] = write_config(
        root / "ppo.yaml",
        root / "model",
        root / "ppo",
        flow="ppo",
        environment=f"{Path(__file__)}:MaskingEnvironment",
        roles={"policy": {}, "reference": {}, "value": scalar, "rollout": {}},
        data=questions(root / "questions.jsonl"),
        algorithm={"kl_coef": 0.1},
        steps=3,
    )
    configs["online_dpo"] = write_config(
        root / "online_dpo.yaml",
        root / "model",
        root / "online_dpo",
        flow="online_dpo",
        environment=f"{Path(__file__)}:MaskingEnvironment",
        roles={"policy": {}, "reference": {}, "rollout": {}},
        data=questions(root / "questions.jsonl"),
        steps=1,
    )
    configs["flat"] = write_config(
        root / "flat.yaml",
        root / "model",
        root / "flat",
        environment=f"{Path(__file__)}:FlatEnvironment",
        data=questions(root / "questions.jsonl"),
        steps=3,
        train={"num_minibatches": 5, "weight_decay": 0.1, "schedule": "linear"},
        checkpoint={"export": False, "every": 1, "keep_last": 9},
    )
    (found, _) = run_ranks(run_all, 2, [str(p) for p in configs.values()], timeout_s=300)
    return root, dict(zip(configs, found, strict=True))


def rows_of(root: Path, step: int) -> list[dict[str, Any]]:
    return [torch.load(root / f"rows_{step}_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_is_over_what_the_mask_leaves(runs, mode):
    root, records = runs
    total, tokens, live = 0.0, 0.0, 0
    for rows in rows_of(root / mode, 0):
        advantages = group_advantages(rows["rewards"], rows["prompt_ids"], std=True)
        masks = rows["loss_mask"].split(rows["lengths"].tolist())
        for advantage, mask in zip(advantages.tolist(), masks, strict=True):
            count = int(mask.sum())
            weight = {"token_mean": 1.0, "sequence_mean": 1 / max(count, 1)}
            total -= advantage * count * weight.get(mode, 1 / MAX_TOKENS)
            tokens += count
            live += count > 0
    (record,) = (r for r in records[mode] if r["step"] == 1 and "loss" in r)
    assert record["update_tokens"] == tokens and live == 5
    share = tokens if mode == "token_mean" else live
    # the ratio of the first update is 1; the bonus is the mean entropy of the same weights
    bonus = 1e-3 * record["entropy"]
    if mode == "token_mean":
        assert record["loss"] == pytest.approx(total / share - bonus, abs=1e-5)
    elif mode == "fixed_length":
        assert record["loss"] == pytest.approx(
            total / share - bonus * tokens / live / MAX_TOKENS, abs=1e-5
        )
    else:  # entropies of responses, not of tokens, weigh alike
        assert record["loss"] == pytest.approx(total / share - bonus, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_without_live_tokens_is_no_update(runs, mode):
    root, records = runs
    (record,) = (r for r in records[mode] if r["step"] == 2 and "samples" in r)
    assert record["update_tokens"] == 0 and "loss" not in record
    one, two = (
        load_file(next((root / mode / "checkpoints" / f"step_{n:08d}").glob("*rank_00000*")))
        for n in (1, 2)
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_ppo_counts_responses_that_the_mask_leaves(runs):
    root, records = runs
    first, second, third = (r for r in records["ppo"] if "samples" in r)
    scores, live = 0.0, 0
    for rows in rows_of(root / "ppo", 0):
        kept = torch.stack([m.any() for m in rows["loss_mask"].split(rows["lengths"].tolist())])
        scores, live = scores + rows["rewards"][kept].sum().item(), live + int(kept.sum())
    # reference and policy are one model: the shaped reward is the score of the live responses
    assert first["shaped_reward"] == pytest.approx(scores / live, abs=1e-4)
    assert first["value/update_tokens"] == first["update_tokens"] > 0
    assert second["update_tokens"] == second["value/update_tokens"] == 0
    assert third["kl_per_response"] != 0 and third["update_tokens"] > 0


def test_answers_that_are_masked_are_in_no_pair(runs):
    (record,) = (r for r in runs[1]["online_dpo"] if "samples" in r)
    assert record["pairs"] == 0 and "loss" not in record


def test_minibatches_without_signal_are_no_update(runs):
    """One minibatch of five has a gradient: the schedule, the version and the lag count one."""
    root, records = runs
    first, second, third = (r for r in records["flat"] if "samples" in r)
    assert first["no_gradient"] == third["no_gradient"] == 4 / 5
    assert "loss" not in second and second["update_tokens"] == 0
    assert [r["sample_lag"] for r in (first, second, third)] == [0, 0, 0]
    indices = [
        json.loads((root / f"flat/checkpoints/step_{n:08d}/checkpoint.json").read_text())
        for n in (1, 2, 3)
    ]
    assert [index["state"]["versions"]["policy"] for index in indices] == [1, 1, 2]
    assert [index["state"]["counters"]["policy"]["num_steps"] for index in indices] == [1, 1, 2]
