"""When GRAPHICS is read: a device whose work is known, looked at each second."""

from collections.abc import Callable

import numpy as np
import pytest

from jouletrace.gpu.graphics import GraphicsPace
from jouletrace.gpu.readings import ActivityReading, Pipe

NS = 1_000_000_000
START_NS = 1_700_000_000 * NS

Kernels = tuple[float, float, float]
"""Activity on SMs, on memory, and GRAPHICS."""
SMALL: Kernels = (0.11, 0.11, 0.28)
"""A loop of tiny kernels on an H200."""
DECODE: Kernels = (0.13, 0.12, 0.20)
"""Decode at 20 % duty, there."""
LONG: Kernels = (0.335, 0.31, 0.50)
"""Decode at 50 % duty."""
FULL: Kernels = (0.9, 0.6, 0.95)


def read_at(
    work: Callable[[float], Kernels], seconds: int, *, interval_seconds: float = 30.0, stretch: float = 1.0
) -> list[float]:
    """Return when GRAPHICS is read of a device that does `work` half a second long each, seconds from the start."""
    pace, activities, found = GraphicsPace(), list[ActivityReading](), list[float]()
    graphics, since_ns = list[float](), None
    for half in range(1, 2 * seconds + 1):
        end_ns = START_NS + round(half * stretch * NS / 2)
        sm, dram, busy = work((half - 1) / 2 * stretch)
        activities.append(ActivityReading(end_ns - round(stretch * NS / 2), end_ns, dram, {Pipe.SM: sm}))
        graphics.append(busy)
        # A look comes some milliseconds late, each time other ones.
        if half % 2 == 0 and pace.is_due(end_ns + half % 7 * 1_000_000, activities, interval_seconds, stretch):
            pace.begin(end_ns + half % 7 * 1_000_000)
            if since_ns is not None:
                mean = sum(graphics) / len(graphics)
                reading = ActivityReading(since_ns, end_ns, busy_ratio={Pipe.GRAPHICS: mean})
                pace.add(reading, activities, stretch)
                activities.append(reading)
            since_ns, graphics = end_ns, []
            found.append((end_ns - START_NS) / NS)
    return found


def test_steady_work_is_read_each_25_s_once_two_readings_agree() -> None:
    assert read_at(lambda _: SMALL, 90) == [1, 6, 11, 36, 61, 86]


@pytest.mark.parametrize("work", [(0.0, 0.0, 0.0), FULL])
def test_work_that_sm_activity_tells_enough_of_is_read_each_30_s(work: Kernels) -> None:
    assert read_at(lambda _: work, 100) == pytest.approx([1, 31, 61, 91], abs=2)


def test_readings_that_do_not_agree_come_each_5_s() -> None:
    # The same SM activity, by kernels that fill ever more or ever less of the SMs.
    assert read_at(lambda t: (0.2, 0.1, 0.9 if t // 5 % 2 else 0.3), 32) == [1, 6, 11, 16, 21, 26, 31]


@pytest.mark.parametrize("then", [LONG, (SMALL[0], 0.3, 0.6)], ids=["on the SMs", "in memory only"])
def test_a_change_closes_the_interval_and_the_next_one_is_short(then: Kernels) -> None:
    at = read_at(lambda t: SMALL if t < 30 else then, 75)
    assert at[:4] == [1, 6, 11, 31], "seen within a second"
    assert at[4] == 34, "the first that holds nothing of the work before"
    assert at[5] == 39
    assert at[6] == 64, "known again"


def test_a_change_waits_until_seven_seconds_after_a_reading() -> None:
    at = read_at(lambda t: SMALL if t < 13 else LONG, 40)
    assert at[:5] == [1, 6, 11, 18, 21]


def test_other_work_of_the_same_activity_is_seen_by_the_next_reading() -> None:
    assert read_at(lambda t: SMALL if t < 30 else DECODE, 70) == [1, 6, 11, 36, 41, 46]


def test_bursts_are_steady_work() -> None:
    """0.7 s at full load and 0.7 s at rest: half a second reads anything between."""
    at = read_at(lambda t: (FULL, (0.45, 0.3, 0.475), (0.0, 0.0, 0.0))[int(t * 2) % 3], 100)
    assert len(at) <= 6


def test_work_that_changes_all_the_time_costs_no_more_than_a_reading_each_5_s() -> None:
    rng = np.random.default_rng(7)
    for pace_seconds in (1, 2, 4, 8, 12):
        courses = rng.uniform(0.02, 0.48, 700)
        at = read_at(lambda t, c=courses, p=pace_seconds: (c[int(t / p)], 0.1, c[int(t / p)] / 0.6), 600)  # type: ignore[misc]
        assert len(at) <= 600 / 5 + 1


def test_a_shorter_interval_of_the_operator_holds() -> None:
    at = read_at(lambda _: FULL, 30, interval_seconds=3.0)
    assert np.diff(at) == pytest.approx(3.5, abs=0.5)


def test_all_times_stretch() -> None:
    assert read_at(lambda _: SMALL, 60, stretch=2.0) == [2, 12, 22, 72]
