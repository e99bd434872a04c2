"""docs/exit-codes.md has a row of every exit code and outcome that the program has a name for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from spmdrl.commands.launch import EXIT_BAD_INPUT, EXIT_BAD_NODES
from spmdrl.supervision.attempt import Outcome
from spmdrl.supervision.signals import EXIT_INTERRUPTED
from spmdrl.supervision.watcher import EXIT_HUNG, EXIT_LOST

PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_codes_and_outcomes_are_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert codes == {0, 1, EXIT_BAD_INPUT, EXIT_BAD_NODES, EXIT_HUNG, EXIT_LOST, EXIT_INTERRUPTED}
    (outcomes,) = re.findall(r"^\| `outcome` \| (.*) \|$", text, re.M)
    assert set(re.findall(r"`(\w+)`", outcomes)) == set(get_args(Outcome))
