"""Checkpoints: any layout reads what another wrote; damage is named, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from harness import run_ranks
from spmdrl.checkpoint import writing
from spmdrl.checkpoint.index import (
    CHECKPOINTS,
    INDEX,
    Entry,
    Mark,
    Tensors,
    index_text,
)
from spmdrl.checkpoint.load import (
    latest_checkpoint,
    load_tensors,
    read_private,
    read_state,
    resume_point,
    set_aside,
)
from spmdrl.checkpoint.owners import only, owned_slices
from spmdrl.checkpoint.rng import restore_rng, rng_state
from spmdrl.checkpoint.writing import CheckpointWriter, Retention, remove_partial
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import model_layout
from spmdrl.world import World

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 28,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}

Degrees = dict[str, int]


def model(**changes: Any) -> ModelConfig:
    return parse_config({**MODEL, **changes})


def values(model: ModelConfig, salt: int) -> dict[str, Tensor]:
    """Every global tensor, all numbers distinct."""
    result, start = {}, salt
    for name, shape in global_shapes(model).items():
        count = torch.Size(shape).numel()
        result[name] = torch.arange(start, start + count, dtype=torch.float32).reshape(shape)
        start += count
    return result


def local(
    world: World, model: ModelConfig, ranks: list[int], degrees: Degrees, salt: int | None
) -> Tensors:
    """What this rank holds: two groups, filled from `values` (or with NaN)."""
    held: dict[str, tuple[Tensor, tuple[Slice, ...]]] = {}
    for group in ("policy.weights", "policy.exp_avg"):
        layout = model_layout(model, ranks, degrees, torch.float32).get(world.rank, {})
        for name, here in layout.items():
            tensor = torch.full(here.shape, float("nan"))
            held[f"{group}/{name}"] = (tensor, here.slices)
    if salt is not None:
        fill(held, lambda group: values(model, salt + (group == "policy.exp_avg")))
    return held


def fill(held: Tensors, of_group: Callable[[str], dict[str, Tensor]]) -> None:
    for full_name, (tensor, slices) in held.items():
        whole = of_group(full_name.split("/")[0])
        for s in slices:
            box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
            tensor[s.offset : s.offset + s.rows] = whole[s.name][box]


def begin(
    world: World, root: Path, ranks: list[int], degrees: Degrees, step: int = 3, **options: Any
) -> tuple[CheckpointWriter, Tensors]:
    state = {"steps_done": step, "counters": {"policy": {"num_steps": 7}}}
    mine = owned_slices(model_layout(model(), ranks, degrees, torch.float32), world.rank)
    tensors = only(local(world, model(), ranks, degrees, salt=step), mine)
    retention = options.pop("retention", Retention(last=2))
    writer = CheckpointWriter(root, world, retention, **options)
    private = {"rank": torch.tensor([world.rank, step]), "flag": torch.tensor([True, False])}
    writer.begin(f"step_{step:08d}", step, state, tensors, private)
    return writer, tensors


def save(
    world: World, root: Path, ranks: list[int], degrees: Degrees, step: int = 3, **options: Any
) -> None:
    begin(world, root, ranks, degrees, step, **options)[0].wait()


def load_equals(world: World, root: Path, ranks: list[int], degrees: Degrees, step: int) -> int:
    path = latest_checkpoint(root)
    assert path is not None
    assert path.name.split(".")[0] == f"step_{step:08d}"
    assert read_state(path)["steps_done"] == step
    got = local(world, model(), ranks, degrees, salt=None)
    load_tensors(path, got)
    expected = local(world, model(), ranks, degrees, salt=step)
    for name, (tensor, _) in expected.items():
        assert torch.equal(got[name][0], tensor), name
    return len(got)


LAYOUTS: dict[int, list[tuple[list[int], Degrees]]] = {
    1: [([0], {})],
    2: [([0, 1], {"tp": 2}), ([0, 1], {"dp_shard": 2}), ([1], {})],
    4: [
        ([0, 1, 2, 3], {"dp_shard": 2, "tp": 2}),
        ([1, 2, 3], {"dp_shard": 3}),
        ([0, 1, 2, 3], {"dp_replicate": 2, "tp": 2}),
    ],
}


def save_all(world: World, root: Path) -> None:
    for number, (ranks, degrees) in enumerate(LAYOUTS[world.size]):
        save(world, root / f"{world.size}_{number}", ranks, degrees)


def load_all(world: World, roots: list[Path]) -> None:
    for ranks, degrees in LAYOUTS[world.size]:
        for root in roots:
            count = load_equals(world, root, ranks, degrees, 3)
            assert (count > 0) == (world.rank in ranks)


def test_any_layout_reads_what_any_layout_wrote(tmp_path: Path) -> None:
    for world_size in LAYOUTS:
        run_ranks(save_all, world_size, tmp_path)
    roots = sorted(tmp_path.iterdir())
    assert len(roots) == 7
    for world_size in LAYOUTS:
        run_ranks(load_all, world_size, roots)


def test_replicas_share_the_writing_and_write_nothing_twice(tmp_path: Path) -> None:
    run_ranks(save_all, 4, tmp_path)
    root = latest_checkpoint(tmp_path / "4_2")
    assert root is not None
    count = sum(torch.Size(shape).numel() for shape in global_shapes(model()).values())
    stored = []
    for rank in range(4):
        with safe_open(root / f"rank_{rank:05d}.safetensors", framework="pt") as file:
            keys = [key for key in file.keys() if not key.startswith("private/")]  # noqa: SIM118
            stored.append(sum(file.get_tensor(key).numel() for key in keys))
    assert sum(stored) == 2 * count
    assert max(stored) < 1.2 * min(stored)


def save_many(world: World, root: Path) -> list[str]:
    assert latest_checkpoint(root) is None
    seen = []
    for step in (5, 12, 20, 20, 7):
        save(world, root, [0], {}, step)
        # the newest by time, not by number: after a return to an older step that is step 7
        names = sorted(path.name.removeprefix("step_000000") for path in root.glob("step*"))
        seen.append(" ".join(names))
        load_equals(world, root, [0], {}, step)
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith("step")) == ["latest"]
    return seen


def test_the_last_written_are_kept(tmp_path: Path) -> None:
    [seen] = run_ranks(save_many, 1, tmp_path)
    # step 20 once more stands beside the first, so that `latest` never names what is not there
    assert seen == ["05", "05 12", "12 20", "20 20.1", "07 20.1"]


def fail_to_load(world: World, path: Path, ranks: list[int], changes: dict[str, Any]) -> str:
    """The message, alike on all ranks; no tensor was touched."""
    config = model(**changes)
    got = local(world, config, ranks, {"dp_shard": 2}, salt=None)
    with pytest.raises(ValueError) as caught:
        load_tensors(path, got)
    assert all(tensor.isnan().all() for tensor, _ in got.values())
    return str(caught.value)


def truncate(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    os.truncate(file, file.stat().st_size - 8)


def corrupt(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[:16] = b"\xff" * 16
    file.write_bytes(data)


def flip(path: Path) -> None:
    """One bit of one value."""
    file = path / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / INDEX).read_text())
        change(content)
        (path / INDEX).write_text(json.dumps(content))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "rank_00001.safetensors has "),
    "missing": (lambda p: (p / "rank_00001.safetensors").unlink(), "safetensors is missing"),
    "corrupt": (corrupt, "rank_00001.safetensors is damaged"),
    "a flipped bit": (flip, "rank_00001.safetensors is damaged \\(its checksum differs"),
    "no index": (lambda p: (p / INDEX).unlink(), f"{INDEX} cannot be read"),
    "half an index": (lambda p: os.truncate(p / INDEX, 500), f"{INDEX} cannot be read"),
    "a list": (lambda p: (p / INDEX).write_text("[]"), "not a checkpoint index"),
    "format": (edit_index(lambda c: c.update(format=99)), "not a checkpoint index of format 4"),
    "no entries": (edit_index(lambda c: c.pop("entries")), "is damaged.*entries"),
    "no state": (edit_index(lambda c: c.pop("state")), "is damaged.*state"),
    "a bad entry": (edit_index(lambda c: c["entries"][0].pop("stop")), "is damaged.*stop"),
    "a lost entry": (edit_index(lambda c: c["entries"].pop(0)), "of the .* values of policy"),
}


def damaged(world: World, root: Path) -> dict[str, str]:
    """Each damage in turn done to the newest of two checkpoints, which is then saved anew."""
    save(world, root, [0, 1], {"dp_shard": 2}, step=1)
    messages = {}
    for name, (damage, _) in DAMAGES.items():
        if world.is_first:
            shutil.rmtree(root / "step_00000002", ignore_errors=True)
        torch.distributed.barrier()
        save(world, root, [0, 1], {"dp_shard": 2}, step=2)
        torch.distributed.barrier()
        if world.is_first:
            damage(root / "step_00000002")
        torch.distributed.barrier()
        messages[name] = fail_to_load(world, root / "step_00000002", [0, 1], {})
    # what every message advises
    if world.is_first:
        (root / "latest").write_text("step_00000001\n")
    torch.distributed.barrier()
    load_equals(world, root, [0, 1], {"dp_shard": 2}, 1)
    return messages


def test_a_damaged_checkpoint_is_named_and_the_earlier_one_still_loads(tmp_path: Path) -> None:
    first, second = run_ranks(damaged, 2, tmp_path)
    assert first == second
    for name, (_, words) in DAMAGES.items():
        assert re.search(words, first[name]), (name, first[name])
        assert str(tmp_path / "latest") in first[name]


def another_model(world: World, root: Path) -> list[str]:
    save(world, root, [0, 1], {"dp_shard": 2})
    path = latest_checkpoint(root)
    assert path is not None
    changes: list[dict[str, Any]] = [{"vocab_size": 20}, {"num_hidden_layers": 3}]
    return [fail_to_load(world, path, [1, 2], change) for change in changes]


def test_another_model_is_refused_even_when_it_is_smaller(tmp_path: Path) -> None:
    results = run_ranks(another_model, 3, tmp_path)
    assert results == [results[0]] * 3
    smaller, deeper = results[0]
    assert "(28, 12) for policy.weights/model.embed_tokens.weight, which is (20, 12)" in smaller
    assert "has nothing for policy.weights/model.layers.2." in deeper
    assert "another model" in smaller
    assert "another model" in deeper


def test_a_pointer_to_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_00000009")
    with pytest.raises(ValueError, match=r"latest names 'step_00000009', which has no check"):
        latest_checkpoint(tmp_path)


def seen_by_rank_0(world: World, root: Path) -> list[Any]:
    """Ranks whose view of a shared file system differs: the others see a newer step, or none."""
    mine = root / f"view_{world.rank}"
    seen: list[Any] = [resume_point(mine)]
    for rank, step in ((1, 8), (0, 4)):
        save(world, root / f"view_{rank}", [0, 1], {"dp_shard": 2}, step)
        torch.distributed.barrier()
        found = resume_point(mine)
        seen.append(None if found is None else (found[0].name, found[1]["steps_done"]))
    if world.is_first:
        (mine / "latest").write_text("step_00000005")
    torch.distributed.barrier()
    with pytest.raises(ValueError) as caught:
        resume_point(mine)
    return [*seen, str(caught.value)]


def test_rank_0_alone_decides_what_to_resume_from(tmp_path: Path) -> None:
    for seen in run_ranks(seen_by_rank_0, 2, tmp_path):
        assert seen[:3] == [None, None, ("step_00000004", 4)]
        assert re.search("rank 0: .*view_0/latest names 'step_00000005'", seen[3])


def move_aside(world: World, root: Path) -> list[str | None]:
    moved = [set_aside(root)]
    for step in (1, 2):
        save(world, root, [0, 1], {"dp_shard": 2}, step)
        moved += [set_aside(root), set_aside(root)]
    assert resume_point(root) is None
    for number, step in ((1, 1), (2, 2)):
        load_equals(world, root.with_name(f"checkpoints.old-{number}"), [0], {}, step)
    return [None if path is None else path.name for path in moved]


def test_older_checkpoints_are_set_aside_whole(tmp_path: Path) -> None:
    results = run_ranks(move_aside, 2, tmp_path / "checkpoints")
    assert results == [[None, "checkpoints.old-1", None, "checkpoints.old-2", None]] * 2


def full_disk(world: World, root: Path) -> list[str]:
    """A file size limit on one rank stands for its full disk."""
    save(world, root, [0, 1], {"dp_shard": 2}, step=1)
    messages = []
    for rank, limit in ((1, 2000), (0, 2000), (0, 20)):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError, match="earlier checkpoints are untouched") as caught:
            # with the third limit rank 0 writes no tensors, and fails at the index
            ranks, degrees = ([1], {}) if limit == 20 else ([0, 1], {"dp_shard": 2})
            save(world, root, ranks, degrees, step=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        messages.append(str(caught.value))
        torch.distributed.barrier()
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000001"]
        load_equals(world, root, [0, 1], {"dp_shard": 2}, 1)
    save(world, root, [0, 1], {"dp_shard": 2}, step=2)
    load_equals(world, root, [0, 1], {"dp_shard": 2}, 2)
    return messages


def test_a_full_disk_is_an_error_on_every_rank_and_loses_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(full_disk, 2, tmp_path)
    assert first == second
    assert ["rank 1:" in first[0], "rank 0:" in first[1], "rank 0:" in first[2]] == [True] * 3
    assert all(str(tmp_path / "step_00000002") in message for message in first)


def unwritable(world: World, root: Path) -> str:
    with pytest.raises(OSError) as caught:
        save(world, root, [0], {})
    return str(caught.value)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_ranks(unwritable, 2, tmp_path / "file" / "run")
    assert first == second
    assert "Not a directory" in first


def write_behind(world: World, root: Path) -> list[Any]:
    """Training goes on, and changes what is being saved."""
    progress: list[int] = []
    published: list[int] = []
    writer, tensors = begin(
        world,
        root,
        [0, 1],
        {"dp_shard": 2},
        progress=lambda: progress.append(0),
        published=published.append,
    )
    for tensor, _ in tensors.values():
        tensor.fill_(float("nan"))
    writer.wait()
    assert not writer.has_failed and progress
    writer.wait()  # nothing is under way
    load_equals(world, root, [0, 1], {"dp_shard": 2}, 3)
    path = latest_checkpoint(root)
    assert path is not None
    for rank in range(2):  # any rank reads what another kept for itself
        kept = read_private(path, rank)
        assert kept["rank"].tolist() == [rank, 3] and kept["flag"].tolist() == [True, False]
    return published


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    assert run_ranks(write_behind, 2, tmp_path) == [[3], []]


def fence(world: World, root: Path) -> str:
    """A rank 0 that has lost the run, unknown to rank 1."""
    save(world, root, [0, 1], {"dp_shard": 2}, step=1)

    def permit() -> None:
        raise OSError("the run belongs to another attempt by now")

    writer, _ = begin(world, root, [0, 1], {"dp_shard": 2}, step=2, permit=permit)
    deadline = time.monotonic() + 20
    while world.is_first and not writer.has_failed and time.monotonic() < deadline:
        time.sleep(0.01)  # rank 0 knows before anyone waits
    assert writer.has_failed == world.is_first
    with pytest.raises(OSError) as caught:
        writer.wait()
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000001"]
    return str(caught.value)


def test_who_is_not_permitted_publishes_nothing(tmp_path: Path) -> None:
    one, two = run_ranks(fence, 2, tmp_path)
    assert one == two and "another attempt by now" in one


def break_the_thread(world: World, root: Path) -> list[str]:
    """Errors of every type in the writing thread of one rank, and what all ranks hear of it."""
    save(world, root, [0, 1], {"dp_shard": 2}, step=1)
    whole, messages = writing.write_safetensors, []
    broken: list[tuple[int, BaseException]] = [
        (0, KeyError("no such dtype")),
        (1, MemoryError("no room")),
        (1, SystemExit(3)),
        (0, SystemExit(3)),
    ]
    for rank, error in broken:

        def fail(*_: object, error: BaseException = error) -> Mark:
            raise error

        writing.write_safetensors = fail if world.rank == rank else whole
        began = time.monotonic()
        with pytest.raises(OSError, match="earlier checkpoints are untouched") as caught:
            save(world, root, [0, 1], {"dp_shard": 2}, step=2)
        assert time.monotonic() - began < 20
        messages.append(str(caught.value))
        torch.distributed.barrier()
    writing.write_safetensors = whole

    def published(step: int) -> None:
        raise TypeError("told wrongly")

    with pytest.raises(OSError) as caught:
        save(world, root, [0, 1], {"dp_shard": 2}, step=2, published=published)
    messages.append(str(caught.value))
    # a thread that is gone without a word
    writing.CheckpointWriter._work = lambda self, job: None  # type: ignore[method-assign]
    with pytest.raises(OSError) as caught:
        save(world, root, [0, 1], {"dp_shard": 2}, step=4)
    return [*messages, str(caught.value)]


def test_whatever_ends_the_writing_thread_is_reported_with_its_type(tmp_path: Path) -> None:
    one, two = run_ranks(break_the_thread, 2, tmp_path)
    assert one == two
    words = [
        "rank 0: KeyError: 'no such dtype'",
        "rank 1: MemoryError: no room",
        "rank 1: SystemExit: 3",
        "rank 0: SystemExit: 3",
        "rank 0: TypeError: told wrongly",
        "rank 0: the thread that writes it ended without a word",
    ]
    assert [word in message for word, message in zip(words, one, strict=True)] == [True] * 6


def refuse_kinds(world: World, root: Path) -> list[str]:
    """What no checkpoint keeps, held by rank 1 alone: an error on both, and nothing is begun."""
    writer = CheckpointWriter(root, world, Retention(last=2))
    kinds: dict[str, Any] = {
        "role/judge/phase": torch.zeros(2, dtype=torch.complex128),
        "role/judge/seen": np.zeros(2),
        "role/judge/table": torch.zeros(2, 2).to_sparse(),
    }
    messages = []
    for name, value in kinds.items():
        with pytest.raises(ValueError) as caught:
            writer.begin("step_00000001", 1, {}, {}, {name: value} if world.rank == 1 else {})
        messages.append(str(caught.value))
    for state in ({"saved": {"kl": {"table": np.zeros(2)}}}, {"counters": {3: 1.0}}):
        with pytest.raises(ValueError) as caught:
            writer.begin("step_00000001", 1, state, {}, {})
        messages.append(str(caught.value))
    assert not root.exists()
    dtypes = (torch.int8, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
    kept = {str(dtype): torch.arange(3).to(dtype) for dtype in dtypes}
    state = {"saved": {"kl": {"coef": torch.tensor(0.5), "seen": np.float32(2.0)}}}
    writer.begin("step_00000001", 1, state, {}, kept)
    writer.wait()
    path = root / "step_00000001"
    for name, tensor in read_private(path, world.rank).items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor.view(torch.uint8), kept[name].view(torch.uint8))
    assert read_state(path)["saved"] == {"kl": {"coef": 0.5, "seen": 2.0}}
    return messages


def test_what_a_checkpoint_cannot_keep_is_refused_before_it_begins(tmp_path: Path) -> None:
    one, two = run_ranks(refuse_kinds, 2, tmp_path / "checkpoints")
    assert one == two
    dtype, array, sparse, value, key = one
    assert dtype.startswith("rank 1: role/judge/phase is torch.complex128: a checkpoint keeps")
    assert array == "rank 1: role/judge/seen is a ndarray: a checkpoint keeps tensors"
    assert sparse.startswith("rank 1: role/judge/table is a torch.sparse_coo tensor on cpu")
    assert value.startswith("the state['saved']['kl']['table'] is a ndarray")
    assert key.startswith("the state['counters'] has the key 3")


def test_a_large_index_is_made_in_parts_and_others_hear_of_them() -> None:
    entry = Entry(group="g", name="n", shape=(4, 2), start=(0, 0), stop=(2, 2), file="f", key="k#0")
    beats: list[float] = []
    marks = {"rank_00000.safetensors": Mark(num_bytes=8, xxh3="ab")}
    entries = [entry] * 50_000
    began = time.monotonic()
    parts = list(index_text(7, '{"a": 1}', marks, entries, lambda: beats.append(time.monotonic())))
    seconds = time.monotonic() - began
    assert len(beats) >= 20 and max(b - a for a, b in pairwise([began, *beats])) < seconds / 5 + 0.2
    content = json.loads("".join(parts))
    assert (content["step"], content["state"], len(content["entries"])) == (7, {"a": 1}, 50_000)
    assert content["entries"][0] == content["entries"][-1] == json.loads(json.dumps(asdict(entry)))


def lose_the_pointer(world: World, root: Path) -> list[Any]:
    """Three checkpoints, and then what may become of `latest`."""
    for step in (2, 3, 1):  # after a return to an earlier step that one is the newest
        save(world, root, [0], {}, step, retention=Retention(last=9))
    found: list[Any] = []

    def look() -> None:
        try:
            path = latest_checkpoint(root)
            found.append(None if path is None else path.name)
        except ValueError as error:
            found.append(str(error))

    pointer = root / "latest"
    pointer.unlink()
    for path in root.glob("step_*"):  # as a copy without times leaves them
        os.utime(path / INDEX, (1000, 1000))
    look()
    pointer.write_text(" \n")
    look()
    (root / "step_00000001" / "rank_00000.safetensors").unlink()
    (root / "step_00000009.mine").mkdir()
    look()
    pointer.write_bytes(b"\xff\xfe\x00")
    look()
    for name in ("step_00000007", "../other", "/etc", "a\0b"):
        pointer.write_text(name)
        look()
    pointer.unlink()
    pointer.mkdir()
    look()
    pointer.rmdir()
    for step in (2, 3):
        (root / f"step_0000000{step}" / INDEX).write_text("")
    look()
    return found


def test_checkpoints_without_a_usable_pointer_are_never_passed_over(tmp_path: Path) -> None:
    [found] = run_ranks(lose_the_pointer, 1, tmp_path / "run")
    assert found[:3] == ["step_00000001", "step_00000001", "step_00000003"]
    pointer = str(tmp_path / "run" / "latest")
    for message in found[3:]:
        assert pointer in message and "checkpoint.resume=false" in message, message
        assert "step_00000002, step_00000003" in message
    assert "names 'step_00000007', which has no checkpoint.json" in found[4]
    assert "none below" in found[-1]


def keep_what_is_not_ours(world: World, root: Path) -> list[str]:
    for step in (1, 2, 3):
        save(world, root, [0], {}, step, retention=Retention(last=9))
    (root / "step_00000002.mine").mkdir()
    writer = CheckpointWriter(root, world, Retention(last=1))
    path = root / "step_00000001"
    writer.adopt([path.name, *read_state(path)[CHECKPOINTS]])  # as a run does that goes on from it
    for step in (2, 3, 4):
        writer.begin(f"step_{step:08d}", step, {}, {}, {})
        writer.wait()
    return sorted(p.name.removeprefix("step_0000000") for p in root.glob("step_*"))


def test_retention_removes_only_what_the_run_wrote_or_goes_on_from(tmp_path: Path) -> None:
    assert run_ranks(keep_what_is_not_ours, 1, tmp_path) == [["2", "2.mine", "3", "4"]]


def keep_some(world: World, root: Path) -> str:
    for step in range(1, 12):
        save(world, root, [0], {}, step, retention=Retention(last=2, every=4))
    return " ".join(sorted(p.name.removeprefix("step_000000") for p in root.glob("step*")))


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    assert run_ranks(keep_some, 1, tmp_path) == ["04 08 10 11"]


def test_what_was_never_completed_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-attempt_0001-3").mkdir()
    (tmp_path / "step_00000001").mkdir()
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_global_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), np.random.normal(), torch.randn(1).item(), random.random()]

    device = torch.device("cpu")
    draw()  # both Gaussian generators now hold a second value
    state = rng_state(device)
    first = draw()
    restore_rng(state, device)
    assert draw() == first
