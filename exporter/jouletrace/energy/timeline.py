"""A device's energy as a function of time.

The timeline E(t) is a monotone, piecewise linear curve: node i says that E joules had been used by t_ns[i].
Every energy is a difference of two look-ups. The newest quarter hour is kept.

What the sensor could not see is carried along as two further curves: how much less (`below`) and how much more
(`above`) the truth may be than E, cumulatively. They are only stored once something is uncertain, so a gap-free
ring costs two arrays.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

DEPTH_NS = 15 * 60 * 1_000_000_000
"""How far back a window may reach (design: 15 minutes)."""
NODES_PER_SECOND = 50
"""The H200's ring: one mean every 20 ms."""


@dataclass(frozen=True, slots=True)
class WindowEnergy:
    """Energy of a span of time, joules; the truth lies within [low, high] as far as the sensor can tell."""

    joules: float
    low: float
    high: float
    covered_ns: int
    """The part of the window that the timeline knows; less than the window's length when it reaches past an end."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """One published state: rows [first, end) of arrays that are never rewritten there."""

    t_ns: Int64s
    joules: Float64s
    floor: Float64s | None
    ceiling: Float64s | None
    below: Float64s | None
    above: Float64s | None
    first: int
    end: int


class Timeline:
    """E(t) of one device. One thread appends; any thread may read, without a lock.

    Readers take the published `_Curve` once; appending writes only behind its end, and when an array is full
    the kept part moves to a new array, so what a reader holds never changes.
    """

    def __init__(
        self, start_ns: int, *, depth_ns: int = DEPTH_NS, nodes_per_second: float = NODES_PER_SECOND
    ) -> None:
        self._depth_ns = depth_ns
        self._keep = max(int(depth_ns / 1e9 * nodes_per_second), 16)
        self._capacity = self._keep + self._keep // 4
        t_ns = np.empty(self._capacity, np.int64)
        joules = np.empty(self._capacity, np.float64)
        t_ns[0] = start_ns
        joules[0] = 0.0
        self._curve = _Curve(t_ns, joules, None, None, None, None, 0, 1)

    @property
    def start_ns(self) -> int:
        """The earliest time that can be asked for."""
        curve = self._curve
        return int(curve.t_ns[curve.first])

    @property
    def end_ns(self) -> int:
        """Energy is known up to here."""
        curve = self._curve
        return int(curve.t_ns[curve.end - 1])

    @property
    def joules(self) -> float:
        """Energy since the timeline's beginning; never goes down."""
        curve = self._curve
        return float(curve.joules[curve.end - 1])

    def __len__(self) -> int:
        """Return the number of nodes kept."""
        curve = self._curve
        return curve.end - curve.first

    def extend(
        self,
        ends_ns: ArrayLike,
        joules: ArrayLike,
        *,
        below: ArrayLike | None = None,
        above: ArrayLike | None = None,
        atomic: bool = False,
    ) -> None:
        """Append segments: `joules[i]` was used in (previous end, ends_ns[i]].

        `below` and `above` (same shape) say how much less or more each segment may truly have used. With
        `atomic`, only the sum of the call's segments is measured and their division among themselves is a
        guess: a window edge inside is then bounded by the whole, as within a single segment.

        Raises ValueError when times do not increase from the last node on or a number is negative or not finite.
        """
        ends = np.atleast_1d(np.asarray(ends_ns, np.int64))
        energies = np.atleast_1d(np.asarray(joules, np.float64))
        count = len(ends)
        if count == 0:
            return
        if energies.shape != ends.shape:
            raise ValueError("ends_ns and joules differ in length")
        curve = self._room_for(count)
        at, last = curve.end, curve.end - 1
        if ends[0] <= curve.t_ns[last] or (count > 1 and not np.all(ends[1:] > ends[:-1])):
            raise ValueError("segment ends must increase")
        if not np.all(np.isfinite(energies)) or np.any(energies < 0):
            raise ValueError("segment energies must be finite and not negative")
        curve.t_ns[at : at + count] = ends
        curve.joules[at : at + count] = curve.joules[last] + np.cumsum(energies)
        curve = self._mark_bracket(curve, at, count, atomic=atomic)
        curve = self._mark_slack(curve, at, count, below, above)
        self._publish(curve, at + count)

    def energy_at(self, t_ns: int) -> float:
        """Return E(t_ns), joules; clamped to the kept span."""
        curve = self._curve
        return _value(curve, curve.joules, t_ns)

    def energies_at(self, times_ns: ArrayLike) -> Float64s:
        """Return E at each of the times, joules, shape of `times_ns`; clamped to the kept span."""
        curve = self._curve
        kept = slice(curve.first, curve.end)
        origin = curve.t_ns[curve.first]
        offsets = np.asarray(times_ns, np.int64) - origin
        # Offsets from the first node keep nanosecond resolution in float64 (15 minutes = 9e11 < 2**53).
        energies: Float64s = np.interp(offsets, curve.t_ns[kept] - origin, curve.joules[kept])
        return energies

    def window(self, start_ns: int, end_ns: int, *, time_error_ns: int = 0) -> WindowEnergy:
        """Return the energy used in (start_ns, end_ns], with bounds; O(log n).

        A bound moves each edge to the better or worse end of the segment that it falls into (the sensor knows
        the segment's energy, not where in it the energy went), after moving it by `time_error_ns`.
        """
        if end_ns < start_ns:
            raise ValueError("a window must not end before it starts")
        curve = self._curve
        first_ns, last_ns = int(curve.t_ns[curve.first]), int(curve.t_ns[curve.end - 1])
        covered = max(0, min(end_ns, last_ns) - max(start_ns, first_ns))
        joules = max(0.0, _value(curve, curve.joules, end_ns) - _value(curve, curve.joules, start_ns))
        low = _floor(curve, end_ns - time_error_ns) - _ceiling(curve, start_ns + time_error_ns)
        high = _ceiling(curve, end_ns + time_error_ns) - _floor(curve, start_ns - time_error_ns)
        if curve.below is not None and curve.above is not None:
            low -= _value(curve, curve.below, end_ns) - _value(curve, curve.below, start_ns)
            high += _value(curve, curve.above, end_ns) - _value(curve, curve.above, start_ns)
        return WindowEnergy(joules, min(max(0.0, low), joules), max(high, joules), covered)

    def nodes(self) -> tuple[Int64s, Float64s]:
        """Return read-only views of the kept nodes: times (ns) and energies (joules), shapes (n,)."""
        curve = self._curve
        times, energies = curve.t_ns[curve.first : curve.end], curve.joules[curve.first : curve.end]
        times.flags.writeable = energies.flags.writeable = False
        return times, energies

    def _room_for(self, count: int) -> _Curve:
        curve = self._curve
        if curve.end + count <= self._capacity:
            return curve
        keep = min(curve.end - curve.first, max(1, self._keep - count))
        capacity = max(self._capacity, keep + count)

        def moved(array: Float64s | None) -> Float64s | None:
            if array is None:
                return None
            fresh = np.empty(capacity, array.dtype)
            fresh[:keep] = array[curve.end - keep : curve.end]
            return fresh

        t_ns = np.empty(capacity, np.int64)
        t_ns[:keep] = curve.t_ns[curve.end - keep : curve.end]
        joules = moved(curve.joules)
        assert joules is not None
        self._capacity = capacity
        return _Curve(
            t_ns,
            joules,
            moved(curve.floor),
            moved(curve.ceiling),
            moved(curve.below),
            moved(curve.above),
            0,
            keep,
        )

    def _mark_bracket(self, curve: _Curve, at: int, count: int, *, atomic: bool) -> _Curve:
        """Note for each new node between which energies its true E lies when the edge falls on its segment."""
        if not atomic and curve.floor is None:
            return curve
        floor, ceiling = curve.floor, curve.ceiling
        if floor is None or ceiling is None:
            floor, ceiling = np.empty(self._capacity), np.empty(self._capacity)
            floor[:at] = np.concatenate(([curve.joules[0]], curve.joules[: at - 1]))
            ceiling[:at] = curve.joules[:at]
        new = slice(at, at + count)
        floor[new] = curve.joules[at - 1] if atomic else curve.joules[at - 1 : at + count - 1]
        ceiling[new] = curve.joules[at + count - 1] if atomic else curve.joules[new]
        return _Curve(
            curve.t_ns, curve.joules, floor, ceiling, curve.below, curve.above, curve.first, curve.end
        )

    def _mark_slack(
        self, curve: _Curve, at: int, count: int, below: ArrayLike | None, above: ArrayLike | None
    ) -> _Curve:
        """Accumulate how much less and more the new segments may truly have used."""
        if below is None and above is None and curve.below is None:
            return curve
        less, more = curve.below, curve.above
        if less is None or more is None:
            less, more = np.empty(self._capacity), np.empty(self._capacity)
            less[:at] = more[:at] = 0.0
        for slack, added in ((less, below), (more, above)):
            amounts = np.zeros(count) if added is None else np.atleast_1d(np.asarray(added, np.float64))
            slack[at : at + count] = slack[at - 1] + np.cumsum(amounts)
        return _Curve(
            curve.t_ns, curve.joules, curve.floor, curve.ceiling, less, more, curve.first, curve.end
        )

    def _publish(self, curve: _Curve, end: int) -> None:
        horizon = curve.t_ns[end - 1] - self._depth_ns
        first = curve.first
        if curve.t_ns[first] < horizon:
            # Keep the node at or before the horizon, so that a window of the full depth is covered.
            first += max(0, int(np.searchsorted(curve.t_ns[first:end], horizon, side="right")) - 1)
        self._curve = _Curve(
            curve.t_ns,
            curve.joules,
            curve.floor,
            curve.ceiling,
            curve.below,
            curve.above,
            first,
            end,
        )


def _segment(curve: _Curve, t_ns: int) -> int:
    """Return the index of the node that ends the segment (previous, node] holding t_ns, clamped."""
    at = curve.first + int(np.searchsorted(curve.t_ns[curve.first : curve.end], t_ns, side="left"))
    return min(max(at, curve.first), curve.end - 1)


def _value(curve: _Curve, values: Float64s, t_ns: int) -> float:
    at = _segment(curve, t_ns)
    right_ns = int(curve.t_ns[at])
    if at == curve.first or t_ns >= right_ns:
        return float(values[at])
    left_ns = int(curve.t_ns[at - 1])
    part = (t_ns - left_ns) / (right_ns - left_ns)
    return float(values[at - 1]) + part * (float(values[at]) - float(values[at - 1]))


def _floor(curve: _Curve, t_ns: int) -> float:
    at = _segment(curve, t_ns)
    if at == curve.first or t_ns > curve.t_ns[at]:
        return float(curve.joules[at])
    if curve.ceiling is not None and curve.floor is not None:
        whole = t_ns == curve.t_ns[at] and curve.ceiling[at] == curve.joules[at]
        return float(curve.joules[at] if whole else curve.floor[at])
    return float(curve.joules[at] if t_ns == curve.t_ns[at] else curve.joules[at - 1])


def _ceiling(curve: _Curve, t_ns: int) -> float:
    at = _segment(curve, t_ns)
    return float(curve.joules[at] if curve.ceiling is None else curve.ceiling[at])
