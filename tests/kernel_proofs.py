"""Proofs of Triton kernels without a GPU: their arithmetic by Triton's interpreter, and what the
compiler makes of them for an architecture.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a compiled kernel, from ptxas and the disassembler.

    Args:
        registers: those of a thread.
        spilled: instructions that store and load what registers have no room for.
        local: bytes of a thread's stack and local memory.
        shared: bytes of shared memory.
        wide: loads from global memory of 16 bytes and more (to registers or to shared memory).
        scalar: loads from global memory of at most 4 bytes.
        instructions: all instructions.
        products: how threads hold the results of products, one line for each way.
        ptx: the code before ptxas, in which orders of memory can be read.
    """

    registers: int
    spilled: int
    local: int
    shared: int
    wide: int
    scalar: int
    instructions: int
    products: frozenset[str] = frozenset()
    ptx: str = field(default="", repr=False)


def compiled(
    kernel: Any,
    architecture: int,
    tensors: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    odd: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    fusion: bool = True,
) -> Figures:
    """Compile a kernel for sm_80, sm_90 or sm_100.

    Args:
        tensors: Triton's type of each argument that is no constant: `*bf16`, `i32`, `fp32`.
        odd: arguments that are no multiples of 16, as pointers and integers are by default.
        fusion: whether the compiler may fuse a product and a sum.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == {*tensors, *constants}, set(names) ^ {*tensors, *constants}
    signature = {n: tensors.get(n, "constexpr") for n in names}
    whole = [n for n, kind in tensors.items() if not kind.startswith("fp") and n not in odd]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion},
    )
    found = figures(made.asm["cubin"], made.metadata.shared)
    products = frozenset(re.findall(r"= (#ttg.nvidia_mma<.*)", made.asm["ttgir"]))
    return replace(found, products=products, ptx=made.asm["ptx"])


def figures(cubin: bytes, shared: int) -> Figures:
    """Read a compiled kernel by the `cuobjdump` that Triton's wheel has."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # a line of SASS: /*0050*/  @P0 LDG.E.128 R4, [R2.64] ;
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)
    assert operations and found, (usage, code[:2000])
    loads = [o for o in operations if o.startswith("LDG")]
    wide = [o for o in loads if re.search(r"\.(128|256)\b", o)]
    scalar = [o for o in loads if not re.search(r"\.(64|128|256)\b", o)]
    return Figures(
        registers=found["REG"],
        spilled=sum(o.startswith(("LDL", "STL")) for o in operations),
        local=found["STACK"] + found["LOCAL"],
        shared=shared,
        wide=len(wide),
        scalar=len(scalar),
        instructions=len(operations),
    )


def check(found: Figures, *, most_scalar: int, least_wide: int = 1) -> None:
    """Hold a kernel to its figures: nothing spilled, no local memory, wide loads.

    Args:
        most_scalar: loads of single numbers that it needs (lengths, page numbers).
    """
    assert found.spilled == 0 and found.local == 0, f"registers do not suffice: {found}"
    assert found.wide >= least_wide, f"no wide loads: {found}"
    assert found.scalar <= most_scalar, f"scalar loads: {found}"


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Give `run(function, *arguments)`, which runs a module's function in a process in which
    kernels are interpreted.
    """
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret
    ) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def launched(names: set[str]) -> None:
    """Collect the names of the kernels that this process, which interprets them, launches."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.__getitem__

    def watching(self: Any, grid: Any) -> Any:
        names.add(self.fn.__name__)
        return plain(self, grid)

    InterpretedFunction.__getitem__ = watching


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch

    torch.set_num_threads(1)
    runtime = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar == language.bfloat16:
            # Triton 3.9's interpreter multiplies their bits
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        """Multiply so that a row's products depend on the row alone, as a tensor core's do; those
        of BLAS also depend on the row's place.
        """
        rows, columns = numbers(a), np.ascontiguousarray(numbers(b).T)
        dtype = d.data.dtype
        summed = (rows[:, None].astype(dtype) * columns[None].astype(dtype)).sum(-1)
        return runtime.TensorHandle(summed + d.data, d.dtype.scalar)

    calling, patched = runtime.InterpretedFunction.__call__, set[str]()

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        """Call a part of a kernel without patching the language again, which takes longer than most
        parts: the kernel's call has patched what our modules see of it, and once patched, what its
        own modules see stays so.
        """
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patched.add(module)
            return calling(self, *arguments, **named)
        return self.rewrite()(*arguments, **named)

    runtime.InterpreterBuilder.create_dot = create_dot
    runtime.InterpretedFunction.__call__ = call


def planted(module: str, old: str, new: str, directory: Path) -> Any:
    """Import a copy of a module in whose source `old` is replaced, everywhere."""
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, module
    source = Path(found.origin).read_text(encoding="utf-8")
    assert old in source, f"{module} has no {old!r}"
    name = "planted_" + hashlib.sha256(f"{module}{old}{new}".encode()).hexdigest()[:12]
    file = directory / f"{name}.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
