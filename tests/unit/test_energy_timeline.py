import threading
import tracemalloc
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jouletrace.energy.timeline import DEPTH_NS, Timeline

S = 1_000_000_000
MS = 1_000_000
START_NS = 1_795_373_000_123_456_789


@dataclass(frozen=True)
class Batch:
    """One call of `extend`: segments of (length ns, joules, below, above)."""

    segments: list[tuple[int, float, float, float]]
    atomic: bool
    with_slack: bool


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    joules = st.floats(0, 100)
    segments = st.tuples(st.integers(1, 100), joules, joules, joules)
    return Batch(draw(st.lists(segments, min_size=1, max_size=5)), draw(st.booleans()), draw(st.booleans()))


def build(course: list[Batch]) -> Timeline:
    timeline = Timeline(START_NS)
    for batch in course:
        lengths, joules, below, above = zip(*batch.segments, strict=True)
        ends = timeline.end_ns + np.cumsum(lengths)
        slack = {"below": below, "above": above} if batch.with_slack else {}
        timeline.extend(ends, joules, atomic=batch.atomic, **slack)
    return timeline


def pieces(course: list[Batch]) -> list[tuple[int, int, float]]:
    """Start, end and energy of each segment, times relative to the start."""
    lengths = [segment[0] for batch in course for segment in batch.segments]
    joules = [segment[1] for batch in course for segment in batch.segments]
    ends = list(accumulate(lengths))
    return [(end - length, end, e) for end, length, e in zip(ends, lengths, joules, strict=True)]


def measured(course: list[Batch]) -> list[tuple[int, int, float, float]]:
    """Start, end, least and most energy of each stretch of which only the sum is measured."""
    found, start = [], 0
    for batch in course:
        stretches = [batch.segments] if batch.atomic else [[segment] for segment in batch.segments]
        for stretch in stretches:
            end = start + sum(length for length, *_ in stretch)
            least = most = 0.0
            for _, joules, below, above in stretch:
                least += joules - min(below, joules) if batch.with_slack else joules
                most += joules + above if batch.with_slack else joules
            found.append((start, end, least, most))
            start = end
    return found


COURSES = st.lists(batches(), min_size=1, max_size=8)
TIMES = st.integers(-50, 2_000)


@given(COURSES, TIMES, TIMES)
def test_window_meets_the_naive_sum(course: list[Batch], one: int, other: int) -> None:
    start, end = min(one, other), max(one, other)
    energy = build(course).window(START_NS + start, START_NS + end)
    naive = sum(
        joules * max(0, min(end, right) - max(start, left)) / (right - left) for left, right, joules in pieces(course)
    )
    assert energy.joules == pytest.approx(naive, rel=1e-9, abs=1e-9)
    last = pieces(course)[-1][1]
    assert energy.covered_ns == max(0, min(end, last) - max(start, 0))
    assert energy.low <= energy.joules <= energy.high


@given(COURSES, TIMES, TIMES)
def test_bounds_are_the_worst_that_any_power_can_do(course: list[Batch], one: int, other: int) -> None:
    # The worst truths put all the energy of a cut stretch on one side of the cut: the least sum leaves out each
    # stretch that reaches out of the window, the most sum takes in each that reaches into it.
    start, end = min(one, other), max(one, other)
    energy = build(course).window(START_NS + start, START_NS + end)
    stretches = measured(course)
    last = stretches[-1][1]
    least = sum(low for left, right, low, _ in stretches if start <= left and right <= end)
    most = sum(high for left, right, _, high in stretches if left < min(end, last) and right > max(start, 0))
    assert energy.low == pytest.approx(min(least, energy.joules), rel=1e-9, abs=1e-9)
    if max(start, 0) < min(end, last):
        assert energy.high == pytest.approx(max(most, energy.joules), rel=1e-9, abs=1e-9)


@given(COURSES, TIMES, TIMES, st.integers(0, 30), st.data())
def test_bounds_hold_for_any_truth(
    course: list[Batch], one: int, other: int, time_error: int, data: st.DataObject
) -> None:
    # A truth: each measured stretch really lies up to `time_error` beside where it was placed and used its
    # energy in bursts anywhere inside.
    stretches = measured(course)
    edges = [0] + [right for _, right, _, _ in stretches]
    shifts = data.draw(st.lists(st.integers(-time_error, time_error), min_size=len(edges), max_size=len(edges)))
    moved = list(accumulate((e + s for e, s in zip(edges, shifts, strict=True)), max))
    start, end = min(one, other), max(one, other)
    truth = 0.0
    for (_, _, low, high), (left, right) in zip(stretches, pairwise(moved), strict=True):
        total = data.draw(st.floats(low, high))
        burst = data.draw(st.integers(min(left + 1, right), right))
        truth += total if start < burst <= end else 0.0
    energy = build(course).window(START_NS + start, START_NS + end, time_error_ns=time_error)
    # Around the ends nothing is vouched for: there a window is only known as far as it is covered.
    inner_start, inner_end = start - 2 * time_error - 1, end + 2 * time_error + 1
    if time_error == 0 or (inner_start >= 0 and inner_end <= edges[-1]):
        assert energy.high >= truth - 1e-9
    assert energy.low <= truth + 1e-9


@given(COURSES, st.lists(TIMES, min_size=3, max_size=3).map(sorted))
def test_windows_add_up_and_grow(course: list[Batch], times: list[int]) -> None:
    timeline = build(course)
    first, middle, last = (START_NS + t for t in times)
    left, right, whole = timeline.window(first, middle), timeline.window(middle, last), timeline.window(first, last)
    assert left.joules + right.joules == pytest.approx(whole.joules, rel=1e-12, abs=1e-9)
    assert left.covered_ns + right.covered_ns == whole.covered_ns
    assert left.low + right.low <= whole.low + 1e-9
    assert left.high + right.high >= whole.high - 1e-9
    assert timeline.energy_at(first) <= timeline.energy_at(middle) <= timeline.energy_at(last)
    assert timeline.energies_at([first, middle, last]) == pytest.approx(
        [timeline.energy_at(t) for t in (first, middle, last)], rel=1e-12
    )


@given(COURSES, st.integers(1, 400))
@settings(max_examples=50)
def test_a_short_depth_changes_no_window_inside_it(course: list[Batch], depth: int) -> None:
    whole, short = build(course), Timeline(START_NS, depth_ns=depth)
    for batch in course:
        lengths, joules, below, above = zip(*batch.segments, strict=True)
        slack = {"below": below, "above": above} if batch.with_slack else {}
        short.extend(short.end_ns + np.cumsum(lengths), joules, atomic=batch.atomic, **slack)
    assert short.end_ns == whole.end_ns
    assert short.joules == whole.joules
    assert short.start_ns <= max(whole.start_ns, whole.end_ns - depth)
    for start_ns in range(max(whole.start_ns, whole.end_ns - depth), whole.end_ns, 37):
        assert short.window(start_ns, whole.end_ns) == whole.window(start_ns, whole.end_ns)


def test_a_quarter_hour_is_kept_in_constant_memory() -> None:
    timeline = Timeline(START_NS)
    used = []
    tracemalloc.start()
    for _ in range(4):
        # An hour of the ring with its mean spacing, in the daemon's batches.
        for _ in range(3_600):
            timeline.extend(timeline.end_ns + np.arange(1, 51) * 20 * MS, np.full(50, 8.0))
        used.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert timeline.end_ns - DEPTH_NS - 20 * MS <= timeline.start_ns <= timeline.end_ns - DEPTH_NS
    assert len(timeline) == 45_001
    window = timeline.window(timeline.end_ns - DEPTH_NS, timeline.end_ns)
    assert window.covered_ns == DEPTH_NS
    assert window.joules == pytest.approx(15 * 60 * 400, rel=1e-9)
    assert window.low == window.joules == window.high
    assert max(used) < 1.2e6
    assert used[-1] <= used[0] + 4_096


def test_an_uncertain_timeline_is_bounded_too() -> None:
    timeline = Timeline(START_NS)
    used = []
    tracemalloc.start()
    for _ in range(2):
        for _ in range(2_000):
            ends = timeline.end_ns + np.arange(1, 51) * 20 * MS
            timeline.extend(ends, np.full(50, 8.0), below=np.full(50, 1.0), above=np.full(50, 2.0))
        used.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert used[1] <= used[0] + 4_096
    assert used[1] < 4e6
    window = timeline.window(timeline.end_ns - S, timeline.end_ns)
    assert (window.low, window.joules, window.high) == pytest.approx((350, 400, 500))


def test_short_windows_stay_sharp_after_months() -> None:
    # 1e10 J: 700 W for 165 days. Whatever stood before, 20 ms must come out to 0.1 mJ.
    timeline = Timeline(START_NS)
    timeline.extend([START_NS + 165 * 86_400 * S], [1e10])
    random = np.random.default_rng(1)
    for _ in range(200):
        lengths, joules = random.integers(6 * MS, 48 * MS, 50), random.uniform(1.5, 14, 50)
        start_ns = timeline.end_ns
        ends = start_ns + np.cumsum(lengths)
        timeline.extend(ends, joules)
        for i in range(1, 50):
            assert timeline.window(ends[i - 1], ends[i]).joules == pytest.approx(joules[i], abs=1e-4)
        assert timeline.window(start_ns, ends[-1]).joules == pytest.approx(joules.sum(), abs=1e-4)


def test_a_reader_never_sees_a_half_written_curve() -> None:
    # 100 W all the time, a gap now and then, so that the arrays are moved and parted while the reader reads.
    timeline = Timeline(START_NS, depth_ns=20 * S)
    wrong: list[str] = []
    looks = 0
    done = threading.Event()

    def read() -> None:
        nonlocal looks
        held: list[tuple[np.ndarray, np.ndarray, bytes]] = []
        while not done.is_set():
            looks += 1
            end_ns = timeline.end_ns
            window = timeline.window(end_ns - 7 * S, end_ns)
            if (
                abs(window.joules - 100 * window.covered_ns / S) > 1e-6
                or not window.low <= window.joules <= window.high
            ):
                wrong.append(f"{window}")
            if looks % 50 == 0:
                times, joules = timeline.nodes()
                held = [*held[-20:], (times, joules, times.tobytes() + joules.tobytes())]
        wrong.extend("changed" for times, joules, then in held if times.tobytes() + joules.tobytes() != then)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(6_000):
        ends = timeline.end_ns + np.arange(1, 51) * 20 * MS
        timeline.extend(ends, np.full(50, 2.0))
        if number % 500 == 499:
            timeline.extend([timeline.end_ns + S], [100.0], below=[50.0], above=[600.0])
    done.set()
    reader.join(10)
    assert not wrong
    assert looks > 100


def test_what_nodes_returns_cannot_be_written() -> None:
    timeline = Timeline(START_NS)
    timeline.extend([START_NS + S], [100.0])
    for view in timeline.nodes():
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0


@pytest.mark.parametrize(
    ("ends", "joules", "slack", "message"),
    [
        ([0], [1], {}, "increase"),
        ([-1], [1], {}, "increase"),
        ([10, 10], [1, 1], {}, "increase"),
        ([20, 10], [1, 1], {}, "increase"),
        ([10], [-1], {}, "joules must be finite and not negative"),
        ([10], [float("nan")], {}, "joules must be finite"),
        ([10], [float("inf")], {}, "joules must be finite"),
        ([10, 20], [1], {}, "2 segments, not 1"),
        ([10], [1], {"below": [float("nan")]}, "below must be finite"),
        ([10], [1], {"above": [-1]}, "above must be finite and not negative"),
        ([10], [1], {"above": [1, 1]}, "above must hold"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(
    ends: list[int], joules: list[float], slack: dict[str, list[float]], message: str
) -> None:
    timeline = Timeline(START_NS)
    timeline.extend([START_NS + S], [100.0])
    with pytest.raises(ValueError, match=message):
        timeline.extend(timeline.end_ns + np.array(ends), joules, **slack)
    assert (timeline.end_ns, timeline.joules, len(timeline)) == (START_NS + S, 100.0, 2)
    timeline.extend([START_NS + 2 * S], [50.0])
    assert timeline.window(START_NS, START_NS + 2 * S).joules == 150.0


def test_a_window_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="must not end before it starts"):
        Timeline(START_NS).window(START_NS + 1, START_NS)


def test_no_segments_are_no_change() -> None:
    timeline = Timeline(START_NS)
    timeline.extend([], [])
    assert (timeline.end_ns, timeline.joules, len(timeline)) == (START_NS, 0.0, 1)
    assert timeline.window(START_NS - S, START_NS + S).joules == 0.0
