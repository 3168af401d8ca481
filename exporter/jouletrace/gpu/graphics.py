"""When GRAPHICS is read: as much as it costs, what it tells changes only with the work.

GRAPHICS is the part of the time in which any kernel ran. To compute it takes 1.9 ms on an H200, all other activity
0.04 ms, and between two readings SM activity tells it: kernels of the same kind fill the same part of the SMs while
they run. So it is read often until that part is known, seldom while the work stays as it was, and twice soon after the
work has changed.
"""

from collections.abc import Iterator, Sequence

from jouletrace.gpu.readings import ActivityReading, Pipe

NS = 1_000_000_000
LOOK_SECONDS = 1.0
"""How often to ask whether GRAPHICS is due."""
UNCLEAR_SM = (0.005, 0.5)
"""SM activity between which only GRAPHICS tells for how much of the time the device was busy. It is never below SM, so
more SM says that it was for most of the time; less is nothing. On an H200 SM reads 0.11 in a loop of tiny kernels and
0.13 in decode at 20 % duty, where GRAPHICS reads 0.28 and 0.20."""
UNCLEAR_SECONDS = 5.0
"""Time between readings while SM activity is unclear and the SMs' part is not known."""
STEADY_SECONDS = 25.0
"""The same while two readings in a row agree on that part. Not longer: the diagnosis goes by readings of the last half
minute, and needs the SM activity of half of their intervals."""
CHANGED_SECONDS, SETTLED_SECONDS = 7.0, 3.0
"""After a change of the work: the shortest interval that is closed for it, and the time until the next reading, the
first that holds nothing of the work before. Together two UNCLEAR_SECONDS: work that changes all the time costs no more
than work that is not known.

Measured on 200 changes between the unclear phases of three H200 recordings, each held for 33 to 48 s: the active part
is off by 0.046 over the 20 s after a change (0.064 with a reading each 5 s), with 56 % fewer readings."""
AGREEING_RATIO = 0.1
"""Two values of the SMs' part that differ by up to this much agree."""
CHANGED_RATIO, CHANGED_LEAST = 0.25, 0.02
"""Work has changed when its activity on SMs, tensor cores or memory is off by more than this part of what it was, and
by more than this. Of the 72 changes between the nine unclear phases of the recordings 7 are smaller, and 15 if only SM
activity is looked at."""
RECENT_SECONDS = 2.0
"""Over how much time activity is compared: bursts of up to 0.9 s must not look like changes."""
_GRAPHICS, _SM, _TENSOR = Pipe.GRAPHICS, Pipe.SM, Pipe.TENSOR
"""Looked up here, not in the loop: in Python 3.11 a member of an enumeration takes five times a dict's look-up."""

Work = tuple[float, float, float]
"""Mean activity on SMs, tensor cores and memory, 0 to 1."""


class GraphicsPace:
    """Tells for one device when GRAPHICS is due; a reading is `begin`, and `add` when there is one."""

    def __init__(self) -> None:
        self._read_ns = 0
        self._work: Work | None = None
        """During the newest reading."""
        self._sm_part = 0.0
        """SM activity over GRAPHICS in the newest reading."""
        self._is_steady = False
        """Whether the reading before said the same."""
        self._is_changed = False
        """Whether the newest reading ended because the work had changed, so that it mixes two."""

    def is_due(
        self, now_ns: int, activities: Sequence[ActivityReading], interval_seconds: float, stretch: float = 1.0
    ) -> bool:
        """Return whether to read now.

        `activities` are GPM's intervals, oldest first, of at least the last `RECENT_SECONDS`. `interval_seconds` is
        the time between readings that nobody needs, `stretch` the governor's factor on all times.
        """
        age_seconds = (now_ns - self._read_ns) / NS / stretch
        if age_seconds >= interval_seconds:
            return True
        # Looks come late by what was read before them: the one nearest to the time counts.
        age_seconds += LOOK_SECONDS / 2
        if age_seconds < (SETTLED_SECONDS if self._is_changed else UNCLEAR_SECONDS):
            return False
        recent = list(_since(activities, now_ns - int(RECENT_SECONDS * stretch * NS)))
        least, most = UNCLEAR_SM
        if not recent or not least < recent[0].busy_ratio.get(_SM, 0.0) < most:
            return False
        if not self._is_steady or age_seconds >= STEADY_SECONDS:
            return True
        return age_seconds >= CHANGED_SECONDS and self._has_changed(_work(recent))

    def begin(self, now_ns: int) -> None:
        """Note that GRAPHICS is read now, whatever comes of it."""
        self._read_ns = now_ns

    def add(self, reading: ActivityReading, activities: Sequence[ActivityReading], stretch: float = 1.0) -> None:
        """Take in a GRAPHICS reading; the rest as for `is_due`, back to the reading's start where that is kept."""
        recent = list(_since(activities, reading.end_ns - int(RECENT_SECONDS * stretch * NS)))
        self._is_changed = self._is_steady and self._has_changed(_work(recent))
        self._work = _work(list(_since(activities, reading.start_ns)))
        graphics, before = reading.busy_ratio.get(_GRAPHICS, 0.0), self._sm_part
        self._sm_part = self._work[0] / graphics if graphics > 0 else 0.0
        agrees = self._sm_part > 0 and abs(self._sm_part - before) <= AGREEING_RATIO * before
        self._is_steady = agrees and not self._is_changed

    def _has_changed(self, work: Work) -> bool:
        then = self._work or work
        return any(
            abs(ratio - was) > max(CHANGED_RATIO * was, CHANGED_LEAST) for ratio, was in zip(work, then, strict=True)
        )


def _since(activities: Sequence[ActivityReading], start_ns: int) -> Iterator[ActivityReading]:
    """Yield the intervals that end after a time, newest first, without those of GRAPHICS."""
    for one in reversed(activities):
        if one.end_ns <= start_ns:
            return
        if _GRAPHICS not in one.busy_ratio:
            yield one


def _work(activities: Sequence[ActivityReading]) -> Work:
    """Return the mean over time; what the device does not give counts as none at all."""
    seconds = sm = tensor = dram = 0.0
    for one in activities:
        length = (one.end_ns - one.start_ns) / NS
        seconds += length
        sm += length * one.busy_ratio.get(_SM, 0.0)
        tensor += length * one.busy_ratio.get(_TENSOR, 0.0)
        dram += length * (one.dram_ratio or 0.0)
    return (sm / seconds, tensor / seconds, dram / seconds) if seconds else (0.0, 0.0, 0.0)
