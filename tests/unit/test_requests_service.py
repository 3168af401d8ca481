import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs
from tests.recording_account import RecordingAccount, Totals

from jouletrace.clock import Clock, SystemClock
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.replay import ReplayClock
from jouletrace.requests.account import Taken
from jouletrace.requests.devices import DeviceView
from jouletrace.requests.inbox import Inbox, Origin
from jouletrace.requests.journal import Journal
from jouletrace.requests.law import LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, Record, RequestRecord, Status, StepRecord, Usage
from jouletrace.requests.service import LedgerService
from jouletrace.requests.state import LedgerState


def request(number: int, **fields: Any) -> RequestRecord:
    return RequestRecord(request_id=f"r{number}", **fields)


class Rig:
    """A service at work on a recording account."""

    def __init__(
        self,
        judge: Callable[[Record], Taken] | None = None,
        journal: Journal[Totals] | None = None,
        clock: Clock | None = None,
        settle_seconds: float = 0.02,
    ) -> None:
        self.account = RecordingAccount() if judge is None else RecordingAccount(judge)
        self.inbox = Inbox()
        self.clock = clock or SystemClock()
        self.service: LedgerService[float, Totals] = LedgerService(
            self.account,
            self.inbox,
            clock=self.clock,
            devices=lambda: 7.5,
            journal=journal,
            settle_seconds=settle_seconds,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.service.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_records_reach_the_ledger_in_order_with_the_time() -> None:
    rig = Rig()
    before_ns = rig.clock.now_ns()
    async with rig.running():
        sent: list[Record] = [
            EngineRecord(engine_id="e"),
            StepRecord(engine_id="e", start_ns=1, end_ns=2, decode=("r0",)),
            *(request(i) for i in range(200)),
        ]
        rig.inbox.offer(Origin.HTTP, sent[:2])
        rig.inbox.offer(Origin.STREAM, sent[2:])
        await asyncio.wait_for(rig.inbox.drained(), 5)
    assert rig.account.records == sent
    assert all(before_ns <= at <= rig.clock.now_ns() for at in rig.account.booked_ns)


async def test_settles_with_the_devices_and_then_shows() -> None:
    rig = Rig()
    assert rig.service.snapshot.settled_ns == 0
    async with rig.running():
        rig.inbox.offer(Origin.HTTP, [request(1)])
        await asyncio.sleep(0.15)
        shown = rig.service.snapshot
    assert shown.device_joules == {"GPU-0": 1.0}
    assert 4 <= len(rig.account.settled) <= 10
    assert {devices for devices, _ in rig.account.settled} == {7.5}
    times = [at for _, at in rig.account.settled]
    assert times == sorted(times)


async def test_what_the_ledger_turns_down_is_counted_by_origin_and_reason() -> None:
    reasons = {"r0": Taken.DUPLICATE, "r1": Taken.LATE, "r2": Taken.ACCEPTED}

    def judge(record: Record) -> Taken:
        assert isinstance(record, RequestRecord)
        return reasons[record.request_id]

    rig = Rig(judge)
    async with rig.running():
        rig.inbox.offer(Origin.HTTP, [request(0), request(1), request(2)])
        rig.inbox.offer(Origin.DATAGRAM, [request(0)])
        await asyncio.wait_for(rig.inbox.drained(), 5)
    events = rig.service.events()
    assert events.received == {"http": 3, "datagram": 1}
    assert events.dropped == {("http", "duplicate"): 1, ("http", "late"): 1, ("datagram", "duplicate"): 1}


async def test_a_record_that_breaks_the_ledger_costs_only_itself() -> None:
    def judge(record: Record) -> Taken:
        if isinstance(record, RequestRecord) and record.request_id in ("r1", "r2"):
            raise ZeroDivisionError
        return Taken.ACCEPTED

    rig = Rig(judge)
    with capture_logs() as logs:
        async with rig.running():
            rig.inbox.offer(Origin.HTTP, [request(i) for i in range(4)])
            await asyncio.wait_for(rig.inbox.drained(), 5)
    assert [r.request_id for r in rig.account.records if isinstance(r, RequestRecord)] == ["r0", "r3"]
    assert rig.service.events().dropped == {("http", "fault"): 2}
    assert [entry["log_level"] for entry in logs] == ["error"]


async def test_a_burst_is_absorbed_while_the_loop_stays_quick() -> None:
    rig = Rig(settle_seconds=1.0)
    records = [request(i) for i in range(50_000)]
    longest = 0.0
    async with rig.running():
        await asyncio.sleep(0)
        for start in range(0, len(records), 500):
            assert rig.inbox.offer(Origin.HTTP, records[start : start + 500])
        while len(rig.inbox):
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)
    assert rig.account.records == records
    # CPU time of the loop: a turn is 2 ms of booking, the rest is for a slower machine.
    assert longest < 0.1


async def test_waiting_for_the_final_answer() -> None:
    rig = Rig(settle_seconds=0.05)
    async with rig.running():
        await asyncio.sleep(0.01)
        rig.inbox.offer(Origin.HTTP, [request(1, arrival_ns=1, end_ns=5, usage=Usage(output=40))])
        at_once = await rig.service.price("r1")
        assert at_once is not None
        assert (at_once.energy_joules, at_once.final) == (40.0, False)
        later = await rig.service.price("r1", wait_seconds=5)
        assert later is not None
        assert later.final


async def test_waiting_ends_in_time_and_for_the_unknown_too() -> None:
    rig = Rig()
    async with rig.running():
        rig.inbox.offer(Origin.HTTP, [request(1, arrival_ns=1)])
        began = time.monotonic()
        running = await rig.service.price("r1", wait_seconds=0.1)
        assert running is not None
        assert not running.final
        assert await rig.service.price("nobody", wait_seconds=0.1) is None
        assert 0.2 <= time.monotonic() - began < 3.0


async def test_an_answer_can_be_waited_for_before_the_record_is_there() -> None:
    rig = Rig()
    async with rig.running():
        waiting = asyncio.create_task(rig.service.price("r1", wait_seconds=5))
        await asyncio.sleep(0.05)
        rig.inbox.offer(Origin.HTTP, [request(1, arrival_ns=1, end_ns=2)])
        answer = await asyncio.wait_for(waiting, 5)
    assert answer is not None
    assert answer.final


async def test_recent_are_the_newest_settled_ones() -> None:
    rig = Rig()
    async with rig.running():
        rig.inbox.offer(Origin.HTTP, [request(i, arrival_ns=1, end_ns=2) for i in range(5)])
        rig.inbox.offer(Origin.HTTP, [request(9, arrival_ns=1), request(1, arrival_ns=1, end_ns=3)])
        await asyncio.wait_for(rig.inbox.drained(), 5)
        await asyncio.sleep(0.1)
        assert [e.request_id for e in await rig.service.recent(3)] == ["r1", "r4", "r3"]
        assert len(await rig.service.recent(100)) == 5


class SteppedClock(SystemClock):
    """A machine whose wall clock was set an hour ahead."""

    def wall_step_ns(self) -> int:
        return 3600 * 10**9


async def test_stamps_are_translated_when_the_wall_clock_was_set() -> None:
    rig = Rig(clock=SteppedClock())
    hour_ns = 3600 * 10**9
    async with rig.running():
        rig.inbox.offer(
            Origin.HTTP,
            [
                request(1, arrival_ns=hour_ns + 5, end_ns=hour_ns + 9),
                StepRecord(engine_id="e", start_ns=hour_ns, end_ns=hour_ns + 1, decode=()),
                request(2, arrival_ns=5),
            ],
        )
        await asyncio.wait_for(rig.inbox.drained(), 5)
    assert rig.account.records == [
        request(1, arrival_ns=5, end_ns=9),
        StepRecord(engine_id="e", start_ns=0, end_ns=1, decode=()),
        request(2, arrival_ns=0),
    ]


async def test_stamps_are_translated_in_a_racing_replay() -> None:
    clock = ReplayClock(10.0)
    rig = Rig(clock=clock)
    wall_ns = time.time_ns()
    async with rig.running():
        rig.inbox.offer(Origin.HTTP, [request(1, arrival_ns=wall_ns, end_ns=wall_ns + 10**9)])
        await asyncio.wait_for(rig.inbox.drained(), 5)
    [record] = rig.account.records
    assert isinstance(record, RequestRecord)
    assert record.arrival_ns is not None
    assert record.end_ns is not None
    assert record.end_ns - record.arrival_ns == pytest.approx(10 * 10**9, abs=10_000)


async def test_the_end_books_settles_and_saves_what_is_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Totals, boot="b")
    assert journal.open() is None
    rig = Rig(journal=journal, settle_seconds=60.0)
    async with rig.running():
        await asyncio.sleep(0.05)
        rig.inbox.offer(Origin.HTTP, [request(i, arrival_ns=1, end_ns=2) for i in range(5000)])
        await asyncio.sleep(0)
    assert len(rig.account.records) == 5000
    assert len(rig.account.settled) == 2
    journal.close()
    kept = Journal(tmp_path, Totals, boot="b").open()
    assert kept is not None
    assert (kept.settlings, kept.joules) == (2, {("m", "t"): 5000.0})


class SlowJournal(Journal[Totals]):
    """A disk that hangs until it is let go."""

    go = threading.Event()

    def write(self, state: Totals) -> None:
        self.go.wait(20)
        super().write(state)


async def test_nothing_is_shown_before_it_is_saved(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path, Totals, boot="b")
    journal.open()
    rig = Rig(journal=journal)
    try:
        async with rig.running():
            await asyncio.sleep(0.1)
            assert len(rig.account.settled) > 1
            assert rig.service.snapshot.settled_ns == 0
            journal.go.set()
            await asyncio.sleep(0.1)
            assert rig.service.snapshot.settled_ns > 0
    finally:
        journal.go.set()


async def test_a_settling_that_fails_leaves_the_last_account_and_is_logged_until_it_ends() -> None:
    rig = Rig()
    with capture_logs() as logs:
        async with rig.running():
            await asyncio.sleep(0.05)
            shown = rig.service.snapshot
            rig.account.settle = lambda devices, now_ns: 1 / 0  # type: ignore[assignment,method-assign]
            await asyncio.sleep(0.1)
            assert rig.service.snapshot == shown
            del rig.account.settle  # type: ignore[method-assign]
            await asyncio.sleep(0.1)
            assert rig.service.snapshot.settled_ns > shown.settled_ns
    failed, recovered = logs
    assert failed["event"].startswith("the account cannot be settled: ")
    assert (failed["log_level"], failed["exc_info"]) == ("warning", True)
    assert recovered["event"] == "the account is settled again"
    assert recovered["occurrences"] > 1
    assert 0.05 < recovered["duration_seconds"] < 5


class SetClock(SystemClock):
    """A clock that stands still until it is set."""

    def __init__(self, ns: int) -> None:
        super().__init__()
        self.ns = ns

    def now_ns(self) -> int:
        return self.ns

    def from_wall(self, wall_ns: int) -> int:
        return wall_ns


SECOND_NS = 10**9
BEGIN_NS = 1_795_373_000 * SECOND_NS


def pass_at_100_watts(timeline: Timeline, seconds: int) -> None:
    """Let a device draw 100 W for some seconds."""
    ends_ns = timeline.end_ns + np.arange(1, seconds * 50 + 1) * 20_000_000
    timeline.extend(ends_ns, np.full(len(ends_ns), 2.0))


async def test_the_real_ledger_goes_on_after_a_restart(tmp_path: Path) -> None:
    def moment(seconds: float) -> int:
        return BEGIN_NS + round(seconds * SECOND_NS)

    def service_of(
        ledger: Ledger, inbox: Inbox, clock: Clock, journal: Journal[LedgerState], timeline: Timeline
    ) -> Any:
        return LedgerService(
            ledger,
            inbox,
            clock=clock,
            devices=lambda: {"GPU-0": DeviceView(timeline, held=True)},
            journal=journal,
            settle_seconds=0.02,
        )

    first, second = Journal(tmp_path, LedgerState, boot="b"), Journal(tmp_path, LedgerState, boot="b")
    assert first.open() is None
    inbox, clock = Inbox(), SetClock(moment(20))
    ledger = Ledger(Limits(), LawBook(), start_ns=BEGIN_NS)
    service = service_of(ledger, inbox, clock, first, timeline := Timeline(BEGIN_NS))
    running = asyncio.create_task(service.run())
    await asyncio.sleep(0.05)
    ended = {"model": "m", "tenant": "t", "status": Status.FINISHED, "usage": Usage(input=10, output=20)}
    inbox.offer(Origin.HTTP, [EngineRecord(engine_id="e", gpu_uuids=("GPU-0",))])
    inbox.offer(
        Origin.HTTP,
        [
            request(1, engine_id="e", arrival_ns=moment(1), first_token_ns=moment(1.5), end_ns=moment(3), **ended),
            request(2, engine_id="e", model="m", tenant="t", arrival_ns=moment(5), first_token_ns=moment(5.5)),
        ],
    )
    await inbox.drained()
    pass_at_100_watts(timeline, 20)
    clock.ns = moment(60)  # Long enough for the ledger to stop waiting for more records about these seconds.
    settled = await service.price("r1", "e", wait_seconds=10)
    assert settled is not None
    assert settled.final
    assert settled.energy_joules == pytest.approx(200, abs=0.1)
    running.cancel()
    await asyncio.wait({running})
    before = service.snapshot
    first.close()

    state = second.open()
    assert state is not None
    inbox, clock = Inbox(), SetClock(moment(40))
    ledger = Ledger.restore(state, Limits(), LawBook(), start_ns=moment(20))
    service = service_of(ledger, inbox, clock, second, timeline := Timeline(moment(20)))
    assert service.snapshot.attributed_joules == before.attributed_joules
    assert service.snapshot.in_flight == {"e": 1}
    running = asyncio.create_task(service.run())
    inbox.offer(Origin.HTTP, [request(2, engine_id="e", end_ns=moment(25), **ended)])
    await inbox.drained()
    pass_at_100_watts(timeline, 20)
    clock.ns = moment(80)
    settled = await service.price("r2", "e", wait_seconds=10)
    running.cancel()
    await asyncio.wait({running})
    second.close()
    assert settled is not None
    assert settled.final
    assert settled.energy_joules == pytest.approx(2000, abs=0.2)
    after = service.snapshot
    assert sum(after.attributed_joules.values()) == pytest.approx(2200, abs=0.5)
    assert all(after.attributed_joules[key] >= joules for key, joules in before.attributed_joules.items())
