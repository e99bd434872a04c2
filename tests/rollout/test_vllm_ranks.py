"""vLLM on two ranks beside the trainer: no weight is left behind, and every rank can be stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rollout_models import StateDict, dense, naive, prompts_of, request, tiny_model
from torch import Tensor

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import fill
from spmdrl.models.files.pad_heads import pad_heads
from spmdrl.models.local_shards import Table
from spmdrl.rollout.protocol import Completion, Finish
from spmdrl.rollout.vllm_engine import VllmEngine
from spmdrl.rollout.vllm_model import VOCAB_MULTIPLE
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.sync import WeightSync
from spmdrl.world import World
from stopping import POLLS
from sweeps import asked
from tiny_model import load_into, make_tiny_model
from torchrun import Torchrun, attempt_of, outcome_of
from vllm_cases import make_vllm, needs_vllm

SIZES = {"hidden_size": 128, "head_dim": 32, "vocab_size": 136}
"""vLLM pads this vocabulary to 192 rows; of two ranks the second has 40 of them."""

pytestmark = pytest.mark.full

STOPS = (5, 9)
"""The engine steps after which ranks 0 and 1 see a request to stop."""

CONFIGS: dict[str, list[str]] = {
    "dp2, shared storage that the plan moves": [
        "roles.policy.residency={weights: host, optimizer: host}",
        "evaluation.held_out=4",
        "evaluation.sampling={temperature: 0}",
        "sampling.stop=[ab]",
    ],
    "dp2 from shards": ["roles.policy.dp_shard=2", "rollout.sync_check_every=1"],
    "tp2": ["roles.policy.tp=2", "roles.rollout.tp=2", "rollout.sync_check_every=1"],
    "tp2 from dp2, one step off-policy": [
        "roles.rollout.tp=2",
        "lag=1",
        "algorithm.importance_cap=2.0",
    ],
}


def source_tensors(table: Table, weights: StateDict) -> dict[str, tuple[Tensor, Any]]:
    """What a trainer would hold there, filled."""
    held = {name: (torch.empty(h.shape, dtype=h.dtype), h.slices) for name, h in table.items()}
    fill(held.values(), weights)
    return held


def interrupted(engine: VllmEngine, world: World, tp: int) -> list[Completion]:
    """Long samples that are asked to stop at a step of the rank's own: of its group's leader."""
    asked = [
        request(tokens, i, max_tokens=150, ignore_eos=True)
        for i, tokens in enumerate(prompts_of(24, 40))
    ]
    steps: list[int] = []

    def should_stop() -> bool:
        assert tp == 1 or world.is_first, "the leader asks, the others are told"
        steps.append(len(steps) + 1)
        return steps[-1] == STOPS[0 if tp > 1 else world.rank]

    found = engine.generate(asked, seed=0, step=1, should_stop=should_stop)
    [whole] = engine.generate(asked[:1], seed=0, step=1)
    assert whole[0].finish == Finish.LENGTH, "it was stopped for good"
    assert found[0][0].tokens == whole[0].tokens[: len(found[0][0].tokens)]
    return [group[0] for group in found]


def weights_and_stops(
    world: World, name: str, tp: int
) -> tuple[list[str], list[Completion], list[Completion]]:
    """Change the trainer's tensors one by one, then all together; sync; compare the engine.

    Returns the local names whose change the engine did not show as the trainer did, what it
    generates at the end, and what it has of samples that were stopped.
    """
    config, weights = tiny_model(name, **SIZES)
    tensors = {hf: weights.tensor(hf).clone() for hf in weights.names}
    weights = StateDict(tensors)
    group = dist.group.WORLD if tp > 1 else None
    rank = world.rank if tp > 1 else 0
    engine = make_vllm(config, tp=Parallel(group=group, rank=rank, size=tp))
    degrees = {"dp_replicate": world.size}
    source = model_layout(config, [0, 1], degrees, torch.float32)
    degrees = {"dp_replicate": world.size // tp, "tp": tp}
    target = model_layout(config, [0, 1], degrees, torch.float32, vocab_multiple=VOCAB_MULTIPLE)
    held = source_tensors(source[world.rank], weights)
    sync = WeightSync(
        # a tiny bucket, so that every tensor travels in cells
        plan_sync(source, target, bucket_bytes=4096, share=False),
        source[world.rank],
        target[world.rank],
        held,
        engine,
        torch.device("cpu"),
    )
    sync.run()
    decoder = Decoder(config, device="cpu")
    sequences = prompts_of(24, 40)
    generator = torch.Generator().manual_seed(4)

    def expected() -> Tensor:
        load_into(decoder, weights)
        found = []
        for tokens in sequences:
            ids = torch.tensor(tokens)
            with torch.no_grad():
                hidden = decoder(ids, torch.arange(len(tokens)), dense)
                logprobs = (hidden @ decoder.head_weight().T).log_softmax(-1)
            found.append(logprobs[:-1].gather(1, ids[1:, None])[:, 0])
        return torch.cat(found)

    def engine_scores() -> Tensor:
        return torch.tensor([value for row in engine.score(sequences) for value in row])

    wrong = []
    last = expected()
    if (engine_scores() - last).abs().max() > 1e-4:
        wrong.append("before any change")
    for local, (tensor, slices) in held.items():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.3 * tensor.std().clamp_min(0.1)
        for piece in slices:
            tensors[piece.name].copy_(tensor[piece.offset : piece.offset + piece.rows])
        sync.run()
        now = expected()
        assert (now - last).abs().max() > 1e-3, f"the test would not see a stale {local}"
        last = now
        if (engine_scores() - now).abs().max() > 1e-4:
            wrong.append(local)
    asked = [
        request(tokens, i, temperature=0, max_tokens=30, ignore_eos=True)
        for i, tokens in enumerate(sequences)
    ]
    found = [group[0] for group in engine.generate(asked, seed=0, step=0)]
    for i, one in enumerate(asked):
        if found[i].tokens != naive(config, weights, one, 0, seed=0, step=0).tokens:
            wrong.append(f"greedy tokens of prompt {i}")
    stopped = interrupted(engine, world, tp)
    engine.close()
    return wrong, found, stopped


def stopped_run(world: World, config: str, root: str) -> dict[str, Any]:
    """A run that each rank sees a stop of in its first generation, and what goes on from it."""
    run_dir = Path(load_config(config, []).run_dir)
    os.environ[POLLS] = " ".join(str(step) for step in STOPS)
    [first] = run_configs(world, [(config, [])], root)
    outcomes, polls = [outcome_of(run_dir)], attempt_of(run_dir) / f"polls_{world.rank}"
    told = {"before": first, "polls": int(polls.read_text())}
    dist.barrier()
    del os.environ[POLLS]
    [records] = run_configs(world, [(config, [])], root)
    return {**told, "records": records, "outcomes": [*outcomes, outcome_of(run_dir)]}


CASES = {"tp2": ("Qwen2", 2), "dp2": ("Llama", 1)}
"""Case -> the model, and the engine's tp."""


def _ranks(
    world: World,
    cases: set[str],
    configs: dict[str, tuple[str, list[str]]],
    stopped: str | None,
    root: str,
) -> dict[str, Any]:
    return {
        **{name: weights_and_stops(world, *CASES[name]) for name in CASES if name in cases},
        "runs": dict(zip(configs, run_configs(world, list(configs.values()), root), strict=True)),
        "stopped run": None if stopped is None else stopped_run(world, stopped, root),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm")
    # three heads: tp=2 needs the padded model
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
    make_tiny_model(root / "plain", hidden_size=96, **heads)
    pad_heads(root / "plain", root / "model", "6/2")
    return root


def config_of(root: Path, name: str, **sections: Any) -> Path:
    settings = {"rollout": {"engine": "vllm", "block_size": 16}, "steps": 4, **sections}
    return write_config(root / f"{name}.yaml", root / "model", root / name, **settings)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, root: Path) -> list[dict[str, Any]]:
    configs = {
        name: (str(config_of(root, f"run_{number}")), words)
        for number, (name, words) in enumerate(CONFIGS.items())
        if name in asked(request, "name")
    }
    stopped = None
    if any(item.name == STOPPED for item in request.session.items):
        given = {"environment": "stopping:StopsAt", "sampling": {"max_tokens": 60}}
        stopped = str(config_of(root, "stopped", steps=2, **given))
    cases = asked(request, "case")
    return run_ranks(_ranks, 2, cases, configs, stopped, str(root), timeout_s=800)


STOPPED = "test_a_run_stops_in_a_long_generation_and_goes_on"


@needs_vllm
@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_left_behind(results: list[dict[str, Any]], case: str) -> None:
    (first_wrong, first, _), (second_wrong, second, _) = (result[case] for result in results)
    assert (first_wrong, second_wrong) == ([], [])
    assert first == second, "the ranks differ"


@needs_vllm
@pytest.mark.parametrize("case", CASES)
def test_every_group_stops_by_itself(results: list[dict[str, Any]], case: str) -> None:
    first, second = (result[case][2] for result in results)
    assert {c.finish for c in (*first, *second)} == {Finish.ABORTED}
    assert {len(c.tokens) for c in first} == {STOPS[0]}
    assert {len(c.tokens) for c in second} == {STOPS[0 if case == "tp2" else 1]}


@needs_vllm
def test_a_run_stops_in_a_long_generation_and_goes_on(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        found = result["stopped run"]
        # one more when the generation had ended
        assert found["polls"] == STOPS[rank] + 1 and found["before"] == []
        assert found["outcomes"] == ["stopped", "done"]
        assert len(found["records"]) == 2
    for record in results[0]["stopped run"]["records"]:
        assert record["rollout_gap_max"] < 1e-4 and record["grad_norm"] > 0


@needs_vllm
@pytest.mark.parametrize("name", CONFIGS)
def test_grpo_on_two_ranks(results: list[dict[str, Any]], name: str) -> None:
    """The engine's log-probabilities are the trainer's, before and after three updates."""
    records = results[0]["runs"][name]
    assert len(records) == 4
    lag = 1.0 if "off-policy" in name else 0.0
    for record in records if lag == 0 else records[:1]:  # later samples are of an older policy
        assert record["rollout_gap_max"] < 1e-4
    for record in records:
        assert record["grad_norm"] > 0 and record["skipped"] == 0
        assert 0 <= record["sync/canary_gap"] < 2e-5
    assert records[-1]["sample_lag"] == lag


@needs_vllm
def test_a_run_under_torchrun_ends_without_a_word(root: Path) -> None:
    config = config_of(root, "torchrun")
    with Torchrun(config, "steps=2", "roles.rollout.tp=2") as run:
        assert run.wait(300) == 0, run.output()
    assert outcome_of(root / "torchrun") == "done"
    output = run.output()
    for word in ("Traceback", "Error", "rocess group", "leaked", "WARNING"):
        assert word not in output.replace("WARNING reasoning_gym", ""), output
