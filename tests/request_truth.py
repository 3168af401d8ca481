"""What each request of a recording truly used, and what the usual ways of sharing would say.

Written apart from the ledger: each step's energy is read from the timeline and split by a loop over the events.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.gpu.readings import PowerSamples
from jouletrace.trace.recording import Recording

Grid = tuple[float, float, float]
"""a, c_p, c_d in joules, as the traces' README gives them for the chunked recording."""
README_GRID: Grid = (2.48, 15.4e-3, 40.5e-3)


@dataclass
class Truth:
    """Joules by request, and the same by three ways of sharing, within each request's phase."""

    joules: dict[str, float]
    prefill: dict[str, float]
    phase: dict[str, float]
    """The label `rate` of the request's phase."""
    token_share: dict[str, float]
    time_share: dict[str, float]
    window: dict[str, float]


def energy_curve(recording: Recording) -> Callable[[int], float]:
    """E(t) of the daemon's timeline: what a step's energy is measured with (its own tests hold it to the counter)."""
    ring = recording.streams["power_ring_20ms"]
    meter = Meter(EnergySource.POWER_RING, limit_watts=700.0, architecture="", has_counter=False)
    meter.add_ring(PowerSamples(ring.t_ns, ring.values["mw"]))
    meter.flush()
    assert meter.timeline is not None
    times, joules = meter.timeline.nodes()
    return lambda t_ns: float(np.interp(t_ns - times[0], times - times[0], joules))


def truth(recording: Recording, grid: Grid | None = None) -> Truth:
    """Split each iteration's energy: with a grid by the law, else a prefill to its request, a decode equally."""
    energy = energy_curve(recording)
    joules: dict[str, float] = defaultdict(float)
    prefill: dict[str, float] = defaultdict(float)
    phase_of: dict[str, float] = {}
    phase_joules: dict[float, float] = defaultdict(float)
    decoding: list[str] = []
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    output: dict[str, int] = {}
    rate = None
    for event in recording.events:
        match event["kind"]:
            case "phase_start":
                rate = event.get("rate")
            case "request_start":
                phase_of[event["id"]], starts[event["id"]] = rate, event["t_ns"]
            case "first_token":
                decoding.append(event["id"])
            case "request_end":
                decoding.remove(event["id"])
                ends[event["id"]], output[event["id"]] = event["t_ns"], event["output_tokens"]
            case "iteration":
                used = energy(event["t_ns"]) - energy(event["start_ns"])
                phase_joules[rate] += used
                if event["iter"] == "prefill":
                    joules[event["ids"][0]] += used
                    prefill[event["ids"][0]] += used
                elif grid is None:
                    for name in decoding:
                        joules[name] += used / len(decoding)
                else:
                    _split_by_grid(event, used, grid, joules, prefill)
    tokens = {r: sum(n for name, n in output.items() if phase_of[name] == r) for r in phase_joules}
    token_share = {name: phase_joules[phase_of[name]] * n / tokens[phase_of[name]] for name, n in output.items()}
    window = {name: energy(ends[name]) - energy(starts[name]) for name in ends}
    return Truth(joules, prefill, phase_of, token_share, _equal_time_share(starts, ends, energy), window)


def _split_by_grid(
    event: Mapping[str, Any], used: float, grid: Grid, joules: dict[str, float], prefill: dict[str, float]
) -> None:
    a, c_p, c_d = grid
    part, members = event["prefill"], event["decode"]
    steps, tokens = event["steps"], part["tokens"] if part else 0
    count = len(members) + (1 if part else 0)
    whole = steps * a + c_p * tokens + steps * c_d * len(members)
    for name in members:
        joules[name] += used * steps * (a / count + c_d) / whole
    if part:
        mine = used * (steps * a / count + c_p * tokens) / whole
        joules[part["id"]] += mine
        prefill[part["id"]] += mine


def _equal_time_share(starts: dict[str, int], ends: dict[str, int], energy: Callable[[int], float]) -> dict[str, float]:
    """Share the energy between two events equally among the requests that have started and not ended."""
    times = sorted({*starts.values(), *ends.values()})
    curve = np.array([energy(t) for t in times])
    change = np.zeros(len(times), int)
    for name, end in ends.items():
        change[np.searchsorted(times, starts[name])] += 1
        change[np.searchsorted(times, end)] -= 1
    present = np.maximum(np.cumsum(change)[:-1], 1)
    each = np.concatenate(([0.0], np.cumsum(np.diff(curve) / present)))
    at = {name: (np.searchsorted(times, starts[name]), np.searchsorted(times, end)) for name, end in ends.items()}
    return {name: float(each[last] - each[first]) for name, (first, last) in at.items()}


def errors(found: dict[str, float], true: Truth, rate: float | None = None) -> tuple[float, float]:
    """Median and 95th percentile of the relative errors, of one phase or all."""
    names = [name for name in true.joules if rate is None or true.phase[name] == rate]
    off = [abs(found[name] / true.joules[name] - 1) for name in names]
    return float(np.median(off)), float(np.percentile(off, 95))
