"""`jouletrace doctor` on simulated GPUs of every kind."""

import json

import pytest
from tests.conftest import NodeFactory
from tests.nvml_shim import Constant, Device, Fault, Steps
from tests.simulated_node import SimulatedNode

from jouletrace import doctor
from jouletrace.doctor import Examination
from jouletrace.energy.meter import EnergySource

pytestmark = pytest.mark.timeout(30)

RESTLESS = Steps([(i * 0.005, 40 + (i * 37 % 101) / 5) for i in range(400)], repeat_s=2)


def examined(node: SimulatedNode) -> list[Examination]:
    return doctor.examine(node.source, node.open())


def test_a_whole_h200(simulate: NodeFactory) -> None:
    node = simulate(Device(power=RESTLESS))
    found = examined(node)
    text = doctor.render(node.source, found)
    assert text.startswith("GPU 0  NVIDIA H200  GPU-00000000-0000-4000-8000-000000000000\n")
    assert "driver 580.159.04, limit 700 W" in text
    assert "energy from power_ring" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("    ")}
    assert lines["power_ring"][:2] == ["yes", "20.0"]
    assert lines["power_instant"][:2] == ["yes", "100.0"]
    assert lines["energy_counter"][0] == "yes"
    assert float(lines["energy_counter"][1]) == pytest.approx(100, rel=0.03)
    assert lines["activity"][0] == lines["state"][0] == lines["health"][0] == "yes"
    assert "Nothing to mend." in text
    assert text.endswith("1 GPU from nvml\n")
    [one] = found
    assert {"dram", "sm", "tensor", "nvlink_receive"} <= set(one.tiers["activity"].provides)


def test_json_says_the_same(simulate: NodeFactory) -> None:
    node = simulate(Device("a100", power=RESTLESS), Device("h200"))
    found = json.loads(json.dumps(doctor.as_json(node.source, examined(node))))
    a100, h200 = found["devices"]
    assert found["source"] == "nvml"
    assert (a100["energy_source"], h200["energy_source"]) == ("energy_counter", "power_ring")
    assert a100["sensors"]["power_ring"] == {
        "works": False,
        "update_interval_seconds": None,
        "read_seconds": None,
        "problem": "nvmlDeviceGetSamples: NOT_SUPPORTED (code 3)",
    }
    assert a100["sensors"]["power_instant"]["update_interval_seconds"] == pytest.approx(0.1, rel=0.03)
    assert not a100["tiers"]["activity"]["works"]
    assert h200["peak_dram_bytes_per_second"] == pytest.approx(4.8e12, rel=0.01)


@pytest.mark.parametrize(
    ("device", "source", "words"),
    [
        (Device(features={"ring": "off"}), EnergySource.ENERGY_COUNTER, "No usable power ring"),
        (Device(features={"counter": "off"}), EnergySource.POWER_RING, "No energy counter"),
        (Device(features={"gpm": "off"}), EnergySource.POWER_RING, "No GPM"),
        (Device(features={"gpm": "no_permission"}), EnergySource.POWER_RING, "run as root"),
        (Device(features={"mig": "on"}), EnergySource.POWER_RING, "MIG is on"),
        (Device("pascal"), EnergySource.POWER_POLLING, "Neither power ring nor energy counter"),
        (Device("average_only"), EnergySource.POWER_AVERAGE, "1 s power average"),
    ],
)
def test_what_is_missing_has_a_sentence(
    simulate: NodeFactory, device: Device, source: EnergySource, words: str
) -> None:
    node = simulate(device)
    [one] = examined(node)
    assert one.capabilities.energy_source is source
    assert any(words in sentence for sentence in one.advice)
    text = doctor.render(node.source, [one])
    assert f"energy from {source}" in text
    assert f"  ! {next(sentence for sentence in one.advice if words in sentence)}\n" in text


def test_processes_that_are_not_listed(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("nvmlDeviceGetComputeRunningProcesses_v3", 3)])
    [one] = examined(node)
    assert any("hostPID" in sentence for sentence in one.advice)


def test_a_gpu_that_is_lost(simulate: NodeFactory) -> None:
    node = simulate(Device(), Device(power=Constant(100)), faults=[Fault.lost(0, from_s=0.2)])
    lost, fine = examined(node)
    assert "It does not answer (" in doctor.render(node.source, [lost])
    assert "GPU_IS_LOST" in lost.advice[0]
    assert len(lost.advice) == 1
    assert not fine.advice


def test_costs_are_measured(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.slow("nvmlDeviceGetUtilizationRates", 3000, burn=True)])
    [one] = examined(node)
    assert one.tiers["state"].milliseconds is not None
    assert 3 < one.tiers["state"].milliseconds < 50
