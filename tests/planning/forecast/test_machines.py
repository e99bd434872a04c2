"""Machines by name and from files: numbers have sources, bad files are refused by key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from spmdrl.planning.forecast.machines import (
    ALIASES,
    TABLE,
    known_gpus,
    load_machine,
    save_machine,
)

PRODUCTS = {"bfloat16_tflops", "float32_tflops"}
SERVER = {"network_gb_s", "copy_gb_s", "host_memory_gb", "host_watts"}


def test_numbers_become_rates_of_a_machine() -> None:
    machine = load_machine("H100", num_nodes=64, devices_per_node=8)
    assert machine.num_ranks == 512
    assert machine.device.flops == pytest.approx({"bfloat16": 989.4e12, "float32": 66.9e12})
    assert machine.device.memory_rate == 3350e9
    assert (machine.network_rate, machine.host_bytes) == (50e9, 2048 * 10**9)
    slow = load_machine("h100", num_nodes=64, devices_per_node=8, network_gb_s=12.5)
    assert slow.network_rate == 12.5e9
    assert slow.link_rate("network") == 12.5e9 * slow.shares.links["network"]


@pytest.mark.parametrize("name", [*known_gpus(), *ALIASES])
def test_every_gpu_is_a_machine(name: str) -> None:
    device = load_machine(name, num_nodes=1, devices_per_node=8).device
    assert device.flops["bfloat16"] > device.flops["float32"] > 1e12
    assert device.memory_bytes > 20e9 and device.memory_rate > device.node_rate


def test_each_number_has_a_source() -> None:
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    gpus, named = table["gpus"], set()

    def sources_of(name: str) -> dict[str, str]:
        own = gpus[name]
        inherited = sources_of(own["base"]) if "base" in own else {}
        return inherited | own.get("sources", {})

    for name, own in gpus.items():
        numbers = {key for key, value in own.items() if isinstance(value, int | float)}
        wanted = {
            "products" if key in PRODUCTS else "server" if key in SERVER else key for key in numbers
        }
        assert wanted <= sources_of(name).keys(), name
        named |= set(sources_of(name).values())
    assert named <= table["documents"].keys()


def test_a_file_has_the_same_keys(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("base: h100\nwatts: 500\nshares:\n  flops: {matmul: 0.5}\n")
    ours = load_machine(path, num_nodes=2, devices_per_node=4)
    theirs = load_machine("h100", num_nodes=2, devices_per_node=4)
    assert (ours.device.watts, ours.device.memory_rate) == (500, theirs.device.memory_rate)
    assert ours.shares.flops == {**theirs.shares.flops, "matmul": 0.5}
    save_machine(ours, tmp_path / "saved.yaml")
    assert load_machine(tmp_path / "saved.yaml", num_nodes=2, devices_per_node=4) == ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: h100\nwats: 500\n", "ours.yaml: wats: Extra"),
        ("base: h100\nwatts: -1\n", "ours.yaml: watts: .*greater than 0"),
        ("base: h101\n", "base='h101' is not one of"),
        ("name: x\n", "ours.yaml: bfloat16_tflops: Field required"),
        ("base: h100\nshares: {links: {node: 2}}\n", "shares.links.node: .*less than"),
        ("base: h100\nshares: {links: {wire: 1}}\n", "shares.links.wire"),
        ("[1, 2]\n", "must hold keys"),
        ("{", "ours.yaml is not valid YAML"),
    ],
)
def test_bad_files_are_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ours.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_machine(tmp_path / "ours.yaml", num_nodes=1, devices_per_node=1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="--gpu h10: did you mean h100"):
        load_machine("h10", num_nodes=1, devices_per_node=1)
    with pytest.raises(ValueError, match="--network-gb-s 0"):
        load_machine("h100", num_nodes=1, devices_per_node=1, network_gb_s=0)
