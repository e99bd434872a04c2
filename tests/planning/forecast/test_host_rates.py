"""Machines of runs that name none."""

from __future__ import annotations

import pytest

from spmdrl.planning.forecast.host_rates import known_gpu, measured_host, resident_bytes
from spmdrl.planning.forecast.machines import machine_of_values, machine_values
from spmdrl.planning.forecast.seconds import seconds_of
from spmdrl.planning.forecast.work import Work


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", None),
    ],
)
def test_cards_are_known_by_their_drivers_names(driver: str, name: str | None) -> None:
    assert known_gpu(driver) == name


def test_a_host_is_measured_and_shared_by_its_ranks() -> None:
    machine = measured_host(num_nodes=1, devices_per_node=1)
    assert 1e8 < machine.device.flops["float32"] < 1e14
    assert 1e7 < machine.device.memory_rate < 1e13
    values = machine_values(machine)
    again = machine_of_values(values, num_nodes=1, devices_per_node=1)
    assert again.device.flops["float32"] == pytest.approx(machine.device.flops["float32"])
    halves = machine_of_values(values, num_nodes=1, devices_per_node=2)
    assert halves.device.flops["float32"] * 2 == pytest.approx(machine.device.flops["float32"])
    assert halves.device.memory_rate * 2 == pytest.approx(machine.device.memory_rate)
    assert resident_bytes() > 10**7


def test_a_cpu_starts_calls_one_after_another() -> None:
    machine = measured_host(num_nodes=1, devices_per_node=1)
    products = Work(flops={"matmul": 1e9})
    calls = Work(launches=1000)
    both = seconds_of(products + calls, machine, "float32").seconds
    one, other = (seconds_of(work, machine, "float32").seconds for work in (products, calls))
    assert both == pytest.approx(one + other)
