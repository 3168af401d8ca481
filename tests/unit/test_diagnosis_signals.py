import math

import pytest

from jouletrace.diagnosis.signals import ActiveSource, DeviceSignals, align, merge, next_span, sound
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import (
    ActivityReading,
    DeviceInfo,
    HealthReading,
    Link,
    Pipe,
    ProcessReading,
    StateReading,
    ThrottleReason,
)

S = 1_000_000_000
INFO = DeviceInfo("GPU-1", 0, "NVIDIA H200", "580", max_sm_clock_hertz=1.98e9, power_limit_watts=700.0)


def activity(start: float, end: float, sm: float | None = None, **changed: object) -> ActivityReading:
    busy = {} if sm is None else {Pipe.SM: sm}
    return ActivityReading(round(start * S), round(end * S), **{"busy_ratio": busy, **changed})


def graphics(start: float, end: float, ratio: float) -> ActivityReading:
    return activity(start, end, busy_ratio={Pipe.GRAPHICS: ratio})


def state(second: float, **changed: object) -> StateReading:
    return StateReading(round(second * S), **changed)


def test_a_mean_counts_each_interval_by_its_part_of_the_span() -> None:
    readings = [activity(0, 1, 0.2), activity(1, 1.5, 0.8), activity(1.5, 3, 0.4)]
    signals = align(S // 2, 2 * S, info=INFO, readings=readings)
    # 0.5 s of 0.2, 0.5 s of 0.8 and 0.5 s of 0.4.
    assert signals.busy_ratio[Pipe.SM] == pytest.approx((0.2 + 0.8 + 0.4) / 3)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -0.1, 1.5, 140737488355328.0])
def test_a_value_is_absent_when_less_than_half_of_the_span_has_it(garbage: float) -> None:
    readings = [
        activity(0, 0.4, 0.3, dram_ratio=0.5, bytes_per_second={Link.PCIE_RECEIVE: 1e9}),
        activity(0.4, 1, garbage, dram_ratio=garbage, bytes_per_second={Link.PCIE_RECEIVE: garbage * 1e13}),
    ]
    signals = align(0, S, info=INFO, readings=readings)
    assert signals.dram_ratio is None
    assert signals.busy_ratio == {}
    assert signals.bytes_per_second == {}
    assert not signals.has_activity
    assert signals.active_ratio is None
    # Of 0.4 s of 0.7 s it is known.
    assert align(0, 7 * S // 10, info=INFO, readings=readings).dram_ratio == pytest.approx(0.5)


def test_energy_is_of_exactly_the_span_or_absent() -> None:
    timeline = Timeline(0)
    timeline.extend([S, 2 * S, 3 * S], [100.0, 300.0, 500.0])
    signals = align(S // 2, 5 * S // 2, info=INFO, timeline=timeline)
    assert signals.energy_joules == pytest.approx(50 + 300 + 250)
    assert signals.watts == pytest.approx(300)
    assert align(5 * S // 2, 3 * S + 1, info=INFO, timeline=timeline).energy_joules is None


def test_spans_end_with_gpm_intervals() -> None:
    readings = [activity(0, 0.5, 0.1), activity(0.5, 1.0, 0.1), graphics(0, 1.2, 0.2), activity(1.0, 1.5, 0.1)]
    assert next_span(0, round(1.4 * S), readings) == (0, S)
    assert next_span(S, round(1.4 * S), readings) is None
    assert next_span(S, 2 * S, readings) == (S, round(1.5 * S))
    # GPM has been silent for longer than 3 s, or was never there: the timeline's end.
    assert next_span(S, 5 * S, readings) == (S, 5 * S)
    assert next_span(S, 5 * S, []) == (S, 5 * S)


def test_graphics_over_the_span_is_the_active_part() -> None:
    signals = align(S, 2 * S, info=INFO, readings=[activity(1, 2, 0.3), graphics(0.9, 2, 0.45)])
    assert (signals.active_ratio, signals.active_source) == (pytest.approx(0.45), ActiveSource.GRAPHICS)


def test_a_longer_graphics_reading_tells_how_sm_relates_to_it() -> None:
    # SM was 0.2 while GRAPHICS was 0.4; now SM is 0.3.
    readings = [activity(0, 5, 0.2), graphics(0, 5, 0.4), activity(5, 6, 0.3)]
    signals = align(5 * S, 6 * S, info=INFO, readings=readings)
    assert (signals.active_ratio, signals.active_source) == (pytest.approx(0.6), ActiveSource.SCALED_SM)
    much_later = [*readings, activity(40, 41, 0.3)]
    assert align(40 * S, 41 * S, info=INFO, readings=much_later).active_source is ActiveSource.SM


def test_without_graphics_utilization_stands_in_but_not_below_sm() -> None:
    def seen(sm: float, utilization: float) -> DeviceSignals:
        states = [state(0.5, utilization_ratio={"gpu": utilization})]
        return align(0, S, info=INFO, readings=[activity(0, 1, sm)], states=states)

    assert (seen(0.1, 0.3).active_ratio, seen(0.1, 0.3).active_source) == (0.3, ActiveSource.UTILIZATION)
    assert seen(0.6, 0.3).active_ratio == 0.6
    # Copies read as utilization; without any SM at work nothing is active.
    assert (seen(0.0, 1.0).active_ratio, seen(0.0, 1.0).active_source) == (0.0, ActiveSource.SM)
    assert align(0, S, info=INFO, readings=[activity(0, 1, 0.35)]).active_ratio == pytest.approx(0.5)


def test_states_of_the_span_give_clock_reasons_and_throttled_part() -> None:
    states = [
        state(0.9, clock_hertz={"sm": 1.98e9}, event_reasons=0x1, throttled_ns={ThrottleReason.SW_POWER_CAP: 0}),
        state(1.5, clock_hertz={"sm": 1.5e9}, event_reasons=0x4),
        state(1.9, clock_hertz={"sm": 1.4e9}, event_reasons=0x20),
        state(2.1, clock_hertz={"sm": 0.3e9}, throttled_ns={ThrottleReason.SW_POWER_CAP: 900_000_000}),
    ]
    signals = align(S, 2 * S, info=INFO, states=states)
    assert signals.sm_clock_hertz == pytest.approx(1.45e9)
    assert signals.sm_clock_swing == pytest.approx((1.98 - 1.4) / 1.98)
    assert signals.event_reasons == 0x24
    assert signals.throttled_ratio == {ThrottleReason.SW_POWER_CAP: pytest.approx(0.9 / 1.2)}
    nothing = align(5 * S, 6 * S, info=INFO, states=states)
    assert (nothing.sm_clock_hertz, nothing.event_reasons, nothing.throttled_ratio) == (None, None, {})


def test_the_newest_health_up_to_the_end_gives_limit_and_processes() -> None:
    healths = [
        HealthReading(S, [ProcessReading(1), ProcessReading(2)], power_limit_watts=500.0),
        HealthReading(3 * S, [], power_limit_watts=300.0),
    ]
    signals = align(S, 2 * S, info=INFO, healths=healths)
    assert (signals.processes, signals.power_limit_watts) == (2, 500.0)
    assert align(0, S // 2, info=INFO, healths=healths).power_limit_watts == 700.0


def test_merged_spans_are_as_one() -> None:
    one = DeviceSignals(
        0, S, 100.0, 0.2, {Pipe.SM: 0.1}, active_ratio=0.1, active_source=ActiveSource.GRAPHICS, event_reasons=1
    )
    other = DeviceSignals(
        S, 4 * S, 900.0, 0.6, {Pipe.SM: 0.5, Pipe.FP32: 0.4}, active_ratio=0.9, active_source=ActiveSource.SM,
        event_reasons=4, held=True,
    )  # fmt: skip
    merged = merge([one, other])
    assert (merged.start_ns, merged.end_ns, merged.energy_joules, merged.event_reasons) == (0, 4 * S, 1000.0, 5)
    assert merged.dram_ratio == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert merged.busy_ratio == {Pipe.SM: pytest.approx(0.4), Pipe.FP32: pytest.approx(0.4)}
    assert (merged.active_ratio, merged.active_source) == (pytest.approx(0.7), ActiveSource.SM)
    assert merged.held is True
    assert merge([DeviceSignals(0, 3 * S), other]).dram_ratio == pytest.approx(0.6)
    rest = merge([DeviceSignals(0, 4 * S), other])
    assert (rest.dram_ratio, rest.energy_joules) == (None, None)


def test_senseless_values_are_dropped_and_counted() -> None:
    bad = DeviceSignals(
        0, S, math.nan, 1.7, {Pipe.SM: -1.0, Pipe.TENSOR: 1.01}, {Link.PCIE_RECEIVE: math.inf}, active_ratio=math.nan,
        sm_clock_hertz=-5.0, power_limit_watts=0.0, utilization_ratio={"gpu": 4294967295.0},
        idle_watts={"parked": -1.0},
    )  # fmt: skip
    good, dropped = sound(bad)
    assert dropped == 9
    assert good.busy_ratio == {Pipe.TENSOR: 1.0}
    assert (good.energy_joules, good.dram_ratio, good.active_ratio, good.sm_clock_hertz) == (None,) * 4
    assert (good.bytes_per_second, good.utilization_ratio, good.idle_watts) == ({}, {}, {})
    assert sound(good) == (good, 9)


def test_rejected_readings_are_counted_by_signal() -> None:
    bad = {Pipe.SM: 0.8, Pipe.FP16: 1.5, Pipe.FP32: math.nan}
    readings = [activity(tenth / 10, (tenth + 1) / 10, busy_ratio=bad, dram_ratio=0.6) for tenth in range(10)]
    states = [state(0.5, clock_hertz={"sm": math.nan}, utilization_ratio={"gpu": 42e7, "memory": 0.5})]
    spoilt = align(0, S, info=INFO, readings=readings, states=states)
    assert (spoilt.garbage, sound(spoilt)) == (4, (spoilt, 4))
    assert spoilt.busy_ratio == {Pipe.SM: pytest.approx(0.8)}
    clean = align(S, 4 * S, info=INFO, readings=[activity(1, 4, 0.8, dram_ratio=0.6)])
    assert clean.garbage == 0
    # One second of four.
    assert merge([spoilt, clean]).garbage == 1
    assert merge([spoilt, DeviceSignals(S, 2 * S)]).garbage is None
