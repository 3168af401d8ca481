import numpy as np
import pytest
from tests.diagnosed import SHARES, START_NS, S, phase, series

from jouletrace.trace.charts import (
    MARK_COLUMNS,
    MOST_LANES,
    Stretch,
    TimeAxis,
    clock_text,
    column_watts,
    drawable,
    driver_chart,
    envelope,
    nice_top,
    node,
    phase_rows,
    power_of,
    stretches,
    ticks,
    verdict_band,
)
from jouletrace.trace.recording import Recording, Stream

AXIS = TimeAxis(START_NS, START_NS + 70 * S)


def test_an_envelope_loses_no_peak() -> None:
    t_ns = START_NS + np.arange(0, 70 * S, S // 50)
    watts = np.full(len(t_ns), 300.0)
    watts[1234], watts[2345] = 950.0, 50.0
    found = envelope(t_ns, watts, AXIS, holds=False, columns=70)
    assert found.high_watts.max() == 950
    assert found.low_watts.min() == 50
    assert int(found.high_watts.argmax()) == 1234 // 50
    # 50 readings a column, each for as long as the others.
    assert found.mean_watts.sum() == pytest.approx(watts.sum() / 50)


def test_a_gap_stays_a_gap_unless_values_hold() -> None:
    t_ns = START_NS + np.array([0, 1, 2, 30, 31]) * S
    watts = np.array([100.0, 200.0, 300.0, 400.0, 500.0])
    found = envelope(t_ns, watts, AXIS, holds=False, columns=70)
    assert found.high_watts[:3].tolist() == [100, 200, 300]
    assert np.isnan(found.high_watts[3:30]).all()
    assert np.isnan(found.high_watts[32:]).all()
    held = envelope(t_ns, watts, AXIS, holds=True, columns=70)
    assert (held.high_watts[3:30] == 300).all()
    assert (held.high_watts[32:] == 500).all()


def test_columns_narrower_than_the_readings_are_filled() -> None:
    t_ns = START_NS + np.arange(0, 70 * S + 1, S // 2)
    found = envelope(t_ns, np.full(len(t_ns), 250.0), AXIS, holds=False, columns=1000)
    assert (found.mean_watts == 250).all()


def test_power_comes_from_the_best_stream() -> None:
    t_ns = np.arange(1, 5) * S
    counter = Stream(t_ns, {"mj": np.array([0.0, 1e5, 3e5, 0.0])})
    average = Stream(t_ns, {"mw": np.array([7e5, np.nan, 7e5, 7e5])})
    ring = Stream(t_ns, {"mw": np.full(4, 5e5)})
    _, watts, holds = power_of(Recording({}, {"power_average": average, "power_ring_20ms": ring}))
    assert (watts.tolist(), holds) == ([500] * 4, False)
    # The counter was set back between the last two rows: no power there.
    times, watts, holds = power_of(Recording({}, {"power_average": average, "energy_counter": counter}))
    assert (times.tolist(), watts.tolist(), holds) == ([2 * S, 3 * S], [100, 200], False)
    _, watts, holds = power_of(Recording({}, {"power_average": average}))
    assert (watts.tolist(), holds) == ([700] * 3, True)
    assert not len(power_of(Recording({}, {}))[0])


@pytest.mark.parametrize("columns", [7, 70, 33, 600])
def test_columns_keep_the_energy(columns: int) -> None:
    found = series()
    ends, seconds = np.array(found["times_ns"]), np.array(found["seconds"])
    joules = np.array(list(found["joules"].values()))
    watts, known = column_watts(ends, seconds, joules, AXIS.edges_ns(columns))
    assert known.all()
    # 28,000 J by the phases' construction.
    expected = [28_000 * share for share in SHARES.values()]
    assert (watts.sum(axis=1) * 70 / columns).tolist() == pytest.approx(expected, rel=1e-5)


def test_columns_without_a_span_have_no_watts() -> None:
    watts, known = column_watts(
        np.array([START_NS + 10 * S, START_NS + 60 * S]),
        np.array([10.0, 10.0]),
        np.array([[1e3, 2e3]]),
        AXIS.edges_ns(7),
    )
    assert known.tolist() == [True, False, False, False, False, True, False]
    assert watts[0].tolist() == pytest.approx([100, 0, 0, 0, 0, 200, 0])


def test_spans_that_nobody_explained_are_holes() -> None:
    found = series()
    for joules in found["joules"].values():
        joules[30:40] = [None] * 10
    [*_, first] = [one for one in driver_chart(found, list(SHARES), AXIS).iter("path") if one.get("class") == "driver0"]
    assert first.get("d").count("M") == 2


def test_stretches_join_what_follows_on() -> None:
    ends = [START_NS + at * S for at in (1, 2, 3, 4, 9, 10)]
    names = ["idle", "idle", None, "idle", "idle", "parked"]
    assert stretches(names, ends, [1.0] * 6) == [
        Stretch("idle", START_NS, START_NS + 2 * S),
        Stretch("idle", START_NS + 3 * S, START_NS + 4 * S),
        Stretch("idle", START_NS + 8 * S, START_NS + 9 * S),
        Stretch("parked", START_NS + 9 * S, START_NS + 10 * S),
    ]


def test_flapping_is_drawn_in_bounds() -> None:
    ends = [START_NS + at * S // 1000 for at in range(1, 70_001)]
    found = stretches(["idle" if at % 2 else "parked" for at in range(70_000)], ends, [0.001] * 70_000)
    assert len(found) == 70_000
    drawn = drawable(found, AXIS)
    assert len(drawn) <= 2 * MARK_COLUMNS
    assert drawn[0].start_ns == START_NS
    assert max(one.end_ns for one in drawn) == AXIS.end_ns


def test_a_verdict_stands_where_it_was() -> None:
    band = verdict_band([Stretch("memory_bound", START_NS + 7 * S, START_NS + 21 * S)], AXIS)
    [box] = band.findall("svg")
    assert (box.get("x"), box.get("width")) == ("10.000%", "20.000%")
    assert box.findtext("title") == "memory_bound, at 7 s for 14.00 s"
    assert box.findtext("text") == "memory_bound"


def test_phases_that_overlap_get_rows_of_their_own() -> None:
    nested = [phase(number, "idle", start_ns=START_NS + number * S, end_ns=START_NS + 60 * S) for number in range(5)]
    after = phase(6, "idle")
    chart = phase_rows(enumerate([*nested, after], 1), AXIS)
    rows = [int(box.get("y")) for box in chart.findall("svg")]
    assert len(set(rows)) == MOST_LANES
    assert rows[-1] == 0
    assert len(rows) == MOST_LANES + 1


@pytest.mark.parametrize("seconds", [0.5, 3, 70, 273, 3600, 86_400, 10**7])
def test_ticks_are_few_and_inside(seconds: float) -> None:
    axis = TimeAxis(START_NS, START_NS + int(seconds * S))
    found = ticks(axis)
    assert 3 <= len(found) <= 10
    assert found[0] == (START_NS, "0 s")
    assert found[-1][0] <= axis.end_ns


def test_text_of_times() -> None:
    assert [clock_text(one) for one in (0, 12.5, 60, 200, 3800)] == ["0 s", "12.5 s", "1:00", "3:20", "1:03:20"]


@pytest.mark.parametrize(
    ("watts", "top"), [(0.0, 4.0), (79.0, 80.0), (700.0, 800.0), (950.0, 1000.0), (1000.0, 1000.0)]
)
def test_a_scale_ends_at_a_round_number(watts: float, top: float) -> None:
    assert nice_top(watts) == pytest.approx(top)


def test_a_node_takes_text_between_children() -> None:
    found = node("p", "a", node("b", "c"), "d", None, "e", class_="x", aria_label="y\x00", title=None)
    assert (found.text, found[0].tail, found.attrib) == ("a", "de", {"class": "x", "aria-label": "y�"})
