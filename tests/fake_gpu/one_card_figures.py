"""An 8B model that trains in one card of 80 GB, in shape: what the plan says, and what it takes.

Runs under the stand-in, without values: GRPO's roles are assembled as a run does it, weights are
left as they are made, and an update of two optimizer steps follows a weight sync. Prints one JSON
line.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch

from fake_gpu import stand_in
from fake_gpu.figures import counted, policy_loss, trained_rows
from flow_cases import write_config
from spmdrl.config.load import load_config
from spmdrl.planning.known_models import known_model
from spmdrl.roles.handles import Policy
from spmdrl.roles.model_calls import Update
from spmdrl.run.assembly import assembly
from spmdrl.training import torch_backend
from spmdrl.world import World, start_world, stop_world

MODEL = "qwen3-8b"
WORDS = [
    "train.num_minibatches=2",
    "train.microbatch_tokens=8192",
    "train.recompute=layer",
    "data.prompts_per_step=2",
    "data.group_size=8",
    "data.train.max_tokens=512",
    "sampling.max_tokens=896",
    "model.dtype=bfloat16",
]


def one_card(world: World) -> dict[str, Any]:
    torch_backend.fill_leaves = lambda leaves, checkpoint: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        path = write_config(at / "c.yaml", at / "model", at / "run")
        config = load_config(path, WORDS)
    shapes = known_model(MODEL)
    nothing: Any = None
    models = {name: assembly.Model(model=shapes, weights=nothing) for name in config.roles}
    plan = assembly.plan_models(config, world, models)
    memory = plan.memory[0]
    print(memory.plan.describe(), flush=True)
    made = assembly.assemble(config, world, models, None, plan)
    policy = made.roles["policy"]
    assert isinstance(policy, Policy)
    rows = trained_rows(16, 8, 512, 896)
    shares = torch.full((16,), 896.0)
    batch = rows.with_columns(rows={"sample_index": torch.arange(16) % 8, "loss_share": shares})
    update = Update(seed=0, step=0, num_minibatches=2, columns=("weights", "advantages"))

    policy.update(batch, policy_loss, update)  # libraries' workspaces, the first arenas
    torch.cuda.reset_peak_memory_stats()
    found = counted(lambda: policy.update(batch, policy_loss, update))
    state = sum(memory.windowed.values())
    return {
        "parameters": sum(part.numel() for part, _ in policy.backend.local_tensors().values()),
        "state_gb": state / 1e9,
        "planned_gb": memory.working_bytes["policy.update"] / 1e9
        + sum(p.num_bytes for p in memory.plan.parts if p.name == "weights") / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "device_peak_gb": stand_in.peak_bytes() / 1e9,
        "in_gb_of_step": found["h2d_bytes"] / 2 / 1e9,
        "out_gb_of_step": found["d2h_bytes"] / 2 / 1e9,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


if __name__ == "__main__":
    os.environ.setdefault("FAKE_GPU_GB", "80")
    world = start_world(device="cuda")
    print(json.dumps(one_card(world)), flush=True)
    stop_world()
