"""A run's whole life in one process: train and save, go on, evaluate what was exported.

    python life.py CONFIG [key=value ...]

Prints one line for each of the three; ends with the first exit status that is not 0.
"""

from __future__ import annotations

import sys

import yaml


def main() -> int:
    from spmdrl.commands.cli import main as spmdrl

    config, *words = sys.argv[1:]
    with open(config, encoding="utf-8") as file:
        run_dir = yaml.safe_load(file)["run_dir"]
    lives = {
        "train": ["train", config, "steps=1", *words],
        "go on": ["train", config, "steps=2", *words],
        "evaluate": ["eval", config, f"model.path={run_dir}/model", *words],
    }
    for name, command in lives.items():
        status = spmdrl(command)
        print(f"life: {name}: {status}", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
