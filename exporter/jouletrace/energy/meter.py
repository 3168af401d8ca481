"""From one device's readings to its timeline: which sensor, cross-check, gaps, resets, range.

The sensor ladder (measured on H200s, see docs/accuracy.md):

1. `power_ring`: the driver's ring of 20 ms means. Gap-free; its integral meets the hardware counter.
2. `energy_counter`: the counter's ticks, with POWER_INSTANT for the shape between two reads.
3. `power_polling`: POWER_INSTANT integrated; most GPUs see only a part of the time, the bounds say how much.
4. `power_average`: the 1 s average, the last resort.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from jouletrace.energy.sensors import AVERAGE, MS, instant_model
from jouletrace.energy.timeline import Float64s, Int64s, Timeline, WindowEnergy
from jouletrace.gpu.readings import CounterReading, PowerReading, PowerSamples

NDArrayBool = NDArray[np.bool_]
NS = 1_000_000_000
MAX_PLAUSIBLE_LIMITS = 2.0
"""Readings above this many power limits are garbage (0xFFFFFFFF mW was reported in the field)."""
ASSUMED_LIMIT_WATTS = 1_500.0
"""Power limit of a device that does not tell: above any single GPU of 2026 (GB300: 1,400 W)."""
RING_GAP_NS = 100 * MS
"""Longer spacing in the ring is a gap; on two H200s the longest of 23,700 spacings was 48 ms."""
COUNTER_TICK_NS = 100 * MS
"""The counter moves every 100 ms (H200 measured; A100, H100 by the SC24 artefact)."""
GAP_PATIENCE_NS = 5 * NS
"""A gap that no counter reading has filled for this long is filled by estimate."""
CROSS_CHECK_NS = 9 * NS
"""Shortest span over which ring and counter are compared: two tick errors are then at most 2 %."""
CROSS_CHECK_SPAN = 7
"""Counter readings kept, so that the comparison spans a minute at one reading each 10 s."""
COUNTER_STUCK_NS = 3 * NS
"""A counter that stands still this long while power flows is dead."""
COUNTER_ALIVE_MW = 10_000
POLL_NODE_NS = 50 * MS
"""Unchanged polled values are merged into nodes this far apart."""
POLL_GAP_NS = 1 * NS
MAX_POWER_SPAN_S = 60


class EnergySource(StrEnum):
    """The rungs of the sensor ladder, best first."""

    POWER_RING = "power_ring"
    ENERGY_COUNTER = "energy_counter"
    POWER_POLLING = "power_polling"
    POWER_AVERAGE = "power_average"


@dataclass(frozen=True, slots=True)
class _Gap:
    """Time without ring samples: (start_ns, end_ns], waiting for a counter reading; and what came after it."""

    start_ns: int
    end_ns: int
    ends_ns: Int64s
    milliwatts: Float64s


class Meter:
    """One device's energy from its readings. Not thread-safe; its `timeline` may be read from any thread."""

    def __init__(
        self,
        source: EnergySource,
        *,
        limit_watts: float | None = None,
        architecture: str = "",
        instant_update_ns: int | None = None,
        has_counter: bool = True,
    ) -> None:
        self.source = source
        self.timeline: Timeline | None = None
        self.counter_joules: float | None = None
        self.agreement_ratio: float | None = None
        self.power_watts: float | None = None
        self.gap_seconds = 0.0
        self.rejected_samples = 0
        self.counter_resets = 0
        self._limit_watts = limit_watts or ASSUMED_LIMIT_WATTS
        self._has_counter = has_counter
        self._model = (
            AVERAGE
            if source is EnergySource.POWER_AVERAGE
            else instant_model(architecture, instant_update_ns)
        )
        self._ring_ends: Int64s = np.empty(0, np.int64)
        self._ring_milliwatts: Float64s = np.empty(0)
        self._ring_period_ns = 20 * MS
        self._gap: _Gap | None = None
        self._anchors: deque[tuple[int, int]] = deque(maxlen=CROSS_CHECK_SPAN)
        self._unchecked: tuple[int, int] | None = None
        self._last_counter: CounterReading | None = None
        self._tick: tuple[int, int] | None = None
        self._shape: list[tuple[int, int]] = []
        self._polled: tuple[int, int] | None = None
        self._poll_energy = [0.0, 0.0, 0.0]
        self._maxima: deque[tuple[int, float]] = deque(maxlen=MAX_POWER_SPAN_S + 1)

    # ---------------------------------------------------------------- what it knows

    @property
    def joules(self) -> float:
        """Energy since the first sample; never goes down."""
        return self.timeline.joules if self.timeline else 0.0

    @property
    def end_ns(self) -> int | None:
        """Energy is known up to here."""
        return self.timeline.end_ns if self.timeline else None

    @property
    def wants_counter(self) -> bool:
        """Whether a counter reading is needed now, to fill a gap."""
        return self._gap is not None

    @property
    def power_max_watts(self) -> float | None:
        """Highest power of the last minute, at the source's own resolution."""
        if not self._maxima:
            return None
        oldest = self._maxima[-1][0] - MAX_POWER_SPAN_S
        return max(watts for second, watts in self._maxima if second > oldest)

    @property
    def time_error_ns(self) -> int:
        """How far a node of the timeline may be from its true time."""
        if self.source is EnergySource.POWER_RING:
            return 0
        if self.source is EnergySource.ENERGY_COUNTER:
            return COUNTER_TICK_NS
        if self.source is EnergySource.POWER_AVERAGE:
            return AVERAGE.window_ns // 2 + AVERAGE.update_ns
        return self._model.update_ns // 2 + self._model.lag_ns

    def window(self, start_ns: int, end_ns: int) -> WindowEnergy | None:
        """Return the energy used in (start_ns, end_ns] with the bounds of this source; None before any sample."""
        if self.timeline is None:
            return None
        return self.timeline.window(start_ns, end_ns, time_error_ns=self.time_error_ns)

    def change_source(self, source: EnergySource) -> None:
        """Go on with another rung of the ladder; the timeline continues, the time between is a gap."""
        if source is self.source:
            return
        self.flush()
        self.source = source
        self._shape.clear()
        self._polled = self._tick = self._last_counter = None
        self._anchors.clear()
        self._unchecked = None

    # ---------------------------------------------------------------- the ring

    def add_ring(self, samples: PowerSamples) -> None:
        """Take in new samples of the power ring.

        The newest sample is held back until the next call: its successor is needed to judge its stamp.
        """
        plausible = self._plausible(samples.milliwatts)
        last_ns = self._ring_ends[-1] if len(self._ring_ends) else self.end_ns or 0
        if self._gap is not None and len(self._gap.ends_ns):
            last_ns = max(last_ns, int(self._gap.ends_ns[-1]))
        keep = plausible & (samples.ends_ns > last_ns)
        self.rejected_samples += int(np.count_nonzero(~plausible))
        ends, milliwatts = samples.ends_ns[keep], samples.milliwatts[keep]
        if len(ends) == 0:
            return
        self.power_watts = float(milliwatts[-1]) / 1e3
        self._note_maxima(ends, milliwatts)
        if self._gap is not None:
            self._gap = _Gap(
                self._gap.start_ns,
                self._gap.end_ns,
                np.concatenate((self._gap.ends_ns, ends)),
                np.concatenate((self._gap.milliwatts, milliwatts)),
            )
            if not self._has_counter or ends[-1] - self._gap.end_ns > GAP_PATIENCE_NS:
                self._close_gap(None)
            return
        self._take_ring(
            np.concatenate((self._ring_ends, ends)), np.concatenate((self._ring_milliwatts, milliwatts))
        )

    def flush(self) -> None:
        """Take in the sample held back; for the end of a recording."""
        if self._gap is not None:
            self._close_gap(None)
        if len(self._ring_ends):
            self._extend_ring(self._ring_ends, self._ring_milliwatts)
            self._ring_ends, self._ring_milliwatts = self._ring_ends[:0], self._ring_milliwatts[:0]
        self._cross_check()

    def _take_ring(self, ends: Int64s, milliwatts: Float64s) -> None:
        """Append samples to the timeline up to a gap or to the last one, which is held back."""
        if self.timeline is None:
            # The first sample's own interval has no known beginning: it only opens the timeline.
            self.timeline = Timeline(int(ends[0]))
            ends, milliwatts = ends[1:], milliwatts[1:]
            if len(ends) == 0:
                return
        spacing = np.diff(ends, prepend=self.timeline.end_ns)
        if len(spacing) >= 20:
            self._ring_period_ns = int(np.median(spacing))
        gaps = np.flatnonzero(spacing > max(RING_GAP_NS, 3 * self._ring_period_ns))
        if len(gaps):
            at = int(gaps[0])
            if at:
                self._extend_ring(ends[:at], milliwatts[:at])
            start_ns = self.timeline.end_ns
            # The first sample after the gap tells of its own period only.
            end_ns = int(ends[at]) - self._ring_period_ns
            self.gap_seconds += (end_ns - start_ns) / NS
            self._gap = _Gap(start_ns, end_ns, ends[at:], milliwatts[at:])
            self._ring_ends, self._ring_milliwatts = ends[:0], milliwatts[:0]
            if not self._has_counter:
                self._close_gap(None)
            return
        if len(ends) > 1:
            steady = steady_stamps(ends, self.timeline.end_ns, self._ring_period_ns)
            self._extend_ring(steady[:-1], milliwatts[:-1])
        self._ring_ends, self._ring_milliwatts = ends[-1:], milliwatts[-1:]
        self._cross_check()

    def _extend_ring(self, ends: Int64s, milliwatts: Float64s) -> None:
        assert self.timeline is not None
        spans = np.diff(ends, prepend=self.timeline.end_ns)
        self.timeline.extend(ends, milliwatts * spans * 1e-12)

    def _close_gap(self, counter: CounterReading | None) -> None:
        """Fill the gap from the counter, or by the power at its edges, and take in what came after it."""
        gap, timeline = self._gap, self.timeline
        assert gap is not None
        assert timeline is not None
        self._gap = None
        seconds = (gap.end_ns - gap.start_ns) / NS
        most = self._limit_watts * seconds
        after_watts = float(gap.milliwatts[0]) / 1e3
        if counter is not None and self._anchors and self._anchors[0][0] <= gap.start_ns:
            anchor_ns, anchor_mj = next(a for a in reversed(self._anchors) if a[0] <= gap.start_ns)
            spans = np.diff(gap.ends_ns, prepend=gap.end_ns)
            later_joules = np.cumsum(gap.milliwatts * spans * 1e-12)
            # A counter value is on average half a tick old.
            seen_ns = counter.t_ns - COUNTER_TICK_NS // 2
            beyond = float(np.interp(seen_ns - gap.end_ns, gap.ends_ns - gap.end_ns, later_joules))
            beyond += max(0, seen_ns - int(gap.ends_ns[-1])) / NS * float(gap.milliwatts[-1]) / 1e3
            known = timeline.joules - timeline.energy_at(anchor_ns - COUNTER_TICK_NS // 2)
            joules = min(max((counter.energy_mj - anchor_mj) / 1e3 - known - beyond, 0.0), most)
            error = COUNTER_TICK_NS / NS * max(after_watts, joules / seconds)
        else:
            # Nobody knows. A short gap went on like its end; over a long one, a guess would be an invention.
            joules = min(after_watts * seconds, most) if seconds * NS <= GAP_PATIENCE_NS else 0.0
            error = most
        timeline.extend(
            [gap.end_ns], [joules], below=[min(error, joules)], above=[min(error, max(0.0, most - joules))]
        )
        self._take_ring(gap.ends_ns, gap.milliwatts)

    # ---------------------------------------------------------------- the counter

    def add_counter(self, reading: CounterReading) -> None:
        """Take in a reading of the hardware counter: the source itself on rung 2, else the cross-check."""
        last = self._last_counter
        if last is not None and reading.t_ns > last.t_ns:
            step_mj = reading.energy_mj - last.energy_mj
            most_mj = (
                MAX_PLAUSIBLE_LIMITS * self._limit_watts * (reading.t_ns - last.t_ns + COUNTER_TICK_NS) / 1e6
            )
            if step_mj < 0:
                self.counter_resets += 1
                self._anchors.clear()
                self._tick = None
                self._unchecked = None
            elif step_mj > most_mj:
                self.rejected_samples += 1
                return
        self._last_counter = reading
        self.counter_joules = reading.energy_mj / 1e3
        if self.source is EnergySource.ENERGY_COUNTER:
            self._add_tick(reading, last)
            return
        if self._gap is not None:
            self._close_gap(reading)
        self._anchors.append((reading.t_ns, reading.energy_mj))
        self._unchecked = self._anchors[-1]
        self._cross_check()

    def _cross_check(self) -> None:
        """Compare our energy with the counter's as soon as the timeline reaches the newest reading."""
        if self._unchecked is None or self.timeline is None:
            return
        lag = COUNTER_TICK_NS // 2
        now_ns, now_mj = self._unchecked
        then_ns, then_mj = self._anchors[0]
        if self.timeline.end_ns < now_ns - lag or then_ns - lag < self.timeline.start_ns:
            return
        self._unchecked = None
        if now_ns - then_ns >= CROSS_CHECK_NS and now_mj > then_mj:
            ours = self.timeline.energy_at(now_ns - lag) - self.timeline.energy_at(then_ns - lag)
            self.agreement_ratio = ours / ((now_mj - then_mj) / 1e3)

    def _add_tick(self, reading: CounterReading, last: CounterReading | None) -> None:
        """Append the energy between two counter values, shaped by the power values seen meanwhile."""
        if self._tick is None or last is None:
            start_ns = reading.t_ns - COUNTER_TICK_NS // 2
            if self.timeline is None:
                self.timeline = Timeline(start_ns)
            elif start_ns > self.timeline.end_ns:
                # After a reset the energy in between is nowhere: fill it with the power last seen.
                seconds = (start_ns - self.timeline.end_ns) / NS
                joules = (self.power_watts or 0.0) * seconds
                self.gap_seconds += seconds
                self.timeline.extend(
                    [start_ns],
                    [joules],
                    below=[joules],
                    above=[max(0.0, self._limit_watts * seconds - joules)],
                )
            self._tick = (reading.t_ns, reading.energy_mj)
            return
        assert self.timeline is not None
        then_ns, then_mj = self._tick
        if reading.energy_mj == then_mj:
            powered = (self.power_watts or 0.0) * 1e3 > COUNTER_ALIVE_MW
            if powered and reading.t_ns - then_ns > COUNTER_STUCK_NS:
                self._abandon_counter()
            return
        # The value changed somewhere between the read before and this one, a tick ago at most.
        end_ns = reading.t_ns - min(COUNTER_TICK_NS, reading.t_ns - last.t_ns) // 2
        self._tick = (reading.t_ns, reading.energy_mj)
        start_ns = self.timeline.end_ns
        if end_ns <= start_ns:
            end_ns = start_ns + MS
        ends, weights = self._shape_between(start_ns, end_ns)
        self.timeline.extend(ends, weights * (reading.energy_mj - then_mj) / 1e3, atomic=True)

    def _shape_between(self, start_ns: int, end_ns: int) -> tuple[Int64s, Float64s]:
        """Return ends and relative energies (sum 1) of the power values standing for (start_ns, end_ns]."""
        delay = self._model.delay_ns
        inside = [(t_ns - delay, mw) for t_ns, mw in self._shape if start_ns < t_ns - delay < end_ns]
        following = next((mw for t_ns, mw in self._shape if t_ns - delay >= end_ns), None)
        self._shape = [(t_ns, mw) for t_ns, mw in self._shape if t_ns - delay >= end_ns]
        if following is None:
            following = inside[-1][1] if inside else 1
        ends = np.array([t_ns for t_ns, _ in inside] + [end_ns], np.int64)
        energies = np.array([mw for _, mw in inside] + [following], np.float64) * np.diff(
            ends, prepend=start_ns
        )
        total = float(energies.sum())
        if total <= 0:
            return np.array([end_ns], np.int64), np.ones(1)
        return ends, energies / total

    def _abandon_counter(self) -> None:
        """Stop trusting a counter that stands still under load: 0 J would be a lie."""
        self._has_counter = False
        self.change_source(EnergySource.POWER_POLLING)

    # ---------------------------------------------------------------- polled power

    def add_power(self, reading: PowerReading) -> None:
        """Take in the driver's power values: the source itself on rungs 3 and 4, the shape on rung 2."""
        averaged = self.source is EnergySource.POWER_AVERAGE
        milliwatts = reading.average_mw if averaged else reading.instant_mw
        if milliwatts is None or self.source is EnergySource.POWER_RING:
            return
        if not self._plausible(milliwatts):
            self.rejected_samples += 1
            return
        self.power_watts = milliwatts / 1e3
        self._note_maxima(np.array([reading.t_ns], np.int64), np.array([milliwatts], np.float64))
        if self.source is EnergySource.ENERGY_COUNTER:
            self._shape.append((reading.t_ns, milliwatts))
        else:
            self._integrate(reading.t_ns, milliwatts)

    def _integrate(self, t_ns: int, milliwatts: int) -> None:
        """Append the value seen before, held until now and moved back to where the sensor looked."""
        model = self._model
        # A value held from its edge on stands for the period that ended at the edge.
        moved_ns = t_ns - model.delay_ns - model.update_ns
        if self.timeline is None:
            self.timeline = Timeline(moved_ns)
        if self._polled is None:
            self._polled = (t_ns, milliwatts)
            self._resume_at(moved_ns)
            return
        then_ns, then_mw = self._polled
        if t_ns <= then_ns:
            return
        self._polled = (t_ns, milliwatts)
        seconds, watts = (t_ns - then_ns) / NS, then_mw / 1e3
        headroom = max(0.0, self._limit_watts - watts)
        unseen = 1.0 - model.seen_part
        if t_ns - then_ns > POLL_GAP_NS:
            self.gap_seconds += seconds
            unseen = 1.0
        # The value changed somewhere in between.
        change = abs(milliwatts - then_mw) / 1e3 * seconds
        energy = self._poll_energy
        energy[0] += watts * seconds
        energy[1] += min(unseen * watts * seconds + change, watts * seconds)
        energy[2] += unseen * headroom * seconds + change
        if moved_ns - self.timeline.end_ns >= POLL_NODE_NS:
            self.timeline.extend([moved_ns], [energy[0]], below=[energy[1]], above=[energy[2]])
            self._poll_energy = [0.0, 0.0, 0.0]

    def _resume_at(self, moved_ns: int) -> None:
        """Bridge from another source's end to polled values, by the power seen."""
        assert self.timeline is not None
        seconds = (moved_ns - self.timeline.end_ns) / NS
        if seconds > 0:
            watts = self.power_watts or 0.0
            self.timeline.extend(
                [moved_ns],
                [watts * seconds],
                below=[watts * seconds],
                above=[max(0.0, self._limit_watts - watts) * seconds],
            )

    # ---------------------------------------------------------------- both

    def _plausible(self, milliwatts: Float64s | int) -> NDArrayBool:
        return (np.asarray(milliwatts) >= 0) & (
            np.asarray(milliwatts) <= MAX_PLAUSIBLE_LIMITS * self._limit_watts * 1e3
        )

    def _note_maxima(self, ends: Int64s, milliwatts: Float64s) -> None:
        second, watts = int(ends[-1]) // NS, float(milliwatts.max()) / 1e3
        if self._maxima and self._maxima[-1][0] == second:
            self._maxima[-1] = (second, max(watts, self._maxima[-1][1]))
        else:
            self._maxima.append((second, watts))


def steady_stamps(ends_ns: Int64s, before_ns: int, period_ns: int) -> Int64s:
    """Return the ring's stamps without the lateness of single ones; shape and last stamp as given.

    The driver takes a sample each period and stamps some of them late (spacings of 30 and 10 ms in a row while
    it answers another call). Each stamp becomes the median of itself and of what its two neighbours predict.
    On two H200 recordings this brought the integral from 0.054 % and 0.008 % off the counter to 0.015 % and
    0.005 %, and the scatter of 85 known power edges from 8.5 to 6.8 ms.
    """
    before = np.concatenate(([before_ns], ends_ns[:-1])) + period_ns
    after = np.concatenate((ends_ns[1:], ends_ns[-1:] + period_ns)) - period_ns
    steady = np.maximum(np.minimum(before, after), np.minimum(np.maximum(before, after), ends_ns))
    steady[-1] = ends_ns[-1]
    # A correction that would overtake a neighbour is dropped for the whole batch; never seen on a real ring.
    increasing = steady[0] > before_ns and bool(np.all(steady[1:] > steady[:-1]))
    return steady if increasing else ends_ns
