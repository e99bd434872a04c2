"""Bundles for machines without a network, and the install script that images call.

The samples take packages from the environment of the tests; the sweeps (marker `full`) install
all of them from wheels alone, and train with the network off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
ALONE = 'ip link set lo up; ip address add 192.0.2.1/32 dev lo; exec "$@"'
"""Slurm's daemons bind to no address where a host has none but 127.0.0.1 (AI_ADDRCONFIG)."""

OFF = ["unshare", "--net", "bash", "-euc", ALONE, "_"]
"""Runs a command where there is no network but the loopback interface."""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="a network of one's own needs root, ip"
)


def call(*words: str | Path, fails: bool = False, cwd: Path = ROOT) -> str:
    """The output of a command, which sees nothing of the tests' own packages."""
    hidden = ("PYTHON", "PIP_", "RANK", "WORLD_SIZE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, (words, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout + done.stderr


def copied(line: str) -> tuple[list[str], str]:
    """Sources and target of a line of the two recipes."""
    *sources, target = line.removeprefix("COPY ").split()
    return sources, target


def test_both_recipes_copy_the_same_and_call_one_script() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    apptainer = (ROOT / "apptainer.def").read_text(encoding="utf-8")
    places = {}
    for sources, target in (copied(line) for line in docker if line.startswith("COPY ")):
        for source in sources:
            places[source] = target + source if target.endswith("/") else target
    section = apptainer.split("%files\n")[1].split("\n\n")[0]
    assert places == {s: t for [s], t in (copied(line) for line in section.splitlines())}
    assert all((ROOT / source).exists() for source in places)
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{source}" for source in places} <= set(allowed)
    runs = [line.removeprefix("RUN ") for line in docker if line.startswith("RUN ")]
    post = apptainer.split("%post\n")[1].split("\n\n")[0].strip().splitlines()
    assert runs == post and runs[0].startswith("/src/scripts/install.sh --system /opt/spmdrl")
    assert [line for line in docker if line.startswith("FROM ")] == [
        f"FROM {re.search(r'^From: (.+)$', apptainer, re.M)[1]}"
    ]


def bundle_of(place: Path, *words: str | Path) -> Path:
    """A bundle with a small model and the packages that a file lists."""
    make_tiny_model(place / "tiny")
    (place / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n' * 8)
    bundle = place / "bundle"
    given = ["--model", place / "tiny", "--data", place / "rows.jsonl", *words]
    call(ROOT / "scripts/bundle.sh", *given, bundle)
    return bundle


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with spmdrl's own wheel alone."""
    place = tmp_path_factory.mktemp("sample")
    (place / "none.txt").write_text("")
    return bundle_of(place, "--requirements", place / "none.txt")


def train_words(bundle: Path, run: Path) -> list[str]:
    """A step of GRPO with the bundle's small model on its rows."""
    return [
        *("train", "gsm8k", f"model.path={bundle}/models/tiny", f"run_dir={run}", "steps=1"),
        *(f"data.train.source={bundle}/data/rows.jsonl", "data.train.answer_pattern=null"),
        *("data.prompts_per_step=2", "data.group_size=2"),
        *(
            "data.train.max_tokens=256",
            "sampling.max_tokens=8",
            "train.num_minibatches=1",
            "evaluation.held_out=0",
        ),
        *("log.tensorboard=false", "log.progress=false"),
    ]


@needs_root
def test_a_bundle_installs_with_the_network_off(sample: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    call(*OFF, sample / "install.sh", prefix)
    # what other wheels would bring lies in the environment of the tests
    [site] = prefix.glob("lib/python*/site-packages")
    (site / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    found = call(prefix / "bin/python", "-c", "import spmdrl; print(spmdrl.__file__)", cwd=tmp_path)
    assert found.strip() == str(site / "spmdrl/__init__.py")
    _, *words = train_words(sample, tmp_path / "run")
    text = call(*OFF, prefix / "bin/spmdrl", "check", *words, cwd=tmp_path)
    assert "nothing is refused" in text


def test_a_bundle_that_lost_something_is_refused(sample: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sample, broken)
    with (broken / "models/tiny/config.json").open("a") as file:
        file.write(" ")
    text = call(broken / "install.sh", tmp_path / "prefix", fails=True)
    assert "models/tiny/config.json: FAILED" in text and "is not as it was packed" in text
    assert not (tmp_path / "prefix").exists()


def test_what_cannot_be_bundled_is_named(tmp_path: Path) -> None:
    script = ROOT / "scripts/bundle.sh"
    assert "exists: name another" in call(script, tmp_path, fails=True)
    text = call(script, "--model", tmp_path, tmp_path / "new", fails=True)
    assert "has no config.json" in text
    assert "is no file" in call(script, "--data", tmp_path, tmp_path / "new", fails=True)
    assert "name the bundle" in call(script, fails=True)
    assert not (tmp_path / "new").exists()


SLURM = """
export SLURM_CONF=$1/slurm.conf PYTHON=$3/bin/python RUN_DIR=$1/run RANKS_PER_NODE=1
"$4" up "$1"
trap '"$4" down "$1"' EXIT
cd "$2"
options=(--wait --time=30 --nodes=2 --cpus-per-task=1 --output="$1/job.log")
sbatch "${options[@]}" scripts/slurm/train.sbatch "${@:5}" || { cat "$1/job.log"; exit 1; }
"""
"""Words: directory of the lab, bundle, prefix, script of the lab, words of `spmdrl train`."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with all packages and the quickstart's model."""
    model = ROOT / "models" / "SmolLM2-135M-Instruct"
    place = tmp_path_factory.mktemp("whole")
    return bundle_of(place, "--model", model, "--requirements", ROOT / "requirements.txt")


@pytest.fixture(scope="module")
def installed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has nothing but what a bundle brought, with the network off."""
    prefix = tmp_path_factory.mktemp("installed") / "prefix"
    call(*OFF, whole / "install.sh", prefix)
    return prefix


KERNELS = """
import torch
from spmdrl.models.kernels import cpu
assert cpu.lay_out(torch.randn(64, 64)) is not None
"""


@pytest.mark.full
@needs_root
def test_a_wheel_in_an_empty_environment_has_kernels_and_configurations(
    installed: Path, tmp_path: Path
) -> None:
    assert "quickstart " in call(*OFF, installed / "bin/spmdrl", "configs", cwd=tmp_path)
    call(*OFF, installed / "bin/python", "-c", KERNELS, cwd=tmp_path)


@pytest.mark.full
@needs_root
def test_a_bundle_runs_the_quickstart_with_the_network_off(
    installed: Path, whole: Path, tmp_path: Path
) -> None:
    short = ["steps=2", "data.prompts_per_step=4", "evaluation.max_items=8"]
    words = ["train", "quickstart", f"run_dir={tmp_path}/run", *short]
    launch = ["launch", "--standalone", "--nproc-per-node", "2"]
    call(*OFF, installed / "bin/spmdrl", *launch, *words, cwd=whole)
    assert (tmp_path / "run/attempt_0000/outcome").read_text() == "done\n"
    call(*OFF, installed / "bin/spmdrl", "report", tmp_path / "run", cwd=whole)
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.full
@pytest.mark.slurm
@needs_root
@pytest.mark.skipif(shutil.which("slurmctld") is None, reason="needs Slurm")
def test_a_bundle_runs_a_slurm_job_with_the_network_off(
    installed: Path, whole: Path, tmp_path: Path
) -> None:
    script = tmp_path / "job.sh"
    script.write_text(SLURM)
    _, *words = train_words(whole, tmp_path / "run")
    lab = ROOT / "scripts/dev/slurmlab.sh"
    call(*OFF, "bash", "-eu", script, tmp_path, whole, installed, lab, *words)
    [attempt] = (tmp_path / "run").glob("attempt_*")
    assert (attempt / "outcome").read_text() == "done\n"


DEBIAN = """
root=$1
mkdir -p "$root/wheels" "$root/etc/apt"
cp -r /etc/apt/. "$root/etc/apt/"
cp -r /usr/share/keyrings/. "$root/usr/share/keyrings/"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
mount --bind "$2" "$root/wheels"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
chroot "$root" /src/scripts/install.sh --system --wheels /wheels /opt/spmdrl
chroot "$root" /opt/spmdrl/bin/spmdrl configs
"""


@pytest.mark.full
@needs_root
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap")
def test_the_script_of_images_installs_in_a_bare_debian(whole: Path, tmp_path: Path) -> None:
    mirror = call("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    root = tmp_path / "root"
    call("debootstrap", "--variant=minbase", "bookworm", root, mirror.split()[0])
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY "):
            sources, target = copied(line)
            place = root / target.lstrip("/")
            (place if target.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            call("cp", "-r", *(ROOT / source for source in sources), place)
    text = call("unshare", "--mount", "bash", "-euc", DEBIAN, "_", root, whole / "wheels")
    assert "quickstart " in text
