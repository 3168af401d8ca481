import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.stepped_clock import START_NS, SteppedClock

from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.gpu.readings import (
    CounterReading,
    DeviceLostError,
    Link,
    Pipe,
    PowerSamples,
    ProcessReading,
    ThrottleReason,
    UnsupportedError,
)
from jouletrace.gpu.replay import ReplayClock, ReplayDevice, ReplaySource
from jouletrace.trace.recording import Recording, RecordingError, Stream, read, write

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
S = 1_000_000_000
MS = 1_000_000


def opened(path: Path, *, loop: bool = False) -> tuple[ReplaySource, ReplayDevice, SteppedClock]:
    clock = SteppedClock()
    source = ReplaySource(path, loop=loop, clock=clock)
    (device,) = source.open()
    assert isinstance(device, ReplayDevice)
    return source, device, clock


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """10 s: 100 W in the first half of each second and 300 W in the second, all streams on even times."""

    def every(step_ns: int) -> np.ndarray:
        return 50 * S + np.arange(0, 10 * S + 1, step_ns)

    ring, tick, look = every(20 * MS), every(100 * MS), every(1 * S)
    halves = np.where((ring - 50 * S - 1) % S < S // 2, 100e3, 300e3)
    joules = np.concatenate(([0], np.cumsum(halves[1:] * 0.02)))
    counter = {"mj": 7e6 + joules[::5], "call_us": np.full(len(tick), 2_200.0)}
    percent = np.where((tick - 50 * S - 1) % S < S // 2, 20.0, 60.0)
    occupancy = np.where(np.arange(len(tick)) % 2, 40.0, np.nan)
    streams = {
        "power_ring_20ms": Stream(ring, {"mw": halves}),
        "energy_counter": Stream(tick, counter),
        "power_instant": Stream(tick[::5], {"mw": np.resize([100e3, 300e3], len(tick[::5]))}),
        "power_average": Stream(look, {"mw": np.full(len(look), 200e3)}),
        "gpm_100ms": Stream(tick, {"sm_util": percent, "sm_occupancy": occupancy, "pcie_tx_mib_s": percent}),
        "state_100ms": Stream(tick, {"sm_mhz": np.full(len(tick), 1_980.0), "fb_used_mib": percent}),
        "violation_1s": Stream(look, {"power_ns": np.arange(len(look)) * 4e8 + 5, "thermal_ns": look * 0.0}),
        "processes": Stream(
            np.array([50, 50, 54, 58]) * S,
            {"pid": np.array([10, 11, 12, np.nan]), "memory_bytes": np.array([1.0, np.nan, 3.0, np.nan])},
        ),
    }
    path = tmp_path / "short.json.gz"
    write(path, Recording({"gpu": "H", "uuid": "GPU-7", "enforced_limit_mw": 700_000}, streams))
    return path


def altered(path: Path, folder: Path, *without: str, **streams: Stream) -> Path:
    recording = read(path)
    kept = {name: stream for name, stream in recording.streams.items() if name not in without}
    write(folder / "altered.json.gz", replace(recording, streams={**kept, **streams}))
    return folder / "altered.json.gz"


def test_clock_runs_at_speed() -> None:
    clock = ReplayClock(100)
    begin, wall = clock.now_ns(), time.time_ns()
    assert abs(begin - wall) < S
    started = time.monotonic()
    clock.wait(begin + 2 * S, threading.Event())
    assert 0.015 <= time.monotonic() - started < 0.5
    assert clock.now_ns() >= begin + 2 * S
    later = begin + 10 * S
    assert abs(clock.from_wall(clock.to_wall(later)) - later) < 1_000
    woken = threading.Event()
    woken.set()
    clock.wait(clock.now_ns() + 10_000 * S, woken)


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_impossible_speeds(speed: float) -> None:
    with pytest.raises(ValueError, match="speed"):
        ReplayClock(speed)


def test_info_is_the_recorded_gpu() -> None:
    source, device, _ = opened(DEMO)
    assert source.name == "replay"
    assert device.info.name == "NVIDIA H200"
    assert device.info.power_limit_watts == 700
    assert device.info.peak_dram_bytes_per_second == pytest.approx(4.81e12, rel=1e-3)
    assert device.info.uuid == opened(DEMO)[1].info.uuid


def test_all_sensors_have_data_at_the_start() -> None:
    _, device, _ = opened(DEMO)
    assert len(device.power_ring().ends_ns) == pytest.approx(118, abs=3)
    # First row of the recording's counter.
    assert device.energy_counter().energy_mj == 2_232_936
    assert device.power().instant_mw == 79_559
    assert device.power().memory_average_mw == 43_148
    state = device.state()
    assert state.clock_hertz == {"sm": 375e6, "memory": 3_201e6}
    assert state.temperature_celsius == {"gpu": 40, "memory": 40}
    assert state.memory_used_bytes == 615 * 2**20
    assert device.health().power_limit_watts == 700


def test_the_ring_gives_each_sample_once(short: Path) -> None:
    _, device, clock = opened(short)
    assert device.power_ring().ends_ns.tolist() == [START_NS]
    assert len(device.power_ring().ends_ns) == 0
    clock.t_ns += S
    samples = device.power_ring()
    assert samples.ends_ns.tolist() == list(range(START_NS + 20 * MS, START_NS + S + 1, 20 * MS))
    assert samples.milliwatts.tolist() == [100e3] * 25 + [300e3] * 25


def test_a_late_reader_finds_a_gap(short: Path) -> None:
    _, device, clock = opened(short)
    device.power_ring()
    clock.t_ns += 6 * S
    samples = device.power_ring()
    assert int(samples.ends_ns[0]) == START_NS + 6 * S - 2_340 * MS
    assert int(samples.ends_ns[-1]) == START_NS + 6 * S


def test_the_counter_holds_its_last_tick(short: Path) -> None:
    _, device, clock = opened(short)
    clock.t_ns += 1_050 * MS
    assert device.energy_counter() == CounterReading(START_NS + S, 7_200_000, 2_200_000)


def test_activity_is_the_mean_since_the_last_reading(short: Path) -> None:
    _, device, clock = opened(short)
    assert device.activity() is None
    assert device.activity() is None
    clock.t_ns += 90 * MS
    assert device.activity() is None
    clock.t_ns += 710 * MS
    reading = device.activity()
    assert reading is not None
    assert (reading.start_ns, reading.end_ns) == (START_NS, START_NS + 800 * MS)
    # 500 ms of 20 % and 300 ms of 60 %; occupancy is 40 % wherever it is known.
    assert reading.busy_ratio == pytest.approx({Pipe.SM: 0.35, Pipe.SM_OCCUPANCY: 0.4})
    assert reading.bytes_per_second == pytest.approx({Link.PCIE_TRANSMIT: 35 * 2**20})
    assert reading.dram_ratio is None
    clock.t_ns += 100 * MS
    following = device.activity()
    assert following is not None
    assert following.start_ns == reading.end_ns


def test_state_and_processes(short: Path) -> None:
    _, device, clock = opened(short)
    processes = device.health().processes
    assert processes == (ProcessReading(10, 1), ProcessReading(11, None))
    clock.t_ns += 4_500 * MS
    assert device.health().processes == (ProcessReading(12, 3),)
    state = device.state()
    assert state.t_ns == clock.t_ns
    assert state.throttled_ns == {ThrottleReason.SW_POWER_CAP: 1_600_000_005, ThrottleReason.THERMAL: 0}
    assert state.clock_hertz == {"sm": 1.98e9}
    clock.t_ns += 4_000 * MS
    assert device.health().processes == ()


def test_the_end_is_a_lost_device(short: Path) -> None:
    source, device, clock = opened(short)
    clock.t_ns += 9_500 * MS
    device.power_ring()
    clock.t_ns += 1_500 * MS
    assert int(device.power_ring().ends_ns[-1]) == START_NS + 10 * S
    assert device.state().t_ns == START_NS + 10 * S
    clock.t_ns += 1_500 * MS
    for call in (device.power_ring, device.energy_counter, device.power, device.activity, device.state):
        with pytest.raises(DeviceLostError, match="the recording has ended"):
            call()
    with pytest.raises(DeviceLostError, match="the recording has ended"):
        source.reopen_device("GPU-7")


def test_a_device_can_be_opened_again(short: Path) -> None:
    source, _, clock = opened(short)
    clock.t_ns += 5 * S
    assert source.reopen_device("GPU-7").state().t_ns == clock.t_ns
    with pytest.raises(DeviceLostError):
        source.reopen_device("GPU-8")


def test_a_stream_that_stops_early_is_absent(short: Path, tmp_path: Path) -> None:
    state = read(short).streams["state_100ms"]
    cut = Stream(state.t_ns[:40], {name: cells[:40] for name, cells in state.values.items()})
    _, device, clock = opened(altered(short, tmp_path, state_100ms=cut))
    clock.t_ns += 4_050 * MS
    assert device.state().clock_hertz == {"sm": 1.98e9}
    clock.t_ns += 500 * MS
    assert device.state().clock_hertz == {}
    assert device.state().memory_used_bytes is None


def test_missing_streams_are_unsupported(short: Path, tmp_path: Path) -> None:
    def device_without(*names: str) -> ReplayDevice:
        return opened(altered(short, tmp_path, *names))[1]

    with pytest.raises(UnsupportedError, match="ring"):
        device_without("power_ring_20ms").power_ring()
    with pytest.raises(UnsupportedError, match="counter"):
        device_without("energy_counter").energy_counter()
    with pytest.raises(UnsupportedError, match="activity"):
        device_without("gpm_100ms").activity()
    with pytest.raises(UnsupportedError, match="state"):
        device_without("state_100ms", "violation_1s").state()
    with pytest.raises(UnsupportedError, match="power"):
        device_without("power_instant", "power_average").power()
    assert device_without("power_instant").power().average_mw == 200_000
    assert device_without("processes").health().processes is None


def test_a_loop_has_no_seam(short: Path) -> None:
    _, device, clock = opened(short, loop=True)
    ends, energies, throttled, activities = [], [], [], []
    for _ in range(65):
        samples = device.power_ring()
        ends += samples.ends_ns.tolist()
        energies.append(device.energy_counter().energy_mj)
        throttled.append(device.state().throttled_ns[ThrottleReason.SW_POWER_CAP])
        activity = device.activity()
        if activity:
            activities.append(activity)
        clock.t_ns += 500 * MS
    assert set(np.diff(ends).tolist()) == {20 * MS}
    # 100 W and 300 W by turns: 50 J and 150 J each half second, on and on.
    assert np.diff(energies).tolist() == [50_000, 150_000] * 32
    assert np.all(np.diff(throttled) >= 0)
    # 400 ms a second in three laps of 10 s and the two rows into the fourth.
    assert throttled[-1] - throttled[0] == 12_800_000_000
    assert all(b.start_ns == a.end_ns for a, b in itertools.pairwise(activities))
    assert {round(a.busy_ratio[Pipe.SM], 6) for a in activities} == {0.2, 0.6}


def test_the_looped_demo_agrees_with_its_counter() -> None:
    _, device, clock = opened(DEMO, loop=True)
    meter = Meter(EnergySource.POWER_RING, limit_watts=700)
    first, begin_ns = device.energy_counter(), clock.t_ns
    counter = first.energy_mj
    meter.add_ring(device.power_ring())
    for _ in range(850):
        clock.t_ns += 1 * S
        meter.add_ring(device.power_ring())
        reading = device.energy_counter()
        assert reading.energy_mj >= counter
        counter = reading.energy_mj
    # 850 s are 3.1 laps; their three seams leave no gap.
    assert meter.gap_seconds == 0
    energy = meter.window(begin_ns, reading.t_ns)
    assert energy is not None
    assert energy.joules == pytest.approx((counter - first.energy_mj) / 1e3, rel=1e-3)


def test_calls_are_counted(short: Path) -> None:
    source, device, _ = opened(short)
    device.power_ring()
    device.power_ring()
    device.state()
    assert source.calls.count == {"ring": 2, "state": 1}
    assert 0 < source.calls.seconds["ring"] < 0.1


def test_events_wait_and_end_with_the_source(short: Path) -> None:
    source, _, _ = opened(short)
    assert source.events(0.001) == ()
    source.close()
    started = time.monotonic()
    assert source.events(60) == ()
    assert time.monotonic() - started < 1


def test_unusable_recordings(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="there is no such file"):
        ReplaySource(tmp_path / "away").open()
    instant = PowerSamples(np.array([S]), np.array([5.0]))
    moment = Recording({}, {"power_instant": Stream(instant.ends_ns, {"mw": instant.milliwatts})})
    write(tmp_path / "moment.json.gz", moment)
    with pytest.raises(RecordingError, match="too short"):
        ReplaySource(tmp_path / "moment.json.gz").open()
