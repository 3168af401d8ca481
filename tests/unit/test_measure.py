"""`jouletrace measure`: the energy of a command, against the simulation's truth."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import NodeFactory
from tests.daemon_process import simulated
from tests.nvml_shim import Constant, Device, Fault, Scenario, Square
from tests.simulated_node import SimulatedNode

from jouletrace import measure
from jouletrace.cli import main
from jouletrace.gpu.readings import NoDriverError
from jouletrace.gpu.sampler import Intervals, Sampler
from jouletrace.measure import MeasureError

pytestmark = pytest.mark.timeout(30)

INTERVALS = Intervals(ring=0.1)


@pytest.fixture
def node(simulate: NodeFactory) -> Iterator[SimulatedNode]:
    """Return two GPUs on real time."""
    node = simulate(Device(power=Square(100, 600, 0.3)), Device("a100", power=Constant(250)))
    node.use_real_time()
    yield node


def test_the_energy_of_a_command(node: SimulatedNode) -> None:
    sampler = Sampler(node.source, INTERVALS)
    sampler.start()
    try:
        started_ns = time.time_ns()
        outcome = measure.measure(sampler, ["sleep", "0.7"], lambda: None)
        ended_ns = time.time_ns()
    finally:
        assert sampler.stop(5)
    assert outcome.exit_code == 0
    assert outcome.seconds == pytest.approx(0.7, abs=0.15)
    square, constant = outcome.devices
    assert (square.energy_source, constant.energy_source) == ("power_ring", "energy_counter")
    assert constant.energy.joules == pytest.approx(250 * outcome.seconds, rel=0.02)
    assert square.energy.low <= square.energy.joules <= square.energy.high
    # Whatever part of the wave the command met: no less than low throughout, no more than the whole call used.
    assert 100 * outcome.seconds < square.energy.high
    assert square.energy.low < node.truth(started_ns, ended_ns)
    text = measure.render(outcome)
    assert text.splitlines()[0].endswith("exit code 0")
    assert "NVIDIA H200 (power_ring)" in text
    assert measure.as_json(outcome)["energy_joules"] == pytest.approx(square.energy.joules + constant.energy.joules)


def test_the_truth_of_a_steady_load_lies_within_the_bounds(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Constant(437)))
    node.use_real_time()
    sampler = Sampler(node.source, INTERVALS)
    sampler.start()
    try:
        outcome = measure.measure(sampler, ["sleep", "0.2"], lambda: None)
    finally:
        assert sampler.stop(5)
    [device] = outcome.devices
    assert device.energy.low <= 437 * outcome.seconds <= device.energy.high
    assert device.energy.joules == pytest.approx(437 * outcome.seconds, rel=1e-3)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "kill -9 $$"], 137),
        (["no-such-command-anywhere"], 127),
    ],
)
def test_exit_codes_pass_through(
    node: SimulatedNode,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    code: int,
) -> None:
    assert main(["measure", "--sampling.ring-interval", "100ms", "--devices", "0", "--", *command]) == code
    output = capsys.readouterr()
    assert output.out == ""
    if code == 127:
        assert output.err.startswith(f"jouletrace: {command[0]}: ")
        assert len(output.err.splitlines()) == 1
    else:
        assert f"exit code {code}" in output.err.splitlines()[0]
        assert "total" in output.err.splitlines()[-1]


def test_json_goes_to_standard_output(node: SimulatedNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--json", "--sampling.ring-interval", "100ms", "--", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 0
    assert [device["gpu"] for device in found["devices"]] == [0, 1]


def test_no_driver(simulate: NodeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    node = simulate(faults=[Fault.error("nvmlInitWithFlags", 9)])
    node.use_real_time()
    assert main(["measure", "--", "true"]) == 3
    assert "kernel driver is not loaded" in capsys.readouterr().err


def test_a_gpu_without_power_says_so(simulate: NodeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "START_SECONDS", 0.2)
    node = simulate(faults=[Fault.hang("nvmlDeviceGetSamples", to_s=0.6)])
    node.use_real_time()
    sampler = Sampler(node.source, INTERVALS)
    sampler.start()
    with pytest.raises(MeasureError, match=r"nvmlDeviceGetSamples on GPU 0 does not return"):
        measure.measure(sampler, ["true"], lambda: None)
    assert sampler.stop(5)


def test_what_ends_the_sampler_ends_the_measurement(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("nvmlInitWithFlags", 9)])
    node.use_real_time()
    failures: list[BaseException] = []
    sampler = Sampler(node.source, INTERVALS, on_end=failures.append)
    sampler.start()
    with pytest.raises(NoDriverError):
        measure.measure(sampler, ["true"], lambda: failures[0] if failures else None)
    sampler.stop()


def test_signals_reach_the_command(library: Path, tmp_path: Path) -> None:
    variables = simulated(library, tmp_path, Scenario([Device()]))
    script = "trap 'exit 5' TERM; echo running; while :; do sleep 0.05; done"
    command = ["measure", "--sampling.ring-interval", "100ms", "--", "sh", "-c", script]
    with subprocess.Popen(
        [sys.executable, "-m", "jouletrace", *command],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 5
    assert "exit code 5" in errors
    assert "total" in errors
