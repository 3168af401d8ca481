"""The simulated driver, seen through the unmodified pynvml: does it behave as the real one was measured to?"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
from tests.nvml_shim import (
    BuildError,
    Constant,
    Device,
    Fault,
    Latency,
    Level,
    Power,
    PowerFile,
    Process,
    Ramp,
    Scenario,
    Shim,
    Square,
    Steps,
    Xid,
    build,
    environment,
    write_control,
)

pytestmark = [
    pytest.mark.timeout(30),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the simulated driver needs gcc"),
]

START_NS = 1_700_000_000_000_000_000
MS = 1_000_000
LOST = pynvml.NVML_ERROR_GPU_IS_LOST
MISMATCH = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED

# The entry points that an exporter binds, by the exact symbols that pynvml asks for.
SYMBOLS = """
nvmlInit nvmlInit_v2 nvmlInitWithFlags nvmlShutdown nvmlErrorString nvmlSystemGetDriverVersion
nvmlSystemGetNVMLVersion nvmlSystemGetCudaDriverVersion nvmlDeviceGetCount_v2 nvmlDeviceGetHandleByIndex_v2
nvmlDeviceGetHandleByUUID nvmlDeviceGetUUID nvmlDeviceGetName nvmlDeviceGetPciInfo_v3 nvmlDeviceGetArchitecture
nvmlDeviceGetMemoryBusWidth nvmlDeviceGetMigMode nvmlDeviceGetPersistenceMode nvmlDeviceGetPowerUsage
nvmlDeviceGetEnforcedPowerLimit nvmlDeviceGetPowerManagementLimit nvmlDeviceGetPowerManagementDefaultLimit
nvmlDeviceGetPowerManagementLimitConstraints nvmlDeviceGetTotalEnergyConsumption nvmlDeviceGetFieldValues
nvmlDeviceGetSamples nvmlDeviceGetUtilizationRates nvmlDeviceGetMemoryInfo nvmlDeviceGetMemoryInfo_v2
nvmlDeviceGetClockInfo nvmlDeviceGetMaxClockInfo nvmlDeviceGetPerformanceState
nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons nvmlDeviceGetTemperatureV
nvmlDeviceGetTemperature nvmlDeviceGetComputeRunningProcesses_v3 nvmlDeviceGetMPSComputeRunningProcesses_v3
nvmlDeviceGetProcessUtilization nvmlDeviceGetProcessesUtilizationInfo nvmlDeviceGetRemappedRows
nvmlDeviceGetSupportedEventTypes nvmlDeviceGetPcieThroughput nvmlGpmQueryDeviceSupport nvmlGpmSampleAlloc
nvmlGpmSampleFree nvmlGpmSampleGet nvmlGpmMigSampleGet nvmlGpmMetricsGet nvmlEventSetCreate nvmlEventSetFree
nvmlEventSetWait_v2 nvmlDeviceRegisterEvents nvmlDeviceGetViolationStatus nvmlDeviceGetTotalEccErrors
nvmlDeviceGetMemoryErrorCounter nvmlDeviceGetIndex nvmlDeviceGetNumGpuCores nvmlDeviceGetSerial
nvmlDeviceGetCudaComputeCapability nvmlDeviceGetBrand
""".split()  # noqa: SIM905 - sixty quoted lines would read worse


@pytest.fixture(scope="session")
def library() -> Path:
    return build()


Start = Callable[..., Shim]


@pytest.fixture
def start(library: Path, tmp_path: Path) -> Iterator[Start]:
    """Initialise pynvml on a scenario, with the clock stopped at START_NS."""
    running: list[Shim] = []

    def begin(scenario: Scenario | None = None, *, virtual: bool = True, **fields: Any) -> Shim:
        shim = Shim(library, scenario or Scenario(**fields), tmp_path)
        running.append(shim)
        if virtual:
            shim.set_time_ns(START_NS)
        pynvml.nvmlInit()
        return shim

    yield begin
    for shim in running:
        shim.close()


def gpu(index: int = 0) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def code_of(call: Callable[[], object]) -> int:
    """Run a call; 0 when it succeeds, else the driver's code."""
    try:
        call()
    except pynvml.NVMLError as error:
        return int(error.value)
    return 0


def ring(handle: Any, since_us: int = 0, kind: int = pynvml.NVML_TOTAL_POWER_SAMPLES) -> list[tuple[int, int]]:
    value_type, samples = pynvml.nvmlDeviceGetSamples(handle, kind, since_us)
    assert value_type == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    return [(sample.timeStamp, sample.sampleValue.uiVal) for sample in samples]


def joules(samples: list[tuple[int, int]]) -> float:
    """Integrate ring samples (us, mW), each over the time since the one before."""
    return sum((b[0] - a[0]) * b[1] * 1e-9 for a, b in itertools.pairwise(samples))


def fields(handle: Any, *ids: int | tuple[int, int]) -> list[Any]:
    return list(pynvml.nvmlDeviceGetFieldValues(handle, list(ids)))


def u32(handle: Any, field: int, scope: int = 0) -> int:
    (value,) = fields(handle, (field, scope))
    assert value.nvmlReturn == 0, f"field {field} returned {value.nvmlReturn}"
    assert value.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    return int(value.value.uiVal)


def u64(handle: Any, field: int, scope: int = 0) -> int:
    (value,) = fields(handle, (field, scope))
    assert value.nvmlReturn == 0, f"field {field} returned {value.nvmlReturn}"
    assert value.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
    return int(value.value.ullVal)


# ---- the binary interface ----


@pytest.mark.parametrize(
    ("struct", "size", "offsets"),
    [
        (
            pynvml.c_nvmlFieldValue_t,
            40,
            {"scopeId": 4, "timestamp": 8, "latencyUsec": 16, "valueType": 24, "nvmlReturn": 28, "value": 32},
        ),
        (pynvml.c_nvmlSample_t, 16, {"timeStamp": 0, "sampleValue": 8}),
        (pynvml.c_nvmlValue_t, 8, {}),
        (pynvml.c_nvmlUtilization_t, 8, {"gpu": 0, "memory": 4}),
        (pynvml.c_nvmlMemory_t, 24, {"total": 0, "free": 8, "used": 16}),
        (pynvml.c_nvmlMemory_v2_t, 40, {"total": 8, "reserved": 16, "free": 24, "used": 32}),
        (pynvml.c_nvmlGpmMetric_t, 40, {"nvmlReturn": 4, "value": 8, "metricInfo": 16}),
        (pynvml.c_nvmlGpmMetricsGet_t, 19104, {"numMetrics": 4, "sample1": 8, "sample2": 16, "metrics": 24}),
        (pynvml.c_nvmlGpmSupport_t, 8, {}),
        (pynvml.c_nvmlProcessInfo_v3_t, 24, {"usedGpuMemory": 8, "gpuInstanceId": 16, "computeInstanceId": 20}),
        (pynvml.c_nvmlProcessUtilizationSample_t, 32, {"timeStamp": 8, "smUtil": 16, "decUtil": 28}),
        (pynvml.c_nvmlProcessesUtilizationInfo_v1_t, 24, {"lastSeenTimeStamp": 8, "procUtilArray": 16}),
        (pynvml.c_nvmlProcessUtilizationInfo_v1_t, 40, {"pid": 8, "smUtil": 12, "ofaUtil": 32}),
        (pynvml.nvmlPciInfo_t, 68, {"domain": 16, "pciDeviceId": 28, "busId": 36}),
        (pynvml.c_nvmlEventData_t, 32, {"eventType": 8, "eventData": 16, "gpuInstanceId": 24}),
        (pynvml.c_nvmlTemperature_v1_t, 12, {"sensorType": 4, "temperature": 8}),
        (pynvml.c_nvmlViolationTime_t, 16, {"violationTime": 8}),
    ],
)
def test_pynvml_lays_out_structs_as_the_library_asserts(struct: Any, size: int, offsets: dict[str, int]) -> None:
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name in offsets} == offsets


def test_every_entry_point_is_exported(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    assert [name for name in SYMBOLS if not hasattr(loaded, name)] == []


def test_internal_functions_stay_internal(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    assert not hasattr(loaded, "truth_energy_j")
    assert not hasattr(loaded, "gate_initialise")


# ---- identity ----


def test_identity_of_an_h200(start: Start) -> None:
    start(devices=[Device(uuid="GPU-first"), Device("a100", name="My card")], driver={"version": "999.1"})
    assert pynvml.nvmlSystemGetDriverVersion() == "999.1"
    assert pynvml.nvmlSystemGetNVMLVersion().startswith("13.")
    assert pynvml.nvmlSystemGetCudaDriverVersion() == 13000
    assert pynvml.nvmlDeviceGetCount() == 2
    h200, a100 = gpu(0), gpu(1)
    assert pynvml.nvmlDeviceGetName(h200) == "NVIDIA H200"
    assert pynvml.nvmlDeviceGetName(a100) == "My card"
    assert pynvml.nvmlDeviceGetUUID(h200) == "GPU-first"
    assert pynvml.nvmlDeviceGetUUID(a100).startswith("GPU-")
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID("GPU-first")) == 0
    assert pynvml.nvmlDeviceGetArchitecture(h200) == pynvml.NVML_DEVICE_ARCH_HOPPER
    assert pynvml.nvmlDeviceGetArchitecture(a100) == pynvml.NVML_DEVICE_ARCH_AMPERE
    assert pynvml.nvmlDeviceGetCudaComputeCapability(h200) == (9, 0)
    # 2 transfers x 3201 MHz x 6016 bit / 8 = 4.81 TB/s, the card's 4.8
    peak = 2 * pynvml.nvmlDeviceGetMaxClockInfo(h200, pynvml.NVML_CLOCK_MEM) * 1e6
    assert peak * pynvml.nvmlDeviceGetMemoryBusWidth(h200) / 8 == pytest.approx(4.81e12, rel=0.002)
    assert pynvml.nvmlDeviceGetNumGpuCores(h200) == 16896
    assert pynvml.nvmlDeviceGetBrand(h200) == pynvml.NVML_BRAND_NVIDIA
    assert pynvml.nvmlDeviceGetSerial(h200) != pynvml.nvmlDeviceGetSerial(a100)
    assert pynvml.nvmlDeviceGetMigMode(h200) == [0, 0]
    assert pynvml.nvmlDeviceGetPersistenceMode(h200) == 1
    assert pynvml.nvmlDeviceGetMinorNumber(a100) == 1
    bus_id = pynvml.nvmlDeviceGetPciInfo(a100).busId
    assert bus_id == "00000000:11:00.0"
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)) == 1
    assert code_of(lambda: gpu(2)) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert code_of(lambda: pynvml.nvmlDeviceGetHandleByUUID("GPU-none")) == pynvml.NVML_ERROR_NOT_FOUND
    assert code_of(lambda: pynvml.nvmlDeviceGetGpuInstanceId(h200)) == UNSUPPORTED


def test_limits_in_getters_and_fields(start: Start) -> None:
    start(devices=[Device(state={"limit_w": 550})])
    handle = gpu()
    assert pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle) == [200_000, 700_000]
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) == 550_000
    assert pynvml.nvmlDeviceGetPowerManagementLimit(handle) == 550_000
    assert pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) == 700_000
    assert [u32(handle, field) for field in (187, 188, 189, 190, 192)] == [
        200_000,
        700_000,
        700_000,
        550_000,
        550_000,
    ]


# ---- the power ring ----


def power_file(tmp_path: Path) -> PowerFile:
    path = tmp_path / "power.txt"
    # 500 intervals of 13 ms from 80 to 680 W, at arbitrary absolute times
    path.write_text("".join(f"{10**15 + k * 13 * MS} {80_000 + (k * 7919) % 600_000}\n" for k in range(500)))
    return PowerFile(path)


@pytest.mark.parametrize(
    "power",
    [
        Constant(121.0),
        Square(79, 690, 0.05),
        Square(79, 690, 1.0, duty=0.2, phase_s=0.3),
        Ramp(100, 700, 0.33),
        Steps([(0, 80), (0.5, 600), (0.75, 90)], repeat_s=1.25),
        "file",
    ],
    ids=str,
)
def test_ring_integral_is_the_true_energy(start: Start, tmp_path: Path, power: Power | str) -> None:
    shim = start(devices=[Device(power=power_file(tmp_path) if isinstance(power, str) else power)])
    shim.advance(3.3)
    samples = ring(gpu())
    from_us, to_us = samples[0][0], samples[-1][0]
    truth = shim.true_energy_joules(0, from_us * 1000, to_us * 1000)
    # each sample is rounded to a milliwatt
    assert joules(samples) == pytest.approx(truth, abs=0.5e-3 * (to_us - from_us) * 1e-6)


def test_harvesting_once_a_second_loses_nothing(start: Start) -> None:
    shim = start(devices=[Device(power=Square(100, 600, 0.7, duty=0.4))])
    handle, samples = gpu(), [(0, 0)]
    for _ in range(70):
        shim.advance(1.0)
        samples += ring(handle, samples[-1][0])
    spacing_ms = [(b[0] - a[0]) / 1e3 for a, b in itertools.pairwise(samples[1:])]
    assert len(spacing_ms) > 3000
    assert sorted(spacing_ms)[len(spacing_ms) // 2] == pytest.approx(20.0, abs=0.05)  # median
    assert sum(spacing_ms) / len(spacing_ms) == pytest.approx(20.14, abs=0.05)
    assert min(spacing_ms) >= 6
    assert max(spacing_ms) <= 54
    # from the start of a period to 98 periods later: 100 W + 0.4 x 500 W on average
    begin_us = START_NS // 1000
    inside = [sample for sample in samples if begin_us <= sample[0] <= begin_us + 98 * 700_000]
    seconds = (inside[-1][0] - inside[0][0]) * 1e-6
    assert joules(inside) == pytest.approx(300 * seconds, rel=0.005)
    # a constant 20 ms per sample, the mistake to avoid, is off by 0.7 %
    naive = sum(power for _, power in inside[1:]) * 20e-6
    assert naive / joules(inside) == pytest.approx(20 / 20.14, abs=0.002)


def test_ring_depth_and_newer_than(start: Start) -> None:
    shim = start()
    handle = gpu()
    everything = ring(handle)
    assert len(everything) == 119
    assert (everything[-1][0] - everything[0][0]) * 1e-6 == pytest.approx(2.36, abs=0.06)
    assert everything[-1][0] * 1000 <= shim.time_ns()
    assert ring(handle, everything[-4][0]) == everything[-3:]
    assert code_of(lambda: ring(handle, everything[-1][0])) == pynvml.NVML_ERROR_NOT_FOUND
    shim.advance(0.1)
    assert 3 <= len(ring(handle, everything[-1][0])) <= 7


def test_small_buffer_gets_the_oldest_samples(start: Start, library: Path) -> None:
    start()
    everything = ring(gpu())
    kind, count = ctypes.c_int(), ctypes.c_uint(0)
    read = ctypes.CDLL(str(library)).nvmlDeviceGetSamples
    arguments = (gpu(), 0, ctypes.c_ulonglong(0), ctypes.byref(kind), ctypes.byref(count))
    assert read(*arguments, None) == 0
    assert count.value == 119
    count.value = 10
    buffer = (pynvml.c_nvmlSample_t * 10)()
    assert read(*arguments, buffer) == 0
    assert [sample.timeStamp for sample in buffer] == [stamp for stamp, _ in everything[:10]]


def test_ring_is_deterministic_and_seeded(start: Start) -> None:
    def stamps(seed: int) -> list[int]:
        shim = start(Scenario(seed=seed))
        shim.advance(2)
        return [stamp for stamp, _ in ring(gpu())]

    assert stamps(1) == stamps(1)
    assert stamps(1) != stamps(2)


def test_ring_of_another_shape(start: Start) -> None:
    shim = start(devices=[Device("a100", features={"ring": "depth:50,period_ms:1000,jitter:0"})])
    shim.advance(100)
    samples = ring(gpu())
    assert len(samples) == 50
    assert {b[0] - a[0] for a, b in itertools.pairwise(samples)} == {1_000_000}


def test_utilization_ring(start: Start) -> None:
    shim = start(devices=[Device(power=Square(100, 600, 20), state={"util_pct": (100, 0), "memory_util_pct": 30})])
    shim.advance(20)
    samples = ring(gpu(), 0, pynvml.NVML_GPU_UTILIZATION_SAMPLES)
    assert len(samples) == 71
    assert {b[0] - a[0] for a, b in itertools.pairwise(samples)} == {200_000}
    # the last 14 s of a 10 s on, 10 s off wave: 4 s on
    assert sum(value for _, value in samples) / 71 == pytest.approx(100 * 4 / 14.2, abs=2)
    assert {value for _, value in ring(gpu(), 0, pynvml.NVML_MEMORY_UTILIZATION_SAMPLES)} == {30}
    assert pynvml.nvmlDeviceGetUtilizationRates(gpu()).gpu == 0
    shim.advance(5)
    assert pynvml.nvmlDeviceGetUtilizationRates(gpu()).gpu == 100
    assert pynvml.nvmlDeviceGetUtilizationRates(gpu()).memory == 30


# ---- sensors and the counter ----


def trace(shim: Shim, read: Callable[[], int], seconds: float) -> list[tuple[int, int]]:
    """Read every millisecond; return (ms, value) at every change, the first value included."""
    changes: list[tuple[int, int]] = []
    for ms in range(round(seconds * 1000)):
        value = read()
        if not changes or value != changes[-1][1]:
            changes.append((ms, value))
        shim.advance_ns(MS)
    return changes


def test_counter_ticks_every_100_ms_by_the_energy_of_the_tick(start: Start) -> None:
    shim = start(devices=[Device(power=Constant(250))])
    handle = gpu()
    changes = trace(shim, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 2)[1:]
    assert len(changes) == 20
    assert {b[0] - a[0] for a, b in itertools.pairwise(changes)} == {100}
    assert {b[1] - a[1] for a, b in itertools.pairwise(changes)} == {25_000}
    assert u64(handle, 83) == u64(handle, 191) == pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def test_counter_and_ring_agree_over_minutes(start: Start) -> None:
    shim = start(devices=[Device(power=Square(100, 600, 0.37))])
    handle = gpu()
    before = u64(handle, 83)
    shim.advance(270)
    truth = shim.true_energy_joules(0, START_NS, START_NS + 270 * 10**9)
    assert (u64(handle, 83) - before) / 1e3 == pytest.approx(truth, abs=0.1 * 600)  # one tick at each end
    assert truth == pytest.approx(270 * 350, rel=1e-3)


def test_instant_shows_the_past(start: Start) -> None:
    # On a ramp a window's mean is the power at its middle: 7 ms lag and half of 25 ms before the change.
    shim = start(devices=[Device(power=Ramp(100, 700, 10))])
    handle = gpu()
    changes = trace(shim, lambda: u32(handle, 186), 5)[2:]
    assert {b[0] - a[0] for a, b in itertools.pairwise(changes)} == {100}
    for ms, milliwatts in changes:
        shown_ms = (milliwatts - 100_000) / 60
        assert 19.5 - 0.1 <= ms - shown_ms <= 19.5 + 1.1  # seen up to 1 ms after it changed


def test_instant_window_is_25_ms(start: Start) -> None:
    # The edges of this wave drift through the refresh period, so that one in four falls into a window.
    shim = start(devices=[Device(power=Square(100, 600, 1.01))])
    handle = gpu()
    changes = trace(shim, lambda: u32(handle, 186), 40)
    between = [(ms, value) for ms, value in changes if 100_000 < value < 600_000]
    assert len(between) == pytest.approx(0.25 * 2 * 40 / 1.01, rel=0.3)
    for ms, milliwatts in between:
        since_rise_ms = ms % 1010
        high_ms = since_rise_ms - 7 if since_rise_ms < 505 else 25 - (since_rise_ms - 505 - 7)
        assert (milliwatts - 100_000) / 500_000 * 25 == pytest.approx(high_ms, abs=1.01)


def test_instant_is_blind_to_a_wave_of_its_own_period(start: Start) -> None:
    shim = start(devices=[Device(power=Square(100, 600, 0.1))])
    handle = gpu()
    values = {value for _, value in trace(shim, lambda: u32(handle, 186), 2)}
    assert len(values) == 1  # 50 ms on, 50 ms off: every window looks at the same part of the wave
    shim.reset(Scenario(devices=[Device("ada", power=Square(100, 600, 0.1))]))
    shim.set_time_ns(START_NS)
    pynvml.nvmlInit()
    ada = gpu()
    assert {value for _, value in trace(shim, lambda: u32(ada, 186), 1)} == {350_000}  # 100 of 100 ms


def test_average_is_a_one_second_boxcar(start: Start) -> None:
    shim = start(devices=[Device(power=Steps([(-5, 100), (1.0, 600)]))])
    handle = gpu()
    changes = trace(shim, lambda: u32(handle, 185), 2.5)[1:]
    assert {b[0] - a[0] for a, b in itertools.pairwise(changes)} == {100}
    assert all(b[1] - a[1] == 50_000 for a, b in itertools.pairwise(changes[:10]))
    assert changes[-1][1] == 600_000
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == u32(handle, 185)


def test_scopes_of_power(start: Start) -> None:
    start()
    handle = gpu()
    assert u32(handle, 185, 2) == 42_000
    assert fields(handle, (186, 2), (186, 1), (185, 1))[0].nvmlReturn == UNSUPPORTED
    assert fields(handle, (191, 2))[0].nvmlReturn == UNSUPPORTED


def test_gain_offset_and_quantum(start: Start) -> None:
    sensor = {"gain": 0.954, "offset_w": -1.2, "quantum_mw": 1000, "counter_gain": 1.05, "energy_mj": 5000}
    shim = start(devices=[Device(power=Constant(300), sensor=sensor)])
    handle = gpu()
    assert u32(handle, 186) == 285_000  # 0.954 x 300 - 1.2, whole watts
    assert {value for _, value in ring(handle)} == {285_000}
    shim.advance(10)
    assert u64(handle, 83) == pytest.approx(5000 + 1.05 * 3e6, abs=0.1 * 1.05 * 3e5)


def test_field_values_carry_a_time_stamp(start: Start) -> None:
    shim = start()
    shim.advance(1.5)
    (value,) = fields(gpu(), 186)
    assert value.timestamp == START_NS // 1000 + 1_500_000


# ---- what the other GPU families lack ----


@pytest.mark.parametrize(
    ("profile", "sources"),
    [
        ("h200", {"ring", "instant", "average", "counter", "gpm"}),
        ("a100", {"instant", "counter"}),
        ("ada", {"instant", "average", "counter"}),
        ("t4", {"instant", "counter"}),
        ("pascal", {"instant"}),
        ("average_only", set()),
    ],
)
def test_profiles(start: Start, profile: str, sources: set[str]) -> None:
    start(devices=[Device(profile, power=Constant(60))])
    handle = gpu()
    instant, average, counter = (value.nvmlReturn for value in fields(handle, 186, 185, 83))
    codes = {
        "ring": code_of(lambda: ring(handle)),
        "instant": instant,
        "average": average,
        "counter": counter,
        "gpm": code_of(lambda: pynvml.nvmlGpmSampleGet(handle, pynvml.nvmlGpmSampleAlloc())),
    }
    assert set(codes.values()) <= {0, UNSUPPORTED}
    assert {source for source, code in codes.items() if code == 0} == sources
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == 60_000
    assert code_of(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) == counter
    assert bool(pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice) is ("gpm" in sources)


def test_pascal_updates_every_20_ms(start: Start) -> None:
    shim = start(devices=[Device("pascal", power=Ramp(50, 250, 10))])
    handle = gpu()
    changes = trace(shim, lambda: pynvml.nvmlDeviceGetPowerUsage(handle), 0.5)[1:]
    assert {b[0] - a[0] for a, b in itertools.pairwise(changes)} == {20}


def test_features_can_be_switched(start: Start) -> None:
    off = {"ring": "off", "counter": "off", "average": "off", "gpm": "no_permission"}
    start(devices=[Device(features=off), Device(features={"instant": "period_ms:20,window_ms:10"})])
    handle = gpu()
    assert code_of(lambda: ring(handle)) == UNSUPPORTED
    assert [value.nvmlReturn for value in fields(handle, 83, 185, 186)] == [3, 3, 0]
    sample = pynvml.nvmlGpmSampleAlloc()
    assert code_of(lambda: pynvml.nvmlGpmSampleGet(handle, sample)) == pynvml.NVML_ERROR_NO_PERMISSION
    assert pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice == 1


def test_mig_hides_the_whole_gpu(start: Start) -> None:
    shim = start(devices=[Device(features={"mig": "on"}, gpm={"sm_util": 50})])
    handle = gpu()
    assert pynvml.nvmlDeviceGetMigMode(handle) == [1, 1]
    first, second = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
    for call in (
        lambda: pynvml.nvmlDeviceGetUtilizationRates(handle),
        lambda: ring(handle, 0, pynvml.NVML_GPU_UTILIZATION_SAMPLES),
        lambda: pynvml.nvmlDeviceGetProcessUtilization(handle, 0),
        lambda: pynvml.nvmlGpmSampleGet(handle, first),
    ):
        assert code_of(call) == UNSUPPORTED
    assert len(ring(handle)) == 119  # power is of the whole card, and stays
    pynvml.nvmlGpmMigSampleGet(handle, 1, first)
    shim.advance(0.2)
    pynvml.nvmlGpmMigSampleGet(handle, 1, second)
    assert gpm_metrics(first, second, 2) == [50]


# ---- GPM ----


def gpm_metrics(first: Any, second: Any, *metrics: int) -> list[float]:
    get = pynvml.c_nvmlGpmMetricsGet_t()
    get.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    get.numMetrics = len(metrics)
    get.sample1, get.sample2 = first, second
    for index, metric in enumerate(metrics):
        get.metrics[index].metricId = metric
    pynvml.nvmlGpmMetricsGet(get)
    return [
        get.metrics[index].value if get.metrics[index].nvmlReturn == 0 else math.inf for index in range(len(metrics))
    ]


def gpm_over(shim: Shim, handle: Any, ms: int, *metrics: int) -> list[float]:
    first, second = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
    pynvml.nvmlGpmSampleGet(handle, first)
    shim.advance_ns(ms * MS)
    pynvml.nvmlGpmSampleGet(handle, second)
    values = gpm_metrics(first, second, *metrics)
    for sample in (first, second):
        pynvml.nvmlGpmSampleFree(sample)
    return values


@pytest.mark.parametrize(("ms", "percent"), [(250, 100), (100, 100), (50, 50), (20, 20)])
def test_gpm_percentages_are_wrong_below_100_ms(start: Start, ms: int, percent: float) -> None:
    # measured on an H200: a steady 100 % reads 54 % at 50 ms and 20 % at 20 ms, DRAM reads right
    shim = start(devices=[Device(gpm={"sm_util": 100, "any_tensor_util": 100, "dram_bw_util": 87.9})])
    assert gpm_over(shim, gpu(), ms, 2, 5, 10) == pytest.approx([percent, percent, 87.9])


def test_gpm_integrates_the_phases_of_the_wave(start: Start) -> None:
    wave = {"sm_util": (90, 10), "dram_bw_util": (60, 5), "pcie_tx_per_sec": (1000, 0)}
    shim = start(devices=[Device(power=Square(100, 600, 1, duty=0.25), gpm=wave)])
    sm, dram, pcie, unsupported = gpm_over(shim, gpu(), 10_000, 2, 10, 20, 248)
    assert [sm, dram, pcie] == pytest.approx([30, 18.75, 250], rel=0.02)
    assert dram == pytest.approx(shim.true_gpm_integral(0, 10, START_NS, START_NS + 10_000 * MS) / 10, rel=1e-9)
    assert unsupported == math.inf
    assert u64(gpu(), 197) == pytest.approx(2500 * 2**20, rel=1e-6)  # the byte counter tells the same


def test_gpm_samples_must_fit(start: Start) -> None:
    start(devices=[Device(), Device()])
    first, second = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
    pynvml.nvmlGpmSampleGet(gpu(0), first)
    assert code_of(lambda: gpm_metrics(first, second, 2)) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    pynvml.nvmlGpmSampleGet(gpu(1), second)
    assert code_of(lambda: gpm_metrics(first, second, 2)) == pynvml.NVML_ERROR_INVALID_ARGUMENT


# ---- state, health, processes ----


def test_state_follows_the_phase(start: Start) -> None:
    state: dict[str, Level] = {
        "sm_mhz": (1755, 345),
        "memory_mhz": 3201,
        "temperature_c": (70, 35),
        "memory_temperature_c": 55,
        "memory_used_mib": 1024,
        "pstate": (0, 8),
        "util_pct": (100, 0),
    }
    shim = start(
        devices=[Device(power=Square(80, 690, 2), state=state, throttle={"sw_power_cap": (0.8, 0), "hw_thermal": 0.25})]
    )
    handle = gpu()
    assert pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) == 1755
    assert pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU) == 70
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == pynvml.nvmlClocksEventReasonSwPowerCap
    shim.advance(1.5)
    assert pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) == 345
    assert pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM) == 3201
    assert pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM) == 1980
    assert pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU) == 35
    assert u32(handle, 82) == 55
    assert pynvml.nvmlDeviceGetPerformanceState(handle) == 8
    assert pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) == pynvml.nvmlClocksEventReasonGpuIdle
    # 1 s of the 1.5 was the high phase
    assert u64(handle, 74) == 800_000_000
    assert u64(handle, 270) == u64(handle, 75) == 375_000_000
    assert [u64(handle, field) for field in (76, 77, 78, 79, 81, 269, 271)] == [0] * 7
    assert pynvml.nvmlDeviceGetViolationStatus(handle, pynvml.NVML_PERF_POLICY_POWER).violationTime == 800_000_000
    memory, plain = (
        pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2),
        pynvml.nvmlDeviceGetMemoryInfo(handle),
    )
    assert memory.used == 1024 * 2**20
    assert memory.total == memory.used + memory.free + memory.reserved == plain.total
    assert plain.used == memory.used + memory.reserved


def test_health_counters(start: Start) -> None:
    health = {
        "sbe_volatile": 3,
        "dbe_volatile": 1,
        "sbe_aggregate": 12,
        "dbe_aggregate": 2,
        "remapped_correctable": 4,
        "remapped_uncorrectable": 5,
        "remap_pending": 1,
        "recovery_action": 1,
    }
    start(devices=[Device(health=health), Device("t4")])
    handle = gpu()
    assert [u64(handle, field) for field in (3, 4, 5, 6)] == [3, 1, 12, 2]
    assert [u32(handle, field) for field in (142, 143, 144, 145, 230)] == [4, 5, 1, 0, 1]
    assert pynvml.nvmlDeviceGetRemappedRows(handle) == (4, 5, 1, 0)
    assert pynvml.nvmlDeviceGetTotalEccErrors(handle, 1, 1) == 2
    assert pynvml.nvmlDeviceGetMemoryErrorCounter(handle, 0, 0, 2) == 3
    assert code_of(lambda: pynvml.nvmlDeviceGetRemappedRows(gpu(1))) == UNSUPPORTED
    assert fields(handle, 32, 300)[0].nvmlReturn == UNSUPPORTED


def test_link_counters(start: Start) -> None:
    links = {"nvlink_total_tx_per_sec": 1800, "pcie_rx_per_sec": 512}
    shim = start(devices=[Device(gpm=links)])
    shim.advance(10)
    handle = gpu()
    everything = 0xFFFFFFFF
    assert u64(handle, 138, everything) == 18_000 * 1024  # KiB
    assert u64(handle, 138, 3) == 1000 * 1024  # one link of 18
    assert u64(handle, 202, 3) == 1000 * 2**20
    assert u64(handle, 139, everything) == 0
    assert u64(handle, 198) == 5120 * 2**20
    assert pynvml.nvmlDeviceGetPcieThroughput(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES) == 512 * 1024


def test_processes_come_and_go(start: Start) -> None:
    processes = [Process(4242, 1000, sm_percent=80), Process(4343, 500, from_s=5, to_s=10)]
    shim = start(devices=[Device(processes=processes)])
    handle = gpu()

    def pids() -> list[int]:
        return [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]

    assert pids() == [4242]
    shim.advance(6)
    assert pids() == [4242, 4343]
    (first, _) = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert first.usedGpuMemory == 1000 * 2**20
    assert pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used == 1500 * 2**20
    shim.advance(4)
    assert pids() == [4242]
    (sample,) = pynvml.nvmlDeviceGetProcessUtilization(handle, 0)
    assert (sample.pid, sample.smUtil) == (4242, 80)
    (info,) = pynvml.nvmlDeviceGetProcessesUtilizationInfo(handle, 0)
    assert (info.pid, info.smUtil, info.timeStamp) == (4242, 80, sample.timeStamp)
    newer = code_of(lambda: pynvml.nvmlDeviceGetProcessUtilization(handle, sample.timeStamp))
    assert newer == pynvml.NVML_ERROR_NOT_FOUND
    assert pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle) == []
    assert "4242" in pynvml.nvmlSystemGetProcessName(4242)


# ---- events ----


def test_xid_is_delivered_once(start: Start) -> None:
    shim = start(devices=[Device(), Device()], xids=[Xid(1, 79, at_s=5), Xid(0, 13, at_s=-1)])
    assert pynvml.nvmlDeviceGetSupportedEventTypes(gpu(1)) & pynvml.nvmlEventTypeXidCriticalError
    events = pynvml.nvmlEventSetCreate()
    for index in (0, 1):
        pynvml.nvmlDeviceRegisterEvents(gpu(index), pynvml.nvmlEventTypeXidCriticalError, events)
    begin = time.monotonic()
    # the one from before the registration cannot be had any more
    assert code_of(lambda: pynvml.nvmlEventSetWait_v2(events, 5000)) == pynvml.NVML_ERROR_TIMEOUT
    assert time.monotonic() - begin < 1  # virtual time does not wait
    shim.advance(5)
    event = pynvml.nvmlEventSetWait_v2(events, 1000)
    assert (event.eventType, event.eventData) == (pynvml.nvmlEventTypeXidCriticalError, 79)
    assert pynvml.nvmlDeviceGetIndex(event.device) == 1
    assert code_of(lambda: pynvml.nvmlEventSetWait_v2(events, 0)) == pynvml.NVML_ERROR_TIMEOUT
    pynvml.nvmlEventSetFree(events)


def test_event_wait_honours_its_timeout_in_real_time(start: Start) -> None:
    start(xids=[Xid(0, 48, at_s=0.15)], virtual=False)
    events = pynvml.nvmlEventSetCreate()
    pynvml.nvmlDeviceRegisterEvents(gpu(), pynvml.nvmlEventTypeXidCriticalError, events)
    begin = time.monotonic()
    assert code_of(lambda: pynvml.nvmlEventSetWait_v2(events, 50)) == pynvml.NVML_ERROR_TIMEOUT
    assert time.monotonic() - begin == pytest.approx(0.05, abs=0.04)
    assert pynvml.nvmlEventSetWait_v2(events, 5000).eventData == 48
    assert time.monotonic() - begin == pytest.approx(0.15, abs=0.08)


# ---- faults ----


def test_error_between_two_times(start: Start) -> None:
    fault = Fault.error("nvmlDeviceGetPowerUsage", 999, gpu=0, from_s=1, to_s=2)
    shim = start(devices=[Device(), Device()], faults=[fault])
    first, second = gpu(0), gpu(1)
    codes = []
    for _ in range(3):
        codes.append(
            (
                code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(first)),
                code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(second)),
            )
        )
        shim.advance(1)
    assert codes == [(0, 0), (999, 0), (0, 0)]


def test_error_by_call_number(start: Start) -> None:
    start(
        faults=[
            Fault.error("nvmlDeviceGetPowerUsage", 10, from_call=3, to_call=4),
            Fault.error("nvmlDeviceGetClockInfo", 21, every=3),
        ]
    )
    handle = gpu()
    power = [code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)) for _ in range(6)]
    clock = [code_of(lambda: pynvml.nvmlDeviceGetClockInfo(handle, 1)) for _ in range(6)]
    assert power == [0, 0, 10, 10, 0, 0]
    assert clock == [0, 0, 21, 0, 0, 21]


def test_all_calls_fail_and_recover_after_a_new_initialisation(start: Start) -> None:
    shim = start(faults=[Fault.error("*", 999, from_s=1, to_s=2)])
    handle = gpu()
    shim.advance(1)
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)) == 999
    assert code_of(pynvml.nvmlDeviceGetCount) == 999
    assert code_of(pynvml.nvmlShutdown) == 0
    assert code_of(pynvml.nvmlInit) == 999
    shim.advance(1)
    pynvml.nvmlInit()
    assert pynvml.nvmlDeviceGetCount() == 1


def test_uninitialised_calls_fail(start: Start) -> None:
    start()
    handle = gpu()
    pynvml.nvmlShutdown()
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)) == pynvml.NVML_ERROR_UNINITIALIZED
    assert code_of(pynvml.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED


def test_one_field_fails_alone(start: Start) -> None:
    start(
        faults=[
            Fault.error("nvmlDeviceGetFieldValues", 3, field=186, every=2),
            Fault.garbage("nvmlDeviceGetFieldValues", field=185, value=0),
        ]
    )
    handle = gpu()
    codes = [[value.nvmlReturn for value in fields(handle, 186, 185, 83)] for _ in range(2)]
    assert codes == [[0, 0, 0], [3, 0, 0]]
    assert u32(handle, 185) == 0


def test_garbage(start: Start) -> None:
    shim = start(
        devices=[Device(gpm={"sm_util": 50})],
        faults=[
            Fault.garbage(call)
            for call in (
                "nvmlDeviceGetPowerUsage",
                "nvmlDeviceGetUtilizationRates",
                "nvmlDeviceGetTemperatureV",
                "nvmlGpmMetricsGet",
                "nvmlDeviceGetSamples",
            )
        ]
        + [Fault.garbage("nvmlDeviceGetTotalEnergyConsumption", value=0)],
    )
    handle = gpu()
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == 4294967295
    assert pynvml.nvmlDeviceGetUtilizationRates(handle).gpu == 4294967295
    assert pynvml.nvmlDeviceGetTemperatureV(handle, 0) == 255
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 0
    assert math.isnan(gpm_over(shim, handle, 200, 2)[0])
    assert {value for _, value in ring(handle)} == {4294967295}


@pytest.mark.parametrize("same_handle", [False, True])
def test_gpu_is_lost_and_comes_back(start: Start, same_handle: bool) -> None:
    shim = start(
        devices=[Device(uuid="GPU-a"), Device(uuid="GPU-b")],
        faults=[Fault.lost(1, from_s=1, to_s=2, same_handle=same_handle)],
    )
    healthy, old = gpu(0), gpu(1)
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(old)) == 0
    shim.advance(1.5)
    for call in (
        lambda: pynvml.nvmlDeviceGetPowerUsage(old),
        lambda: fields(old, 83),
        lambda: ring(old),
        lambda: gpu(1),
    ):
        assert code_of(call) == LOST
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(healthy)) == 0
    shim.advance(1)
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(old)) == (0 if same_handle else LOST)
    new = pynvml.nvmlDeviceGetHandleByUUID("GPU-b")
    assert pynvml.nvmlDeviceGetPowerUsage(new) == 100_000
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(old)) == (0 if same_handle else LOST)


def test_event_wait_reports_a_lost_gpu(start: Start) -> None:
    shim = start(faults=[Fault.lost(0, from_s=1)], xids=[Xid(0, 79, at_s=1)])
    events = pynvml.nvmlEventSetCreate()
    pynvml.nvmlDeviceRegisterEvents(gpu(), pynvml.nvmlEventTypeXidCriticalError, events)
    shim.advance(1)
    assert pynvml.nvmlEventSetWait_v2(events, 100).eventData == 79  # the Xid first, then the loss
    assert code_of(lambda: pynvml.nvmlEventSetWait_v2(events, 100)) == LOST


def test_driver_mismatch_hits_everything_but_the_way_out(start: Start) -> None:
    shim = start(faults=[Fault.driver_mismatch(from_s=1)])
    handle = gpu()
    shim.advance(1)
    for call in (lambda: pynvml.nvmlDeviceGetPowerUsage(handle), pynvml.nvmlDeviceGetCount, pynvml.nvmlInit):
        assert code_of(call) == MISMATCH
    assert code_of(pynvml.nvmlShutdown) == 0


def test_counter_reset(start: Start) -> None:
    shim = start(devices=[Device(power=Constant(200))], faults=[Fault.counter_reset(0, at_s=10)])
    handle = gpu()
    shim.advance(9.9)
    assert u64(handle, 83) > 10**9
    shim.advance(0.1)
    assert u64(handle, 83) == 0
    shim.advance(5)
    assert u64(handle, 83) == pytest.approx(5 * 200_000, abs=20_000)


def test_hanging_call_blocks_its_own_thread_only(start: Start) -> None:
    shim = start(devices=[Device(), Device()], faults=[Fault.hang("nvmlDeviceGetPowerUsage", gpu=0, from_s=1, to_s=3)])
    stuck, fine = gpu(0), gpu(1)
    shim.advance(1)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(pynvml.nvmlDeviceGetPowerUsage(stuck)), daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert pynvml.nvmlDeviceGetPowerUsage(fine) == 100_000
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(stuck) > 0
    shim.advance(2)
    thread.join(5)
    assert result == [100_000]


def test_slow_calls(start: Start) -> None:
    start(
        faults=[Fault.slow("nvmlDeviceGetPowerUsage", 30_000)],
        latencies=[Latency.call("nvmlDeviceGetClockInfo", 5000), Latency.field_value(83, 4000)],
    )
    handle = gpu()

    def cost(call: Callable[[], object]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.thread_time()
        call()
        return (time.perf_counter() - wall) * 1e3, (time.thread_time() - cpu) * 1e3

    wall_ms, cpu_ms = cost(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    assert wall_ms >= 30
    assert cpu_ms < 10

    def least_cpu(call: Callable[[], object]) -> float:
        return min(cost(call)[1] for _ in range(5))

    assert least_cpu(lambda: pynvml.nvmlDeviceGetClockInfo(handle, 1)) == pytest.approx(5, abs=1)
    assert least_cpu(lambda: fields(handle, 185, 186)) < 1
    assert least_cpu(lambda: fields(handle, 185, 83)) == pytest.approx(4, abs=1)
    assert [value.latencyUsec for value in fields(handle, 185, 83)] == [0, 4000]


def test_h200_call_times(start: Start) -> None:
    start(latencies=[Latency.h200()])
    handle = gpu()
    for call, expected_ms in (
        (lambda: ring(handle), 0.85),
        (lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 3.8),
        (lambda: fields(handle, 185, 186, 83), 3.8),
        (lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle), 0.27),
    ):
        costs_ms = []
        for _ in range(5):
            begin = time.thread_time()
            call()
            costs_ms.append((time.thread_time() - begin) * 1e3)
        # CPU time, and the cheapest of five calls: a busy machine only ever adds.
        assert min(costs_ms) == pytest.approx(expected_ms, rel=0.2, abs=0.2)


def test_control_file_switches_faults_at_run_time(start: Start, tmp_path: Path) -> None:
    control = tmp_path / "control"
    shim = start(devices=[Device(uuid="GPU-a")], control=control)
    handle = gpu()
    shim.advance(50)
    write_control(control, [Fault.error("nvmlDeviceGetPowerUsage", 17), Fault.counter_reset(0), Xid(0, 79)])
    events = pynvml.nvmlEventSetCreate()
    pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    shim.poll_control()
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)) == 17
    assert pynvml.nvmlEventSetWait_v2(events, 100).eventData == 79
    assert u64(handle, 83) == 0
    write_control(control, [Fault.lost(0)])
    shim.poll_control()
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)) == LOST
    write_control(control)
    shim.poll_control()
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)) == LOST
    assert pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByUUID("GPU-a")) == 100_000
    assert u64(gpu(), 83) < 10**6  # a reset cannot be taken back


def test_control_file_times_count_from_its_reading(start: Start, tmp_path: Path) -> None:
    control = tmp_path / "control"
    shim = start(control=control)
    handle = gpu()
    shim.advance(100)
    write_control(control, [Fault.error("nvmlDeviceGetPowerUsage", 17, from_s=1, to_s=2)])
    shim.poll_control()
    codes = []
    for _ in range(3):
        codes.append(code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(handle)))
        shim.advance(1)
    assert codes == [0, 17, 0]


def test_control_file_is_noticed_without_being_asked(start: Start, tmp_path: Path) -> None:
    control = tmp_path / "control"
    start(control=control, virtual=False)
    handle = gpu()
    write_control(control, [Fault.hang("nvmlDeviceGetPowerUsage")])
    time.sleep(0.03)
    thread = threading.Thread(target=lambda: pynvml.nvmlDeviceGetPowerUsage(handle), daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    control.unlink()
    thread.join(5)
    assert not thread.is_alive()


def test_faulty_control_file_changes_nothing(start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    control = tmp_path / "control"
    shim = start(control=control)
    control.write_text("fault call=nvmlDeviceGetPowerUsage code=17\n")
    shim.poll_control()
    control.write_text("fault call=nvmlDeviceGetPowerUsage code=17 whenever=1\n")
    shim.poll_control()
    assert code_of(lambda: pynvml.nvmlDeviceGetPowerUsage(gpu())) == 17
    assert "line 1: fault: unknown or repeated setting 'whenever=1'" in capfd.readouterr().err


# ---- the clock ----


def test_step_of_the_wall_clock_shifts_new_stamps_only(start: Start) -> None:
    shim = start()
    handle = gpu()
    old = [stamp for stamp, _ in ring(handle)]
    shim.step_clock_ns(3600 * 10**9)
    assert [stamp for stamp, _ in ring(handle)] == old
    shim.advance(1)
    stamps = [stamp for stamp, _ in ring(handle)]
    assert len(stamps) == 119
    jumps = [b - a for a, b in itertools.pairwise(stamps) if b - a > 10**6]
    assert len(jumps) == 1
    assert jumps[0] == pytest.approx(3600 * 10**6, abs=60_000)
    assert fields(handle, 186)[0].timestamp == (START_NS + 3601 * 10**9) // 1000


def test_step_backwards_hides_new_samples_from_a_reader_that_asks_by_stamp(start: Start) -> None:
    shim = start()
    handle = gpu()
    newest = ring(handle)[-1][0]
    shim.step_clock_ns(-10 * 10**9)
    shim.advance(1)
    assert code_of(lambda: ring(handle, newest)) == pynvml.NVML_ERROR_NOT_FOUND
    assert len(ring(handle)) == 119


def test_real_time_runs(start: Start) -> None:
    before = time.time_ns()
    shim = start(virtual=False, devices=[Device(power=Constant(300))])
    assert before <= shim.epoch_ns() + 1000 <= time.time_ns() + 1000
    newest = ring(gpu())[-1][0]
    assert 0 <= time.time_ns() // 1000 - newest < 100_000


def test_given_epoch_anchors_the_power_function(start: Start) -> None:
    shim = start(epoch_ns=START_NS - 500 * MS, devices=[Device(power=Steps([(0, 100), (1, 300)]))])
    assert shim.true_watts(0, START_NS + 499 * MS) == 100
    assert shim.true_watts(0, START_NS + 500 * MS) == 300
    assert shim.true_energy_joules(0, START_NS, START_NS + 10**9) == pytest.approx(50 + 150)


def test_call_counts(start: Start) -> None:
    shim = start(devices=[Device(), Device()])
    for index in (0, 1, 1):
        pynvml.nvmlDeviceGetPowerUsage(gpu(index))
    assert [shim.call_count("nvmlDeviceGetPowerUsage", index) for index in (0, 1, -1)] == [1, 2, 3]
    assert shim.call_count("nvmlDeviceGetHandleByIndex_v2") == 3
    shim.reset()
    assert shim.call_count("nvmlDeviceGetPowerUsage") == 0


# ---- loading, refusing, building ----

PROGRAM = """
import sys
import pynvml
try:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    print(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetPowerUsage(handle))
    pynvml.nvmlDeviceGetSamples(handle, 0, 0)
    print("ring")
except pynvml.NVMLError as error:
    print("code", error.value)
"""


def run_program(variables: dict[str, str]) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout, done.stderr


def test_another_process_finds_it_through_the_library_path(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(devices=[Device(power=Constant(333))]).write(tmp_path / "scenario")
    assert run_program(environment(library, scenario)) == ("NVIDIA H200 333000\nring\n", "")


def test_it_refuses_to_stand_in_for_a_driver(library: Path, tmp_path: Path) -> None:
    variables = environment(library, tmp_path / "unused")
    del variables["JOULETRACE_NVML_SHIM"]
    output, errors = run_program(variables)
    assert output == f"code {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}\n"
    assert "refuses to work unless JOULETRACE_NVML_SHIM names a scenario file" in errors
    assert errors.count("\n") == 1


def test_missing_symbol(tmp_path: Path) -> None:
    old_driver = build(without=("nvmlDeviceGetSamples",))
    scenario = Scenario().write(tmp_path / "scenario")
    output, _ = run_program(environment(old_driver, scenario))
    assert output == f"NVIDIA H200 100000\ncode {pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}\n"


def test_build_errors_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="no function nvmlDeviceGetSample_s"):
        build(tmp_path, without=("nvmlDeviceGetSample_s",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="gcc is not installed"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("device profile=h200\npowre gpu=0 constant watts=1", "line 2: unknown directive 'powre'"),
        ("device profile=h300", "device: needs profile= one of h200, a100"),
        ("device profile=h200 rnig=on", "unknown or repeated setting 'rnig=on'"),
        ("power gpu=0 constant watts=1", "there is no gpu 0 (device lines come first)"),
        ("device profile=h200\npower gpu=0 constant watts=1x", "'1x' is not a number for watts"),
        ("device profile=h200\npower gpu=0 square low_w=1 high_w=2", "power: needs period_s="),
        ("device profile=h200\npower gpu=0 steps points=1:2,1:3", "not in order of time"),
        ("device profile=h200\ngpm gpu=0 sm_utill=3", "unknown or repeated setting 'sm_utill=3'"),
        ("fault call=nvmlDeviceGetPower code=3", "there is no call 'nvmlDeviceGetPower'"),
        ("fault call=nvmlDeviceGetPowerUsage", "exactly one of code=, hang, garbage, latency_us="),
        ("fault lost call=nvmlDeviceGetPowerUsage gpu=*", "lost stands alone"),
        ("latency profile=b200", "the only profile is h200"),
        ('driver version="1', "a quote is not closed"),
    ],
)
def test_scenario_errors_stop_the_initialisation(
    library: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    with Shim(library, text, tmp_path):
        assert code_of(pynvml.nvmlInit) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    errors = capfd.readouterr().err
    assert sentence in errors
    assert errors.count("\n") == 1


def test_missing_scenario_file(library: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Shim(library, "", tmp_path) as shim:
        (tmp_path / "scenario.txt").unlink()
        shim.reset()
        assert code_of(pynvml.nvmlInit) == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert "cannot open it: No such file or directory" in capfd.readouterr().err


def test_leaving_restores_the_environment(library: Path, tmp_path: Path) -> None:
    before = os.environ.get("JOULETRACE_NVML_SHIM")
    with Shim(library, Scenario(), tmp_path):
        assert os.environ["JOULETRACE_NVML_SHIM"] == str(tmp_path / "scenario.txt")
    assert os.environ.get("JOULETRACE_NVML_SHIM") == before


# ---- speed: the benchmark of the daemon's cost must not measure the simulation ----


def test_calls_cost_microseconds(start: Start, library: Path) -> None:
    start(virtual=False, devices=[Device(power=Square(100, 600, 0.1))])
    loaded, handle, milliwatts = ctypes.CDLL(str(library)), gpu(), ctypes.c_uint()
    buffer, count, kind = (pynvml.c_nvmlSample_t * 119)(), ctypes.c_uint(119), ctypes.c_int()

    def best_us(call: Callable[[], object], repeat: int) -> float:
        rounds = []
        for _ in range(5):
            begin = time.thread_time_ns()
            for _ in range(repeat):
                call()
            rounds.append((time.thread_time_ns() - begin) / repeat / 1e3)
        return min(rounds)

    def read_ring() -> None:
        count.value = 119
        loaded.nvmlDeviceGetSamples(handle, 0, ctypes.c_ulonglong(0), ctypes.byref(kind), ctypes.byref(count), buffer)

    # generous bounds for a busy machine: about 0.4 and 6 us on a quiet one, ctypes included
    assert best_us(lambda: loaded.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)), 2000) < 5
    assert best_us(read_ring, 500) < 50
