"""Time for tests that stands still until they say otherwise."""

import threading

START_NS = 2_000_000_000_000_000_000


class SteppedClock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.t_ns = START_NS

    def now_ns(self) -> int:
        return self.t_ns

    def from_wall(self, wall_ns: int) -> int:
        return wall_ns

    def to_wall(self, steady_ns: int) -> int:
        return steady_ns

    def wall_step_ns(self) -> int:
        return 0

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        self.t_ns = max(self.t_ns, until_ns)
