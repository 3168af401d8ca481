"""Joules per request as a Prometheus histogram with exemplars."""

from bisect import bisect_left
from itertools import accumulate

from jouletrace.requests.account import Buckets

BOUNDS = tuple(0.1 * 2**power for power in range(21))
"""Joules: from an embedding (0.1 J) to beyond a video (0.1 MJ; the survey's median is 0.3 MJ, its images 0.4-26 kJ)."""


class JoulesHistogram:
    """Counts requests by their joules; a bucket remembers its newest trace id."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total_joules = 0.0
        self.exemplars: list[tuple[str, float, int] | None] = [None] * (len(BOUNDS) + 1)

    def observe(self, joules: float, trace_id: str | None, end_ns: int) -> None:
        """Count a request."""
        at = bisect_left(BOUNDS, joules)
        self.counts[at] += 1
        self.total_joules += joules
        if trace_id is not None:
            self.exemplars[at] = (trace_id, joules, end_ns)

    def buckets(self) -> Buckets:
        """Return the histogram as it is now."""
        return Buckets(BOUNDS, tuple(accumulate(self.counts)), self.total_joules, tuple(self.exemplars))
