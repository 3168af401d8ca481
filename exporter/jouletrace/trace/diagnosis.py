"""The device side of the diagnosis, run offline over a recording."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from jouletrace.diagnosis.drivers import Driver, decompose, model_of
from jouletrace.diagnosis.signals import LEAST_SPAN_NS, DeviceSignals, align, merge
from jouletrace.diagnosis.verdicts import Hysteresis, Judgement, Verdict, judge
from jouletrace.energy.baseline import Baseline, holds_context
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import (
    ActivityReading,
    DeviceInfo,
    HealthReading,
    ProcessReading,
    StateReading,
    ThrottleReason,
)
from jouletrace.trace import metering
from jouletrace.trace.recording import (
    CLOCK_COLUMNS,
    DRAM_COLUMN,
    GPM,
    LINK_COLUMNS,
    PIPE_COLUMNS,
    PROCESSES,
    STATE,
    THROTTLE_COLUMNS,
    UTILIZATION_COLUMNS,
    VIOLATION,
    Recording,
    Stream,
    device_info,
)

Key = TypeVar("Key")

SPAN_NS = 1_000_000_000
"""How long the spans are that are diagnosed one by one, as in the daemon."""
GPM_INTERVAL_NS = 100_000_000
"""Length of the interval of a GPM row where there is no other row."""
LONGEST_INTERVAL_NS = 1_000_000_000
"""A row that comes later than this after the one before, and later than two usual rows, does not speak for the time
between them."""
EDGE_NS = 500_000_000
"""What is read this close to a phase's edge may be its neighbour's: GPM trails the work by up to 0.1 s and its
intervals reach over edges (H200: 95 % SM activity in an interval that ended 0.12 s after a matrix product did), and the
driver reports a power cap for up to 0.5 s after it (0x4 until 0.41 s after a mixed load, until 0.50 s after a product).
"""
LONG_EDGES = 6
"""A phase of so many edges is judged without them."""
AROUND_NS = 1_500_000_000
"""How far beyond a span the states are looked at: throttle counters are recorded each second."""


def series(recording: Recording) -> dict[str, Any]:
    """Return what a recording's device did, second by second, for a chart.

    Keys, all lists of the same length n: `times_ns` (ends of the spans, epoch nanoseconds; a span begins at the
    end before), `seconds` (their lengths), `watts` (mean power of each, None where it is not known), `verdict`
    (str; a second in which it changed has the one that won), `flags` (list of str); and `joules` (driver name ->
    joules of each span; they add up to `watts * seconds`).
    """
    device = RecordedDevice(recording, metering.whole_timeline(recording))
    coefficients = model_of(device.info.name, device.info.board_limit_watts).coefficients
    spans = device.signals(device.start_ns, device.end_ns)
    hysteresis = Hysteresis()
    judgements = [hysteresis.update(one) for one in spans]
    parts = [decompose(one, coefficients).joules for one in spans]
    return {
        "times_ns": [one.end_ns for one in spans],
        "seconds": [one.seconds for one in spans],
        "watts": [one.watts for one in spans],
        "verdict": [verdict.value for verdict in settled(judgements)],
        "flags": [[flag.value for flag in one.flags] for one in judgements],
        "joules": {driver.value: [part.get(driver, 0.0) for part in parts] for driver in Driver},
    }


def settled(judgements: Sequence[Judgement]) -> list[Verdict]:
    """Return each span's verdict once all is said: an unconfirmed one has that of the next that is confirmed."""
    found: list[Verdict] = []
    for count, one in enumerate(judgements, 1):
        if one.confirmed or count == len(judgements):
            found += [one.verdict] * (count - len(found))
    return found


@dataclass(frozen=True, slots=True)
class PhaseDiagnosis:
    """What `jouletrace analyze` says of a phase, under these keys."""

    drivers: Mapping[str, float]
    """Joules by driver; they add up to the energy of the phase as far as it is known."""
    verdict: str | None
    """None where neither power nor activity is known."""
    flags: Sequence[str]
    confidence: float | None
    evidence: Mapping[str, float | str]


class RecordedDevice:
    """A recording's readings as the daemon would have had them, and the diagnosis of any part of it."""

    def __init__(self, recording: Recording, timeline: Timeline | None) -> None:
        self.info: DeviceInfo = device_info(recording)
        self._timeline = timeline
        times_ns = [stream.t_ns for stream in recording.streams.values() if len(stream)]
        self.start_ns = min(int(t_ns[0]) for t_ns in times_ns) if timeline is None else timeline.start_ns
        """From here on the energy is known; without any, where the recording begins."""
        self.end_ns = max(int(t_ns[-1]) for t_ns in times_ns) if timeline is None else timeline.end_ns
        """Up to here."""
        self._gpm = recording.streams.get(GPM)
        spacings_ns = np.empty(0) if self._gpm is None else np.diff(self._gpm.t_ns)
        self._interval_ns = int(np.median(spacings_ns)) if len(spacings_ns) else GPM_INTERVAL_NS
        self._longest_ns = max(LONGEST_INTERVAL_NS, 2 * self._interval_ns)
        self._state = recording.streams.get(STATE)
        self._violation = recording.streams.get(VIOLATION)
        self._processes = recording.streams.get(PROCESSES)
        self._idle_watts = self._learn_idle()

    def diagnose(self, start_ns: int, end_ns: int) -> PhaseDiagnosis:
        """Return the diagnosis of (start_ns, end_ns]: drivers second by second, the verdict of the whole."""
        model = model_of(self.info.name, self.info.board_limit_watts)
        spans = self.signals(max(start_ns, self.start_ns), min(end_ns, self.end_ns))
        if not spans:
            spans = [self._align(start_ns, end_ns)]
        drivers: dict[str, float] = {}
        for one in spans:
            for driver, joules in decompose(one, model.coefficients, model.confidence).joules.items():
                drivers[driver.value] = drivers.get(driver.value, 0.0) + joules
        inside = self.signals(spans[0].start_ns + EDGE_NS, spans[-1].end_ns - EDGE_NS)
        is_long = spans[-1].end_ns - spans[0].start_ns >= LONG_EDGES * EDGE_NS
        whole = merge(inside if is_long else spans)
        if whole.watts is None and not whole.has_activity and not whole.utilization_ratio:
            return PhaseDiagnosis(drivers, None, [], None, {})
        judgement = judge(whole)
        return PhaseDiagnosis(
            drivers,
            judgement.verdict.value,
            [flag.value for flag in judgement.flags],
            judgement.confidence,
            {**judgement.evidence, "sentence": judgement.sentence},
        )

    @property
    def warnings(self) -> list[str]:
        """What its readings cannot tell, in sentences."""
        if self._gpm is None or any(one.has_activity for one in self.signals(self.start_ns, self.end_ns)):
            return []
        return [
            f"The recording has {len(self._gpm)} GPM rows, and none of them tells anything: verdicts are inferred from "
            "NVML's utilization and power, and what power goes to is unexplained."
        ]

    def signals(self, start_ns: int, end_ns: int) -> list[DeviceSignals]:
        """Return the signals of the seconds of (start_ns, end_ns], cut at the ends of GPM intervals."""
        edges = self._edges(start_ns, end_ns)
        return [self._align(*pair) for pair in pairwise(edges)]

    def _edges(self, start_ns: int, end_ns: int) -> list[int]:
        if end_ns <= start_ns:
            return []
        edges = [start_ns]
        ends_ns = np.empty(0, np.int64) if self._gpm is None else self._gpm.t_ns
        while (due_ns := edges[-1] + SPAN_NS) < end_ns:
            # The interval's end that is nearest to a second later, if there is one near.
            at = int(np.searchsorted(ends_ns, due_ns - GPM_INTERVAL_NS // 2))
            near = at < len(ends_ns) and ends_ns[at] <= due_ns + SPAN_NS // 2
            edge_ns = int(ends_ns[at]) if near else due_ns
            if edge_ns > end_ns - LEAST_SPAN_NS:
                break
            edges.append(edge_ns)
        return [*edges, end_ns]

    def _learn_idle(self) -> Mapping[str, float]:
        """Return the idle levels that the daemon would have learnt by the recording's end."""
        baseline = Baseline()
        self._idle_watts = {}
        for one in self.signals(self.start_ns, self.end_ns):
            ratios = [*one.busy_ratio.values(), *([] if one.dram_ratio is None else [one.dram_ratio])]
            if one.watts is not None:
                busiest = max(ratios, default=None)
                baseline.observe(one.end_ns, one.watts, context=one.held, busiest_ratio=busiest)
        return {kind.value: level.watts for kind, level in baseline.levels.items()}

    def _align(self, start_ns: int, end_ns: int) -> DeviceSignals:
        return align(
            start_ns,
            end_ns,
            info=self.info,
            timeline=self._timeline,
            readings=self._readings(start_ns, end_ns),
            states=self._states(start_ns - AROUND_NS, end_ns + AROUND_NS),
            healths=self._healths(end_ns),
            held=self._held(end_ns),
            idle_watts=self._idle_watts,
        )

    def _readings(self, start_ns: int, end_ns: int) -> list[ActivityReading]:
        gpm = self._gpm
        if gpm is None or not len(gpm):
            return []
        first, past = int(np.searchsorted(gpm.t_ns, start_ns, "right")), int(np.searchsorted(gpm.t_ns, end_ns))
        found = []
        for row in range(first, min(past + 1, len(gpm))):
            row_end_ns = int(gpm.t_ns[row])
            row_start_ns = int(gpm.t_ns[row - 1]) if row else row_end_ns - self._interval_ns
            if row_end_ns - row_start_ns > self._longest_ns:
                row_start_ns = row_end_ns - self._interval_ns
            found.append(
                ActivityReading(
                    row_start_ns,
                    row_end_ns,
                    _cell(gpm, DRAM_COLUMN, row, 1e-2),
                    _cells(gpm, PIPE_COLUMNS, row, 1e-2),
                    _cells(gpm, LINK_COLUMNS, row, 2.0**20),
                )
            )
        return found

    def _states(self, start_ns: int, end_ns: int) -> list[StateReading]:
        found = [
            StateReading(
                t_ns,
                clock_hertz=_cells(stream, CLOCK_COLUMNS, row, 1e6),
                event_reasons=_whole(_cell(stream, "clock_event_reasons", row)),
                throttled_ns=_throttled(stream, row),
                utilization_ratio=_cells(stream, UTILIZATION_COLUMNS, row, 1e-2),
            )
            for stream in (self._state, self._violation)
            if stream is not None
            for row, t_ns in _rows(stream, start_ns, end_ns)
        ]
        return sorted(found, key=lambda one: one.t_ns)

    def _healths(self, now_ns: int) -> list[HealthReading]:
        if self._processes is None:
            return []
        past = int(np.searchsorted(self._processes.t_ns, now_ns, "right"))
        if not past:
            return []
        t_ns = int(self._processes.t_ns[past - 1])
        pids = [_cell(self._processes, "pid", row) for row, _ in _rows(self._processes, t_ns - 1, now_ns)]
        return [HealthReading(t_ns, tuple(ProcessReading(int(pid)) for pid in pids if pid is not None))]

    def _held(self, now_ns: int) -> bool | None:
        processes = [one.processes for one in self._healths(now_ns)]
        count = len(processes[0]) if processes and processes[0] is not None else None
        used_mib = None
        if self._state is not None and len(self._state):
            row = max(int(np.searchsorted(self._state.t_ns, now_ns, "right")) - 1, 0)
            used_mib = _cell(self._state, "fb_used_mib", row, 2.0**20)
        return holds_context(count, _whole(used_mib), self.info.memory_total_bytes)


def _rows(stream: Stream, after_ns: int, until_ns: int) -> list[tuple[int, int]]:
    """Return indices and times of the rows in (after_ns, until_ns]."""
    first, past = (int(at) for at in np.searchsorted(stream.t_ns, [after_ns, until_ns], "right"))
    return list(zip(range(first, past), stream.t_ns[first:past].tolist(), strict=True))


def _cell(stream: Stream, column: str, row: int, factor: float = 1.0) -> float | None:
    values = stream.values.get(column)
    if values is None or not np.isfinite(values[row]):
        return None
    return float(values[row]) * factor


def _cells(stream: Stream, columns: Mapping[Key, str], row: int, factor: float) -> dict[Key, float]:
    return {key: value for key, column in columns.items() if (value := _cell(stream, column, row, factor)) is not None}


def _throttled(stream: Stream, row: int) -> dict[ThrottleReason, int]:
    return {reason: int(spent_ns) for reason, spent_ns in _cells(stream, THROTTLE_COLUMNS, row, 1.0).items()}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
