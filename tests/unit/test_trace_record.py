import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jouletrace.gpu.readings import (
    DeviceInfo,
    DeviceLostError,
    GpuError,
    HealthReading,
    PowerReading,
    ProcessReading,
    UnsupportedError,
)
from jouletrace.gpu.replay import ReplayDevice, ReplaySource
from jouletrace.trace.analyze import analyze
from jouletrace.trace.record import RecordedFile, record
from jouletrace.trace.recording import Recording, RecordingError, Stream, read, write

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
S = 1_000_000_000


class SteppedClock:
    """Time that passes only by waiting; can call out when it gets somewhere."""

    def __init__(self) -> None:
        self.t_ns = 2_000_000_000 * S
        self.at: list[tuple[int, Callable[[], None]]] = []

    def now_ns(self) -> int:
        return self.t_ns

    def from_wall(self, wall_ns: int) -> int:
        return wall_ns

    def to_wall(self, steady_ns: int) -> int:
        return steady_ns

    def wall_step_ns(self) -> int:
        return 0

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        self.t_ns = max(self.t_ns, until_ns)
        for t_ns, action in list(self.at):
            if self.t_ns >= t_ns:
                self.at.remove((t_ns, action))
                action()


def opened(path: Path = DEMO) -> tuple[ReplaySource, ReplayDevice, SteppedClock]:
    clock = SteppedClock()
    source = ReplaySource(path, clock=clock)
    (device,) = source.open()
    assert isinstance(device, ReplayDevice)
    return source, device, clock


def wait_for_the_saver() -> None:
    """The minute's writing runs beside the reading, in real time."""
    for thread in threading.enumerate():
        if thread.name == "record-save":
            thread.join()


def recorded(path: Path, seconds: float) -> RecordedFile:
    source, device, _ = opened()
    (result,) = record(source, [device], path, stop=threading.Event(), seconds=seconds)
    return result


class PowerOnly:
    """A GPU with nothing but power readings, which can fail."""

    def __init__(self, clock: SteppedClock, gpu: int = 0) -> None:
        self.info = DeviceInfo(f"GPU-{gpu}", gpu, "Old GPU", "470.1")
        self.clock = clock
        self.failure: GpuError | None = None
        self.milliwatts = 50_000

    def power(self) -> PowerReading:
        if self.failure:
            raise self.failure
        return PowerReading(self.clock.now_ns(), instant_mw=self.milliwatts)

    def health(self) -> HealthReading:
        processes = (ProcessReading(7, 2**30), ProcessReading(8, None, 0.25))
        return HealthReading(self.clock.now_ns(), processes if self.milliwatts > 50_000 else ())

    def lacks(self) -> object:
        raise UnsupportedError("call", 3, "NOT_SUPPORTED")

    power_ring = energy_counter = activity = state = lacks


def test_what_is_recorded_is_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json.gz"
    result = recorded(path, 60)
    assert result == RecordedFile(path, pytest.approx(62.4, abs=0.3), "")
    demo, copy = read(DEMO), read(path)
    assert copy.meta["format"] == 1
    assert copy.meta["gpu"] == "NVIDIA H200"
    assert copy.meta["enforced_limit_mw"] == 700_000
    assert copy.meta["fb_total_mib"] == 143_771
    assert copy.meta["uuid"].startswith("REPLAY-")
    assert sorted(copy.streams) == [
        "energy_counter",
        "gpm_100ms",
        "memory_power_average",
        "power_average",
        "power_instant",
        "power_ring_20ms",
        "state_100ms",
        "violation_1s",
    ]
    ring, source = copy.streams["power_ring_20ms"], demo.streams["power_ring_20ms"]
    # The replay begins when all sensors have begun; the ring then reaches back 2.36 s.
    first = int(np.flatnonzero(source.values["mw"] == ring.values["mw"][0])[0])
    assert first < 5
    assert ring.values["mw"].tolist() == source.values["mw"][first : first + len(ring)].tolist()
    assert np.diff(ring.t_ns).tolist() == np.diff(source.t_ns)[first : first + len(ring) - 1].tolist()
    # 488 changes of the value in this minute of the original; 20 Hz miss hardly any.
    assert len(copy.streams["power_instant"]) == pytest.approx(488, abs=5)
    assert set(copy.streams["state_100ms"].values) == set(demo.streams["state_100ms"].values)
    gpm = copy.streams["gpm_100ms"]
    assert set(gpm.values) < set(demo.streams["gpm_100ms"].values)
    assert np.diff(gpm.t_ns).min() >= S // 10


def test_the_energy_of_a_recorded_replay_is_the_recording_s(tmp_path: Path) -> None:
    path = tmp_path / "x.json.gz"
    recorded(path, 60)
    result = analyze(read(path))
    assert result["energy_source"] == "power_ring"
    assert result["energy_joules"] == pytest.approx(result["counter_joules"], rel=2e-3)
    # The same minute in the original, by its own counter.
    demo = read(DEMO)
    counter = demo.streams["energy_counter"]
    begin_ns = demo.streams["power_ring_20ms"].t_ns[0]
    mine = read(path).streams["energy_counter"].t_ns - read(path).streams["power_ring_20ms"].t_ns[0] + begin_ns
    truth = np.interp(mine[[0, -1]], counter.t_ns, counter.values["mj"]) / 1e3
    assert result["energy_joules"] == pytest.approx(truth[1] - truth[0], rel=2e-3)


def test_a_recording_of_a_recording_replays_the_same(tmp_path: Path) -> None:
    recorded(tmp_path / "a.json.gz", 20)
    source, device, _ = opened(tmp_path / "a.json.gz")
    record(source, [device], tmp_path / "b.json.gz", stop=threading.Event(), seconds=10)
    first, second = read(tmp_path / "a.json.gz"), read(tmp_path / "b.json.gz")
    assert second.meta == first.meta
    original, ring = (one.streams["power_ring_20ms"].values["mw"].tolist() for one in (first, second))
    assert len(ring) > 500
    assert ring in [original[skipped : skipped + len(ring)] for skipped in range(20)]


def test_at_speed_in_real_time(tmp_path: Path) -> None:
    source = ReplaySource(DEMO, speed=10)
    devices = source.open()
    record(source, devices, tmp_path / "x.json.gz", stop=threading.Event(), seconds=5)
    result = analyze(read(tmp_path / "x.json.gz"))
    assert result["energy_joules"] == pytest.approx(result["counter_joules"], rel=0.02)


def test_stop_finishes_the_file(tmp_path: Path) -> None:
    source, device, clock = opened()
    stop = threading.Event()
    clock.at.append((clock.t_ns + 7 * S, stop.set))
    (result,) = record(source, [device], tmp_path / "x.json.gz", stop=stop)
    assert result.problem == ""
    ring = read(tmp_path / "x.json.gz").streams["power_ring_20ms"]
    assert (ring.t_ns[-1] - ring.t_ns[0]) / S == pytest.approx(2.36 + 7, abs=0.1)


def test_a_lost_device_ends_its_file_with_the_reason(tmp_path: Path) -> None:
    source, _, clock = opened()
    one, other = PowerOnly(clock, 0), PowerOnly(clock, 1)

    def lose() -> None:
        one.failure = DeviceLostError("nvmlDeviceGetFieldValues", 15, "GPU_IS_LOST")

    def work() -> None:
        other.milliwatts = 60_000

    clock.at += [(clock.t_ns + 5 * S, lose), (clock.t_ns + 6 * S, work)]
    lost, fine = record(source, [one, other], tmp_path / "x.json.gz", stop=threading.Event(), seconds=9)
    assert lost.path.name == "x-gpu0.json.gz"
    assert "GPU 0 was lost" in lost.problem
    assert [event["kind"] for event in read(lost.path).events] == ["error"]
    assert fine == RecordedFile(tmp_path / "x-gpu1.json.gz", pytest.approx(9, abs=0.1), "")
    instant = read(fine.path).streams["power_instant"]
    assert instant.values["mw"].tolist() == [50_000, 60_000]
    processes = read(fine.path).streams["processes"]
    np.testing.assert_array_equal(processes.values["pid"][:1], [np.nan])
    assert processes.values["pid"][-2:].tolist() == [7, 8]
    assert list(read(fine.path).streams) == ["power_instant", "processes"]


def test_a_passing_failure_is_noted_once(tmp_path: Path) -> None:
    source, _, clock = opened()
    device = PowerOnly(clock)

    def fail() -> None:
        device.failure = GpuError("call", 999, "UNKNOWN")

    def recover() -> None:
        device.failure, device.milliwatts = None, 70_000

    clock.at += [(clock.t_ns + 2 * S, fail), (clock.t_ns + 3 * S, recover)]
    (result,) = record(source, [device], tmp_path / "x.json.gz", stop=threading.Event(), seconds=4)
    assert result.problem == ""
    copy = read(result.path)
    assert [event["error"] for event in copy.events] == ["call: UNKNOWN (code 999)"]
    assert copy.streams["power_instant"].values["mw"].tolist() == [50_000, 70_000]


def test_the_file_is_whole_all_the_time(tmp_path: Path) -> None:
    source, device, clock = opened()
    path = tmp_path / "x.json.gz"
    begin_ns, seen = clock.t_ns, []

    def look() -> None:
        wait_for_the_saver()
        ring = read(path).streams["power_ring_20ms"]
        seen.append((ring.t_ns[-1] - begin_ns) / S)

    clock.at += [(begin_ns + 1 * S, look), (begin_ns + 65 * S, look), (begin_ns + 125 * S, look)]
    record(source, [device], path, stop=threading.Event(), seconds=130)
    assert seen == [pytest.approx(0, abs=0.1), pytest.approx(60, abs=1), pytest.approx(120, abs=1)]


def test_a_crash_of_the_recorder_loses_nothing(tmp_path: Path) -> None:
    source, device, clock = opened()

    def crash() -> None:
        raise KeyboardInterrupt

    clock.at.append((clock.t_ns + 5 * S, crash))
    with pytest.raises(KeyboardInterrupt):
        record(source, [device], tmp_path / "x.json.gz", stop=threading.Event())
    assert (read(tmp_path / "x.json.gz").streams["power_ring_20ms"].t_ns[-1] - clock.t_ns) / S > -1


def test_a_disk_that_fills_up_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, device, clock = opened()
    path = tmp_path / "x.json.gz"

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_up() -> None:
        wait_for_the_saver()
        monkeypatch.setattr(os, "fsync", refuse)

    clock.at.append((clock.t_ns + 70 * S, fill_up))
    (result,) = record(source, [device], path, stop=threading.Event(), seconds=80)
    assert "No space left on device" in result.problem
    ring = read(path).streams["power_ring_20ms"]
    assert (ring.t_ns[-1] - ring.t_ns[0]) / S == pytest.approx(62, abs=1)
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_before_it_starts(tmp_path: Path) -> None:
    source, device, clock = opened()
    path = tmp_path / "x.json.gz"
    path.write_text("mine")
    with pytest.raises(RecordingError, match="exists already"):
        record(source, [device], path, stop=threading.Event(), seconds=1)
    assert path.read_text() == "mine"
    with pytest.raises(RecordingError, match="could not be written"):
        record(source, [device], tmp_path / "away" / "x.json.gz", stop=threading.Event(), seconds=1)
    blind = PowerOnly(clock)
    blind.failure = UnsupportedError("call", 3, "NOT_SUPPORTED")
    blind.health = lambda: HealthReading(0)
    with pytest.raises(RecordingError, match="nothing to record of GPU 0"):
        record(source, [blind], tmp_path / "y.json.gz", stop=threading.Event(), seconds=1)
    assert not (tmp_path / "y.json.gz").exists()


def test_an_hour_of_the_ring_is_written_and_read(tmp_path: Path) -> None:
    t_ns = 1_000 * S + np.arange(180_000) * 20_000_000
    ring = Stream(t_ns, {"mw": np.resize([100_000.0, 300_000.0, 123_456.0], len(t_ns))})
    write(tmp_path / "hour.json.gz", Recording({}, {"power_ring_20ms": ring}))
    assert len(read(tmp_path / "hour.json.gz").streams["power_ring_20ms"]) == 180_000
