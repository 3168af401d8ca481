import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jouletrace.energy.meter import COUNTER_TICK_NS, EnergySource, Meter, steady_stamps
from jouletrace.energy.sensors import AVERAGE, SensorModel, instant_model
from jouletrace.energy.timeline import Float64s, Int64s, Timeline, WindowEnergy
from jouletrace.gpu.readings import CounterReading, PowerReading, PowerSamples
from jouletrace.trace.analyze import phases_of
from jouletrace.trace.recording import Recording, read

REPOSITORY = Path(__file__).parents[2]
RECORDINGS = (
    REPOSITORY / "exporter/jouletrace/demo/recording.json.gz",
    REPOSITORY / "tests/data/h200-c-chunked.json.gz",
)
S = 1_000_000_000
MS = 1_000_000
START_NS = 1_795_373_000 * S
LIMIT = 700.0


# ---------------------------------------------------------------- the recordings


@cache
def recorded(path: Path) -> Recording:
    return read(path)


@dataclass
class Bench:
    """A recording, fed to a meter as the daemon would, with its ring or counter changed by a test."""

    path: Path = RECORDINGS[0]

    def __post_init__(self) -> None:
        recording = recorded(self.path)
        ring, counter = recording.streams["power_ring_20ms"], recording.streams["energy_counter"]
        self.ends, self.milliwatts = ring.t_ns, ring.values["mw"].copy()
        self.counter_ns, self.counter_mj = counter.t_ns, counter.values["mj"].copy()
        self.start_ns = int(ring.t_ns[0])

    def at(self, second: float) -> int:
        return self.start_ns + round(second * S)

    def drop(self, start_s: float, end_s: float) -> None:
        """Lose the ring's samples of a time, as when nobody harvested it."""
        keep = (self.ends <= self.at(start_s)) | (self.ends > self.at(end_s))
        self.ends, self.milliwatts = self.ends[keep], self.milliwatts[keep]

    def reading(self, now_ns: int) -> CounterReading:
        """What a read of the counter shows that returns now."""
        at = int(np.searchsorted(self.counter_ns, now_ns, "right")) - 1
        return CounterReading(now_ns, int(self.counter_mj[at]), 4 * MS)

    def seconds(self, meter: Meter, until_s: float, *, every_s: float = 1.0, counter: bool = True) -> Iterator[int]:
        """Harvest the ring again and again, read the counter each 10 s and when wanted; yield after each time."""
        done, due_ns = 0, int(self.counter_ns[0])
        for now_ns in range(self.start_ns + round(every_s * S), self.at(until_s), round(every_s * S)):
            end = int(np.searchsorted(self.ends, now_ns, "right"))
            meter.add_ring(PowerSamples(self.ends[done:end], self.milliwatts[done:end]))
            done = end
            if counter and now_ns >= (int(self.counter_ns[0]) if meter.wants_counter else due_ns):
                meter.add_counter(self.reading(now_ns))
                due_ns = now_ns + 10 * S
            yield now_ns

    def run(self, until_s: float = 1e4, *, every_s: float = 1.0, counter: bool = True) -> Meter:
        meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT, architecture="hopper", has_counter=counter)
        last_s = (int(self.ends[-1]) - self.start_ns) / S + every_s
        for _ in self.seconds(meter, min(until_s, last_s), every_s=every_s, counter=counter):
            pass
        meter.flush()
        return meter


def timeline_of(meter: Meter) -> Timeline:
    assert meter.timeline is not None
    return meter.timeline


def window(meter: Meter, start_ns: int, end_ns: int) -> WindowEnergy:
    energy = meter.window(start_ns, end_ns)
    assert energy is not None
    return energy


def holds(energy: WindowEnergy, truth: float) -> bool:
    return energy.low <= truth <= energy.high


COUNTER_LAG_NS = 20 * MS
"""How old a recorded counter value is on average: found by polling every 30 ms, stamped after a call of 4 ms."""
CLEAR_NS = 150 * MS


def undisturbed(recording: Recording) -> np.ndarray:
    """Counter rows that were found in time: the call was quick and the row before is one tick old, not more."""
    counter = recording.streams["energy_counter"]
    ticks = np.diff(counter.t_ns, prepend=counter.t_ns[0])
    return (counter.values["call_us"] < 10_000) & (ticks > 70 * MS) & (ticks < 130 * MS)


def fair_span(recording: Recording, number: int) -> tuple[int, int]:
    """The counter rows to compare a phase by.

    Inside a tick of 100 ms the counter says nothing, and the straight line between two ticks cuts the corner where
    power steps at a phase's edge: that reads the counter low by about step * tick / 6 at each edge, 0.25 % of a
    phase of 4 s. So the rows just outside the phase count, where power is low and even, 150 ms or more away from
    it; where a neighbour is nearer than that, or the recording ends, the outermost ones inside.
    """
    phases, _ = phases_of(recording)
    times = recording.streams["energy_counter"].t_ns
    ring = recording.streams["power_ring_20ms"].t_ns
    phase = phases[number]
    earliest = phases[number - 1].end_ns if number else int(ring[0])
    latest = phases[number + 1].start_ns if number + 1 < len(phases) else int(ring[-1])
    good = undisturbed(recording)
    before = np.flatnonzero(good & (times > earliest + CLEAR_NS) & (times <= phase.start_ns - CLEAR_NS))
    after = np.flatnonzero(good & (times >= phase.end_ns + CLEAR_NS) & (times <= latest))
    inside = np.flatnonzero(good & (times > phase.start_ns + CLEAR_NS) & (times <= phase.end_ns))
    return int(before[-1] if len(before) else inside[0]), int(after[0] if len(after) else inside[-1])


@pytest.mark.parametrize("path", RECORDINGS)
def test_ring_meets_the_counter(path: Path) -> None:
    recording = recorded(path)
    meter = Bench(path).run()
    timeline = timeline_of(meter)
    counter = recording.streams["energy_counter"]
    seen_ns, joules = counter.t_ns - COUNTER_LAG_NS, counter.values["mj"] / 1e3
    inside = np.flatnonzero((seen_ns >= timeline.start_ns) & (seen_ns <= timeline.end_ns))
    first, last = int(inside[0]), int(inside[-1])
    ours = timeline.energies_at(seen_ns)
    assert ours[last] - ours[first] == pytest.approx(joules[last] - joules[first], rel=5e-4)
    errors = []
    for number, phase in enumerate(phases_of(recording)[0]):
        if phase.end_ns - phase.start_ns >= 4 * S:
            start, end = fair_span(recording, number)
            truth = joules[end] - joules[start]
            errors.append((ours[end] - ours[start]) / truth - 1)
            energy = window(meter, int(seen_ns[start]), int(seen_ns[end]))
            # Two rows that are each up to 15 ms older or younger than on average, at 125 W.
            assert energy.low - 3.75 <= truth <= energy.high + 3.75
    assert len(errors) >= 19
    assert max(np.abs(errors)) < 6e-3
    assert np.sqrt(np.mean(np.square(errors))) < 2.5e-3
    assert abs(np.mean(errors)) < 1e-3


@pytest.mark.parametrize("path", RECORDINGS)
def test_steady_stamps_bring_the_whole_nearer_to_the_counter(path: Path) -> None:
    recording = recorded(path)
    ring, counter = recording.streams["power_ring_20ms"], recording.streams["energy_counter"]
    seen_ns = counter.t_ns - COUNTER_LAG_NS
    inside = np.flatnonzero((seen_ns >= ring.t_ns[0]) & (seen_ns <= ring.t_ns[-1]))
    rows = inside[[0, -1]]
    truth = float(np.diff(counter.values["mj"][rows])[0]) / 1e3

    def error(ends: Int64s) -> float:
        energies = np.concatenate(([0.0], np.cumsum(ring.values["mw"][1:] * np.diff(ends) * 1e-12)))
        found = np.interp(seen_ns[rows] - ends[0], ends - ends[0], energies)
        return abs(float(found[1] - found[0]) / truth - 1)

    first, last = int(ring.t_ns[0]), int(ring.t_ns[-1])
    steady = steady_stamps(ring.t_ns, first - 20 * MS, last + 20 * MS, 20 * MS)
    assert error(steady) < error(ring.t_ns)
    assert error(steady) < 2e-4


def test_steady_stamps_take_out_lateness_and_keep_order() -> None:
    grid = START_NS + np.arange(200) * 20 * MS
    late = grid.copy()
    late[5::9] += 10 * MS
    assert steady_stamps(late, START_NS - 20 * MS, START_NS + 4 * S, 20 * MS).tolist() == grid.tolist()
    random = np.random.default_rng(3)
    for _ in range(50):
        wild = START_NS + np.cumsum(random.integers(1, 60 * MS, 100))
        after_ns = int(wild[-1]) + int(random.integers(1, 60 * MS))
        steady = steady_stamps(wild, START_NS, after_ns, 20 * MS)
        assert steady[0] > START_NS
        assert np.all(np.diff(steady) > 0)
        # No stamp leaves the span of its two neighbours.
        assert np.all((steady[1:-1] > wild[:-2]) & (steady[1:-1] < wild[2:] + 20 * MS))


# ---------------------------------------------------------------- the ring: how it is fed


def assert_same(meter: Meter, other: Meter) -> None:
    (times, joules), (other_times, other_joules) = timeline_of(meter).nodes(), timeline_of(other).nodes()
    assert times.tolist() == other_times.tolist()
    assert joules == pytest.approx(other_joules, rel=1e-9)


@pytest.mark.parametrize("every_s", [0.02, 0.1, 0.5, 2.0])
def test_timeline_does_not_depend_on_how_often_the_ring_is_read(every_s: float) -> None:
    bench = Bench()
    bench.drop(20.0, 20.6)
    bench.drop(40.0, 1e4)
    assert_same(bench.run(every_s=every_s, counter=False), bench.run(counter=False))


def chunks(bench: Bench, size: int, end: int = 2_000) -> list[PowerSamples]:
    return [PowerSamples(bench.ends[at : at + size], bench.milliwatts[at : at + size]) for at in range(0, end, size)]


def fed(batches: Sequence[PowerSamples]) -> Meter:
    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT, has_counter=False)
    for batch in batches:
        meter.add_ring(batch)
    meter.flush()
    return meter


def joined(*batches: PowerSamples) -> PowerSamples:
    return PowerSamples(
        np.concatenate([batch.ends_ns for batch in batches]), np.concatenate([batch.milliwatts for batch in batches])
    )


def test_samples_that_come_twice_count_once() -> None:
    once = chunks(Bench(), 50)
    overlapping = [joined(*once[max(0, i - 2) : i + 1]) for i in range(len(once))]
    assert_same(fed(overlapping), fed(once))
    doubled = [joined(batch, batch) for batch in once]
    assert_same(fed(doubled), fed(once))
    repeated = [batch for batch in once for _ in range(2)]
    assert_same(fed(repeated), fed(once))


def test_samples_in_any_order_within_a_batch() -> None:
    once = chunks(Bench(), 50)
    turned = [PowerSamples(batch.ends_ns[::-1], batch.milliwatts[::-1]) for batch in once]
    assert_same(fed(turned), fed(once))


def test_empty_batches_change_nothing() -> None:
    once = chunks(Bench(), 50)
    empty = PowerSamples(np.empty(0, np.int64), np.empty(0))
    assert_same(fed([empty, *(batch for one in once for batch in (one, empty))]), fed(once))
    meter = Meter(EnergySource.POWER_RING)
    meter.add_ring(empty)
    meter.flush()
    assert (meter.timeline, meter.joules, meter.end_ns, meter.power_watts) == (None, 0.0, None, None)
    assert meter.window(START_NS, START_NS + S) is None


def test_a_batch_that_comes_too_late_is_left_out_and_its_time_is_a_gap() -> None:
    once = chunks(Bench(), 50)
    meter = fed([*once[:10], once[11], once[10], *once[12:]])
    assert meter.gap_seconds == pytest.approx(1.0, abs=0.1)
    assert timeline_of(meter).end_ns == timeline_of(fed(once)).end_ns
    assert meter.rejected_samples == 0


def test_a_single_sample_tells_no_energy() -> None:
    bench = Bench()
    meter = fed(chunks(bench, 1, 1))
    assert (meter.joules, meter.power_watts) == (0.0, bench.milliwatts[0] / 1e3)


def test_stamps_of_a_clock_that_was_set_back_do_not_stop_the_timeline() -> None:
    # After a step the source gives all that the ring holds again; what lies before the step then seems old.
    once = chunks(Bench(), 50)
    old = [PowerSamples(batch.ends_ns - 3_600 * S, batch.milliwatts) for batch in once[:12]]
    assert_same(fed([*once[:12], *old, *once[12:]]), fed(once))


# ---------------------------------------------------------------- the ring: what is missing


def test_a_gap_waits_for_the_counter() -> None:
    bench = Bench()
    bench.drop(60, 63)
    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    wanted = [now_ns for now_ns in bench.seconds(meter, 80, counter=False) if meter.wants_counter]
    # Nobody answered: after five seconds it is filled by guess.
    assert bench.at(63) < wanted[0] <= bench.at(65)
    assert wanted[-1] <= bench.at(70)
    assert not meter.wants_counter
    assert meter.gap_seconds == pytest.approx(3, abs=0.06)


GAPS = [(25.0, "parked"), (60.0, "decode"), (99.5, "batch of 256"), (62.5, "end of a phase"), (41.0, "start of one")]


@pytest.mark.parametrize("counter", [True, False], ids=["counter", "no counter"])
@pytest.mark.parametrize("seconds", [0.3, 3, 20])
@pytest.mark.parametrize("start_s", [start for start, _ in GAPS], ids=[name for _, name in GAPS])
def test_a_gap_is_filled_within_its_bounds(start_s: float, seconds: float, counter: bool) -> None:
    whole, bench = Bench().run(), Bench()
    bench.drop(start_s, start_s + seconds)
    meter = bench.run(counter=counter)
    start_ns, end_ns = bench.at(start_s - 1), bench.at(start_s + seconds + 1)
    truth = timeline_of(whole).window(start_ns, end_ns).joules
    energy = window(meter, start_ns, end_ns)
    assert meter.gap_seconds == pytest.approx(seconds, abs=0.06)
    assert energy.covered_ns == end_ns - start_ns
    assert holds(energy, truth)
    edges = 2 * 0.06 * LIMIT
    if counter:
        assert energy.joules == pytest.approx(truth, rel=0.01, abs=0.1 * LIMIT)
        # Two counter readings, each up to a tick and a call old, and half a per cent of the ring between them.
        assert energy.high - energy.low < 4 * 0.11 * LIMIT + 2 * 0.005 * 32 * LIMIT + edges
    elif seconds > 5:
        around = timeline_of(whole)
        start, end = bench.at(start_s), bench.at(start_s + seconds)
        assert energy.joules == pytest.approx(truth - around.window(start, end).joules, abs=0.06 * LIMIT)
        assert energy.high - energy.low > 0.95 * seconds * LIMIT
    # Before and after the gap nothing changed.
    for first_s, last_s in ((start_s - 8, start_s - 0.2), (start_s + seconds + 0.2, start_s + seconds + 8)):
        span = bench.at(first_s), bench.at(last_s)
        assert window(meter, *span).joules == pytest.approx(window(whole, *span).joules, rel=1e-9, abs=1e-6)


def test_two_gaps_in_one_batch_share_what_the_counter_saw() -> None:
    whole, bench = Bench().run(), Bench()
    bench.drop(58.1, 58.4)
    bench.drop(58.5, 58.9)
    meter = bench.run()
    assert meter.gap_seconds == pytest.approx(0.7, abs=0.1)
    for first_s, last_s in ((58, 59), (58.05, 58.45), (58.45, 58.95)):
        span = bench.at(first_s), bench.at(last_s)
        truth = timeline_of(whole).window(*span).joules
        energy = window(meter, *span)
        assert holds(energy, truth)
        assert energy.joules == pytest.approx(truth, abs=0.1 * LIMIT)


def test_two_gaps_in_a_row() -> None:
    whole, bench = Bench().run(), Bench()
    bench.drop(86, 89)
    bench.drop(89.5, 92)
    meter = bench.run()
    assert meter.gap_seconds == pytest.approx(5.5, abs=0.1)
    span = bench.at(85), bench.at(93)
    truth = timeline_of(whole).window(*span).joules
    assert holds(window(meter, *span), truth)
    assert window(meter, *span).joules == pytest.approx(truth, rel=0.02)


def test_a_gap_while_the_counter_is_set_back_is_guessed() -> None:
    whole, bench = Bench().run(), Bench()
    bench.drop(86, 89)
    reset = bench.counter_ns > bench.at(87.5)
    bench.counter_mj[reset] -= bench.counter_mj[reset][0]
    meter = bench.run()
    assert meter.counter_resets == 1
    span = bench.at(85), bench.at(91)
    assert holds(window(meter, *span), timeline_of(whole).window(*span).joules)
    assert window(meter, *span).joules == pytest.approx(timeline_of(whole).window(*span).joules, rel=0.05)


def test_a_counter_that_stands_still_fills_no_gap() -> None:
    bench = Bench()
    bench.drop(86, 89)
    bench.counter_mj[bench.counter_ns > bench.at(70)] = bench.counter_mj[bench.counter_ns <= bench.at(70)][-1]
    meter = bench.run()
    assert window(meter, bench.at(86), bench.at(89)).joules == pytest.approx(3 * 660, rel=0.05)
    assert meter.agreement_ratio is None


def test_garbage_in_the_ring_is_counted_and_nothing_else_is_lost() -> None:
    whole, bench = Bench().run(), Bench()
    garbage = [0xFFFFFFFF, -1.0, float("nan"), float("inf"), 2 * LIMIT * 1e3 + 1]
    places = np.arange(500, 500 + 37 * 40, 37)
    for number, place in enumerate(places):
        bench.milliwatts[place] = garbage[number % len(garbage)]
    meter = bench.run()
    assert meter.rejected_samples == len(places)
    assert meter.gap_seconds == 0
    assert meter.joules == pytest.approx(whole.joules, rel=2e-4)
    assert np.isfinite(timeline_of(meter).nodes()[1]).all()


def test_nothing_but_garbage_is_a_gap() -> None:
    bench = Bench()
    bench.milliwatts[(bench.ends > bench.at(86)) & (bench.ends <= bench.at(88))] = 0xFFFFFFFF
    meter = bench.run(100)
    assert meter.gap_seconds == pytest.approx(2, abs=0.06)
    assert meter.rejected_samples == pytest.approx(100, abs=3)
    assert window(meter, bench.at(86), bench.at(88)).joules == pytest.approx(2 * 660, rel=0.05)


# ---------------------------------------------------------------- the counter beside the ring


@pytest.mark.parametrize("path", RECORDINGS)
def test_agreement_is_healthy_from_the_second_reading_on(path: Path) -> None:
    bench, ratios = Bench(path), []
    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    for now_ns in bench.seconds(meter, 200):
        ratios.append(meter.agreement_ratio)
        if now_ns >= bench.at(14):
            assert meter.agreement_ratio == pytest.approx(1, abs=0.03)
    assert ratios[0] is None
    assert meter.agreement_ratio == pytest.approx(1, abs=0.005)


def test_a_counter_reset_begins_a_new_epoch_and_leaves_the_energy() -> None:
    whole, bench = Bench().run(), Bench()
    reset = bench.counter_ns > bench.at(100)
    bench.counter_mj[reset] -= bench.counter_mj[reset][0]
    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    ratios = {}
    for now_ns in bench.seconds(meter, 170):
        ratios[round((now_ns - bench.start_ns) / S)] = meter.agreement_ratio
    assert meter.counter_resets == 1
    assert meter.rejected_samples == 0
    assert ratios[99] == pytest.approx(1, abs=0.03)
    # One reading finds it, the next one confirms it, and both are a span of 10 s to compare.
    assert ratios[125] == pytest.approx(1, abs=0.03)
    end_ns = timeline_of(meter).end_ns
    assert meter.joules == pytest.approx(timeline_of(whole).energy_at(end_ns), rel=1e-9)
    assert meter.counter_joules == pytest.approx(bench.reading(bench.at(163)).energy_mj / 1e3, rel=0.01)


@pytest.mark.parametrize("garbage_mj", [0, 1, 2**63, 2**64 - 1])
def test_one_garbage_reading_of_the_counter_is_left_out(garbage_mj: int) -> None:
    bench = Bench()
    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    readings = 0
    for now_ns in bench.seconds(meter, 120):
        if now_ns == bench.at(45):
            meter.add_counter(CounterReading(now_ns, garbage_mj, 4 * MS))
            readings += 1
    assert readings == 1
    assert (meter.counter_resets, meter.rejected_samples) == (0, 1)
    assert meter.counter_joules == bench.reading(bench.at(113)).energy_mj / 1e3
    assert meter.agreement_ratio == pytest.approx(1, abs=0.03)


def test_a_counter_reading_that_comes_twice_or_late_changes_nothing() -> None:
    bench, meter = Bench(), Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    for now_ns in bench.seconds(meter, 60):
        if now_ns % (10 * S) > 9 * S:
            meter.add_counter(bench.reading(bench.at(5)))
    assert (meter.counter_resets, meter.rejected_samples) == (0, 0)
    assert meter.agreement_ratio == pytest.approx(1, abs=0.03)


def polled(meter: Meter, start_s: int, end_s: int, *, gain: float) -> None:
    """Poll a GPU of 300 W by a sensor that is off by a gain, 100 times a second, and its exact counter every 10 s."""
    for number in range(start_s * 100, end_s * 100):
        t_ns = START_NS + number * 10 * MS
        meter.add_power(PowerReading(t_ns, round(300_000 * gain), round(300_000 * gain)))
        if number % 1000 == 500:
            # It moves each 100 ms: what it shows is that much older at most.
            meter.add_counter(CounterReading(t_ns, 300_000 * (number // 10) // 10, 4 * MS))


@pytest.mark.parametrize("source", [EnergySource.POWER_POLLING, EnergySource.POWER_AVERAGE])
def test_polled_power_is_compared_with_the_counter(source: EnergySource) -> None:
    meter = Meter(source, limit_watts=LIMIT, architecture="ada")
    polled(meter, 0, 40, gain=1.04)
    assert meter.agreement_ratio == pytest.approx(1.04, abs=0.005)


def test_a_change_of_sensor_compares_anew_and_still_knows_the_counter() -> None:
    bench, meter = Bench(), Meter(EnergySource.POWER_RING, limit_watts=LIMIT, architecture="ada")
    for _ in bench.seconds(meter, 60):
        pass
    shown_mj = bench.reading(bench.at(53)).energy_mj
    assert meter.agreement_ratio == pytest.approx(1, abs=0.03)
    meter.change_source(EnergySource.POWER_POLLING)
    assert meter.agreement_ratio is None
    for number in range(3200):
        t_ns = bench.at(60) + number * 10 * MS
        meter.add_power(PowerReading(t_ns, 300_000))
        if number == 500:
            # Garbage is told from the counter by what it showed before.
            meter.add_counter(CounterReading(t_ns, 0, 4 * MS))
        elif number % 1000 == 900:
            meter.add_counter(CounterReading(t_ns, shown_mj + 7_000_000 + 300 * number // 10 * 100, 4 * MS))
    assert (meter.counter_resets, meter.rejected_samples) == (0, 1)
    assert meter.agreement_ratio == pytest.approx(1, abs=0.01)


def test_highest_power_of_the_last_minute() -> None:
    bench, meter = Bench(), Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    assert meter.power_max_watts is None
    for now_ns in bench.seconds(meter, 270):
        newest = int(bench.ends[bench.ends <= now_ns][-1])
        # By the second: a value leaves 59 to 60 s after its own, or with the batch that it came in.
        for span_s, compare in ((59, np.greater_equal), (61, np.less_equal)):
            part = bench.milliwatts[(bench.ends > newest - span_s * S) & (bench.ends <= newest)]
            assert compare(meter.power_max_watts, part.max() / 1e3)
        assert meter.power_watts == bench.milliwatts[bench.ends == newest][0] / 1e3


# ---------------------------------------------------------------- simulated sensors


class Truth:
    """Power of a GPU that is even between edges, in seconds, and its energy."""

    def __init__(self, edges_s: Float64s, watts: Float64s) -> None:
        self._edges_s = edges_s
        self._joules = np.concatenate(([0.0], np.cumsum(watts * np.diff(edges_s))))

    def joules(self, t_s: Float64s | float) -> Float64s:
        return np.interp(t_s, self._edges_s, self._joules)

    def between(self, start_s: float, end_s: float) -> float:
        return float(self.joules(end_s) - self.joules(start_s))


SPAN_S = 40.0


def even(random: np.random.Generator) -> Truth:
    return Truth(np.array([-2.0, SPAN_S]), np.array([random.uniform(100, 650)]))


def ramp(_: np.random.Generator) -> Truth:
    edges = np.linspace(-2, SPAN_S, 4_200)
    return Truth(edges, 100 + 550 * np.abs(np.sin(edges[:-1] / 9)))


def restless(random: np.random.Generator) -> Truth:
    edges = np.concatenate(([-2.0], np.sort(random.uniform(-2, SPAN_S, 200)), [SPAN_S]))
    return Truth(edges, random.uniform(0, LIMIT, 201))


def square(period_s: float) -> Callable[[np.random.Generator], Truth]:
    def make(random: np.random.Generator) -> Truth:
        begin = -2 - period_s * random.random()
        edges = begin + np.arange(round(44 / period_s) * 2 + 4) * period_s / 2
        return Truth(edges, np.where(np.arange(len(edges) - 1) % 2, 640.0, 120.0))

    return make


POWERS = {"even": even, "ramp": ramp, "restless": restless} | {
    f"square {period_s * 1e3:.0f} ms": square(period_s)
    for period_s in (0.02, 0.05, 0.1, 0.101, 0.13, 0.2, 0.5, 1.0, 2.0)
}


def held(truth: Truth, t_s: Float64s, model: SensorModel, phase_s: float, lag_s: float) -> Float64s:
    """What a power sensor shows at some times, watts."""
    update_s, window_s = model.update_ns / S, model.window_ns / S
    end_s = np.floor((t_s - phase_s) / update_s) * update_s + phase_s - lag_s
    return (truth.joules(end_s) - truth.joules(end_s - window_s)) / window_s


def simulated_readings(
    truth: Truth, architecture: str, random: np.random.Generator, *, poll_s: float, counter_s: float
) -> list[PowerReading | CounterReading]:
    """What polling finds, by its time: both powers, and the counter, which moves each 100 ms and takes 2-25 ms."""
    model = instant_model(architecture)
    t_s = np.cumsum(poll_s * random.uniform(0.8, 1.3, round(SPAN_S / poll_s)))
    t_s = t_s[t_s < SPAN_S]
    instant = held(truth, t_s, model, random.uniform(0, 0.1), model.lag_ns / S * random.uniform(0.7, 1.4))
    average = held(truth, t_s, AVERAGE, random.uniform(0, 0.1), 0.0)
    readings: list[PowerReading | CounterReading] = [
        PowerReading(START_NS + round(t * S), round(i * 1e3), round(a * 1e3))
        for t, i, a in zip(t_s.tolist(), instant.tolist(), average.tolist(), strict=True)
    ]
    t_s = np.cumsum(counter_s * random.uniform(0.7, 1.3, round(SPAN_S / counter_s)))
    t_s = t_s[t_s < SPAN_S]
    call_s, phase_s = random.uniform(0.002, 0.025, len(t_s)), random.uniform(0, 0.1)
    tick_s = np.floor((t_s - call_s * random.random(len(t_s)) - phase_s) / 0.1) * 0.1 + phase_s
    readings += [
        CounterReading(START_NS + round(t * S), 7_000_000 + int(joules * 1e3), round(call * S))
        for t, call, joules in zip(t_s.tolist(), call_s.tolist(), truth.joules(tick_s).tolist(), strict=True)
    ]
    return sorted(readings, key=lambda reading: reading.t_ns)


def take(meter: Meter, reading: PowerReading | CounterReading) -> None:
    if isinstance(reading, CounterReading):
        meter.add_counter(reading)
    else:
        meter.add_power(reading)


def simulated(
    source: EnergySource, architecture: str, truth: Truth, random: np.random.Generator, **intervals: float
) -> Meter:
    fine = source is EnergySource.POWER_POLLING
    chosen = {"poll_s": 0.01 if fine else 0.05, "counter_s": 0.8} | intervals
    meter = Meter(source, limit_watts=LIMIT, architecture=architecture)
    for reading in simulated_readings(truth, architecture, random, **chosen):
        if isinstance(reading, PowerReading) or source is EnergySource.ENERGY_COUNTER:
            take(meter, reading)
    return meter


def errors(meter: Meter, truth: Truth, random: np.random.Generator, seconds: float, count: int) -> list[float]:
    """Relative errors of windows anywhere; fails when the truth is outside a window's bounds."""
    found, timeline = [], timeline_of(meter)
    first_s, last_s = (timeline.start_ns - START_NS) / S, (timeline.end_ns - START_NS) / S
    for start_s in random.uniform(first_s, last_s - seconds, count):
        energy = window(meter, START_NS + round(start_s * S), START_NS + round((start_s + seconds) * S))
        true_joules = truth.between(start_s, start_s + seconds)
        # Readings are whole millijoules and milliwatts.
        assert energy.low - 0.01 <= true_joules <= energy.high + 0.01
        found.append(energy.joules / true_joules - 1)
    return found


def simulated_ring(truth: Truth, random: np.random.Generator) -> PowerSamples:
    """A ring as an H200's: 20 ms slots, 0.7 % of them left out, 6 % stamped up to 6 ms early or 8 ms late."""
    ends_s = np.arange(0, SPAN_S - 0.1, 0.02)
    watts = (truth.joules(ends_s) - truth.joules(ends_s - 0.02)) / 0.02
    odd = random.random(len(ends_s)) < 0.06
    ends_s += np.where(odd, random.uniform(-0.006, 0.008, len(ends_s)), random.uniform(-1e-4, 1e-4, len(ends_s)))
    kept = random.random(len(ends_s)) >= 0.007
    return PowerSamples(START_NS + np.round(ends_s[kept] * S).astype(np.int64), np.round(watts[kept] * 1e3))


@pytest.mark.parametrize("power", POWERS)
def test_truth_is_within_the_bounds_of_the_ring(power: str) -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        truth = POWERS[power](random)
        samples = simulated_ring(truth, random)
        meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT, has_counter=False)
        for at in range(0, len(samples.ends_ns), 50):
            part = slice(at, at + 50)
            meter.add_ring(PowerSamples(samples.ends_ns[part], samples.milliwatts[part]))
        meter.flush()
        for seconds in (1, 5, 20):
            found = errors(meter, truth, random, seconds, 25)
        assert max(np.abs(found)) < 0.01


RUNGS = [
    (EnergySource.ENERGY_COUNTER, "hopper"),
    (EnergySource.ENERGY_COUNTER, "ada"),
    (EnergySource.POWER_POLLING, "hopper"),
    (EnergySource.POWER_POLLING, "ada"),
    (EnergySource.POWER_POLLING, "volta"),
    (EnergySource.POWER_AVERAGE, "hopper"),
]


@pytest.mark.parametrize(("source", "architecture"), RUNGS)
@pytest.mark.parametrize("power", POWERS)
def test_truth_is_within_the_bounds_on_every_rung(source: EnergySource, architecture: str, power: str) -> None:
    for seed in range(2):
        random = np.random.default_rng(seed)
        truth = POWERS[power](random)
        meter = simulated(source, architecture, truth, random)
        for seconds in (1, 5, 20):
            found = errors(meter, truth, random, seconds, 25)
        # What the sensor sees whole comes out right over 20 s, whatever the power does.
        if source is EnergySource.ENERGY_COUNTER:
            assert max(np.abs(found)) < 0.012
        elif architecture == "ada" or source is EnergySource.POWER_AVERAGE:
            assert max(np.abs(found)) < 0.02


def test_a_sensor_that_sees_a_quarter_says_so() -> None:
    # POWER_INSTANT of an H200 looks at 25 of 100 ms: a wave of 100 ms shows it one side of the wave only.
    random = np.random.default_rng(1)
    truth = square(0.1)(random)
    meter = simulated(EnergySource.POWER_POLLING, "hopper", truth, random)
    energy = window(meter, START_NS + 10 * S, START_NS + 30 * S)
    assert energy.high - energy.low > 0.75 * 20 * LIMIT
    random = np.random.default_rng(1)
    whole = simulated(EnergySource.POWER_POLLING, "ada", truth, random)
    energy = window(whole, START_NS + 10 * S, START_NS + 30 * S)
    assert energy.high - energy.low < 0.05 * energy.joules


def test_slow_polling_widens_the_bounds() -> None:
    random = np.random.default_rng(5)
    truth = square(0.3)(random)
    meter = simulated(EnergySource.POWER_POLLING, "ada", truth, random, poll_s=0.25)
    assert len(errors(meter, truth, random, 5, 50)) == 50


def test_polling_that_stops_for_a_while_leaves_a_gap() -> None:
    random = np.random.default_rng(6)
    truth = square(1.0)(random)
    readings = simulated_readings(truth, "ada", random, poll_s=0.01, counter_s=1)
    for seconds in (2, 12):
        meter = Meter(EnergySource.POWER_POLLING, limit_watts=LIMIT, architecture="ada")
        for reading in readings:
            if isinstance(reading, PowerReading) and not 10 <= (reading.t_ns - START_NS) / S < 10 + seconds:
                take(meter, reading)
        assert meter.gap_seconds == pytest.approx(seconds, abs=0.03)
        errors(meter, truth, random, 5, 50)
        unseen = window(meter, START_NS + round(10.2 * S), START_NS + round((9.8 + seconds) * S))
        assert (unseen.joules == 0) == (seconds > 5)


def test_power_out_of_range_is_left_out() -> None:
    meter = Meter(EnergySource.POWER_POLLING, limit_watts=LIMIT, architecture="ada")
    for number in range(300):
        garbage = {100: 0xFFFFFFFF, 150: -5}.get(number)
        meter.add_power(PowerReading(START_NS + number * 10 * MS, 300_000 if garbage is None else garbage))
        meter.add_power(PowerReading(START_NS + number * 10 * MS + 1, None))
    assert meter.rejected_samples == 2
    assert meter.joules == pytest.approx(300 * 2.99, rel=0.02)
    assert meter.power_max_watts == 300


def test_polled_times_that_go_back_are_left_out() -> None:
    meter = Meter(EnergySource.POWER_POLLING, limit_watts=LIMIT, architecture="ada")
    for number in range(300):
        meter.add_power(PowerReading(START_NS + number * 10 * MS, 300_000))
        meter.add_power(PowerReading(START_NS + number * 10 * MS - 50 * MS, 300_000))
    assert meter.joules == pytest.approx(300 * 2.99, rel=0.02)


# ---------------------------------------------------------------- the counter as the source


@pytest.mark.parametrize("garbage_mj", [0, 2**64 - 1])
def test_garbage_between_ticks_is_left_out(garbage_mj: int) -> None:
    random = np.random.default_rng(2)
    truth = restless(random)
    meter = Meter(EnergySource.ENERGY_COUNTER, limit_watts=LIMIT, architecture="ada")
    number = 0
    for reading in simulated_readings(truth, "ada", random, poll_s=0.05, counter_s=0.8):
        if isinstance(reading, CounterReading):
            number += 1
            if number % 7 == 0:
                take(meter, CounterReading(reading.t_ns - 10 * MS, garbage_mj, MS))
        take(meter, reading)
    assert meter.counter_resets == 0
    assert meter.rejected_samples == number // 7
    assert max(np.abs(errors(meter, truth, random, 20, 20))) < 0.012


def test_a_reset_between_ticks_is_bridged_by_the_power_seen() -> None:
    random = np.random.default_rng(2)
    truth = even(random)
    meter = Meter(EnergySource.ENERGY_COUNTER, limit_watts=LIMIT, architecture="ada")
    base_mj = None
    for reading in simulated_readings(truth, "ada", random, poll_s=0.05, counter_s=0.8):
        if isinstance(reading, CounterReading) and reading.t_ns > START_NS + 20 * S:
            base_mj = reading.energy_mj if base_mj is None else base_mj
            take(meter, CounterReading(reading.t_ns, reading.energy_mj - base_mj, reading.call_ns))
        else:
            take(meter, reading)
    assert meter.counter_resets == 1
    assert 0 < meter.gap_seconds < 2
    assert max(np.abs(errors(meter, truth, random, 20, 20))) < 0.012


def test_a_read_that_hangs_says_nothing_about_when() -> None:
    random = np.random.default_rng(4)
    truth = square(2.0)(random)
    meter = Meter(EnergySource.ENERGY_COUNTER, limit_watts=LIMIT, architecture="ada")
    number = 0
    for reading in simulated_readings(truth, "ada", random, poll_s=0.05, counter_s=0.8):
        if isinstance(reading, CounterReading):
            number += 1
            if number % 5 == 0:
                # The value is of the call's beginning; the call returned 0.6 s later.
                take(meter, CounterReading(reading.t_ns + 600 * MS, reading.energy_mj, reading.call_ns + 600 * MS))
                continue
        take(meter, reading)
    assert meter.rejected_samples == 0
    assert len(errors(meter, truth, random, 5, 50)) == 50
    assert max(np.abs(errors(meter, truth, random, 20, 20))) < 0.02


@pytest.mark.parametrize("averaged", [False, True])
def test_a_counter_that_stands_still_falls_to_polling_and_loses_nothing(averaged: bool) -> None:
    random = np.random.default_rng(8)
    truth = square(2.0)(random)
    meter = Meter(EnergySource.ENERGY_COUNTER, limit_watts=LIMIT, architecture="ada")
    stuck_mj = None
    joules = 0.0
    for reading in simulated_readings(truth, "ada", random, poll_s=0.05, counter_s=0.8):
        if isinstance(reading, CounterReading):
            if reading.t_ns > START_NS + 15 * S:
                stuck_mj = reading.energy_mj if stuck_mj is None else stuck_mj
                take(meter, CounterReading(reading.t_ns, stuck_mj, reading.call_ns))
            else:
                take(meter, reading)
        else:
            take(meter, PowerReading(reading.t_ns, None, reading.average_mw) if averaged else reading)
        assert meter.joules >= joules
        joules = meter.joules
    assert meter.source is (EnergySource.POWER_AVERAGE if averaged else EnergySource.POWER_POLLING)
    assert meter.gap_seconds == 0
    assert max(np.abs(errors(meter, truth, random, 20, 30))) < 0.03
    assert max(np.abs(errors(meter, truth, random, 5, 30))) < 0.15


def test_an_idle_gpu_may_leave_the_counter_where_it_is() -> None:
    meter = Meter(EnergySource.ENERGY_COUNTER, limit_watts=LIMIT, architecture="ada")
    for number in range(100):
        meter.add_power(PowerReading(START_NS + number * 100 * MS, 5_000))
        meter.add_counter(CounterReading(START_NS + number * 100 * MS + MS, 1_000, MS))
    assert meter.source is EnergySource.ENERGY_COUNTER


# ---------------------------------------------------------------- changing the source


@pytest.mark.parametrize(
    "pair", list(itertools.permutations(EnergySource, 2)), ids=lambda pair: f"{pair[0]} to {pair[1]}"
)
def test_another_source_goes_on_where_the_first_ended(pair: tuple[EnergySource, EnergySource]) -> None:
    random = np.random.default_rng(9)
    truth = even(random)
    meter = Meter(pair[0], limit_watts=LIMIT, architecture="ada")
    joules = 0.0
    ring_end_ns = START_NS
    for reading in simulated_readings(truth, "ada", random, poll_s=0.02, counter_s=0.5):
        if reading.t_ns > START_NS + 20 * S:
            meter.change_source(pair[1])
        if isinstance(reading, PowerReading) or meter.source is EnergySource.ENERGY_COUNTER:
            take(meter, reading)
        ends = np.arange(ring_end_ns + 20 * MS, reading.t_ns, 20 * MS)
        if len(ends) >= 50:
            ring_end_ns = int(ends[-1])
            meter.add_ring(PowerSamples(ends, np.full(len(ends), truth.between(0, 1) * 1e3)))
        assert meter.joules >= joules
        joules = meter.joules
    assert meter.source is pair[1]
    # Even power: every joule that is missing or counted twice shows.
    timeline = timeline_of(meter)
    seconds = (timeline.end_ns - timeline.start_ns) / S
    assert seconds > 36
    assert meter.joules == pytest.approx(truth.between(0, 1) * seconds, rel=0.01)
    assert len(errors(meter, truth, random, 5, 50)) == 50
    # The bounds of a time are those of the source that measured it.
    early = window(meter, START_NS + 5 * S, START_NS + 15 * S)
    alone = {EnergySource.POWER_RING: 0.2, EnergySource.ENERGY_COUNTER: 2.2, EnergySource.POWER_POLLING: 1.0}
    assert early.high - early.low < alone.get(pair[0], 5.0) * truth.between(0, 1) + 1


@pytest.mark.parametrize("last_s", [20, 28])
def test_the_counter_tells_what_was_used_until_it_became_the_source(last_s: int) -> None:
    """The ring ends at 20 s with 200 W; nobody saw 12 s of 600 W, and the counter goes on with 100 W."""

    def shown(at_s: float) -> CounterReading:
        joules = 200 * min(at_s, 20) + 600 * min(max(at_s - 20, 0), 12) + 100 * max(at_s - 32, 0)
        return CounterReading(START_NS + round(at_s * S), round(joules * 1e3), MS)

    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    for second in range(20):
        meter.add_ring(PowerSamples(START_NS + second * S + np.arange(1, 51) * 20 * MS, np.full(50, 2e5)))
        if second % 4 == 3:
            meter.add_counter(shown(second + 1))
    if last_s > 20:
        # Read while the ring was silent: inside the gap it tells nothing.
        meter.add_counter(shown(last_s))
    meter.change_source(EnergySource.ENERGY_COUNTER)
    for tenth in range(330, 400):
        meter.add_counter(shown(tenth / 10))
    timeline = timeline_of(meter)
    used = window(meter, START_NS + 10 * S, timeline.end_ns)
    truth = shown((timeline.end_ns - START_NS) / S).energy_mj / 1e3 - 2_000
    assert holds(used, truth)
    assert used.joules == pytest.approx(truth, rel=0.01)
    assert used.high - used.low < 0.05 * truth
    assert meter.gap_seconds == pytest.approx(13, abs=0.2)


def test_a_counter_that_was_set_back_meanwhile_tells_nothing_of_the_gap() -> None:
    meter = Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    for second in range(20):
        meter.add_ring(PowerSamples(START_NS + second * S + np.arange(1, 51) * 20 * MS, np.full(50, 2e5)))
        meter.add_counter(CounterReading(START_NS + (second + 1) * S, 9_000_000 + second * 200_000, MS))
    meter.change_source(EnergySource.ENERGY_COUNTER)
    before = meter.joules
    for tenth in range(230, 300):
        meter.add_counter(CounterReading(START_NS + tenth * 100 * MS, tenth * 20_000, MS))
    # 200 W on both sides; three seconds in between went on like that.
    assert meter.counter_resets == 1
    assert meter.joules - before == pytest.approx(200 * 9.9, rel=0.02)


def test_a_counter_after_the_average_is_shaped_by_the_average() -> None:
    meter = Meter(EnergySource.POWER_AVERAGE, limit_watts=LIMIT, architecture="volta")
    joules = 0.0
    for tenth in range(400):
        watts = 100 if tenth // 50 % 2 else 500
        joules += watts / 10
        if tenth == 100:
            meter.change_source(EnergySource.ENERGY_COUNTER)
        meter.add_power(PowerReading(START_NS + tenth * 100 * MS, None, watts * 1000))
        if tenth % 20 == 0:
            meter.add_counter(CounterReading(START_NS + tenth * 100 * MS + MS, round(joules * 1e3), MS))
    # Between the readings at 22 and 26 s the power falls once; without a shape it would be a straight line.
    timeline = timeline_of(meter)
    rises = np.diff([timeline.energy_at(START_NS + round(second * S)) for second in np.arange(22, 26, 0.5)])
    assert rises.max() / rises.min() == pytest.approx(5, rel=0.2)


def test_the_same_source_again_is_no_change() -> None:
    whole = Bench().run(30)
    bench, meter = Bench(), Meter(EnergySource.POWER_RING, limit_watts=LIMIT)
    for _ in bench.seconds(meter, 30):
        meter.change_source(EnergySource.POWER_RING)
    meter.flush()
    assert_same(meter, whole)


def test_readings_of_other_sensors_are_ignored() -> None:
    meter = Meter(EnergySource.POWER_RING)
    meter.add_power(PowerReading(START_NS, 300_000, 300_000))
    assert (meter.timeline, meter.power_watts) == (None, None)
    meter = Meter(EnergySource.ENERGY_COUNTER)
    meter.add_ring(PowerSamples(START_NS + np.arange(50) * 20 * MS, np.full(50, 3e5)))
    assert (meter.timeline, meter.power_watts) == (None, None)


def test_a_window_at_the_newest_end_knows_that_it_may_miss_something() -> None:
    # The counter's last tick may be a tenth of a second old: so much at full power may not be in it yet.
    meter = Meter(EnergySource.ENERGY_COUNTER, limit_watts=LIMIT)
    for number in range(20):
        meter.add_counter(CounterReading(START_NS + number * S, number * 100_000, 4 * MS))
    end_ns = timeline_of(meter).end_ns
    energy = window(meter, end_ns - 5 * S, end_ns)
    assert energy.joules == pytest.approx(500)
    assert energy.high >= 500 + LIMIT * COUNTER_TICK_NS / S
