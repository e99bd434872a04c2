"""Figures of layers of the gated delta rule in plain torch, as `figures.py` has of others: one JSON
line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fake_gpu import stand_in
from fake_gpu.figures import LAUNCHES, SYNCS, large_model, make_backend, total, train, trained_rows
from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.models.config import ModelConfig
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.role_spec import RoleSpec
from spmdrl.training.readout import next_token
from spmdrl.world import start_world, stop_world

MODEL = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
PROMPT, RESPONSE, ROWS = 128, 896, 8


def planned(model: ModelConfig, *, backward: bool) -> int:
    """Bytes that the plan has for the packed rows, which share a prompt."""
    spec = RoleSpec(
        name="policy",
        kind="policy",
        section=RoleSection(),
        train=TrainSection(),
        placement=Placement(
            ranks=(0,), degrees={"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
        ),
        path=Path("model"),
        model=model,
        device_type="cuda",
        dtype=torch.bfloat16,
        trained=True,
        backend="torch",
        is_tiny=False,
    )
    return working_bytes(spec, PROMPT + ROWS * RESPONSE, backward=backward)


def used(work: Callable[[], Any]) -> tuple[dict[str, int], int]:
    """What `work` asks of the device, and the most bytes that it has there at once."""
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with stand_in.counting() as found:
        work()
    return {name: found.get(name, 0) for name in stand_in.kinds()}, (
        torch.cuda.max_memory_allocated() - start
    )


def recurrent(device: torch.device) -> dict[str, Any]:
    """A forward pass and a microbatch, whose gradients exist already."""
    model = large_model(MODEL)
    backend, rows = make_backend(device, model), trained_rows(ROWS, ROWS, PROMPT, RESPONSE)
    train(backend, rows)
    forward, forward_bytes = used(lambda: backend.forward(rows, next_token()))
    both, bytes_of_both = used(partial(train, backend, rows))
    return {
        "forward_launches": total(forward, LAUNCHES),
        "launches": total(both, LAUNCHES),
        "syncs": total(both, SYNCS),
        "pageable": both["pageable_h2d"],
        "forward_of_planned": round(forward_bytes / planned(model, backward=False), 3),
        "of_planned": round(bytes_of_both / planned(model, backward=True), 3),
        "gb": round(bytes_of_both / 1e9, 3),
    }


if __name__ == "__main__":
    world = start_world(device="cuda")
    print(json.dumps(recurrent(world.device)), flush=True)
    stop_world()
