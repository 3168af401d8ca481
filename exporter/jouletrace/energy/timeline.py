"""A device's energy as a function of time.

The timeline E(t) is a monotone, piecewise linear curve: node i says that E joules had been used by t_ns[i].
Every energy is a difference of two look-ups. The newest quarter hour is kept.

Beside it stand the moments at which the sensor vouches for the energy, with the least and the most that can have
been used by then. For a gap-free ring these are the nodes themselves and cost nothing; they part from the nodes
with the first segment that is uncertain (a gap) or whose inside is a guess (between two ticks of a counter).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

DEPTH_NS = 15 * 60 * 1_000_000_000
"""How far back a window may reach (design: 15 minutes)."""
FIRST_ROWS = 4096
SPARE_PART = 4
"""A full table moves to a new one with a quarter more room than the kept rows need."""


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
    """Rows [first, end) of columns of equal length; what lies there is never written again."""

    t_ns: Int64s
    low: Float64s
    high: Float64s
    """The same array as `low` where nothing is uncertain."""
    first: int
    end: int

    def appended(self, t_ns: Int64s, low: Float64s, high: Float64s | None, depth_ns: int) -> "_Table":
        """Return the table with rows added and without those that are older than the depth."""
        count = len(t_ns)
        table = self if self.end + count <= len(self.t_ns) else self._moved(count)
        end = table.end + count
        table.t_ns[table.end : end] = t_ns
        table.low[table.end : end] = low
        if high is not None:
            table.high[table.end : end] = high
        first, horizon_ns = table.first, table.t_ns[end - 1] - depth_ns
        if table.t_ns[first] < horizon_ns:
            # The row at or before the horizon stays, so that a window of the full depth is covered.
            first += max(0, int(table.t_ns[first:end].searchsorted(horizon_ns, "right")) - 1)
        return _Table(table.t_ns, table.low, table.high, first, end)

    def _moved(self, count: int) -> "_Table":
        """Return the rows in new arrays with room for `count` more; readers keep the old ones."""
        kept = self.end - self.first
        room = kept + count + max((kept + count) // SPARE_PART, FIRST_ROWS // SPARE_PART)
        part = slice(self.first, self.end)
        t_ns, low = np.empty(room, np.int64), np.empty(room)
        high = low if self.high is self.low else np.empty(room)
        t_ns[:kept], low[:kept], high[:kept] = self.t_ns[part], self.low[part], self.high[part]
        return _Table(t_ns, low, high, 0, kept)

    def at_or_before(self, t_ns: int) -> int:
        """Return the index of the last row at or before a time, the first row when there is none."""
        kept = self.t_ns[self.first : self.end]
        return self.first + max(0, int(kept.searchsorted(t_ns, "right")) - 1)

    def at_or_after(self, t_ns: int) -> int:
        """Return the index of the first row at or after a time, the last row when there is none."""
        kept = self.t_ns[self.first : self.end]
        return self.first + min(len(kept) - 1, int(kept.searchsorted(t_ns, "left")))

    def between(self, t_ns: int) -> float:
        """Return `low` at a time, on the straight line between two rows; clamped to the kept span."""
        at = self.at_or_after(t_ns)
        right_ns = int(self.t_ns[at])
        if at == self.first or t_ns >= right_ns:
            return float(self.low[at])
        left_ns, left = int(self.t_ns[at - 1]), float(self.low[at - 1])
        return left + (t_ns - left_ns) / (right_ns - left_ns) * (float(self.low[at]) - left)


@dataclass(frozen=True, slots=True)
class _Curve:
    """One published state of the timeline."""

    nodes: _Table
    """E(t) as `low`."""
    vouched: _Table
    """The least and the most that can have been used by the moments at which the sensor vouches for it."""


class Timeline:
    """E(t) of one device. One thread appends; any thread may read, without a lock.

    Readers take the published curve once; appending writes only behind its end, and when an array is full
    the kept part moves to a new array, so what a reader holds never changes.
    """

    def __init__(self, start_ns: int, *, depth_ns: int = DEPTH_NS) -> None:
        self._depth_ns = depth_ns
        times, joules = np.empty(FIRST_ROWS, np.int64), np.empty(FIRST_ROWS)
        times[0], joules[0] = start_ns, 0.0
        nodes = _Table(times, joules, joules, 0, 1)
        self._curve = _Curve(nodes, nodes)

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
        return float(nodes.low[nodes.end - 1])

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
        if ends[0] <= self.end_ns or not (ends[1:] > ends[:-1]).all():
            raise ValueError("segment ends must increase")
        curve, depth_ns = self._curve, self._depth_ns
        totals = curve.nodes.low[curve.nodes.end - 1] + energies.cumsum()
        nodes = curve.nodes.appended(ends, totals, None, depth_ns)
        if below is None and above is None and not atomic and curve.vouched is curve.nodes:
            self._curve = _Curve(nodes, nodes)
            return
        least = energies if below is None else energies - np.minimum(_energies("below", below, ends), energies)
        most = energies if above is None else energies + _energies("above", above, ends)
        vouched = _parted(curve.nodes) if curve.vouched is curve.nodes else curve.vouched
        lows = vouched.low[vouched.end - 1] + least.cumsum()
        highs = vouched.high[vouched.end - 1] + most.cumsum()
        rows = slice(-1, None) if atomic else slice(None)
        self._curve = _Curve(nodes, vouched.appended(ends[rows], lows[rows], highs[rows], depth_ns))

    def energy_at(self, t_ns: int) -> float:
        """Return E(t_ns), joules; clamped to the kept span."""
        return self._curve.nodes.between(t_ns)

    def energies_at(self, times_ns: ArrayLike) -> Float64s:
        """Return E at each of the times, joules, shape of `times_ns`; clamped to the kept span."""
        nodes = self._curve.nodes
        kept = slice(nodes.first, nodes.end)
        origin = nodes.t_ns[nodes.first]
        offsets = np.asarray(times_ns, np.int64) - origin
        # Offsets from the first node keep nanosecond resolution in float64 (15 minutes = 9e11 < 2**53).
        energies: Float64s = np.interp(offsets, nodes.t_ns[kept] - origin, nodes.low[kept])
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
        low = float(vouched.low[inner_end] - vouched.low[inner_start]) if inner_end > inner_start else 0.0
        high = float(vouched.high[outer_end] - vouched.high[outer_start])
        return WindowEnergy(joules, min(low, joules), max(high, joules), covered_ns)

    def nodes(self) -> tuple[Int64s, Float64s]:
        """Return read-only views of the kept nodes: times (ns) and energies (joules), shapes (n,)."""
        nodes = self._curve.nodes
        times, energies = nodes.t_ns[nodes.first : nodes.end], nodes.low[nodes.first : nodes.end]
        times.flags.writeable = energies.flags.writeable = False
        return times, energies


def _energies(name: str, joules: ArrayLike, ends: Int64s) -> Float64s:
    """Return checked energies, one for each segment."""
    energies = np.atleast_1d(np.asarray(joules, np.float64))
    if energies.shape != ends.shape:
        raise ValueError(f"{name} must hold one number for each of the {len(ends)} segments, not {len(energies)}")
    # NaN compares false; one pass each way is cheaper than isfinite and a comparison.
    if not ((energies >= 0) & (energies < np.inf)).all():
        raise ValueError(f"{name} must be finite and not negative")
    return energies


def _parted(nodes: _Table) -> _Table:
    """Return the vouched moments of a timeline whose nodes have all been vouched for, as a table of its own."""
    kept = slice(nodes.first, nodes.end)
    low, high = nodes.low[kept].copy(), nodes.low[kept].copy()
    return _Table(nodes.t_ns[kept].copy(), low, high, 0, len(low))
