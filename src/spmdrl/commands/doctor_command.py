"""Words of `spmdrl doctor`, and what it prints. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from spmdrl.supervision.signals import Signals

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

SHARES = {"cuda": 0.85, "cpu": 0.6}
"""Least share of the other ranks' median by device type: a CPU's speeds vary by themselves."""

LEAST = {
    "flops": ("tflops", "TFLOP/S", "rate of products of a rank"),
    "copy": ("copy", "GB/S", "rate of copies in a rank's memory, read and written"),
    "host": ("host", "GB/S", "rate of copies from the host to a GPU"),
    "disk": ("disk", "GB/S", "rate at which a node writes to --shared"),
}
"""Figure -> its option, unit and meaning."""


def add_doctor(add: Add) -> None:
    """Add the command and its words."""
    doctor = add("doctor", run_doctor, "Measure every node of a job; name those to leave out.")
    text = "a directory that all nodes must see alike; it gets the figures as preflight.json"
    doctor.add_argument("--shared", help=text)
    for where, what in (("intra", "within a node"), ("inter", "between nodes")):
        text = f"least bandwidth of an all-reduce {what}"
        doctor.add_argument(f"--min-{where}", type=float, default=0.0, metavar="GB/S", help=text)
    for option, unit, what in LEAST.values():
        text = f"least {what}"
        doctor.add_argument(f"--min-{option}", type=float, default=0.0, metavar=unit, help=text)
    doctor.add_argument(
        "--slow",
        type=float,
        metavar="SHARE",
        help="a rank is slow below this share of the other ranks' median (default: "
        f"{SHARES['cuda']} on GPUs, {SHARES['cpu']} on CPUs)",
    )
    text = "seconds of products; more of them show thermal limits (default: 4)"
    doctor.add_argument("--seconds", type=float, default=4.0, help=text)
    text = "GPU or machine file of a plan, whose figures are written beside: see spmdrl plan"
    doctor.add_argument("--gpu", metavar="NAME|FILE", help=text)
    doctor.add_argument("--no-speed", action="store_true", help="measure the network only")
    doctor.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run_doctor(options: argparse.Namespace) -> None:
    """Check all nodes, print what was found, and exit with 3 if nodes are bad."""
    with closing(Signals(options.name, saves=False)) as signals:
        from spmdrl.commands.doctor import doctor
        from spmdrl.commands.slow_nodes import SpeedLimits, planned_speed
        from spmdrl.planning.forecast.machines import load_machine
        from spmdrl.world import start_world, stop_world

        plan = None
        if options.gpu is not None:  # only speeds of a rank: any number of nodes will do
            plan = planned_speed(load_machine(options.gpu, num_nodes=1, devices_per_node=1))
        world = start_world(timeout_s=120, device=options.device)
        share = SHARES[world.device.type] if options.slow is None else options.slow
        least = {figure: vars(options)[f"min_{words[0]}"] for figure, words in LEAST.items()}
        found = doctor(
            world,
            shared=None if options.shared is None else Path(options.shared),
            min_intra=options.min_intra,
            min_inter=options.min_inter,
            limits=None if options.no_speed else SpeedLimits(share=share, least=least),
            plan=plan,
            seconds=options.seconds,
        )
        if world.is_first:
            nodes = world.size // world.local_size
            print(f"{world.size} ranks on {nodes} nodes, torch on {world.device.type}")
            print("\n".join(found.lines))
            end = f"--exclude={','.join(found.bad)}" if found.bad else "all nodes are well"
            print(end, flush=True)
        stop_world()
        signals.ignore()
    if found.bad:
        raise SystemExit(3)
