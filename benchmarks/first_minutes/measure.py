"""One stage in its own process: runs its cases, and prints a JSON line for each as soon as it ends.

    python -m first_minutes.measure NAME MODULE --ceilings JSON [--small]

Standard output carries the lines only; what libraries print goes to standard error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any, TextIO

import torch

from first_minutes.cards import Ceilings, card_of
from first_minutes.cases import Case, Outcome, Setting


def line_of(stage: str, case: str, outcome: Outcome) -> dict[str, Any]:
    """Make a case's line: prediction and measurement side by side, and their ratio."""
    if outcome.skipped is not None:
        return {"stage": stage, "case": case, "skipped": outcome.skipped, "measured": {}}
    predicted = {n: short(v) for n, v in outcome.predicted.items() if v is not None}
    measured = {name: short(value) for name, value in outcome.measured.items()}
    ratio = {n: short(measured[n] / p) for n, p in predicted.items() if n in measured and p}
    return {
        "stage": stage,
        "case": case,
        "predicted": predicted,
        "measured": measured,
        "measured_to_predicted": ratio,
        **({"facts": dict(outcome.facts)} if outcome.facts else {}),
    }


def short(value: float) -> float:
    """Round to four digits, as many as a measurement is worth."""
    return float(f"{float(value):.4g}")


def error_line(stage: str, case: str, error: Exception) -> dict[str, Any]:
    """Make the line of a case that failed, with the innermost calls."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return {
        "stage": stage,
        "case": case,
        "error": f"{type(error).__name__}: {error}"[:500],
        "where": [f"{os.path.relpath(f.filename)}:{f.lineno} {f.name}" for f in frames],
    }


def run_cases(stage: str, cases: Iterable[Case], out: TextIO) -> int:
    """Run the cases and print their lines; returns 1 if one failed, which does not end the next."""
    failed = False
    for case in cases:
        try:
            line = line_of(stage, case.name, case.run())
        except Exception as error:
            failed, line = True, error_line(stage, case.name, error)
        print(json.dumps(line), file=out, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(failed)


def claim_stdout() -> TextIO:
    """Return standard output as a stream of its own, and let everything else print to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("module")
    parser.add_argument("--ceilings", default="{}")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    out = claim_stdout()

    def cases() -> Iterable[Case]:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
        device = torch.device("cuda", 0)
        published = card_of(torch.cuda.get_device_name(device))
        given = Ceilings.of(json.loads(options.ceilings), published)
        setting = Setting(small=options.small, ceilings=given, device=device)
        found: Iterable[Case] = importlib.import_module(options.module).cases(setting)
        return found

    try:
        listed = list(cases())
    except Exception as error:
        print(json.dumps(error_line(options.stage, "start", error)), file=out, flush=True)
        return 1
    return run_cases(options.stage, listed, out)


if __name__ == "__main__":
    sys.exit(main())
