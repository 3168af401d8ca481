"""Energy of engines of which only the counters are known: closed forms at constant power."""

import random

import msgspec
import numpy as np
import pytest
from tests.ledger_driver import residual
from tests.step_simulator import START_NS, S

from jouletrace.diagnosis.causes import Cause, EngineWindow, diagnose_engine
from jouletrace.diagnosis.step_energy import StepEnergy
from jouletrace.energy.timeline import Timeline
from jouletrace.requests.account import Phase, Taken
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.law import Law, LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import (
    EngineRecord,
    LoadRecord,
    ModelLoad,
    RequestRecord,
    Status,
    StepRecord,
    Unit,
    Usage,
)

LAW = Law(fixed_joules=2.0, prefill_token_joules=0.01, decode_sequence_joules=0.05)
WATTS = 400.0


def timeline(seconds: int, watts: float = WATTS) -> Timeline:
    line = Timeline(START_NS)
    ends = START_NS + (np.arange(seconds * 10, dtype=np.int64) + 1) * (S // 10)
    line.extend(ends, np.full(len(ends), watts / 10))
    return line


def load(second: int, *models: ModelLoad, engine_id: str = "e", **queue: int) -> LoadRecord:
    """What happened in the second that ends `second` seconds after the start."""
    return LoadRecord(
        engine_id=engine_id,
        start_ns=START_NS + (second - 1) * S,
        end_ns=START_NS + second * S,
        models=models,
        running=queue.get("running", 4),
        waiting=queue.get("waiting", 0),
        steps=queue.get("steps", 0),
    )


def tokens(model: str, prompt: int, output: int, **more: float) -> ModelLoad:
    return ModelLoad(model=model, usage=Usage(input=prompt, output=output), **more)


def ledger_of(*engines: EngineRecord) -> Ledger:
    ledger = Ledger(Limits(), LawBook(default=LAW), start_ns=START_NS)
    for engine in engines or (EngineRecord(engine_id="e", kind="vllm", models=("m",)),):
        assert ledger.add_engine(engine, START_NS) is Taken.ACCEPTED
    return ledger


def run(ledger: Ledger, devices: dict[str, DeviceView], loads: list[LoadRecord], seconds: int) -> None:
    """A second at a time; what is told of a second comes 0.3 s after it."""
    waiting = sorted(loads, key=lambda one: one.end_ns)
    for second in range(1, seconds + 1):
        now_ns = START_NS + second * S + S // 3
        while waiting and waiting[0].end_ns <= now_ns:
            ledger.add_load(waiting.pop(0), now_ns)
        ledger.settle(devices, now_ns)
        ledger.expire(now_ns)


def view(seconds: int, busy: BusyTrack | None = None) -> dict[str, DeviceView]:
    return {"g": DeviceView(timeline(seconds), held=True, busy=busy)}


def test_joules_per_token_are_power_over_rate_within_thirty_seconds() -> None:
    ledger = ledger_of()
    run(ledger, view(30), [load(i, tokens("m", 500, 100)) for i in range(1, 31)], 30)
    seen = ledger.snapshot()
    joules = sum(seen.attributed_joules.values())
    output = seen.tokens["m", "", "output"]
    assert output >= 1000
    assert seen.tokens["m", "", "input"] == 5 * output
    assert joules / output == pytest.approx(WATTS / 100)
    assert {(model, tenant, engine) for model, tenant, engine, _ in seen.attributed_joules} == {("m", "", "e")}
    assert residual(ledger) < 1e-12
    totals = seen.engine_totals["e"]
    # The last third of a second waits for its load.
    assert totals.busy_joules == pytest.approx(joules + seen.pending_joules["e"])
    assert seen.pending_joules["e"] == pytest.approx(WATTS / 3)
    assert totals.prefill_joules + totals.decode_joules == pytest.approx(joules)
    assert totals.output_tokens == output
    # The batch that the diagnosis sees.
    assert totals.sequence_seconds / totals.active_seconds == pytest.approx(4)
    assert seen.coverage["e"] == 1.0
    assert seen.engine_states["e"].running == 4


def test_phases_by_the_law_and_by_the_seconds_that_the_engine_measured() -> None:
    ledger = ledger_of()
    # 100 steps of 4: 500 * 0.01 J of prefill beside 100 * (0.05 + 2 / 4) J of decoding
    run(ledger, view(40), [load(i, tokens("m", 500, 400), steps=100) for i in range(1, 41)], 40)
    found = ledger.snapshot().attributed_joules
    decode = 400 * 0.05 + 100 * 2.0
    assert found["m", "", "e", Phase.PREFILL] / found["m", "", "e", Phase.DECODE] == pytest.approx(5.0 / decode)
    assert ledger.snapshot().engine_totals["e"].fixed_joules == pytest.approx(
        sum(found.values()) * 200.0 / (5.0 + decode)
    )
    ledger = ledger_of()
    timed = [load(i, tokens("m", 500, 400, prefill_seconds=0.2, decode_seconds=0.6)) for i in range(1, 41)]
    run(ledger, view(40), timed, 40)
    found = ledger.snapshot().attributed_joules
    assert found["m", "", "e", Phase.PREFILL] / found["m", "", "e", Phase.DECODE] == pytest.approx(1 / 3)


def test_models_share_by_their_work() -> None:
    ledger = ledger_of()
    parts = (
        ModelLoad(model="big", usage=Usage(unit=Unit.INFERENCE, count=10), decode_seconds=0.3),
        ModelLoad(model="small", usage=Usage(unit=Unit.INFERENCE, count=90), decode_seconds=0.1),
    )
    run(ledger, view(40), [load(i, *parts) for i in range(1, 41)], 40)
    seen = ledger.snapshot()
    joules = {
        model: sum(seen.attributed_joules[model, "", "e", phase] for phase in Phase) for model in ("big", "small")
    }
    assert joules["big"] / joules["small"] == pytest.approx(3)
    count = seen.units["big", "", Unit.INFERENCE]
    assert joules["big"] / count == pytest.approx(0.75 * WATTS / 10)


def test_without_requests_the_device_is_idle() -> None:
    ledger = ledger_of()
    loads = [load(i, tokens("m", 0, 100)) for i in range(1, 11)] + [load(i, running=0) for i in range(11, 41)]
    run(ledger, view(40), loads, 40)
    seen = ledger.snapshot()
    assert sum(seen.attributed_joules.values()) == pytest.approx(10 * WATTS)
    assert seen.idle_joules["g", "parked"] > 10 * WATTS
    assert residual(ledger) < 1e-12


def test_tokens_that_land_late_do_not_lose_the_energy_before() -> None:
    """TGI counts tokens when a request ends; its batch runs all the time."""
    ledger = ledger_of()
    loads = [load(i, *([tokens("m", 100, 1000)] if i % 10 == 0 else [])) for i in range(1, 61)]
    run(ledger, view(60), loads, 60)
    seen = ledger.snapshot()
    assert sum(seen.unattributed_joules.values()) == 0
    assert sum(seen.attributed_joules.values()) >= 40 * WATTS
    assert residual(ledger) < 1e-12


def test_requests_win_over_counters() -> None:
    """Of an engine whose requests are told, the counters say only what its queue looks like."""
    device = view(200)
    alone, both = ledger_of(), ledger_of()
    for second in range(1, 200):
        now_ns = START_NS + second * S + S // 3
        request = RequestRecord(
            request_id=str(second),
            engine_id="e",
            model="m",
            tenant="t",
            arrival_ns=START_NS + (second - 1) * S,
            first_token_ns=START_NS + (second - 1) * S + S // 10,
            end_ns=START_NS + second * S,
            status=Status.FINISHED,
            usage=Usage(input=100, output=50),
        )
        alone.add_request(request, now_ns)
        both.add_request(request, now_ns)
        both.add_load(load(second, tokens("m", 100, 50), waiting=7), now_ns)
        alone.settle(device, now_ns)
        both.settle(device, now_ns)
    one, other = alone.snapshot(), both.snapshot()
    assert other.attributed_joules == one.attributed_joules
    assert other.tokens == one.tokens
    assert other.tokens["m", "t", "output"] > 0
    assert (one.engine_states["e"].waiting, other.engine_states["e"].waiting) == (None, 7)


def request(second: int, arrival_ns: int | None = None) -> RequestRecord:
    """One that took the whole of the second that ends `second` seconds after the start."""
    start_ns = START_NS + (second - 1) * S if arrival_ns is None else arrival_ns
    return RequestRecord(
        request_id=str(second),
        engine_id="e",
        model="m",
        tenant="t",
        arrival_ns=start_ns,
        first_token_ns=start_ns + S // 10,
        end_ns=start_ns + S,
        status=Status.FINISHED,
        usage=Usage(input=100, output=50),
    )


def test_what_lies_before_the_first_request_told_stays_the_counters() -> None:
    ledger, device = ledger_of(), view(240)
    for second in range(1, 240):
        now_ns = START_NS + second * S + S // 3
        ledger.add_load(load(second, tokens("m", 100, 50)), now_ns)
        if second > 40:
            ledger.add_request(request(second), now_ns)
        ledger.settle(device, now_ns)
        ledger.expire(now_ns)
    seen = ledger.snapshot()
    by_tenant = {
        tenant: sum(seen.attributed_joules["m", tenant, "e", phase] for phase in Phase) for tenant in ("", "t")
    }
    # 40 s by counters, each second with its tokens, and the rest by requests: nothing lost, nothing twice.
    assert by_tenant[""] == pytest.approx(40 * WATTS)
    assert seen.tokens["m", "", "output"] == 40 * 50
    assert by_tenant["t"] == pytest.approx(seen.tokens["m", "t", "output"] / 50 * WATTS, rel=0.02)
    assert seen.unattributed_joules == {"g": 0.0}
    assert residual(ledger) < 1e-12


def test_a_request_of_a_clock_that_is_ahead_does_not_stop_the_counters() -> None:
    ledger, device = ledger_of(), view(200)
    for second in range(1, 200):
        now_ns = START_NS + second * S + S // 3
        ledger.add_load(load(second, tokens("m", 100, 50)), now_ns)
        if second > 20:
            assert ledger.add_request(request(second, now_ns + 3600 * S), now_ns) is Taken.FUTURE
        ledger.settle(device, now_ns)
    seen = ledger.snapshot()
    assert sum(seen.attributed_joules.values()) == pytest.approx(199 * WATTS, rel=0.1)
    assert seen.unattributed_joules == {"g": 0.0}


def test_tokens_of_a_stream_that_tells_nothing_for_minutes_count_once() -> None:
    ledger, device = ledger_of(), view(480)
    for second in range(1, 480):
        now_ns = START_NS + second * S + S // 3
        ledger.add_load(load(second, tokens("m", 0, 10), running=1), now_ns)
        if second == 2:
            ledger.add_request(
                RequestRecord(
                    request_id="long", engine_id="e", model="m", arrival_ns=START_NS, first_token_ns=START_NS + S
                ),
                now_ns,
            )
        if second == 460:
            ended = RequestRecord(
                request_id="long", engine_id="e", model="m", end_ns=now_ns, status=Status.FINISHED,
                usage=Usage(output=4600),
            )  # fmt: skip
            ledger.add_request(ended, now_ns)
        ledger.settle(device, now_ns)
        ledger.expire(now_ns)
    seen = ledger.snapshot()
    assert seen.tokens["m", "", "output"] == 4600


def test_counted_steps_without_requests_go_to_the_model_that_the_counters_name() -> None:
    """SGLang with forward-pass metrics and a scrape: steps give the phases, counters the model and the tokens."""
    ledger = ledger_of()
    device = view(60)
    for second in range(1, 60):
        now_ns = START_NS + second * S + S // 3
        for part in range(10):
            start_ns = START_NS + (second - 1) * S + part * S // 10
            ledger.add_step(
                StepRecord(engine_id="e", start_ns=start_ns, end_ns=start_ns + S // 10, decode_requests=10),
                now_ns,
            )
        ledger.add_load(load(second, tokens("m", 0, 100), steps=10, running=10), now_ns)
        ledger.settle(device, now_ns)
    seen = ledger.snapshot()
    joules = sum(seen.attributed_joules.values())
    assert joules / seen.tokens["m", "", "output"] == pytest.approx(4.0, rel=0.05)
    assert sum(seen.unattributed_joules.values()) < 0.05 * joules
    assert seen.engine_totals["e"].steps == pytest.approx(10 * 58, abs=20)
    assert residual(ledger) < 1e-12


def test_two_scraped_engines_on_one_device_share_by_their_time() -> None:
    ledger = ledger_of(
        EngineRecord(engine_id="a", models=("x",), gpu_uuids=("g",)),
        EngineRecord(engine_id="b", models=("y",), gpu_uuids=("g",)),
    )
    device = {"g": DeviceView(timeline(40), held=True, engine_shares={"a": 0.6, "b": 0.2})}
    loads = [
        load(i, tokens(model, 0, 100), engine_id=engine)
        for i in range(1, 41)
        for engine, model in (("a", "x"), ("b", "y"))
    ]
    run(ledger, device, loads, 40)
    seen = ledger.snapshot()
    joules = {
        model: sum(seen.attributed_joules[model, "", engine, phase] for phase in Phase)
        for engine, model in ("ax", "by")
    }
    assert joules["x"] / joules["y"] == pytest.approx(3)
    assert residual(ledger) < 1e-12


def test_an_engine_that_goes_by_another_id_owns_nothing() -> None:
    ledger = ledger_of(
        EngineRecord(engine_id="vllm-8000", models=("m",), pid=1, gpu_uuids=("g",)),
        EngineRecord(engine_id="plugin", models=("m",), pid=1, gpu_uuids=("g",)),
    )
    assert ledger.add_engine(EngineRecord(engine_id="vllm-8000", ended=True), START_NS + S) is Taken.ACCEPTED
    assert [engine.engine_id for engine in ledger.engines] == ["plugin"]
    assert ledger.add_engine(EngineRecord(engine_id="no", ended=True), START_NS + S) is Taken.UNKNOWN_ENGINE


def test_loads_that_make_no_sense() -> None:
    ledger = ledger_of()
    now_ns = START_NS + 1000 * S
    assert ledger.add_load(load(1, engine_id="nobody"), now_ns) is Taken.UNKNOWN_ENGINE
    assert ledger.add_load(load(1010), now_ns) is Taken.FUTURE
    assert ledger.add_load(load(50), now_ns) is Taken.LATE
    assert ledger.add_load(load(999), now_ns) is Taken.ACCEPTED
    assert ledger.add_load(load(999), now_ns) is Taken.DUPLICATE


@pytest.mark.parametrize("seed", range(5))
def test_the_account_adds_up_whatever_is_told(seed: int) -> None:
    chance = random.Random(seed)
    ledger = ledger_of(EngineRecord(engine_id="e", gpu_uuids=("g", "h")), EngineRecord(engine_id="f", gpu_uuids=("h",)))
    busy = BusyTrack(START_NS + (np.arange(600) + 1) * S // 2, np.array([chance.random() < 0.7 for _ in range(600)]))
    devices = {uuid: DeviceView(timeline(300, 100.0 * n), held=True, busy=busy) for n, uuid in ((2, "g"), (5, "h"))}
    for second in range(1, 300):
        now_ns = START_NS + second * S
        for engine_id in "ef":
            if chance.random() < 0.8:
                ledger.add_load(
                    load(
                        second - chance.randrange(2),
                        *(
                            tokens(model, chance.randrange(100), chance.randrange(50))
                            for model in "xy"[: chance.randrange(3)]
                        ),
                        engine_id=engine_id,
                        running=chance.randrange(3),
                    ),
                    now_ns,
                )
        if chance.random() < 0.02:
            ledger.add_request(
                RequestRecord(
                    request_id=str(second),
                    engine_id="e",
                    model="x",
                    arrival_ns=now_ns - 3 * S,
                    end_ns=now_ns,
                    status=Status.FINISHED,
                    usage=Usage(input=5, output=5),
                ),
                now_ns,
            )
        ledger.settle(devices, now_ns)
        if second % 50 == 0:
            assert residual(ledger) < 1e-9
    ledger.settle(devices, START_NS + 300 * S, close_ns=START_NS + 299 * S)
    assert residual(ledger) < 1e-9


@pytest.mark.parametrize(
    ("queue", "cause"),
    [
        ({"running": 4, "waiting": 0}, Cause.SMALL_BATCH),
        ({"running": 400, "waiting": 0}, Cause.HEALTHY),
        ({"running": 4, "waiting": 9, "kv_usage": 0.95}, Cause.KV_CAPACITY),
        ({"running": 0, "waiting": 0}, Cause.NO_DEMAND),
    ],
)
def test_the_diagnosis_lives_on_counters_alone(queue: dict[str, float], cause: Cause) -> None:
    """With a law that the operator gave: B* is 2 / 0.05 = 40 sequences."""
    ledger, looks, energy = ledger_of(), [], StepEnergy()
    device = view(80)
    for second in range(1, 80):
        now_ns = START_NS + second * S + S // 3
        running, kv_usage = int(queue["running"]), queue.get("kv_usage", 0.2)
        made = (tokens("m", 0, 10 * running),) if running else ()
        told = load(second, *made, running=running, waiting=int(queue["waiting"]))
        ledger.add_load(msgspec.structs.replace(told, kv_usage=kv_usage), now_ns)
        ledger.settle(device, now_ns)
        seen = ledger.snapshot()
        looks.append((seen.engine_totals["e"], seen.engine_states["e"]))
        law = energy.observe(looks[-1][0], LAW)
    found = diagnose_engine(EngineWindow.between("e", looks[40], looks[-1]), law)
    assert found.cause is cause
    if running:
        assert found.joules_per_unit == pytest.approx(WATTS / (10 * running), rel=0.05)
        assert found.batch == pytest.approx(running)
