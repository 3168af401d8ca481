"""What a device's diagnosis rests on: its readings over one and the same span of time.

A value that nobody gave, or that makes no sense, is absent (None, or missing from the mapping), never 0.

GPM's ratios count cycles, not time: a pipe that works the same seconds at a lower clock shows the same ratio and
does less. What depends on work done per second (power, above all) must therefore look at the clock too.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import StrEnum
from operator import attrgetter
from typing import Generic, TypeVar

import msgspec
from msgspec.structs import replace

from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import (
    ActivityReading,
    DeviceInfo,
    HealthReading,
    Link,
    Pipe,
    StateReading,
    ThrottleReason,
)

Key = TypeVar("Key", bound=Hashable)

_END, _TIME = attrgetter("end_ns"), attrgetter("t_ns")
_GRAPHICS, _SM = Pipe.GRAPHICS, Pipe.SM
"""Looked up here, not in the loops: in Python 3.11 a member of an enumeration takes five times a dict's look-up."""

LEAST_SPAN_NS = 500_000_000
"""Shortest span that is diagnosed: one GPM interval of the daemon."""
SILENT_NS = 3_000_000_000
"""After this long without a GPM interval its edges are not waited for."""
LOOK_BACK_NS = 30_000_000_000
"""How old a GRAPHICS reading may be and still tell how SM activity relates to it: the daemon's longest interval."""
RECENT_NS = 3_000_000_000
"""States older than this before a span tell nothing of it."""
EDGE_NS = 1_000_000_000
"""A state up to this long before a span shows whether the clock changed at its beginning."""
LEAST_COVERED = 0.5
"""Part of a span for which a value must be given; below it the value is absent."""
MOST_COVERED = 0.9
"""The same for GRAPHICS, on which the first question rests: whether the device was busy at all."""
HIGHEST_RATIO = 1.02
"""GPM ratios are between 0 and 1; up to this is taken as rounding, above it as garbage (2,692 GPM rows of an H200:
at most 1.0003)."""
IDLE_SM_RATIO = 0.005
"""SM activity up to this is none: a single busy one of an H200's 132 SMs reads 0.0076."""
TYPICAL_SM_PART = 0.7
"""SM activity while anything runs, where nothing else is known: H200 phases hold 0.63 (decode, batch 1) to 0.98."""
SOUND_POSITIVE = (1e-3, 1e12)
"""Watts and hertz outside of this are garbage."""
HIGHEST_LINK_BYTES_PER_SECOND = 2e12
"""More than this on one link direction is garbage (NVLink 5: 0.9e12)."""


class ActiveSource(StrEnum):
    """Where the active part of a span comes from, best first."""

    GRAPHICS = "graphics"
    """GPM's GRAPHICS over the span."""
    SCALED_SM = "scaled_sm"
    """SM activity, and how it related to GRAPHICS when that was last read."""
    UTILIZATION = "utilization"
    """NVML's utilization, a duty cycle that counts copies too, kept above SM activity."""
    SM = "sm"
    """SM activity alone, a lower bound."""


ACTIVE_SOURCES = tuple(ActiveSource)


class DeviceSignals(msgspec.Struct, frozen=True):
    """One device over (start_ns, end_ns], a whole number of GPM intervals where there is GPM.

    Not a dataclass: a frozen one of so many fields takes six times as long to make (2.6 us).
    """

    start_ns: int
    end_ns: int
    energy_joules: float | None = None
    """From the timeline, over exactly this span."""
    dram_ratio: float | None = None
    """DRAM bandwidth as a part of the theoretical peak, 0 to 1."""
    busy_ratio: Mapping[Pipe, float] = {}
    """Busy part of the span's cycles by pipe, 0 to 1: cycles, not seconds, so a lower clock raises it."""
    bytes_per_second: Mapping[Link, float] = {}
    active_ratio: float | None = None
    """Part of the span in which any kernel was on the device, measured or estimated; at least SM activity."""
    active_source: ActiveSource | None = None
    sm_clock_hertz: float | None = None
    sm_clock_swing: float | None = None
    """Highest less lowest SM clock that was seen in the span and on its edges, as a part of the highest."""
    max_sm_clock_hertz: float | None = None
    power_limit_watts: float | None = None
    board_limit_watts: float | None = None
    """What the board was made for, whatever the operator has set: `DeviceInfo.board_limit_watts`."""
    event_reasons: int | None = None
    """Bit mask of clock event reasons, all that were seen in the span."""
    throttled_ratio: Mapping[ThrottleReason, float] = {}
    """Part of the span for which the driver counted the clocks as held down, 0 to 1."""
    utilization_ratio: Mapping[str, float] = {}
    """NVML's duty cycles by kind (`gpu`, `memory`): what is there without GPM."""
    held: bool | None = None
    """Whether a process holds a context."""
    processes: int | None = None
    idle_watts: Mapping[str, float] = {}
    """Learnt idle levels by kind (`bare`, `parked`)."""
    mig_enabled: bool = False
    garbage: float | None = None
    """How many signals came with values that make no sense, which are left out here; of several spans the mean over
    time. None: `sound` has not looked at these signals yet."""

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def watts(self) -> float | None:
        """Mean power."""
        return None if self.energy_joules is None or self.seconds <= 0 else self.energy_joules / self.seconds

    @property
    def has_activity(self) -> bool:
        """Whether GPM told anything of SMs or memory."""
        return self.dram_ratio is not None or _SM in self.busy_ratio or _GRAPHICS in self.busy_ratio


def next_span(
    after_ns: int, until_ns: int, readings: Iterable[ActivityReading], *, least_ns: int = LEAST_SPAN_NS
) -> tuple[int, int] | None:
    """Return the next span to diagnose: from after_ns to the end of the newest GPM interval up to until_ns.

    `after_ns` is the end of the span before, `until_ns` how far the timeline reaches. Without any GPM interval for
    `SILENT_NS` the span ends at until_ns. None while it would be shorter than `least_ns`.
    """
    ends = [reading.end_ns for reading in readings if reading.end_ns <= until_ns and _is_full(reading)]
    newest_ns = max(ends, default=0)
    end_ns = newest_ns if newest_ns > until_ns - SILENT_NS else until_ns
    return (after_ns, end_ns) if end_ns - after_ns >= least_ns else None


def align(
    start_ns: int,
    end_ns: int,
    *,
    info: DeviceInfo,
    timeline: Timeline | None = None,
    readings: Sequence[ActivityReading] = (),
    states: Sequence[StateReading] = (),
    healths: Sequence[HealthReading] = (),
    held: bool | None = None,
    idle_watts: Mapping[str, float] | None = None,
) -> DeviceSignals:
    """Return a device's signals over (start_ns, end_ns]: every value is of that span or absent.

    `readings` (by their ends), `states` and `healths` are oldest first and may reach beyond the span; GPM intervals
    count by how much of them falls into it, so the edges should be interval ends (`next_span`). Energy is absent
    unless the timeline holds the whole span. Values that make no sense are left out, and the signals that had any are
    counted. The last GRAPHICS reading before the span, and the readings of its time, let SM activity tell how long
    kernels ran.
    """
    joules = None
    if timeline is not None and timeline.start_ns <= start_ns and end_ns <= timeline.end_ns:
        joules = timeline.energy_at(end_ns) - timeline.energy_at(start_ns)
    inside = [one for one in readings[bisect_right(readings, start_ns, key=_END) :] if one.start_ns < end_ns]
    recent = states[bisect_right(states, start_ns - RECENT_NS, key=_TIME) :]
    seen = [one for one in recent if start_ns < one.t_ns <= end_ns]
    rejected: set[Hashable] = set()
    dram, busy, links = _means(inside, start_ns, end_ns, rejected)
    utilization = _utilization(seen, rejected)
    active, source = _active(busy, utilization.get("gpu"), readings, start_ns, end_ns)
    clock, swing = _clock(recent, seen, start_ns, rejected)
    reasons: int | None = None
    for state in seen:
        if state.event_reasons is not None:
            reasons = (reasons or 0) | state.event_reasons
    known = [one for one in healths if one.t_ns <= end_ns]
    health = known[-1] if known else None
    limit = health.power_limit_watts if health is not None else None
    return DeviceSignals(
        start_ns=start_ns,
        end_ns=end_ns,
        energy_joules=joules,
        dram_ratio=dram,
        busy_ratio=busy,
        bytes_per_second=links,
        active_ratio=active,
        active_source=source,
        sm_clock_hertz=clock,
        sm_clock_swing=swing,
        max_sm_clock_hertz=_sound_positive(info.max_sm_clock_hertz),
        power_limit_watts=_sound_positive(info.power_limit_watts if limit is None else limit),
        board_limit_watts=_sound_positive(info.board_limit_watts),
        event_reasons=reasons,
        throttled_ratio=_throttled(recent, start_ns, end_ns),
        utilization_ratio=utilization,
        held=held,
        processes=None if health is None or health.processes is None else len(health.processes),
        idle_watts={} if idle_watts is None else _sound_mapping(idle_watts, _sound_positive),
        mig_enabled=info.mig_enabled,
        garbage=float(len(rejected)),
    )


def merge(spans: Sequence[DeviceSignals]) -> DeviceSignals:
    """Return the signals of one or more consecutive spans as of one: means over time, sums and all reasons seen.

    A mean is of the spans that have the value, and absent when these are less than half of the time. What is true
    of a moment (who holds the device, limits, idle levels) is the newest span's.
    """
    first, last = spans[0], spans[-1]
    if len(spans) == 1:
        return first
    lengths_ns = [one.end_ns - one.start_ns for one in spans]
    least_ns = LEAST_COVERED * sum(lengths_ns)

    def mean(values: Sequence[float | None]) -> float | None:
        amount, weight = 0.0, 0
        for value, length_ns in zip(values, lengths_ns, strict=True):
            if value is not None:
                amount, weight = amount + value * length_ns, weight + length_ns
        return amount / weight if weight and weight >= least_ns else None

    def means(mappings: Sequence[Mapping[Key, float]]) -> dict[Key, float]:
        sums: _Sums[Key] = _Sums()
        for mapping, length_ns in zip(mappings, lengths_ns, strict=True):
            for key, value in mapping.items():
                sums.add(key, value, length_ns)
        return sums.means(least_ns)

    reasons: int | None = None
    for one in spans:
        if one.event_reasons is not None:
            reasons = (reasons or 0) | one.event_reasons
    joules = [one.energy_joules for one in spans]
    sources = [one.active_source for one in spans if one.active_source is not None]
    return replace(
        last,
        start_ns=first.start_ns,
        energy_joules=None if None in joules else sum(one for one in joules if one is not None),
        dram_ratio=mean([one.dram_ratio for one in spans]),
        busy_ratio=means([one.busy_ratio for one in spans]),
        bytes_per_second=means([one.bytes_per_second for one in spans]),
        active_ratio=mean([one.active_ratio for one in spans]),
        active_source=max(sources, key=ACTIVE_SOURCES.index, default=None),
        sm_clock_hertz=mean([one.sm_clock_hertz for one in spans]),
        sm_clock_swing=max((one.sm_clock_swing for one in spans if one.sm_clock_swing is not None), default=None),
        event_reasons=reasons,
        throttled_ratio=means([one.throttled_ratio for one in spans]),
        utilization_ratio=means([one.utilization_ratio for one in spans]),
        garbage=_mean_garbage(spans, lengths_ns),
    )


def _mean_garbage(spans: Sequence[DeviceSignals], lengths_ns: Sequence[int]) -> float | None:
    """Return the mean over time; None when `sound` has yet to look at one of the spans."""
    found = 0.0
    for one, length_ns in zip(spans, lengths_ns, strict=True):
        if one.garbage is None:
            return None
        found += one.garbage * length_ns
    return found / max(sum(lengths_ns), 1)


def sound(signals: DeviceSignals) -> tuple[DeviceSignals, float]:
    """Return the signals without values that make no sense (NaN, out of range), and how many signals had any."""
    if signals.garbage is not None:
        return signals, signals.garbage
    busy = _sound_mapping(signals.busy_ratio, sound_ratio)
    links = _sound_mapping(signals.bytes_per_second, _sound_rate)
    throttled = _sound_mapping(signals.throttled_ratio, sound_ratio)
    utilization = _sound_mapping(signals.utilization_ratio, sound_ratio)
    idle = _sound_mapping(signals.idle_watts, _sound_positive)
    dram, active = sound_ratio(signals.dram_ratio), sound_ratio(signals.active_ratio)
    clock, limit = _sound_positive(signals.sm_clock_hertz), _sound_positive(signals.power_limit_watts)
    top, swing = _sound_positive(signals.max_sm_clock_hertz), sound_ratio(signals.sm_clock_swing)
    board = _sound_positive(signals.board_limit_watts)
    joules = signals.energy_joules if signals.energy_joules is None or 0 <= signals.energy_joules < 1e12 else None
    kept = (dram, active, clock, limit, board, top, swing, joules)
    given = (
        signals.dram_ratio,
        signals.active_ratio,
        signals.sm_clock_hertz,
        signals.power_limit_watts,
        signals.board_limit_watts,
        signals.max_sm_clock_hertz,
        signals.sm_clock_swing,
        signals.energy_joules,
    )
    mappings = (
        (busy, signals.busy_ratio),
        (links, signals.bytes_per_second),
        (throttled, signals.throttled_ratio),
        (utilization, signals.utilization_ratio),
        (idle, signals.idle_watts),
    )
    dropped = sum(len(old) - len(new) for new, old in mappings)
    dropped += sum(new is None and old is not None for new, old in zip(kept, given, strict=True))
    return replace(
        signals,
        energy_joules=joules,
        dram_ratio=dram,
        busy_ratio=busy,
        bytes_per_second=links,
        active_ratio=active,
        sm_clock_hertz=clock,
        sm_clock_swing=swing,
        max_sm_clock_hertz=top,
        power_limit_watts=limit,
        board_limit_watts=board,
        throttled_ratio=throttled,
        utilization_ratio=utilization,
        idle_watts=idle,
        garbage=float(dropped),
    ), float(dropped)


def sound_ratio(value: float | None) -> float | None:
    """Return a ratio of 0 to 1, with rounding cut off; None for none and for garbage, NaN included."""
    if value is None or not 0.0 <= value <= HIGHEST_RATIO:
        return None
    return min(value, 1.0)


def _sound_rate(value: float) -> float | None:
    return value if 0.0 <= value <= HIGHEST_LINK_BYTES_PER_SECOND else None


def _sound_positive(value: float | None) -> float | None:
    return value if value is not None and SOUND_POSITIVE[0] < value < SOUND_POSITIVE[1] else None


def _sound_mapping(values: Mapping[Key, float], check: Callable[[float], float | None]) -> Mapping[Key, float]:
    """Return the sound values; the mapping itself when all of them are."""
    if all(check(value) == value for value in values.values()):
        return values
    return {key: kept for key, value in values.items() if (kept := check(value)) is not None}


# -------------------------------------------------------------------- means over a span


def _is_full(reading: ActivityReading) -> bool:
    """Return whether a reading is of the usual metrics, not of GRAPHICS alone."""
    return reading.dram_ratio is not None or any(pipe is not _GRAPHICS for pipe in reading.busy_ratio)


class _Sums(Generic[Key]):
    """Sums of values over time, by key."""

    def __init__(self) -> None:
        self._amount: dict[Key, float] = {}
        self._weight_ns: dict[Key, int] = {}

    def add(self, key: Key, value: float, weight_ns: int) -> None:
        """Add a value that held for some time."""
        if key in self._amount:
            self._amount[key] += value * weight_ns
            self._weight_ns[key] += weight_ns
        else:
            self._amount[key] = value * weight_ns
            self._weight_ns[key] = weight_ns

    def means(self, least_ns: float) -> dict[Key, float]:
        """Return the means of those that were given for at least so long."""
        return {
            key: self._amount[key] / weight_ns
            for key, weight_ns in self._weight_ns.items()
            if weight_ns and weight_ns >= least_ns
        }


def _means(
    readings: Sequence[ActivityReading], start_ns: int, end_ns: int, rejected: set[Hashable]
) -> tuple[float | None, dict[Pipe, float], dict[Link, float]]:
    """Return the means over a span of DRAM, pipes and links; absent is what is given for less than half of it.

    What came with values that make no sense is added to `rejected`.

    GRAPHICS is taken from readings that are not much longer than the span, and from nearly all of it: a mean over
    a longer time is one of other work, too.
    """
    # Not `_Sums[Pipe]()`: making the alias takes longer than all that follows.
    dram: _Sums[None] = _Sums()
    busy: _Sums[Pipe] = _Sums()
    graphics: _Sums[Pipe] = _Sums()
    links: _Sums[Link] = _Sums()
    span_ns = end_ns - start_ns
    for one in readings:
        overlap_ns = min(one.end_ns, end_ns) - max(one.start_ns, start_ns)
        fits = one.end_ns - one.start_ns <= 2 * span_ns
        if (ratio := sound_ratio(one.dram_ratio)) is not None:
            dram.add(None, ratio, overlap_ns)
        elif one.dram_ratio is not None:
            rejected.add("dram")
        for pipe, given in one.busy_ratio.items():
            if (ratio := sound_ratio(given)) is None:
                rejected.add(pipe)
            elif pipe is not _GRAPHICS:
                busy.add(pipe, ratio, overlap_ns)
            elif fits or len(one.busy_ratio) > 1:
                graphics.add(pipe, ratio, overlap_ns)
        for link, rate in one.bytes_per_second.items():
            if _sound_rate(rate) is not None:
                links.add(link, rate, overlap_ns)
            else:
                rejected.add(link)
    least_ns = LEAST_COVERED * span_ns
    pipes = busy.means(least_ns) | graphics.means(MOST_COVERED * span_ns)
    return dram.means(least_ns).get(None), pipes, links.means(least_ns)


def _active(
    busy: Mapping[Pipe, float],
    utilization: float | None,
    readings: Sequence[ActivityReading],
    start_ns: int,
    end_ns: int,
) -> tuple[float | None, ActiveSource | None]:
    """Return for which part of a span kernels ran, and how that is known."""
    sm, graphics = busy.get(_SM), busy.get(_GRAPHICS)
    if graphics is not None:
        return max(graphics, sm or 0.0), ActiveSource.GRAPHICS
    if sm is None:
        return None, None
    if sm <= IDLE_SM_RATIO:
        return sm, ActiveSource.SM
    part = _sm_part(readings, start_ns, end_ns)
    if part is not None:
        return min(1.0, max(sm, sm / part)), ActiveSource.SCALED_SM
    if utilization is not None:
        return max(utilization, sm), ActiveSource.UTILIZATION
    return min(1.0, sm / TYPICAL_SM_PART), ActiveSource.SM


def _sm_part(readings: Sequence[ActivityReading], start_ns: int, end_ns: int) -> float | None:
    """Return SM over GRAPHICS as the newest GRAPHICS reading shows it, None where it shows nothing."""
    for one in reversed(readings):
        if _GRAPHICS not in one.busy_ratio or one.start_ns >= end_ns:
            continue
        graphics = sound_ratio(one.busy_ratio[_GRAPHICS])
        if graphics is None:
            continue
        if one.end_ns < start_ns - LOOK_BACK_NS:
            return None
        amount, weight_ns = 0.0, 0
        for other in reversed(readings):
            if other.end_ns <= one.start_ns:
                break
            sm = sound_ratio(other.busy_ratio.get(_SM)) if other.start_ns < one.end_ns else None
            if sm is not None:
                overlap_ns = min(other.end_ns, one.end_ns) - max(other.start_ns, one.start_ns)
                amount, weight_ns = amount + sm * overlap_ns, weight_ns + overlap_ns
        if weight_ns < LEAST_COVERED * (one.end_ns - one.start_ns):
            return None
        part = amount / weight_ns / graphics if graphics else 0.0
        return part if IDLE_SM_RATIO < part <= 1.0 else None
    return None


def _utilization(states: Sequence[StateReading], rejected: set[Hashable]) -> dict[str, float]:
    """Return the means of NVML's duty cycles."""
    values: dict[str, list[float]] = {}
    for state in states:
        for kind, given in state.utilization_ratio.items():
            ratio = sound_ratio(given)
            if ratio is None:
                rejected.add(("utilization", kind))
            else:
                values.setdefault(kind, []).append(ratio)
    return {kind: sum(found) / len(found) for kind, found in values.items()}


def _clock(
    recent: Sequence[StateReading], seen: Sequence[StateReading], start_ns: int, rejected: set[Hashable]
) -> tuple[float | None, float | None]:
    """Return the mean SM clock of a span, and its swing with the states around the span."""

    def clock(state: StateReading) -> float | None:
        return _sound_positive(state.clock_hertz.get("sm"))

    inside = [hertz for state in seen if (hertz := clock(state)) is not None]
    if len(inside) < len(seen) and any("sm" in state.clock_hertz and clock(state) is None for state in seen):
        rejected.add("clock")
    around = [hertz for state in recent if 0 <= start_ns - state.t_ns < EDGE_NS and (hertz := clock(state)) is not None]
    every = inside + around
    if not every:
        return None, None
    mean = sum(inside) / len(inside) if inside else every[-1]
    return mean, (max(every) - min(every)) / max(every)


def _throttled(recent: Sequence[StateReading], start_ns: int, end_ns: int) -> dict[ThrottleReason, float]:
    """Return the part of time that each cumulative counter rose by, between the readings around the span."""
    before: dict[ThrottleReason, tuple[int, int]] = {}
    after: dict[ThrottleReason, tuple[int, int]] = {}
    for one in recent:
        for reason, spent_ns in one.throttled_ns.items():
            if one.t_ns <= start_ns or reason not in before:
                before[reason] = (one.t_ns, spent_ns)
            elif reason not in after or after[reason][0] < end_ns:
                after[reason] = (one.t_ns, spent_ns)
    found = {}
    for reason, (t_ns, spent_ns) in after.items():
        then_ns, then_spent_ns = before[reason]
        # A counter that goes back is one of a reloaded driver.
        if t_ns > max(then_ns, start_ns) and spent_ns >= then_spent_ns:
            found[reason] = min(1.0, (spent_ns - then_spent_ns) / (t_ns - then_ns))
    return found
