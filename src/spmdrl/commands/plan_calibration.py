"""`spmdrl plan --calibrate RUN`: a machine file from a run's figures."""

from __future__ import annotations

from pathlib import Path

from spmdrl.planning.forecast.calibrate import calibrated, read_run
from spmdrl.planning.forecast.machines import save_machine

MACHINE_FILE = "machine.yaml"


def calibrate(run_dir: Path, to: Path | None = None) -> str:
    """Write a machine file, and return what it makes of the run's own steps.

    Args:
        to: the file; None: `machine.yaml` in the run's directory.

    Raises:
        ValueError: the run has too few steps, or its models' files are gone.
        OSError: the file cannot be written.
    """
    file = run_dir / MACHINE_FILE if to is None else to
    run = read_run(run_dir)
    machine = calibrated(run_dir)
    save_machine(machine, file)
    before, after, measured = run.predicted(run.machine), run.predicted(machine), run.measured()
    lines = [
        f"{file}: {machine.device.name}, from {len(run.records)} steps of {run_dir}",
        f"  {'phase':<12}{'measured s':>12}{'forecast s':>12}{'with the file':>15}",
    ]
    for phase, seconds in measured.items():
        own = f"{before.get(phase, 0.0):>12.2f}{after.get(phase, 0.0):>15.2f}"
        lines.append(f"  {phase:<12}{seconds:>12.2f}{own}")
    if machine.process_bytes:
        lines.append(f"  a process without its roles: {machine.process_bytes / 1e9:.2f} GB")
    lines.append(f"plan with it: spmdrl plan CONFIG --gpu {file}")
    return "\n".join(lines)
