"""Tables of what backends and engines take: those in the docs are what the registry says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from spmdrl.models.family import families
from spmdrl.planning.support import (
    ENGINES,
    columns,
    family_rows,
    feature_rows,
    make_spec,
    refusal,
    support_tables,
    tiny_of,
)
from spmdrl.planning.systems.registry import SYSTEMS

pytestmark = [pytest.mark.contract, pytest.mark.megatron]

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"


def test_the_docs_have_the_tables() -> None:
    page, tables = PAGE.read_text(encoding="utf-8"), support_tables()
    assert tables in page, f"run: spmdrl backends, and paste its tables into {PAGE.name}"


def test_every_backend_and_family_has_a_cell() -> None:
    (_, *heads), *rows = family_rows()
    assert len(rows) == len(families()) and {len(row) for row in rows} == {1 + len(heads)}
    assert {column.backend for column in columns()} == set(SYSTEMS)
    assert heads == [column.title for column in (*columns(), *ENGINES)]


def test_the_torch_backend_takes_every_family() -> None:
    heads, *rows = family_rows()
    place = heads.index("torch")
    assert all(row[place].startswith("dp_shard") for row in rows)


def test_what_a_cell_denies_is_refused_by_name() -> None:
    heads, *rows = feature_rows()
    found = {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}
    assert found["`pp`"]["torch"] == "-" and found["`pp`"]["megatron"] == "yes"
    column = next(column for column in columns() if column.title == "torch")
    model = tiny_of(families()["LlamaForCausalLM"])
    reason = refusal(make_spec(model, column, degrees={"pp": 2}))
    assert reason is not None and "roles.policy.pp=2 with train.backend=torch" in reason
