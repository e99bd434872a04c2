"""Kernels for the CPU, float32 without gradient: products with a weight laid out in panels
(`products.c`), and norm, SwiGLU and rotary embedding in one pass each (`rows.c`).

torch takes four to six operations for each of the latter, and in a decode step, with few rows,
starting an operation takes longer than its arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spmdrl.models.kernels import c_code

_I, _F, _P, _N = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int


class Rows:
    """The compiled functions."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self._norm, self._swiglu, self._rotate = code.rms_norm, code.swiglu, code.rotate
        self._norm.argtypes = (_P, _I, _P, _F, _I, _I, _P, _N)
        self._swiglu.argtypes = (_P, _I, _I, _P, _N)
        self._rotate.argtypes = (_P, _I, _P, _P, _I, _I, _I, _I, _N, _P, _N)
        for function in (self._norm, self._swiglu, self._rotate):
            function.restype = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [..., D], [D]
        assert weight.shape == x.shape[-1:]
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        out, weight = x.new_empty(x.shape), weight.contiguous()
        rows, width = flat.shape
        self._norm(
            flat.data_ptr(),
            flat.stride(0),
            weight.data_ptr(),
            eps,
            rows,
            width,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:  # [T, 2 W] -> [T, W]
        assert gate_up.ndim == 2
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._swiglu(gate_up.data_ptr(), rows, width, out.data_ptr(), torch.get_num_threads())
        return out

    def rotate(
        self,
        x: Tensor,  # [T, H, d]
        cos: Tensor,  # [T, 1, r]
        sin: Tensor,  # [T, 1, r]
        interleaved: bool = False,
    ) -> Tensor:  # [T, H, d]
        rows, heads, d = x.shape
        turned = cos.shape[-1]
        assert cos.shape == sin.shape == (rows, 1, turned) and turned <= d and turned % 2 == 0
        if x.stride(2) != 1 or x.stride(1) != d:
            x = x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        out = x.new_empty(rows, heads, d)
        self._rotate(
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            heads,
            d,
            turned,
            interleaved,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def rows_for(*tensors: Tensor) -> Rows | None:
    """Return the kernels if they support these operands: plain float32 tensors on the CPU, no
    gradient needed, and a C compiler available."""
    if torch.compiler.is_compiling():
        return None
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Subclasses (fake tensors, which measure plans; DTensors) have no memory of their own.
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
        for t in tensors
    )
    return None if wants_gradient or not plain else _rows()


@functools.cache
def _rows() -> Rows | None:
    code = c_code.load(Path(__file__).with_name("rows.c"))
    return None if code is None else Rows(code)


_I, _P, _N = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Panels of a weight [rows, columns].

    Args:
        data: [panels, columns, rows of a panel], with zeros beyond the last row.
    """

    data: Tensor
    rows: int
    columns: int

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # [T, K] -> [T, N]
        """Compute x W^T (+ b) without gradient; x is float32 on the CPU."""
        code = _code()
        assert code is not None and x.shape[1] == self.columns
        bias = None if bias is None else bias.contiguous()
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(x.shape[0], self.rows)
        code.product(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self.data.data_ptr(),
            self.rows,
            self.columns,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def lay_out(weight: Tensor) -> Panels | None:  # [N, K]
    """Copy a float32 weight on the CPU into panels; None if no C compiler is available."""
    code = _code()
    if code is None:
        return None
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    width = code.panel_width()
    data = weight.new_empty(-(-rows // width), columns, width)
    code.lay_out(weight.data_ptr(), rows, columns, data.data_ptr(), torch.get_num_threads())
    return Panels(data=data, rows=rows, columns=columns)


@functools.cache
def _code() -> ctypes.CDLL | None:
    code = c_code.load(Path(__file__).with_name("products.c"))
    if code is not None:
        code.product.argtypes = (_P, _I, _I, _P, _I, _I, _P, _P, _N)
        code.lay_out.argtypes = (_P, _I, _I, _P, _N)
        code.product.restype = code.lay_out.restype = None
        code.panel_width.argtypes, code.panel_width.restype = (), _I
    return code
