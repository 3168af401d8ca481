from pathlib import Path

import numpy as np
import pytest
from tests.ledger_driver import tell

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.devices import DeviceView
from jouletrace.requests.law import LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, RequestRecord, Status, Usage
from jouletrace.trace import metering
from jouletrace.trace.events import Fidelity, engine_of, records, schedule_of
from jouletrace.trace.recording import device_info, read

ROOT = Path(__file__).parents[2]
START_NS = 1_795_373_000_000_000_000
S = 1_000_000_000


def constant(watts: float, seconds: float) -> Timeline:
    """Return a timeline of constant power that is known for so long."""
    timeline = Timeline(START_NS)
    ends = START_NS + (np.arange(1, round(seconds * 50) + 1) * 20_000_000)
    timeline.extend(ends, np.full(len(ends), watts * 0.02))
    return timeline


def running(name: str, arrival_s: float) -> RequestRecord:
    arrival_ns = START_NS + round(arrival_s * S)
    return RequestRecord(
        request_id=name,
        engine_id="e",
        model="m",
        arrival_ns=arrival_ns,
        first_token_ns=arrival_ns,
        status=Status.RUNNING,
        usage=Usage(input=1),
    )


def test_what_is_not_settled_yet_adds_up_to_the_meter_and_goes_on_at_its_last_power() -> None:
    ledger = Ledger(Limits(), LawBook())
    ledger.add_engine(EngineRecord(engine_id="e", models=("m",)), START_NS)
    view = DeviceView(constant(400.0, 4.0), held=True)
    ledger.settle({"GPU-0": view}, START_NS + S // 10)
    for name, arrival_s in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        tell(ledger, running(name, arrival_s), START_NS + 5 * S)
    found = {name: ledger.price(name, "e") for name in "abc"}
    joules = {name: one.energy_joules for name, one in found.items() if one is not None}
    # From 1 s to 5 s somebody was active; the timeline ends at 4 s.
    assert sum(joules.values()) == pytest.approx(4 * 400.0, rel=1e-6)
    assert [joules[name] / sum(joules.values()) for name in "abc"] == pytest.approx([4 / 9, 3 / 9, 2 / 9], rel=1e-6)


@pytest.mark.parametrize("name", ["exporter/jouletrace/demo/recording.json.gz", "tests/data/h200-c-chunked.json.gz"])
def test_the_figure_at_a_request_s_end_is_near_the_final_one(name: str) -> None:
    recording = read(ROOT / name)
    info, source = device_info(recording), metering.energy_source(recording)
    first_ns, last_ns = metering.span_of(recording, source)
    engine, schedule = engine_of(recording), schedule_of(recording)
    assert engine is not None
    assert schedule is not None
    ledger = Ledger(Limits(), LawBook(schedules={engine.engine_id: schedule}), start_ns=first_ns)
    ledger.add_engine(engine, first_ns)
    meter = metering.new_meter(recording, source, info)
    told = iter([one for one in records(recording, Fidelity.BOUNDARIES) if one[0] <= last_ns])
    waiting = next(told, None)
    estimates: dict[str, float] = {}
    for _ in metering.feed(meter, recording):
        timeline = meter.timeline
        if timeline is None or timeline.end_ns > last_ns:
            continue
        ledger.settle({info.uuid: DeviceView(timeline, held=True)}, timeline.end_ns)
        # Records of the next second come before its energy is known.
        while waiting is not None and waiting[0] <= timeline.end_ns + 9 * S // 10:
            tell(ledger, waiting[1], waiting[0])
            record = waiting[1]
            if isinstance(record, RequestRecord) and record.end_ns is not None:
                estimate = ledger.price(record.request_id)
                assert estimate is not None
                assert not estimate.final
                estimates[record.request_id] = estimate.energy_joules
            waiting = next(told, None)
    meter.flush()
    assert meter.timeline is not None
    ledger.settle({info.uuid: DeviceView(meter.timeline, held=True)}, last_ns, close_ns=last_ns)
    finals = {request_id: ledger.price(request_id) for request_id in estimates}
    pairs = [(estimates[key], one.energy_joules) for key, one in finals.items() if one is not None and one.final]
    errors = [abs(estimate / final - 1) for estimate, final in pairs if final > 0.5]
    assert len(errors) > 500
    assert np.median(errors) < 0.15
    assert np.quantile(errors, 0.95) < 0.6
    assert sum(estimate for estimate, _ in pairs) == pytest.approx(sum(final for _, final in pairs), rel=0.1)
