"""Values of `rope_parameters` for heads of 8 dims."""

from __future__ import annotations

from typing import Any

THETA = {"rope_theta": 5000.0}
LINEAR: dict[str, Any] = {**THETA, "rope_type": "linear", "factor": 3.0}
DYNAMIC: dict[str, Any] = {**THETA, "rope_type": "dynamic", "factor": 2.0}
LLAMA3: dict[str, Any] = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: dict[str, Any] = {
    **THETA,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE: dict[str, Any] = {
    **THETA,
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
