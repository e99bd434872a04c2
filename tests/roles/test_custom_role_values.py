"""What a user's role declares and returns: kinds of numbers, no rows, no columns, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flow_cases import write_config
from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.checkpoint.journal import pack_journal, unpack_journal
from spmdrl.config.load import load_config
from spmdrl.config.user_objects import load_object
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.row_bytes import Column
from spmdrl.placement import place_roles
from spmdrl.planning.plan import plan_roles
from spmdrl.roles.calls import together
from spmdrl.roles.custom import CustomRole, RoleContext, checked_columns, checked_metrics
from spmdrl.roles.ledger import Ledger, keeping
from spmdrl.run.assembly.assembly import open_models
from spmdrl.supervision.pulse import Pulse
from spmdrl.world import World
from tiny_model import make_tiny_model

ROWS = from_rows([[1, 2, 3], [4, 5]], rows={"prompt_ids": torch.arange(2)})


def checked(values: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] = ()) -> torch.Tensor:
    column = Column(name="c", kind="row", dtype=dtype, shape=shape)
    return checked_columns("judge.forward_step", ROWS, {"c": values}, [column])["c"]


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([float("nan"), 0.7], torch.int64, "'c' is torch.float32, but is declared torch.int64"),
        ([0.3, 0.7], torch.bool, "'c' is torch.float32, but is declared torch.bool"),
        ([3, 4], torch.bool, "'c' is torch.int64, but is declared torch.bool"),
        ([1j, 0j], torch.float32, "'c' is torch.complex64, but is declared torch.float32"),
        ([0.0, float("inf")], torch.float64, "not finite in row 1"),
        ([1, 1 << 40], torch.int32, "exceeds torch.int32 in row 1"),
        ([1e30, 1.0], torch.float16, "not finite in row 0"),
    ],
)
def test_values_that_the_declared_dtype_does_not_hold_are_refused(
    values: list[Any], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checked(torch.tensor(values), dtype)


def test_values_that_it_holds_are_cast() -> None:
    assert checked(torch.tensor([1, 0]), torch.float32).tolist() == [1.0, 0.0]
    assert checked(torch.tensor([True, False]), torch.int64).tolist() == [1, 0]
    assert checked(torch.tensor([3, 4]), torch.int32).dtype == torch.int32
    pairs = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(ValueError, match="in row 1"):
        checked(pairs, torch.float32, (2,))


class Judge:
    """Scores, counts; `needs` and `returns` as given."""

    def __init__(self, needs: tuple[str, ...] = ("tokens",), returns: Any = None) -> None:
        self.needs = needs
        self.returns = (Column(name="scores", kind="row"),) if returns is None else returns

    def setup(self, context: RoleContext) -> None:
        pass

    def forward_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        shapes = {column.name: (len(batch), *column.shape) for column in self.returns}
        return {name: torch.ones(shape) for name, shape in shapes.items()}

    def train_step(self, batch: Batch) -> dict[str, Any]:
        rows = len(batch)
        return {"tensor": torch.tensor(float(rows)), "numpy": np.float32(0.5), "number": 3}


def with_few_rows(world: World) -> None:
    """Rows on rank 0 alone, so that the replica on rank 1 has none."""
    count = 1 - world.rank
    batch = from_rows([[7, 8]] * count, rows={"prompt_ids": torch.arange(count)})
    mesh = Mesh("judge", [0, 1], {"dp_replicate": 2}, "cpu")
    wide = (Column(name="scores", kind="row"), Column(name="pair", kind="row", shape=(2,)))
    with keeping(Ledger(world, "test", Pulse())):
        assert CustomRole("judge", mesh, Judge()).forward(batch)["scores"].tolist() == [1] * count
        found = CustomRole("judge", mesh, Judge(returns=wide)).forward(batch)
        assert found["pair"].shape == (count, 2)
        # without columns: rows still travel, and as many come home
        found = CustomRole("judge", mesh, Judge(needs=())).forward(batch)
        assert found["scores"].tolist() == [1.0] * count
        one = Mesh("one", [1], {}, "cpu")
        found, again = together(
            CustomRole("one", one, Judge(needs=(), returns=())).forward.on(batch),
            CustomRole("judge", mesh, Judge(returns=())).forward.on(batch),
        )
        assert len(found) == len(again) == count and found.columns() == []


def test_replicas_without_rows_and_roles_without_columns() -> None:
    run_ranks(with_few_rows, 2)


def train_and_keep(world: World) -> None:
    role = CustomRole("judge", Mesh("judge", [0], {}, "cpu"), Judge())
    ledger = Ledger(world, "test", Pulse())
    with keeping(ledger):
        metrics = role.train(ROWS)
    assert metrics == {"tensor": 2.0, "numpy": 0.5, "number": 3.0}
    assert {type(value) for value in metrics.values()} == {float}
    (kept,) = unpack_journal(pack_journal(ledger.journal())).calls
    assert kept.record is not None and kept.record.values == metrics


def test_metrics_of_a_role_are_numbers_that_a_checkpoint_keeps() -> None:
    run_ranks(train_and_keep, 1)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": torch.ones(2)}, "judge.train_step returned 'loss' as a Tensor, which is no num"),
        ({"loss": "high"}, "returned 'loss' as a str, which is no number"),
        ({"loss": None}, "returned 'loss' as a NoneType"),
        ([1.0], "returned a list: return a dict of numbers"),
        (None, "returned a NoneType: return a dict of numbers"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused_by_name(metrics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_metrics("judge.train_step", metrics)


class Declares(Judge):
    """Declares what `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__(
            returns={
                "nothing": (),
                "another": (Column(name="marks", kind="row"),),
                "tokens": (Column(name="scores"),),
                "pairs": (Column(name="scores", kind="row", shape=(2,)),),
            }[how]
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", r"the class Declares returns \[\]: add Column\(name='scores', kind='row'\)"),
        ("another", r"the class Declares returns \['marks'\]: add"),
        ("tokens", r"declares 'scores' as a token column of the shape \(\)"),
        ("pairs", r"declares 'scores' as a row column of the shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("place", ["rewards", "a held-out set"])
def test_a_scoring_role_declares_its_scores_or_is_refused_at_start(
    tmp_path: Path, how: str, message: str, place: str
) -> None:
    make_tiny_model(tmp_path / "model")
    sections: dict[str, Any] = {"rewards": [{"role": "judge"}]}
    if place != "rewards":
        sections = {
            "evaluation": {"sets": {"other": {"rewards": [{"role": "judge"}], "data": {"size": 4}}}}
        }
    path = write_config(
        tmp_path / "c.yaml",
        tmp_path / "model",
        tmp_path / "run",
        roles={"judge": {"kind": f"{__file__}:Declares", "options": {"how": how}}},
        **sections,
    )
    config = load_config(path)
    placements = place_roles(config, 1)
    shapes = {name: opened.model for name, opened in open_models(config).items()}
    with pytest.raises(ValueError, match=f"rewards name the role 'judge', but {message}|{message}"):
        plan_roles(config, placements, shapes, ["cpu"])


def test_a_mask_is_no_list_of_rows() -> None:
    for mask in ([True, False], torch.tensor([True, False]), [0.0, 1.0]):
        with pytest.raises(ValueError, match=r"select takes row numbers, not torch"):
            ROWS.select(mask)  # type: ignore[arg-type]
    assert ROWS.select([]).num_rows == 0
    assert ROWS.select(torch.tensor([1, 1], dtype=torch.int32)).lengths.tolist() == [2, 2]


def test_a_file_of_the_users_own_may_hold_dataclasses_and_is_one_module(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import own_neighbour\n"
        "@dataclass\n"
        "class Options:\n"
        "    size: int = own_neighbour.SIZE\n"
        "def flow(run): return Options()\n"
    )
    (tmp_path / "own_neighbour.py").write_text("SIZE = 7\n")
    (tmp_path / "link").symlink_to(tmp_path)
    options = load_object(f"{file}:Options")
    assert load_object(f"{tmp_path / 'link' / 'own.py'}:flow")(None) == options()
    other = tmp_path / "sub"
    other.mkdir()
    (other / "own.py").write_text("Options = 3\n")
    assert load_object(f"{other / 'own.py'}:Options") == 3
    assert options().size == 7
    file.with_name("broken.py").write_text("raise RuntimeError('no')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broken.py cannot be imported: RuntimeError: no\n.*"):
            load_object(f"{tmp_path / 'broken.py'}:flow")
