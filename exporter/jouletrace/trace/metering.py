"""A recording's power and energy readings, fed to the daemon's own meter second by second."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import CounterReading, DeviceInfo, Float64s, Int64s, PowerReading, PowerSamples
from jouletrace.trace.recording import (
    ENERGY_COUNTER,
    POWER_AVERAGE,
    POWER_INSTANT,
    POWER_RING,
    Recording,
    RecordingError,
    device_info,
)

NS = 1_000_000_000
RING_INTERVAL_NS = 1 * NS
"""How often the daemon harvests the ring (design section 4)."""
COUNTER_INTERVAL_NS = 10 * NS
"""How often the daemon reads the counter for its cross-check (design section 4)."""
POWER_INTERVAL_NS = 10_000_000
"""How often a polled power value is looked at: it changes every 20 to 100 ms, stored rows are its changes."""
UNBOUNDED_NS = 2**62
"""Depth of a timeline that forgets nothing."""


def energy_source(recording: Recording) -> EnergySource:
    """Return the best rung of the sensor ladder that a recording holds; RecordingError without any."""
    ladder = (
        (POWER_RING, "mw", EnergySource.POWER_RING),
        (ENERGY_COUNTER, "mj", EnergySource.ENERGY_COUNTER),
        (POWER_INSTANT, "mw", EnergySource.POWER_POLLING),
        (POWER_AVERAGE, "mw", EnergySource.POWER_AVERAGE),
    )
    for stream, column, source in ladder:
        if valid_rows(recording, stream, column):
            return source
    raise RecordingError(
        f"{recording.name}: holds two readings of neither power nor energy, so there is nothing to add up; "
        "record it again on a GPU whose power `jouletrace doctor` can read"
    )


def whole_timeline(recording: Recording) -> Timeline | None:
    """Return all of a recording's energy as a function of time, None when none of its readings makes sense.

    Raises RecordingError when it holds no readings of energy at all.
    """
    meter = new_meter(recording, energy_source(recording), device_info(recording))
    whole = Whole()
    for _ in feed(meter, recording):
        whole.follow(meter)
    meter.flush()
    whole.follow(meter)
    return whole.timeline


class Whole:
    """Keeps all of a meter's energy, of which the meter's own timeline only keeps the newest."""

    def __init__(self) -> None:
        self.timeline: Timeline | None = None
        """None as long as no reading made sense."""

    def follow(self, meter: Meter) -> None:
        """Take over what the meter has added since the last call, at most a timeline's depth."""
        if meter.timeline is None:
            return
        times_ns, joules = meter.timeline.nodes()
        if self.timeline is None:
            self.timeline = Timeline(int(times_ns[0]), depth_ns=UNBOUNDED_NS)
        first = int(np.searchsorted(times_ns, self.timeline.end_ns, "right"))
        self.timeline.extend(times_ns[first:], np.diff(joules[first - 1 :]))


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one column that hold a value: times and values, shapes (n,)."""

    t_ns: Int64s
    values: Float64s

    def __bool__(self) -> bool:
        """Return whether a span of time lies between two rows."""
        return len(self.t_ns) >= 2

    def between(self, first_ns: int, last_ns: int) -> "Rows":
        """Return the rows at first_ns to last_ns, both included."""
        part = slice(*np.searchsorted(self.t_ns, [first_ns, last_ns + 1]))
        return Rows(self.t_ns[part], self.values[part])

    def after(self, t_ns: int, until_ns: int) -> "Rows":
        """Return the rows in (t_ns, until_ns]."""
        return self.between(t_ns + 1, until_ns)

    def rise(self) -> float:
        """Return by how much a counter rose, leaving out where it was set back."""
        steps = np.diff(self.values)
        return float(steps[steps > 0].sum())


def valid_rows(recording: Recording, name: str, column: str) -> Rows:
    """Return the rows of a stream's column that hold a value; none when there is no such stream."""
    stream = recording.streams.get(name)
    if stream is None:
        return Rows(np.empty(0, np.int64), np.empty(0))
    valid = np.isfinite(stream.values[column])
    return Rows(stream.t_ns[valid], stream.values[column][valid])


def last_ns_of(recording: Recording) -> int:
    """Return the time of the recording's last row."""
    return max(int(stream.t_ns[-1]) for stream in recording.streams.values() if len(stream))


def span_of(recording: Recording, source: EnergySource) -> tuple[int, int]:
    """Return from when to when the source's readings reach."""
    if source is EnergySource.POWER_RING:
        rows = valid_rows(recording, POWER_RING, "mw")
    elif source is EnergySource.ENERGY_COUNTER:
        rows = valid_rows(recording, ENERGY_COUNTER, "mj")
    else:
        # Stored on change: the last value holds until the recording ends.
        name = POWER_INSTANT if source is EnergySource.POWER_POLLING else POWER_AVERAGE
        return int(valid_rows(recording, name, "mw").t_ns[0]), last_ns_of(recording)
    return int(rows.t_ns[0]), int(rows.t_ns[-1])


def new_meter(recording: Recording, source: EnergySource, info: DeviceInfo) -> Meter:
    """Return a meter as the daemon would make it for the recorded device."""
    return Meter(
        source,
        limit_watts=info.power_limit_watts,
        architecture=info.architecture,
        has_counter=len(valid_rows(recording, ENERGY_COUNTER, "mj").t_ns) > 0,
    )


def feed(meter: Meter, recording: Recording) -> Iterator[None]:
    """Give the meter what the daemon would have given it, second by second."""
    ring = valid_rows(recording, POWER_RING, "mw")
    counter = valid_rows(recording, ENERGY_COUNTER, "mj")
    source = meter.source
    start_ns, end_ns = span_of(recording, source)
    counter_due_ns = start_ns
    for now_ns in range(start_ns, end_ns + RING_INTERVAL_NS, RING_INTERVAL_NS):
        then_ns = now_ns - RING_INTERVAL_NS
        if source is EnergySource.POWER_RING:
            due = ring.after(then_ns, now_ns)
            meter.add_ring(PowerSamples(due.t_ns, due.values))
        elif source is EnergySource.ENERGY_COUNTER:
            _feed_counter_and_power(meter, recording, counter.after(then_ns, now_ns), then_ns, now_ns)
        else:
            for power in _polled(recording, then_ns, min(now_ns, end_ns)):
                meter.add_power(power)
        if source is not EnergySource.ENERGY_COUNTER and (now_ns >= counter_due_ns or meter.wants_counter):
            # What a read at now_ns would have found is in the first row from then on.
            at = int(np.searchsorted(counter.t_ns, now_ns))
            if at < len(counter.t_ns):
                meter.add_counter(_counter_reading(counter, at))
                counter_due_ns = now_ns + COUNTER_INTERVAL_NS
        yield


def _feed_counter_and_power(meter: Meter, recording: Recording, counter: Rows, then_ns: int, now_ns: int) -> None:
    readings: list[CounterReading | PowerReading] = list(_polled(recording, then_ns, now_ns))
    readings += (_counter_reading(counter, at) for at in range(len(counter.t_ns)))
    for reading in sorted(readings, key=lambda one: one.t_ns):
        if isinstance(reading, CounterReading):
            meter.add_counter(reading)
        else:
            meter.add_power(reading)


def _counter_reading(counter: Rows, at: int) -> CounterReading:
    return CounterReading(int(counter.t_ns[at]), int(counter.values[at]), 0)


def _polled(recording: Recording, then_ns: int, until_ns: int) -> Iterator[PowerReading]:
    """Yield what polling would have shown in (then_ns, until_ns]: each value holds until the next."""
    times = np.arange(then_ns + POWER_INTERVAL_NS, until_ns + 1, POWER_INTERVAL_NS)
    columns = []
    for name in (POWER_INSTANT, POWER_AVERAGE):
        rows = valid_rows(recording, name, "mw")
        at = np.searchsorted(rows.t_ns, times, side="right") - 1
        columns.append([None if i < 0 else int(rows.values[i]) for i in at])
    for t_ns, instant_mw, average_mw in zip(times.tolist(), *columns, strict=True):
        yield PowerReading(t_ns, instant_mw, average_mw)
