"""The local Slurm of the tests, where it cannot begin."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts/dev/slurmlab.sh"


def test_a_port_that_another_lab_has_is_named_and_nothing_begins(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = subprocess.run(
            ["bash", str(SCRIPT), "up", str(tmp_path / "lab")],
            env={**os.environ, "SLURMLAB_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ran.returncode == 1
    assert f"port {port} is taken" in ran.stderr and "SLURMLAB_PORT" in ran.stderr
    assert not (tmp_path / "lab").exists()
