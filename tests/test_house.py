"""The limits of the house: few loose modules, and no whole configuration with a role's name."""

from __future__ import annotations

import ast
import runpy

from test_imports import SOURCE

HOUSE = runpy.run_path(str(SOURCE.parents[1] / "scripts" / "dev" / "house.py"), run_name="house")
MODULES = HOUSE["modules"](SOURCE)


def test_no_function_takes_a_whole_configuration_and_the_name_of_a_role() -> None:
    takes_both = HOUSE["takes_config_and_role"]
    found = [
        f"{name}.{function.name}"
        for name, (_, tree) in MODULES.items()
        if not name.startswith(("spmdrl.config.", "spmdrl.role_spec"))
        for function in HOUSE["functions"](tree)
        if takes_both(function)
    ]
    assert found == [], "take a RoleSpec"
    bad = ast.parse("def f(config: Config, name: str): ...").body[0]
    assert takes_both(bad)


def test_loose_modules_are_few() -> None:
    assert len([path for path in SOURCE.glob("*.py") if not path.stem.startswith("__")]) <= 7
