"""Energy by pod: closed forms, and conservation over random histories."""

import random

import pytest

from jouletrace.energy.timeline import Timeline
from jouletrace.workloads.energy import KEPT_NS, MOST_ROWS, NS, OTHER, OUTSIDE, DevicePods

A, B = ("team-a", "llm-0", "engine"), ("team-b", "train-7", "trainer")


def steady(seconds: int, watts: float) -> Timeline:
    """Return a timeline that begins at 0."""
    timeline = Timeline(0)
    timeline.extend([s * NS for s in range(1, seconds + 1)], [watts] * seconds)
    return timeline


def test_the_middle_between_two_lists_parts_what_came_from_what_went() -> None:
    pods = DevicePods()
    for second, rows in enumerate([{}, {1: A}, {1: A}, {2: B}, {}, {}]):
        pods.hold(second * NS, rows)
    pods.settle(steady(10, 200.0), 10 * NS)
    # A from 0.5 to 2.5 s, B to 3.5 s, then nobody until 4.5 s, the middle of the last two lists.
    assert pods.joules == pytest.approx({OUTSIDE: 300.0, A: 400.0, B: 200.0})


def test_several_pods_share_by_sm_time_once_it_is_known() -> None:
    pods, timeline = DevicePods(), steady(60, 100.0)
    pods.share(0, {})
    for second in range(21):
        pods.hold(second * NS, {1: A, 2: A, 3: B})
    pods.settle(timeline, 20 * NS)
    assert pods.joules == {}, "SM times are read every 10 s"
    pods.share(10 * NS, {1: 0.2, 2: 0.1, 3: 0.1, 4: 0.6})
    pods.settle(timeline, 20 * NS)
    assert pods.joules == pytest.approx({A: 750.0, B: 250.0})
    # Nothing ran: equally by process, up to the middle of the last two lists.
    pods.share(20 * NS, {})
    pods.settle(timeline, 20 * NS)
    assert pods.joules == pytest.approx({A: 750.0 + 950 * 2 / 3, B: 250.0 + 950 / 3})


def test_sm_times_that_never_come_are_not_waited_for_for_ever() -> None:
    pods, timeline = DevicePods(), steady(60, 100.0)
    pods.hold(0, {1: A, 2: B})
    pods.hold(2 * NS, {1: A, 2: B})
    pods.settle(timeline, 30 * NS)
    assert pods.joules == {}
    pods.settle(timeline, 31 * NS)
    assert pods.joules == pytest.approx({A: 50.0, B: 50.0})


def test_a_single_pod_waits_for_nothing() -> None:
    pods = DevicePods()
    pods.hold(0, {1: A, 2: A})
    pods.hold(2 * NS, {1: A, 2: A})
    pods.settle(steady(1, 100.0), 2 * NS)
    assert pods.joules == pytest.approx({A: 100.0})


def test_nothing_is_given_beyond_the_timeline() -> None:
    pods, timeline = DevicePods(), steady(3, 100.0)
    pods.hold(0, {1: A})
    pods.hold(10 * NS, {1: A})
    pods.settle(timeline, 10 * NS)
    assert pods.joules == {}
    timeline.extend([5 * NS], [100.0])
    pods.settle(timeline, 10 * NS)
    assert pods.joules == {A: 400.0}


def test_a_device_that_is_away_for_hours_is_settled_when_it_is_back() -> None:
    pods, timeline = DevicePods(), steady(10, 100.0)
    for second in range(10):
        pods.hold(second * NS, {1: A})
        pods.settle(timeline, second * NS)
    for second in range(10, 20_000):
        pods.hold(second * NS, {})
        pods.settle(timeline, second * NS)
    timeline.extend([20_000 * NS], [1_999_000.0])
    pods.hold(20_001 * NS, {1: A})
    pods.settle(timeline, 20_001 * NS)
    assert pods.settled_ns == 20_000 * NS
    assert pods.joules == pytest.approx({A: 950.0, OUTSIDE: 2_000_000.0 - 950.0})


def test_a_row_goes_a_minute_after_its_pod_once_it_was_scraped_and_begins_anew() -> None:
    pods, timeline = DevicePods(), steady(400, 100.0)

    def at(second: int, rows: dict[int, tuple[str, str, str]], scraped: int = 0) -> set[tuple[str, str, str]]:
        pods.hold(second * NS, rows)
        pods.settle(timeline, second * NS)
        pods.drop_ended(second * NS, scraped * NS)
        return set(pods.joules)

    at(0, {1: A})
    at(10, {1: A})
    assert at(20, {}, scraped=19) == {A}
    assert at(30, {}, scraped=29) == {A, OUTSIDE}
    joules = pods.joules[A]
    assert joules == 1500.0
    # Its last joules came with the list at 20 s.
    assert at(20 + KEPT_NS // NS - 1, {}, scraped=79) == {A, OUTSIDE}
    assert pods.joules[A] == joules
    assert at(20 + KEPT_NS // NS, {}, scraped=79) == {OUTSIDE}
    at(90, {1: A})
    at(100, {1: A})
    assert pods.joules[A] == 1000.0, "5 s to either side"


def test_a_row_that_nobody_has_scraped_stays() -> None:
    pods, timeline = DevicePods(), steady(400, 100.0)
    for second, rows in ((0, {1: A}), (10, {}), (20, {})):
        pods.hold(second * NS, rows)
        pods.settle(timeline, second * NS)
    for scraped_ns in (0, 10 * NS):
        pods.drop_ended(300 * NS, scraped_ns)
        assert A in pods.joules
    pods.drop_ended(300 * NS, 290 * NS)
    assert A not in pods.joules


def test_pods_beyond_the_limit_are_one() -> None:
    pods = DevicePods()
    crowd = {pid: ("ns", f"pod-{pid}", "main") for pid in range(100)}
    pods.hold(0, crowd)
    pods.share(0, {})
    pods.hold(2 * NS, crowd)
    pods.share(2 * NS, {})
    pods.settle(steady(1, 100.0), 2 * NS)
    assert len(pods.joules) == MOST_ROWS + 1
    assert pods.joules[OTHER] == pytest.approx(100 - MOST_ROWS)
    assert sum(pods.joules.values()) == pytest.approx(100)


@pytest.mark.parametrize("seed", range(40))
def test_all_rows_together_are_the_device_whatever_happens(seed: int) -> None:
    """Lists, SM times, the timeline's samples and settling in any order and at any rate; rows never go down."""
    chance = random.Random(seed)
    timeline, pods = Timeline(0), DevicePods()
    names = [("ns", f"pod-{number}", "main") for number in range(chance.choice([2, 6, 90]))]
    now_ns, dropped = 0, 0.0
    before: dict[tuple[str, str, str], float] = {}
    for _ in range(400):
        now_ns += chance.choice([1, 1_000, 20_000_000, NS, 10 * NS])
        match chance.randrange(4):
            case 0:
                on = chance.sample(range(100), chance.randrange(5))
                pods.hold(now_ns - chance.randrange(NS), {pid: chance.choice([OUTSIDE, *names]) for pid in on})
            case 1:
                pods.share(now_ns - chance.randrange(NS), {pid: chance.choice([0, 1e-300, 0.3]) for pid in range(100)})
            case 2:
                timeline.extend([now_ns], [chance.choice([0.0, 1e-9, 5.0, 700.0])])
            case 3:
                pods.settle(timeline, now_ns)
                assert all(joules >= before.get(row, 0.0) for row, joules in pods.joules.items())
                before = pods.joules
                pods.drop_ended(now_ns, now_ns)
                dropped += sum(joules for row, joules in before.items() if row not in pods.joules)
                before = pods.joules
                total = dropped + sum(before.values())
                settled_ns = pods.settled_ns or 0
                assert total == pytest.approx(timeline.energy_at(settled_ns), rel=1e-12, abs=1e-9)
    assert before
