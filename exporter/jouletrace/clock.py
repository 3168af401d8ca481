"""Time that never steps: epoch nanoseconds carried by the monotonic clock.

Energy is a function of time, so the time it is recorded against must not jump. A `Clock` hands out epoch
nanoseconds that agree with the wall clock when it is made and then advance with the monotonic clock. When
somebody sets the wall clock, `from_wall` translates stamps made after the step (the driver's, a client's) back
to steady time.
"""

import threading
import time
from typing import Protocol

WALL_NOISE_NS = 2_000_000
"""Differences between the two clocks below this are read jitter, not a step."""
_READ_NS = 100_000
_READ_TRIES = 5
"""The clocks are compared by reading one between two reads of the other, at most this far apart and this often
(three reads take under 1 us; a thread that is preempted in between adds milliseconds)."""


class Clock(Protocol):
    """Steady epoch nanoseconds and a way to wait in them."""

    def now_ns(self) -> int:
        """Return steady epoch nanoseconds; never goes back."""

    def from_wall(self, wall_ns: int) -> int:
        """Return the steady time of a wall-clock stamp made now or shortly ago."""

    def to_wall(self, steady_ns: int) -> int:
        """Return the wall-clock time of a steady time."""

    def wall_step_ns(self) -> int:
        """Return how far the wall clock has been set since the start (0 when it was not)."""

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        """Sleep until `until_ns` or until `wake` is set."""


class SystemClock:
    """The clock of a live machine."""

    def __init__(self) -> None:
        self._offset_ns = _wall_minus_monotonic_ns()

    def now_ns(self) -> int:
        """Return steady epoch nanoseconds."""
        return time.monotonic_ns() + self._offset_ns

    def wall_step_ns(self) -> int:
        """Return wall clock minus steady clock, 0 within read jitter.

        NTP slewing moves both clocks alike on Linux, so only a step shows here.
        """
        step = _wall_minus_monotonic_ns() - self._offset_ns
        return step if abs(step) > WALL_NOISE_NS else 0

    def from_wall(self, wall_ns: int) -> int:
        """Return the steady time of a wall-clock stamp made since the last step."""
        return wall_ns - self.wall_step_ns()

    def to_wall(self, steady_ns: int) -> int:
        """Return the wall-clock time of a steady time."""
        return steady_ns + self.wall_step_ns()

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        """Sleep until `until_ns` or until `wake` is set."""
        wake.wait(max(0.0, (until_ns - self.now_ns()) / 1e9))


def _wall_minus_monotonic_ns() -> int:
    """Return the difference of the two clocks, from the closest of a few tries."""
    tries: list[tuple[int, int]] = []
    while len(tries) < _READ_TRIES:
        before_ns, wall_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        tries.append((after_ns - before_ns, wall_ns - (before_ns + after_ns) // 2))
        if tries[-1][0] <= _READ_NS:
            break
    return min(tries)[1]
