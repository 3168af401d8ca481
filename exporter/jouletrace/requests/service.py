"""The ledger at work: fed from the inbox, settled each second, saved, and only then shown."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

import msgspec
import structlog

from jouletrace.clock import Clock
from jouletrace.logs import Transitions
from jouletrace.requests.account import LedgerSnapshot, RequestEnergy, Taken
from jouletrace.requests.inbox import Batch, Events, Inbox
from jouletrace.requests.journal import Journal
from jouletrace.requests.records import EngineRecord, LoadRecord, Record, RequestRecord, Status, StepRecord

SETTLE_SECONDS: Final = 1.0
"""How often the account is settled: as often as the sampler harvests the power ring."""
QUIET_AFTER_SECONDS: Final = 30.0
QUIET_PASSES: Final = 5
"""So many times rarer it is settled once no record has come for that long and no request is in flight: nobody waits
for an answer then, and a pass each second costs 0.3 % of a core."""
TURN_SECONDS: Final = 0.002
"""Longest time for which records are booked before others on the event loop get their turn."""
TURN_RECORDS: Final = 32
"""Records that are booked between two looks at the time."""
SAVE_SECONDS: Final = 5.0
"""A disk that takes longer must not hold back the metrics: what it has not taken is shown all the same."""
UNKNOWN_SECONDS: Final = 0.25
"""How long an unknown request is looked for: its record may still be in the inbox."""
RECENT: Final = 1000
"""Ended requests that `recent` can list."""
FAULT: Final = "fault"
"""The reason of `events_dropped_total` for a record that the ledger failed on."""

_log = structlog.get_logger(__name__)

Devices = TypeVar("Devices")
State = TypeVar("State", bound=msgspec.Struct)
Devices_contra = TypeVar("Devices_contra", contravariant=True)
State_co = TypeVar("State_co", bound=msgspec.Struct, covariant=True)


class Account(Protocol[Devices_contra, State_co]):
    """What the service needs of the ledger. All times are steady epoch nanoseconds."""

    def add_engine(self, record: EngineRecord, now_ns: int) -> Taken:
        """Book an engine."""

    def add_step(self, record: StepRecord, now_ns: int) -> Taken:
        """Book a step."""

    def add_request(self, record: RequestRecord, now_ns: int) -> Taken:
        """Book a request or more about one."""

    def add_load(self, record: LoadRecord, now_ns: int) -> Taken:
        """Book what an engine's own counters say."""

    def settle(self, devices: Devices_contra, now_ns: int) -> None:
        """Distribute the energy that the devices' timelines have by now."""

    def expire(self, now_ns: int) -> None:
        """Forget what is too old."""

    def price(self, request_id: str, engine_id: str | None = None) -> RequestEnergy | None:
        """Return what a request used, None for an unknown one."""

    def running(self, limit: int) -> list[RequestEnergy]:
        """Return estimates for requests that have not ended, those of the most joules so far first."""

    def snapshot(self) -> LedgerSnapshot:
        """Return the account."""

    def dump(self) -> State_co:
        """Return all that a restart needs; later changes of the ledger do not show in it."""


class LedgerService(Generic[Devices, State]):
    """Owns a ledger; everybody else sees its answers.

    Records are booked on the event loop. Settling and dumping take tens of milliseconds when thousands of requests are
    in flight, so they happen in a thread, and the ledger's lock keeps booking and pricing away meanwhile: records
    gather in the inbox, and nobody on the loop waits for the ledger but those who ask it.
    """

    def __init__(
        self,
        ledger: Account[Devices, State],
        inbox: Inbox,
        *,
        clock: Clock,
        devices: Callable[[], Devices],
        journal: Journal[State] | None = None,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._inbox = inbox
        self._clock = clock
        self._devices = devices
        self._journal = journal
        self._settle_seconds = settle_seconds
        self._snapshot = ledger.snapshot()
        self._settled = asyncio.Event()
        self._ledger_lock = asyncio.Lock()
        self._ended: dict[tuple[str, str | None], None] = {}
        self._failing: set[str] = set()
        self._settlings = Transitions(_log, time.monotonic_ns)
        self._saving: asyncio.Task[None] | None = None
        self._saving_since = 0.0
        self._round = self._shown = 0
        self._turn_ends = 0.0

    @property
    def snapshot(self) -> LedgerSnapshot:
        """The account as of the last settling that was saved; may be read from any thread."""
        return self._snapshot

    def events(self) -> Events:
        """Return the counts of records; may be called from any thread."""
        return self._inbox.events()

    async def run(self) -> None:
        """Book and settle until cancelled; then book what is left, settle and save a last time."""
        due = booked = time.monotonic()
        try:
            while True:
                await self._settle_and_show()
                # After a long pause (a suspended machine) once is enough.
                due = max(due + self._settle_seconds, time.monotonic())
                if await self._book_until(due):
                    booked = time.monotonic()
                quiet = time.monotonic() - booked > QUIET_AFTER_SECONDS
                if quiet and not any(self._snapshot.in_flight.values()):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._inbox.filled(), (QUIET_PASSES - 1) * self._settle_seconds)
        finally:
            await self._finish()

    async def price(
        self, request_id: str, engine_id: str | None = None, wait_seconds: float = 0.0
    ) -> RequestEnergy | None:
        """Return what a request used; waits up to `wait_seconds` for it to be final. None when it is unknown."""
        deadline = time.monotonic() + wait_seconds
        energy = await self._price(request_id, engine_id)
        if energy is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._inbox.drained(), UNKNOWN_SECONDS)
            energy = await self._price(request_id, engine_id)
        while energy is None or not energy.final:
            rest = deadline - time.monotonic()
            if rest <= 0:
                break
            try:
                await asyncio.wait_for(self._settled.wait(), rest)
            except TimeoutError:
                break
            energy = await self._price(request_id, engine_id)
        return energy

    async def recent(self, limit: int) -> list[RequestEnergy]:
        """Return the final answers about the requests that ended last, the newest first."""
        found: list[RequestEnergy] = []
        async with self._ledger_lock:
            for request_id, engine_id in reversed(self._ended):
                if len(found) >= limit:
                    break
                energy = self._ledger.price(request_id, engine_id)
                if energy is not None and energy.final:
                    found.append(energy)
        return found

    async def running(self, limit: int) -> list[RequestEnergy]:
        """Return provisional answers about requests in flight, those of the most joules so far first."""
        async with self._ledger_lock:
            return self._ledger.running(limit)

    async def _price(self, request_id: str, engine_id: str | None) -> RequestEnergy | None:
        async with self._ledger_lock:
            return self._ledger.price(request_id, engine_id)

    async def _book_until(self, due: float) -> bool:
        """Book what comes in until a time of the monotonic clock; return whether anything did."""
        booked = False
        while (rest := due - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(rest):
                    await self._inbox.filled()
            except TimeoutError:
                break
            batch = self._inbox.take()
            if batch is not None:
                booked = True
                await self._book_in_turns(batch)
        return booked

    async def _book_in_turns(self, batch: Batch) -> None:
        steps = self._booked(batch)
        try:
            for _ in steps:
                if time.perf_counter() > self._turn_ends:
                    await asyncio.sleep(0)
                    self._turn_ends = time.perf_counter() + TURN_SECONDS
        finally:
            # When cancelled in the middle, the rest of what was taken out is booked all the same.
            for _ in steps:
                pass

    def _booked(self, batch: Batch) -> Iterator[None]:
        """Book a batch, some records for each step of the iterator."""
        steady = self._needs_no_translation()
        now_ns = self._clock.now_ns()
        for start in range(0, len(batch.records), TURN_RECORDS):
            self._book(batch, start, now_ns, steady)
            yield
        self._inbox.done(batch)

    def _book(self, batch: Batch, start: int, now_ns: int, steady: bool) -> None:
        for record in batch.records[start : start + TURN_RECORDS]:
            try:
                taken = self._add(record if steady else self._translated(record), now_ns)
            except Exception:
                self._inbox.refused(batch.origin, FAULT)
                self._complain(
                    "a record could not be booked and was dropped; please report this", type(record).__name__
                )
                continue
            if taken is not Taken.ACCEPTED:
                self._inbox.refused(batch.origin, taken)

    def _add(self, record: Record, now_ns: int) -> Taken:
        if type(record) is RequestRecord:
            taken = self._ledger.add_request(record, now_ns)
            if taken is Taken.ACCEPTED and (record.end_ns is not None or record.status not in (None, Status.RUNNING)):
                self._note_end(record)
            return taken
        if type(record) is StepRecord:
            return self._ledger.add_step(record, now_ns)
        if type(record) is LoadRecord:
            return self._ledger.add_load(record, now_ns)
        assert type(record) is EngineRecord
        return self._ledger.add_engine(record, now_ns)

    def _note_end(self, record: RequestRecord) -> None:
        key = (record.request_id, record.engine_id)
        self._ended.pop(key, None)
        self._ended[key] = None
        if len(self._ended) > RECENT:
            del self._ended[next(iter(self._ended))]

    def _needs_no_translation(self) -> bool:
        """Return whether senders' stamps are on our clock: always, unless the wall clock was set or a replay races."""
        wall_ns = time.time_ns()
        return self._clock.from_wall(wall_ns) == wall_ns

    def _translated(self, record: Record) -> Record:
        """Return the record with its sender's wall-clock stamps on the steady clock."""
        names = tuple(name for name in record.__struct_fields__ if name.endswith("_ns"))
        stamps = {name: getattr(record, name) for name in names}
        return msgspec.structs.replace(
            record, **{name: max(0, self._clock.from_wall(at)) for name, at in stamps.items() if at is not None}
        )

    async def _settle_and_show(self) -> None:
        """Settle; show the account once it is saved, or when saving it takes too long."""
        journal, now = self._journal, time.monotonic()
        is_saving = self._saving is not None and not self._saving.done()
        snapshot, state = await self._settled_in_thread(dump=journal is not None and not is_saving)
        self._round += 1
        if journal is not None and state is not None:
            self._saving_since = now
            self._saving = asyncio.create_task(self._save_and_show(journal, state, snapshot, self._round))
        elif not is_saving or now - self._saving_since > SAVE_SECONDS:
            self._show(snapshot, self._round)

    async def _settled_in_thread(self, dump: bool) -> tuple[LedgerSnapshot, State | None]:
        async with self._ledger_lock:
            settling = asyncio.get_running_loop().run_in_executor(None, self._settle, dump)
            try:
                await asyncio.wait({settling})
            except asyncio.CancelledError:
                # The ledger is the thread's until it is done with it.
                await asyncio.wait({settling})
                raise
            return settling.result()

    def _settle(self, dump: bool) -> tuple[LedgerSnapshot, State | None]:
        """Settle and return the account, and all that a restart needs; the last account when that fails."""
        now_ns = self._clock.now_ns()
        try:
            self._settle_and_expire(now_ns)
            # Also of a settling that failed: what it could settle adds up, and is not lost with the process.
            return self._ledger.snapshot(), self._ledger.dump() if dump else None
        except Exception:
            self._complain("the account cannot be shown and saved; please report this", "snapshot")
            return self._snapshot, None

    def _settle_and_expire(self, now_ns: int) -> None:
        try:
            self._ledger.settle(self._devices(), now_ns)
            self._ledger.expire(now_ns)
        except Exception:
            self._settlings.failed(
                "settle",
                "the account cannot be settled: energy goes unattributed, or the account stands still "
                "(jouletrace_account_age_seconds grows); please report this",
                exc_info=True,
            )
        else:
            self._settlings.recovered("settle", "the account is settled again")

    async def _save_and_show(
        self, journal: Journal[State], state: State, snapshot: LedgerSnapshot, number: int
    ) -> None:
        try:
            await asyncio.to_thread(journal.write, state)
        except Exception:
            self._complain("the account could not be saved; please report this", "journal")
        self._show(snapshot, number)

    def _show(self, snapshot: LedgerSnapshot, number: int) -> None:
        if number < self._shown:  # A disk that hung let go of an old one.
            return
        self._shown = number
        self._snapshot = snapshot
        self._settled.set()
        self._settled = asyncio.Event()

    async def _finish(self) -> None:
        while (batch := self._inbox.take()) is not None:
            for _ in self._booked(batch):
                pass
        if self._saving is not None:
            await asyncio.wait({self._saving}, timeout=SAVE_SECONDS)
        await self._settle_and_show()
        if self._saving is not None:
            await asyncio.wait({self._saving}, timeout=SAVE_SECONDS)

    def _complain(self, sentence: str, about: str, failure: BaseException | None = None) -> None:
        """Log a fault of our own with its traceback, once for each thing that it is about."""
        if about not in self._failing:
            self._failing.add(about)
            _log.error(sentence, about=about, exc_info=failure or True)
