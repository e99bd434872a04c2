"""Files of a user's own: one module per file, with its neighbours, and errors that say the fix."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from spmdrl.config.user_objects import load_object


@pytest.fixture(autouse=True)
def same_modules() -> Iterator[None]:
    """Leave no module and no folder of a test to the next."""
    before, folders = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith("spmdrl."):
            del sys.modules[name]
    sys.path[:] = folders


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


TYPES = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Options:
    size: int
    next: Options | None = None
"""


@pytest.mark.parametrize("stem", ["my_own_types", "my-types", "json", "my.types"])
def test_classes_of_a_file_pickle_and_have_type_hints(tmp_path: Path, stem: str) -> None:
    write(tmp_path, **{stem: TYPES})
    options = load_object(f"{tmp_path / stem}.py:Options")
    one = options(size=1, next=options(size=2))
    assert pickle.loads(pickle.dumps(one)) == one
    assert get_type_hints(options) == {"size": int, "next": options | None}


def test_a_file_is_one_module_however_it_is_named(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "own", one_flow="import one_reward\n", one_reward="seen = []\n")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    flow = f"{tmp_path / 'own' / 'one_flow.py'}:one_reward"
    places = ["one_reward.py:seen", "../link/one_reward.py:seen", "one_reward:seen"]
    assert {id(load_object(place)) for place in places} == {id(load_object(flow).seen)}


def test_neighbours_can_be_imported_later_too(tmp_path: Path) -> None:
    late = "def main(run):\n    from late_neighbour import SIZE\n    return SIZE\n"
    write(tmp_path, own_late=late, late_neighbour="SIZE = 7\n")
    assert load_object(f"{tmp_path / 'own_late.py'}:main")(None) == 7


def test_neighbours_of_one_name_in_two_folders_are_refused(tmp_path: Path) -> None:
    """They would be one module for Python, and the second file would get the first one's."""
    first = write(tmp_path / "first", flow_a="import own_helper\n", own_helper="SIZE = 1\n")
    text = "import flow_c\ndef score(response): ...\n"
    second = write(
        tmp_path / "second",
        flow_b=text,
        flow_c="def f():\n    import own_helper.part\n",
        own_helper="SIZE = 2\n",
        flow_d="SIZE = 4\n",
    )
    assert load_object(f"{first / 'flow_a.py'}:own_helper").SIZE == 1
    message = (
        f"flow_b.py cannot be imported: ImportError: flow_c.py imports 'own_helper', which is "
        f"{first / 'own_helper.py'} here, and not {second / 'own_helper.py'}: rename that file"
    )
    with pytest.raises(ValueError, match=message) as refused:
        load_object(f"{second / 'flow_b.py'}:score", "flow")
    assert "\n" not in str(refused.value)
    assert load_object(f"{second / 'flow_d.py'}:SIZE") == 4  # it imports no neighbour


def test_a_neighbour_with_the_name_of_a_module_of_python_is_refused(tmp_path: Path) -> None:
    write(tmp_path, own_colours="import colorsys\n", colorsys="SIZE = 1\n")
    with pytest.raises(ValueError, match=r"imports 'colorsys', which is .*lib/python.*: rename"):
        load_object(f"{tmp_path / 'own_colours.py'}:x")


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    places = [write(tmp_path / f"of_{i}", same_name=f"SIZE = {i}\n") for i in (1, 2)]
    assert [load_object(f"{place / 'same_name.py'}:SIZE") for place in places] == [1, 2]


def test_names_that_a_module_makes_when_asked_are_found() -> None:
    from spmdrl.batch import Batch

    assert load_object("spmdrl.api:Batch") is Batch


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def main(run): ...", "mian", "wrong.py has no 'mian'; did you mean 'main'?"),
        ("def main(run): ...", "other", "wrong.py has no 'other'; it has ['main']"),
        (
            "x = 1\ndef main(run) ...",
            "main",
            "cannot be imported: SyntaxError: expected ':' (wrong.py, line 2)",
        ),
        (
            "import os\nfrom spmdrl.calls import together",
            "main",
            "cannot be imported: No module named 'spmdrl.calls' (wrong.py, line 2): "
            "import it from spmdrl.api",
        ),
        (
            "from spmdrl.roles import Policy",
            "main",
            "cannot import name 'Policy' from 'spmdrl.roles' (wrong.py, line 1): "
            "import it from spmdrl.api",
        ),
        (
            "from spmdrl.flows.run import Run",
            "main",
            "No module named 'spmdrl.flows.run' (wrong.py, line 1): import it from spmdrl.api",
        ),
        (
            "from spmdrl.api import (\n    Policy,\n    Rolout,\n)",
            "main",
            "cannot import name 'Rolout' from 'spmdrl.api' (wrong.py, line 1); "
            "did you mean 'Rollout'?",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str, name: str, message: str) -> None:
    file = write(tmp_path, wrong=text) / "wrong.py"
    with pytest.raises(ValueError) as refused:
        load_object(f"{file}:{name}", "flow")
    told = str(refused.value)
    assert told.startswith(f"flow={file}:{name}: ") and told.endswith(message), told
    assert "\n" not in told


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^flow=a.py:f: there is no file {tmp_path}/a.py$"):
        load_object("a.py:f", "flow")


def test_a_place_that_moved_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'spmdrl.flows.run': import it from spmdrl.api$"):
        load_object("spmdrl.flows.run:Run", "environment")


def test_only_the_frames_of_the_users_code_are_told(tmp_path: Path) -> None:
    text = "from spmdrl.config.load import load_config\nload_config('none.yaml')\n"
    file = write(tmp_path, own_raises=text) / "own_raises.py"
    with pytest.raises(ValueError, match="there is no config file") as refused:
        load_object(f"{file}:x")
    assert str(refused.value).splitlines()[1] == f'  File "{file}", line 2, in <module>'
