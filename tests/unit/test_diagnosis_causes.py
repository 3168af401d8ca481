import math
from dataclasses import replace

import pytest

from jouletrace.diagnosis.causes import (
    BatchLimit,
    Cause,
    DeviceCondition,
    EngineDiagnosis,
    EngineWindow,
    diagnose_engine,
)
from jouletrace.diagnosis.reference import Sweep, shipped
from jouletrace.diagnosis.step_energy import Known, StepLaw
from jouletrace.requests.account import EngineState, EngineTotals
from jouletrace.requests.records import Unit
from jouletrace.requests.roofline import ModelDescription

S = 1_000_000_000
A, B, C_P, C_KV = 3.0, 0.06, 0.02, 2.5e-5
LAW = StepLaw(Known.FITTED, A, B, C_P, C_KV, batch_low=1, batch_high=512, residual=0.0, samples=50)
BARE, PARKED = 79.0, 121.0
"""Watts of an H200 that nobody holds, and of one that is held and does nothing."""
BUSY = DeviceCondition(
    "g", underutilized=False, power_ratio=0.9, throttled_ratio=0.0, bare_watts=BARE, parked_watts=PARKED
)
SWEEPS = [sweep for sweep in shipped().sweeps if sweep.fixed_joules is not None]


def work(
    batch: float,
    *,
    prefill: float = 0.0,
    context: float = 0.0,
    steps: float = 2000.0,
    idle: float = 0.0,
    law: StepLaw = LAW,
    active: float = 60.0,
) -> EngineTotals:
    """What an engine does in a minute of steps of `batch` sequences and `prefill` prompt tokens, by the law."""
    joules = steps * (
        law.fixed_joules
        + law.sequence_joules * batch
        + law.prefill_token_joules * prefill
        + law.kv_token_joules * batch * context
    )
    return EngineTotals(
        settled_ns=60 * S,
        busy_joules=joules,
        idle_joules=idle,
        active_seconds=active,
        sequence_seconds=active * batch,
        step_joules=joules,
        step_seconds=active,
        steps=steps,
        step_prefill_tokens=steps * prefill,
        step_decode_sequences=steps * batch,
        step_kv_tokens=steps * batch * context,
    )


def diagnose(
    done: EngineTotals | None,
    law: StepLaw = LAW,
    *,
    devices: tuple[DeviceCondition, ...] = (BUSY,),
    preemptions: float | None = 0.0,
    model: ModelDescription | None = None,
    **state: float | None,
) -> EngineDiagnosis:
    queue = {"running": None, "waiting": 0.0, "kv_usage": 0.3} | state
    window = EngineWindow("e", done, 60.0, EngineState(60 * S, **queue), preemptions, devices, model)  # type: ignore[arg-type]
    found = diagnose_engine(window, law)
    if found.joules_per_unit is not None and found.units_per_joule is not None:
        assert sum(found.decomposition.values()) == pytest.approx(found.joules_per_unit)
        assert found.joules_per_unit * found.units_per_joule == pytest.approx(1)
    assert 0 <= found.confidence <= 1
    assert found.advice.endswith(".")
    assert found.saved_watts >= 0
    return found


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda one: f"{one.model_id.partition('/')[2]}-{one.task}-{one.num_gpus}")
def test_small_batch_is_called_exactly_below_the_half_fixed_batch_of_each_published_sweep(sweep: Sweep) -> None:
    a, b = sweep.fixed_joules or 0.0, sweep.sequence_joules or 0.0
    law = StepLaw(Known.FITTED, a, b, batch_low=1, batch_high=4096, residual=sweep.mean_error)
    for part in (0.05, 0.5, 0.9, 0.99, 1.01, 1.1, 2, 20):
        batch = part * a / b
        found = diagnose(work(batch, law=law), law)
        assert found.cause is (Cause.SMALL_BATCH if part < 1 else Cause.HEALTHY)
        assert found.half_fixed_batch == pytest.approx(a / b)
        assert found.joules_per_unit == pytest.approx(a / batch + b)
        assert found.decomposition["fixed"] == pytest.approx(a / batch)


def test_joules_per_token_fall_apart_into_the_laws_parts() -> None:
    done = work(40, prefill=30, context=500, idle=3600)
    done = replace(done, busy_joules=done.busy_joules + 1000)
    found = diagnose(done)
    assert found.decomposition == pytest.approx(
        {
            "idle": 3600 / 80_000,
            "fixed": A / 40,
            "kv": C_KV * 500,
            "decode": B,
            "prefill": C_P * 30 / 40,
            "between_steps": 1000 / 80_000,
        }
    )


def test_measured_joules_are_divided_in_the_laws_proportions() -> None:
    done = work(40)
    more = replace(done, busy_joules=1.1 * done.busy_joules, step_joules=1.1 * done.step_joules)
    assert diagnose(more).decomposition["fixed"] == pytest.approx(1.1 * A / 40)


def test_a_small_batch_without_a_queue_is_demands_and_two_replicas_could_be_one() -> None:
    found = diagnose(work(10), running=10, max_num_seqs=256)
    assert (found.cause, found.batch_limit) == (Cause.SMALL_BATCH, BatchLimit.DEMAND)
    assert "consolidate" in found.advice
    assert "raise" not in found.advice
    assert found.reachable_batch == 20
    # Two replicas spend the fixed part twice, 100 W each; one of them and a GPU that nobody holds: 100 W and 79 W.
    assert found.saved_watts == pytest.approx((2000 * A / 60 - BARE) / 2)
    assert found.reachable_joules_per_unit == pytest.approx(A / 20 + B + BARE / 2 / (20_000 / 60))


def test_consolidating_frees_no_more_than_what_a_gpu_draws_without_its_process() -> None:
    alone = replace(BUSY, bare_watts=None)
    # The parked level is at least the bare one: 100 W of fixed energy are less than it, so nothing is promised.
    for devices in ((alone,), (BUSY, alone), (replace(alone, parked_watts=None),), ()):
        found = diagnose(work(10), devices=devices, running=10)
        assert (found.cause, found.reachable_joules_per_unit, found.saved_watts) == (Cause.SMALL_BATCH, None, 0)
    heavy = diagnose(work(10, steps=4000), devices=(alone,), running=10)
    assert heavy.saved_watts == pytest.approx((4000 * A / 60 - PARKED) / 2)


def test_a_small_batch_at_its_limit_names_the_limit_and_what_the_queue_would_fill() -> None:
    found = diagnose(work(8), running=8, waiting=12, max_num_seqs=8, kv_usage=0.1)
    assert (found.cause, found.batch_limit) == (Cause.SMALL_BATCH, BatchLimit.MAX_NUM_SEQS)
    assert "max_num_seqs" in found.advice
    assert found.reachable_batch == pytest.approx(20)
    assert found.reachable_joules_per_unit == pytest.approx(A / 20 + B)
    # Twelve more would not fit into the cache: 8 take 60 % of it.
    assert diagnose(work(8), running=8, waiting=12, max_num_seqs=8, kv_usage=0.6).reachable_batch == pytest.approx(
        8 * 0.85 / 0.6
    )


@pytest.mark.parametrize(
    ("state", "limit"),
    [
        ({"running": 7, "waiting": 5, "max_num_seqs": 256}, BatchLimit.OTHER),
        ({"running": 7, "waiting": 5}, BatchLimit.UNKNOWN),
        ({"running": 7, "waiting": None}, BatchLimit.UNKNOWN),
    ],
)
def test_a_small_batch_whose_limit_is_not_seen_gets_no_figure(
    state: dict[str, float | None], limit: BatchLimit
) -> None:
    found = diagnose(work(7), **state)
    assert (found.cause, found.batch_limit) == (Cause.SMALL_BATCH, limit)
    assert found.reachable_joules_per_unit is None
    assert found.saved_watts == 0


def test_no_figure_is_given_outside_the_batches_of_the_fit() -> None:
    known = replace(LAW, batch_low=4, batch_high=12)
    assert diagnose(work(10, steps=4000), known).reachable_batch == 12
    assert diagnose(work(12), known).reachable_joules_per_unit is None
    assert diagnose(work(2), known).reachable_joules_per_unit is None
    assert diagnose(work(10), replace(LAW, batch_low=None, batch_high=None)).reachable_joules_per_unit is None


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({"kv_usage": 0.86, "running": 100, "waiting": 9, "max_num_seqs": 256}, Cause.KV_CAPACITY),
        ({"kv_usage": 0.84, "running": 100, "waiting": 9, "max_num_seqs": 256}, Cause.SMALL_BATCH),
        ({"kv_usage": 0.86, "running": 204, "waiting": 9, "max_num_seqs": 256}, Cause.KV_CAPACITY),
        ({"kv_usage": 0.86, "running": 205, "waiting": 9, "max_num_seqs": 256}, Cause.SMALL_BATCH),
        # Nobody waits: nothing is limited.
        ({"kv_usage": 0.95, "running": 100, "waiting": 0, "max_num_seqs": 256}, Cause.SMALL_BATCH),
        ({"kv_usage": 0.95, "running": 100, "waiting": 9}, Cause.KV_CAPACITY),
        ({"preemptions": 3, "kv_usage": 0.5}, Cause.KV_CAPACITY),
    ],
)
def test_kv_capacity_by_the_authors_thresholds(state: dict[str, float], cause: Cause) -> None:
    assert diagnose(work(40), **state).cause is cause


def test_a_full_cache_is_no_fault_where_the_batch_is_large_enough() -> None:
    full = {"kv_usage": 0.9, "running": 60.0, "waiting": 1.0}
    assert diagnose(work(60), **full).cause is Cause.HEALTHY
    assert diagnose(work(60), **full, preemptions=1).cause is Cause.KV_CAPACITY
    # A prior may be off by half: 60 are not surely beyond its 50.
    prior = replace(LAW, known=Known.PRIOR, batch_low=None, batch_high=None, residual=None)
    assert diagnose(work(60), prior, **full).cause is Cause.KV_CAPACITY


def test_a_gain_that_nobody_could_measure_is_not_promised() -> None:
    # One more of 40: 2.4 % of the 55 % that are fixed.
    state = {"kv_usage": 0.9, "running": 40.0, "max_num_seqs": 256.0}
    found = diagnose(work(40), **state, waiting=1)
    assert (found.cause, found.reachable_joules_per_unit, found.saved_watts) == (Cause.KV_CAPACITY, None, 0)
    assert "instead of" not in found.advice
    assert diagnose(work(40), **state, waiting=10).reachable_batch == 50


def test_a_full_cache_could_hold_twice_the_sequences_in_half_the_bytes() -> None:
    found = diagnose(work(40), kv_usage=0.95, running=40, waiting=100, max_num_seqs=256)
    assert found.reachable_batch == 80
    assert found.reachable_joules_per_unit == pytest.approx(A / 80 + B)


def test_long_context_by_joules_and_by_bytes() -> None:
    by_joules = diagnose(work(64, context=4000))
    assert by_joules.cause is Cause.LONG_CONTEXT
    assert by_joules.reachable_joules_per_unit == pytest.approx(A / 64 + B + C_KV * 4000 / 2)
    # Without a cost of its own: 64 contexts of 4,000 tokens at 128 KiB are 34 GB, the weights 16 GB.
    llama = ModelDescription(parameters=8e9, layers=32, kv_heads=8, head_dim=128)
    folded = replace(LAW, kv_token_joules=0.0)
    assert diagnose(work(64, context=4000), folded, model=llama).cause is Cause.LONG_CONTEXT
    assert diagnose(work(64, context=4000), folded, model=llama).reachable_joules_per_unit is None
    assert diagnose(work(64, context=1000), folded, model=llama).cause is Cause.HEALTHY


def test_prefill_heavy_is_half_of_the_busy_energy() -> None:
    # 100 sequences and a step cost 9 J, so do 450 prompt tokens.
    assert diagnose(work(100, prefill=460)).cause is Cause.PREFILL_HEAVY
    assert diagnose(work(100, prefill=440)).cause is Cause.HEALTHY


def test_of_prompts_and_a_small_batch_the_dearer_one_is_named() -> None:
    # 20 sequences: 3 J fixed, 1.2 J of their own; prompts of 3.2 J are 43 %, those of 2.8 J 40 %.
    dearer, cheaper = diagnose(work(20, prefill=160)), diagnose(work(20, prefill=140), waiting=None)
    assert dearer.cause is Cause.PREFILL_HEAVY
    assert "43 % of its busy energy, more than the 41 %" in dearer.advice
    assert cheaper.cause is Cause.SMALL_BATCH
    assert cheaper.advice.startswith("43 % of its busy energy is what steps cost however many take part, here 20 ")


def test_device_causes_come_first() -> None:
    hot = replace(BUSY, throttled_ratio=0.2)
    assert diagnose(work(4), devices=(BUSY, hot)).cause is Cause.THROTTLED
    assert diagnose(work(4), devices=(BUSY, replace(BUSY, throttled_ratio=0.04))).cause is Cause.SMALL_BATCH
    waiting = DeviceCondition("g", underutilized=True, power_ratio=0.27)
    assert diagnose(work(4), devices=(waiting,)).cause is Cause.HOST_BOUND
    # The same GPU with requests for a quarter of the time: there was not more to do.
    assert diagnose(work(4, active=15.0), devices=(waiting,)).cause is Cause.SMALL_BATCH
    assert diagnose(work(4), devices=(replace(waiting, power_ratio=0.6),)).cause is Cause.SMALL_BATCH
    assert diagnose(work(4), devices=(waiting, replace(waiting, underutilized=False))).cause is Cause.SMALL_BATCH


def test_no_demand() -> None:
    quiet = EngineTotals(settled_ns=60 * S, idle_joules=PARKED * 60)
    found = diagnose(quiet, running=0)
    assert found.cause is Cause.NO_DEMAND
    assert "which frees 42 W (79 W stay while the GPU is powered)" in found.advice
    assert found.saved_watts == pytest.approx(PARKED - BARE)
    assert found.joules_per_unit is None
    # Work for three seconds of the minute: idle energy is most of it, and the bare part of it would stay.
    some = diagnose(work(80, steps=100, active=3.0, idle=57 * PARKED), running=0)
    assert some.cause is Cause.NO_DEMAND
    assert some.saved_watts == pytest.approx((57 * PARKED - 60 * BARE) / 60)
    assert some.reachable_joules_per_unit == pytest.approx(A / 80 + B + 60 * BARE / 8000)


def test_a_gpu_that_works_for_somebody_else_most_of_the_time_is_not_idle() -> None:
    some = work(80, steps=100, active=3.0, idle=1500)
    beside = replace(some, busy_joules=some.busy_joules + 30_000, unclaimed_joules=30_000.0)
    assert (diagnose(some).cause, diagnose(beside).cause) == (Cause.NO_DEMAND, Cause.HEALTHY)


def test_what_a_gpu_draws_anyway_is_not_freed() -> None:
    quiet = EngineTotals(settled_ns=60 * S, idle_joules=PARKED * 60)
    unseen = diagnose(quiet, devices=(replace(BUSY, bare_watts=None),), running=0)
    assert (unseen.cause, unseen.saved_watts) == (Cause.NO_DEMAND, 0)
    assert "not known" in unseen.advice
    # Two engines share a GPU: one that goes frees nothing of it.
    half = replace(quiet, idle_joules=PARKED / 2 * 60)
    shared = diagnose(half, devices=(replace(BUSY, engines=2),), running=0)
    assert (shared.cause, shared.saved_watts) == (Cause.NO_DEMAND, 0)
    assert "frees" not in shared.advice
    assert diagnose(work(10, steps=4000), devices=(replace(BUSY, engines=2),), running=10).saved_watts == 0
    # It held the GPU for half of the window only: that half is freed.
    assert diagnose(half, running=0).saved_watts == pytest.approx((PARKED - BARE) / 2)


def test_a_gpu_that_works_for_nobody_known_is_not_to_be_scaled_down() -> None:
    done = EngineTotals(settled_ns=60 * S, busy_joules=36_000, unclaimed_joules=36_000, idle_joules=600)
    found = diagnose(done)
    assert (found.cause, found.saved_watts) == (Cause.UNKNOWN, 0)
    assert found.advice == (
        "Its GPUs used 600 W for work that no request or step tells of: check the engine's feed, and whether another "
        "process runs there."
    )


def test_work_that_is_not_the_engines_is_in_no_token() -> None:
    done = work(10, idle=600)
    beside = replace(done, busy_joules=done.busy_joules + 90_000, unclaimed_joules=90_000.0)
    found = diagnose(beside)
    assert found.decomposition == pytest.approx(diagnose(done).decomposition)
    assert found.decomposition["between_steps"] == pytest.approx(0, abs=1e-9)
    assert found.evidence["unreported_watts"] == pytest.approx(1500)
    assert found.evidence["watts"] == pytest.approx(diagnose(done).evidence["watts"])
    assert "unreported_watts" not in diagnose(done).evidence


@pytest.mark.parametrize(
    ("unit", "name"), [(Unit.IMAGE, "image"), (Unit.FRAME, "frame"), (Unit.EMBEDDING, "embedding")]
)
def test_other_products_have_joules_each(unit: Unit, name: str) -> None:
    done = EngineTotals(
        settled_ns=60 * S,
        busy_joules=30_000,
        idle_joules=3_000,
        active_seconds=50,
        sequence_seconds=50,
        made_joules=30_000,
        units={unit: 66.0},
    )
    found = diagnose(done, StepLaw())
    assert (found.unit, found.joules_per_unit) == (name, pytest.approx(500))
    assert found.units_per_joule == pytest.approx(1 / 500)
    assert found.decomposition == pytest.approx({"idle": 3_000 / 66, "busy": 30_000 / 66})
    assert found.cause is Cause.UNKNOWN
    assert diagnose(done, StepLaw(), devices=(DeviceCondition("g", True, 0.3),)).cause is Cause.HOST_BOUND


def test_an_engine_that_only_prefills_is_priced_by_prompt_token() -> None:
    found = diagnose(work(0, prefill=2048))
    assert (found.unit, found.cause) == ("input_token", Cause.HEALTHY)
    assert found.joules_per_unit == pytest.approx(A / 2048 + C_P)
    # Its tokens are what it is asked for: fewer of them are no saving.
    assert "shorten" not in found.advice
    few = diagnose(work(0, prefill=100))
    assert (few.cause, few.batch_limit) == (Cause.SMALL_BATCH, BatchLimit.DEMAND)
    assert few.advice.startswith("It only prefills, and 60 % of its busy energy is what each step costs")
    assert diagnose(work(0, prefill=2048), StepLaw(refusal="too few")).cause is Cause.UNKNOWN


def boundaries(batch: float) -> EngineTotals:
    done = work(batch)
    return EngineTotals(
        settled_ns=60 * S,
        busy_joules=done.busy_joules,
        active_seconds=60.0,
        sequence_seconds=60.0 * batch,
        prefill_joules=0.25 * done.busy_joules,
        decode_joules=0.75 * done.busy_joules,
        fixed_joules=0.5 * done.busy_joules,
        ended_requests=60.0,
        made_joules=done.busy_joules,
        output_tokens=done.step_decode_sequences,
    )


def test_requests_without_steps_are_judged_with_less_confidence() -> None:
    by_requests, by_steps = diagnose(boundaries(10)), diagnose(work(10))
    assert by_requests.cause is by_steps.cause is Cause.SMALL_BATCH
    assert by_requests.joules_per_unit == pytest.approx(by_steps.joules_per_unit)
    assert by_requests.confidence < by_steps.confidence
    whole = by_requests.joules_per_unit or 0.0
    assert by_requests.decomposition["fixed"] == pytest.approx(0.5 * whole)
    assert by_requests.decomposition["prefill"] == pytest.approx(0.125 * whole)
    assert by_requests.decomposition["decode"] == pytest.approx(0.375 * whole)


def test_requests_that_ended_are_priced_by_their_own_energy_whenever_they_used_it() -> None:
    # Eight requests of two minutes end in this one: half of their energy was used before it.
    done = replace(boundaries(8), made_joules=2 * boundaries(8).busy_joules)
    assert diagnose(done).joules_per_unit == pytest.approx(2 * (A / 8 + B))
    assert diagnose(done).evidence["watts"] == pytest.approx(done.busy_joules / 60)
    none = replace(done, ended_requests=0.0, made_joules=0.0, output_tokens=0.0)
    assert diagnose(none).advice.startswith("No request ended in the last 60 s: ")
    assert "usage" in diagnose(replace(none, ended_requests=3.0)).advice


def test_a_prior_law_tells_only_what_lies_beyond_its_error() -> None:
    prior = replace(LAW, known=Known.PRIOR, batch_low=None, batch_high=None, residual=None)
    causes = [diagnose(work(batch), prior).cause for batch in (20, 30, 90, 110)]
    assert causes == [Cause.SMALL_BATCH, Cause.UNKNOWN, Cause.UNKNOWN, Cause.HEALTHY]
    assert diagnose(work(20), prior).confidence < 0.5


def test_more_doubt_less_confidence() -> None:
    sure = diagnose(work(10)).confidence
    assert diagnose(work(10), replace(LAW, residual=0.1)).confidence < sure
    assert (
        diagnose(work(49), replace(LAW, residual=0.1)).confidence
        < diagnose(work(10), replace(LAW, residual=0.1)).confidence
    )
    assert diagnose(work(10), devices=()).confidence < sure
    assert diagnose(work(10), waiting=None).confidence < sure
    # Nobody runs, says the queue, while ten requests were active all the time.
    assert diagnose(work(10), running=0).confidence <= sure / 2
    # A feed that stopped half-way: tokens come from requests that ended.
    partial = replace(work(10), step_seconds=30.0, output_tokens=20_000.0, made_joules=work(10).busy_joules)
    assert diagnose(partial).confidence < sure
    assert diagnose(partial).joules_per_unit == pytest.approx(A / 10 + B)


@pytest.mark.parametrize(
    "done",
    [
        None,
        EngineTotals(settled_ns=60 * S, active_seconds=60, sequence_seconds=600, busy_joules=3e4),
        # A batch of 0 while tokens flow.
        replace(work(0), output_tokens=5000.0),
        replace(work(10), busy_joules=0.0, step_joules=0.0),
        replace(work(10), step_decode_sequences=0.0, output_tokens=0.0),
        # Joules of tokens and of images cannot be told apart.
        replace(work(10), units={Unit.IMAGE: 3.0}),
        EngineTotals(settled_ns=60 * S, units={Unit.IMAGE: 3.0, Unit.FRAME: 90.0}, busy_joules=9.0, active_seconds=3.0),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_unknown(done: EngineTotals | None) -> None:
    found = diagnose(done)
    assert found.cause is Cause.UNKNOWN
    assert found.confidence == 0
    assert found.reachable_joules_per_unit is None


def test_without_a_law_the_batch_is_not_judged_but_a_full_cache_is() -> None:
    nothing = StepLaw(refusal="the batch ran from 8 to 9 only")
    found = diagnose(work(10), nothing)
    assert found.cause is Cause.UNKNOWN
    assert "the batch ran from 8 to 9 only" in found.advice
    # It sends steps: more of the same would not help.
    assert "send step records" not in found.advice
    assert "wait for more varied load" in found.advice
    assert "send step records" in diagnose(boundaries(10), nothing).advice
    assert found.joules_per_unit == pytest.approx(A / 10 + B)
    assert diagnose(work(10), nothing, kv_usage=0.9, running=10, waiting=5, max_num_seqs=64).cause is Cause.KV_CAPACITY


def test_requests_that_only_the_queue_knows_of_are_a_gap_in_the_feed() -> None:
    found = diagnose(EngineTotals(settled_ns=60 * S, idle_joules=7000.0), running=3, waiting=2)
    assert found.cause is Cause.UNKNOWN
    assert "3 requests run and 2 wait" in found.advice


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["running", "waiting", "kv_usage", "max_num_seqs"])
def test_a_queue_that_is_no_number_counts_as_missing(name: str, value: float) -> None:
    assert diagnose(work(100), **{name: value}).cause is Cause.HEALTHY
    assert name not in diagnose(work(100), **{name: value}).evidence


def test_the_window_between_two_looks() -> None:
    before = (EngineTotals(settled_ns=S, units={Unit.IMAGE: 2.0}), EngineState(preemptions=4.0))
    done = work(10)
    after = (replace(done, settled_ns=61 * S, units={Unit.IMAGE: 5.0}), EngineState(running=9.0, preemptions=6.0))
    window = EngineWindow.between("e", before, after)
    assert (window.seconds, window.preemptions, window.state.running) == (60.0, 2.0, 9.0)
    assert window.work == replace(done, settled_ns=61 * S, units={Unit.IMAGE: 3.0})
    assert EngineWindow.between("e", after, before).work is None


@pytest.mark.parametrize(
    "broken",
    [
        {"busy_joules": math.nan},
        {"steps": 0.0},
        {"settled_ns": S},
        {"output_tokens": math.inf},
        {"units": {Unit.IMAGE: math.nan}},
    ],
)
def test_totals_that_went_backward_or_are_no_numbers_make_no_window(broken: dict[str, float]) -> None:
    before = replace(work(10), settled_ns=S)
    after = replace(work(20), **({"settled_ns": 61 * S} | broken))  # type: ignore[arg-type]
    window = EngineWindow.between("e", (before, EngineState()), (after, EngineState()))
    found = diagnose_engine(window, LAW)
    assert window.work is None
    assert (found.cause, found.confidence) == (Cause.UNKNOWN, 0)
