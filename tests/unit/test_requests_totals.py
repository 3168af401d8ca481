"""What an engine has used and done, as the diagnosis reads it: joules and work of the same time belong together."""

from pathlib import Path

import numpy as np
import pytest
from tests.ledger_driver import drive, tell, views
from tests.request_truth import README_GRID
from tests.step_simulator import START_NS, Cost, S, Simulator

from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import PowerSamples
from jouletrace.requests.account import EngineState, EngineTotals
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.law import Law, LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, RequestRecord, Status, StepRecord, Unit, Usage
from jouletrace.trace.events import Fidelity, engine_of, records
from jouletrace.trace.recording import Recording, read

CHUNKED = Path(__file__).parents[1] / "data/h200-c-chunked.json.gz"
COST = Cost(3.0, 0.02, 0.06)
BOOK = LawBook(default=Law(fixed_joules=COST.a, prefill_token_joules=COST.c_p, decode_sequence_joules=COST.c_d))


def measured(recording: Recording) -> Timeline:
    ring = recording.streams["power_ring_20ms"]
    meter = Meter(EnergySource.POWER_RING, limit_watts=700.0, architecture="", has_counter=False)
    meter.add_ring(PowerSamples(ring.t_ns, ring.values["mw"]))
    meter.flush()
    assert meter.timeline is not None
    return meter.timeline


def totals_over_time(recording: Recording) -> list[EngineTotals]:
    """The totals after each second of a recording whose steps and requests are told as they happen."""
    line, engine = measured(recording), engine_of(recording)
    assert engine is not None
    ledger = Ledger(Limits(steps=1_000_000), LawBook(), start_ns=line.start_ns)
    ledger.add_engine(engine, line.start_ns)
    told = list(records(recording, Fidelity.STEPS))
    devices = {"g": DeviceView(line, held=True)}
    at, found = 0, []
    for now_ns in range(line.start_ns + S, line.end_ns, S):
        while at < len(told) and told[at][0] <= now_ns:
            tell(ledger, told[at][1], told[at][0])
            at += 1
        ledger.settle(devices, now_ns)
        found.append(ledger.snapshot().engine_totals[engine.engine_id])
    return found


def test_totals_hold_the_work_and_the_energy_of_the_same_steps() -> None:
    recording = read(CHUNKED)
    line = measured(recording)
    times_ns, joules = line.nodes()
    steps = [event for event in recording.events if event["kind"] == "iteration"]
    ends_ns = np.array([event["t_ns"] for event in steps])
    starts_ns = np.array([event["start_ns"] for event in steps])
    energy = np.interp(ends_ns - times_ns[0], times_ns - times_ns[0], joules)
    energy -= np.interp(starts_ns - times_ns[0], times_ns - times_ns[0], joules)
    passes = np.array([event["steps"] for event in steps])
    tokens = np.array([event["prefill"]["tokens"] if event["prefill"] else 0 for event in steps])
    decodes = passes * [len(event["decode"]) for event in steps]
    padded = passes * [event["bucket"] for event in steps]
    a, c_p, c_d = README_GRID
    law = a * passes + c_p * tokens + c_d * padded
    found = totals_over_time(recording)
    assert found[-1].steps == passes.sum()
    windows = 0
    for before, after in zip(found[::10], found[10::10], strict=False):
        inside = (ends_ns > before.settled_ns) & (ends_ns <= after.settled_ns)
        if not inside.any():
            continue
        windows += 1
        assert after.steps - before.steps == passes[inside].sum()
        assert after.step_prefill_tokens - before.step_prefill_tokens == tokens[inside].sum()
        assert after.step_decode_sequences - before.step_decode_sequences == decodes[inside].sum()
        used = after.step_joules - before.step_joules
        # The host's time between steps is theirs, too (0.24 % of the energy).
        assert energy[inside].sum() <= used <= 1.005 * energy[inside].sum()
        # The law of the recording's steady grid, by the padded batch that the GPU computed.
        assert used == pytest.approx(law[inside].sum(), rel=0.03)
    assert windows == 11
    last = found[-1]
    assert last.step_joules == pytest.approx(last.busy_joules, rel=1e-4)
    assert last.prefill_joules + last.decode_joules == pytest.approx(last.busy_joules, rel=1e-9)
    assert last.busy_joules + last.idle_joules == pytest.approx(
        np.interp(last.settled_ns - times_ns[0], times_ns - times_ns[0], joules), rel=1e-9
    )
    ended = [event for event in recording.events if event["kind"] == "request_end"]
    assert last.output_tokens == sum(event["output_tokens"] for event in ended)
    assert last.step_seconds == pytest.approx(last.active_seconds, rel=1e-4)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("pass_ns", [S // 7, S, 5 * S])
def test_a_step_that_a_pass_cuts_counts_once_it_is_whole(counted: bool, pass_ns: int) -> None:
    run = Simulator(COST, rate=6, seed=4).run()
    ledger = Ledger(Limits(), BOOK)
    ledger.add_engine(EngineRecord(engine_id="e", models=("m",)), START_NS)
    told = [(step.end_ns, step) for step in (run.counted() if counted else run.steps)]
    devices = views({"g": run.timeline()})
    before, settled = EngineTotals(), 0
    for now_ns in range(START_NS + pass_ns, run.end_ns + 4 * S, pass_ns):
        for t_ns, step in told:
            if now_ns - pass_ns < t_ns <= now_ns:
                tell(ledger, step, t_ns)
        ledger.settle(devices, now_ns)
        now = ledger.snapshot().engine_totals["e"]
        work = COST.a * now.steps + COST.c_p * now.step_prefill_tokens + COST.c_d * now.step_decode_sequences
        assert now.step_joules == pytest.approx(work, rel=1e-6)
        assert now.step_seconds == pytest.approx(work / 600.0, rel=1e-6)
        settled += before.step_joules < now.step_joules
        before = now
    assert settled >= 4
    assert before.step_joules == pytest.approx(sum(run.step_joules), rel=1e-9)


def test_a_step_that_comes_when_half_of_it_is_settled_is_left_out() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + second * S for second in range(1, 31)], [100.0] * 30)
    ledger = Ledger(Limits(), BOOK)
    ledger.add_engine(EngineRecord(engine_id="e", models=("m",)), START_NS)

    def step(start: int, end: int) -> tuple[int, StepRecord]:
        at = {"start_ns": START_NS + start * S, "end_ns": START_NS + end * S}
        return START_NS + end * S, StepRecord(engine_id="e", decode_requests=2, **at)

    # An engine is waited for 5 s.
    drive(ledger, views({"g": line}), [step(0, 1), step(1, 12), step(12, 13)], START_NS + 25 * S)
    totals = ledger.snapshot().engine_totals["e"]
    assert (totals.steps, totals.step_decode_sequences) == (2, 4)
    assert (totals.step_joules, totals.step_seconds) == pytest.approx((200, 2))
    assert totals.busy_joules > 700


def test_counted_steps_and_named_steps_give_the_same_totals() -> None:
    run = Simulator(COST, rate=6, seed=4).run()
    busy = sum(run.step_joules)
    for steps in (run.steps, run.counted()):
        ledger = Ledger(Limits(), BOOK)
        ledger.add_engine(EngineRecord(engine_id="e", models=("m",)), START_NS)
        told = [(step.end_ns, step) for step in steps] + [one for job in run.jobs for one in job.live("e")]
        drive(ledger, views({"g": run.timeline()}), told, run.end_ns + 4 * S)
        totals = ledger.snapshot().engine_totals["e"]
        fixed = COST.a * len(run.steps)
        assert totals.busy_joules == pytest.approx(busy, rel=1e-9)
        assert totals.prefill_joules == pytest.approx(sum(run.prefill_truth.values()), rel=1e-6)
        assert totals.prefill_joules + totals.decode_joules == pytest.approx(busy, rel=1e-6)
        assert totals.fixed_joules == pytest.approx(fixed, rel=1e-6)
        assert totals.steps == len(run.steps)
        assert totals.output_tokens == sum(job.done for job in run.jobs)
        assert totals.input_tokens == sum(job.tokens for job in run.jobs)
        members = [len(step.prefill or ()) + len(step.decode or ()) for step in run.steps]
        lasted = [(step.end_ns - step.start_ns) / S for step in run.steps]
        assert totals.sequence_seconds == pytest.approx(float(np.dot(members, lasted)), rel=1e-6)
        assert totals.active_seconds == pytest.approx(sum(lasted), rel=1e-6)


def test_totals_by_boundaries_alone() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + second * S for second in range(1, 41)], [100.0] * 40)
    ledger = Ledger(Limits(), BOOK)
    ledger.add_engine(EngineRecord(engine_id="e", kind="vllm", models=("m",)), START_NS)

    def image(name: str, start: int, end: int) -> tuple[int, RequestRecord]:
        usage = Usage(unit=Unit.IMAGE, count=3)
        at = {"arrival_ns": START_NS + start * S, "end_ns": START_NS + end * S}
        return START_NS + end * S, RequestRecord(request_id=name, model="m", status=Status.FINISHED, usage=usage, **at)

    drive(ledger, views({"g": line}), [image("x", 4, 10), image("y", 8, 12)], START_NS + 60 * S)
    totals = ledger.snapshot().engine_totals["e"]
    assert (totals.active_seconds, totals.sequence_seconds) == pytest.approx((8.0, 10.0))
    assert totals.busy_joules == pytest.approx(800)
    assert totals.idle_joules == pytest.approx(3200)
    assert totals.decode_joules == pytest.approx(800)
    assert totals.units == {Unit.IMAGE: 6.0}
    assert totals.steps == totals.step_joules == totals.output_tokens == 0
    assert totals.settled_ns == START_NS + 40 * S


def test_the_newest_step_tells_of_the_queue() -> None:
    ledger = Ledger(Limits(), BOOK)
    ledger.add_engine(EngineRecord(engine_id="e", models=("m",), max_num_seqs=256), START_NS)
    ledger.add_engine(EngineRecord(engine_id="f", models=("n", "o"), gpu_uuids=("g",)), START_NS)

    def step(second: int, **queue: float) -> StepRecord:
        end_ns = START_NS + second * S
        return StepRecord(engine_id="e", start_ns=end_ns - 1, end_ns=end_ns, decode_requests=1, **queue)

    ledger.settle(views({"g": Timeline(START_NS)}), START_NS)
    for record in (step(2, running=3, waiting=7, kv_usage=0.5), step(1, running=9), step(3)):
        ledger.add_step(record, START_NS + 3 * S)
    seen = ledger.snapshot()
    assert seen.engine_states["e"] == EngineState(START_NS + 2 * S, 3, 7, 0.5, 256)
    assert seen.engine_states["f"] == EngineState()
    assert seen.engine_devices == {"e": ("g",), "f": ("g",)}
    assert seen.engine_models == {"e": ("m",), "f": ("n", "o")}


def test_work_of_nobody_known_is_unclaimed_until_a_late_request_takes_its_part() -> None:
    line = Timeline(START_NS)
    line.extend([START_NS + second * S for second in range(1, 81)], [100.0] * 80)
    busy = BusyTrack(np.arange(START_NS + S, START_NS + 81 * S, S), np.ones(80, np.bool_))
    ledger = Ledger(Limits(), BOOK)
    ledger.add_engine(EngineRecord(engine_id="e", kind="vllm", models=("m",)), START_NS)
    at = {"arrival_ns": START_NS + 5 * S, "end_ns": START_NS + 15 * S}
    late = RequestRecord(request_id="x", model="m", status=Status.FINISHED, usage=Usage(output=10), **at)
    devices = views({"g": line}, busy)
    drive(ledger, devices, [], START_NS + 60 * S)
    before = ledger.snapshot().engine_totals["e"]
    assert before.busy_joules == before.unclaimed_joules > 4000
    drive(ledger, devices, [(START_NS + 60 * S, late)], START_NS + 80 * S)
    after = ledger.snapshot().engine_totals["e"]
    assert after.busy_joules - after.unclaimed_joules == pytest.approx(1000, rel=1e-6)
    assert (after.ended_requests, after.made_joules, after.output_tokens) == pytest.approx((1, 1000, 10), rel=1e-6)
