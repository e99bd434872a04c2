"""Roles of the user's own: the two examples in real runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from flow_cases import write_config
from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.checkpoint.rng import rng_state
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.config.user_objects import load_object
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.row_bytes import Column
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.observe.metrics import read_metrics
from spmdrl.placement import place_roles
from spmdrl.planning.memory import memory_texts
from spmdrl.planning.plan import RolePlan, plan_roles
from spmdrl.rewards.server import start_reward_server
from spmdrl.roles.custom import CustomRole, RoleContext
from spmdrl.roles.generation_rows import Generation
from spmdrl.roles.handles import Reward, Rollout
from spmdrl.roles.kept import Journal
from spmdrl.rollout.protocol import SamplingParams
from spmdrl.run.assembled import Assembly
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.run.assembly.factories import make_scorer
from spmdrl.run.inputs import read_inputs
from spmdrl.run.resume_point import Moment
from spmdrl.run.saving import Saver
from spmdrl.world import World
from tiny_model import make_tiny_model

TOY_REWARDS = Path(__file__).parents[1] / "toy_rewards.py"
ROLES = Path(__file__).parents[2] / "examples" / "roles"
ENSEMBLE = f"{ROLES / 'reward_ensemble.py'}:RewardEnsemble"
SIMILARITY = f"{ROLES / 'embedding_similarity.py'}:EmbeddingSimilarity"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("custom")
    make_tiny_model(root / "model")
    make_tiny_model(root / "a", seed=1, head="score")
    make_tiny_model(root / "b", seed=2, head="score")
    make_tiny_model(root / "other", seed=1, head="score")
    swap_ids(root / "other" / "tokenizer.json")
    return root


def swap_ids(file: Path) -> None:
    """The ids of two letters change places."""
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def made(world: World, path: str, words: list[str]) -> tuple[Assembly, Any, Any]:
    config = load_config(path, words)
    inputs = read_inputs(config)
    models = open_models(config)
    assembly = assemble(config, world, models, inputs.texts)
    return assembly, make_scorer(config, inputs, assembly, None), inputs


def sampled(world: World, assembly: Assembly, inputs: Any) -> Batch:
    rollout = assembly.roles["rollout"]
    assert isinstance(rollout, Rollout)
    assembly.syncs["policy", "rollout"].run()
    generation = Generation(
        seed=0, step=0, group_size=2, sampling=SamplingParams(temperature=1.0, max_tokens=8)
    )
    return rollout.generate(inputs.train.rows([world.rank, 2 + world.rank], 0), generation)


def scores_of_all(world: World, path: str, words: list[str]) -> None:
    """The ensemble's scores are the mean and the minimum of its models', the sum is weighted."""
    assembly, scorer, inputs = made(world, path, words)
    batch = sampled(world, assembly, inputs)
    scored = scorer.score(batch)
    alone = []
    for name in ("a", "b"):
        role = assembly.roles[name]
        assert isinstance(role, Reward)
        alone.append(role.score(batch)["scores"])
    both = torch.stack(alone)
    assert (both[0] - both[1]).abs().min() > 1e-4
    torch.testing.assert_close(scored["reward/mean"], both.mean(0))
    torch.testing.assert_close(scored["reward/least"], both.amin(0))
    wanted = 2.0 * both.mean(0) - 0.5 * both.amin(0) + scored["reward/similarity"]
    torch.testing.assert_close(scored["rewards"], wanted)
    check_similarity(world, inputs, scored)


def check_similarity(world: World, inputs: Any, scored: Batch) -> None:
    """Row by row, without padding, around the centre of the example's own texts."""
    directory = Path(inputs.tokenizer.name_or_path)
    model, tokenizer = (
        AutoModel.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )

    def embed(text: str) -> torch.Tensor:
        ids = tokenizer(text or "<|im_end|>", return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            return model(ids["input_ids"]).last_hidden_state[0].mean(0)

    texts = list(zip(scored.objects["response"], scored.objects["answer"], strict=True))
    texts_of = load_object(f"{ROLES / 'embedding_similarity.py'}:BACKGROUND")
    centre = torch.stack([embed(text) for text in texts_of]).mean(0)
    wanted = [
        torch.cosine_similarity(embed(r) - centre, embed(a) - centre, dim=0) for r, a in texts
    ]
    torch.testing.assert_close(
        scored["reward/similarity"], torch.stack(wanted), rtol=1e-4, atol=1e-4
    )


def test_the_example_roles_score_as_their_parts_do(root):
    options = {"models": [str(root / "a"), str(root / "b")]}
    path = write_config(
        root / "both.yaml",
        root / "model",
        root / "both",
        roles={
            "policy": {},
            "rollout": {},
            "a": {"kind": "reward", "model": str(root / "a"), "ranks": 1},
            "b": {"kind": "reward", "model": str(root / "b")},
            "mean": {"kind": ENSEMBLE, "options": options, "ranks": 1},
            "least": {"kind": ENSEMBLE, "options": {**options, "combine": "min"}},
            "similarity": {"kind": SIMILARITY, "options": {"batch_size": 3}, "ranks": 1},
        },
        rewards=[
            {"role": "mean", "weight": 2.0},
            {"role": "least", "weight": -0.5},
            {"role": "similarity"},
        ],
    )
    run_ranks(scores_of_all, 2, str(path), [], timeout_s=200)


def trained(world: World, path: str, words: list[str]) -> list[dict[str, float]]:
    config = load_config(path, words)
    with start_reward_server() as server:
        train(config, world, server)
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")


@pytest.mark.full
def test_a_flow_trains_on_a_function_and_a_role(root):
    path = write_config(
        root / "mix.yaml",
        root / "model",
        root / "mix",
        roles={
            "policy": {"ranks": 0},
            "rollout": {"ranks": 0},
            "judges": {
                "kind": ENSEMBLE,
                "ranks": 1,
                "options": {"models": [str(root / "a"), str(root / "b")]},
            },
        },
        rewards=[
            {
                "function": f"{Path(__file__).parents[1] / 'toy_rewards.py'}:even_length",
                "weight": 3.0,
            },
            {"role": "judges", "weight": 0.5},
        ],
    )
    records = run_ranks(trained, 2, str(path), [], timeout_s=200)[0]
    for record in records:
        mixed = 3 * record["reward/even_length"] + 0.5 * record["reward/judges"]
        assert record["reward"] == pytest.approx(mixed, rel=1e-5)
        assert record["reward/judges"] != 0
    assert records[-1]["grad_norm"] > 0


class Bad:
    """Returns what `kind` says."""

    needs = ("tokens",)
    returns = (Column(name="scores", kind="row"), Column(name="marks"))

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def setup(self, context: RoleContext) -> None:
        pass

    def forward_step(self, batch: Batch) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "scores": torch.zeros(len(batch)),
            "marks": torch.zeros(batch.num_tokens),
        }
        if self.kind == "short":
            columns["scores"] = columns["scores"][1:]
        elif self.kind == "nan":
            columns["marks"][4] = float("nan")
        elif self.kind == "missing":
            del columns["marks"]
        elif self.kind == "list":
            columns["scores"] = [0.0] * len(batch)
        return columns


REFUSED = {
    "short": r"judge.forward_step: 'scores' has the shape \(1,\).*there are 2 rows",
    "nan": r"judge.forward_step: 'marks' is not finite in row 1",
    "missing": r"judge.forward_step returned \['scores'\], but declares 'marks'",
    "list": r"judge.forward_step: 'scores' is a list, no tensor",
}


def refusals(world: World) -> None:
    mesh = Mesh("judge", [0], {}, "cpu")
    batch = from_rows([[1, 2, 3], [4, 5]], rows={"prompt_ids": torch.arange(2)})
    assert CustomRole("judge", mesh, Bad("fine")).forward(batch)["scores"].tolist() == [0.0, 0.0]
    for kind, message in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            CustomRole("judge", mesh, Bad(kind)).forward(batch)
    with pytest.raises(ValueError, match=r"roles.judge \(Bad\) has no train_step"):
        CustomRole("judge", mesh, Bad("fine")).train(batch)
    with pytest.raises(ValueError, match=r"roles.judge: the class object has no 'needs'"):
        CustomRole("judge", mesh, object())  # type: ignore[arg-type]


def test_bad_columns_are_refused_by_name():
    run_ranks(refusals, 1)


class Counter:
    """Counts the rows that it was trained on."""

    needs = ("tokens",)
    returns = (Column(name="scores", kind="row"),)

    def __init__(self) -> None:
        self.seen = 0

    def setup(self, context: RoleContext) -> None:
        pass

    def forward_step(self, batch: Batch) -> dict[str, Any]:
        return {"scores": torch.full((len(batch),), float(self.seen))}

    def eval_step(self, batch: Batch) -> dict[str, Any]:
        return {"scores": torch.full((len(batch),), -1.0)}

    def train_step(self, batch: Batch) -> dict[str, float]:
        self.seen += len(batch)
        return {"seen": float(self.seen)}


def counted(world: World) -> None:
    role = CustomRole("counter", Mesh("counter", [1], {}, "cpu"), Counter())
    batch = from_rows([[1, 2]] * (1 + world.rank))
    batch = batch.with_columns(rows={"prompt_ids": torch.arange(len(batch)) + 10 * world.rank})
    assert role.train(batch) == {"seen": 3.0}
    assert role.forward(batch)["scores"].tolist() == [3.0] * len(batch)
    assert role.evaluate(batch)["scores"].tolist() == [-1.0] * len(batch)


def test_a_role_can_be_trained_and_has_steps_of_its_own_for_evaluation():
    run_ranks(counted, 2)


def retokenized(world: World, path: str, words: list[str]) -> None:
    assembly, scorer, inputs = made(world, path, words)
    batch = sampled(world, assembly, inputs)
    scored = scorer.score(batch)
    judge = assembly.roles["judge"]
    assert isinstance(judge, Reward)
    tokenizer = load_tokenizer(load_config(path, words).model_path("judge"))
    rows = []
    texts, finishes = scored.objects["response"], batch["finish"].tolist()
    for prompt, text, finish in zip(batch.objects["prompt"], texts, finishes, strict=True):
        messages = [*prompt.messages, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        # the template writes a turn's end, which a response that was cut has not come to
        rows.append(ids if finish == 0 else ids[:-1])
    own = from_rows(
        rows,
        rows={
            "prompt_ids": torch.arange(len(rows)) + 100 * world.rank,
            "sample_index": torch.zeros(len(rows), dtype=torch.int64),
            "prompt_lengths": torch.zeros(len(rows), dtype=torch.int64),
        },
    )
    mask = torch.zeros(own.num_tokens, dtype=torch.bool)
    wanted = judge.score(own.with_columns(tokens={"loss_mask": mask}))["scores"]
    torch.testing.assert_close(scored["rewards"], wanted, rtol=1e-4, atol=1e-5)


def test_another_tokenizer_is_refused_or_read_as_text(root):
    path = write_config(
        root / "other.yaml",
        root / "model",
        root / "other_run",
        roles={
            "policy": {},
            "rollout": {},
            "judge": {"kind": "reward", "model": str(root / "other")},
        },
        rewards=[{"role": "judge"}],
    )
    words = ["roles.judge.retokenize=true"]
    run_ranks(retokenized, 2, str(path), words, timeout_s=200)
    with pytest.raises(AssertionError, match=r"different tokenizers \('a' has the id") as error:
        run_ranks(trained, 2, str(path), [], timeout_s=200)
    for part in (str(root / "other"), str(root / "model"), "roles.judge.retokenize=true"):
        assert part in str(error.value)


class Counting:
    """Counts what it was trained on."""

    needs, returns = ("tokens",), (Column(name="scores", kind="row"),)

    def setup(self, context: RoleContext) -> None:
        self.count = torch.zeros(1, dtype=torch.int64)

    def forward_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"scores": self.count.float().expand(len(batch))}

    def train_step(self, batch: Batch) -> dict[str, float]:
        self.count += batch.num_tokens
        return {"count": float(self.count)}

    def save_state(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.count = tensors["count"]


def save_and_restore(world: World, path: str, changes: tuple[str, ...] = ()) -> list[list[float]]:
    """Args: changes: of the second start."""
    batch = from_rows([[1, 2, 3]], rows={"prompt_ids": torch.tensor([world.rank])})
    found = []
    for words in ((), changes):
        own = [f"roles.judge={{kind: '{__file__}:Counting', ranks: 1}}", *words]
        config = load_config(path, own)
        models = open_models(config)
        assembly = assemble(config, world, models, None)
        role = assembly.roles["judge"]
        assert isinstance(role, CustomRole)
        saver = Saver(config, world, assembly)
        resumed = saver.restore()
        found.append(role.forward(batch)["scores"].tolist())
        role.train(batch)
        moment = Moment(
            steps_done=resumed.steps_done + 1,
            versions=saver.states.versions(),
            generators=rng_state(world.device),
        )
        saver.save(moment, Journal())
        saver.wait()
    return found


def test_a_role_that_changes_comes_back_from_a_checkpoint(root: Path) -> None:
    path = write_config(root / "state.yaml", root / "model", root / "state")
    # six tokens of two ranks, counted on rank 1
    assert run_ranks(save_and_restore, 2, str(path)) == [[[0.0], [6.0]]] * 2


def test_its_state_comes_back_whatever_the_layout_of_other_roles(root: Path) -> None:
    path = write_config(root / "moved.yaml", root / "model", root / "moved")
    words = ("roles.policy.tp=2", "roles.rollout.tp=2")
    assert run_ranks(save_and_restore, 2, str(path), words) == [[[0.0], [6.0]]] * 2
    path = write_config(root / "own.yaml", root / "model", root / "own")
    with pytest.raises(AssertionError, match="is restored only on the same ranks") as refused:
        run_ranks(save_and_restore, 2, str(path), ("roles.judge.ranks=0",))
    assert "roles.judge: " in str(refused.value)


class Half:
    """Has one half of what a resume needs, or a function that is none."""

    needs, returns = ("tokens",), (Column(name="scores", kind="row"),)

    def __init__(self, name: str, value: Any = None) -> None:
        setattr(self, name, self.setup if value is None else value)

    def setup(self, context: RoleContext) -> None:
        raise AssertionError("it is refused before it is set up")

    def forward_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"scores": torch.zeros(len(batch))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "save_state"}, "has 'save_state' and no 'load_state'.*add 'load_state', or take"),
        ({"name": "load_state"}, "has 'load_state' and no 'save_state'.*add 'save_state', or take"),
        ({"name": "eval_step", "value": 3}, "has 'eval_step', but it is no function"),
        ({"name": "device_bytes", "value": "8 GB"}, "has device_bytes='8 GB': give a whole number"),
    ],
)
def test_a_role_that_is_half_there_is_refused_at_start_up(root, options, message):
    roles = {"judge": {"kind": f"{__file__}:Half", "options": options}}
    path = write_config(
        root / "half.yaml", root / "model", root / "half", roles=roles, rewards=[{"role": "judge"}]
    )
    with pytest.raises(ValueError, match=f"roles.judge: the class Half {message}"):
        planned(load_config(path))


def planned(config: Config) -> RolePlan:
    placements = place_roles(config, 1)
    shapes = {name: opened.model for name, opened in open_models(config).items()}
    return plan_roles(config, placements, shapes, ["cpu"])


class Sized(Half):
    """Says what it needs."""

    def __init__(self, gigabytes: float) -> None:
        self.device_bytes = int(gigabytes * 1e9)

    def setup(self, context: RoleContext) -> None:
        pass


def counted_bytes(world: World, path: str, words: list[str]) -> int:
    assembly, _, _ = made(world, path, words)
    assembly.parts.settle()
    return assembly.parts.registry.resident_bytes()


def test_the_size_that_a_role_declares_is_in_the_plan(root):
    roles = {"judge": {"kind": f"{__file__}:Sized", "options": {"gigabytes": 2}}}
    path = write_config(
        root / "sized.yaml",
        root / "model",
        root / "sized",
        roles=roles,
        rewards=[{"role": "judge"}],
    )
    plan = planned(load_config(path, ["memory_gb=2.1"])).memory
    assert memory_texts(plan)["judge"] == "declared 2.00 GB keep"
    score = next(call for call in plan[0].plan.calls if call.name == "judge.forward_step")
    assert score.peak_bytes >= 2e9
    assert run_ranks(counted_bytes, 1, str(path), ["memory_gb=2.1"])[0] >= 2e9
    with pytest.raises(ValueError) as refused:
        planned(load_config(path, ["memory_gb=2.0"]))
    message = str(refused.value)
    assert "judge.declared" in message and "2.00 GB  always there" in message
    assert "roles.judge.residency" not in message, "nothing can move it"
