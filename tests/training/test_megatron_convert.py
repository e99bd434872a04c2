"""Distributed checkpoints that Megatron wrote, as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron_cases import CPU, KINDS, Case, case
from training_cases import LivelyCheckpoint, options

from harness import run_ranks
from spmdrl.commands.cli import main
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import fill, open_checkpoint
from spmdrl.models.megatron_chunks import rank_chunks
from spmdrl.models.tensors import Slice
from spmdrl.planning.systems.megatron import import_backend
from spmdrl.training.megatron.checks import model_cut
from spmdrl.world import World
from sweeps import asked, swept

pytestmark = pytest.mark.megatron

CASES: dict[str, Case] = {
    "qwen2": case(tp=2, pp=2),
    "qwen3": case(tp=2, pp=2, vpp=2),
    "mixtral": case(tp=2, pp=2, ep=2, sp=True),
    "qwen3_moe": case(pp=2, tp=2, sp=True),
}


def whole(name: str, shape: tuple[int, ...]) -> Slice:
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)


def write(world: World, kinds: Sequence[str], directory: str) -> None:
    """As a program of Megatron's does: its own groups, models and checkpoint writer."""
    import_backend()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from spmdrl.training.megatron import compat
    from spmdrl.training.megatron.model import build_chunk, transformer_config

    compat.apply()
    for name in ("filesystem_async", "state_dict_saver"):  # they wait for CUDA too
        module = import_module(f"megatron.core.dist_checkpointing.strategies.{name}")
        vars(module)["torch"] = compat._CPU_TORCH
    for kind in kinds:
        degrees, megatron, _ = CASES[kind]
        config = KINDS[kind]
        mesh = Mesh("policy", range(world.size), degrees, "cpu")
        cut = model_cut(mesh.degrees, megatron, CPU)
        parallel_state.initialize_model_parallel(
            cut.tp,
            cut.pp,
            cut.vpp if cut.vpp > 1 else None,
            expert_model_parallel_size=cut.ep,
            expert_tensor_parallel_size=mesh.size("etp"),
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.embd = None  # weights are filled on both stages
        settings = transformer_config(mesh, config, options(), megatron, CPU)
        place = (mesh.coordinate(axis) for axis in ("tp", "pp"))
        table = rank_chunks(config, cut, *place, ep_rank=mesh.coordinate("ep"))
        state = {}
        for number, expected in enumerate(table):
            chunk = build_chunk(settings, config, cut, groups, number, CPU, "lm")
            with torch.no_grad():
                parameters = [p.zero_() for p in chunk.parameters()]
                held = [p.slices for p in expected]
                fill(zip(parameters, held, strict=True), LivelyCheckpoint(config))
            metadata = {"dp_cp_group": groups.dp_cp}
            state[f"model{number}"] = chunk.sharded_state_dict(metadata=metadata)
        path = Path(directory) / kind / "iter_0000001"
        if world.is_first:
            path.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(state, str(path))
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron")
    kinds = sorted(asked(request, "kind") | {"qwen2"})
    run_ranks(write, 4, kinds, str(root))
    for kind in {*kinds, "qwen3"}:  # one is another model's
        config, checkpoint = KINDS[kind], LivelyCheckpoint(KINDS[kind])
        tensors = ((n, checkpoint.read(whole(n, checkpoint.shape(n)))) for n in checkpoint.names)
        save_pretrained(tensors, config, root / f"{kind}_hf", None)
    return root


@pytest.mark.full
@pytest.mark.parametrize("kind", swept(CASES, ["qwen2", "mixtral"]))
def test_megatron_checkpoints_become_hugging_face_directories(written, kind, tmp_path, capsys):
    source, like = written / kind / "iter_0000001", written / f"{kind}_hf"
    assert main(["convert", str(source), str(tmp_path / "out"), "--like", str(like)]) == 0
    before, after = open_checkpoint(like), open_checkpoint(tmp_path / "out")
    assert before.names == after.names
    for name in before.names:
        piece = whole(name, before.shape(name))
        assert torch.equal(before.read(piece), after.read(piece)), name


@pytest.mark.full
def test_what_cannot_be_converted_is_refused(written, tmp_path, capsys):
    source = str(written / "qwen2" / "iter_0000001")
    assert main(["convert", source, str(tmp_path / "out")]) == 2
    assert "give a Hugging Face directory" in capsys.readouterr().err
    like = str(written / "qwen3_hf")
    assert main(["convert", source, str(tmp_path / "out"), "--like", like]) == 2
    error = capsys.readouterr().err
    assert "of another model" in error
