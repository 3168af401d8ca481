import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from jouletrace.diagnosis.signals import ActiveSource, DeviceSignals
from jouletrace.diagnosis.verdicts import Flag, Hysteresis, Judgement, Thresholds, Verdict, judge
from jouletrace.gpu.readings import Link, Pipe, ThrottleReason

S = 1_000_000_000


def device(watts: float = 500.0, active: float | None = 1.0, **changed: object) -> DeviceSignals:
    """An H200 that does nothing but what is said."""
    signals = DeviceSignals(
        0,
        S,
        watts,
        dram_ratio=0.0,
        busy_ratio={Pipe.SM: 0.0, Pipe.TENSOR: 0.0, Pipe.FP32: 0.0},
        bytes_per_second={Link.PCIE_RECEIVE: 4e6, Link.PCIE_TRANSMIT: 4e6},
        active_ratio=active,
        active_source=None if active is None else ActiveSource.GRAPHICS,
        sm_clock_hertz=1.98e9,
        sm_clock_swing=0.0,
        max_sm_clock_hertz=1.98e9,
        power_limit_watts=700.0,
        event_reasons=0,
        utilization_ratio={"gpu": active or 0.0, "memory": 0.0},
        held=True,
        processes=1,
        idle_watts={"bare": 79.0, "parked": 121.0},
    )
    return replace(signals, **changed)


def loaded(sm: float, dram: float, tensor: float, active: float = 1.0, **changed: object) -> DeviceSignals:
    return device(active=active, dram_ratio=dram, busy_ratio={Pipe.SM: sm, Pipe.TENSOR: tensor}, **changed)


def copying(direction: Link, bytes_per_second: float, active: float = 0.0, **changed: object) -> DeviceSignals:
    return device(135.0, active, bytes_per_second={direction: bytes_per_second}, **changed)


MIB = 2.0**20


@pytest.mark.parametrize(
    ("signals", "verdict"),
    [
        (device(79.0, 0.0, held=False), Verdict.IDLE),
        (device(121.0, 0.0), Verdict.PARKED),
        # Nobody can tell who holds the device: its levels do, and without these its clock.
        (device(80.0, 0.0, held=None), Verdict.IDLE),
        (device(119.0, 0.0, held=None), Verdict.PARKED),
        (device(80.0, 0.0, held=None, idle_watts={}, sm_clock_hertz=0.345e9), Verdict.IDLE),
        (device(80.0, 0.0, held=None, idle_watts={}), Verdict.PARKED),
        # The paper's notes: small-batch decode reads 60-67 % DRAM with 2-16 % tensor; a compute-bound GEMM 17 and 92 %.
        (loaded(0.63, 0.61, 0.02), Verdict.MEMORY_BOUND),
        (loaded(0.95, 0.17, 0.92), Verdict.COMPUTE_BOUND),
        (loaded(0.8, 0.44, 0.47), Verdict.BALANCED),
        # Half of the intensity, half of the time: the same work with pauses.
        (loaded(0.5, 0.49, 0.016, active=0.8), Verdict.MEMORY_BOUND),
        (loaded(0.13, 0.12, 0.01, active=0.2), Verdict.UNDERUTILIZED),
        # One block on one of 132 SMs, all of the time.
        (loaded(0.0076, 0.001, 0.0), Verdict.UNDERUTILIZED),
        (device(300.0, busy_ratio={Pipe.SM: 0.97, Pipe.TENSOR: 0.0, Pipe.FP32: 0.76}), Verdict.COMPUTE_BOUND),
        (copying(Link.PCIE_RECEIVE, 56_580 * MIB), Verdict.TRANSFER_BOUND),
        (copying(Link.PCIE_TRANSMIT, 12e9), Verdict.TRANSFER_BOUND),
        (copying(Link.NVLINK_RECEIVE, 300e9, 0.02), Verdict.TRANSFER_BOUND),
        # An image server: inputs over PCIe at 3 GB/s, kernels for a third of the time.
        (copying(Link.PCIE_RECEIVE, 3e9, 0.33), Verdict.UNDERUTILIZED),
        # Copies between two places in the device need no SM.
        (device(400.0, 0.0, dram_ratio=0.6), Verdict.MEMORY_BOUND),
        # A collective that waits for the link with its SMs spinning.
        (
            loaded(0.2, 0.15, 0.0, bytes_per_second={Link.NVLINK_RECEIVE: 350e9}),
            Verdict.TRANSFER_BOUND,
        ),
    ],
)
def test_verdicts(signals: DeviceSignals, verdict: Verdict) -> None:
    found = judge(signals)
    assert found.verdict is verdict, found
    assert found.sentence.startswith(f"{verdict}: ")
    assert 0 < found.confidence <= 1


@pytest.mark.parametrize(
    ("signals", "verdict"),
    [
        ({"gpu": 0.0, "memory": 0.0, "watts": 60.0, "held": False}, Verdict.IDLE),
        ({"gpu": 0.0, "memory": 0.0, "watts": 121.0, "held": True}, Verdict.PARKED),
        # Duty cycles of the H200's phases.
        ({"gpu": 1.0, "memory": 0.78, "watts": 484.0}, Verdict.MEMORY_BOUND),
        ({"gpu": 1.0, "memory": 0.29, "watts": 693.0}, Verdict.COMPUTE_BOUND),
        ({"gpu": 1.0, "memory": 0.06, "watts": 589.0}, Verdict.COMPUTE_BOUND),
        ({"gpu": 0.28, "memory": 0.14, "watts": 188.0}, Verdict.UNDERUTILIZED),
        ({"gpu": 1.0, "memory": 0.02, "watts": 130.0}, Verdict.TRANSFER_BOUND),
        ({"gpu": 1.0, "memory": 0.2, "watts": 250.0}, Verdict.BALANCED),
    ],
)
def test_without_gpm_the_verdict_is_inferred_and_says_so(signals: dict[str, float], verdict: Verdict) -> None:
    blind = device(
        signals["watts"], None, dram_ratio=None, busy_ratio={}, bytes_per_second={}, held=signals.get("held", True),
        utilization_ratio={"gpu": signals["gpu"], "memory": signals["memory"]},
    )  # fmt: skip
    found = judge(blind)
    assert found.verdict is verdict, found
    assert found.confidence <= 0.6
    assert found.evidence["source"] == "nvml"
    if verdict not in (Verdict.IDLE, Verdict.PARKED):
        assert "inferred" in found.sentence


def test_gpm_that_reads_nothing_at_the_power_of_work_is_not_believed() -> None:
    found = judge(device(600.0, 0.0, utilization_ratio={"gpu": 1.0, "memory": 0.8}))
    assert found.verdict is Verdict.MEMORY_BOUND
    assert found.evidence["source"] == "nvml"
    assert found.confidence < 0.4
    assert "contradicts" in found.sentence


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"event_reasons": 0x4}, Flag.POWER_CAPPED),
        ({"event_reasons": 0x80}, Flag.POWER_CAPPED),
        ({"throttled_ratio": {ThrottleReason.SW_POWER_CAP: 0.2}}, Flag.POWER_CAPPED),
        ({"event_reasons": 0x20}, Flag.THERMALLY_THROTTLED),
        ({"event_reasons": 0x40}, Flag.THERMALLY_THROTTLED),
        ({"throttled_ratio": {ThrottleReason.HW_THERMAL: 0.2}}, Flag.THERMALLY_THROTTLED),
        ({"sm_clock_hertz": 1.7e9}, Flag.LOW_CLOCKS),
        ({"busy_ratio": {Pipe.SM: 0.97, Pipe.TENSOR: 0.0, Pipe.FP32: 0.76}}, Flag.FP32_PIPE),
        ({"busy_ratio": {Pipe.SM: 0.01, Pipe.TENSOR: 0.0}}, Flag.UTILIZATION_MISLEADING),
    ],
)
def test_flags(changed: dict[str, object], flag: Flag) -> None:
    plain = loaded(0.7, 0.6, 0.05)
    assert judge(plain).flags == ()
    assert judge(replace(plain, **changed)).flags == (flag,)


def test_what_is_no_reason_to_flag() -> None:
    assert judge(loaded(0.7, 0.6, 0.05, throttled_ratio={ThrottleReason.SW_POWER_CAP: 0.01})).flags == ()
    # Idle clocks are low by design, event reasons 0x1 and 0x2 are idle and application clocks.
    assert judge(device(79.0, 0.0, sm_clock_hertz=0.345e9, event_reasons=0x1)).flags == ()
    assert judge(loaded(0.7, 0.6, 0.05, event_reasons=0x2)).flags == ()
    # FP32 work while tensor pipes cannot be read may be anything.
    assert judge(device(500.0, busy_ratio={Pipe.SM: 0.97, Pipe.FP32: 0.76})).flags == ()


def test_utilization_that_copies_cause_is_flagged_as_misleading() -> None:
    copies = copying(Link.PCIE_RECEIVE, 56_580 * MIB, utilization_ratio={"gpu": 1.0, "memory": 0.02})
    assert judge(copies).flags == (Flag.UTILIZATION_MISLEADING,)


@pytest.mark.parametrize(
    "changed",
    [
        {"mig_enabled": True},
        {"processes": 3},
        {"sm_clock_swing": 0.5},
        {"active_ratio": None, "active_source": None, "busy_ratio": {Pipe.TENSOR: 0.1}},
        {"dram_ratio": 0.35},
        {"busy_ratio": {Pipe.SM: 0.45, Pipe.TENSOR: 0.1}, "active_source": ActiveSource.SM},
        {"power_limit_watts": math.nan},
    ],
)
def test_confidence_falls_with_doubt(changed: dict[str, object]) -> None:
    plain = loaded(0.7, 0.7, 0.1, active=0.95)
    found = judge(replace(plain, **changed))
    assert found.verdict is Verdict.MEMORY_BOUND
    assert found.confidence < judge(plain).confidence


def test_a_half_that_is_missing_leaves_only_what_is_certain() -> None:
    assert judge(device(dram_ratio=0.8, busy_ratio={Pipe.SM: 0.9})).verdict is Verdict.MEMORY_BOUND
    assert judge(device(dram_ratio=0.4, busy_ratio={Pipe.SM: 0.9})).verdict is Verdict.BALANCED
    compute = loaded(0.9, 0.1, 0.8)
    assert judge(replace(compute, dram_ratio=None)).verdict is Verdict.COMPUTE_BOUND
    assert judge(replace(compute, dram_ratio=math.nan)).confidence < 0.6
    nothing = judge(DeviceSignals(0, S))
    assert (nothing.verdict, nothing.flags) == (Verdict.BALANCED, ())
    assert nothing.confidence < 0.3


given_values = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1.2)
values = st.none() | given_values


@given(
    st.builds(
        DeviceSignals,
        start_ns=st.just(0),
        end_ns=st.sampled_from([0, 1, S]),
        energy_joules=values | st.floats(0, 1000),
        dram_ratio=values,
        busy_ratio=st.dictionaries(st.sampled_from(Pipe), given_values),
        bytes_per_second=st.dictionaries(st.sampled_from(Link), given_values | st.floats(0, 1e11)),
        active_ratio=values,
        active_source=st.none() | st.sampled_from(ActiveSource),
        sm_clock_hertz=values | st.floats(0, 2e9),
        sm_clock_swing=values,
        max_sm_clock_hertz=values | st.just(1.98e9),
        power_limit_watts=values | st.just(700.0),
        event_reasons=st.none() | st.integers(0, 2**16),
        throttled_ratio=st.dictionaries(st.sampled_from(ThrottleReason), given_values),
        utilization_ratio=st.dictionaries(st.sampled_from(["gpu", "memory"]), given_values),
        held=st.none() | st.booleans(),
        processes=st.none() | st.integers(0, 9),
        idle_watts=st.dictionaries(st.sampled_from(["bare", "parked"]), given_values | st.floats(1, 900)),
        mig_enabled=st.booleans(),
    )
)
def test_no_input_raises_and_every_answer_is_finite(signals: DeviceSignals) -> None:
    found = judge(signals)
    assert 0 <= found.confidence <= 1
    assert all(isinstance(value, str) or math.isfinite(value) for value in found.evidence.values())
    assert Hysteresis().update(signals).verdict is found.verdict


# -------------------------------------------------------------------- over time

MEMORY, COMPUTE = loaded(0.7, 0.7, 0.05), loaded(0.9, 0.15, 0.9)


def over_time(hysteresis: Hysteresis, *course: DeviceSignals) -> list[Verdict]:
    spans = [replace(one, start_ns=second * S, end_ns=(second + 1) * S) for second, one in enumerate(course)]
    return [hysteresis.update(one).verdict for one in spans]


def changes(verdicts: list[Verdict]) -> int:
    return sum(one is not other for one, other in pairwise(verdicts))


def test_a_single_odd_second_changes_nothing() -> None:
    verdicts = over_time(Hysteresis(), *[MEMORY] * 5, COMPUTE, *[MEMORY] * 5)
    assert set(verdicts) == {Verdict.MEMORY_BOUND}


def test_a_lasting_change_is_followed_within_4_seconds() -> None:
    verdicts = over_time(Hysteresis(), *[MEMORY] * 5, *[COMPUTE] * 5)
    assert changes(verdicts) <= 2
    assert verdicts[8:] == [Verdict.COMPUTE_BOUND] * 2


def test_a_load_that_alternates_does_not_flap() -> None:
    verdicts = over_time(Hysteresis(), *[MEMORY, COMPUTE] * 30)
    assert changes(verdicts[6:]) == 0
    clocks = [replace(MEMORY, sm_clock_hertz=hertz, sm_clock_swing=0.4) for hertz in (1.2e9, 1.98e9)]
    assert set(over_time(Hysteresis(), *clocks * 20)) == {Verdict.MEMORY_BOUND}


def test_bursts_each_two_seconds_are_one_underutilized_device() -> None:
    burst, pause = loaded(0.3, 0.1, 0.27, active=0.3), device(125.0, 0.0)
    assert set(over_time(Hysteresis(), *[burst, pause] * 20)) == {Verdict.UNDERUTILIZED}


def judgements(*course: DeviceSignals, seconds: float = 1.0) -> list[Judgement]:
    hysteresis, length_ns = Hysteresis(), round(seconds * S)
    return [
        hysteresis.update(replace(one, start_ns=at * length_ns, end_ns=(at + 1) * length_ns))
        for at, one in enumerate(course)
    ]


PARKED = device(121.0, 0.0, held=True, active_ratio=0.0)


def test_a_change_is_not_confirmed_before_it_is_sure() -> None:
    found = judgements(*[PARKED] * 5, *[MEMORY] * 5)
    sure = [one.confirmed for one in found]
    # The first busy second could be the beginning of a change, and two busy ones in a row are the change.
    assert sure[:6] == [True] * 5 + [False]
    won = sure.index(True, 5)
    assert won <= 8
    assert {one.verdict for one in found[won:]} == {Verdict.MEMORY_BOUND}
    # Meanwhile no sentence says that nothing runs beside the watts of work.
    for one in found[5:won]:
        assert "nothing runs" not in one.sentence
        assert "the newest alone is memory_bound" in one.sentence
        assert one.evidence["watts"] == MEMORY.energy_joules


def test_the_seconds_before_a_change_are_not_confirmed_either() -> None:
    # 3 s of which the oldest are still busy make a roll that is: the newest second alone tells of the end.
    found = judgements(*[MEMORY] * 5, *[PARKED] * 6)
    assert not found[5].confirmed
    assert found[5].sentence.startswith("memory_bound by the seconds before; the newest alone is parked: ")
    assert found[5].evidence["watts"] == pytest.approx(121.0)
    # What the roll says in between (a third of the time active: underutilized) is never booked.
    assert {one.verdict for one in found[5:] if one.confirmed} == {Verdict.PARKED}


def test_an_odd_second_is_booked_with_its_neighbours() -> None:
    found = judgements(*[MEMORY] * 5, COMPUTE, *[MEMORY] * 5)
    assert [one.confirmed for one in found] == [True] * 5 + [False] + [True] * 5


def test_nothing_waits_longer_than_the_patience() -> None:
    burst, pause = loaded(0.3, 0.1, 0.27, active=0.3), device(125.0, 0.0, held=True)
    for course in ([burst, pause, pause] * 20, [MEMORY, COMPUTE] * 30):
        waited = longest = 0
        for one in judgements(*course):
            waited = 0 if one.confirmed else waited + 1
            longest = max(longest, waited)
        assert 0 < longest < 5


@pytest.mark.parametrize("seconds", [2.0, 5.0])
def test_longer_spans_do_not_wait_longer(seconds: float) -> None:
    """As in a replay at several times the speed: what holds is a time, not a number of spans."""
    found = judgements(*[PARKED] * 3, *[MEMORY] * 3, seconds=seconds)
    late = [one.verdict for one in found[3:]]
    assert late[1:] == [Verdict.MEMORY_BOUND] * 2
    if seconds == 5.0:
        assert late[0] is Verdict.MEMORY_BOUND
        assert all(one.confirmed for one in found)


def test_garbage_lowers_the_confidence_of_aligned_signals() -> None:
    clean = replace(MEMORY, garbage=0.0)
    assert judge(replace(clean, garbage=1.0)).confidence == pytest.approx(0.8 * judge(clean).confidence)
    # Garbage throughout is no more than three: what is left is judged for what it is.
    assert judge(replace(clean, garbage=12.0)).confidence == pytest.approx(0.8**3 * judge(clean).confidence)


def test_who_holds_a_device_is_not_claimed_where_nobody_can_tell() -> None:
    resting = device(121.0, 0.0, held=None, idle_watts={}, sm_clock_hertz=None)
    found = judge(resting)
    assert "whether a process holds the device is not known" in found.sentence
    assert "no process holds" not in found.sentence
    near = judge(replace(resting, idle_watts={"bare": 79.0, "parked": 121.0}))
    assert near.verdict is Verdict.PARKED
    assert near.sentence.endswith("is not known, the power is nearer to the parked level.")
    assert judge(replace(resting, held=False)).sentence == "idle: no process holds the device, 121 W drawn."


def test_the_parked_level_is_guessed_from_the_board_not_from_a_lower_limit() -> None:
    # A board of 700 W (parked at about 119 W) capped at 300 W: 121 W is no work, though it is 30 % of the way to 300 W
    # from a parked level of 0.17 * 300 W.
    resting = device(
        121.0, None, dram_ratio=None, busy_ratio={}, utilization_ratio={"gpu": 0.0}, idle_watts={},
        power_limit_watts=300.0, board_limit_watts=700.0,
    )  # fmt: skip
    assert judge(resting).verdict is Verdict.PARKED
    assert judge(replace(resting, board_limit_watts=None)).verdict is Verdict.BALANCED


def test_flags_are_those_of_the_second_itself() -> None:
    hysteresis = Hysteresis()
    capped = replace(MEMORY, event_reasons=0x4)
    found = [
        hysteresis.update(replace(one, start_ns=second * S, end_ns=(second + 1) * S)).flags
        for second, one in enumerate([MEMORY, capped, MEMORY])
    ]
    assert found == [(), (Flag.POWER_CAPPED,), ()]


def test_a_gap_begins_anew() -> None:
    hysteresis = Hysteresis()
    over_time(hysteresis, *[MEMORY] * 5)
    for second in (100, 101):
        late = hysteresis.update(replace(COMPUTE, start_ns=second * S, end_ns=(second + 1) * S))
    assert late.verdict is Verdict.COMPUTE_BOUND


def test_thresholds_can_be_given() -> None:
    strict = Thresholds(dominance=20.0)
    assert judge(loaded(0.7, 0.7, 0.05), strict).verdict is Verdict.BALANCED
