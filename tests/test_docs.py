"""Docs say what is: commands parse, configurations load, keys are all there and none besides."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.batch import from_rows
from spmdrl.commands.cli import parse
from spmdrl.commands.launch import COMMANDS
from spmdrl.config.key_table import key_table, known_keys
from spmdrl.config.load import load_config, shipped_names
from spmdrl.config.sections import RewardSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.rewards.functions import RewardSpec, load
from spmdrl.roles.custom import CustomRole, RoleContext
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/models/README.md",
    ROOT / "benchmarks/README.md",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands() -> list[str]:
    """Every line of the pages' shell blocks, continued lines joined."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            found += [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return found


@pytest.mark.parametrize("line", [c for c in commands() if "spmdrl " in c])
def test_commands_parse_and_their_configurations_load(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.split(" #")[0])
    words = words[words.index("spmdrl") + 1 :]
    if words[0] == "launch":
        words = words[next(i for i, word in enumerate(words) if word in COMMANDS) :]
    options = parse(words)
    named = vars(options).get("config") or ""
    if Path(named).is_file() or named in shipped_names():
        load_config(named, options.overrides)


@pytest.mark.parametrize("line", [c for c in commands() if "scripts/" in c or "benchmarks/" in c])
def test_scripts_named_in_docs_exist(line):
    for word in shlex.split(line):
        if word.startswith(("./scripts/", "scripts/", "benchmarks/")):
            assert (ROOT / word).exists(), word


def test_every_key_is_documented():
    page = (ROOT / "docs" / "configuration.md").read_text()
    documented = re.findall(r"^\| `([a-z0-9_.A-Z]+)` \|", page, re.M)
    assert documented == known_keys()
    assert key_table() in page, "run: spmdrl keys, and paste its table into docs/configuration.md"


USERS_FILES = {
    **{f"{p.name} {i}": b for p in PAGES for i, b in enumerate(blocks(p, "python"))},
    **{p.name: p.read_text() for p in sorted((ROOT / "examples").rglob("*.py"))},
}
"""Code that users copy into files of their own."""


@pytest.mark.parametrize("name", USERS_FILES)
def test_code_for_users_imports_only_the_public_faces(name):
    found = set()
    for node in ast.walk(ast.parse(USERS_FILES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert {m for m in found if m.split(".")[0] == "spmdrl"} <= {
        "spmdrl.api",
        "spmdrl.api.backends",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_flow_example_runs_as_written(tmp_path):
    """Best-of-n raises the reward of a toy model, on two ranks."""
    make_tiny_model(tmp_path / "model")
    flow = tmp_path / "my_flow.py"
    flow.write_text(blocks(ROOT / "docs" / "writing-a-flow.md", "python")[0])
    config = write_config(
        tmp_path / "config.yaml", tmp_path / "model", tmp_path / "run", flow=f"{flow}:main"
    )
    # each step's loss is of other samples: a seed whose losses fall by far more than these differ
    cases = [(str(config), ["seed=5", "train.lr=0.003"])]
    records = run_ranks(run_configs, 2, cases, str(tmp_path), timeout_s=200)[0][0]
    losses = [record["loss"] for record in records]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.2


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"'([\w/-]+\.md)'", str(nav)))
    pages = {
        str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")
    }
    missing = sorted(pages - named)
    assert not missing, f"in no section of mkdocs.yml's nav: {missing}; add `- TITLE: PAGE` there"


def score_lengths(world, code: str) -> list[float]:
    namespace: dict[str, object] = {}
    exec(compile(code, "adding-a-role", "exec"), namespace)
    mesh, user = Mesh("length", [1], {}, "cpu"), namespace["LengthScore"](per_token=0.5)
    context = RoleContext(
        name="length", mesh=mesh, device=world.device, model=ROOT / "none", seed=0
    )
    if mesh.is_member:
        user.setup(context)
    count = 2 + world.rank
    rows = {
        "response_lengths": torch.arange(count) + 10 * world.rank,
        "prompt_ids": torch.arange(count) + 10 * world.rank,
    }
    batch = from_rows([[1]] * count, rows=rows)
    return CustomRole("length", mesh, user).forward(batch)["scores"].tolist()


def test_the_role_example_runs_as_written():
    code = blocks(ROOT / "docs" / "adding-a-role-or-backend.md", "python")[0]
    assert run_ranks(score_lengths, 2, code) == [[0.0, 0.5], [5.0, 5.5, 6.0]]


ROW = {"question": "q", "tests": ["5", "7"], "solution": "5", "data_source": "openai/gsm8k"}
VERL = {"reward_model": {"ground_truth": "5"}, "extra_info": {"index": 0}}


@pytest.mark.parametrize(
    ("block", "name", "score"),
    [
        (0, "brief", 1.0),
        (0, "right", 1.0),
        (0, "in_order", 3.0),
        (0, "passes", {"score": 0.5, "passed": 1}),
        (1, "from_trl", 1.0),
        (1, "from_openrlhf", 1.0),
        (1, "compute_score", NotImplementedError),  # what it takes for the source is the prompt
        (1, "from_verl", 1.0),
    ],
)
def test_the_reward_examples_work_as_written(tmp_path, block, name, score):
    file = tmp_path / f"my_rewards_{block}.py"
    file.write_text(blocks(ROOT / "docs" / "rewards.md", "python")[block])
    row = {**ROW, **VERL}
    # TRL's function takes all columns as lists, `tests` too
    function = load(RewardSpec(name=name, function=f"{file}:{name}"), list(row))
    if isinstance(score, type):
        with pytest.raises(score):
            function("2 + 3?", "is 5", "5", row)
    else:
        assert function("2 + 3?", "is 5", "5", row) == score


@pytest.mark.parametrize("name", ["trl_reward", "reward_func"])
def test_functions_of_batches_are_refused_as_the_page_says(tmp_path, name):
    file = tmp_path / "my_rewards.py"
    file.write_text(blocks(ROOT / "docs" / "rewards.md", "python")[1])
    with pytest.raises(ValueError, match="a batch elsewhere, here a call has one sample"):
        load(RewardSpec(name=name, function=f"{file}:{name}"), list(ROW))


def test_the_reward_list_of_the_page_is_read(tmp_path):
    page = (ROOT / "docs" / "rewards.md").read_text()
    sections = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)[0])["rewards"]
    assert [RewardSection(**section).weight for section in sections] == [1.0, 0.1, 0.5]
