"""`Panels`: a float32 weight laid out for the product kernel of `products.c`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.kernels import c_code

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
