"""Tools that come with the package: `calculator` and `python`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from spmdrl.sandbox.run import Confined, Isolation, Limits, memory_file, unusable
from spmdrl.turns.arithmetic import evaluate


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: numbers with + - * / // % ** and brackets, such as "(17 + 4) * 25".
    """
    return evaluate(expression)


def python(
    *, timeout_s: float = 5.0, memory_mb: int = 512, sandbox: str = "auto"
) -> Callable[[str], str]:
    """Make the tool that runs a program, each one on its own, confined (`spmdrl.sandbox`).

    Args:
        timeout_s: seconds of a program; below `rollout.turns.timeout_s`.
        memory_mb: MiB of its address space.
        sandbox: `auto` refuses where programs cannot be confined; `none` runs them with limits
            only.

    Raises:
        ValueError: programs cannot be confined here.
    """
    if sandbox not in ("auto", "none"):
        raise ValueError(f"sandbox={sandbox!r}: it must be auto or none")
    reason = unusable() if sandbox == "auto" else None
    if reason is not None:
        raise ValueError(
            f"programs cannot be confined on this host ({reason}): `spmdrl doctor` says more; "
            "sandbox: none runs them with your rights, which is for a model that you trust"
        )
    limits = Limits(memory_mb=memory_mb, cpu_s=max(1, round(timeout_s)))
    isolation: Isolation = "namespaces" if sandbox == "auto" else "none"

    def run_python(code: str) -> str:
        """Run a Python program and return what it prints. Every program runs on its own.

        Args:
            code: the program.
        """
        source = memory_file(code)
        try:
            with Confined(
                "answering:program",
                (str(source),),
                limits=limits,
                isolation=isolation,
                descriptors=(source,),
            ) as program:
                code_of_end = program.wait(time.monotonic() + timeout_s)
                said, errors = program.output(), program.errors()
        finally:
            os.close(source)
        if code_of_end is None:
            return f"{said}\nerror: it took more than {timeout_s:g} s".lstrip()
        if code_of_end:
            return f"{said}\n{_own_lines(errors) or f'exit code {code_of_end}'}".lstrip()
        return said

    run_python.__name__ = "python"
    return run_python


def _own_lines(errors: str) -> str:
    """Standard error of a program from its own first frame on."""
    head, mark, rest = errors.partition('  File "solution.py"')
    title = "Traceback (most recent call last):\n"
    if not mark:
        return errors.strip()
    return (head.partition(title)[0] + title + mark + rest).strip()
