import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.ledger_driver import tell
from tests.request_truth import README_GRID
from tests.step_simulator import Cost, S, Simulator

from jouletrace.diagnosis.reference import Sweep, shipped
from jouletrace.diagnosis.step_energy import FORGETTING_NS, OLDEST_NS, Known, StepEnergy, StepLaw
from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import PowerSamples
from jouletrace.requests.account import EngineTotals
from jouletrace.requests.devices import DeviceView
from jouletrace.requests.law import Law, LawBook, Provenance
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, StepRecord
from jouletrace.trace.events import Fidelity, engine_of, records
from jouletrace.trace.recording import read

CHUNKED = Path(__file__).parents[1] / "data/h200-c-chunked.json.gz"
A, B, C_P, C_KV = 3.0, 0.06, 0.02, 2.5e-5
SWEEPS = [sweep for sweep in shipped().sweeps if sweep.fixed_joules is not None]


def later(
    totals: EngineTotals,
    *,
    batch: float = 0.0,
    prefill: float = 0.0,
    context: float = 0.0,
    cost: tuple[float, float, float, float] = (A, B, C_P, 0.0),
    steps: int = 40,
    seconds: float = 1.0,
    noise: float = 1.0,
) -> EngineTotals:
    """The totals after `steps` steps of `batch` sequences and `prefill` prompt tokens each."""
    a, b, c_p, c_kv = cost
    joules = noise * steps * (a + b * batch + c_p * prefill + c_kv * batch * context)
    return replace(
        totals,
        settled_ns=totals.settled_ns + round(seconds * S),
        step_seconds=totals.step_seconds + seconds,
        step_joules=totals.step_joules + joules,
        steps=totals.steps + steps,
        step_decode_sequences=totals.step_decode_sequences + steps * batch,
        step_prefill_tokens=totals.step_prefill_tokens + steps * prefill,
        step_kv_tokens=totals.step_kv_tokens + steps * batch * context,
    )


def learn(energy: StepEnergy, loads: Iterable[dict[str, object]], base: Law | None = None) -> EngineTotals:
    totals = EngineTotals(settled_ns=S)
    energy.observe(totals, base)
    for load in loads:
        totals = later(totals, **load)  # type: ignore[arg-type]
        energy.observe(totals, base)
    # A fit is due within ten seconds of its samples.
    energy.observe(later(totals, seconds=11, **(load | {"steps": 440})), base)  # type: ignore[arg-type]
    return totals


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda one: f"{one.model_id.partition('/')[2]}-{one.task}-{one.num_gpus}")
def test_the_law_of_each_published_sweep_is_found_from_its_steps(sweep: Sweep) -> None:
    rng = random.Random(1)
    a, b = sweep.fixed_joules or 0.0, sweep.sequence_joules or 0.0
    energy = StepEnergy()
    # Load as it comes: the batch wanders over the measured range; a window's edges err by 2 %.
    low, high = sweep.points[0][0], sweep.points[-1][0]
    loads = []
    for second in range(120):
        batch = low * (high / low) ** (0.5 + 0.5 * math.sin(second / 11))
        loads.append({"batch": batch, "cost": (a, b, 0.0, 0.0), "noise": rng.gauss(1, 0.02)})
    learn(energy, loads)
    law = energy.law
    assert law.known is Known.FITTED
    assert law.fixed_joules == pytest.approx(a, rel=0.05)
    assert law.sequence_joules == pytest.approx(b, rel=0.05)
    assert law.half_fixed_batch() == pytest.approx(a / b, rel=0.05)
    assert law.residual == pytest.approx(0.016, rel=0.5)


def test_all_49_published_fits_are_tried() -> None:
    assert len(SWEEPS) == 49


def test_prefill_and_context_get_their_own_cost_when_they_vary() -> None:
    loads = [
        {"batch": batch, "prefill": prefill, "context": context, "cost": (A, B, C_P, C_KV)}
        for batch in (4, 16, 64)
        for prefill in (0, 64, 512)
        for context in (300, 2000, 9000)
    ]
    energy = StepEnergy()
    learn(energy, loads)
    law = energy.law
    assert (law.fixed_joules, law.sequence_joules) == pytest.approx((A, B), rel=1e-6)
    assert (law.prefill_token_joules, law.kv_token_joules) == pytest.approx((C_P, C_KV), rel=1e-6)
    assert law.half_fixed_batch(2000) == pytest.approx(A / (B + 2000 * C_KV), rel=1e-6)


def test_prefill_that_moves_with_the_batch_is_priced_by_the_given_laws_ratio() -> None:
    loads = [{"batch": batch, "prefill": 3.0 * batch} for batch in (2, 4, 8, 16, 32, 64)]
    alone, helped = StepEnergy(), StepEnergy()
    learn(alone, loads)
    # Another model's law, four times as expensive, in the same proportions.
    base = Law(
        fixed_joules=4 * A, prefill_token_joules=4 * C_P, decode_sequence_joules=4 * B, provenance=Provenance.PRIOR
    )
    learn(helped, loads, base)
    assert alone.law.prefill_token_joules == 0
    assert alone.law.sequence_joules == pytest.approx(B + 3 * C_P)
    assert helped.law.sequence_joules == pytest.approx(B)
    assert helped.law.prefill_token_joules == pytest.approx(C_P)
    assert alone.law.fixed_joules == pytest.approx(A) == helped.law.fixed_joules


def settled(line: Timeline, engine: EngineRecord, told: list[tuple[int, StepRecord]]) -> StepLaw:
    """The law after steps that a ledger has settled second by second."""
    ledger = Ledger(Limits(steps=1_000_000), LawBook(), start_ns=line.start_ns)
    ledger.add_engine(engine, line.start_ns)
    devices, energy, at = {"g": DeviceView(line, held=True)}, StepEnergy(), 0
    for now_ns in range(line.start_ns + S, line.end_ns, S):
        while at < len(told) and told[at][0] <= now_ns:
            tell(ledger, told[at][1], now_ns)
            at += 1
        ledger.settle(devices, now_ns)
        energy.observe(ledger.snapshot().engine_totals[engine.engine_id])
    return energy.law


def test_steps_that_the_ledger_settled_give_the_engines_law() -> None:
    run = Simulator(Cost(A, C_P, B), rate=8, seconds=90, prompts=(64, 512, 2048), outputs=(8, 64, 256)).run()
    engine = EngineRecord(engine_id="e", kind="vllm", models=("m",), gpu_uuids=("g",))
    law = settled(run.timeline(), engine, [(step.end_ns, step) for step in run.steps])
    assert law.known is Known.FITTED
    assert law.fixed_joules == pytest.approx(A, rel=0.05)
    assert law.sequence_joules == pytest.approx(B, rel=0.05)
    assert law.prefill_token_joules == pytest.approx(C_P, rel=0.05)


def test_a_real_h200_serving_gives_the_law_of_its_steady_phases() -> None:
    recording = read(CHUNKED)
    ring = recording.streams["power_ring_20ms"]
    meter = Meter(EnergySource.POWER_RING, limit_watts=700.0, architecture="", has_counter=False)
    meter.add_ring(PowerSamples(ring.t_ns, ring.values["mw"]))
    meter.flush()
    engine = engine_of(recording)
    assert engine is not None
    assert meter.timeline is not None
    # Its batches are padded to powers of two and the law of its steady phases is per padded sequence: so is this one.
    padded = {(e["start_ns"], e["t_ns"]): e["bucket"] for e in recording.events if e["kind"] == "iteration"}
    told = [
        (
            at,
            StepRecord(
                engine_id=step.engine_id,
                start_ns=step.start_ns,
                end_ns=step.end_ns,
                steps=step.steps,
                prefill_tokens=sum(part.tokens for part in step.prefill or ()),
                decode_requests=padded[step.start_ns, step.end_ns] if step.decode else 0,
            ),
        )
        for at, step in records(recording, Fidelity.STEPS)
        if isinstance(step, StepRecord)
    ]
    law = settled(meter.timeline, engine, told)
    assert law.known is Known.FITTED
    a, c_p, c_d = README_GRID
    assert law.fixed_joules == pytest.approx(a, rel=0.05)
    assert law.prefill_token_joules == pytest.approx(c_p, rel=0.1)
    assert law.sequence_joules == pytest.approx(c_d, rel=0.1)
    assert law.residual is not None
    assert law.residual < 0.03


def test_windows_that_something_else_spoilt_do_not_move_the_law() -> None:
    rng = random.Random(3)
    loads = [
        {"batch": rng.choice((2, 6, 12, 30, 70)), "noise": 2.5 if rng.random() < 0.15 else rng.gauss(1, 0.02)}
        for _ in range(200)
    ]
    energy = StepEnergy()
    learn(energy, loads)
    assert energy.law.fixed_joules == pytest.approx(A, rel=0.05)
    assert energy.law.sequence_joules == pytest.approx(B, rel=0.1)


def test_one_odd_window_does_not_vouch_for_a_range() -> None:
    energy = StepEnergy()
    learn(energy, [{"batch": 200, "noise": 0.5}, *({"batch": 8 + second % 3} for second in range(60))])
    assert energy.law.known is Known.UNKNOWN
    assert "the batch ran from 8 to 10 only" in energy.law.refusal


GIVEN = Law(fixed_joules=A, prefill_token_joules=C_P, decode_sequence_joules=B, provenance=Provenance.CALIBRATED)


def test_a_steady_load_is_refused_and_the_given_law_is_checked_on_it() -> None:
    steady = [{"batch": 20 + second % 4, "noise": 1.04} for second in range(60)]
    energy = StepEnergy()
    learn(energy, steady, GIVEN)
    law = energy.law
    assert law.known is Known.CALIBRATED
    assert (law.fixed_joules, law.sequence_joules) == (A, B)
    assert "the batch ran from 21 to 23 only" in law.refusal
    assert law.residual == pytest.approx(1 - 1 / 1.04, rel=0.01)
    assert law.joules_per_token(22) == pytest.approx(A / 22 + B)
    assert law.joules_per_token(64) is None


def test_a_given_law_that_the_steps_contradict_vouches_for_no_range() -> None:
    energy = StepEnergy()
    learn(energy, [{"batch": 20 + second % 4, "noise": 2.0} for second in range(60)], GIVEN)
    assert energy.law.residual == pytest.approx(0.5, rel=0.01)
    assert energy.law.joules_per_token(22) is None


def test_energy_that_follows_no_law_is_refused() -> None:
    rng = random.Random(5)
    energy = StepEnergy()
    learn(energy, [{"batch": rng.choice((2, 8, 32, 128)), "noise": rng.uniform(0.2, 5)} for _ in range(100)])
    assert energy.law.known is Known.UNKNOWN
    assert energy.law.refusal


def test_what_was_learnt_stays_while_a_steady_load_agrees_and_goes_when_it_does_not() -> None:
    energy = StepEnergy()
    totals = learn(energy, [{"batch": batch} for batch in (4, 8, 16, 32, 64) * 4])
    minutes = round(2 * OLDEST_NS / (60 * S))
    for _ in range(minutes * 6):
        totals = later(totals, batch=16, seconds=10, steps=400)
        energy.observe(totals)
    assert energy.law.known is Known.FITTED
    assert energy.law.fixed_joules == pytest.approx(A)
    for _ in range(minutes * 6):
        totals = later(totals, batch=16, seconds=10, steps=400, noise=1.5)
        energy.observe(totals)
    assert energy.law.known is Known.UNKNOWN


def test_a_changed_engine_is_learnt_anew() -> None:
    energy = StepEnergy()
    batches = (4, 8, 16, 32, 64)
    totals = learn(energy, [{"batch": batch} for batch in batches * 10])
    changed = (2 * A, 0.5 * B, 0.0, 0.0)
    for second in range(round(FORGETTING_NS / S / 5)):
        totals = later(totals, batch=batches[second % 5], seconds=5, steps=200, cost=changed)
        energy.observe(totals)
    assert energy.law.fixed_joules == pytest.approx(2 * A, rel=0.02)
    assert energy.law.sequence_joules == pytest.approx(0.5 * B, rel=0.02)


def test_old_loads_count_less_than_new_ones() -> None:
    energy = StepEnergy()
    totals = learn(energy, [{"batch": batch} for batch in (4, 16, 64) * 6])
    # Other batches, in cells of their own, with longer contexts: 30 % more.
    for second in range(0, round(2 * FORGETTING_NS / S), 5):
        totals = later(totals, batch=(8, 32, 128)[second // 5 % 3], seconds=5, steps=200, noise=1.3)
        energy.observe(totals)
    assert energy.law.fixed_joules == pytest.approx(1.3 * A, rel=0.1)
    assert energy.law.sequence_joules == pytest.approx(1.3 * B, rel=0.1)


def test_a_feed_that_stops_is_forgotten_in_the_end() -> None:
    energy = StepEnergy()
    totals = learn(energy, [{"batch": batch} for batch in (4, 8, 16, 32, 64) * 4])
    for minute in range(1, 25):
        energy.observe(replace(totals, settled_ns=totals.settled_ns + minute * 60 * S))
    assert energy.law.known is Known.FITTED
    for minute in range(25, 45):
        energy.observe(replace(totals, settled_ns=totals.settled_ns + minute * 60 * S))
    assert energy.law.known is Known.UNKNOWN


@pytest.mark.parametrize(
    "broken",
    [
        {"step_joules": math.nan},
        {"step_decode_sequences": math.inf},
        {"steps": -5.0},
        {"step_joules": 0.0},
        {"settled_ns": 0},
    ],
)
def test_totals_that_make_no_sense_are_passed_over(broken: dict[str, float]) -> None:
    energy = StepEnergy()
    totals = EngineTotals(settled_ns=S)
    for round_ in range(40):
        totals = later(totals, batch=(4, 8, 16, 32, 64)[round_ % 5])
        energy.observe(totals)
        if round_ % 7 == 3:
            energy.observe(replace(totals, **broken))  # type: ignore[arg-type]
    assert energy.law.known is Known.FITTED
    assert energy.law.fixed_joules == pytest.approx(A, rel=1e-3)
    assert energy.law.sequence_joules == pytest.approx(B, rel=1e-3)


def test_steps_with_a_batch_of_0_give_no_law() -> None:
    energy = StepEnergy()
    learn(energy, [{"batch": 0.0} for _ in range(30)], GIVEN)
    assert energy.law == StepLaw(
        known=Known.CALIBRATED,
        fixed_joules=A,
        sequence_joules=B,
        prefill_token_joules=C_P,
        refusal="no steps have been reported",
    )


def test_short_windows_are_gathered_until_they_hold_a_second_of_steps() -> None:
    energy = StepEnergy()
    totals = EngineTotals(settled_ns=S)
    energy.observe(totals)
    for part in range(400):
        batch = (4, 8, 16, 32, 64)[part // 8 % 5]
        # Each part alone would err by 20 %, the sum of two does not err.
        totals = later(totals, batch=batch, seconds=0.5, steps=10, noise=1.2 if part % 2 else 0.8)
        energy.observe(totals)
    assert energy.law.fixed_joules == pytest.approx(A)
