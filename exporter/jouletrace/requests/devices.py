"""What the ledger knows of a device while it settles: energy over time, and whether anybody held it or worked on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from jouletrace.energy.timeline import Timeline

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
Bools = NDArray[np.bool_]
_Value = TypeVar("_Value")


ACTIVITY_LAG_NS = 100_000_000
"""How much older than its time a GPM reading may be: on the H200 recording 76 steps, 0.7 % of the energy, fall into
100 ms windows that read idle, each just before a window that reads busy."""
_RECENT_ROWS = 20


@dataclass(frozen=True, slots=True, eq=False)
class BusyTrack:
    """Whether work ran: `busy[i]` holds for (end_ns[i - 1], end_ns[i]], give or take `blur_ns`; end_ns increases.

    Behind its last reading and the blur of that nothing is known: readings may have stopped for good.
    """

    end_ns: Int64s
    busy: Bools
    spacing_ns: int = field(init=False)
    """How far apart the latest readings are, their median; 0 for fewer than two. A pass asks for it a dozen times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spacing_ns", _median_spacing_ns(self.end_ns[-_RECENT_ROWS:].tolist()))

    @property
    def blur_ns(self) -> int:
        """How far in time a reading may be off: a window's length and the sensor's lag."""
        return ACTIVITY_LAG_NS + self.spacing_ns

    @property
    def known_until_ns(self) -> int:
        """Up to when the last reading may be believed."""
        return int(self.end_ns[-1]) + self.blur_ns if len(self.end_ns) else 0

    def at(self, times_ns: Int64s) -> Bools:
        """Return whether work ran for certain at each time; before the track its first flag holds."""
        if not len(self.end_ns):
            return np.zeros(len(times_ns), np.bool_)
        found: Bools = self.busy[np.minimum(np.searchsorted(self.end_ns, times_ns), len(self.busy) - 1)]
        known: Bools = times_ns <= self.known_until_ns
        return found & known

    def around(self, times_ns: Int64s) -> Bools:
        """Return whether any work may have run within the blur of each time."""
        if not len(self.end_ns):
            return np.ones(len(times_ns), np.bool_)
        count = np.concatenate(([0], np.cumsum(self.busy)))
        last = len(self.busy) - 1
        first = np.minimum(np.searchsorted(self.end_ns, times_ns - self.blur_ns), last)
        final = np.minimum(np.searchsorted(self.end_ns, times_ns + self.blur_ns), last)
        found: Bools = count[final + 1] > count[first]
        unknown: Bools = times_ns > self.known_until_ns
        return found | unknown

    def changes(self, from_ns: int, until_ns: int) -> Int64s:
        """Return the times in [from_ns, until_ns] at which `at` or `around` may change."""
        turns = self.end_ns[:-1][self.busy[1:] != self.busy[:-1]]
        turns = turns[slice(*np.searchsorted(turns, [from_ns - self.blur_ns, until_ns + self.blur_ns + 1]))]
        times = np.concatenate((turns - self.blur_ns, turns, turns + self.blur_ns, [self.known_until_ns]))
        inside: Int64s = times[(times >= from_ns) & (times <= until_ns)]
        return inside


def _median_spacing_ns(times_ns: list[int]) -> int:
    spacings = sorted(later - earlier for earlier, later in pairwise(times_ns))
    middle = len(spacings) // 2
    return (spacings[middle] + spacings[~middle]) // 2 if spacings else 0


@dataclass(frozen=True, slots=True, eq=False)
class DeviceView:
    """One device at one pass of settling."""

    timeline: Timeline
    held: bool | None = None
    """Whether a process holds a context; None when not known (taken as held when an engine owns the device)."""
    busy: BusyTrack | None = None
    """From GPM activity (or utilization); None when not known (time without requests is then taken as idle)."""
    engine_shares: Mapping[str, float] | None = None
    """SM-time share by engine id in the newest reading, for a device that several engines share."""
    counter: tuple[int, float] | None = None
    """The hardware energy counter's newest reading: the time (ns) whose energy it shows, and joules."""
    limit_watts: float | None = None


class _History(Generic[_Value]):
    """What held by time: energy is settled seconds or minutes after it was used."""

    def __init__(self) -> None:
        self._until_ns: list[int] = []
        self._values: list[_Value] = []

    def note(self, now_ns: int, value: _Value, settled_ns: int) -> None:
        """Remember what holds from the last note up to now; what lies before `settled_ns` is not needed any more."""
        if self._values and self._values[-1] == value:
            self._until_ns[-1] = max(now_ns, self._until_ns[-1])
        else:
            self._until_ns.append(max(now_ns, self._until_ns[-1] if self._until_ns else now_ns))
            self._values.append(value)
        while len(self._until_ns) > 1 and self._until_ns[0] < settled_ns:
            del self._until_ns[0], self._values[0]

    def changes(self) -> Int64s:
        """Return the times at which it changes."""
        return np.array(self._until_ns[:-1], np.int64)

    def _rows(self, times_ns: Int64s) -> Int64s:
        rows: Int64s = np.minimum(np.searchsorted(self._until_ns, times_ns), len(self._values) - 1)
        return rows


class HeldHistory(_History[bool | None]):
    """Whether processes held a device; None where nobody could tell."""

    def at(self, times_ns: Int64s, *, unknown: bool) -> Bools:
        """Return the answer at each time; `unknown` where nobody could tell."""
        found: Bools = np.array([unknown if held is None else held for held in self._values])[self._rows(times_ns)]
        return found


class TimeShares(_History[Mapping[str, float]]):
    """How engines shared a device's SM time, by engine id."""

    def of(self, engine_id: str, times_ns: Int64s) -> Float64s:
        """Return an engine's share at each time, 0 where the readings do not know it."""
        found: Float64s = np.array([shares.get(engine_id, 0.0) for shares in self._values])[self._rows(times_ns)]
        return found


def brackets(view: DeviceView, times_ns: Int64s) -> Float64s:
    """Return by how much E(t) may be off at each time, joules: the distance to the farther end of t's segment.

    The sensor knows the energy of a whole segment (a 20 ms sample, a 100 ms tick), not where in it the energy went.
    """
    node_ns, joules = view.timeline.nodes()
    after = np.clip(np.searchsorted(node_ns, times_ns), 1, max(len(node_ns) - 1, 1))
    if len(node_ns) < 2:
        return np.zeros(len(times_ns))
    energy = view.timeline.energies_at(times_ns)
    off: Float64s = np.maximum(energy - joules[after - 1], joules[after] - energy)
    return np.maximum(off, 0.0)


def slack(view: DeviceView, from_ns: int, until_ns: int) -> float:
    """Return how uncertain the energy of (from_ns, until_ns] is beyond its two edges, as a part of it, 0 to 1.

    That is what gaps and coarse sensors leave open; 0 for a ring without gaps.
    """
    window = view.timeline.window(from_ns, until_ns)
    if window.joules <= 0:
        return 0.0
    edges = float(brackets(view, np.array([from_ns, until_ns], np.int64)).sum())
    off = max(window.joules - window.low, window.high - window.joules) - edges
    return min(max(off / window.joules, 0.0), 1.0)
