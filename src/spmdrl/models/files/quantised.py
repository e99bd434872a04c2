"""Quantised tensors of a checkpoint, read box by box as the floats that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.files.stored_tensors import Entry, StoredTensor
from spmdrl.models.quantisation import Quantisation

SCALES, BLOCKS, EXPONENTS = "_scale_inv", "_blocks", "_scales"

_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of E2M1's lower three bits; the fourth is the sign."""

_GROUP = 32
"""Values that share an exponent."""


def dequantised(
    stored: Mapping[str, StoredTensor], format_: Quantisation
) -> tuple[dict[str, Entry], frozenset[str]]:
    """Replace pairs of quantised values and scales by the tensors that they stand for.

    What makes no pair stays as it is, and is refused by its name or dtype when it is inspected.

    Returns:
        The tensors, and the names of those that were quantised.

    Raises:
        ValueError: scales do not have the shape or dtype that the format asks for.
    """
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for name, tensor in stored.items():
        if format_.method == "fp8":
            scales = stored.get(name + SCALES)
            if scales is not None and tensor.dtype == "F8_E4M3":
                found[name] = _fp8(name, tensor, scales, format_.block)
                used |= {name, name + SCALES}
        elif name.endswith(BLOCKS):
            own = name.removesuffix(BLOCKS)
            exponents = stored.get(own + EXPONENTS)
            if exponents is not None and own not in stored:
                found[own] = _mxfp4(name, tensor, exponents)
                used |= {name, own + EXPONENTS}
    rest = {name: tensor for name, tensor in stored.items() if name not in used}
    return {**rest, **found}, frozenset(found)


def _fp8(name: str, values: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> Entry:
    shape = values.shape
    grid = (*shape[:-2], *(-(-n // size) for n, size in zip(shape[-2:], block, strict=False)))
    if len(shape) < 2 or scales.shape != grid or scales.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{scales.file}: tensor {name + SCALES!r} ({scales.dtype}, {scales.shape}) does not "
            f"scale {name!r} {shape} in blocks of {block[0]} x {block[1]}, as config.json's "
            f"quantization_config says: {grid} of {', '.join(_SCALE_DTYPES)}"
        )
    return Fp8Tensor(values=values, scales=scales, block=block)


def _mxfp4(name: str, blocks: StoredTensor, exponents: StoredTensor) -> Entry:
    shape = blocks.shape
    fits = len(shape) == 4 and shape[3] * 2 == _GROUP and exponents.shape == shape[:3]
    if not fits or {blocks.dtype, exponents.dtype} != {"U8"}:
        raise ValueError(
            f"{blocks.file}: tensor {name!r} ({blocks.dtype}, {shape}) with scales "
            f"{exponents.shape} is not read as mxfp4: [experts, rows, groups, 16] and "
            "[experts, rows, groups] bytes"
        )
    return Mxfp4Tensor(blocks=blocks, exponents=exponents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Tensor:
    """FP8 values with a scale for each block of the last two dims, read in float32."""

    values: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, box: tuple[slice, ...]) -> Tensor:
        """Return value times scale for a box that may begin and end within blocks."""
        values = self.values.map()[box].float()
        (height, width), (own_rows, own_columns) = self.block, box[-2:]
        rows, columns = _touched(own_rows, height), _touched(own_columns, width)
        scales = self.scales.map()[(*box[:-2], rows, columns)].float()
        of_column = torch.arange(own_columns.start, own_columns.stop) // width - columns.start
        # the rows of a block share their scales, so that only columns are repeated
        for i, block in enumerate(range(rows.start, rows.stop)):
            first = max(block * height, own_rows.start) - own_rows.start
            last = min((block + 1) * height, own_rows.stop) - own_rows.start
            values[..., first:last, :] *= scales[..., i : i + 1, of_column]
        return values


def _touched(span: slice, size: int) -> slice:
    """Return the blocks of `size` that a span of indices touches."""
    return slice(span.start // size, -(-span.stop // size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4Tensor:
    """4-bit values in groups of 32 along a row, with an exponent for each group.

    The file has [experts, rows, groups, 16] bytes of two values each; the tensor is
    [experts, groups * 32, rows], as transformers gives it. Every value is exact in bfloat16.
    """

    blocks: StoredTensor
    exponents: StoredTensor

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, _ = self.blocks.shape
        return (experts, groups * _GROUP, rows)

    def read(self, box: tuple[slice, ...]) -> Tensor:
        """Return the values of a box that may begin and end within groups."""
        experts, columns, rows = box
        groups = _touched(columns, _GROUP)
        codes = self.blocks.map()[experts, rows, groups]
        exponents = self.exponents.map()[experts, rows, groups]
        factors = torch.exp2(exponents.float() - 127).bfloat16()
        values = _byte_values()[codes.int()] * factors[..., None, None]
        start = columns.start - groups.start * _GROUP
        cut = values.flatten(2)[:, :, start : start + columns.stop - columns.start]
        return cut.transpose(1, 2)


def _byte_values() -> Tensor:
    """[256, 2] the two values of each byte, that of the lower bits first."""
    signed = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    codes = torch.arange(256)
    return torch.stack((signed[codes & 15], signed[codes >> 4]), dim=-1)


def quantised_note(names: Iterable[str], format_: Quantisation) -> str:
    """Make the note that quantised tensors are read as floats."""
    found = sorted(names)
    return f"{len(found)} {format_.method} tensors ({found[0]} ...) are read as floats"
