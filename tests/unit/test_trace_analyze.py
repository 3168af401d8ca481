import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jouletrace.trace.analyze import analyze, phases_of
from jouletrace.trace.recording import Recording, RecordingError, Stream, read

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
CHUNKED = REPOSITORY / "tests/data/h200-c-chunked.json.gz"
UNSEEN = REPOSITORY / "tests/data/h200-d-unseen.json.gz"
S = 1_000_000_000
COUNTER_AGE_NS = 20_000_000
"""Mean age of a stored counter value: a change, seen by a poll each 30 ms (plus 2-25 ms for the call)."""


def without(recording: Recording, *names: str) -> Recording:
    streams = {name: stream for name, stream in recording.streams.items() if name not in names}
    return replace(recording, streams=streams)


def counter_joules(recording: Recording, start_ns: int, end_ns: int) -> float:
    """The hardware's own energy of a window; between two ticks as if the power had been even."""
    counter = recording.streams["energy_counter"]
    edges = np.array([start_ns, end_ns]) + COUNTER_AGE_NS
    start, end = np.interp(edges, counter.t_ns, counter.values["mj"])
    return float(end - start) / 1e3


def steady(watts: float, seconds: int, *, step_ns: int = 20_000_000) -> Recording:
    t_ns = 1_000 * S + np.arange(0, seconds * S + 1, step_ns)
    ring = Stream(t_ns, {"mw": np.full(len(t_ns), watts * 1e3)})
    return Recording({"gpu": "test"}, {"power_ring_20ms": ring}, name="steady.json.gz")


def event(kind: str, second: float, name: str, **labels: object) -> dict:
    return {"t_ns": 1_000 * S + round(second * S), "kind": kind, "phase": name, **labels}


@pytest.mark.parametrize("path", [DEMO, CHUNKED])
def test_energy_meets_the_hardware_counter(path: Path) -> None:
    recording = read(path)
    result = analyze(recording)
    assert result["format"] == 1
    assert result["energy_source"] == "power_ring"
    assert result["energy_joules"] == pytest.approx(result["counter_joules"], rel=5e-4)
    assert result["warnings"] == []
    checked = 0
    for phase in result["phases"]:
        assert phase["low"] <= phase["energy_joules"] <= phase["high"]
        seconds = (phase["end_ns"] - phase["start_ns"]) / S
        assert phase["average_watts"] == pytest.approx(phase["energy_joules"] / seconds)
        if seconds >= 4:
            truth = counter_joules(recording, phase["start_ns"], phase["end_ns"])
            assert phase["energy_joules"] == pytest.approx(truth, rel=6e-3), phase["name"]
            checked += 1
    assert checked >= 19


def test_phases_of_the_demo() -> None:
    result = analyze(read(DEMO))
    phases = {(p["name"], *p["labels"].values()): p["average_watts"] for p in result["phases"]}
    assert len(phases) == 23
    # Watts by the hardware counter, taken when the recording was made.
    assert phases["idle_no_context",] == pytest.approx(79, abs=1)
    assert phases["idle_with_weights",] == pytest.approx(121, abs=1)
    assert phases["decode", 16, 1024] == pytest.approx(531, rel=0.01)
    assert phases["host_offload",] == pytest.approx(130, rel=0.01)
    assert phases["serve", 20.0] == pytest.approx(662, rel=0.01)


def test_the_result_is_json() -> None:
    assert json.loads(json.dumps(analyze(read(CHUNKED)), allow_nan=False))["gpu"]["name"] == "NVIDIA H200"


@pytest.mark.parametrize(
    ("missing", "source", "tolerance"),
    [
        (("power_ring_20ms",), "energy_counter", 0.0005),
        (("power_ring_20ms", "energy_counter"), "power_polling", 0.005),
        (("power_ring_20ms", "energy_counter", "power_instant"), "power_average", 0.005),
    ],
)
def test_worse_sensors_stand_in(missing: tuple[str, ...], source: str, tolerance: float) -> None:
    demo = read(DEMO)
    result = analyze(without(demo, *missing))
    assert result["energy_source"] == source
    span = demo.streams["power_average" if "instant" in str(missing) else "power_instant"].t_ns
    if source == "energy_counter":
        span = demo.streams["energy_counter"].t_ns
        assert result["counter_joules"] == pytest.approx(115_891.978)
    else:
        assert result["counter_joules"] is None
    truth = counter_joules(demo, int(span[0]), int(span[-1]))
    assert result["energy_joules"] == pytest.approx(truth, rel=tolerance)
    for phase in result["phases"]:
        true_joules = counter_joules(demo, phase["start_ns"], phase["end_ns"])
        assert phase["low"] <= true_joules * 1.005, phase["name"]
        assert phase["high"] >= true_joules * 0.995, phase["name"]


def test_no_phase_events_make_one_phase() -> None:
    result = analyze(steady(300, 20))
    (phase,) = result["phases"]
    assert phase["name"] == "recording"
    assert phase["energy_joules"] == pytest.approx(6_000)
    assert result["energy_joules"] == pytest.approx(6_000)
    assert result["counter_joules"] is None


def test_longer_than_the_timeline_is_deep() -> None:
    events = [event("phase_start", 10, "long"), event("phase_end", 3_010, "long")]
    result = analyze(replace(steady(100, 3_600, step_ns=100_000_000), events=tuple(events)))
    (phase,) = result["phases"]
    assert phase["energy_joules"] == pytest.approx(300_000, rel=1e-9)
    # Each piece that the window is added up from has edges of its own.
    assert phase["high"] - phase["low"] < 300
    assert result["energy_joules"] == pytest.approx(360_000, rel=1e-9)
    assert [one for one in result["warnings"] if not one.startswith("Neither GPM")] == []


def test_phases_nest_and_repeat() -> None:
    events = (
        event("phase_start", 0, "outer"),
        event("phase_start", 1, "inner", round=1),
        event("phase_end", 2, "inner"),
        event("phase_start", 3, "inner", round=2),
        event("phase_start", 4, "inner", round=3),
        event("phase_end", 5, "inner"),
        event("phase_end", 6, "inner"),
        event("phase_end", 7, "outer"),
    )
    phases, warnings = phases_of(replace(steady(1, 10), events=events))
    spans = [(p.name, p.labels.get("round"), (p.end_ns - p.start_ns) // S) for p in phases]
    assert spans == [("outer", None, 7), ("inner", 1, 1), ("inner", 2, 3), ("inner", 3, 1)]
    assert warnings == []


def test_phases_without_end_or_start() -> None:
    events = (
        event("phase_start", 1, "a"),
        event("phase_end", 2, "never begun"),
        event("phase_start", 4, "b"),
    )
    result = analyze(replace(steady(100, 10), events=events))
    assert [round(p["energy_joules"]) for p in result["phases"]] == [300, 600]
    assert len(result["warnings"]) == 4
    assert "never begun" in result["warnings"][0]
    assert "a at" in result["warnings"][1]


def test_a_phase_outside_of_the_readings_is_told() -> None:
    events = (event("phase_start", 8, "late"), event("phase_end", 12, "late"))
    result = analyze(replace(steady(100, 10), events=events))
    assert result["phases"][0]["energy_joules"] == pytest.approx(200)
    assert result["phases"][0]["average_watts"] == pytest.approx(100)
    assert "energy is known for 2.00 s" in result["warnings"][0]


def test_a_gap_in_the_ring_is_filled_from_the_counter() -> None:
    demo = read(DEMO)
    ring = demo.streams["power_ring_20ms"]
    lost = (ring.t_ns > ring.t_ns[0] + 90 * S) & (ring.t_ns < ring.t_ns[0] + 97 * S)
    holed = Stream(ring.t_ns[~lost], {"mw": ring.values["mw"][~lost]})
    result = analyze(replace(demo, streams={**demo.streams, "power_ring_20ms": holed}))
    assert result["energy_joules"] == pytest.approx(result["counter_joules"], rel=1e-3)
    assert any("have no samples" in warning for warning in result["warnings"])


def test_a_counter_reset_is_told_and_left_out() -> None:
    demo = read(DEMO)
    counter = demo.streams["energy_counter"]
    values = counter.values["mj"].copy()
    values[1_000:] -= values[1_000]
    broken = Stream(counter.t_ns, {**counter.values, "mj": values})
    result = analyze(replace(demo, streams={**demo.streams, "energy_counter": broken}))
    assert any("set back" in warning for warning in result["warnings"])
    assert result["counter_joules"] == pytest.approx(result["energy_joules"], rel=2e-3)


def test_work_of_nobody_is_not_called_parked_without_gpm() -> None:
    demo = read(DEMO)
    with_gpm = analyze(demo)["ledger"]
    for broken in (without(demo, "gpm_100ms"), with_activity(demo, np.nan), with_activity(demo, 150.0)):
        ledger = analyze(broken)["ledger"]
        assert ledger["idle_joules"]["parked"] == pytest.approx(with_gpm["idle_joules"]["parked"], rel=0.02)
        assert ledger["unattributed_joules"] == pytest.approx(with_gpm["unattributed_joules"], rel=0.01)


def with_activity(recording: Recording, value: float) -> Recording:
    gpm = recording.streams["gpm_100ms"]
    values = {name: np.full(len(gpm), value) for name in gpm.values}
    return replace(recording, streams={**recording.streams, "gpm_100ms": Stream(gpm.t_ns, values)})


def test_rows_that_say_nothing_are_neither_work_nor_rest() -> None:
    demo = read(DEMO)
    gpm = demo.streams["gpm_100ms"]
    rng = np.random.default_rng(1)
    for value in (np.nan, 150.0):
        lost = rng.random(len(gpm)) < 0.5
        values = {name: np.where(lost, value, column) for name, column in gpm.values.items()}
        torn = replace(demo, streams={**demo.streams, "gpm_100ms": Stream(gpm.t_ns, values)})
        assert analyze(torn)["ledger"]["idle_joules"]["parked"] == pytest.approx(7_870, rel=0.1)


def test_power_alone_tells_heavy_work_from_rest_and_says_so() -> None:
    demo = read(DEMO)
    result = analyze(replace(demo, streams={"power_ring_20ms": demo.streams["power_ring_20ms"]}))
    # Bare, parked, host copies, tiny kernels, the pauses of light work: of 116 kJ not more than a tenth.
    assert 7_000 < sum(result["ledger"]["idle_joules"].values()) < 12_000
    [warning] = result["warnings"]
    assert "lighter work counts as idle" in warning
    nameless = analyze(steady(300, 20))
    assert "both count as idle" in nameless["warnings"][0]


@pytest.mark.parametrize("path", [DEMO, CHUNKED, UNSEEN])
def test_the_ledger_has_the_energy_of_the_whole(path: Path) -> None:
    result = analyze(read(path))
    assert result["ledger"]["device_joules"] == pytest.approx(result["energy_joules"], rel=1e-9)
    # A counter's last row before the ring's end: what comes behind it is not the account's.
    assert isinstance(result["ledger"]["attributed_joules"], float)


def test_a_phase_of_which_nothing_is_known_has_no_numbers() -> None:
    events = (
        event("phase_start", 2, "known"),
        event("phase_end", 8, "known"),
        event("phase_start", 20, "later"),
        event("phase_end", 25, "later"),
    )
    result = analyze(replace(steady(100, 10), events=events))
    known, later = result["phases"]
    assert known["energy_joules"] == pytest.approx(600)
    assert [later[key] for key in ("energy_joules", "low", "high", "average_watts")] == [None] * 4
    assert (later["verdict"], later["confidence"], later["flags"], later["drivers"]) == (None, None, [], {})


def test_nothing_to_add_up_is_a_sentence() -> None:
    with pytest.raises(RecordingError, match="neither power nor energy"):
        analyze(read(DEMO, {"gpm_100ms", "state_100ms"}))
