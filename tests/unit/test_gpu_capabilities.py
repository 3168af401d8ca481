"""What a device can measure is found out by trying; each GPU family ends on its rung of the ladder."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from tests.conftest import NodeFactory
from tests.nvml_shim import Constant, Device, Fault, Steps
from tests.simulated_node import SimulatedNode

from jouletrace.energy.meter import EnergySource
from jouletrace.gpu.capabilities import (
    BURST_SECONDS,
    Capabilities,
    advice,
    answers,
    better_than,
    probe,
    update_interval,
)
from jouletrace.gpu.readings import DriverGoneError, DriverMismatchError, Sensor, UnsupportedError

pytestmark = pytest.mark.timeout(30)

RING = "nvmlDeviceGetSamples"
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
FIELDS = "nvmlDeviceGetFieldValues"

RESTLESS = Steps([(i * 0.005, 40 + (i * 37 % 101) / 5) for i in range(400)], repeat_s=2)
"""Another power every 5 ms, so that each update of each sensor shows; 40 to 60 W suit every card."""


def probed(node: SimulatedNode) -> list[Capabilities]:
    return probe(node.open(), node.clock, threading.Event())


def only(node: SimulatedNode) -> Capabilities:
    [capabilities] = probed(node)
    return capabilities


@pytest.mark.parametrize(
    ("device", "source"),
    [
        (Device("h200"), EnergySource.POWER_RING),
        (Device("a100"), EnergySource.ENERGY_COUNTER),
        (Device("ada"), EnergySource.ENERGY_COUNTER),
        (Device("t4"), EnergySource.ENERGY_COUNTER),
        (Device("pascal"), EnergySource.POWER_POLLING),
        (Device("average_only"), EnergySource.POWER_AVERAGE),
        (Device("h200", features={"ring": "off"}), EnergySource.ENERGY_COUNTER),
        (Device("h200", features={"ring": "off", "counter": "off"}), EnergySource.POWER_POLLING),
        (
            Device("h200", features={"ring": "off", "counter": "off", "instant": "off"}),
            EnergySource.POWER_AVERAGE,
        ),
        # A100-class rings were reported with a sample a second: no better than the counter.
        (Device("h200", features={"ring": "depth:119,period_ms:1000"}), EnergySource.ENERGY_COUNTER),
        (Device("h200", features={"mig": "on"}), EnergySource.POWER_RING),
        (Device("a100", features={"counter": "period_ms:60000"}), EnergySource.POWER_POLLING),
    ],
)
def test_the_best_rung_that_works_is_taken(simulate: NodeFactory, device: Device, source: EnergySource) -> None:
    assert only(simulate(device)).energy_source is source


def test_no_power_at_all(simulate: NodeFactory) -> None:
    calls = (RING, COUNTER, FIELDS, "nvmlDeviceGetPowerUsage")
    found = only(simulate(faults=[Fault.error(call, 3) for call in calls]))
    assert found.energy_source is None
    assert set(Sensor) <= found.missing.keys()


@pytest.mark.parametrize(
    ("device", "seconds"),
    [
        (
            Device("h200", power=RESTLESS),
            {Sensor.POWER_RING: 0.02, Sensor.POWER_INSTANT: 0.1, Sensor.POWER_AVERAGE: 0.1, Sensor.ENERGY_COUNTER: 0.1},
        ),
        (Device("a100", power=RESTLESS), {Sensor.POWER_INSTANT: 0.1, Sensor.ENERGY_COUNTER: 0.1}),
        (
            Device("ada", power=RESTLESS),
            {Sensor.POWER_INSTANT: 0.1, Sensor.POWER_AVERAGE: 0.1, Sensor.ENERGY_COUNTER: 0.1},
        ),
        (Device("pascal", power=RESTLESS), {Sensor.POWER_INSTANT: 0.02}),
        (Device("average_only", power=RESTLESS), {Sensor.POWER_AVERAGE: 0.1}),
        (
            Device("a100", power=RESTLESS, features={"instant": "period_ms:50,window_ms:25,lag_ms:7"}),
            {Sensor.POWER_INSTANT: 0.05, Sensor.ENERGY_COUNTER: 0.1},
        ),
    ],
)
def test_update_intervals_are_measured(simulate: NodeFactory, device: Device, seconds: dict[Sensor, float]) -> None:
    found = only(simulate(device)).sensor_intervals
    assert found.keys() == seconds.keys()
    for sensor, interval in seconds.items():
        assert found[sensor] == pytest.approx(interval, rel=0.03), sensor


def test_eight_devices_take_no_longer_than_one(simulate: NodeFactory) -> None:
    node = simulate(*[Device(power=RESTLESS)] * 8)
    devices = node.open()
    started_ns = node.clock.now_ns()
    found = probe(devices, node.clock, threading.Event())
    assert (node.clock.now_ns() - started_ns) / 1e9 == pytest.approx(BURST_SECONDS, abs=0.05)
    for capabilities in found:
        assert capabilities.energy_source is EnergySource.POWER_RING
        # Each counter is read every 16 ms at best, as a read costs 2-5 ms on an H200.
        assert capabilities.sensor_intervals[Sensor.ENERGY_COUNTER] == pytest.approx(0.1, rel=0.05)
    assert node.shim.call_count(COUNTER, 0) < 45


def test_a_still_sensor_has_no_interval(simulate: NodeFactory) -> None:
    found = only(simulate(Device(power=Constant(100)))).sensor_intervals
    assert Sensor.POWER_INSTANT not in found
    assert Sensor.POWER_AVERAGE not in found


# ---- faults while trying ----


@pytest.mark.parametrize(
    "fault",
    [
        Fault.error(RING, 999, to_call=1),
        Fault.error(RING, 6, to_call=2),
        Fault.error(COUNTER, 999, to_call=5),
        Fault.error(COUNTER, 10, every=2),
        Fault.error(FIELDS, 999, every=3),
        Fault.error("nvmlGpmSampleGet", 999, to_call=1),
    ],
    ids=lambda fault: fault.words,
)
def test_a_failure_that_passes_costs_no_rung(simulate: NodeFactory, fault: Fault) -> None:
    found = only(simulate(faults=[fault]))
    assert found.energy_source is EnergySource.POWER_RING
    assert found.has_counter
    assert found.has_activity


@pytest.mark.parametrize(
    ("device", "faults", "failing"),
    [
        (Device("h200"), [Fault.error(RING, 999)], {Sensor.POWER_RING}),
        (Device("h200"), [Fault.error(RING, 3)], set()),
        (Device("h200", features={"ring": "depth:119,period_ms:1000"}), [], set()),
        (Device("a100"), [Fault.error(COUNTER, 999)], {Sensor.ENERGY_COUNTER}),
        # One reading, then nothing: whether it moves is not known.
        (Device("a100"), [Fault.error(COUNTER, 999, from_call=2)], {Sensor.ENERGY_COUNTER}),
        (Device("a100", features={"counter": "period_ms:60000"}), [], set()),
        (Device("pascal"), [], set()),
        (
            Device("pascal"),
            [Fault.error(FIELDS, 999), Fault.error("nvmlDeviceGetPowerUsage", 999)],
            {Sensor.POWER_INSTANT, Sensor.POWER_AVERAGE},
        ),
        (Device("h200"), [Fault.lost(0, from_s=0.3)], set()),
    ],
)
def test_what_fails_is_told_from_what_is_not_there(
    simulate: NodeFactory, device: Device, faults: Sequence[Fault], failing: set[Sensor]
) -> None:
    found = only(simulate(device, faults=faults))
    assert found.failing == failing
    assert found.failing <= found.missing.keys()
    assert not found.failing & found.sensors


def test_one_reading_tells_whether_a_sensor_answers(simulate: NodeFactory) -> None:
    [h200, a100, pascal] = simulate(Device("h200"), Device("a100"), Device("pascal")).open()
    assert all(answers(h200, sensor) for sensor in Sensor)
    assert answers(a100, Sensor.ENERGY_COUNTER)
    assert not answers(a100, Sensor.POWER_AVERAGE)
    for device, sensor in ((a100, Sensor.POWER_RING), (pascal, Sensor.ENERGY_COUNTER)):
        with pytest.raises(UnsupportedError):
            answers(device, sensor)


def test_the_rungs_above_a_source() -> None:
    assert better_than(EnergySource.POWER_RING) == []
    assert better_than(EnergySource.POWER_POLLING) == [Sensor.POWER_RING, Sensor.ENERGY_COUNTER]
    assert better_than(None) == list(Sensor)


def test_a_device_lost_meanwhile_is_told_apart(simulate: NodeFactory) -> None:
    lost, fine = probed(simulate(Device(), Device(), faults=[Fault.lost(0, from_s=0.3)]))
    assert lost.lost is not None
    assert lost.lost.name == "GPU_IS_LOST"
    assert lost.energy_source is None
    assert fine.lost is None
    assert fine.energy_source is EnergySource.POWER_RING


def test_a_driver_that_goes_ends_the_trying(simulate: NodeFactory) -> None:
    with pytest.raises(DriverMismatchError):
        probed(simulate(faults=[Fault.driver_mismatch(from_s=0.2)]))
    with pytest.raises(DriverGoneError):
        probed(simulate(faults=[Fault.error("*", 9, from_s=0.2)]))


@pytest.mark.parametrize("call", [RING, COUNTER, FIELDS])
def test_garbage_while_trying_is_no_end(simulate: NodeFactory, call: str) -> None:
    found = only(simulate(faults=[Fault.garbage(call)]))
    assert found.energy_source is not None


# ---- sentences ----


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device("h200", features={"ring": "off"}), "hardware counter"),
        (Device("h200", features={"counter": "off"}), "No energy counter"),
        (Device("h200", features={"ring": "off", "counter": "off"}), "sees 25% of the time"),
        (Device("pascal"), "sees 50% of the time"),
        (Device("average_only"), "1 s power average"),
        (Device("h200", features={"gpm": "off"}), "vGPU guest or an old driver"),
        (Device("h200", features={"gpm": "no_permission"}), "run as root"),
        (Device("h200", features={"mig": "on"}), "MIG is on"),
        (Device("a100"), "No GPM before Hopper"),
    ],
)
def test_each_shortcoming_has_a_sentence(simulate: NodeFactory, device: Device, words: str) -> None:
    node = simulate(device)
    [opened] = node.open()
    [capabilities] = probe([opened], node.clock, threading.Event())
    assert any(words in sentence for sentence in advice(opened.info, capabilities))


def test_a_whole_h200_lacks_nothing(simulate: NodeFactory) -> None:
    node = simulate(Device())
    [opened] = node.open()
    [capabilities] = probe([opened], node.clock, threading.Event())
    assert advice(opened.info, capabilities) == []
    assert capabilities.missing == {}


# ---- the interval of a sensor ----


@pytest.mark.parametrize("interval_ms", [15.0, 20.2, 100.0])
@pytest.mark.parametrize("unseen", [0.0, 0.4, 0.6])
def test_intervals_are_found_though_most_updates_show_no_change(interval_ms: float, unseen: float) -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        times_ms = random.random() * interval_ms + np.arange(0, 4000, interval_ms)
        times_ms = times_ms[random.random(len(times_ms)) >= unseen]
        seen_ms = np.ceil(times_ms)  # polled every millisecond
        found = update_interval((seen_ms * 1e6).astype(np.int64))
        assert found is not None
        assert found * 1e3 == pytest.approx(interval_ms, rel=0.005)


def test_too_few_changes_tell_nothing() -> None:
    assert update_interval(np.array([0, 100, 200], np.int64) * 1_000_000) is None
    assert update_interval(np.empty(0, np.int64)) is None
