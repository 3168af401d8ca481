import math
import random
from dataclasses import replace

import pytest

from jouletrace.diagnosis.causes import BatchLimit, Cause, EngineDiagnosis
from jouletrace.diagnosis.waste import DeviceUse, EngineDemand, Waste, WasteCause

S = 1_000_000_000
PARKED = DeviceUse(
    "g",
    0,
    S,
    energy_joules=121.0,
    parked=True,
    underutilized=False,
    active_ratio=0.0,
    parked_watts=121.0,
    bare_watts=79.0,
)
BUSY = DeviceUse(
    "g", 0, S, energy_joules=600.0, parked=False, underutilized=False, active_ratio=1.0, parked_watts=121.0
)
SMALL = EngineDiagnosis(
    "e", Cause.SMALL_BATCH, 0.9, "raise it.", batch_limit=BatchLimit.MAX_NUM_SEQS, saved_watts=150.0
)


def at(device: DeviceUse, second: float, seconds: float = 1.0) -> DeviceUse:
    return replace(device, start_ns=round(second * S), end_ns=round((second + seconds) * S))


def test_a_parked_device_wastes_beyond_the_time_what_would_go_away_with_its_process() -> None:
    waste = Waste(parked_after_seconds=300)
    for second in range(400):
        waste.add([at(PARKED, second)], [])
    assert waste.joules == pytest.approx({("g", WasteCause.PARKED): 100 * 42.0})


def test_what_would_go_away_is_not_guessed() -> None:
    waste = Waste(parked_after_seconds=0)
    for second in range(20):
        waste.add([at(replace(PARKED, bare_watts=None), second)], [])
    assert waste.joules == {}


def test_the_window_in_which_the_time_ends_counts_by_its_part() -> None:
    waste = Waste(parked_after_seconds=2.25)
    for start in (0, 2):
        waste.add(
            [at(replace(PARKED, energy_joules=242.0), start, 2)], [EngineDemand(("g",), active=False, waiting=0.0)]
        )
    assert waste.joules["g", WasteCause.PARKED] == pytest.approx(1.75 * 42)


@pytest.mark.parametrize(
    ("device", "engine"),
    [
        (BUSY, EngineDemand(("g",), active=True)),
        (PARKED, EngineDemand(("g",), active=True)),
        (PARKED, EngineDemand(("g",), active=False, waiting=1.0)),
        (replace(PARKED, parked=None), EngineDemand(("g",), active=False)),
    ],
)
def test_a_request_or_work_starts_the_time_anew(device: DeviceUse, engine: EngineDemand) -> None:
    waste = Waste(parked_after_seconds=10)
    for second in range(40):
        one = (at(device, second), [engine]) if second % 9 == 8 else (at(PARKED, second), [])
        waste.add([one[0]], one[1])
    assert WasteCause.PARKED not in {cause for _, cause in waste.joules}


def test_a_missed_evaluation_is_not_counted_and_does_not_start_the_time_anew() -> None:
    waste = Waste(parked_after_seconds=10)
    for second in (*range(8), *range(11, 20)):
        waste.add([at(PARKED, second)], [])
    assert waste.joules == pytest.approx({("g", WasteCause.PARKED): 9 * 42.0})


def test_time_that_nobody_saw_starts_the_time_anew() -> None:
    waste = Waste(parked_after_seconds=10)
    for second in (*range(8), *range(3600, 3608)):
        waste.add([at(PARKED, second)], [])
    waste.forget("g")
    waste.add([at(PARKED, 3608)], [])
    assert waste.joules == {}


def test_a_device_that_stands_still_under_a_queue_wastes_its_parked_power_for_that_time() -> None:
    waste = Waste(parked_after_seconds=300)
    slow = replace(BUSY, energy_joules=188.0, underutilized=True, active_ratio=0.28)
    waste.add([slow], [EngineDemand(("g",), active=True, waiting=4.0)])
    assert waste.joules == pytest.approx({("g", WasteCause.UNDERUTILIZED_WITH_DEMAND): 121 * 0.72})
    for engine in (EngineDemand(("g",), True, 0.0), EngineDemand(("g",), True, None), EngineDemand(("h",), True, 4.0)):
        waste.add([slow], [engine])
    waste.add([replace(slow, parked_watts=None)], [EngineDemand(("g",), True, 4.0)])
    assert waste.joules == pytest.approx({("g", WasteCause.UNDERUTILIZED_WITH_DEMAND): 121 * 0.72})


def test_throttling_costs_the_parked_power_for_the_time_that_the_lower_clock_adds() -> None:
    waste = Waste(parked_after_seconds=300)
    hot = replace(BUSY, throttled_ratio=0.5, clock_ratio=0.6)
    waste.add([hot], [])
    assert waste.joules == pytest.approx({("g", WasteCause.THROTTLING): 121 * 0.5 * 0.4})
    waste.add([replace(hot, clock_ratio=None), replace(hot, uuid="h", throttled_ratio=0.0)], [])
    assert waste.joules == pytest.approx({("g", WasteCause.THROTTLING): 121 * 0.5 * 0.4})


def test_a_small_batch_at_its_limit_wastes_what_the_larger_one_saves_split_over_its_devices() -> None:
    waste = Waste(parked_after_seconds=300)
    devices = [BUSY, replace(BUSY, uuid="h", energy_joules=300.0)]
    waste.add(devices, [EngineDemand(("g", "h"), active=True, waiting=9.0, diagnosis=SMALL)])
    wanted = {("g", WasteCause.SMALL_BATCH_WHILE_WAITING): 100.0, ("h", WasteCause.SMALL_BATCH_WHILE_WAITING): 50.0}
    assert waste.joules == pytest.approx(wanted)
    for diagnosis, waiting in (
        (replace(SMALL, batch_limit=BatchLimit.DEMAND), 9.0),
        (replace(SMALL, cause=Cause.KV_CAPACITY), 9.0),
        (replace(SMALL, saved_watts=math.nan), 9.0),
        (SMALL, 0.0),
    ):
        waste.add(devices, [EngineDemand(("g", "h"), active=True, waiting=waiting, diagnosis=diagnosis)])
    assert waste.joules == pytest.approx(wanted)


def test_waste_never_exceeds_a_devices_joules_whatever_comes() -> None:
    rng = random.Random(7)
    values = (None, math.nan, -1.0, 0.0, 0.2, 0.9, 5.0, math.inf)
    waste, spent, wasted = Waste(parked_after_seconds=3), 0.0, 0.0
    for second in range(3000):
        energy = rng.choice((None, math.nan, -5.0, 0.0, 50.0, 600.0))
        device = DeviceUse(
            "g",
            second * S,
            (second + 1) * S,
            energy,
            parked=rng.choice((None, True, True, True, False)),
            underutilized=rng.choice((None, True, False)),
            active_ratio=rng.choice(values),
            parked_watts=rng.choice((*values, 121.0, 900.0)),
            bare_watts=rng.choice((*values, 79.0, 900.0)),
            throttled_ratio=rng.choice(values),
            clock_ratio=rng.choice(values),
        )
        saved = rng.choice((*values, 100.0, 5000.0)) or 0.0
        engine = EngineDemand(
            rng.choice((("g",), ("g", "h"))),
            active=rng.random() < 0.2,
            waiting=rng.choice((None, 0.0, 0.0, math.nan, 3.0)),
            diagnosis=rng.choice((None, replace(SMALL, saved_watts=saved))),
        )
        waste.add([device], [engine] if rng.random() < 0.7 else [])
        total = sum(waste.joules.values())
        spent = energy if energy is not None and energy > 0 else 0.0
        assert wasted <= total <= wasted + spent + 1e-6
        wasted = total
    assert {cause for _, cause in waste.joules} == set(WasteCause)
