"""Rows of the table in docs/recipes.md: `python tests/planning/recipe_rows.py` writes them anew."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from spmdrl.config.load import FOLDER, load_config
from spmdrl.config.sections import Config
from spmdrl.planning.forecast.forecast import full_lengths
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.outlook import Outlook, make_outlook
from spmdrl.planning.suggest.suggest import limits_text

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
HEAD = "| recipe | cards | s/step | tokens/s/GPU | peak GB | phases, each with its bound |"


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe, planned for the cards that its comment names."""

    name: str

    @cached_property
    def text(self) -> str:
        return (FOLDER / "recipes" / f"{self.name}.yaml").read_text(encoding="utf-8")

    @cached_property
    def cards(self) -> tuple[str, int, int]:
        """GPU, nodes, GPUs of a node."""
        line = rf"spmdrl plan recipes/{self.name} --gpu (\S+) --nodes (\d+) --gpus-per-node (\d+)"
        found = re.search(line, self.text)
        assert found is not None, f"{self.name} has no line with its plan"
        return found[1], int(found[2]), int(found[3])

    @cached_property
    def config(self) -> Config:
        return load_config(f"recipes/{self.name}")

    @cached_property
    def machine(self) -> Machine:
        gpu, nodes, per_node = self.cards
        return load_machine(gpu, num_nodes=nodes, devices_per_node=per_node)

    def outlook(self) -> Outlook:
        machine = self.machine
        plan = plan_from_shapes(
            self.config,
            machine.num_ranks,
            machine.devices_per_node,
            device_type="cuda",
            device_bytes=machine.device.memory_bytes,
            refuses=False,
        )
        return make_outlook(self.config, plan, machine, full_lengths(self.config))


def all_recipes() -> list[Recipe]:
    return [Recipe(path.stem) for path in sorted((FOLDER / "recipes").glob("*.yaml"))]


def row(recipe: Recipe, outlook: Outlook) -> str:
    """The recipe's row of the table."""
    forecast, machine = outlook.forecast, outlook.machine
    assert forecast is not None and outlook.fits, f"{recipe.name} does not fit"
    gpu, nodes, per_node = recipe.cards
    rate = forecast.tokens / forecast.seconds / machine.num_ranks
    return (
        f"| `{recipe.name}` | {nodes * per_node} x {gpu} | {forecast.seconds:,.1f} | {rate:,.0f} | "
        f"{outlook.peak_bytes / 1e9:,.1f} | {limits_text(forecast)} |"
    )


def main() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(HEAD) + 2
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    lines[first:last] = [row(recipe, recipe.outlook()) for recipe in all_recipes()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
