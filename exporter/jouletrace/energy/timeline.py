"""A device's energy as a function of time.

The timeline E(t) is a monotone, piecewise linear curve: node i says that E joules had been used by t_ns[i].
Every energy is a difference of two look-ups. The newest quarter hour is kept.

Beside it stand the moments at which the sensor vouches for the energy: the nodes themselves, and only some of them
once the inside of a segment is a guess (between two ticks of a counter). How much less and how much more may truly
have been used (in a gap, or while the sensor looked away) is carried along as a slack that rises where it arises.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

DEPTH_NS = 15 * 60 * 1_000_000_000
"""How far back a window may reach (design: 15 minutes)."""
SPARE_PART = 4
LEAST_SPARE = 1024
"""A full table moves to a new one with a quarter, and at least so many rows, more room than the kept rows need."""


@dataclass(frozen=True, slots=True)
class WindowEnergy:
    """Energy of a span of time, joules; the truth lies within [low, high] as far as the sensor can tell."""

    joules: float
    low: float
    high: float
    covered_ns: int
    """The part of the window that the timeline knows; less than the window's length when it reaches past an end."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Rows [first, end) of a time and two sums, joules; what lies there is never written again."""

    t_ns: Int64s
    one: Float64s
    other: Float64s
    """The same array as `one` where a single sum is kept."""
    first: int
    end: int

    def appended(self, t_ns: Int64s, one: Float64s, other: Float64s, depth_ns: int) -> "_Table":
        """Return the table with rows added and without those that are older than the depth."""
        count = len(t_ns)
        table = self if self.end + count <= len(self.t_ns) else self._moved(count)
        end = table.end + count
        table.t_ns[table.end : end] = t_ns
        table.one[table.end : end] = one
        if other is not one:
            table.other[table.end : end] = other
        first, horizon_ns = table.first, table.t_ns[end - 1] - depth_ns
        if table.t_ns[first] < horizon_ns:
            # The row at or before the horizon stays, so that a window of the full depth is covered.
            first += max(0, int(table.t_ns[first:end].searchsorted(horizon_ns, "right")) - 1)
        return _Table(table.t_ns, table.one, table.other, first, end)

    def _moved(self, count: int) -> "_Table":
        """Return the rows in new arrays with room for `count` more; readers keep the old ones."""
        kept = self.end - self.first
        room = kept + count + max((kept + count) // SPARE_PART, LEAST_SPARE)
        part = slice(self.first, self.end)
        t_ns, one = np.empty(room, np.int64), np.empty(room)
        other = one if self.other is self.one else np.empty(room)
        t_ns[:kept], one[:kept], other[:kept] = self.t_ns[part], self.one[part], self.other[part]
        return _Table(t_ns, one, other, 0, kept)

    def at_or_before(self, t_ns: int) -> int:
        """Return the index of the last row at or before a time, the first row when there is none."""
        kept = self.t_ns[self.first : self.end]
        return self.first + max(0, int(kept.searchsorted(t_ns, "right")) - 1)

    def at_or_after(self, t_ns: int) -> int:
        """Return the index of the first row at or after a time, the last row when there is none."""
        kept = self.t_ns[self.first : self.end]
        return self.first + min(len(kept) - 1, int(kept.searchsorted(t_ns, "left")))

    def between(self, t_ns: int) -> float:
        """Return `one` at a time, on the straight line between two rows; clamped to the kept span."""
        at = self.at_or_after(t_ns)
        right_ns = int(self.t_ns[at])
        if at == self.first or t_ns >= right_ns:
            return float(self.one[at])
        left_ns, left = int(self.t_ns[at - 1]), float(self.one[at - 1])
        return left + (t_ns - left_ns) / (right_ns - left_ns) * (float(self.one[at]) - left)


@dataclass(frozen=True, slots=True)
class _Curve:
    """One published state of the timeline."""

    nodes: _Table
    """E(t)."""
    vouched: _Table
    """E at the moments at which the sensor vouches for it; the table of the nodes as long as these are all."""
    slack: _Table | None
    """How much less and how much more may have been used, summed up to each time at which it rose."""


class Timeline:
    """E(t) of one device. One thread appends; any thread may read, without a lock.

    Readers take the published curve once; appending writes only behind its end, and when an array is full
    the kept part moves to a new array, so what a reader holds never changes.
    """

    def __init__(self, start_ns: int, *, depth_ns: int = DEPTH_NS) -> None:
        self._depth_ns = depth_ns
        joules = np.zeros(1)
        nodes = _Table(np.array([start_ns], np.int64), joules, joules, 0, 1)
        self._curve = _Curve(nodes, nodes, None)

    @property
    def start_ns(self) -> int:
        """The earliest time that can be asked for."""
        nodes = self._curve.nodes
        return int(nodes.t_ns[nodes.first])

    @property
    def end_ns(self) -> int:
        """Energy is known up to here."""
        nodes = self._curve.nodes
        return int(nodes.t_ns[nodes.end - 1])

    @property
    def joules(self) -> float:
        """Energy since the timeline's beginning; never goes down."""
        nodes = self._curve.nodes
        return float(nodes.one[nodes.end - 1])

    def __len__(self) -> int:
        """Return the number of nodes kept."""
        nodes = self._curve.nodes
        return nodes.end - nodes.first

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

        Raises ValueError, and leaves the timeline as it was, when times do not increase from the last node on
        or a number is negative or not finite.
        """
        ends = np.atleast_1d(np.asarray(ends_ns, np.int64))
        energies = _energies("joules", joules, ends)
        if len(ends) == 0:
            return
        if ends[0] <= self.end_ns or np.count_nonzero(ends[1:] > ends[:-1]) < len(ends) - 1:
            raise ValueError("segment ends must increase")
        slack = self._slack(ends, energies, below, above, atomic=atomic)
        curve, depth_ns = self._curve, self._depth_ns
        totals = curve.nodes.one[curve.nodes.end - 1] + energies.cumsum()
        nodes = curve.nodes.appended(ends, totals, totals, depth_ns)
        if curve.vouched is curve.nodes and not atomic:
            self._curve = _Curve(nodes, nodes, slack)
            return
        if atomic:
            ends, totals = ends[-1:], totals[-1:]
        vouched = _own(curve.nodes) if curve.vouched is curve.nodes else curve.vouched
        self._curve = _Curve(nodes, vouched.appended(ends, totals, totals, depth_ns), slack)

    def _slack(
        self,
        ends: Int64s,
        energies: Float64s,
        below: ArrayLike | None,
        above: ArrayLike | None,
        *,
        atomic: bool,
    ) -> _Table | None:
        """Return the slack with that of new segments added."""
        slack = self._curve.slack
        if below is None and above is None:
            return slack
        less = np.zeros(len(ends)) if below is None else np.minimum(_energies("below", below, ends), energies)
        more = np.zeros(len(ends)) if above is None else _energies("above", above, ends)
        if slack is None:
            slack = _Table(np.array([self.start_ns], np.int64), np.zeros(1), np.zeros(1), 0, 1)
        rises = np.array([len(ends) - 1]) if atomic else ((less > 0) | (more > 0)).nonzero()[0]
        if len(rises) == 0:
            return slack
        less = slack.one[slack.end - 1] + less.cumsum()
        more = slack.other[slack.end - 1] + more.cumsum()
        return slack.appended(ends[rises], less[rises], more[rises], self._depth_ns)

    def energy_at(self, t_ns: int) -> float:
        """Return E(t_ns), joules; clamped to the kept span."""
        return self._curve.nodes.between(t_ns)

    def energies_at(self, times_ns: ArrayLike) -> Float64s:
        """Return E at each of the times, joules, shape of `times_ns`; clamped to the kept span."""
        nodes, times = self._curve.nodes, np.asarray(times_ns, np.int64)
        if not times.size:
            return np.zeros(times.shape)
        # A quarter hour is 45,000 nodes, and mostly a few seconds are asked for.
        first, last = nodes.at_or_before(int(times.min())), nodes.at_or_after(int(times.max()))
        around, origin = slice(first, last + 1), nodes.t_ns[first]
        # Offsets from the first node keep nanosecond resolution in float64 (15 minutes = 9e11 < 2**53).
        energies: Float64s = np.interp(times - origin, nodes.t_ns[around] - origin, nodes.one[around])
        return energies

    def window(self, start_ns: int, end_ns: int, *, time_error_ns: int = 0) -> WindowEnergy:
        """Return the energy used in (start_ns, end_ns], with bounds; O(log n).

        A bound moves each edge to the better or worse of the two vouched moments around it (the sensor knows
        the energy between them, not where in between it went), after moving it by `time_error_ns`. A window
        that reaches past an end has the energy and the bounds of its covered part.
        """
        if end_ns < start_ns:
            raise ValueError("a window must not end before it starts")
        curve = self._curve
        nodes, vouched = curve.nodes, curve.vouched
        first_ns, last_ns = int(nodes.t_ns[nodes.first]), int(nodes.t_ns[nodes.end - 1])
        covered_ns = max(0, min(end_ns, last_ns) - max(start_ns, first_ns))
        joules = max(0.0, nodes.between(end_ns) - nodes.between(start_ns))
        inner_start = vouched.at_or_after(start_ns + time_error_ns)
        inner_end = vouched.at_or_before(end_ns - time_error_ns)
        outer_start = vouched.at_or_before(start_ns - time_error_ns)
        outer_end = vouched.at_or_after(end_ns + time_error_ns)
        low = high = 0.0
        if inner_end > inner_start:
            low = float(vouched.one[inner_end] - vouched.one[inner_start])
        high = float(vouched.one[outer_end] - vouched.one[outer_start])
        if curve.slack is not None:
            slack, t_ns = curve.slack, vouched.t_ns
            if inner_end > inner_start:
                last, first = slack.at_or_before(t_ns[inner_end]), slack.at_or_before(t_ns[inner_start])
                low = max(0.0, low - float(slack.one[last] - slack.one[first]))
            last, first = slack.at_or_before(t_ns[outer_end]), slack.at_or_before(t_ns[outer_start])
            high += float(slack.other[last] - slack.other[first])
        return WindowEnergy(joules, min(low, joules), max(high, joules), covered_ns)

    def nodes(self) -> tuple[Int64s, Float64s]:
        """Return read-only views of the kept nodes: times (ns) and energies (joules), shapes (n,)."""
        nodes = self._curve.nodes
        times, energies = nodes.t_ns[nodes.first : nodes.end], nodes.one[nodes.first : nodes.end]
        times.flags.writeable = energies.flags.writeable = False
        return times, energies


def _energies(name: str, joules: ArrayLike, ends: Int64s) -> Float64s:
    """Return checked energies, one for each segment."""
    energies = np.atleast_1d(np.asarray(joules, np.float64))
    if energies.shape != ends.shape:
        raise ValueError(f"{name} must hold one number for each of the {len(ends)} segments, not {len(energies)}")
    # NaN compares false; one pass each way is cheaper than isfinite and a comparison, and counting than `all`.
    if np.count_nonzero((energies >= 0) & (energies < np.inf)) < len(energies):
        raise ValueError(f"{name} must be finite and not negative")
    return energies


def _own(nodes: _Table) -> _Table:
    """Return a table of its own with the same rows."""
    kept = slice(nodes.first, nodes.end)
    joules = nodes.one[kept].copy()
    return _Table(nodes.t_ns[kept].copy(), joules, joules, 0, len(joules))
