"""A device's energy by pod: pure arithmetic on who held the device when.

Every joule of the device goes into one row. The processes are known at moments, so each list of them holds for the time
that is nearer to it than to the lists before and after. Where processes of several rows hold the device, they share
each moment's energy by the SM time of its processes, equally (by process) where none of them is known to have run. With
several rows this is a model: power is not proportional to SM time, and in MIG mode SM time is not known.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from jouletrace.energy.timeline import Timeline

NS = 1_000_000_000
Row = tuple[str, str, str]
"""Namespace, pod and container."""
OUTSIDE: Final[Row] = ("", "", "")
"""The row of what runs outside of pods, of pods whose names are not known, and of time without any process."""
OTHER: Final[Row] = ("other", "other", "other")
"""The row of the pods beyond `MOST_ROWS`."""
MOST_ROWS: Final = 64
"""Pods' rows of a device at a time: time slicing rarely makes more than some ten of a GPU, MIG at most seven."""
PATIENCE_NS: Final = 30 * NS
"""How long a shared moment waits for SM times, which are read every 10 s; then it is shared equally."""
MOST_LISTS: Final = 128
"""Lists of processes, and of SM shares, that wait to be settled; only of a device whose energy stands still, as that of
a lost one, are there more than `PATIENCE_NS` holds. Each list then holds for longer, for the time without readings."""
KEPT_NS: Final = 60 * NS
"""How long a row stays after its last joules."""
SCRAPE_AFTER_NS: Final = 2 * NS
"""A scrape this long after a change shows it for certain: a look at the processes is 0.5 s."""


@dataclass(slots=True)
class _Account:
    joules: float = 0.0
    changed_ns: int = 0


@dataclass(frozen=True, slots=True)
class _Holding:
    """Who holds the device, from the list before on."""

    t_ns: int
    rows: Mapping[int, Row]
    """By pid."""


@dataclass(frozen=True, slots=True)
class _SmTimes:
    """SM shares by pid over the time since the reading before."""

    t_ns: int
    ratios: Mapping[int, float]


class DevicePods:
    """The rows of one device. What they are given adds up to the device's energy up to `settled_ns`."""

    def __init__(self) -> None:
        self._accounts: dict[Row, _Account] = {}
        self._holdings: deque[_Holding] = deque(maxlen=MOST_LISTS)
        self._sm_times: deque[_SmTimes] = deque(maxlen=MOST_LISTS)
        self.settled_ns: int | None = None
        """Up to where the device's energy is given out; None before the first time."""
        self._settled_joules = 0.0

    @property
    def joules(self) -> dict[Row, float]:
        """Energy by row; a row that has been left out begins at 0 when its pod comes back."""
        return {row: account.joules for row, account in self._accounts.items()}

    def hold(self, t_ns: int, rows: Mapping[int, Row]) -> None:
        """Take in a list of the processes on the device, by pid; lists before the last are passed over."""
        if not self._holdings or t_ns > self._holdings[-1].t_ns:
            self._holdings.append(_Holding(t_ns, rows))

    def share(self, t_ns: int, ratios: Mapping[int, float]) -> None:
        """Take in the SM shares of processes in the time from the reading before to `t_ns`."""
        if not self._sm_times or t_ns > self._sm_times[-1].t_ns:
            self._sm_times.append(_SmTimes(t_ns, ratios))

    def settle(self, timeline: Timeline, now_ns: int) -> None:
        """Give out the device's energy as far as it and its holders are known."""
        if self.settled_ns is None:
            self.settled_ns = timeline.start_ns
        while len(self._holdings) > 1:
            holding, after = self._holdings[0], self._holdings[1]
            middle_ns = (holding.t_ns + after.t_ns) // 2
            if not self._settle_holding(holding, middle_ns, timeline, now_ns):
                break
            self._holdings.popleft()
        while len(self._sm_times) > 1 and self._sm_times[0].t_ns < self.settled_ns:
            self._sm_times.popleft()

    def drop_ended(self, now_ns: int, scraped_ns: int) -> None:
        """Drop the rows of pods that are gone once their last joules have been exposed for a minute and scraped."""
        held = {row for holding in self._holdings for row in holding.rows.values()} | {OUTSIDE, OTHER}
        self._accounts = {
            row: account
            for row, account in self._accounts.items()
            if row in held or now_ns - account.changed_ns < KEPT_NS or scraped_ns - account.changed_ns < SCRAPE_AFTER_NS
        }

    def _settle_holding(self, holding: _Holding, until_ns: int, timeline: Timeline, now_ns: int) -> bool:
        """Give out the energy up to a time to who held the device; return whether all of it could be."""
        assert self.settled_ns is not None
        shared = len(set(holding.rows.values())) > 1
        while self.settled_ns < until_ns:
            sm_times = next((one for one in self._sm_times if one.t_ns > self.settled_ns), None)
            if shared and sm_times is None and now_ns - until_ns < PATIENCE_NS:
                return False
            end_ns = until_ns if sm_times is None or not shared else min(until_ns, sm_times.t_ns)
            if end_ns > timeline.end_ns:
                return False
            joules = timeline.energy_at(end_ns)
            self._give(joules - self._settled_joules, holding.rows, sm_times.ratios if sm_times else {}, now_ns)
            self.settled_ns, self._settled_joules = end_ns, joules
        return True

    def _give(self, joules: float, rows: Mapping[int, Row], ratios: Mapping[int, float], now_ns: int) -> None:
        weights: dict[Row, float] = {}
        ran = sum(ratios.get(pid, 0.0) for pid in rows)
        for pid, row in rows.items():
            weights[row] = weights.get(row, 0.0) + (ratios.get(pid, 0.0) / ran if ran > 0 else 1.0 / len(rows))
        for row, weight in (weights or {OUTSIDE: 1.0}).items():
            account = self._account(row)
            account.joules += joules * weight
            account.changed_ns = now_ns

    def _account(self, row: Row) -> _Account:
        if row not in self._accounts and len(self._accounts.keys() - {OUTSIDE, OTHER}) >= MOST_ROWS:
            row = OTHER if row != OUTSIDE else row
        return self._accounts.setdefault(row, _Account())
