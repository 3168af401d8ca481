"""Energy that devices used while no jouletrace ran, by their hardware counters.

A counter goes on while the process is away. As long as it runs, counter and account of a device differ by a constant;
what that difference has grown by at the next start is what nobody counted. A state is only ever restored within one
boot of the machine (`Journal`), so the counter is the same one.
"""

from collections.abc import Mapping

import msgspec
import numpy as np

from jouletrace.requests.devices import DeviceView

MOST_TIMES_LIMIT = 2.0
"""Up to so many times its power limit a device may have used: what readings are held to as well (design section 4)."""


class CounterState(msgspec.Struct, frozen=True):
    """How a device's counter and its account stood to each other."""

    offset_joules: float
    """Counter minus account."""
    since_ns: int | None = None
    """The account's horizon when a process ended whose downtime is not counted yet."""


class Counters:
    """The counters of all devices; `settled_ns` (by uuid) is where a former process left the account."""

    def __init__(self, states: Mapping[str, CounterState], settled_ns: Mapping[str, int]) -> None:
        self._states = {
            uuid: CounterState(one.offset_joules, settled_ns.get(uuid) if one.since_ns is None else one.since_ns)
            for uuid, one in states.items()
        }

    def states(self) -> dict[str, CounterState]:
        """Return what a restart needs."""
        return dict(self._states)

    def missed_joules(self, uuid: str, view: DeviceView, settled_ns: int, booked_joules: float) -> float:
        """Return what a device used while no process ran, once after a start; 0 J where that cannot be told.

        `booked_joules` is the device's account, which stands at `settled_ns`.
        """
        line = view.timeline
        if view.counter is None or not line.start_ns <= view.counter[0] <= line.end_ns:
            return 0.0
        read_ns, shown_joules = view.counter
        at_reading, at_horizon = line.energies_at(np.array([read_ns, settled_ns], np.int64)).tolist()
        offset = shown_joules + at_horizon - at_reading - booked_joules
        before, missed = self._states.get(uuid), 0.0
        if before is not None and before.since_ns is not None and view.limit_watts is not None:
            seconds = max(0, line.start_ns - before.since_ns) / 1e9
            grown = offset - before.offset_joules
            missed = grown if 0 <= grown <= MOST_TIMES_LIMIT * view.limit_watts * seconds else 0.0
        self._states[uuid] = CounterState(offset - missed)
        return missed
