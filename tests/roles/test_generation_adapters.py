"""Responses of several adapters over one base, in one call of the rollout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter, adapter_shapes, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.hf import fill, random_tensor
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.models.tensors import Slice
from spmdrl.roles.generation import Rollout
from spmdrl.roles.generation_rows import Generation
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import OWN, SamplingParams
from spmdrl.world import World
from tiny_model import make_tiny_model

JUDGE = "judge"
PROMPTS = [[40, 41, 42], [50, 51], [60, 61, 62, 63], [70, 71]]


class Values:
    """An adapter's values, none of them 0."""

    def __init__(self, model: ModelConfig, adapter: Adapter, seed: int) -> None:
        self._shapes, self._seed = adapter_shapes(model, adapter), seed
        self.names = frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, part: Slice) -> Tensor:
        whole = random_tensor(part.name, self._shapes[part.name], self._seed) * 20
        return whole[tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))]


def rollout_of(world: World, path: Path, adapter: Adapter | None) -> Rollout:
    model = read_config(path)
    engine = NativeEngine(model, adapter=adapter)
    checkpoint = open_checkpoint(path)
    for name, held in engine.weights.table().items():
        is_base = "lora" not in name
        values = checkpoint if is_base or adapter is None else Values(model, adapter, 1)
        fill([(engine.allocate(name), held.slices)], values)
    mesh = Mesh("rollout", range(world.size), {"dp_replicate": world.size}, "cpu")
    return Rollout("rollout", mesh, model, engine)


def generate(rollout: Rollout, world: World, *adapters: str | None) -> Batch:
    numbers = list(range(len(PROMPTS)))[world.rank :: world.size]
    prompts = from_rows(
        [PROMPTS[i] for i in numbers], rows={"prompt_ids": torch.tensor(numbers, dtype=torch.int64)}
    )
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    generation = Generation(seed=1, step=0, group_size=2, sampling=sampling, adapters=adapters)
    return rollout.generate(prompts, generation)


def tokens_of(batch: Batch) -> dict[tuple[int, int], list[int]]:
    return {
        (int(row["prompt_ids"]), int(row["sample_index"])): row["tokens"].tolist()
        for row in batch.split_rows()
    }


def several(world: World, path: Path) -> None:
    model = read_config(path)
    adapter = make_adapter(find_targets(model, ["all"]), rank=4, alpha=8)
    rollout = rollout_of(world, path, adapter)
    rollout.add_adapter(JUDGE, adapter, Values(model, adapter, 2))
    names = (OWN, None, JUDGE)
    batch = generate(rollout, world, *names)
    together = tokens_of(batch)
    assert len(together) == len(batch) == 6 * len(PROMPTS[world.rank :: world.size])
    answers = set()
    for number, name in enumerate(names):
        alone = tokens_of(generate(rollout, world, name))
        assert len(alone) == len(together) / 3
        for (prompt, sample), tokens in alone.items():
            assert together[prompt, sample + 2 * number] == tokens, (name, prompt, sample)
            answers.add((prompt, tuple(tokens)))
    assert len(answers) == len(together) / 2, "greedy: equal within an adapter, else different"
    for name in names:
        scored = rollout.logprobs(batch, adapter=name)["engine_logprobs"]
        own = (batch["sample_index"] // 2 == names.index(name))[batch.row_of_token()]
        gap = (scored - batch["rollout_logprobs"]).abs()[batch["loss_mask"]]
        mine = own[batch["loss_mask"]]
        assert gap[mine].max() < 1e-4 and gap[~mine].mean() > 0.1, name


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation_adapters")
    make_tiny_model(root / "model")
    return root / "model"


def test_each_prompt_is_answered_with_every_adapter(path: Path) -> None:
    run_ranks(several, 2, path)


def refused(world: World, path: Path) -> list[str]:
    model = read_config(path)
    adapter = make_adapter(find_targets(model, ["q_proj"]), rank=2, alpha=4)
    plain, adapted = rollout_of(world, path, None), rollout_of(world, path, adapter)
    values = Values(model, adapter, 2)
    adapted.add_adapter(JUDGE, adapter, values)
    messages = []
    for action in (
        lambda: plain.add_adapter(JUDGE, adapter, values),
        lambda: adapted.add_adapter(JUDGE, adapter, values),
        lambda: generate(plain, world, None),
        lambda: generate(adapted, world, "jury"),
    ):
        with pytest.raises(ValueError) as raised:
            action()
        messages.append(str(raised.value))
    return messages


def test_an_adapter_that_the_engine_cannot_apply_is_refused(path: Path) -> None:
    no_base, taken, base_alone, unknown = run_ranks(refused, 1, path)[0]
    assert no_base.startswith("adapter 'judge': the engine's weights are no fixed base")
    assert taken == "adapter 'judge': the engine has one of that name"
    assert "asks for the base alone" in base_alone
    assert "asks for adapter 'jury', which was not added" in unknown


class Broken(Values):
    """Values of which one cannot be read."""

    def read(self, part: Slice) -> Tensor:
        if ".layers.1." in part.name:
            raise ValueError(f"{part.name} is damaged")
        return super().read(part)


def broken_on_one_rank(world: World, path: Path) -> str:
    model = read_config(path)
    adapter = make_adapter(find_targets(model, ["q_proj"]), rank=2, alpha=4)
    rollout = rollout_of(world, path, adapter)
    kind = Broken if world.rank == 1 else Values
    with pytest.raises(ValueError) as raised:
        rollout.add_adapter(JUDGE, adapter, kind(model, adapter, 2))
    with pytest.raises(ValueError, match="which was not added"):
        generate(rollout, world, JUDGE)
    rollout.add_adapter(JUDGE, adapter, Values(model, adapter, 2))
    return str(raised.value)


def test_an_adapter_without_all_its_values_is_added_on_no_rank(path: Path) -> None:
    first, second = run_ranks(broken_on_one_rank, 2, path)
    assert first == second and "rank 1: model.layers.1." in first and "damaged" in first
