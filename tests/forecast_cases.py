"""Machines, models and configurations for tests of forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spmdrl.config.load import parse_config
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.models.config import parse_config as parse_model
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.machines import load_machine


def machine_of(gpu: str = "h100", *, nodes: int, ranks: int = 8) -> Machine:
    """Nodes of `ranks` of these devices."""
    return load_machine(gpu, num_nodes=nodes, devices_per_node=ranks)


def llama(
    *, layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int
) -> ModelConfig:
    """A dense decoder by its sizes."""
    return parse_model(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    )


def config_of(flow: str, roles: Mapping[str, Mapping[str, Any]], **other: Any) -> Config:
    """A configuration of a flow; `other` are sections, which replace these."""
    given: dict[str, Any] = {
        "flow": flow,
        "steps": 10,
        "run_dir": "runs/forecast",
        "device": "cuda",
        "model": {"path": "models/none"},
        "roles": roles,
        "data": {"train": {"source": "data/none.jsonl"}, "prompts_per_step": 64},
        **other,
    }
    return parse_config(given, "forecast")
