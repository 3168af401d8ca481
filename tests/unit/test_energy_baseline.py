from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jouletrace.energy.baseline import (
    ENOUGH_WINDOWS,
    KEPT_WINDOWS,
    SETTLE_WINDOWS,
    Baseline,
    IdleKind,
    IdleLevel,
    decode,
    encode,
    holds_context,
    work_watts,
)
from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.gpu.readings import PowerSamples
from jouletrace.trace.recording import DRAM_COLUMN, PIPE_COLUMNS, Recording, read

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
CHUNKED = REPOSITORY / "tests/data/h200-c-chunked.json.gz"
S = 1_000_000_000


def recorded_windows(recording: Recording) -> Iterator[tuple[int, float, bool | None, float | None]]:
    """End, watts, context and highest activity of each second of a recording."""
    ring, gpm, state = (recording.streams[name] for name in ("power_ring_20ms", "gpm_100ms", "state_100ms"))
    meter = Meter(EnergySource.POWER_RING, limit_watts=700, has_counter=False)
    meter.add_ring(PowerSamples(ring.t_ns, ring.values["mw"]))
    columns = [name for name in (*PIPE_COLUMNS.values(), DRAM_COLUMN) if name != "sm_occupancy"]
    activity = np.nanmax([gpm.values[name] for name in columns], axis=0) / 100
    total_bytes = recording.meta["fb_total_mib"] * 2**20
    for end_ns in range(int(state.t_ns[0]) + S, int(ring.t_ns[-1]), S):
        energy = meter.window(end_ns - S, end_ns)
        assert energy is not None
        # A GPM row tells of the 100 ms before it.
        busy = activity[(gpm.t_ns > end_ns - S) & (gpm.t_ns <= end_ns + S // 10)]
        memory_mib = state.values["fb_used_mib"][np.searchsorted(state.t_ns, end_ns, "right") - 1]
        context = holds_context(None, int(memory_mib * 2**20), int(total_bytes))
        yield end_ns, energy.joules, context, float(busy.max()) if len(busy) else None


def test_levels_of_a_real_gpu() -> None:
    # Watts of the phases `idle_no_context` and `idle_with_weights` by the energy counter: 79 and 121.
    baseline, seen = Baseline(), set()
    for t_ns, watts, context, busiest in recorded_windows(read(DEMO)):
        seen.add(baseline.observe(t_ns, watts, context=context, busiest_ratio=busiest))
    assert baseline.levels[IdleKind.BARE].watts == pytest.approx(79, abs=1.5)
    assert baseline.levels[IdleKind.PARKED].watts == pytest.approx(121, abs=1.5)
    assert seen == {None, IdleKind.BARE, IdleKind.PARKED}


def test_short_rests_of_a_serving_gpu_teach_nothing() -> None:
    # Idle for 6 s bare and 9 s parked, and for a second or two between phases, at 82 to 138 W.
    baseline, seen = Baseline(), []
    for t_ns, watts, context, busiest in recorded_windows(read(CHUNKED)):
        seen.append(baseline.observe(t_ns, watts, context=context, busiest_ratio=busiest))
    assert seen.count(IdleKind.BARE) > 3
    assert seen.count(IdleKind.PARKED) > 8
    assert baseline.levels == {}


def observed(baseline: Baseline, watts: list[float], *, context: bool | None = False, **details: object) -> None:
    given = {"busiest_ratio": 0.0} | details
    for number, one in enumerate(watts):
        baseline.observe(number * S, one, context=context, **given)


def test_the_median_and_never_the_minimum() -> None:
    baseline = Baseline()
    observed(baseline, [80.0] * 10 + [3.0] + [80.0] * 10 + [300.0])
    assert baseline.levels == {IdleKind.BARE: IdleLevel(80.0, 22 - SETTLE_WINDOWS, 21 * S)}


def test_nothing_is_learnt_from_a_few_windows_or_just_after_work() -> None:
    baseline = Baseline()
    for _ in range(10):
        observed(baseline, [700.0], busiest_ratio=1.0)
        observed(baseline, [200.0, 150.0, 130.0])
    assert baseline.levels == {}
    observed(baseline, [80.0] * (ENOUGH_WINDOWS - 1))
    assert baseline.levels == {}
    observed(baseline, [80.0])
    assert baseline.levels[IdleKind.BARE].watts == 80


@pytest.mark.parametrize(
    "details",
    [
        {"busiest_ratio": 0.02},
        {"busiest_ratio": None},
        {"context": None},
    ],
)
def test_nothing_is_learnt_under_load_or_without_knowledge(details: dict[str, object]) -> None:
    baseline = Baseline()
    observed(baseline, [300.0] * 100, **details)
    assert baseline.levels == {}


def test_the_kinds_are_kept_apart() -> None:
    baseline = Baseline()
    for _ in range(5):
        observed(baseline, [90.0] * SETTLE_WINDOWS + [80.0] * 5, context=False)
        # Clocks are still rising when a context is made: the first windows after a change count for neither.
        observed(baseline, [100.0] * SETTLE_WINDOWS + [121.0] * 5, context=True)
    assert {kind: level.watts for kind, level in baseline.levels.items()} == {
        IdleKind.BARE: 80,
        IdleKind.PARKED: 121,
    }


def test_windows_wait_for_the_next_look_at_the_processes() -> None:
    # Processes are looked at each 10 s. A process came at 15 s, so the windows from then to 20 s are not bare.
    baseline = Baseline()
    for second in range(1, 41):
        looked = second // 10 * 10
        baseline.observe(
            second * S,
            80.0 if second <= 15 else 121.0,
            context=looked >= 20,
            busiest_ratio=0.0,
            context_ns=looked * S,
        )
    assert baseline.levels[IdleKind.BARE] == IdleLevel(80.0, 7, 10 * S)
    assert baseline.levels[IdleKind.PARKED].watts == 121


def test_a_kept_level_is_not_overwritten_by_a_few_windows() -> None:
    kept = IdleLevel(79.0, KEPT_WINDOWS, 5 * S)
    baseline = Baseline({IdleKind.BARE: kept})
    observed(baseline, [95.0] * (SETTLE_WINDOWS + KEPT_WINDOWS // 4 - 1))
    assert baseline.levels == {IdleKind.BARE: kept}
    observed(baseline, [95.0])
    assert baseline.levels[IdleKind.BARE].watts == 95


def test_a_level_follows_a_lasting_change() -> None:
    baseline = Baseline()
    observed(baseline, [80.0] * 200)
    observed(baseline, [85.0] * 70)
    assert baseline.levels[IdleKind.BARE] == IdleLevel(85.0, KEPT_WINDOWS, 69 * S)


@pytest.mark.parametrize(
    ("processes", "used", "context"),
    [
        (0, None, False),
        (0, 140_000, False),
        (2, 0, True),
        (None, 615, False),
        (None, 2_500, True),
        (None, None, None),
    ],
)
def test_who_holds_a_context(processes: int | None, used: int | None, context: bool | None) -> None:
    # A bare H200 has 615 of 143,771 MiB in use.
    assert holds_context(processes, used, 143_771) is context
    if processes is None:
        assert holds_context(None, used, None) is None


def test_state_file_round_trip() -> None:
    levels = {
        "GPU-1": {IdleKind.BARE: IdleLevel(79.25, 12, 1), IdleKind.PARKED: IdleLevel(121.5, 120, 2)},
        "GPU-ü": {IdleKind.BARE: IdleLevel(60.0, 5, 3)},
    }
    assert decode(encode(levels)) == levels
    assert b'"format": 1' in encode(levels)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"\x00\xff", "malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `format`"),
        (b'{"format": 2, "devices": {}}', r"format 2 is not known to this version \(it knows 1\)"),
        (b'{"format": "1"}', "Expected `int`"),
        (b'{"format": 1, "levels": {}}', "unknown field `levels`"),
        (b'{"format": 1, "devices": {"a": {"hot": {}}}}', "Invalid enum value 'hot'"),
        (b'{"format": 1, "devices": {"a": {"bare": {"watts": -1, "windows": 1, "learnt_ns": 1}}}}', "> 0.0"),
        (b'{"format": 1, "devices": {"a": {"bare": {"watts": NaN, "windows": 1, "learnt_ns": 1}}}}', "malformed"),
        (b'{"format": 1, "devices": {"a": {"bare": {"watts": 79, "windows": 0, "learnt_ns": 1}}}}', ">= 1"),
    ],
)
def test_a_state_file_that_makes_no_sense_is_refused_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(content)


def test_the_power_of_work_is_clearly_above_the_parked_level() -> None:
    # An H200: warm and parked 128 W and host copies 130 W are no certain work, a loop of tiny kernels (189 W) is.
    assert 130 < (work_watts(121.0, 700.0) or 0.0) < 189
    assert work_watts(None, 700.0) == pytest.approx(210)
    # A level that cannot be right is none.
    assert work_watts(900.0, 700.0) == work_watts(None, 700.0)
    assert work_watts(121.0, None) is None
