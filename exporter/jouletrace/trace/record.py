"""Write trace format 1 from any source of readings, losing nothing that was read."""

import contextlib
import math
import os
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jouletrace import __version__
from jouletrace.clock import Clock
from jouletrace.gpu.readings import (
    Device,
    DeviceLostError,
    DriverGoneError,
    DriverMismatchError,
    Float64s,
    GpuError,
    Int64s,
    Source,
    ThrottleReason,
    UnsupportedError,
)
from jouletrace.trace import recording as trace

MS = 1_000_000
SAVE_INTERVAL_NS = 60_000 * MS
"""At most this much is lost when the machine fails."""
_STATE_COLUMNS = (
    *trace.CLOCK_COLUMNS.values(),
    "clock_event_reasons",
    *trace.UTILIZATION_COLUMNS.values(),
    *trace.TEMPERATURE_COLUMNS.values(),
    "fb_used_mib",
)


@dataclass(frozen=True, slots=True)
class Rates:
    """How often each sensor is read, nanoseconds. The defaults cost about 2 % of a core on an H200."""

    power_ns: int = 50 * MS
    """20 Hz: twice for each refresh of the power sensors (100 ms on an H200)."""
    ring_ns: int = 500 * MS
    """The driver's ring is 2.36 s deep."""
    counter_ns: int = 1_000 * MS
    """One read costs 2-25 ms."""
    activity_ns: int = 101 * MS
    """GPM needs 100 ms between two samples."""
    state_ns: int = 100 * MS
    throttle_ns: int = 1_000 * MS
    """Of the state readings, those kept as throttle times."""
    health_ns: int = 5_000 * MS


DEFAULT_RATES = Rates()


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """What became of one device's recording."""

    path: Path
    seconds: float
    """Time between its first and last reading."""
    problem: str = ""
    """One sentence when the recording ended early or is not whole on the disk."""


def record(
    source: Source,
    devices: Sequence[Device],
    path: str | os.PathLike[str],
    *,
    stop: threading.Event,
    seconds: float | None = None,
    rates: Rates = DEFAULT_RATES,
) -> list[RecordedFile]:
    """Record the devices until `stop` is set or `seconds` of the source's time are over; one file a device.

    With several devices `x.json.gz` becomes `x-gpu0.json.gz` and so on. The files are complete on the disk
    from the start on and are replaced by longer ones each minute; a lost device ends its own file only.
    Raises RecordingError when a file exists already, cannot be written, or a device has no sensor to record.
    """
    clock = source.clock
    recordings = [_DeviceRecording(device, _device_path(Path(path), device, devices), rates) for device in devices]
    for one in recordings:
        if one.path.exists():
            raise trace.RecordingError(f"{one.path}: exists already; remove it or name another file")
    for one in recordings:
        one.read_due(clock)
        snapshot = one.snapshot()
        if not snapshot.streams:
            reason = one.problem or "none of its sensors could be read; see `jouletrace doctor`"
            raise trace.RecordingError(f"{one.path}: nothing to record of GPU {one.device.info.gpu}: {reason}")
        trace.write(one.path, snapshot)
    end_ns = None if seconds is None else clock.now_ns() + round(seconds * 1e9)
    saver = _Saver(recordings)
    save_due_ns = clock.now_ns() + SAVE_INTERVAL_NS
    try:
        while not stop.is_set():
            due_ns = min((one.due_ns for one in recordings if one.sensors), default=None)
            if due_ns is None:
                break
            clock.wait(due_ns if end_ns is None else min(due_ns, end_ns), stop)
            if stop.is_set() or (end_ns is not None and clock.now_ns() >= end_ns):
                break
            for one in recordings:
                one.read_due(clock)
            if clock.now_ns() >= save_due_ns and saver.start():
                save_due_ns = clock.now_ns() + SAVE_INTERVAL_NS
        for one in recordings:
            one.read_all(clock)
    finally:
        saver.finish()
    return [one.result() for one in recordings]


class _Table:
    """A growing stream: 8 bytes a cell."""

    def __init__(self, *columns: str) -> None:
        self._t_ns = array("q")
        self._cells = {name: array("d") for name in columns}

    @property
    def last_ns(self) -> int:
        """Time of the last row; before the first row, a time before all."""
        return self._t_ns[-1] if self._t_ns else -1

    def add(self, t_ns: int, *rows: Mapping[str, float | None]) -> None:
        """Append rows of one time, unless it is not newer than the last; missing cells hold no value."""
        if t_ns <= self.last_ns:
            return
        for row in rows:
            self._t_ns.append(t_ns)
            for name, column in self._cells.items():
                value = row.get(name)
                column.append(math.nan if value is None else value)

    def extend(self, t_ns: Int64s, values: Float64s) -> None:
        """Append newer rows of a one-column stream."""
        (column,) = self._cells.values()
        newer = t_ns > self.last_ns
        self._t_ns.frombytes(t_ns[newer].astype(np.int64).tobytes())
        column.frombytes(values[newer].astype(np.float64).tobytes())

    def latest(self, name: str) -> float | None:
        """Return the last row's cell."""
        return self._cells[name][-1] if self._t_ns else None

    def stream(self, required: Sequence[str]) -> trace.Stream | None:
        """Return a copy without the columns that never had a value; None when nothing is left."""
        columns = {name: np.array(cells, np.float64) for name, cells in self._cells.items()}
        kept = {name: cells for name, cells in columns.items() if name in required or np.isfinite(cells).any()}
        return trace.Stream(np.array(self._t_ns, np.int64), kept) if self._t_ns and kept else None


@dataclass(slots=True, eq=False)
class _Sensor:
    """One read that is done again and again."""

    interval_ns: int
    read: Callable[[], None]
    due_ns: int = 0
    failing: bool = False


class _DeviceRecording:
    """What was read of one device so far."""

    def __init__(self, device: Device, path: Path, rates: Rates) -> None:
        self.device = device
        self.path = path
        self.problem = ""
        self._throttle_ns = rates.throttle_ns
        self._slow_throttled_ns: Mapping[ThrottleReason, int] = {}
        self._events: list[dict[str, Any]] = []
        self._tables = {
            trace.POWER_RING: _Table("mw"),
            trace.POWER_INSTANT: _Table("mw"),
            trace.POWER_AVERAGE: _Table("mw"),
            trace.MEMORY_POWER_AVERAGE: _Table("mw"),
            trace.ENERGY_COUNTER: _Table("mj", "call_us"),
            trace.GPM: _Table(*trace.PIPE_COLUMNS.values(), trace.DRAM_COLUMN, *trace.LINK_COLUMNS.values()),
            trace.STATE: _Table(*_STATE_COLUMNS),
            trace.VIOLATION: _Table(*trace.THROTTLE_COLUMNS.values()),
            trace.PROCESSES: _Table("pid", "memory_bytes", "sm_ratio"),
        }
        self.sensors = [
            _Sensor(rates.counter_ns, self._read_counter),
            _Sensor(rates.ring_ns, self._read_ring),
            _Sensor(rates.power_ns, self._read_power),
            _Sensor(rates.activity_ns, self._read_activity),
            _Sensor(rates.state_ns, self._read_state),
            _Sensor(rates.health_ns, self._read_health),
        ]
        """Those that the device has; empty once it is gone."""

    @property
    def due_ns(self) -> int:
        """When the next sensor is due."""
        return min(sensor.due_ns for sensor in self.sensors)

    def read_due(self, clock: Clock) -> None:
        """Read the sensors that are due."""
        for sensor in list(self.sensors):
            if sensor.due_ns <= clock.now_ns():
                self._read(sensor, clock)

    def read_all(self, clock: Clock) -> None:
        """Read every sensor once more, so that all streams reach the end."""
        for sensor in list(self.sensors):
            self._read(sensor, clock)

    def snapshot(self) -> trace.Recording:
        """Return a copy of what was read so far."""
        info = self.device.info
        meta = {
            "gpu": info.name,
            "uuid": info.uuid,
            "driver": info.driver_version,
            "architecture": info.architecture,
            "enforced_limit_mw": _scaled(info.power_limit_watts, 1e3),
            "default_limit_mw": _scaled(info.default_power_limit_watts, 1e3),
            "max_sm_mhz": _scaled(info.max_sm_clock_hertz, 1e-6),
            "peak_dram_bytes_per_second": _scaled(info.peak_dram_bytes_per_second, 1),
            "fb_total_mib": _scaled(info.memory_total_bytes, 2.0**-20),
            "jouletrace": __version__,
        }
        found = {name: table.stream(trace.REQUIRED_COLUMNS.get(name, ())) for name, table in self._tables.items()}
        streams = {name: stream for name, stream in found.items() if stream is not None}
        return trace.Recording({key: value for key, value in meta.items() if value}, streams, tuple(self._events))

    def result(self) -> RecordedFile:
        """Return what became of the recording."""
        streams = self.snapshot().streams.values()
        seconds = (max(s.t_ns[-1] for s in streams) - min(s.t_ns[0] for s in streams)) / 1e9 if streams else 0.0
        return RecordedFile(self.path, float(seconds), self.problem)

    def _read(self, sensor: _Sensor, clock: Clock) -> None:
        if sensor not in self.sensors:
            return
        try:
            sensor.read()
            sensor.failing = False
        except UnsupportedError:
            self.sensors.remove(sensor)
        except (DeviceLostError, DriverGoneError, DriverMismatchError) as error:
            self._note(clock, error)
            self.problem = f"GPU {self.device.info.gpu} was lost ({error}): the recording ends there."
            self.sensors.clear()
        except GpuError as error:
            if not sensor.failing:
                self._note(clock, error)
            sensor.failing = True
        sensor.due_ns = clock.now_ns() + sensor.interval_ns

    def _note(self, clock: Clock, error: GpuError) -> None:
        self._events.append({"t_ns": clock.now_ns(), "kind": "error", "error": str(error)})

    def _read_ring(self) -> None:
        samples = self.device.power_ring()
        self._tables[trace.POWER_RING].extend(samples.ends_ns, samples.milliwatts)

    def _read_counter(self) -> None:
        reading = self.device.energy_counter()
        cells = {"mj": reading.energy_mj, "call_us": reading.call_ns // 1_000}
        self._tables[trace.ENERGY_COUNTER].add(reading.t_ns, cells)

    def _read_power(self) -> None:
        reading = self.device.power()
        for name, milliwatts in (
            (trace.POWER_INSTANT, reading.instant_mw),
            (trace.POWER_AVERAGE, reading.average_mw),
            (trace.MEMORY_POWER_AVERAGE, reading.memory_average_mw),
        ):
            table = self._tables[name]
            latest = table.latest("mw")
            known = latest is not None and not math.isnan(latest)
            # Stored on change; losing the value is a change, too.
            if milliwatts != latest if milliwatts is not None else known:
                table.add(reading.t_ns, {"mw": milliwatts})

    def _read_activity(self) -> None:
        reading = self.device.activity()
        if reading is None:
            return
        # The same interval within microseconds; its 2 ms a read are what a recording costs.
        graphics = self.device.graphics_activity()
        busy_ratio = {**(graphics.busy_ratio if graphics else {}), **reading.busy_ratio}
        table = self._tables[trace.GPM]
        if table.last_ns < reading.start_ns:
            # A row is the mean since the row before: the first interval's beginning needs a row of its own.
            table.add(reading.start_ns, {})
        cells: dict[str, float | None] = {trace.DRAM_COLUMN: _scaled(reading.dram_ratio, 1e2)}
        cells |= {trace.PIPE_COLUMNS[pipe]: _scaled(ratio, 1e2) for pipe, ratio in busy_ratio.items()}
        cells |= {trace.LINK_COLUMNS[link]: _scaled(rate, 2.0**-20) for link, rate in reading.bytes_per_second.items()}
        table.add(reading.end_ns, cells)

    def _read_state(self) -> None:
        reading = self.device.state()
        cells: dict[str, float | None] = {
            "clock_event_reasons": reading.event_reasons,
            "fb_used_mib": _scaled(reading.memory_used_bytes, 2.0**-20),
        }
        for domain, column in trace.CLOCK_COLUMNS.items():
            cells[column] = _scaled(reading.clock_hertz.get(domain), 1e-6)
        for sensor, column in trace.TEMPERATURE_COLUMNS.items():
            cells[column] = reading.temperature_celsius.get(sensor)
        for kind, column in trace.UTILIZATION_COLUMNS.items():
            cells[column] = _scaled(reading.utilization_ratio.get(kind), 1e2)
        self._tables[trace.STATE].add(reading.t_ns, cells)
        throttled = self._tables[trace.VIOLATION]
        throttled_ns = {**self._slow_throttled_ns, **reading.throttled_ns}
        if throttled_ns and reading.t_ns - throttled.last_ns >= self._throttle_ns:
            row = {trace.THROTTLE_COLUMNS[reason]: float(spent) for reason, spent in throttled_ns.items()}
            throttled.add(reading.t_ns, row)

    def _read_health(self) -> None:
        reading = self.device.health()
        self._slow_throttled_ns = reading.throttled_ns
        if reading.processes is None:
            return
        rows: list[dict[str, float | None]] = [
            {"pid": process.pid, "memory_bytes": process.memory_bytes, "sm_ratio": process.sm_ratio}
            for process in reading.processes
        ]
        # A row without a pid says that nobody was there.
        self._tables[trace.PROCESSES].add(reading.t_ns, *(rows or [{}]))


class _Saver:
    """Writes what was read so far, beside the reading: a long recording takes seconds to pack."""

    def __init__(self, recordings: Sequence[_DeviceRecording]) -> None:
        self._recordings = recordings
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Begin to write all files; False while the last writing still goes on."""
        if self._thread is not None and self._thread.is_alive():
            return False
        snapshots = [(one.path, one.snapshot()) for one in self._recordings]
        self._thread = threading.Thread(target=self._write, args=(snapshots,), name="record-save")
        self._thread.start()
        return True

    def finish(self) -> None:
        """Write all files a last time; what fails is told in the recording's problem."""
        if self._thread is not None:
            self._thread.join()
        for one in self._recordings:
            try:
                trace.write(one.path, one.snapshot())
            except trace.RecordingError as error:
                one.problem = " ".join([one.problem, f"{error}; what is there was saved earlier."]).strip()

    @staticmethod
    def _write(snapshots: Sequence[tuple[Path, trace.Recording]]) -> None:
        for path, snapshot in snapshots:
            # The disk may have room again in a minute; the last writing tells when it has not.
            with contextlib.suppress(trace.RecordingError):
                trace.write(path, snapshot)


def _device_path(path: Path, device: Device, devices: Sequence[Device]) -> Path:
    """Return the file of one device: its own path when it is alone, else with -gpuN before the suffixes."""
    if len(devices) == 1:
        return path
    suffix = ".json.gz" if path.name.endswith(".json.gz") else path.suffix
    stem = path.name.removesuffix(suffix) if suffix else path.name
    return path.with_name(f"{stem}-gpu{device.info.gpu}{suffix}")


def _scaled(value: float | None, factor: float) -> float | None:
    """Return a value in the recording's unit, without the last digits that the conversion made up."""
    return None if value is None else round(value * factor, 6)
