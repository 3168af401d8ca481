"""The daemon's own energy account, run offline over a recording."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jouletrace.energy.meter import Meter
from jouletrace.requests.calibrate import Calibration, CalibrationRefusedError, fit
from jouletrace.requests.law import Law
from jouletrace.trace.account import Account
from jouletrace.trace.diagnosis import RecordedDevice
from jouletrace.trace.events import Fidelity, Span, samples, steady_phases, step_windows
from jouletrace.trace.metering import NS, Whole, energy_source, feed, last_ns_of, new_meter, span_of, valid_rows
from jouletrace.trace.recording import ENERGY_COUNTER, FORMAT, Recording, device_info

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
    (name, labels, start_ns, end_ns, energy_joules, low, high, average_watts, drivers, verdict, flags, confidence,
    evidence; the energy, its bounds and the watts are None where nothing is known of it, and so are verdict and
    confidence where activity is not known either), `requests` (id, tenant,
    energy_joules, low, high, prefill_joules, decode_joules, method), `ledger` (attributed_joules, idle_joules by
    bare and parked, unattributed_joules, device_joules = `energy_joules`, residual_joules) and `warnings`, sentences.
    Requests are split by `law`, or else by the one fitted to the recording's own steady phases, if it has any.
    Raises RecordingError when the recording holds neither power nor energy, or an event that makes no sense.
    """
    info = device_info(recording)
    source = energy_source(recording)
    first_ns, last_ns = span_of(recording, source)
    phases, warnings = phases_of(recording)
    if not phases:
        phases = [Phase("recording", {}, first_ns, last_ns)]
    counter = valid_rows(recording, ENERGY_COUNTER, "mj")
    counted = counter.between(first_ns, last_ns)
    whole = _Window(int(counted.t_ns[0]), int(counted.t_ns[-1])) if counted else _Window(first_ns, last_ns)
    windows = [_Window(phase.start_ns, phase.end_ns) for phase in phases]
    law = law or _own_law(recording, fidelity)
    account = Account(recording, info, fidelity=fidelity, law=law, start_ns=whole.start_ns, end_ns=whole.end_ns)
    meter = new_meter(recording, source, info)
    curve = Whole()
    _run(meter, recording, [whole, *windows], account, curve)
    device = RecordedDevice(recording, curve.timeline)
    results = [
        {**_phase_result(phase, window, warnings), **asdict(device.diagnose(phase.start_ns, phase.end_ns))}
        for phase, window in zip(phases, windows, strict=True)
    ]
    _warn_of_sensors(meter, warnings)
    warnings += [*account.warnings, *device.warnings]
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
    _run(new_meter(recording, energy_source(recording), device_info(recording)), recording, windows)
    known = [
        window.joules if window.covered_ns == span.end_ns - span.start_ns else None
        for window, span in zip(windows, spans, strict=True)
    ]
    return spans, known


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
    recording_end_ns = last_ns_of(recording)
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


# -------------------------------------------------------------------- running the meter


def _run(
    meter: Meter,
    recording: Recording,
    windows: Sequence[_Window],
    account: Account | None = None,
    curve: Whole | None = None,
) -> None:
    """Feed the recording to the meter, add up the windows' energies and keep the account and the whole curve."""
    cut_ns: int | None = None

    def add_up_to_now() -> None:
        nonlocal cut_ns
        if meter.timeline is not None:
            from_ns = meter.timeline.start_ns if cut_ns is None else cut_ns
            cut_ns = meter.timeline.end_ns
            for window in windows:
                window.add(meter, from_ns, cut_ns)

    for _ in feed(meter, recording):
        if curve is not None:
            curve.follow(meter)
        if account is not None and meter.timeline is not None:
            account.advance(meter.timeline)
        if meter.timeline is not None and meter.timeline.end_ns - (cut_ns or meter.timeline.start_ns) >= CUT_NS:
            add_up_to_now()
    meter.flush()
    if curve is not None:
        curve.follow(meter)
    add_up_to_now()
    if account is not None and meter.timeline is not None:
        account.close(meter.timeline)


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
        "energy_joules": window.joules if covered else None,
        "low": window.low if covered else None,
        "high": window.high if covered else None,
        "average_watts": window.joules / covered if covered else None,
    }


def _warn_of_sensors(meter: Meter, warnings: list[str]) -> None:
    if meter.gap_seconds:
        warnings.append(f"{meter.gap_seconds:.2f} s have no samples: filled from the energy counter or by estimate.")
    if meter.rejected_samples:
        warnings.append(f"{meter.rejected_samples} readings were out of range and left out.")
    if meter.counter_resets:
        warnings.append(f"The energy counter was set back {meter.counter_resets} times.")
