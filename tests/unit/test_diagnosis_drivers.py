import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from jouletrace.diagnosis.drivers import (
    MOST_FACTOR,
    TERMS,
    Coefficients,
    Driver,
    Model,
    Refinement,
    Term,
    bounded_least_squares,
    decompose,
    model_of,
)
from jouletrace.diagnosis.signals import DeviceSignals
from jouletrace.energy.baseline import IdleKind
from jouletrace.gpu.readings import DeviceInfo, Link, Pipe

S = 1_000_000_000
SIMPLE = Coefficients(
    watts={
        Term.MEMORY: 400.0,
        Term.TENSOR: 800.0,
        Term.SM: 100.0,
        Term.FLOAT: 300.0,
        Term.INTEGER: 200.0,
        Term.LINKS: 0.1,
    },
    clock_exponent=dict.fromkeys(Term, 2.0) | {Term.MEMORY: 0.0, Term.LINKS: 0.0},
    idle_watts={IdleKind.BARE: 80.0, IdleKind.PARKED: 120.0},
    power_limit_watts=700.0,
)


def busy(watts: float | None = 500.0, *, seconds: float = 1.0, **changed: object) -> DeviceSignals:
    signals = DeviceSignals(
        0,
        round(seconds * S),
        None if watts is None else watts * seconds,
        dram_ratio=0.5,
        busy_ratio={Pipe.SM: 0.6, Pipe.TENSOR: 0.2, Pipe.FP32: 0.05, Pipe.FP16: 0.05, Pipe.INTEGER: 0.1},
        bytes_per_second={Link.PCIE_RECEIVE: 30e9, Link.PCIE_TRANSMIT: 10e9},
        sm_clock_hertz=1e9,
        max_sm_clock_hertz=2e9,
        held=True,
    )
    return replace(signals, **changed)


def test_parts_are_coefficient_times_activity_times_clock() -> None:
    found = decompose(busy(500.0, seconds=2.0), SIMPLE)
    assert found.joules == {
        Driver.STATIC: pytest.approx(2 * 120),
        Driver.MEMORY: pytest.approx(2 * 400 * 0.5),
        # At half the clock and an exponent of 2 a quarter is left.
        Driver.TENSOR: pytest.approx(2 * 800 * 0.2 / 4),
        Driver.OTHER_COMPUTE: pytest.approx(2 * (100 * 0.6 + 300 * 0.1 + 200 * 0.1) / 4),
        Driver.LINKS: pytest.approx(2 * 0.1 * 40),
        Driver.UNEXPLAINED: pytest.approx(2 * (500 - 120 - 200 - 40 - 27.5 - 4)),
    }
    assert found.residual_joules == pytest.approx(found.joules[Driver.UNEXPLAINED])
    assert found.confidence == 1.0


def test_what_is_measured_wins_over_a_model_that_says_more() -> None:
    found = decompose(busy(250.0), SIMPLE)
    modelled = 200 + 40 + 27.5 + 4
    assert found.joules[Driver.STATIC] == pytest.approx(120)
    assert found.joules[Driver.MEMORY] == pytest.approx(130 * 200 / modelled)
    assert found.joules[Driver.UNEXPLAINED] == 0
    assert found.residual_joules == pytest.approx(130 - modelled)


given_ratios = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1)


@given(
    st.none() | st.floats(0, 1e5),
    st.none() | given_ratios,
    st.dictionaries(st.sampled_from(Pipe), given_ratios),
    st.none() | st.floats(allow_nan=True),
    st.none() | st.booleans(),
)
def test_joules_always_add_up_and_none_is_negative(
    joules: float | None, dram: float | None, pipes: dict[Pipe, float], clock: float | None, held: bool | None
) -> None:
    signals = busy(None, energy_joules=joules, dram_ratio=dram, busy_ratio=pipes, sm_clock_hertz=clock, held=held)
    found = decompose(signals, SIMPLE)
    assert 0 <= found.confidence <= 1
    if joules is None:
        assert (found.joules, found.residual_joules) == ({}, None)
        return
    assert set(found.joules) == set(Driver)
    assert min(found.joules.values()) >= 0
    assert math.fsum(found.joules.values()) == pytest.approx(joules, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(
    ("held", "works", "learnt", "static"),
    [
        (False, False, {}, 80),
        (True, False, {}, 120),
        (True, False, {"parked": 128.0}, 128),
        (False, False, {"bare": 70.0}, 70),
        # The look at the processes is older than the work.
        (False, True, {}, 120),
        (None, True, {}, 120),
        (None, False, {"bare": 70.0, "parked": 130.0}, 130),
    ],
)
def test_static_is_the_idle_level_of_the_device(
    held: bool | None, works: bool, learnt: dict[str, float], static: float
) -> None:
    signals = busy(300.0, held=held, idle_watts=learnt)
    if not works:
        signals = replace(signals, dram_ratio=0.0, busy_ratio={Pipe.SM: 0.0, Pipe.TENSOR: 0.0})
    assert decompose(signals, SIMPLE).joules[Driver.STATIC] == static


def test_without_gpm_there_is_static_and_the_rest_is_unexplained() -> None:
    found = decompose(DeviceSignals(0, S, 300.0, held=True), SIMPLE)
    assert found.joules[Driver.STATIC] == 120
    assert found.joules[Driver.UNEXPLAINED] == 180
    assert found.confidence < 0.5
    partly = decompose(busy(dram_ratio=None), SIMPLE)
    assert found.confidence < partly.confidence < 1


def test_a_lower_limit_makes_no_byte_cheaper() -> None:
    capped = DeviceInfo("GPU-1", 0, "NVIDIA H100", "580", power_limit_watts=400.0, default_power_limit_watts=700.0)
    assert capped.board_limit_watts == 700.0
    assert model_of(capped.name, capped.board_limit_watts) == model_of(capped.name, 700.0)
    # Where the driver does not tell, the enforced limit is all there is.
    assert dataclasses.replace(capped, default_power_limit_watts=None).board_limit_watts == 400.0


def test_a_span_with_garbage_teaches_nothing() -> None:
    model = model_of("NVIDIA H200", 700.0)
    clean, spoilt = Refinement(model), Refinement(model)
    for second in range(600):
        one = replace(busy(800.0), start_ns=second * S, end_ns=(second + 1) * S, idle_watts={})
        one = replace(one, dram_ratio=0.2 + 0.5 * (second % 2))
        clean.observe(replace(one, garbage=0.0))
        spoilt.observe(replace(one, garbage=1.0))
    clean.solve()
    spoilt.solve()
    assert any(factor != 1.0 for factor in clean.factors.values())
    assert set(spoilt.factors.values()) == {1.0}


def test_an_unknown_model_gets_scaled_coefficients_at_lower_confidence() -> None:
    own, other = model_of("NVIDIA H200", 700.0), model_of("NVIDIA L40S", 350.0)
    assert (own.confidence, own.generic) == (1.0, False)
    assert other.generic
    assert other.confidence < own.confidence
    for term in Term:
        assert other.coefficients.watts[term] == pytest.approx(own.coefficients.watts[term] / 2)
    assert other.coefficients.idle_watts[IdleKind.PARKED] == pytest.approx(61, abs=1)
    assert model_of("", math.nan).confidence < other.confidence


def test_bounded_least_squares_finds_what_trying_all_subsets_finds() -> None:
    random.seed(4)
    for _ in range(50):
        rows = np.array([[random.random() for _ in range(4)] for _ in range(9)])
        values = rows @ [random.uniform(-1, 2) for _ in range(4)]
        gram, moment = rows.T @ rows, rows.T @ values

        def error(x: np.ndarray, gram: np.ndarray = gram, moment: np.ndarray = moment) -> float:
            return float(x @ gram @ x - 2 * moment @ x)

        best = np.zeros(4)
        for count in range(1, 5):
            for chosen in map(list, itertools.combinations(range(4), count)):
                x = np.zeros(4)
                x[chosen] = np.linalg.lstsq(rows[:, chosen], values, rcond=None)[0]
                best = x if (x >= 0).all() and error(x) < error(best) else best
        assert bounded_least_squares(gram, moment, 0.0, math.inf) == pytest.approx(best, abs=1e-4)


LOADS = ((0.6, 0.6, 0.02, 0.0), (0.2, 0.9, 0.5, 0.0), (0.05, 0.9, 0.0, 0.7), (0.0, 0.9, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))
"""DRAM, SM, tensor, FP32: four terms that these five loads tell apart."""


def load(kind: int, factors: dict[Term, float], noise: float = 0.0) -> DeviceSignals:
    """One second of a load, on a device whose coefficients are the simple ones times `factors`."""
    dram, sm, tensor, fp32 = LOADS[kind % len(LOADS)]
    signals = busy(
        dram_ratio=dram, busy_ratio={Pipe.SM: sm, Pipe.TENSOR: tensor, Pipe.FP32: fp32}, bytes_per_second={},
        sm_clock_hertz=2e9,
    )  # fmt: skip
    amounts = {Term.MEMORY: dram, Term.SM: sm, Term.TENSOR: tensor, Term.FLOAT: fp32}
    watts = 120 + sum(SIMPLE.watts[term] * factors.get(term, 1.0) * amount for term, amount in amounts.items())
    return replace(signals, energy_joules=watts * (1 + noise))


def test_refinement_learns_a_device_that_differs() -> None:
    refinement = Refinement(Model(SIMPLE, 1.0))
    truth = {Term.MEMORY: 0.9, Term.TENSOR: 1.15, Term.FLOAT: 1.1}
    random.seed(1)
    for second in range(1200):
        refinement.observe(load(second // 60, truth, random.gauss(0, 0.01)))
    refinement.solve()
    for term in (Term.MEMORY, Term.TENSOR, Term.FLOAT):
        assert refinement.factors[term] == pytest.approx(truth[term], abs=0.03)
    # Nothing ran on links: that coefficient has not moved.
    assert refinement.factors[Term.LINKS] == 1.0
    before = decompose(load(1, truth), SIMPLE).residual_joules
    after = decompose(load(1, truth), refinement.coefficients).residual_joules
    assert before is not None
    assert after is not None
    assert abs(after) < abs(before) / 4


def test_refinement_does_not_move_without_variety_or_time() -> None:
    one_load, short = Refinement(Model(SIMPLE, 1.0)), Refinement(Model(SIMPLE, 1.0))
    for second in range(600):
        one_load.observe(load(0, {Term.MEMORY: 0.5}))
        if second < 60:
            short.observe(load(second, {Term.MEMORY: 0.5}))
    for refinement in (one_load, short):
        refinement.solve()
        assert set(refinement.factors.values()) == {1.0}
        assert refinement.coefficients == SIMPLE


def test_refinement_is_bounded_and_passes_over_what_it_cannot_use() -> None:
    far, blind = Refinement(Model(SIMPLE, 1.0)), Refinement(Model(SIMPLE, 1.0))
    for second in range(800):
        signals = load(second // 60, {Term.TENSOR: 5.0})
        far.observe(signals)
        blind.observe(replace(signals, sm_clock_swing=0.4))
        blind.observe(replace(signals, dram_ratio=math.nan))
        blind.observe(replace(signals, energy_joules=None))
    far.solve()
    blind.solve()
    assert far.factors[Term.TENSOR] == pytest.approx(MOST_FACTOR)
    assert all(1 / MOST_FACTOR <= factor <= MOST_FACTOR for factor in far.factors.values())
    assert set(blind.factors.values()) == {1.0}


def test_refinement_forgets() -> None:
    refinement = Refinement(Model(SIMPLE, 1.0))
    for hours, factor in ((2, 0.8), (6, 1.2)):
        for minute in range(hours * 60):
            signals = load(minute, {Term.TENSOR: factor})
            joules = (signals.energy_joules or 0.0) * 60
            refinement.observe(replace(signals, end_ns=60 * S, energy_joules=joules))
    refinement.solve()
    assert refinement.factors[Term.TENSOR] == pytest.approx(1.2, abs=0.03)


def test_every_term_has_a_shipped_coefficient() -> None:
    coefficients = model_of("NVIDIA H200", None).coefficients
    assert set(coefficients.watts) == set(TERMS) == set(coefficients.clock_exponent)
    assert all(watts > 0 for watts in coefficients.watts.values())
