import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from tests.ledger_driver import Timed, drive, residual, tell, views
from tests.step_simulator import START_NS, Cost, Run, S, Simulator, relative_errors

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.account import Method, Phase, Taken
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.law import Law, LawBook, PrefillSchedule, Provenance
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, PrefillPart, RequestRecord, Status, StepRecord, Unit, Usage
from jouletrace.requests.state import LedgerState

FITS = json.loads((Path(__file__).parents[1] / "data/mlenergy_h100_fits.json").read_text())["fits"]
PREFILL_TO_DECODE = 15.4 / 40.5
"""The published sweeps have no prefill coefficient; this is its ratio to the decode coefficient measured on an H200."""
ENGINE = EngineRecord(engine_id="e", kind="vllm", models=("m",))
MS = 1_000_000


def cost_of(fit: dict) -> Cost:
    b = fit["marginal_J_per_output_token"]
    return Cost(fit["fixed_J_per_step"], PREFILL_TO_DECODE * b, b)


def law_of(cost: Cost, provenance: Provenance = Provenance.CALIBRATED) -> Law:
    return Law(
        fixed_joules=cost.a,
        prefill_token_joules=cost.c_p,
        decode_sequence_joules=cost.c_d,
        provenance=provenance,
    )


LLAMA = cost_of(next(fit for fit in FITS if fit["model_id"] == "meta-llama/Llama-3.1-8B-Instruct"))
BOOK = LawBook(default=law_of(LLAMA))


def ledger(book: LawBook = BOOK, *engines: EngineRecord, **limits: int) -> Ledger:
    made = Ledger(Limits(**limits), book)
    for engine in engines or (ENGINE,):
        made.add_engine(engine, START_NS)
    return made


def steps_of(run: Run) -> list[Timed]:
    return [(step.end_ns, step) for step in run.steps]


def live(run: Run) -> list[Timed]:
    return [record for job in run.jobs for record in job.live("e")]


def found(book: Ledger, run: Run, engine_id: str = "e") -> dict[str, float]:
    answers = [book.price(job.request_id, engine_id) for job in run.jobs]
    assert all(answer is not None and answer.final for answer in answers)
    return {answer.request_id: answer.energy_joules for answer in answers if answer is not None}


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit['model_id'].split('/')[1]}x{fit['num_gpus']}")
def test_steps_give_the_shapley_value_of_published_laws(fit: dict) -> None:
    cost = cost_of(fit)
    run = Simulator(cost, rate=6, seed=2, cached_part=0.3, cancelled_part=0.1).run()
    book = ledger(LawBook(default=law_of(cost)))
    drive(book, views({"g": run.timeline()}), [*steps_of(run), *live(run)], run.end_ns + 5 * S)
    median, p95 = relative_errors(found(book, run), run.truth)
    assert p95 < 1e-6
    prefill = {name: book.price(name).prefill_joules for name in run.prefill_truth}  # type: ignore[union-attr]
    assert relative_errors(prefill, run.prefill_truth)[1] < 1e-6
    assert {book.price(job.request_id).method for job in run.jobs} == {Method.STEPS}  # type: ignore[union-attr]
    seen = book.snapshot()
    assert sum(seen.attributed_joules.values()) == pytest.approx(sum(run.step_joules), rel=1e-9)
    assert median <= p95


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit['model_id'].split('/')[1]}x{fit['num_gpus']}")
@pytest.mark.parametrize("rate", [1, 8])
def test_boundaries_with_a_calibrated_law(fit: dict, rate: int) -> None:
    cost = cost_of(fit)
    run = Simulator(cost, rate=rate, seconds=20, seed=3, cached_part=0.3, cancelled_part=0.1).run()
    book = ledger(LawBook(default=law_of(cost)))
    drive(book, views({"g": run.timeline()}), live(run), run.end_ns + 5 * S)
    median, p95 = relative_errors(found(book, run), run.truth)
    assert median < 0.02
    assert p95 < 0.06
    assert {book.price(job.request_id).method for job in run.jobs} == {Method.BOUNDARIES_CALIBRATED}  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [0.1, 8])
def test_a_prior_of_the_wrong_size_is_put_right_by_output_tokens(size: float) -> None:
    run = Simulator(LLAMA, rate=4, seconds=60, seed=3).run()
    wrong = law_of(Cost(LLAMA.a * size, LLAMA.c_p * size, LLAMA.c_d * size), Provenance.PRIOR)
    book = ledger(LawBook(default=wrong))
    drive(book, views({"g": run.timeline()}), live(run), run.end_ns + 5 * S)
    # The first requests have nobody to learn from.
    learnt = {job.request_id: run.truth[job.request_id] for job in run.jobs[50:]}
    median, p95 = relative_errors(found(book, run), learnt)
    assert median < 0.02
    assert p95 < 0.06


def test_output_tokens_that_are_no_steps_do_not_spoil_a_measured_law() -> None:
    run = Simulator(LLAMA, rate=4, seconds=30, seed=3).run()
    book = ledger(LawBook(default=law_of(LLAMA)))
    drafted = [
        (
            t_ns,
            record
            if record.usage is None
            else msgspec.structs.replace(
                record, usage=msgspec.structs.replace(record.usage, output=3 * record.usage.output)
            ),
        )
        for t_ns, record in live(run)
        if isinstance(record, RequestRecord)
    ]
    drive(book, views({"g": run.timeline()}), drafted, run.end_ns + 5 * S)
    median, p95 = relative_errors(found(book, run), run.truth)
    assert median < 0.06
    assert p95 < 0.12


def test_steps_that_only_count_are_claimed_by_requests_told_later() -> None:
    run = Simulator(LLAMA, rate=6, seed=4).run()
    book = ledger()
    told = [(step.end_ns, step) for step in run.counted()]
    # Complete records, 7 s after each request's end: a batching exporter.
    told += [(job.end_ns + 7 * S, job.record("e")) for job in run.jobs]
    drive(book, views({"g": run.timeline()}), told, run.end_ns + 10 * S)
    median, p95 = relative_errors(found(book, run), run.truth)
    assert median < 0.02
    assert p95 < 0.06
    assert {book.price(job.request_id).method for job in run.jobs} == {Method.STEP_COUNTS}  # type: ignore[union-attr]
    assert residual(book) < 1e-9
    busy = sum(run.step_joules)
    assert sum(book.snapshot().attributed_joules.values()) == pytest.approx(busy, rel=0.01)


def test_counted_steps_of_unknown_requests_wait_and_then_are_unattributed() -> None:
    run = Simulator(LLAMA, rate=6, seconds=5, seed=4).run()
    book = ledger()
    devices = views({"g": run.timeline(seconds_after=200)})
    told = [(step.end_ns, step) for step in run.counted()]
    drive(book, devices, told, run.end_ns + 10 * S)
    busy = sum(run.step_joules)
    assert book.snapshot().pending_joules["e"] == pytest.approx(busy, rel=1e-9)
    drive(book, devices, [], run.end_ns + 150 * S, pass_ns=10 * S)
    assert book.snapshot().pending_joules["e"] == pytest.approx(0, abs=1e-6)
    assert book.snapshot().unattributed_joules["g"] == pytest.approx(busy, rel=1e-9)
    assert book.snapshot().coverage["e"] < 0.01


def test_a_feed_that_tells_requests_when_they_are_over_is_waited_for() -> None:
    run = Simulator(LLAMA, rate=4, seconds=60, seed=5, outputs=(64, 256)).run()
    book = ledger()
    told = [(job.end_ns + 5 * S, job.record("e")) for job in run.jobs]
    drive(book, views({"g": run.timeline(seconds_after=60)}), told, run.end_ns + 60 * S)
    median, p95 = relative_errors(found(book, run), run.truth)
    assert median < 0.02
    assert p95 < 0.06


def test_exclusive_prefill_owns_the_gpu() -> None:
    # Prompt of "b" runs alone for 100 ms while "a" waits; before and after "a" decodes, alone or beside "b".
    line = Timeline(START_NS)
    times = [0, 100, 300, 400, 600, 800]
    line.extend([START_NS + t * MS for t in times[1:]], [50.0, 80.0, 60.0, 90.0, 70.0])
    line.extend([START_NS + 10 * S], [100.0])
    book = ledger(LawBook(schedules={"e": PrefillSchedule.EXCLUSIVE}))

    def times_of(name: str, arrival: int, first: int, end: int) -> list:
        return [
            (
                START_NS + end * MS,
                RequestRecord(
                    request_id=name,
                    model="m",
                    tenant="t",
                    arrival_ns=START_NS + arrival * MS,
                    first_token_ns=START_NS + first * MS,
                    end_ns=START_NS + end * MS,
                    status=Status.FINISHED,
                    usage=Usage(input=100, output=10),
                ),
            )
        ]

    drive(book, views({"g": line}), times_of("a", 0, 100, 800) + times_of("b", 300, 400, 600), START_NS + 20 * S)
    a, b = book.price("a"), book.price("b")
    assert a is not None and b is not None
    assert (a.prefill_joules, a.decode_joules) == pytest.approx((50.0, 80.0 + 45.0 + 70.0))
    assert (b.prefill_joules, b.decode_joules) == pytest.approx((60.0, 45.0))
    assert a.method is Method.BOUNDARIES_EXCLUSIVE
    assert a.fixed_joules + a.marginal_joules == pytest.approx(a.energy_joules)
    assert a.low < a.energy_joules < a.high
    assert a.joules_per_output_token == pytest.approx(19.5 + 5.0)


def test_tensor_parallel_devices_are_added_up() -> None:
    run = Simulator(LLAMA, rate=6, seconds=10, seed=6).run()
    engine = replace_devices("g0", "g1")
    book = ledger(BOOK, engine)
    devices = views({"g0": run.timeline(share=0.6), "g1": run.timeline(share=0.4), "spare": run.timeline(share=0.0)})
    drive(book, devices, [*steps_of(run), *live(run)], run.end_ns + 5 * S)
    assert relative_errors(found(book, run), run.truth)[1] < 1e-6
    assert book.snapshot().idle_joules["spare", "parked"] > 0
    assert residual(book) < 1e-9


def replace_devices(*uuids: str, engine_id: str = "e") -> EngineRecord:
    return EngineRecord(engine_id=engine_id, kind="vllm", models=("m",), gpu_uuids=uuids)


def test_two_engines_share_a_device_by_sm_time() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [400.0] * 30)
    engines = [replace_devices("g", engine_id="e"), replace_devices("g", engine_id="f")]
    book = ledger(BOOK, *engines)

    def request(engine_id: str, start: int, end: int) -> tuple[int, RequestRecord]:
        return START_NS + end * S, RequestRecord(
            request_id="x",
            engine_id=engine_id,
            model="m",
            tenant="t",
            arrival_ns=START_NS + start * S,
            first_token_ns=START_NS + start * S,
            end_ns=START_NS + end * S,
            status=Status.FINISHED,
            usage=Usage(input=1, output=100),
        )

    shares = {"e": 0.6, "f": 0.2}
    drive(book, views({"g": line}, engine_shares=shares), [request("e", 2, 10), request("f", 6, 12)], START_NS + 60 * S)
    e, f = book.price("x", "e"), book.price("x", "f")
    assert e is not None and f is not None
    # Alone 2-6 s and 10-12 s; both 6-10 s, 3 to 1.
    assert e.energy_joules == pytest.approx(4 * 400 + 4 * 300)
    assert f.energy_joules == pytest.approx(4 * 100 + 2 * 400)
    assert residual(book) < 1e-9


def test_an_engine_without_requests_keeps_its_part_as_unattributed() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [400.0] * 30)
    book = ledger(BOOK, replace_devices("g", engine_id="e"), replace_devices("g", engine_id="silent"))
    told = RequestRecord(
        request_id="x",
        engine_id="e",
        model="m",
        arrival_ns=START_NS,
        first_token_ns=START_NS,
        end_ns=START_NS + 20 * S,
        status=Status.FINISHED,
        usage=Usage(input=1, output=100),
    )
    devices = views({"g": line}, engine_shares={"e": 0.3, "silent": 0.1})
    book.settle(devices, START_NS)
    book.add_request(told, START_NS + 20 * S)
    book.settle(devices, START_NS + 30 * S, close_ns=START_NS + 20 * S)
    answer = book.price("x", "e")
    assert answer is not None
    assert answer.energy_joules == pytest.approx(6000)
    assert book.snapshot().unattributed_joules["g"] == pytest.approx(2000)


def whole_life(engine_id: str, start: int, end: int, name: str = "x") -> RequestRecord:
    return RequestRecord(
        request_id=name,
        engine_id=engine_id,
        model="m",
        tenant="t",
        arrival_ns=START_NS + start * S,
        first_token_ns=START_NS + start * S,
        end_ns=START_NS + end * S,
        status=Status.FINISHED,
        usage=Usage(input=1, output=100),
    )


def even_line(seconds: int, watts: float = 400.0) -> Timeline:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, seconds + 1)], [watts] * seconds)
    return line


def test_time_is_shared_by_the_reading_that_held_then() -> None:
    line = even_line(40)
    book = ledger(BOOK, replace_devices("g", engine_id="e"), replace_devices("g", engine_id="f"))
    for engine_id in "ef":
        # Their feeds are known to be slow, so that nothing is settled for 40 s.
        assert book.add_request(whole_life(engine_id, -40, -39, "slow"), START_NS + S) is Taken.ACCEPTED
    for now in range(1, 50):
        shares = {"e": 0.6, "f": 0.2} if now <= 10 else {"e": 0.1, "f": 0.3}
        book.settle(views({"g": line}, engine_shares=shares), START_NS + now * S)
        if now == 25:
            for engine_id in "ef":
                book.add_request(whole_life(engine_id, 0, 15), START_NS + 25 * S)
    book.settle(views({"g": line}), START_NS + 50 * S, close_ns=START_NS + 40 * S)
    e, f = book.price("x", "e"), book.price("x", "f")
    assert e is not None and f is not None
    # 10 s at 3 to 1, then 5 s at 1 to 3.
    assert (e.energy_joules, f.energy_joules) == pytest.approx((3000 + 500, 1000 + 1500))
    assert residual(book) < 1e-9


def test_an_announced_engine_that_tells_nothing_holds_nobody_back() -> None:
    line = even_line(60)
    book = ledger(BOOK, replace_devices("g", engine_id="e"), replace_devices("g", engine_id="announced"))
    devices = views({"g": line})
    told = [
        (
            START_NS + end * MS,
            msgspec.structs.replace(
                whole_life("e", 0, 0, f"r{end}"),
                arrival_ns=START_NS + (end - 500) * MS,
                first_token_ns=START_NS + (end - 400) * MS,
                end_ns=START_NS + end * MS,
            ),
        )
        for end in range(500, 20_000, 10)
    ]
    drive(book, devices, told, START_NS + 20 * S)
    # 100 requests a second of half a second: what waits to be settled is the last two to three seconds.
    assert book.snapshot().settled_ns >= START_NS + 17 * S
    assert sum(book.snapshot().requests.values()) > 1600
    # Its own first request is told live, and finds its energy; one that is told late finds what is still open.
    live_one = whole_life("announced", 25, 30, "live")
    late_one = whole_life("announced", 5, 12, "late")
    start = msgspec.structs.replace(live_one, end_ns=None, status=Status.RUNNING)
    drive_on = [(START_NS + 25 * S, start), (START_NS + 30 * S, live_one), (START_NS + 40 * S, late_one)]
    now_ns = START_NS + 20 * S
    while now_ns < START_NS + 120 * S:
        now_ns += S
        for at_ns, record in drive_on:
            if at_ns == now_ns:
                tell(book, record, now_ns)
        book.settle(devices, now_ns)
    live_answer, late_answer = book.price("live"), book.price("late")
    assert live_answer is not None and live_answer.final
    assert live_answer.energy_joules == pytest.approx(5 * 400)
    assert late_answer is None or late_answer.energy_joules == 0
    assert residual(book) < 1e-9


class BrokenLaw:
    """A law whose coefficients cannot be asked for."""

    provenance = Provenance.CALIBRATED
    error = 0.02

    def __getattr__(self, name: str) -> float:
        raise ArithmeticError(name)


@pytest.mark.parametrize("named", [True, False])
def test_what_cannot_be_distributed_is_unattributed_and_the_rest_goes_on(named: bool) -> None:
    run, other = Simulator(LLAMA, seed=4).run(), Simulator(LLAMA, seed=5, engine_id="f", prefix="o").run()
    broken, sound = replace_devices("g", engine_id="e"), replace_devices("h", engine_id="f")
    book = ledger(LawBook(engines={"e": BrokenLaw()}, default=law_of(LLAMA)), broken, sound)  # type: ignore[dict-item]
    devices = views({"g": run.timeline(seconds_after=20), "h": other.timeline(seconds_after=20)})
    told = [*(steps_of(run) if named else live(run)), *steps_of(other)]
    told += [one for job in other.jobs for one in job.live("f")]
    told.sort(key=lambda one: one[0])
    failures, at = 0, 0
    for second in range(1, 60):
        now_ns = START_NS + second * S
        while at < len(told) and told[at][0] <= now_ns:
            tell(book, told[at][1], told[at][0])
            at += 1
        try:
            book.settle(devices, now_ns)
        except ArithmeticError:
            failures += 1
        assert residual(book) < 1e-9
    assert failures > 10
    seen = book.snapshot()
    assert seen.unattributed_joules["g"] == pytest.approx(sum(run.step_joules), rel=0.01)
    assert seen.unattributed_joules["h"] == pytest.approx(0, abs=1e-6)
    assert relative_errors(found(book, other, "f"), other.truth)[1] < 1e-6
    assert seen.device_joules["g"] == pytest.approx(run.timeline(seconds_after=20).joules)


class BrokenTimeline(Timeline):
    """A timeline that cannot be read at some times."""

    broken = False

    def energies_at(self, t_ns: ArrayLike) -> NDArray[np.float64]:
        if self.broken:
            raise OSError
        return super().energies_at(t_ns)


def test_energy_that_cannot_be_read_waits_for_the_next_pass() -> None:
    line = BrokenTimeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 41)], [400.0] * 40)
    devices = views({"bad": line, "good": even_line(40)})
    book = ledger(BOOK, replace_devices("bad", "good"))
    book.settle(devices, START_NS + 20 * S)
    line.broken = True
    with pytest.raises(OSError):
        book.settle(devices, START_NS + 40 * S, close_ns=START_NS + 40 * S)
    assert residual(book) < 1e-9
    line.broken = False
    book.settle(devices, START_NS + 40 * S, close_ns=START_NS + 40 * S)
    assert book.snapshot().device_joules == pytest.approx({"bad": 16_000, "good": 16_000})
    assert residual(book) < 1e-9


def test_a_device_that_is_lost_does_not_make_the_account_old() -> None:
    lost, here = even_line(10), even_line(100)
    book = ledger()
    book.settle(views({"lost": lost, "here": here}), START_NS + 11 * S)
    assert START_NS < book.snapshot().settled_ns <= START_NS + 10 * S
    book.settle(views({"lost": lost, "here": here}), START_NS + 100 * S)
    assert book.snapshot().settled_ns == START_NS + 100 * S
    book.settle(views({"here": here}), START_NS + 101 * S)
    assert book.snapshot().settled_ns == START_NS + 100 * S
    assert book.snapshot().device_joules["lost"] == pytest.approx(4000)


def test_prefix_cache_hits_pay_no_prefill_compute() -> None:
    run = Simulator(LLAMA, rate=3, seed=7, cached_part=0.5, prompts=(4096,), outputs=(64,)).run()
    book = ledger()
    drive(book, views({"g": run.timeline()}), live(run), run.end_ns + 5 * S)
    cached = [book.price(job.request_id) for job in run.jobs if job.cached]
    whole = [book.price(job.request_id) for job in run.jobs if not job.cached]
    ratio = np.median([a.prefill_joules for a in cached if a]) / np.median([a.prefill_joules for a in whole if a])
    assert ratio == pytest.approx(0.25, rel=0.1)


def test_cancelled_requests_pay_and_are_counted_as_such() -> None:
    run = Simulator(LLAMA, rate=6, seconds=10, seed=8, cancelled_part=0.5).run()
    book = ledger()
    drive(book, views({"g": run.timeline()}), [*steps_of(run), *live(run)], run.end_ns + 5 * S)
    cancelled = [job for job in run.jobs if job.status is Status.CANCELLED]
    assert len(cancelled) > 10
    counts = book.snapshot().requests
    assert sum(n for (_, _, status), n in counts.items() if status is Status.CANCELLED) == len(cancelled)
    assert found(book, run)[cancelled[0].request_id] == pytest.approx(run.truth[cancelled[0].request_id], rel=1e-6)


def test_idle_is_parked_or_bare_and_parked_is_allocated_to_the_recent_users() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 101)], [100.0] * 100)
    book = ledger()
    record = RequestRecord(
        request_id="x",
        model="m",
        tenant="t",
        arrival_ns=START_NS + 10 * S,
        first_token_ns=START_NS + 10 * S,
        end_ns=START_NS + 20 * S,
        status=Status.FINISHED,
        usage=Usage(input=1, output=10),
    )
    drive(book, views({"g": line}), [(START_NS + 20 * S, record)], START_NS + 52 * S)
    book.settle({"g": DeviceView(line, held=False)}, START_NS + 101 * S, close_ns=START_NS + 100 * S)
    seen = book.snapshot()
    # Held as long as that was told, however late it is settled: 52 s, 10 of them busy.
    assert seen.idle_joules["g", "parked"] == pytest.approx(100 * 42)
    assert seen.idle_joules["g", "bare"] == pytest.approx(100 * 48)
    assert sum(seen.attributed_joules.values()) == pytest.approx(1000)
    assert sum(seen.allocated_joules.values()) == pytest.approx(1000 + 100 * 42)
    assert seen.allocated_joules["m", "t", "e"] > 1000


def test_work_without_requests_is_unattributed_and_waiting_requests_burn_nothing() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 301)], [100.0] * 300)
    ends = START_NS + np.arange(1, 3001) * 100 * MS
    seconds = (ends - START_NS) / S
    busy = BusyTrack(ends, (seconds > 100) & (seconds <= 200))
    book = ledger()
    # A client that never said goodbye: its GPU does nothing until 100 s.
    leak = RequestRecord(
        request_id="leak", model="m", arrival_ns=START_NS, first_token_ns=START_NS + 1, status=Status.RUNNING
    )
    end = RequestRecord(request_id="leak", end_ns=START_NS + 50 * S, status=Status.CANCELLED)
    drive(book, views({"g": line}, busy), [(START_NS + 1, leak), (START_NS + 50 * S, end)], START_NS + 300 * S)
    book.settle(views({"g": line}, busy), START_NS + 301 * S, close_ns=START_NS + 300 * S)
    seen = book.snapshot()
    assert seen.unattributed_joules["g"] == pytest.approx(100 * 100, rel=0.01)
    assert seen.idle_joules["g", "parked"] == pytest.approx(200 * 100, rel=0.01)
    assert sum(seen.attributed_joules.values()) == pytest.approx(0, abs=30)


@pytest.mark.parametrize("last", [False, True])
def test_activity_readings_that_have_stopped_say_nothing(last: bool) -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 121)], [100.0] * 120)
    # One reading each 2 s up to 20 s, all the same; the request runs from 60 to 80 s.
    busy = BusyTrack(START_NS + np.arange(1, 11) * 2 * S, np.full(10, last))
    book = ledger()
    begin = RequestRecord(request_id="x", model="m", arrival_ns=START_NS + 60 * S, first_token_ns=START_NS + 60 * S)
    end = RequestRecord(request_id="x", end_ns=START_NS + 80 * S)
    told = [(START_NS + 60 * S, begin), (START_NS + 80 * S, end)]
    drive(book, views({"g": line}, busy), told, START_NS + 100 * S)
    book.settle(views({"g": line}, busy), START_NS + 121 * S, close_ns=START_NS + 120 * S)
    answer = book.price("x")
    assert answer is not None and answer.final
    assert answer.energy_joules == pytest.approx(2000, rel=0.01)
    seen = book.snapshot()
    # Believed for one more reading (2 s) and the sensor's lag of 0.1 s.
    assert seen.unattributed_joules["g"] == pytest.approx(2210 if last else 0, abs=1)
    assert residual(book) < 1e-9


def test_a_pass_waits_for_activity_readings_that_come_seldom() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 101)], [100.0] * 100)
    book = ledger()
    busy = BusyTrack(START_NS + np.arange(1, 10) * 10 * S, np.zeros(9, np.bool_))
    book.settle(views({"g": line}, busy), START_NS + 110 * S)
    # 20 s late is within three readings: settled by the last one, not by the hold of 15 s and the lag of 1 s.
    assert book.snapshot().settled_ns == START_NS + 90 * S


def test_duplicates_count_once_and_reused_ids_are_other_requests() -> None:
    run = Simulator(LLAMA, rate=4, seconds=10, seed=9).run()
    book = ledger()
    devices = views({"g": run.timeline(seconds_after=100)})
    twice = [(t, record) for t, record in live(run) for _ in range(2)]
    drive(book, devices, [*steps_of(run), *steps_of(run), *twice], run.end_ns + 5 * S)
    assert relative_errors(found(book, run), run.truth)[1] < 1e-6
    assert sum(book.snapshot().requests.values()) == len(run.jobs)
    record = run.jobs[0].record("e")
    assert book.add_request(record, run.end_ns + 5 * S) is Taken.DUPLICATE
    later = run.end_ns + 6 * S
    again = RequestRecord(
        request_id=record.request_id,
        engine_id="e",
        model="m",
        arrival_ns=later,
        first_token_ns=later,
        end_ns=later + S,
        status=Status.FINISHED,
        usage=Usage(input=5, output=5),
    )
    assert book.add_request(again, later + S) is Taken.ACCEPTED
    book.settle(devices, later + 3 * S, close_ns=later + 2 * S)
    answer = book.price(record.request_id)
    assert answer is not None and answer.final
    assert answer.energy_joules == pytest.approx(120, rel=0.01)
    assert sum(book.snapshot().requests.values()) == len(run.jobs) + 1


def test_an_engine_that_restarts_ends_the_requests_it_forgot() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [100.0] * 30)
    book = ledger()

    def begin(at: int) -> tuple[int, RequestRecord]:
        t = START_NS + at * S
        return t, RequestRecord(
            request_id="1", model="m", tenant="t", arrival_ns=t, first_token_ns=t, status=Status.RUNNING
        )

    end = RequestRecord(request_id="1", end_ns=START_NS + 20 * S, status=Status.FINISHED)
    drive(book, views({"g": line}), [begin(2), begin(10), (START_NS + 20 * S, end)], START_NS + 29 * S)
    counts = book.snapshot().requests
    assert counts == {("m", "t", Status.FAILED): 1, ("m", "t", Status.FINISHED): 1}
    answer = book.price("1")
    assert answer is not None
    assert answer.energy_joules == pytest.approx(1000)
    assert residual(book) < 1e-9


def test_attempts_of_one_id_are_apart() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [100.0] * 30)
    book = ledger()

    def attempt(number: int, at: int, status: Status) -> tuple[int, RequestRecord]:
        t = START_NS + at * S
        return t + S, RequestRecord(
            request_id="1",
            attempt=number,
            model="m",
            tenant="t",
            arrival_ns=t,
            first_token_ns=t,
            end_ns=t + S,
            status=status,
        )

    drive(book, views({"g": line}), [attempt(0, 5, Status.FAILED), attempt(1, 7, Status.FINISHED)], START_NS + 29 * S)
    assert sum(book.snapshot().requests.values()) == 2
    assert sum(book.snapshot().attributed_joules.values()) == pytest.approx(200)


@pytest.mark.parametrize(
    ("record", "taken"),
    [
        (StepRecord(engine_id="?", start_ns=START_NS, end_ns=START_NS + 1, decode=("a",)), Taken.UNKNOWN_ENGINE),
        (RequestRecord(request_id="a", engine_id="?", arrival_ns=START_NS), Taken.UNKNOWN_ENGINE),
        (StepRecord(engine_id="e", start_ns=START_NS, end_ns=START_NS + 2000 * S, decode=("a",)), Taken.FUTURE),
        (RequestRecord(request_id="a", arrival_ns=START_NS + 2000 * S), Taken.FUTURE),
        (StepRecord(engine_id="e", start_ns=START_NS, end_ns=START_NS + 1, decode=("a",)), Taken.LATE),
        (RequestRecord(request_id="a", model="m", arrival_ns=START_NS, end_ns=START_NS + S), Taken.LATE),
        (EngineRecord(engine_id="x", gpu_uuids=("no",)), Taken.UNKNOWN_DEVICE),
    ],
)
def test_records_that_cannot_count(record: EngineRecord | StepRecord | RequestRecord, taken: Taken) -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + 1000 * S], [1000.0])
    book = ledger()
    book.settle(views({"g": line}), START_NS + 1000 * S)
    assert tell(book, record, START_NS + 1000 * S) is taken


def test_bounds_are_overflow() -> None:
    book = ledger(BOOK, ENGINE, in_flight=2, engines=1, steps=1)
    assert book.add_engine(EngineRecord(engine_id="f"), START_NS) is Taken.OVERFLOW
    for name, taken in (("a", Taken.ACCEPTED), ("b", Taken.ACCEPTED), ("c", Taken.OVERFLOW)):
        record = RequestRecord(request_id=name, model="m", arrival_ns=START_NS, status=Status.RUNNING)
        assert book.add_request(record, START_NS) is taken
    for at, taken in ((1, Taken.ACCEPTED), (2, Taken.OVERFLOW)):
        step = StepRecord(engine_id="e", start_ns=START_NS, end_ns=START_NS + at, decode=("a", "unknown"))
        assert book.add_step(step, START_NS + 10) is taken


def test_requests_that_only_steps_name_wait_and_expire() -> None:
    run = Simulator(LLAMA, rate=4, seconds=5, seed=10).run()
    book = ledger()
    devices = views({"g": run.timeline(seconds_after=400)})
    known = run.jobs[: len(run.jobs) // 2]
    told = [record for job in known for record in job.live("e")]
    drive(book, devices, [*steps_of(run), *told], run.end_ns + 5 * S)
    mine = sum(run.truth[job.request_id] for job in known)
    rest = sum(run.step_joules) - mine
    assert book.snapshot().pending_joules["e"] == pytest.approx(rest, rel=1e-6)
    # A description that comes later still finds everything.
    late = run.jobs[-1]
    assert book.add_request(late.record("e"), run.end_ns + 6 * S) is Taken.ACCEPTED
    book.settle(devices, run.end_ns + 7 * S)
    answer = book.price(late.request_id)
    assert answer is not None and answer.final
    assert answer.energy_joules == pytest.approx(run.truth[late.request_id], rel=1e-6)
    book.expire(run.end_ns + 400 * S)
    seen = book.snapshot()
    assert seen.pending_joules["e"] == pytest.approx(0, abs=1e-6)
    assert seen.unattributed_joules["g"] == pytest.approx(rest - answer.energy_joules, rel=1e-6)
    assert residual(book) < 1e-9


def test_requests_without_end_expire_as_failed() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 1001)], [100.0] * 1000)
    book = ledger()
    book.add_request(RequestRecord(request_id="x", model="m", arrival_ns=START_NS, first_token_ns=START_NS), START_NS)
    book.settle(views({"g": line}), START_NS + 999 * S)
    book.expire(START_NS + 999 * S)
    book.settle(views({"g": line}), START_NS + 1002 * S, close_ns=START_NS + 1000 * S)
    assert book.snapshot().requests == {("m", "", Status.FAILED): 1}


def test_an_engine_that_is_gone_makes_room_and_owns_no_device_and_may_come_back() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 1101)], [100.0] * 1100)
    book = ledger(BOOK, ENGINE, engines=1)

    def request(name: str, at: int, **fields: str) -> RequestRecord:
        begin_ns = START_NS + at * S
        return RequestRecord(
            request_id=name, model="m", arrival_ns=begin_ns, first_token_ns=begin_ns, end_ns=begin_ns + 10 * S, **fields
        )

    assert book.add_request(request("x", 0), START_NS + 10 * S) is Taken.ACCEPTED
    book.settle(views({"g": line}), START_NS + 902 * S)
    before = book.snapshot()
    book.expire(START_NS + 912 * S)
    assert book.snapshot().coverage == {}
    assert book.snapshot().attributed_joules == before.attributed_joules
    assert book.dump().engines == []
    # Its place is free, and what names no engine can only mean the new one.
    assert book.add_engine(EngineRecord(engine_id="f", models=("m",)), START_NS + 912 * S) is Taken.ACCEPTED
    assert book.add_request(request("y", 950), START_NS + 960 * S) is Taken.ACCEPTED
    book.settle(views({"g": line}), START_NS + 1100 * S, close_ns=START_NS + 1000 * S)
    seen = book.snapshot()
    assert seen.attributed_joules["m", "", "f", Phase.DECODE] == pytest.approx(1000)
    assert seen.allocated_joules["m", "", "e"] == before.allocated_joules["m", "", "e"]
    assert residual(book) < 1e-9
    old = book.price("x")
    assert old is not None and old.final and old.engine_id == "e"
    # No room for it now; later it is back with the first thing that it tells.
    assert book.add_request(request("z", 1000, engine_id="e"), START_NS + 1010 * S) is Taken.UNKNOWN_ENGINE
    book.expire(START_NS + 2000 * S)
    assert book.add_request(request("z", 1990, engine_id="e"), START_NS + 2000 * S) is Taken.ACCEPTED
    assert book.add_request(request("x", 0, engine_id="e"), START_NS + 2000 * S) is Taken.DUPLICATE


def test_requests_of_an_engine_without_device_end_with_nothing() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 92)], [100.0] * 91)
    devices = views({"g": line, "h": line})
    # On a node of two GPUs nobody knows which one it uses.
    book = ledger(BOOK, ENGINE, in_flight=2)
    step = StepRecord(engine_id="e", start_ns=START_NS, end_ns=START_NS + S, decode=("x",))
    book.add_step(step, START_NS + S)
    for name in "xy":
        record = RequestRecord(request_id=name, model="m", arrival_ns=START_NS, end_ns=START_NS + S)
        assert book.add_request(record, START_NS + S) is Taken.ACCEPTED
    for second in (30, 90, 91):
        book.settle(devices, START_NS + second * S)
        book.expire(START_NS + second * S)
    assert [answer.energy_joules for answer in map(book.price, "xy") if answer is not None and answer.final] == [0, 0]
    assert book.snapshot().in_flight == {"e": 0}
    line.extend([START_NS + t * S for t in range(92, 201)], [100.0] * 109)
    # Once its device is known, it pays from then on.
    book.add_engine(replace_devices("g"), START_NS + 100 * S)
    begin = RequestRecord(request_id="z", model="m", arrival_ns=START_NS + 100 * S, first_token_ns=START_NS + 100 * S)
    assert book.add_request(begin, START_NS + 100 * S) is Taken.ACCEPTED
    assert book.add_request(RequestRecord(request_id="z", end_ns=START_NS + 120 * S), START_NS + 120 * S) is (
        Taken.ACCEPTED
    )
    book.settle(devices, START_NS + 201 * S, close_ns=START_NS + 200 * S)
    answer = book.price("z")
    assert answer is not None and answer.final
    assert answer.energy_joules == pytest.approx(2000)
    assert residual(book) < 1e-9


def test_a_nonsense_arrival_does_not_hold_the_account_open() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 101)], [100.0] * 100)
    book = ledger()
    book.settle(views({"g": line}), START_NS + 5 * S)
    running = RequestRecord(request_id="n", model="m", arrival_ns=1, first_token_ns=START_NS + 80 * S)
    assert book.add_request(running, START_NS + 80 * S) is Taken.ACCEPTED
    ended = RequestRecord(request_id="o", model="m", arrival_ns=1, end_ns=START_NS + 85 * S)
    assert book.add_request(ended, START_NS + 85 * S) is Taken.ACCEPTED
    arrived = RequestRecord(request_id="p", model="m", arrival_ns=1)
    assert book.add_request(arrived, START_NS + 85 * S) is Taken.ACCEPTED
    book.expire(START_NS + 90 * S)
    book.settle(views({"g": line}), START_NS + 101 * S)
    # Still the hold of a feed that is not known yet (15 s) and the lag of 1 s, not 720 s.
    assert book.snapshot().settled_ns == START_NS + 85 * S
    assert book.snapshot().in_flight == {"e": 2}


def test_one_record_that_comes_very_late_does_not_hold_back_the_others() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 801)], [100.0] * 800)
    book = ledger()
    for second in (700, 710, 720, 730):
        # Three are told as they end after 1 s, one 600 s after it began.
        begin_ns = START_NS + (second - (600 if second == 720 else 1)) * S
        record = RequestRecord(request_id=str(second), model="m", arrival_ns=begin_ns, end_ns=START_NS + second * S)
        assert book.add_request(record, START_NS + second * S) is Taken.ACCEPTED
    book.settle(views({"g": line}), START_NS + 800 * S)
    # Behind by 1 s of lag and at most 1.25 s of hold.
    assert book.snapshot().settled_ns >= START_NS + 797 * S


def test_energy_flows_to_the_account_while_a_request_runs() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 101)], [100.0] * 100)
    book = ledger()
    book.add_request(
        RequestRecord(request_id="x", model="m", tenant="t", arrival_ns=START_NS, first_token_ns=START_NS), START_NS
    )
    told = []
    for second in (10, 20, 30):
        book.settle(views({"g": line}), START_NS + second * S)
        told.append(book.snapshot().attributed_joules["m", "t", "e", Phase.DECODE])
    assert told == pytest.approx([900, 1900, 2900], abs=1)
    answer = book.price("x")
    assert answer is not None
    assert not answer.final
    # Behind the horizon it is estimated with the power so far.
    assert answer.energy_joules == pytest.approx(3000, rel=0.01)
    assert answer.low <= 3000 <= answer.high


def test_a_tenant_beyond_the_bound_is_other() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [100.0] * 30)
    book = ledger(BOOK, ENGINE, tenants_per_model=3, models=3)
    told = [
        (
            START_NS + 11 * S,
            RequestRecord(
                request_id=f"{model}{n}",
                model=model,
                tenant=f"t{n}",
                arrival_ns=START_NS + 10 * S,
                first_token_ns=START_NS + 10 * S,
                end_ns=START_NS + 11 * S,
            ),
        )
        for model in ("m0", "m1", "m2", "m3")
        for n in range(50)
    ]
    drive(book, views({"g": line}), told, START_NS + 29 * S)
    counts = book.snapshot().requests
    # The third name is "m", the engine's own model, which bore the idle energy before.
    assert {model for model, _, _ in counts} == {"m0", "m1", "other"}
    assert {tenant for model, tenant, _ in counts if model == "m0"} == {"t0", "t1", "t2", "other"}
    assert sum(counts.values()) == 200
    assert sum(book.snapshot().attributed_joules.values()) == pytest.approx(100)


def test_images_are_units_and_have_no_prefill() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [100.0] * 30)
    book = ledger(BOOK, EngineRecord(engine_id="e", kind="diffusion"))
    record = RequestRecord(
        request_id="x",
        model="flux",
        tenant="t",
        arrival_ns=START_NS + 5 * S,
        end_ns=START_NS + 9 * S,
        status=Status.FINISHED,
        usage=Usage(unit=Unit.IMAGE, count=4),
    )
    drive(book, views({"g": line}), [(START_NS + 9 * S, record)], START_NS + 29 * S)
    answer = book.price("x")
    assert answer is not None
    assert (answer.prefill_joules, answer.decode_joules) == pytest.approx((0, 400))
    assert answer.joules_per_output_token is None
    assert book.snapshot().units == {("flux", "t", Unit.IMAGE): 4}


def test_tokens_and_histogram_with_exemplars() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 31)], [100.0] * 30)
    book = ledger()
    record = RequestRecord(
        request_id="x",
        model="m",
        tenant="t",
        trace_id="0" * 31 + "1",
        arrival_ns=START_NS + 5 * S,
        first_token_ns=START_NS + 5 * S,
        end_ns=START_NS + 9 * S,
        status=Status.FINISHED,
        usage=Usage(input=100, cached_input=40, output=7),
    )
    drive(book, views({"g": line}), [(START_NS + 9 * S, record)], START_NS + 29 * S)
    seen = book.snapshot()
    assert seen.tokens == {("m", "t", "input"): 100, ("m", "t", "cached_input"): 40, ("m", "t", "output"): 7}
    buckets = seen.request_joules["m"]
    # 400 J: the bound below is 204.8, the one above 409.6.
    at = next(i for i, bound in enumerate(buckets.bounds) if bound > 400)
    assert buckets.bounds[at] == pytest.approx(409.6)
    assert buckets.counts[at - 1 : at + 1] == (0, 1)
    assert buckets.counts[-1] == 1
    exemplar = buckets.exemplars[at]
    assert exemplar is not None and exemplar[0] == "0" * 31 + "1"
    assert buckets.total_joules == pytest.approx(400)


def test_a_device_that_stands_still_does_not_hold_back_the_other() -> None:
    run = Simulator(LLAMA, rate=4, seconds=10, seed=11).run()
    stuck = Timeline(START_NS)
    stuck.extend([START_NS + S], [100.0])
    book = ledger(BOOK, replace_devices("g", "stuck"))
    drive(
        book,
        views({"g": run.timeline(seconds_after=100), "stuck": stuck}),
        [*steps_of(run), *live(run)],
        run.end_ns + 60 * S,
    )
    answer = book.price(run.jobs[-1].request_id)
    assert answer is not None and answer.final
    assert residual(book) < 1e-9


def test_restart_goes_on_where_it_was() -> None:
    run = Simulator(LLAMA, rate=6, seconds=10, seed=12).run()
    devices = views({"g": run.timeline(seconds_after=30)})
    told = sorted([*steps_of(run), *live(run)], key=lambda one: one[0])
    middle = START_NS + 5 * S
    book = ledger()
    drive(book, devices, [one for one in told if one[0] <= middle], middle)
    before = book.snapshot()
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(book.dump()), type=LedgerState)
    again = Ledger.restore(state, Limits(), BOOK, start_ns=middle)
    assert again.snapshot().attributed_joules == pytest.approx(before.attributed_joules)
    assert again.snapshot().requests == before.requests
    assert again.snapshot().tokens == before.tokens
    # What the engine sent while nobody listened, and what the old process had not settled, is sent once more.
    at = middle
    for t_ns, record in told:
        if t_ns > middle - 2 * S:
            tell(again, record, max(t_ns, middle))
    while at < run.end_ns + 5 * S:
        at += S
        again.settle(devices, at)
    assert residual(again) < 1e-9
    assert sum(again.snapshot().requests.values()) == len(run.jobs)
    unfinished = [job for job in run.jobs if job.arrival_ns > middle]
    errors = relative_errors(
        {job.request_id: again.price(job.request_id).energy_joules for job in unfinished},  # type: ignore[union-attr]
        {job.request_id: run.truth[job.request_id] for job in unfinished},
    )
    assert errors[1] < 1e-6


def test_a_clock_that_was_ahead_before_a_restart_makes_nothing_late() -> None:
    ahead = START_NS + 3600 * S
    line = Timeline(ahead)
    line.extend([ahead + t * S for t in range(1, 31)], [100.0] * 30)
    book = ledger()
    cut = RequestRecord(request_id="cut", model="m", arrival_ns=ahead + S, first_token_ns=ahead + S)
    book.add_request(cut, ahead + S)
    book.settle(views({"g": line}), ahead + 30 * S)
    again = Ledger.restore(book.dump(), Limits(), BOOK, start_ns=START_NS)
    fresh = Timeline(START_NS)
    fresh.extend([START_NS + t * S for t in range(1, 31)], [100.0] * 30)
    record = RequestRecord(
        request_id="x", model="m", arrival_ns=START_NS + S, first_token_ns=START_NS + S, end_ns=START_NS + 11 * S
    )
    assert again.add_request(record, START_NS + 11 * S) is Taken.ACCEPTED
    end = RequestRecord(request_id="cut", end_ns=START_NS + S, status=Status.CANCELLED)
    assert again.add_request(end, START_NS + 11 * S) is Taken.ACCEPTED
    again.settle(views({"g": fresh}), START_NS + 31 * S, close_ns=START_NS + 30 * S)
    answer = again.price("x")
    assert answer is not None and answer.final
    assert answer.energy_joules == pytest.approx(1000)
    assert again.snapshot().in_flight == {"e": 0}


def test_prefill_parts_pay_by_tokens() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + 10 * S], [10_000.0])
    law = Law(fixed_joules=1.0, prefill_token_joules=0.01, decode_sequence_joules=0.1)
    book = ledger(LawBook(default=law))
    step = StepRecord(
        engine_id="e",
        start_ns=START_NS + S,
        end_ns=START_NS + S + 10 * MS,
        decode=("d",),
        prefill=(PrefillPart(request_id="p", tokens=100), PrefillPart(request_id="q", tokens=50)),
    )
    book.add_step(step, step.end_ns)
    for name in "dpq":
        book.add_request(RequestRecord(request_id=name, model="m", arrival_ns=START_NS + S), step.end_ns)
    book.settle(views({"g": line}), START_NS + 12 * S, close_ns=START_NS + 10 * S)
    # 10 J measured; the law says 1 + 1.5 + 0.1 = 2.6 J.
    scale = 10 / 2.6
    answers = {name: book.price(name) for name in "dpq"}
    expected = {"d": 1 / 3 + 0.1, "p": 1 / 3 + 1.0, "q": 1 / 3 + 0.5}
    # Behind the step nothing is known of them: no first token, so they wait.
    for name, joules in expected.items():
        answer = answers[name]
        assert answer is not None
        assert answer.energy_joules == pytest.approx(joules * scale)
        assert answer.fixed_joules == pytest.approx(scale / 3)


def test_a_feed_that_knows_the_engine_s_name_of_a_request_tells_of_the_same_one() -> None:
    """vLLM calls `req-0` `chatcmpl-req-0`; the proxy knows what the client sent (captured vLLM 0.32 feeds)."""
    book = ledger()
    for number, prefix, suffix in ((0, "chatcmpl-", ""), (1, "cmpl-", "-0"), (2, "", "")):
        arrival_ns = START_NS + number * S
        start = RequestRecord(request_id=f"req-{number}", engine_id="e", arrival_ns=arrival_ns, status=Status.RUNNING)
        end = RequestRecord(
            request_id=f"{prefix}req-{number}{suffix}",
            engine_id="e",
            model="m",
            arrival_ns=arrival_ns,
            first_token_ns=arrival_ns + 100 * MS,
            end_ns=arrival_ns + 900 * MS,
            usage=Usage(input=100, output=10),
        )
        members = StepRecord(
            engine_id="e", start_ns=arrival_ns, end_ns=arrival_ns + 800 * MS, decode=(f"{prefix}req-{number}{suffix}",)
        )
        assert [tell(book, one, arrival_ns + S) for one in (start, members, end)] == [Taken.ACCEPTED] * 3
        assert tell(book, msgspec.structs.replace(end, request_id=f"req-{number}"), arrival_ns + S) is Taken.DUPLICATE
        answers = {book.price(f"{one}req-{number}{two}") for one, two in ((prefix, suffix), ("", ""))}
        assert len(answers) == 1
    assert sum(book.snapshot().in_flight.values()) == 0


def test_running_requests_are_listed_by_joules_and_ended_ones_are_not() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + t * S for t in range(1, 101)], [100.0] * 100)
    book = ledger()
    for request_id, arrival in (("late", 8), ("early", 0), ("done", 0)):
        begin_ns = START_NS + arrival * S
        end_ns = START_NS + 5 * S if request_id == "done" else None
        book.add_request(
            RequestRecord(
                request_id=request_id, model="m", arrival_ns=begin_ns, first_token_ns=begin_ns, end_ns=end_ns,
                status=Status.FINISHED if end_ns else None,
            ),
            begin_ns,
        )  # fmt: skip
    book.settle(views({"g": line}), START_NS + 20 * S)
    told = book.running(10)
    assert [one.request_id for one in told] == ["early", "late"]
    assert not any(one.final for one in told)
    assert [book.price(one.request_id) for one in told] == told
    assert [one.request_id for one in book.running(1)] == ["early"]
