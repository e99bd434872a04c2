"""Quantised formats of weights that can be read, as config.json describes them.

Block-quantised FP8 (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3) has a scale for
each block of a matrix; MXFP4 (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)
has a power of two for every 32 values of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

QUANTIZATION = "quantization_config"


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """Format of quantised weights; `block` is rows and columns that share a scale (of fp8)."""

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (1, 32)


def parse_quantisation(source: Mapping[str, Any], origin: str) -> Quantisation | None:
    """Parse `quantization_config`; None if the weights are not quantised.

    Raises:
        ValueError: the format is not read.
    """
    described = source.get(QUANTIZATION)
    if not described:
        return None
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method == "mxfp4":
        return Quantisation(method="mxfp4")
    if method != "fp8":
        raise ValueError(
            f"{origin}: {QUANTIZATION} with quant_method={method!r} is not read (fp8 in blocks and "
            "mxfp4 are): give the directory of the model in float weights"
        )
    block = described.get("weight_block_size", [128, 128])
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(
            f"{origin}: {QUANTIZATION}.weight_block_size={block!r} is not read (two numbers above 0"
            " are, rows and columns): give the directory of the model in float weights"
        )
    return Quantisation(method="fp8", block=(block[0], block[1]))
