"""Recipes fit the cards that they name, with the figures of their page."""

from __future__ import annotations

import pytest
from recipe_rows import PAGE, Recipe, all_recipes, row

from spmdrl.config.load import config_reader
from spmdrl.planning.forecast.forecast import full_lengths
from spmdrl.planning.from_shapes import read_models
from spmdrl.planning.suggest.suggest import suggest

RECIPES = all_recipes()
SMALL = [recipe for recipe in RECIPES if recipe.cards[1] <= 4]
"""Recipes of up to four nodes, whose plans take a second."""

LARGE = [recipe for recipe in RECIPES if recipe not in SMALL]


def check(recipes: list[Recipe]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for recipe in recipes:
        own = row(recipe, recipe.outlook())
        assert own in page, f"run tests/planning/recipe_rows.py; {own}"


def test_small_recipes_fit_as_their_page_says() -> None:
    check(SMALL)


@pytest.mark.full
def test_large_recipes_fit_as_their_page_says() -> None:
    check(LARGE)


def test_every_recipe_has_its_lines() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for recipe in RECIPES:
        _, nodes, per_node = recipe.cards
        batch = f"sbatch -N {nodes} --gpus-per-node={per_node} scripts/slurm/train.sbatch"
        assert f"{batch} configs/recipes/{recipe.name}.yaml" in recipe.text
        assert f"| `{recipe.name}` |" in page


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_suggestion_is_never_slower_than_the_recipe(recipe: Recipe) -> None:
    name, config = f"recipes/{recipe.name}", recipe.config
    found = suggest(
        config_reader(name),
        read_models(config),
        recipe.machine,
        full_lengths(config),
    ).fitting
    own = recipe.outlook().forecast
    assert own is not None and found[0].forecast is not None
    assert found[0].forecast.seconds <= own.seconds * (1 + 1e-9)
