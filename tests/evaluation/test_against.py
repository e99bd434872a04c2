"""An opponent's results file, as a user may have left it: read, or refused with file and line."""

import json

from harness import run_ranks
from spmdrl.evaluation.results import read_opponent, write_results

PROMPTS = ("one", "two \u2028 \x85 lines")


def good():
    return [
        {"prompt_id": i, "prompt": text, "judge": "me", "reward": 0.5 + i}
        for i, text in enumerate(PROMPTS)
    ]


def changed(**values):
    return [good()[0], {**good()[1], **values}]


BAD = {
    "cut": b'{"prompt_id": 0, "prom',
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
    "zeroed": bytes(300),
    "latin": json.dumps(good()[0]).replace("one", "\xe9").encode("latin-1"),
    "list": b"[1]\n",
    "deep": b"[" * 5000 + b"]" * 5000,
    "empty": b"",
    "no_reward": json.dumps({"prompt_id": 0, "prompt": "one", "judge": "me"}).encode(),
    "missing": None,
    **{
        name: "".join(json.dumps(row) + "\n" for row in changed(**values)).encode()
        for name, values in {
            "text_id": {"prompt_id": "x"},
            "null_id": {"prompt_id": None},
            "large_id": {"prompt_id": 7},
            "infinite_id": {"prompt_id": float("inf")},
            "other_prompt": {"prompt": "three"},
            "number_prompt": {"prompt": 3},
            "other_judge": {"judge": "you"},
            "text_reward": {"reward": "good"},
            "nan_reward": {"reward": float("nan")},
        }.items()
    },
}


def read_all(world, folder):
    found = {}
    for name in ["good", *BAD]:
        try:
            read = read_opponent(folder / f"{name}.jsonl", PROMPTS, "me")
            found[name] = read.tolist()
        except ValueError as error:
            found[name] = str(error)
    return found


def test_results_are_read_or_refused_by_name(tmp_path):
    write_results(tmp_path / "good.jsonl", good())
    for name, content in BAD.items():
        if content is not None:
            (tmp_path / f"{name}.jsonl").write_bytes(content)
    for found in run_ranks(read_all, 2, tmp_path):
        assert found.pop("good") == [[0.5], [1.5]]
        for name, message in found.items():
            assert isinstance(message, str), name
            assert message.startswith(f"against={tmp_path / name}.jsonl: "), message
            assert "\n" not in message
        assert "line 2" in found["text_id"] and "KeyError: 'reward'" in found["no_reward"]
