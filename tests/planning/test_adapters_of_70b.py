"""PPO with four roles over one model of 70 billion parameters, on eight GPUs of 80 GB: it fits."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

from spmdrl.commands.cli import main
from spmdrl.models.adapters import Adapter, adapter_shapes, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, read_config

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Shapes of meta-llama/Llama-3.1-70B-Instruct."""

DOCS = Path(__file__).parents[2] / "docs"
ASKED = (
    "device=cuda memory_gb=72 roles.rollout.tp=8 data.prompts_per_step=128 "
    "sampling.max_tokens=1024 train.microbatch_tokens=8192 train.recompute=layer"
)


def write_sparse_adapter(path: Path, model: ModelConfig, adapter: Adapter) -> None:
    """Write a PEFT directory with a scalar head, whose values are a hole in a file."""
    shapes = dict(adapter_shapes(model, adapter)) | {"score.weight": (1, model.hidden_size)}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        own = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        header[f"base_model.model.{name}"] = own
    text = json.dumps(header).encode()
    path.mkdir()
    with (path / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    modules = sorted({name.split(".")[-2] for name in adapter.targets})
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 16, "lora_alpha": 32}
    config |= {"target_modules": modules, "modules_to_save": ["score"]}
    (path / "adapter_config.json").write_text(json.dumps(config))


def test_four_roles_over_one_model_fit_into_eight_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    model = read_config(tmp_path / "model")
    adapter = make_adapter(find_targets(model, ["all"]), rank=16, alpha=32)
    write_sparse_adapter(tmp_path / "judge", model, adapter)
    monkeypatch.setenv("MODEL", "model")
    monkeypatch.setenv("REWARD_ADAPTER", "judge")
    assert main(["plan", "rlhf/ppo_lora", "--ranks", "8", *shlex.split(ASKED)]) == 0
    text = capsys.readouterr().out
    shown = text.split("# roles\n")[1].split("\n# weights")[0].rstrip()
    memory = text.split("# memory\n")[1].split("\n\n")[0].rstrip()
    # the model once, in bfloat16: 141 GB over eight ranks
    assert "policy.base                    17.64 GB" in memory
    assert "reference.weights               0 bytes" in memory
    assert "nothing moves: all of it stays on the device" in memory
    assert "560   rank 16, roles.policy.adapter" in text
    page = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("adapters*.md"))
    assert shown in page, f"put this into docs/adapters.md:\n{shown}"
    assert memory in page, f"put this into docs/adapters.md:\n{memory}"
    assert ASKED in " ".join(page.replace("\\\n", " ").split())
