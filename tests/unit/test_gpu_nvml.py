"""The NVML source on the simulated driver: every reading against the simulation's own truth."""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from tests.conftest import NodeFactory
from tests.nvml_shim import (
    Constant,
    Device,
    Fault,
    Process,
    Ramp,
    Scenario,
    Square,
    Steps,
    Xid,
    build,
    environment,
    write_control,
)
from tests.simulated_node import NS, SimulatedNode

from jouletrace.gpu.nvml import NvmlDevice
from jouletrace.gpu.readings import (
    DeviceLostError,
    DriverMismatchError,
    GpuError,
    Link,
    NoDriverError,
    Pipe,
    PowerSamples,
    ThrottleReason,
    UnsupportedError,
)

pytestmark = pytest.mark.timeout(30)

MS = NS // 1000
FIELDS = "nvmlDeviceGetFieldValues"
RING = "nvmlDeviceGetSamples"
POWER_INSTANT, POWER_AVERAGE = 186, 185


def opened(node: SimulatedNode) -> NvmlDevice:
    [device] = node.open()
    return device


def ring_joules(samples: PowerSamples) -> float:
    """Integrate a reading, its first sample left out as its beginning is not known."""
    return float(np.sum(np.diff(samples.ends_ns) * samples.milliwatts[1:]) * 1e-12)


# ---- identity ----


def test_what_does_not_change(simulate: NodeFactory) -> None:
    info = opened(simulate(Device(state={"limit_w": 650}))).info
    assert info.uuid == "GPU-00000000-0000-4000-8000-000000000000"
    assert (info.gpu, info.name, info.architecture) == (0, "NVIDIA H200", "hopper")
    assert info.driver_version == "580.159.04"
    assert info.memory_total_bytes == 143771 << 20
    # Data sheet: 4.8 TB/s.
    assert info.peak_dram_bytes_per_second == pytest.approx(4.8e12, rel=0.01)
    assert info.max_sm_clock_hertz == 1980e6
    assert info.power_limit_watts == 650
    assert info.board_limit_watts == info.default_power_limit_watts == 700
    assert not info.mig_enabled


def test_an_a100_is_told_from_the_rest_of_its_architecture(simulate: NodeFactory) -> None:
    assert opened(simulate(Device("a100"))).info.architecture == "ga100"
    assert opened(simulate(Device("average_only"))).info.architecture == "ampere"


# ---- the ring ----


def test_the_ring_gives_all_it_holds_and_then_what_is_new(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Square(100, 600, period_s=0.07)))
    device = opened(node)
    first = device.power_ring()
    # 119 samples of 20.14 ms on average (measured on an H200: 2.36 s deep).
    assert len(first.ends_ns) == 119
    seen = [first]
    for _ in range(20):
        node.shim.advance(0.73)
        seen.append(device.power_ring())
    ends = np.concatenate([samples.ends_ns for samples in seen])
    assert np.all(np.diff(ends) > 0)
    assert np.all(np.diff(ends) < 60 * MS), "a sample was left out"
    everything = PowerSamples(ends, np.concatenate([samples.milliwatts for samples in seen]))
    assert ring_joules(everything) == pytest.approx(node.truth(int(ends[0]), int(ends[-1])), rel=1e-5)


def test_nothing_new_is_an_empty_reading(simulate: NodeFactory) -> None:
    device = opened(simulate())
    device.power_ring()
    assert len(device.power_ring().ends_ns) == 0


def test_a_step_of_the_wall_clock_leaves_the_times_steady(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Constant(300)))
    device = opened(node)
    times = device.power_ring().ends_ns
    for seconds in (10, -10, -0.5, 0.5, -3600, 7200, 1.7, -0.3):
        for before in (0.0, 0.002, 0.8):
            node.shim.advance(before)
            node.clock.step(seconds)
            for after in (0.002, 1.0, 1.0):
                node.shim.advance(after)
                times = np.concatenate((times, device.power_ring().ends_ns))
                assert node.clock.now_ns() - 50 * MS < times[-1] <= node.clock.now_ns()
    # Nothing is missing, and nothing comes twice, a little later.
    spacing = np.diff(times)
    assert spacing.min() > 5 * MS
    assert spacing.max() < 50 * MS
    assert times[-1] - times[0] > 45 * NS


def test_a_small_step_of_the_wall_clock_shifts_at_most_itself(simulate: NodeFactory) -> None:
    node = simulate()
    device = opened(node)
    times = device.power_ring().ends_ns
    for seconds in (0.05, -0.03, -0.02, 0.09):
        node.clock.step(seconds)
        for _ in range(3):
            node.shim.advance(1.0)
            times = np.concatenate((times, device.power_ring().ends_ns))
    spacing = np.diff(times)
    assert spacing.min() > 0
    assert spacing.max() < 150 * MS


@pytest.mark.parametrize("code", [7, 999])
def test_a_ring_that_fails_is_an_error_and_no_loop(simulate: NodeFactory, code: int) -> None:
    device = opened(simulate(faults=[Fault.error(RING, code)]))
    with pytest.raises(GpuError, match=f"{RING}: .*code {code}"):
        device.power_ring()


def test_a_ring_that_grew_is_read_with_a_larger_buffer(simulate: NodeFactory) -> None:
    # The first call asks for the size, the second reads.
    device = opened(simulate(faults=[Fault.error(RING, 7, from_call=2, to_call=2)]))
    assert len(device.power_ring().ends_ns) == 119


# ---- power and the counter ----


def test_power_values(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Steps([(0, 200), (1.05, 500)]), sensor={"memory_w": 42}))
    device = opened(node)
    node.shim.advance(1)
    reading = device.power()
    assert (reading.instant_mw, reading.average_mw, reading.memory_average_mw) == (200_000, 200_000, 42_000)
    node.shim.advance(0.6)
    reading = device.power()
    assert reading.t_ns == node.clock.now_ns()
    assert reading.instant_mw == 500_000
    # A 1 s average, half a second after the step.
    assert reading.average_mw is not None
    assert 300_000 < reading.average_mw < 400_000


def test_the_counter(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Ramp(100, 700, period_s=7)))
    device = opened(node)
    before = device.energy_counter()
    node.shim.advance(70)
    after = device.energy_counter()
    assert after.t_ns - before.t_ns == 70 * NS
    # Ten whole periods of 400 W on average; a tick of 100 ms at each end.
    assert (after.energy_mj - before.energy_mj) / 1e3 == pytest.approx(28_000, abs=70)


def test_zero_watts_is_not_a_reading(simulate: NodeFactory) -> None:
    device = opened(simulate(faults=[Fault.garbage(FIELDS, value=0, field=POWER_INSTANT)]))
    reading = device.power()
    assert reading.instant_mw is None
    assert reading.average_mw == 100_000


@pytest.mark.parametrize("code", [3, 999])
def test_one_field_may_fail_alone(simulate: NodeFactory, code: int) -> None:
    device = opened(simulate(faults=[Fault.error(FIELDS, code, field=POWER_INSTANT)]))
    for _ in range(10):
        reading = device.power()
        assert reading.instant_mw is None
        assert reading.average_mw == 100_000


def test_fields_that_fail_for_a_while_come_back(simulate: NodeFactory) -> None:
    faults = [Fault.error(FIELDS, 999, field=field, to_s=1) for field in (POWER_INSTANT, POWER_AVERAGE)]
    node = simulate(faults=faults)
    device = opened(node)
    for _ in range(20):
        # Meanwhile the older call answers: a 1 s average on an H200.
        reading = device.power()
        assert (reading.instant_mw, reading.average_mw) == (None, 100_000)
    node.shim.advance(1)
    assert device.power().instant_mw == 100_000


@pytest.mark.parametrize("refused", [Fault.error(FIELDS, 13), Fault.error(FIELDS, 3)])
def test_without_fields_the_older_call_tells(simulate: NodeFactory, refused: Fault) -> None:
    average = opened(simulate(faults=[refused])).power()
    assert (average.instant_mw, average.average_mw) == (None, 100_000)
    # nvml.h: instant on GA100 and older.
    instant = opened(simulate(Device("a100"), faults=[refused])).power()
    assert (instant.instant_mw, instant.average_mw) == (100_000, None)
    instant = opened(simulate(Device("pascal"), faults=[refused])).power()
    assert (instant.instant_mw, instant.average_mw) == (100_000, None)


def test_no_power_at_all_is_said(simulate: NodeFactory) -> None:
    device = opened(simulate(faults=[Fault.error(FIELDS, 3), Fault.error("nvmlDeviceGetPowerUsage", 3)]))
    with pytest.raises(UnsupportedError):
        device.power()


# ---- activity ----

ACTIVITY = {
    "graphics_util": (95.0, 3.0),
    "sm_util": (80.0, 2.0),
    "any_tensor_util": (60.0, 0.0),
    "dram_bw_util": (50.0, 1.0),
    "fp32_util": 7.0,
    "pcie_tx_per_sec": (2000.0, 10.0),
    "nvlink_total_rx_per_sec": 5000.0,
}


def test_activity_adds_up_to_the_truth(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Square(100, 600, period_s=0.9), gpm=ACTIVITY))
    device = opened(node)
    assert device.activity() is None
    start_ns = node.clock.now_ns()
    tensor = dram = transmitted = 0.0
    for _ in range(40):
        node.shim.advance(0.25)
        reading = device.activity()
        assert reading is not None
        assert reading.dram_ratio is not None
        seconds = (reading.end_ns - reading.start_ns) / NS
        tensor += reading.busy_ratio[Pipe.TENSOR] * seconds
        dram += reading.dram_ratio * seconds
        transmitted += reading.bytes_per_second[Link.PCIE_TRANSMIT] * seconds
    end_ns = node.clock.now_ns()

    def truth(metric: int) -> float:
        return node.shim.true_gpm_integral(0, metric, start_ns, end_ns)

    # GPM refreshes every 100 ms, so each end of the 10 s is known to that.
    assert tensor == pytest.approx(truth(5) / 100, abs=0.06)
    assert dram == pytest.approx(truth(10) / 100, abs=0.05)
    assert transmitted == pytest.approx(truth(20) * 2**20, abs=0.1 * 2000 * 2**20)


def test_activity_is_never_read_below_100_ms(simulate: NodeFactory) -> None:
    node = simulate()
    device = opened(node)
    device.activity()
    for _ in range(100):
        node.shim.advance(0.03)
        reading = device.activity()
        assert reading is None or reading.end_ns - reading.start_ns >= 100 * MS
    # 3 s hold 25 readings of 120 ms.
    assert node.shim.call_count("nvmlGpmSampleGet", 0) == 26


def test_after_nan_the_next_reading_covers_that_time_too(simulate: NodeFactory) -> None:
    node = simulate(
        Device(power=Square(100, 600, period_s=2), gpm=ACTIVITY),
        faults=[Fault.garbage("nvmlGpmMetricsGet", from_call=3, to_call=4)],
    )
    device = opened(node)
    device.activity()
    readings = []
    for _ in range(8):
        node.shim.advance(0.2)
        readings.append(device.activity())
    assert [reading is None for reading in readings] == [False, False, True, True, False, False, False, False]
    good = [reading for reading in readings if reading is not None]
    assert all(after.start_ns == before.end_ns for before, after in itertools.pairwise(good))
    assert good[2].end_ns - good[2].start_ns == 600 * MS


def test_a_metric_that_stays_away_is_given_up(simulate: NodeFactory) -> None:
    node = simulate(Device(gpm=ACTIVITY), faults=[Fault.garbage("nvmlGpmMetricsGet", from_s=1)])
    device = opened(node)
    readings = []
    for _ in range(20):
        node.shim.advance(0.5)
        readings.append(device.activity())
    late = [reading for reading in readings[8:] if reading is not None]
    assert late
    assert all(reading.dram_ratio is None and not reading.busy_ratio for reading in late)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (Device(features={"gpm": "off"}), "NOT_SUPPORTED"),
        (Device(features={"gpm": "no_permission"}), "NO_PERMISSION"),
        (Device(features={"mig": "on"}), "NOT_SUPPORTED"),
        (Device("a100"), "NOT_SUPPORTED"),
    ],
)
def test_without_gpm_the_driver_says_why(simulate: NodeFactory, device: Device, name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        opened(simulate(device)).activity()
    assert caught.value.name == name


# ---- state and health ----


def test_state(simulate: NodeFactory) -> None:
    node = simulate(
        Device(
            state={
                "sm_mhz": 1755,
                "memory_mhz": 3201,
                "temperature_c": 61,
                "memory_temperature_c": 73,
                "memory_used_mib": 1024,
                "util_pct": 97,
                "memory_util_pct": 31,
            },
            throttle={"sw_power_cap": 0.75, "hw_thermal": 0.25},
        )
    )
    device = opened(node)
    before, slow_before = device.state(), device.health()
    node.shim.advance(100)
    state, slow = device.state(), device.health()
    assert state.clock_hertz == {"sm": 1755e6, "memory": 3201e6}
    assert state.temperature_celsius == {"gpu": 61.0, "memory": 73.0}
    assert state.memory_used_bytes == 1024 << 20
    assert state.utilization_ratio == {"gpu": 0.97, "memory": 0.31}
    assert state.event_reasons is not None
    assert state.event_reasons & 0x4, "the software power cap holds for three quarters of the time"
    assert not state.event_reasons & 0x40
    spent = {reason: state.throttled_ns[reason] - before.throttled_ns[reason] for reason in state.throttled_ns}
    assert spent[ThrottleReason.SW_POWER_CAP] == pytest.approx(75 * NS, rel=0.01)
    assert spent[ThrottleReason.SW_THERMAL] == 0
    # The expensive ones come with the slow tier.
    spent = {reason: slow.throttled_ns[reason] - slow_before.throttled_ns[reason] for reason in slow.throttled_ns}
    assert spent[ThrottleReason.HW_THERMAL] == pytest.approx(25 * NS, rel=0.01)
    # Where the driver tells software and hardware thermal slowdown apart, their older sum would count twice.
    assert ThrottleReason.THERMAL not in spent


def each_ten_seconds(node: SimulatedNode, device: NvmlDevice, seconds: int) -> list[tuple[float, int]]:
    """Read the state each second and the health each ten; return the time held down by heat and the field reads."""
    found = []
    for second in range(1, seconds + 1):
        node.shim.advance(1)
        device.state()
        if second % 10 == 0:
            before = node.shim.call_count(FIELDS, 0)
            held = device.health().throttled_ns[ThrottleReason.HW_THERMAL] / NS
            found.append((held, node.shim.call_count(FIELDS, 0) - before))
    return found


def test_the_slow_throttle_times_are_read_often_only_while_a_reason_shows(simulate: NodeFactory) -> None:
    # Held down for 0.9 of the time from 40 s to 60.5 s, which ends between two looks.
    power = Steps([(0, 100), (40.2, 400), (60.5, 100)], active_above_watts=200)
    node = simulate(Device(power=power, throttle={"hw_thermal": (0.9, 0.0)}))
    device = opened(node)
    device.health()
    found = each_ten_seconds(node, device, 120)
    truth = [0.9 * min(max(t - 40.2, 0.0), 20.3) for t in range(10, 130, 10)]
    assert [held for held, _ in found] == pytest.approx(truth, abs=0.01)
    # The memory errors each time; the slow ones each 30 s, at 50 s and 60 s, and once behind the end.
    assert [reads for _, reads in found] == [1, 1, 2, 1, 2, 2, 2, 1, 1, 2, 1, 1]


def test_a_slowdown_that_no_reason_shows_is_counted_half_a_minute_later(simulate: NodeFactory) -> None:
    node = simulate(Device(throttle={"hw_thermal": 0.25}))
    device = opened(node)
    device.health()
    found = each_ten_seconds(node, device, 90)
    assert [held for held, _ in found] == pytest.approx([0, 0, 7.5, 7.5, 7.5, 15, 15, 15, 22.5], abs=0.01)


def test_without_event_reasons_the_slow_throttle_times_are_always_read(simulate: NodeFactory) -> None:
    calls = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    node = simulate(Device(throttle={"hw_thermal": 0.25}), faults=[Fault.error(call, 3) for call in calls])
    device = opened(node)
    device.health()
    found = each_ten_seconds(node, device, 40)
    assert [held for held, _ in found] == pytest.approx([2.5, 5, 7.5, 10], abs=0.01)


def test_health(simulate: NodeFactory) -> None:
    node = simulate(
        Device(
            processes=[Process(101, 500, sm_percent=60), Process(202, 700, sm_percent=20, from_s=0, to_s=50)],
            health={"sbe_volatile": 3, "dbe_volatile": 1},
            state={"limit_w": 500, "util_pct": 80},
        )
    )
    device = opened(node)
    node.shim.advance(10)
    health = device.health()
    assert health.processes is not None
    assert [(p.pid, p.memory_bytes) for p in health.processes] == [(101, 500 << 20), (202, 700 << 20)]
    assert health.power_limit_watts == 500
    assert health.ecc_errors == {"corrected": 3, "uncorrected": 1}
    node.shim.advance(50)
    health = device.health()
    assert health.processes is not None
    assert [p.pid for p in health.processes] == [101]


def test_sm_shares_of_processes_that_share_a_gpu_and_of_one_that_has_just_ended(simulate: NodeFactory) -> None:
    processes = [Process(101, 500, sm_percent=60), Process(202, 700, sm_percent=20, to_s=50.05)]
    node = simulate(Device(processes=processes, power=Constant(300)))
    device = opened(node)
    node.shim.advance(10)
    health = device.health()
    assert health.sm_ratios == {101: 0.6, 202: 0.2}
    assert health.processes is not None
    assert [(p.pid, p.sm_ratio) for p in health.processes] == [(101, 0.6), (202, 0.2)]
    # The list by itself costs a tenth: without shares.
    calls = node.shim.call_count("nvmlDeviceGetProcessUtilization")
    listed = device.processes()
    assert listed is not None
    assert [(p.pid, p.memory_bytes, p.sm_ratio) for p in listed] == [(101, 500 << 20, None), (202, 700 << 20, None)]
    assert node.shim.call_count("nvmlDeviceGetProcessUtilization") == calls
    # The last sample before now ends up to 200 ms ago, when both still ran.
    node.shim.advance(40.06)
    health = device.health()
    assert health.processes is not None
    assert [p.pid for p in health.processes] == [101]
    assert health.sm_ratios == {101: 0.6, 202: 0.2}
    node.shim.advance(10)
    assert device.health().sm_ratios == {}, "a GPU of one process needs no shares"


def test_garbage_is_absent(simulate: NodeFactory) -> None:
    calls = (
        "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetEnforcedPowerLimit",
        FIELDS,
    )
    device = opened(simulate(Device("h200"), faults=[Fault.garbage(call) for call in calls]))
    assert device.info.power_limit_watts is None
    state, health, power = device.state(), device.health(), device.power()
    assert state.clock_hertz == {}
    assert state.temperature_celsius == {}
    assert state.utilization_ratio == {}
    assert state.throttled_ns == {}
    assert health.power_limit_watts is None
    assert health.ecc_errors == {}
    assert health.throttled_ns == {}
    # The meter counts what it rejects; the memory's power goes straight to the views.
    assert power.memory_average_mw is None


def test_a_getter_that_fails_costs_only_itself(simulate: NodeFactory) -> None:
    device = opened(
        simulate(faults=[Fault.error("nvmlDeviceGetClockInfo", 999), Fault.error("nvmlDeviceGetUtilizationRates", 3)])
    )
    state = device.state()
    assert (state.clock_hertz, state.utilization_ratio) == ({}, {})
    assert "gpu" in state.temperature_celsius
    assert state.memory_used_bytes is not None


def test_what_is_refused_is_not_asked_for_ever(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("nvmlDeviceGetUtilizationRates", 3)])
    device = opened(node)
    for _ in range(20):
        device.state()
    assert node.shim.call_count("nvmlDeviceGetUtilizationRates", 0) == 5


@pytest.mark.parametrize("mig", ["off", "on"])
def test_mig_mode(simulate: NodeFactory, mig: str) -> None:
    device = opened(simulate(Device(features={"mig": mig})))
    assert device.info.mig_enabled == (mig == "on")
    assert len(device.power_ring().ends_ns) > 100
    assert bool(device.state().utilization_ratio) == (mig == "off")


# ---- older drivers ----

READ_ALL = """
import json
from jouletrace.gpu.nvml import NvmlSource
from jouletrace.gpu.readings import UnsupportedError
source = NvmlSource()
[device] = source.open()
state, power, health = device.state(), device.power(), device.health()
try:
    activity = str(device.activity())
except UnsupportedError as problem:
    activity = str(problem)
print(json.dumps({
    "temperature": state.temperature_celsius.get("gpu"), "memory": state.memory_used_bytes,
    "reasons": state.event_reasons, "average": power.average_mw, "throttled": len(state.throttled_ns),
    "ecc": len(health.ecc_errors), "activity": activity,
}))
source.close()
"""


def test_a_driver_without_the_newer_functions(tmp_path: Path) -> None:
    library = build(
        without=(
            "nvmlDeviceGetTemperatureV",
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetFieldValues",
            "nvmlGpmQueryDeviceSupport",
            "nvmlGpmSampleGet",
        )
    )
    device = Device(state={"temperature_c": 41, "memory_used_mib": 10}, throttle={"sw_power_cap": 1.0})
    variables = environment(library, Scenario([device]).write(tmp_path / "scenario"))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL], env=variables, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["temperature"] == 41.0
    # The older call counts the 512 MiB that the driver keeps for itself.
    assert found["memory"] == 522 << 20
    assert found["reasons"] & 0x4
    assert found["average"] == 100_000
    assert (found["throttled"], found["ecc"]) == (0, 0)
    assert found["activity"] == "nvmlGpmQueryDeviceSupport: FUNCTION_NOT_FOUND (code 13)"


# ---- opening, closing, returning ----


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("nvmlInitWithFlags", 4, "no permission to open the NVIDIA devices"),
        ("nvmlInitWithFlags", 9, "kernel driver is not loaded"),
        ("nvmlInitWithFlags", 12, "libnvidia-ml.so.1 was not found"),
        ("nvmlInitWithFlags", 999, "NVML did not start: UNKNOWN"),
        ("nvmlDeviceGetCount_v2", 999, "no GPU answered .*UNKNOWN"),
        ("nvmlDeviceGetHandleByIndex_v2", 4, "no permission to read the GPUs"),
        ("nvmlDeviceGetHandleByIndex_v2", 15, "no GPU answered .*GPU_IS_LOST"),
    ],
)
def test_a_driver_that_cannot_be_used_says_what_to_do(simulate: NodeFactory, call: str, code: int, words: str) -> None:
    with pytest.raises(NoDriverError, match=words):
        simulate(faults=[Fault.error(call, code)]).open()


@pytest.mark.parametrize("call", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_a_mismatch_at_start_is_told_apart(simulate: NodeFactory, call: str) -> None:
    with pytest.raises(DriverMismatchError):
        simulate(faults=[Fault.error(call, 18)]).open()


def test_a_gpu_that_does_not_answer_at_start_is_left_out_and_named(simulate: NodeFactory) -> None:
    node = simulate(Device(), Device(), Device(), faults=[Fault.lost(1)])
    with structlog.testing.capture_logs() as logs:
        devices = node.open()
    assert [device.info.gpu for device in devices] == [0, 2]
    [line] = [line for line in logs if line["log_level"] == "warning"]
    assert line["gpu"] == 1
    assert "GPU_IS_LOST" in line["error"]


def test_closing_a_driver_that_is_gone(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("nvmlShutdown", 1), Fault.error("nvmlEventSetFree", 999)])
    node.source.watch_events(node.open())
    node.source.close()
    node.source.close()


def test_a_lost_device_gets_a_new_handle(simulate: NodeFactory) -> None:
    node = simulate(Device(), faults=[Fault.lost(0, from_s=1, to_s=2)])
    device = opened(node)
    node.shim.advance(1.5)
    with pytest.raises(DeviceLostError):
        device.power()
    with pytest.raises(GpuError):
        node.source.reopen_device(device.info.uuid)
    node.shim.advance(1)
    with pytest.raises(DeviceLostError):
        device.power()
    fresh = node.source.reopen_device(device.info.uuid)
    assert fresh.power().instant_mw == 100_000


def test_critical_errors_name_their_gpu(simulate: NodeFactory) -> None:
    node = simulate(Device(), Device(), xids=[Xid(1, 79, at_s=2), Xid(0, 48, at_s=3)])
    devices = node.open()
    node.source.watch_events(devices)
    assert node.source.events(0) == ()
    node.shim.advance(5)
    found = [event for _ in range(2) for event in node.source.events(0)]
    assert [(event.uuid, event.xid) for event in found] == [
        (devices[1].info.uuid, 79),
        (devices[0].info.uuid, 48),
    ]


def test_closing_waits_for_the_thread_in_the_driver(simulate: NodeFactory) -> None:
    """NVML that is shut down below a waiting call crashes the process."""
    node = simulate()
    node.shim.use_real_time()
    node.source.watch_events(node.open())
    waiting = threading.Thread(target=node.source.events, args=(0.3,))
    started = time.monotonic()
    waiting.start()
    time.sleep(0.05)
    node.source.close()
    assert time.monotonic() - started > 0.25
    waiting.join(5)
    assert node.shim.call_count("nvmlShutdown") == 1


READS: dict[str, Callable[[SimulatedNode, NvmlDevice], Any]] = {
    RING: lambda _, device: device.power_ring(),
    "nvmlDeviceGetTotalEnergyConsumption": lambda _, device: device.energy_counter(),
    "nvmlDeviceGetComputeRunningProcesses_v3": lambda _, device: device.health(),
    "nvmlGpmSampleGet": lambda _, device: device.activity(),
    "nvmlDeviceGetHandleByUUID": lambda node, device: node.source.reopen_device(device.info.uuid),
}


@pytest.mark.parametrize("call", READS)
def test_a_call_under_way_has_a_name(simulate: NodeFactory, tmp_path: Path, call: str) -> None:
    control = tmp_path / "control"
    node = simulate(control=control)
    device = opened(node)
    write_control(control, [Fault.hang(call)])
    node.shim.poll_control()
    reading = threading.Thread(target=READS[call], args=(node, device), daemon=True)
    reading.start()
    deadline = time.monotonic() + 5
    while (pending := node.source.calls.pending) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert pending is not None
    assert pending[0] == call
    assert pending[1] == (None if "Handle" in call else 0)
    write_control(control)
    node.shim.poll_control()
    reading.join(5)
    assert not reading.is_alive()
    assert node.source.calls.pending is None


def test_calls_are_counted_and_timed(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.slow(RING, 3000, burn=True)])
    device = opened(node)
    for _ in range(3):
        device.power_ring()
    calls = node.source.calls
    # The first reading asks for the size of the ring as well.
    assert calls.count[RING] == 4
    assert 0.009 < calls.seconds[RING] < 0.2
