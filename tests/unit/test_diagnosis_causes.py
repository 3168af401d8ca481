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
BUSY = DeviceCondition("g", underutilized=False, power_ratio=0.9, throttled_ratio=0.0)
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
    assert found.reachable_joules_per_unit == pytest.approx(A / 20 + B)
    # 333 tokens a second at 0.15 J less.
    assert found.saved_watts == pytest.approx(2000 * 10 / 60 * (A / 10 - A / 20))


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
    assert diagnose(work(10), known).reachable_batch == 12
    assert diagnose(work(12), known).reachable_joules_per_unit is None
    assert diagnose(work(2), known).reachable_joules_per_unit is None
    assert diagnose(work(10), replace(LAW, batch_low=None, batch_high=None)).reachable_joules_per_unit is None


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({"kv_usage": 0.86, "running": 100, "waiting": 9, "max_num_seqs": 256}, Cause.KV_CAPACITY),
        ({"kv_usage": 0.84, "running": 100, "waiting": 9, "max_num_seqs": 256}, Cause.HEALTHY),
        ({"kv_usage": 0.86, "running": 204, "waiting": 9, "max_num_seqs": 256}, Cause.KV_CAPACITY),
        ({"kv_usage": 0.86, "running": 205, "waiting": 9, "max_num_seqs": 256}, Cause.HEALTHY),
        # Nobody waits: nothing is limited.
        ({"kv_usage": 0.95, "running": 100, "waiting": 0, "max_num_seqs": 256}, Cause.HEALTHY),
        ({"kv_usage": 0.95, "running": 100, "waiting": 9}, Cause.KV_CAPACITY),
        ({"preemptions": 3, "kv_usage": 0.5}, Cause.KV_CAPACITY),
    ],
)
def test_kv_capacity_by_the_authors_thresholds(state: dict[str, float], cause: Cause) -> None:
    assert diagnose(work(100), **state).cause is cause


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
    quiet = EngineTotals(settled_ns=60 * S, idle_joules=121.0 * 60)
    found = diagnose(quiet, running=0)
    assert found.cause is Cause.NO_DEMAND
    assert found.saved_watts == pytest.approx(121)
    assert found.joules_per_unit is None
    # Work for a few seconds of the minute: idle energy is most of it.
    some = diagnose(work(80, steps=100, active=3.0, idle=100 * 7.8 * 2), running=0)
    assert some.cause is Cause.NO_DEMAND
    assert some.reachable_joules_per_unit == pytest.approx(A / 80 + B)


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
    assert (found.unit, found.cause) == ("input_token", Cause.PREFILL_HEAVY)
    assert found.joules_per_unit == pytest.approx(A / 2048 + C_P)


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
    partial = replace(work(10), step_seconds=30.0, output_tokens=20_000.0)
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
