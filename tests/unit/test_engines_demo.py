import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web
from tests.recording_account import RecordingAccount, Totals

from jouletrace.daemon import demo_recording
from jouletrace.engines.demo import RecordedEngine, within
from jouletrace.gpu.replay import Course, ReplaySource
from jouletrace.requests.inbox import Inbox
from jouletrace.requests.records import RequestRecord, StepRecord
from jouletrace.requests.service import LedgerService
from jouletrace.trace import events, recording
from jouletrace.web.api import Api
from jouletrace.web.serve import WebServer

SPEED = 300.0


async def played(path: Path, seconds: float, *, loop: bool) -> tuple[RecordingAccount, ReplaySource]:
    """Return what a daemon was told in so many seconds."""
    source = ReplaySource(path, speed=SPEED, loop=loop)
    account, inbox = RecordingAccount(), Inbox()
    service: LedgerService[float, Totals] = LedgerService(account, inbox, clock=source.clock, devices=lambda: 0.0)
    app = web.Application()
    app.add_routes(Api(service, inbox, clock=source.clock).routes())
    server = WebServer(app)
    await server.start(["127.0.0.1:0"])
    source.open()
    engine = RecordedEngine(recording.read(path), source, server.urls[0])
    serving = asyncio.create_task(service.run())
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.run(), seconds)
        await asyncio.sleep(0.2)
    finally:
        await server.stop()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        source.close()
    assert inbox.events().dropped == {}
    return account, source


async def test_the_requests_of_the_demo_arrive_as_they_were_recorded() -> None:
    account, source = await played(demo_recording(), 20, loop=False)
    told = [record for record in account.records if isinstance(record, RequestRecord)]
    steps = [record for record in account.records if isinstance(record, StepRecord)]
    truth = recording.read(demo_recording()).events
    kinds = Counter(event["kind"] for event in truth)
    assert (len(told), len(steps)) == (3 * kinds["request_end"], kinds["iteration"])
    ends = {record.request_id: record for record in told if record.end_ns is not None}
    assert len(ends) == 725
    output = sum(record.usage.output for record in ends.values() if record.usage is not None)
    assert output == sum(event["output_tokens"] for event in truth if event["kind"] == "request_end")
    # The ledger's time is the replay's: durations are as recorded, whatever the speed.
    starts = {record.request_id: record for record in told if record.arrival_ns is not None}
    first = next(event for event in truth if event["kind"] == "request_end")
    recorded_ns = first["t_ns"] - next(
        event["t_ns"] for event in truth if event["kind"] == "request_start" and event["id"] == first["id"]
    )
    [name] = [request_id for request_id in ends if request_id.endswith(f"-0-{first['id']}")]
    end_ns, arrival_ns = ends[name].end_ns, starts[name].arrival_ns
    assert end_ns is not None
    assert arrival_ns is not None
    assert end_ns - arrival_ns == pytest.approx(recorded_ns, abs=2 * SPEED)
    assert source.course is not None
    assert end_ns == pytest.approx(source.course.to_replay(first["t_ns"]), abs=2 * SPEED)
    assert {name.rpartition("-0-")[0] for name in ends} == {f"{source.course.origin_ns // 10**9:x}"}
    members = {request_id for step in steps for request_id in step.decode or ()}
    assert members <= set(starts)


async def test_each_lap_has_requests_of_its_own() -> None:
    account, _ = await played(demo_recording(), 2.2, loop=True)
    laps = Counter(
        record.request_id.split("-")[1]
        for record in account.records
        if isinstance(record, RequestRecord) and record.end_ns is not None
    )
    assert laps["0"] == laps["1"] == 725


def test_requests_that_a_lap_would_cut_are_left_out() -> None:
    whole = recording.read(demo_recording())
    sent = list(events.records(whole, events.Fidelity.STEPS))
    ends = [(t_ns, r) for t_ns, r in sent if isinstance(r, RequestRecord) and r.end_ns is not None]
    begin_ns, end_ns = ends[100][0], ends[300][0]
    kept = within(sent, Course(begin_ns, end_ns, 0, True))
    counts = Counter(r.request_id for _, r in kept if isinstance(r, RequestRecord))
    assert set(counts.values()) == {3}
    assert 150 < len(counts) < 200
    assert all(begin_ns <= r.start_ns <= r.end_ns <= end_ns for _, r in kept if isinstance(r, StepRecord))
