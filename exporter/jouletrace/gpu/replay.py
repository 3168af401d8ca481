"""A recording that stands in for a GPU: the same calls and limits, its values at the times they were seen."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from jouletrace.clock import Clock, SystemClock
from jouletrace.gpu.readings import (
    ActivityReading,
    CallStatistics,
    CounterReading,
    Device,
    DeviceInfo,
    DeviceLostError,
    GpuError,
    HealthReading,
    Int64s,
    Pipe,
    PowerReading,
    PowerSamples,
    ProcessReading,
    StateReading,
    ThrottleReason,
    UnsupportedError,
    XidEvent,
)
from jouletrace.trace import recording as trace

Reading = TypeVar("Reading")
Key = TypeVar("Key")

RING_DEPTH_NS = 2_360_000_000
"""How far back the driver's ring reaches (measured on an H200, 118 samples of 20 ms)."""
GPM_MINIMUM_NS = 100_000_000
"""Below 100 ms between two GPM samples the percentages are wrong (nvml.h)."""
START_SKEW_NS = 5_000_000_000
"""A stream that begins later than this after the others is one that failed at first: it is not waited for."""
END_GRACE_NS = 2_000_000_000
"""The device stays this long after its end, so that a ring harvested each second is read to its end."""
_STEADY_STREAMS = (
    trace.POWER_RING,
    trace.ENERGY_COUNTER,
    trace.POWER_INSTANT,
    trace.POWER_AVERAGE,
    trace.GPM,
    trace.STATE,
)
"""Streams that a replay waits for at its start; the first that a recording has says when it ends."""
_STREAMS = frozenset({*_STEADY_STREAMS, trace.MEMORY_POWER_AVERAGE, trace.VIOLATION, trace.PROCESSES})
_NOT_SUPPORTED, _GPU_IS_LOST, _NOT_READY = 3, 15, 27  # nvmlReturn_t of nvml.h


class ReplayClock:
    """A live machine's clock that runs `speed` times as fast from its making on."""

    def __init__(self, speed: float = 1.0) -> None:
        if not (math.isfinite(speed) and speed > 0):
            raise ValueError(f"a replay's speed must be above 0, not {speed}")
        self._speed = speed
        self._system = SystemClock()
        self._begin_ns = self._system.now_ns()

    def now_ns(self) -> int:
        """Return replay time in epoch nanoseconds; never goes back."""
        return self._faster(self._system.now_ns())

    def from_wall(self, wall_ns: int) -> int:
        """Return the replay time of a wall-clock stamp."""
        return self._faster(self._system.from_wall(wall_ns))

    def to_wall(self, steady_ns: int) -> int:
        """Return the wall-clock time of a replay time."""
        return self._system.to_wall(self._begin_ns + round((steady_ns - self._begin_ns) / self._speed))

    def wall_step_ns(self) -> int:
        """Return how far the wall clock has been set since the start."""
        return self._system.wall_step_ns()

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        """Sleep until the replay time `until_ns` or until `wake` is set."""
        wake.wait(max(0.0, (until_ns - self.now_ns()) / 1e9 / self._speed))

    def _faster(self, system_ns: int) -> int:
        return self._begin_ns + round((system_ns - self._begin_ns) * self._speed)


@dataclass(frozen=True, slots=True)
class Course:
    """How recording time lies on replay time: (begin_ns, end_ns] of the recording, once or lap after lap."""

    begin_ns: int
    end_ns: int
    origin_ns: int
    """Replay time of `begin_ns`."""
    loop: bool

    @property
    def lap_ns(self) -> int:
        """How long one lap lasts."""
        return self.end_ns - self.begin_ns

    def position(self, replay_ns: int) -> tuple[int, int]:
        """Return the lap and the recording time that a replay time falls into."""
        elapsed = replay_ns - self.origin_ns
        if not self.loop or elapsed < 0:
            return 0, self.begin_ns + min(elapsed, self.lap_ns)
        lap, rest = divmod(elapsed, self.lap_ns)
        return lap, self.begin_ns + rest

    def to_replay(self, recording_ns: int, lap: int = 0) -> int:
        """Return the replay time of a recording time in a lap."""
        return self.origin_ns + lap * self.lap_ns + recording_ns - self.begin_ns

    def ended(self, replay_ns: int) -> bool:
        """Return whether the recording has been over for long enough that its last readings were taken."""
        return not self.loop and replay_ns > self.to_replay(self.end_ns) + END_GRACE_NS


class _Track:
    """One stream on replay time.

    Its rows are numbered through all laps: 0 is the first row after the course's begin, negative numbers are
    the rows before it, which only the first lap can look back to.
    """

    def __init__(self, stream: trace.Stream, course: Course) -> None:
        self.values = stream.values
        self._t_ns = stream.t_ns
        self._course = course
        self.before, past = (int(i) for i in np.searchsorted(stream.t_ns, [course.begin_ns, course.end_ns], "right"))
        """Rows up to the begin."""
        self._per_lap = past - self.before
        steps = np.diff(np.unique(stream.t_ns))
        self._period_ns = int(np.median(steps)) if len(steps) else course.lap_ns

    def count(self, replay_ns: int) -> int:
        """Return the number that the next row after a replay time has."""
        lap, recording_ns = self._course.position(replay_ns)
        at = int(np.searchsorted(self._t_ns, recording_ns, "right")) - self.before
        return lap * self._per_lap + min(at, self._per_lap)

    def latest(self, replay_ns: int) -> int | None:
        """Return the number of the newest row at a replay time."""
        number = self.count(replay_ns) - 1
        return number if number >= -self.before else None

    def fresh(self, replay_ns: int) -> int | None:
        """Return the newest row's number, None once a stream that stopped is two of its periods behind."""
        number = self.latest(replay_ns)
        if number is None or self.rows(number) + 1 < self.before + self._per_lap:
            return number
        return number if replay_ns - self.time(number) <= 2 * self._period_ns else None

    def laps(self, number: int) -> int:
        """Return the lap that a row belongs to."""
        return max(0, number) // self._per_lap if self._per_lap else 0

    def rows(self, number: int) -> int:
        """Return a row's index in the stream."""
        return self.before + number - self.laps(number) * self._per_lap

    def time(self, number: int) -> int:
        """Return a row's replay time."""
        return self._course.to_replay(int(self._t_ns[self.rows(number)]), self.laps(number))

    def span(self, first: int, end: int) -> tuple[Int64s, Int64s]:
        """Return replay times and indices of the rows numbered [first, end), shapes (n,)."""
        numbers = np.arange(first, end)
        laps = np.maximum(numbers, 0) // max(1, self._per_lap)
        rows = self.before + numbers - laps * self._per_lap
        return self._t_ns[rows] + (self._course.origin_ns - self._course.begin_ns + laps * self._course.lap_ns), rows

    def value(self, column: str, number: int) -> float | None:
        """Return one cell, None when it holds nothing."""
        values = self.values.get(column)
        if values is None:
            return None
        value = float(values[self.rows(number)])
        return None if math.isnan(value) else value

    def rise(self, column: str) -> int:
        """Return by how much a held counter rises in a lap."""
        values = self.values[column][max(0, self.before - 1) : self.before + self._per_lap]
        given = values[np.isfinite(values)]
        return max(0, int(given[-1] - given[0])) if len(given) else 0

    def together(self, number: int) -> range:
        """Return the numbers of the rows that share a row's time."""
        t_ns = self._t_ns[self.rows(number)]
        first = int(np.searchsorted(self._t_ns, t_ns, "left"))
        return range(number - (self.rows(number) - first), number + 1)


class ReplayDevice:
    """The recorded GPU. Readings after the end of a recording that does not loop raise DeviceLostError."""

    def __init__(
        self,
        info: DeviceInfo,
        streams: Mapping[str, trace.Stream],
        course: Course,
        clock: Clock,
        calls: CallStatistics,
    ) -> None:
        self.info = info
        self._course = course
        self._clock = clock
        self._calls = calls
        self._tracks = {name: _Track(stream, course) for name, stream in streams.items()}
        self._ring_next: int | None = None
        self._activity_next: dict[bool, int | None] = {False: None, True: None}
        counter = streams.get(trace.ENERGY_COUNTER)
        self._counter_rise_mj = 0 if counter is None else _rise_mj(counter, course)

    def power_ring(self) -> PowerSamples:
        """Return the recorded samples that are due; those older than the driver's ring is deep are gone."""
        return self._timed("ring", self._power_ring)

    def energy_counter(self) -> CounterReading:
        """Return the newest recorded reading of the counter, with its own time and cost."""
        return self._timed("counter", self._energy_counter)

    def power(self) -> PowerReading:
        """Return the recorded power values, each held until the next."""
        return self._timed("power", self._power)

    def activity(self) -> ActivityReading | None:
        """Return the means of the recorded intervals since the last reading."""
        return self._timed("activity", lambda: self._activity(graphics=False))

    def graphics_activity(self) -> ActivityReading | None:
        """Return the recorded part of the time with any kernel running, since the last such reading."""
        return self._timed("graphics", lambda: self._activity(graphics=True))

    def state(self) -> StateReading:
        """Return the recorded clocks, temperatures, memory and throttle state."""
        return self._timed("state", self._state)

    def processes(self) -> Sequence[ProcessReading] | None:
        """Return the recorded processes."""
        return self._timed("processes", lambda: self._health().processes)

    def health(self) -> HealthReading:
        """Return the recorded processes and the power limit."""
        return self._timed("health", self._health)

    def _timed(self, call: str, read: Callable[[], Reading]) -> Reading:
        started = time.perf_counter()
        try:
            return read()
        finally:
            self._calls.add(call, time.perf_counter() - started)

    def _now_ns(self, call: str) -> int:
        """Return the time that a reading is of: now, but not after the recording's end."""
        now_ns = self._clock.now_ns()
        if self._course.ended(now_ns):
            raise DeviceLostError(call, _GPU_IS_LOST, "the recording has ended")
        return now_ns if self._course.loop else min(now_ns, self._course.to_replay(self._course.end_ns))

    def _track(self, call: str, *names: str) -> _Track:
        for name in names:
            if name in self._tracks:
                return self._tracks[name]
        raise UnsupportedError(call, _NOT_SUPPORTED, "not in the recording")

    def _power_ring(self) -> PowerSamples:
        track = self._track("ring", trace.POWER_RING)
        now_ns = self._now_ns("ring")
        oldest = track.count(now_ns - RING_DEPTH_NS)
        first = oldest if self._ring_next is None else max(oldest, self._ring_next)
        self._ring_next = max(first, track.count(now_ns))
        ends_ns, rows = track.span(first, self._ring_next)
        return PowerSamples(ends_ns, track.values["mw"][rows])

    def _energy_counter(self) -> CounterReading:
        track = self._track("counter", trace.ENERGY_COUNTER)
        number = track.latest(self._now_ns("counter"))
        if number is None:
            raise GpuError("counter", _NOT_READY, "not yet in the recording")
        return CounterReading(
            track.time(number),
            int(track.value("mj", number) or 0) + track.laps(number) * self._counter_rise_mj,
            int((track.value("call_us", number) or 0) * 1_000),
        )

    def _power(self) -> PowerReading:
        if trace.POWER_INSTANT not in self._tracks:
            self._track("power", trace.POWER_AVERAGE)
        now_ns = self._now_ns("power")

        def held(name: str) -> int | None:
            track = self._tracks.get(name)
            number = None if track is None else track.latest(now_ns)
            value = None if track is None or number is None else track.value("mw", number)
            return None if value is None else int(value)

        reading = PowerReading(
            now_ns, held(trace.POWER_INSTANT), held(trace.POWER_AVERAGE), held(trace.MEMORY_POWER_AVERAGE)
        )
        if reading.instant_mw is None and reading.average_mw is None:
            raise GpuError("power", _NOT_READY, "no value in the recording now")
        return reading

    def _activity(self, *, graphics: bool) -> ActivityReading | None:
        track = self._track("activity", trace.GPM)
        end = track.count(self._now_ns("activity"))
        first, self._activity_next[graphics] = self._activity_next[graphics], end
        if first is None or first <= -track.before:
            # As with the driver, the first call only begins an interval.
            return None
        if end <= first or track.time(end - 1) - track.time(first - 1) < GPM_MINIMUM_NS:
            self._activity_next[graphics] = first
            return None
        times_ns, rows = track.span(first - 1, end)
        weights = np.diff(times_ns).astype(np.float64)

        def mean(column: str, factor: float) -> float | None:
            values = track.values.get(column)
            if values is None:
                return None
            given = np.isfinite(values[rows[1:]])
            if not given.any():
                return None
            return factor * float(np.average(values[rows[1:]][given], weights=weights[given]))

        if graphics:
            busy = {Pipe.GRAPHICS: mean(trace.PIPE_COLUMNS[Pipe.GRAPHICS], 1e-2)}
            return ActivityReading(int(times_ns[0]), int(times_ns[-1]), busy_ratio=_given(busy))
        busy = {pipe: mean(column, 1e-2) for pipe, column in trace.PIPE_COLUMNS.items() if pipe is not Pipe.GRAPHICS}
        links = {link: mean(column, 2.0**20) for link, column in trace.LINK_COLUMNS.items()}
        return ActivityReading(
            int(times_ns[0]), int(times_ns[-1]), mean(trace.DRAM_COLUMN, 1e-2), _given(busy), _given(links)
        )

    def _state(self) -> StateReading:
        if trace.STATE not in self._tracks:
            self._track("state", trace.VIOLATION)
        now_ns = self._now_ns("state")
        state, throttled = self._tracks.get(trace.STATE), self._tracks.get(trace.VIOLATION)
        number = state.fresh(now_ns) if state else None

        def cell(column: str, factor: float = 1.0) -> float | None:
            value = None if state is None or number is None else state.value(column, number)
            return None if value is None else value * factor

        reasons, memory_bytes = cell("clock_event_reasons"), cell("fb_used_mib", 2.0**20)
        return StateReading(
            now_ns,
            _given({domain: cell(column, 1e6) for domain, column in trace.CLOCK_COLUMNS.items()}),
            None if reasons is None else int(reasons),
            _throttled_ns(throttled, now_ns) if throttled else {},
            _given({sensor: cell(column) for sensor, column in trace.TEMPERATURE_COLUMNS.items()}),
            None if memory_bytes is None else int(memory_bytes),
            _given({kind: cell(column, 1e-2) for kind, column in trace.UTILIZATION_COLUMNS.items()}),
        )

    def _health(self) -> HealthReading:
        now_ns = self._now_ns("health")
        track = self._tracks.get(trace.PROCESSES)
        number = track.fresh(now_ns) if track else None
        processes = None if track is None or number is None else _processes(track, number)
        return HealthReading(now_ns, processes, power_limit_watts=self.info.power_limit_watts)


class ReplaySource:
    """A recording in the place of the driver: one device, at `speed` times real time, once or in a loop.

    `clock` replaces the `ReplayClock` that the source makes.
    """

    name = "replay"

    def __init__(
        self,
        path: str | os.PathLike[str],
        speed: float = 1.0,
        loop: bool = False,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.clock: Clock = clock or ReplayClock(speed)
        self.calls = CallStatistics()
        self.course: Course | None = None
        """How the recording lies on replay time; None until `open`."""
        self._path = path
        self._loop = loop
        self._closed = threading.Event()
        self._make_device: Callable[[], ReplayDevice] | None = None

    def open(self) -> Sequence[Device]:
        """Read the recording and start it; raises RecordingError when the file cannot be replayed."""
        recording = _replayable(trace.read(self._path, _STREAMS))
        begin_ns, end_ns = _replayed_span(recording)
        self.course = course = Course(begin_ns, end_ns, self.clock.now_ns(), self._loop)
        info = trace.device_info(recording)
        self._make_device = partial(ReplayDevice, info, recording.streams, course, self.clock, self.calls)
        return [self._make_device()]

    def reopen_device(self, uuid: str) -> Device:
        """Return the device anew; raises DeviceLostError after the recording's end and for any other UUID."""
        device = self._make_device() if self._make_device else None
        if device is None or device.info.uuid != uuid:
            raise DeviceLostError("reopen", _GPU_IS_LOST, "not in the recording")
        device.health()
        return device

    def watch_events(self, devices: Sequence[Device]) -> None:
        """Watch nothing: recordings hold no errors."""

    def events(self, timeout_seconds: float) -> Sequence[XidEvent]:
        """Return no errors after waiting: recordings hold none."""
        self._closed.wait(timeout_seconds)
        return ()

    def close(self) -> None:
        """Stop; `events` returns at once from now on."""
        self._closed.set()


def _replayed_span(recording: trace.Recording) -> tuple[int, int]:
    """Return the recording time of the first moment at which all streams have begun, and that of the end."""
    found = [recording.streams[name] for name in _STEADY_STREAMS if name in recording.streams]
    if found:
        firsts = [int(stream.t_ns[0]) for stream in found]
        begin_ns = max(t_ns for t_ns in firsts if t_ns - min(firsts) <= START_SKEW_NS)
        end_ns = int(found[0].t_ns[-1])
        if end_ns > begin_ns:
            return begin_ns, end_ns
    raise trace.RecordingError(
        f"{recording.name}: is too short to be replayed; record at least a few seconds with power or energy"
    )


def _replayable(recording: trace.Recording) -> trace.Recording:
    """Return the recording without empty streams and without ring and counter rows that hold no value."""
    streams = {}
    for name, stream in recording.streams.items():
        column = {trace.POWER_RING: "mw", trace.ENERGY_COUNTER: "mj"}.get(name)
        given = np.ones(len(stream), np.bool_) if column is None else np.isfinite(stream.values[column])
        if given.all():
            kept = stream
        else:
            kept = trace.Stream(stream.t_ns[given], {key: cells[given] for key, cells in stream.values.items()})
        if len(kept):
            streams[name] = kept
    return replace(recording, streams=streams)


def _rise_mj(counter: trace.Stream, course: Course) -> int:
    """Return by how many millijoules the counter rises in a lap.

    Between rows it is interpolated, so that a lap's energy does not depend on where the last tick fell.
    """
    ends_ns = np.array([course.begin_ns, course.end_ns]) - course.begin_ns
    energies = np.interp(ends_ns, counter.t_ns - course.begin_ns, counter.values["mj"])
    return max(0, round(float(energies[1] - energies[0])))


def _given(values: Mapping[Key, float | None]) -> dict[Key, float]:
    return {key: value for key, value in values.items() if value is not None}


def _throttled_ns(track: _Track, now_ns: int) -> dict[ThrottleReason, int]:
    number = track.fresh(now_ns)
    found: dict[ThrottleReason, int] = {}
    for reason, column in trace.THROTTLE_COLUMNS.items():
        value = None if number is None else track.value(column, number)
        if number is not None and value is not None:
            found[reason] = int(value) + track.laps(number) * track.rise(column)
    return found


def _processes(track: _Track, number: int) -> tuple[ProcessReading, ...]:
    """Return the processes of one look; a row without a pid says that there were none."""
    found = []
    for row in track.together(number):
        pid, memory_bytes = track.value("pid", row), track.value("memory_bytes", row)
        if pid is not None:
            memory = None if memory_bytes is None else int(memory_bytes)
            found.append(ProcessReading(int(pid), memory, track.value("sm_ratio", row)))
    return tuple(found)
