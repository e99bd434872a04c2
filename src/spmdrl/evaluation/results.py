"""Per-sample results as JSONL files, written completely or not at all, and the opponent of a win
rate: the rewards that an earlier evaluation wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.atomic_files import finite_json, replace_file
from spmdrl.data.rows import one_line, said
from spmdrl.distributed.reduce import broadcast_object


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a JSON object per line; return their number. A float that is not finite becomes null.

    Raises:
        OSError: the disk is full, or the file system fails otherwise; an older file stays whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [finite_json(row) for row in rows]
    replace_file(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def read_opponent(path: Path, prompts: Sequence[str], judged_by: str) -> Tensor:
    """Read the rewards of a results file in the order of the prompts; only the first rank reads it.

    Args:
        prompts: the texts of the set, in order; `prompt_id` is an index into them.
        judged_by: description of what makes the rewards; the file's must be the same.

    Returns:
        Rewards of the m responses to each of P prompts, float64 [P, m].

    Raises:
        ValueError: the file is missing or malformed, has other prompts, or was judged differently
            (raised on every rank).
    """
    found: list[list[float]] | str = ""
    if dist.get_rank() == 0:
        try:
            found = _rewards(path, prompts, judged_by)
        # a user's file may be wrong in any way: errors of any type become one line
        except Exception as error:
            found = said(error)
    found = broadcast_object(found, 0)
    if isinstance(found, str):
        raise ValueError(
            f"against={path}: {found}; it must be the results of an evaluation of this set with "
            "the same rewards (spmdrl eval of the other model writes them)"
        )
    return torch.tensor(found, dtype=torch.float64)


def _rewards(path: Path, prompts: Sequence[str], judged_by: str) -> list[list[float]]:
    rewards: list[list[float]] = [[] for _ in prompts]
    # not splitlines: texts may hold other characters that end lines, such as U+2028
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        with one_line(f"line {number}"):
            record = json.loads(line)
            place, prompt = int(record["prompt_id"]), str(record["prompt"])
            judge, reward = record["judge"], float(record["reward"])
        if not (0 <= place < len(prompts) and prompt == prompts[place]):
            raise ValueError(f"line {number} is a response to another prompt: {prompt[:60]!r}")
        if judge != judged_by:
            raise ValueError(f"line {number} was judged by {judge}, this evaluation by {judged_by}")
        if not math.isfinite(reward):
            raise ValueError(f"line {number} has the reward {reward}")
        rewards[place].append(reward)
    counts = sorted({len(own) for own in rewards})
    if len(counts) != 1 or counts == [0]:
        raise ValueError(
            f"its prompts have {counts} responses each, and all must have equally many"
        )
    return rewards
