"""The daemon's own energy account, run offline over a recording."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.gpu.readings import CounterReading, DeviceInfo, Float64s, Int64s, PowerReading, PowerSamples
from jouletrace.requests.calibrate import Calibration, CalibrationRefusedError, fit
from jouletrace.requests.law import Law
from jouletrace.trace.account import Account
from jouletrace.trace.events import Fidelity, Span, samples, steady_phases, step_windows
from jouletrace.trace.recording import (
    ENERGY_COUNTER,
    FORMAT,
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
CUT_NS = 600 * NS
"""A window is added up in pieces of this length, as it may be longer than the timeline is deep (900 s)."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A named span of a recording: (start_ns, end_ns]."""

    name: str
    labels: Mapping[str, Any]
    start_ns: int
    end_ns: int


@dataclass(slots=True)
class _Window:
    """Energy of (start_ns, end_ns], added up while the timeline grows."""

    start_ns: int
    end_ns: int
    joules: float = 0.0
    low: float = 0.0
    high: float = 0.0
    covered_ns: int = 0

    def add(self, meter: Meter, from_ns: int, to_ns: int) -> None:
        """Add the part of the window that falls into (from_ns, to_ns]."""
        start_ns, end_ns = max(self.start_ns, from_ns), min(self.end_ns, to_ns)
        energy = meter.window(start_ns, end_ns) if start_ns < end_ns else None
        if energy is not None:
            self.joules += energy.joules
            self.low += energy.low
            self.high += energy.high
            self.covered_ns += energy.covered_ns


def analyze(recording: Recording, *, fidelity: Fidelity = Fidelity.STEPS, law: Law | None = None) -> dict[str, Any]:
    """Return the energy of a recording, of each of its phases and of each of its requests, ready for JSON.

    Keys: `format`, `gpu`, `energy_joules` and `counter_joules` (both from the first to the last counter row
    that the energy source spans; without a counter the whole span and `None`), `energy_source`, `phases`
    (name, labels, start_ns, end_ns, energy_joules, low, high, average_watts), `requests` (id, tenant,
    energy_joules, low, high, prefill_joules, decode_joules, method), `ledger` (attributed_joules, idle_joules by
    bare and parked, unattributed_joules, device_joules = `energy_joules`, residual_joules) and `warnings`, sentences.
    Requests are split by `law`, or else by the one fitted to the recording's own steady phases, if it has any.
    Raises RecordingError when the recording holds neither power nor energy, or an event that makes no sense.
    """
    info = device_info(recording)
    source = energy_source(recording)
    first_ns, last_ns = _span(recording, source)
    phases, warnings = phases_of(recording)
    if not phases:
        phases = [Phase("recording", {}, first_ns, last_ns)]
    counter = _valid_rows(recording, ENERGY_COUNTER, "mj")
    counted = counter.between(first_ns, last_ns)
    whole = _Window(int(counted.t_ns[0]), int(counted.t_ns[-1])) if counted else _Window(first_ns, last_ns)
    windows = [_Window(phase.start_ns, phase.end_ns) for phase in phases]
    law = law or _own_law(recording, fidelity)
    account = Account(recording, info, fidelity=fidelity, law=law, start_ns=whole.start_ns, end_ns=whole.end_ns)
    meter = _meter(recording, source, info)
    _run(meter, recording, [whole, *windows], account)
    results = [_phase_result(*pair, warnings) for pair in zip(phases, windows, strict=True)]
    _warn_of_sensors(meter, warnings)
    return {
        "format": FORMAT,
        "gpu": {
            "name": info.name,
            "uuid": info.uuid,
            "driver_version": info.driver_version,
            "memory_total_bytes": info.memory_total_bytes,
            "power_limit_watts": info.power_limit_watts,
        },
        "energy_source": meter.source.value,
        "energy_joules": whole.joules,
        "counter_joules": counted.rise() / 1e3 if counted else None,
        "phases": results,
        **account.results(),
        "warnings": warnings,
    }


def calibrate(recording: Recording, fidelity: Fidelity = Fidelity.STEPS) -> Calibration:
    """Return the step-energy law of a recording: from its steady phases, or else from windows of its steps.

    With boundaries alone the steps are not looked at. Raises CalibrationRefusedError with the reason why the
    recording cannot tell, and RecordingError when its energy is not known.
    """
    try:
        return fit(samples(*_energies(recording, steady_phases(recording))))
    except CalibrationRefusedError:
        windows = step_windows(recording) if fidelity is Fidelity.STEPS else []
        if not windows:
            raise
    return fit(samples(*_energies(recording, windows)))


def _own_law(recording: Recording, fidelity: Fidelity) -> Law | None:
    try:
        return calibrate(recording, fidelity).law
    except CalibrationRefusedError:
        return None


def _energies(recording: Recording, spans: Sequence[Span]) -> tuple[Sequence[Span], Sequence[float | None]]:
    """Return spans and the energy of each, joules; None for one that is not wholly known."""
    if not spans:
        return spans, []
    windows = [_Window(span.start_ns, span.end_ns) for span in spans]
    _run(_meter(recording, energy_source(recording), device_info(recording)), recording, windows)
    known = [
        window.joules if window.covered_ns == span.end_ns - span.start_ns else None
        for window, span in zip(windows, spans, strict=True)
    ]
    return spans, known


def energy_source(recording: Recording) -> EnergySource:
    """Return the best rung of the sensor ladder that a recording holds; RecordingError without any."""
    ladder = (
        (POWER_RING, "mw", EnergySource.POWER_RING),
        (ENERGY_COUNTER, "mj", EnergySource.ENERGY_COUNTER),
        (POWER_INSTANT, "mw", EnergySource.POWER_POLLING),
        (POWER_AVERAGE, "mw", EnergySource.POWER_AVERAGE),
    )
    for stream, column, source in ladder:
        if _valid_rows(recording, stream, column):
            return source
    raise RecordingError(
        f"{recording.name}: holds two readings of neither power nor energy, so there is nothing to add up; "
        "record it again on a GPU whose power `jouletrace doctor` can read"
    )


def phases_of(recording: Recording) -> tuple[list[Phase], list[str]]:
    """Return the phases by start, and a sentence for each start or end event that has no partner.

    An end belongs to the latest open start of the same name, so phases may repeat and nest. A start without
    an end lasts until the next phase starts, or else to the end of the recording.
    """
    starts = [event for event in recording.events if event["kind"] == "phase_start"]
    ends_ns: dict[int, int] = {}
    open_by_name: dict[str, list[int]] = {}
    warnings = []
    opened = 0
    for event in recording.events:
        if event["kind"] == "phase_start":
            open_by_name.setdefault(event["phase"], []).append(opened)
            opened += 1
        elif event["kind"] == "phase_end":
            waiting = open_by_name.get(event["phase"])
            if waiting:
                ends_ns[waiting.pop()] = event["t_ns"]
            else:
                warnings.append(f"A phase_end of {event['phase']} at {event['t_ns']} has no start: ignored.")
    recording_end_ns = _last_ns(recording)
    phases = []
    for number, start in enumerate(starts):
        end_ns = ends_ns.get(number)
        if end_ns is None:
            following = (other["t_ns"] for other in starts[number + 1 :])
            end_ns = next(following, max(recording_end_ns, start["t_ns"]))
            warnings.append(f"Phase {start['phase']} at {start['t_ns']} has no end: taken to last until {end_ns}.")
        labels = {key: value for key, value in start.items() if key not in ("t_ns", "kind", "phase")}
        phases.append(Phase(start["phase"], labels, start["t_ns"], end_ns))
    return phases, warnings


def render_table(result: Mapping[str, Any]) -> str:
    """Return the result of `analyze` as lines: one a phase, then the whole and the warnings."""
    rows = [("phase", "seconds", "watts", "joules", "low", "high")]
    for phase in result["phases"]:
        joules, watts = phase["energy_joules"], phase["average_watts"]
        rows.append(
            (
                " ".join([phase["name"], *(f"{key}={value}" for key, value in phase["labels"].items())]),
                f"{(phase['end_ns'] - phase['start_ns']) / NS:.2f}",
                "-" if watts is None else f"{watts:.1f}",
                f"{joules:,.1f}",
                _percent(phase["low"], joules),
                _percent(phase["high"], joules),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    gpu, energy, counter = result["gpu"], result["energy_joules"], result["counter_joules"]
    lines += ["", f"{gpu['name']}  {gpu['uuid']}  driver {gpu['driver_version'] or 'unknown'}"]
    total = f"energy {energy:,.1f} J from {result['energy_source']}"
    if counter:
        total += f"; hardware counter {counter:,.1f} J ({100 * (energy / counter - 1):+.3f} %)"
    lines += _account_lines(result)
    lines.append(total)
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def _account_lines(result: Mapping[str, Any]) -> list[str]:
    """Return where the joules went, in a line, and the requests by method."""
    ledger = result["ledger"]
    lines = [
        f"requests {ledger['attributed_joules']:,.1f} J, parked {ledger['idle_joules']['parked']:,.1f} J, "
        f"bare idle {ledger['idle_joules']['bare']:,.1f} J, nobody {ledger['unattributed_joules']:,.1f} J"
    ]
    methods = Counter(one["method"] for one in result["requests"])
    return lines + [f"{count} requests by {method}" for method, count in methods.most_common()]


def _percent(bound_joules: float, joules: float) -> str:
    return f"{100 * (bound_joules / joules - 1):+.2f} %" if joules else "-"


# -------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one column that hold a value: times and values, shapes (n,)."""

    t_ns: Int64s
    values: Float64s

    def __bool__(self) -> bool:
        """Return whether a span of time lies between two rows."""
        return len(self.t_ns) >= 2

    def between(self, first_ns: int, last_ns: int) -> "_Rows":
        """Return the rows at first_ns to last_ns, both included."""
        part = slice(*np.searchsorted(self.t_ns, [first_ns, last_ns + 1]))
        return _Rows(self.t_ns[part], self.values[part])

    def after(self, t_ns: int, until_ns: int) -> "_Rows":
        """Return the rows in (t_ns, until_ns]."""
        return self.between(t_ns + 1, until_ns)

    def rise(self) -> float:
        """Return by how much a counter rose, leaving out where it was set back."""
        steps = np.diff(self.values)
        return float(steps[steps > 0].sum())


def _valid_rows(recording: Recording, name: str, column: str) -> _Rows:
    stream = recording.streams.get(name)
    if stream is None:
        return _Rows(np.empty(0, np.int64), np.empty(0))
    valid = np.isfinite(stream.values[column])
    return _Rows(stream.t_ns[valid], stream.values[column][valid])


def _last_ns(recording: Recording) -> int:
    return max(int(stream.t_ns[-1]) for stream in recording.streams.values() if len(stream))


def _span(recording: Recording, source: EnergySource) -> tuple[int, int]:
    """Return from when to when the source's readings reach."""
    if source is EnergySource.POWER_RING:
        rows = _valid_rows(recording, POWER_RING, "mw")
    elif source is EnergySource.ENERGY_COUNTER:
        rows = _valid_rows(recording, ENERGY_COUNTER, "mj")
    else:
        # Stored on change: the last value holds until the recording ends.
        name = POWER_INSTANT if source is EnergySource.POWER_POLLING else POWER_AVERAGE
        return int(_valid_rows(recording, name, "mw").t_ns[0]), _last_ns(recording)
    return int(rows.t_ns[0]), int(rows.t_ns[-1])


# -------------------------------------------------------------------- running the meter


def _meter(recording: Recording, source: EnergySource, info: DeviceInfo) -> Meter:
    return Meter(
        source,
        limit_watts=info.power_limit_watts,
        architecture=info.architecture,
        has_counter=len(_valid_rows(recording, ENERGY_COUNTER, "mj").t_ns) > 0,
    )


def _run(meter: Meter, recording: Recording, windows: Sequence[_Window], account: Account | None = None) -> None:
    """Feed the recording to the meter, add up the windows' energies and keep the account."""
    cut_ns: int | None = None

    def add_up_to_now() -> None:
        nonlocal cut_ns
        if meter.timeline is not None:
            from_ns = meter.timeline.start_ns if cut_ns is None else cut_ns
            cut_ns = meter.timeline.end_ns
            for window in windows:
                window.add(meter, from_ns, cut_ns)

    for _ in _feed(meter, recording):
        if account is not None and meter.timeline is not None:
            account.advance(meter.timeline)
        if meter.timeline is not None and meter.timeline.end_ns - (cut_ns or meter.timeline.start_ns) >= CUT_NS:
            add_up_to_now()
    meter.flush()
    add_up_to_now()
    if account is not None and meter.timeline is not None:
        account.close(meter.timeline)


def _feed(meter: Meter, recording: Recording) -> Iterator[None]:
    """Give the meter what the daemon would have given it, second by second."""
    ring = _valid_rows(recording, POWER_RING, "mw")
    counter = _valid_rows(recording, ENERGY_COUNTER, "mj")
    source = meter.source
    start_ns, end_ns = _span(recording, source)
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


def _feed_counter_and_power(meter: Meter, recording: Recording, counter: _Rows, then_ns: int, now_ns: int) -> None:
    readings: list[CounterReading | PowerReading] = list(_polled(recording, then_ns, now_ns))
    readings += (_counter_reading(counter, at) for at in range(len(counter.t_ns)))
    for reading in sorted(readings, key=lambda one: one.t_ns):
        if isinstance(reading, CounterReading):
            meter.add_counter(reading)
        else:
            meter.add_power(reading)


def _counter_reading(counter: _Rows, at: int) -> CounterReading:
    return CounterReading(int(counter.t_ns[at]), int(counter.values[at]), 0)


def _polled(recording: Recording, then_ns: int, until_ns: int) -> Iterator[PowerReading]:
    """Yield what polling would have shown in (then_ns, until_ns]: each value holds until the next."""
    times = np.arange(then_ns + POWER_INTERVAL_NS, until_ns + 1, POWER_INTERVAL_NS)
    columns = []
    for name in (POWER_INSTANT, POWER_AVERAGE):
        rows = _valid_rows(recording, name, "mw")
        at = np.searchsorted(rows.t_ns, times, side="right") - 1
        columns.append([None if i < 0 else int(rows.values[i]) for i in at])
    for t_ns, instant_mw, average_mw in zip(times.tolist(), *columns, strict=True):
        yield PowerReading(t_ns, instant_mw, average_mw)


# -------------------------------------------------------------------- results


def _phase_result(phase: Phase, window: _Window, warnings: list[str]) -> dict[str, Any]:
    seconds, covered = (phase.end_ns - phase.start_ns) / NS, window.covered_ns / NS
    # A sample's width: what a phase that begins or ends with the recording may lack at its edges.
    if covered < seconds - 0.1:
        warnings.append(
            f"Phase {phase.name} at {phase.start_ns} lasts {seconds:.2f} s, "
            f"but energy is known for {covered:.2f} s of it only."
        )
    return {
        "name": phase.name,
        "labels": dict(phase.labels),
        "start_ns": phase.start_ns,
        "end_ns": phase.end_ns,
        "energy_joules": window.joules,
        "low": window.low,
        "high": window.high,
        "average_watts": window.joules / covered if covered else None,
    }


def _warn_of_sensors(meter: Meter, warnings: list[str]) -> None:
    if meter.gap_seconds:
        warnings.append(f"{meter.gap_seconds:.2f} s have no samples: filled from the energy counter or by estimate.")
    if meter.rejected_samples:
        warnings.append(f"{meter.rejected_samples} readings were out of range and left out.")
    if meter.counter_resets:
        warnings.append(f"The energy counter was set back {meter.counter_resets} times.")
