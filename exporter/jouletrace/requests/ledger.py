"""The account of a node: attributed + pending + idle + unattributed = device energy, always.

Records and device timelines come in, joules by request, model and tenant come out. Nothing here reads a clock or does
I/O; times are nanoseconds since the epoch on one steady clock. One thread owns a ledger.

A pass of `settle` takes each group of engines and devices that belong together and hands out the energy between the
last horizon and the next. Requests in flight are rows of arrays, so a pass costs the same few array operations for
ten requests or for ten thousand, and no curve has to be kept for their sake. The horizon trails the newest reading by
as much as the engine's feed is known to lag (`Engine.horizon`); what is told later finds only what nobody claimed.

Energy that a request has collected is charged to its account (model, tenant, engine, phase) pass by pass once a
request record has come and the model is known. The account then stays, so that no counter goes down: a tenant that is
told later changes the answer for the request, not the counters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from msgspec.structs import replace as replace_fields
from numpy.typing import NDArray

from jouletrace.energy.baseline import IdleKind
from jouletrace.energy.timeline import DEPTH_NS
from jouletrace.requests.account import LedgerSnapshot, Phase, RequestEnergy, Taken
from jouletrace.requests.bounds import edge_errors, methods
from jouletrace.requests.devices import Bools, DeviceView, HeldHistory, TimeShares, slack
from jouletrace.requests.downtime import Counters
from jouletrace.requests.engine import SILENT_NS, STEP_PATIENCE_NS, UNCLAIMED_NS, Engine, Plan, Seen
from jouletrace.requests.estimate import unsettled_joules
from jouletrace.requests.inflight import NO_ACCOUNT, NOBODY, Inference, InFlight
from jouletrace.requests.intake import FUTURE_NS, Intake
from jouletrace.requests.law import LawBook
from jouletrace.requests.loads import ModelShare
from jouletrace.requests.records import (
    UNKNOWN_MODEL,
    EngineRecord,
    LoadRecord,
    RequestRecord,
    Role,
    Status,
    StepRecord,
    joined_id,
)
from jouletrace.requests.settled import FLOATS, Settled, answer, method_of
from jouletrace.requests.sharing import DeviceShares, Owner, any_busy, share_device, slices
from jouletrace.requests.split import NEVER
from jouletrace.requests.state import (
    AccountState,
    HistogramState,
    LedgerState,
    Rows,
    numbers_of,
    restore_words,
    words_of,
)
from jouletrace.requests.tally import Tally
from jouletrace.requests.tenants import Accounts

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
S = 1_000_000_000

STALE_NS = 30 * S
"""A device whose timeline stands still this long no longer holds back the other devices of its engines."""
BUSY_PATIENCE_NS = 5 * S
"""How long a pass waits at least for the activity readings that belong to it (they come 2-5 times a second),"""
BUSY_PATIENCE_READINGS = 3
"""and for how many of them where they come more seldom."""
COVERAGE_HALF_LIFE_S = 120.0
PLACE_PATIENCE_NS = 60 * S
"""How long the requests of an engine without device wait for one: loading a model takes minutes, but nothing ends."""
UNKNOWN_KIND = "other"
"""Of an engine record that names none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of memory and time."""

    in_flight: int = 16_384
    settled: int = 100_000
    settled_ns: int = 3600 * S
    """How long a settled request can be looked up."""
    steps: int = 65_536
    """Steps per engine that wait to be settled."""
    engines: int = 64
    models: int = 100
    tenants_per_model: int = 200
    """Design and reference: 200 tenants per model, the rest is `other`."""
    request_expiry_ns: int = 900 * S
    """A request without end and without sign of life for this long is taken as failed."""
    orphan_expiry_ns: int = 300 * S
    """A request that only steps have named for this long is nobody's."""
    engine_expiry_ns: int = 900 * S
    """An engine of which nobody has heard for this long, and which has nothing in flight, is taken as gone."""


class Ledger:
    """See the module. Energy before `start_ns` is not counted."""

    def __init__(self, limits: Limits, laws: LawBook, *, start_ns: int = 0) -> None:
        self._limits = limits
        self._laws = laws
        self._start_ns = start_ns
        self._engines: dict[str, Engine] = {}
        self._by_number: list[Engine] = []
        """With those that are gone: answers about their requests are kept by their numbers."""
        self._forgotten_ns = 0
        """Answers older than this are forgotten."""
        self._table = InFlight(limits.in_flight)
        self._settled = Settled(limits.settled)
        self._intake = Intake(self._table, self._settled, limits.steps)
        self._accounts = Accounts(models=limits.models, tenants_per_model=limits.tenants_per_model)
        self._views: Mapping[str, DeviceView] = {}
        self._settled_ns: dict[str, int] = {}
        self._held: dict[str, HeldHistory] = {}
        self._time_shares: dict[str, TimeShares] = {}
        self._device_joules: dict[str, float] = {}
        self._idle: dict[tuple[str, str], float] = {}
        self._unattributed: dict[str, float] = {}
        self._counters = Counters({}, {})
        self._tally = Tally()
        self._faded_ns = 0
        self._now_ns = 0

    # ---------------------------------------------------------------- records

    @property
    def engines(self) -> Sequence[EngineRecord]:
        """What the engines have said of themselves; may be read from any thread."""
        return [engine.record for engine in list(self._engines.values())]

    def add_engine(self, record: EngineRecord, now_ns: int) -> Taken:
        """Take in an engine, or what has changed of a known one (from the next pass on)."""
        self._now_ns = max(self._now_ns, now_ns)
        if record.ended:
            return self._end_engine(record.engine_id)
        if record.gpu_uuids and self._views and not any(uuid in self._views for uuid in record.gpu_uuids):
            return Taken.UNKNOWN_DEVICE
        known = self._engines.get(record.engine_id)
        if known is not None:
            self._end_orphaned(known, now_ns)
            if record.pid is not None and self.is_alive(record):
                known.living_pids.add(record.pid)
            known.describe(self._completed(record, known.record), self._laws)
            known.heard_ns = now_ns
            return Taken.ACCEPTED
        if len(self._engines) >= self._limits.engines:
            return Taken.OVERFLOW
        settled_ns = max((self._settled_ns.get(uuid, 0) for uuid in self._devices_of(record)), default=0)
        self._open_engine(record, settled_ns, now_ns)
        return Taken.ACCEPTED

    def _completed(self, record: EngineRecord, known: EngineRecord) -> EngineRecord:
        """Return an engine's record with what it leaves out as it was told before, by another feed perhaps.

        One that comes from another process and names no device is a feed's (the proxy on a socket) as long as the
        process that was told before is there; else it is a new life of the engine, of which nothing old holds.
        """
        is_elsewhere = record.pid not in (None, known.pid) and known.pid is not None
        if is_elsewhere and (record.gpu_uuids or not self.is_alive(known)):
            return record
        pid = known.pid if record.pid is None or is_elsewhere else record.pid
        return replace_fields(
            record,
            kind=known.kind if record.kind == UNKNOWN_KIND else record.kind,
            models=record.models or known.models,
            pid=pid,
            container_id=record.container_id or known.container_id,
            pod_uid=record.pod_uid or known.pod_uid,
            gpu_uuids=record.gpu_uuids or known.gpu_uuids,
            role=known.role if record.role is Role.MIXED else record.role,
            max_num_seqs=record.max_num_seqs or known.max_num_seqs,
        )

    def _end_engine(self, engine_id: str) -> Taken:
        """Take an engine as gone as soon as its requests are."""
        engine = self._engines.get(engine_id)
        if engine is None:
            return Taken.UNKNOWN_ENGINE
        self._end_orphaned(engine, self._now_ns)
        engine.describe(replace_fields(engine.record, pid=None), self._laws)
        engine.heard_ns = 0
        self._retire(engine, self._now_ns)
        return Taken.ACCEPTED

    def place(self, record: EngineRecord) -> None:
        """Take over where a known engine runs; that is no sign of life of it."""
        self._engines[record.engine_id].describe(record, self._laws)

    def name_payer(self, engine_id: str, tenant: str) -> None:
        """Let a tenant pay for what a known engine's requests use from now on, where they name nobody."""
        self._engines[engine_id].tenant = tenant

    def use_laws(self, laws: LawBook) -> None:
        """Take other laws for all that is not settled yet."""
        self._laws = laws
        for engine in self._engines.values():
            engine.describe(engine.record, laws)

    def _open_engine(self, record: EngineRecord, settled_ns: int, now_ns: int) -> Engine:
        """Open an engine under its former number, or one whose answers are forgotten, or a new one."""
        gone = [one for one in self._by_number if one.retired_ns is not None]
        former = [one.number for one in gone if one.engine_id == record.engine_id]
        free = [one.number for one in gone if (one.retired_ns or 0) < self._forgotten_ns]
        number = (*former, *free, len(self._by_number))[0]
        engine = Engine(number, record, self._laws, settled_ns)
        engine.heard_ns = engine.placed_ns = now_ns
        self._engines[record.engine_id] = engine
        self._by_number[number : number + 1] = [engine]
        return engine

    def _known_engine(self, engine_id: str, now_ns: int) -> Engine | None:
        """Return an engine; one that was taken as gone is back as soon as it tells something."""
        engine = self._engines.get(engine_id)
        if engine is None:
            gone = next((one for one in self._by_number if one.engine_id == engine_id), None)
            if gone is not None and self.add_engine(gone.record, now_ns) is Taken.ACCEPTED:
                engine = self._engines[engine_id]
        return engine

    def add_step(self, record: StepRecord, now_ns: int) -> Taken:
        """Take in a step; its requests need not be known yet."""
        self._now_ns = max(self._now_ns, now_ns)
        engine = self._known_engine(record.engine_id, now_ns)
        if engine is None:
            return Taken.UNKNOWN_ENGINE
        return _counted(engine, self._intake.add_step(engine, record, now_ns), now_ns)

    def add_load(self, record: LoadRecord, now_ns: int) -> Taken:
        """Take in what an engine's own counters say of some time."""
        self._now_ns = max(self._now_ns, now_ns)
        engine = self._known_engine(record.engine_id, now_ns)
        if engine is None:
            return Taken.UNKNOWN_ENGINE
        # The counters say nothing of requests, so they do not make the engine one that tells of them.
        engine.heard_ns = now_ns
        if record.end_ns > now_ns + FUTURE_NS:
            return Taken.FUTURE
        if record.end_ns <= now_ns - DEPTH_NS:
            return Taken.LATE
        return Taken.ACCEPTED if engine.note_load(record) else Taken.DUPLICATE

    def add_request(self, record: RequestRecord, now_ns: int) -> Taken:
        """Take in what a record tells of a request; fields that are set replace older ones."""
        self._now_ns = max(self._now_ns, now_ns)
        engine = self._engine_of(record, now_ns)
        if engine is None:
            return Taken.UNKNOWN_ENGINE
        is_first = not engine.is_requested(now_ns)
        taken = self._intake.add_request(engine, record, now_ns)
        # A sender whose clock is off tells nothing: what the engine's counters say counts on.
        if taken is not Taken.FUTURE and (record.end_ns is None or record.end_ns > now_ns - DEPTH_NS):
            engine.note_requested(record, now_ns, is_first=is_first)
        return _counted(engine, taken, now_ns)

    def _engine_of(self, record: RequestRecord, now_ns: int) -> Engine | None:
        if record.engine_id is not None:
            return self._known_engine(record.engine_id, now_ns)
        if not self._engines and len(self._by_number) == 1:
            return self._known_engine(self._by_number[0].engine_id, now_ns)
        return next(iter(self._engines.values())) if len(self._engines) == 1 else None

    # ---------------------------------------------------------------- settling

    def settle(self, devices: Mapping[str, DeviceView], now_ns: int, *, close_ns: int | None = None) -> None:
        """Hand out all energy up to the horizon of each group of engines and devices.

        With `close_ns` (end of a recording, shutdown) everything up to there is settled without waiting for records
        and nothing waits to be claimed any longer.
        """
        self._now_ns = max(self._now_ns, now_ns)
        self._views = devices
        self._fade(now_ns)
        for uuid, view in devices.items():
            settled_ns = self._settled_ns.setdefault(uuid, max(view.timeline.start_ns, self._start_ns))
            self._held.setdefault(uuid, HeldHistory()).note(now_ns, view.held, settled_ns)
            self._time_shares.setdefault(uuid, TimeShares()).note(now_ns, view.engine_shares or {}, settled_ns)
        failures = []
        for engines, uuids in self._groups(devices):
            try:
                self._settle_group(engines, uuids, now_ns, close_ns)
            except Exception as failure:
                # The account of the other devices goes on.
                failures.append(failure)
            self._lose_nobodys(engines)
        for uuid, view in devices.items():
            self._book_downtime(uuid, view)
        self._charge()
        self._finish(now_ns)
        if failures:
            raise failures[0]

    def _book_downtime(self, uuid: str, view: DeviceView) -> None:
        """Book what a device used while no jouletrace ran: nobody knows by whom."""
        booked = self._device_joules.get(uuid, 0.0)
        missed = self._counters.missed_joules(uuid, view, self._settled_ns[uuid], booked)
        if missed > 0:
            self._device_joules[uuid] = booked + missed
            self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + missed

    def _fade(self, now_ns: int) -> None:
        seconds = min(max(0, now_ns - self._faded_ns) / 1e9, 86_400.0)
        self._faded_ns = max(now_ns, self._faded_ns)
        self._accounts.fade(seconds)
        kept = 0.5 ** (seconds / COVERAGE_HALF_LIFE_S)
        for engine in self._engines.values():
            engine.busy_joules *= kept
            engine.lost_joules *= kept
            engine.accepted *= kept
            engine.dropped *= kept

    def _devices_of(self, record: EngineRecord) -> Sequence[str]:
        if record.gpu_uuids:
            return [uuid for uuid in record.gpu_uuids if uuid in self._views]
        return list(self._views) if len(self._views) == 1 else []

    def _views_of(self, engine: Engine) -> list[DeviceView]:
        return [self._views[uuid] for uuid in self._devices_of(engine.record)]

    def _groups(self, devices: Mapping[str, DeviceView]) -> Iterable[tuple[list[Engine], list[str]]]:
        """Yield engines and devices that must be settled together: sets connected by shared devices."""
        groups: list[tuple[list[Engine], set[str]]] = [([], {uuid}) for uuid in devices]
        for engine in self._engines.values():
            mine = set(self._devices_of(engine.record))
            joined: tuple[list[Engine], set[str]] = ([engine], mine)
            apart = []
            for group in groups:
                if group[1] & mine:
                    joined[0][:0] = group[0]
                    joined[1].update(group[1])
                else:
                    apart.append(group)
            groups = [*apart, joined]
        return [(engines, sorted(uuids)) for engines, uuids in groups]

    def _horizon(self, engines: Sequence[Engine], uuids: Sequence[str], now_ns: int) -> int:
        ends = [self._views[uuid].timeline.end_ns for uuid in uuids]
        fresh = [end for end in ends if end > now_ns - STALE_NS]
        until = min(fresh, default=max(ends, default=0))
        for uuid in uuids:
            busy = self._views[uuid].busy
            if busy is None or not len(busy.end_ns):
                continue
            if busy.end_ns[-1] > now_ns - max(BUSY_PATIENCE_NS, BUSY_PATIENCE_READINGS * busy.spacing_ns):
                until = min(until, int(busy.end_ns[-1]))
        # One that was announced but has told nothing yet must not hold back the requests of those beside it.
        telling = [engine for engine in engines if engine.told_ns] or engines
        counting = [engine for engine in engines if engine not in telling and engine.lives_by_loads(now_ns)]
        until = min([until, *(engine.loads_horizon(now_ns) for engine in counting)])
        return min([until, *(engine.horizon(now_ns, self._table) for engine in telling)])

    def _settle_group(self, engines: Sequence[Engine], uuids: Sequence[str], now_ns: int, close_ns: int | None) -> None:
        until_ns = self._horizon(engines, uuids, now_ns) if close_ns is None else close_ns
        for engine in engines:
            if engine.late:
                slots = np.array(sorted(set(engine.late)), np.int64)
                engine.late.clear()
                engine.claim(self._table, slots, engine.settled_ns, whole=False)
                self._table.claimed_ns[slots] = NEVER
        if uuids and until_ns > min(self._settled_ns[uuid] for uuid in uuids):
            self._settle_span(engines, uuids, until_ns)
        for engine in engines:
            if engine.counting:
                table = self._table
                mine = (table.engine == engine.number) & (table.claimed_ns < engine.settled_ns)
                engine.claim(table, np.flatnonzero(mine), engine.settled_ns, whole=True)
            before_ns = NEVER if close_ns is not None else engine.settled_ns - engine.keep_ns(now_ns)
            self._release(engine, before_ns, now_ns)

    def _release(self, engine: Engine, before_ns: int, now_ns: int) -> None:
        """Book energy that has waited long enough for its request: by the engine's counters, else as unattributed."""
        loads = engine.loads.release(before_ns)
        if not engine.lives_by_loads(now_ns):
            # What lies before the first request that was told is still the counters' to share out.
            earlier = [load for load in loads if load.end_ns <= engine.told_from_ns]
            if earlier:
                shares = engine.loads.shares(earlier, engine.law)
                self._share_by_loads(engine, earlier, shares, earlier[-1].end_ns)
            # There, the load that says of the latest is still to be released.
            patience_ns = STEP_PATIENCE_NS if before_ns < engine.told_from_ns else 0
            self._lose(engine, engine.unclaimed.expire(before_ns - patience_ns))
            return
        shares = engine.loads.shares(loads, engine.law)
        if before_ns < NEVER:
            # Behind the last load nobody knows yet who worked; without any, perhaps the next one says.
            told_ns = loads[-1].end_ns if loads and shares else 0
            before_ns = max(told_ns, before_ns - (STEP_PATIENCE_NS if shares else UNCLAIMED_NS))
        self._share_by_loads(engine, loads, shares, before_ns)

    def _share_by_loads(
        self, engine: Engine, loads: Sequence[LoadRecord], shares: Sequence[ModelShare], before_ns: int
    ) -> None:
        """Book energy that waited up to a time, and work, as an engine's counters tell of them."""
        # The moment itself included, so that energy and loads that end together go together.
        untold = engine.unclaimed.untold_joules
        joules = engine.unclaimed.expire(before_ns + 1)
        engine.count_shares(joules, shares)
        if shares:
            engine.note_claimed(untold - engine.unclaimed.untold_joules)
        else:
            self._lose(engine, joules)
        for share in shares:
            number = np.array([self._accounts.number(share.model, engine.tenant, engine.engine_id)])
            self._accounts.add(number, np.array([joules * share.prefill]), np.array([joules * share.decode]))
        parts = [part for load in loads for part in load.models]
        for part in parts:
            model, tenant, _ = self._accounts.keys[self._accounts.number(part.model, engine.tenant, engine.engine_id)]
            self._tally.count_work(model, tenant, part.usage)
        engine.count_ended([part.usage for part in parts], joules if shares else 0.0, requests=0)

    def _lose_nobodys(self, engines: Sequence[Engine]) -> None:
        """Book what the table's slot for nobody collected while these engines were settled as unattributed."""
        nobody = np.array([NOBODY])
        joules = float(self._table.joules(nobody)[0])
        if engines and joules > 0:
            self._lose(engines[0], joules)
            self._table.wipe_sums(nobody)

    def _lose(self, engine: Engine, joules: float) -> None:
        """Book energy of an engine as unattributed."""
        if joules <= 0:
            return
        engine.lost_joules += joules
        for uuid, part in engine.returned(joules).items():
            self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + part

    def _settle_span(self, engines: Sequence[Engine], uuids: Sequence[str], until_ns: int) -> None:
        """Hand out the energy of devices up to a time. Where it cannot be shared out it stays for the next pass."""
        from_ns = min(self._settled_ns[uuid] for uuid in uuids)
        due = [engine for engine in engines if engine.settled_ns < until_ns and self._devices_of(engine.record)]
        for engine in due:
            # An engine's time begins with that of its devices; without energy there is nothing to hand out before.
            engine.settled_ns = max(engine.settled_ns, from_ns)
        plans = [engine.plan(until_ns, self._table, self._now_ns) for engine in due]
        times = [plan.edges() for plan in plans]
        times += [history[uuid].changes() for history in (self._held, self._time_shares) for uuid in uuids]
        edges = slices(times, [self._views[uuid] for uuid in uuids], from_ns, until_ns)
        middle = (edges[:-1] + edges[1:]) // 2
        seen = [
            engine.see(plan, edges, any_busy([view.busy for view in self._views_of(engine)], middle))
            for engine, plan in zip(due, plans, strict=True)
        ]
        joules = [np.zeros(len(middle)) for _ in due]
        slacks = [0.0 for _ in due]
        shared = []
        for uuid in uuids:
            at = [row for row, engine in enumerate(due) if uuid in self._devices_of(engine.record)]
            owners = [self._owner(uuid, due[row], seen[row].active, middle) for row in at]
            found = share_device(self._views[uuid], edges, self._settled_ns[uuid], until_ns, owners)
            shared.append((uuid, [due[row] for row in at], found))
            for row, given in zip(at, found.given, strict=True):
                joules[row] += given
                slacks[row] = max(slacks[row], slack(self._views[uuid], plans[row].from_ns, until_ns))
        for uuid, owning, found in shared:
            self._book_device(uuid, owning, found, edges)
        failures = [
            self._distribute(engine, plan, sight, edges, energy, off)
            for engine, plan, sight, energy, off in zip(due, plans, seen, joules, slacks, strict=True)
        ]
        for failure in failures:
            if failure is not None:
                raise failure

    def _distribute(
        self, engine: Engine, plan: Plan, seen: Seen, edges: Int64s, joules: Float64s, off: float
    ) -> Exception | None:
        """Give an engine's part of a pass to its requests; return what went wrong, when the joules are nobody's."""
        total = float(joules.sum())
        engine.use(total)
        if seen.active.any():
            engine.last_active_ns = int(edges[1:][seen.active][-1])
        try:
            engine.distribute(plan, seen, edges, joules, slack=off, table=self._table)
        except Exception as failure:
            # The devices' side is booked: the account adds up all the same, and the next pass begins behind the fault.
            self._lose(engine, total)
            engine.pass_by(plan)
            return failure
        waited = (self._table.engine == engine.number) & (self._table.first_token_ns >= NEVER)
        waited &= self._table.start_ns < plan.until_ns
        # Whoever is still without first token has waited in a queue so far.
        self._table.start_ns[waited] = plan.until_ns
        return None

    def _owner(self, uuid: str, engine: Engine, active: Bools, times_ns: Int64s) -> Owner:
        share = self._time_shares[uuid].of(engine.engine_id, times_ns)
        return Owner(active, share, not self._tells(engine), engine.last_active_ns)

    def _book_device(self, uuid: str, owners: Sequence[Engine], found: DeviceShares, edges: Int64s) -> None:
        """Book a device's energy as handed out, and what of it belongs to no request."""
        self._settled_ns[uuid] = found.settled_ns
        self._device_joules[uuid] = self._device_joules.get(uuid, 0.0) + found.used_joules
        for engine, given, silent in zip(owners, found.given, found.silent, strict=True):
            _note(engine, uuid, float(given.sum()))
            if silent > 0:
                engine.use_untold(silent)
                engine.lost_joules += silent
                self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + silent
        self._book_rest(uuid, found.left, found.worked, edges, owners)

    def _tells(self, engine: Engine) -> bool:
        """Whether it is known at present when the engine has requests."""
        return engine.told_ns > self._now_ns - SILENT_NS or engine.lives_by_loads(self._now_ns)

    def _book_rest(self, uuid: str, left: Float64s, worked: Bools, edges: Int64s, engines: Sequence[Engine]) -> None:
        """Book energy of slices without request: work without owner, or idle."""
        work = float(left[worked].sum())
        if len(engines) == 1 and work > 0:
            engine = engines[0]
            engine.use_untold(work)
            _note(engine, uuid, work)
            rows = worked & (left > 0)
            engine.unclaimed.append_unknown(edges[:-1][rows], edges[1:][rows], left[rows], told=False)
        elif work > 0:
            self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + work
            for engine in engines:
                engine.use_untold(work / len(engines))
                engine.lost_joules += work / len(engines)
        held = self._held[uuid].at((edges[:-1] + edges[1:]) // 2, unknown=bool(engines))
        for kind, chosen in ((IdleKind.PARKED, held & ~worked), (IdleKind.BARE, ~held & ~worked)):
            idle = float(left[chosen].sum())
            key = (uuid, kind.value)
            self._idle[key] = self._idle.get(key, 0.0) + idle
            if kind is IdleKind.PARKED:
                for engine in engines:
                    engine.bear_idle(idle / len(engines))
                    self._accounts.spread_idle(engine.engine_id, idle / len(engines), self._nobody(engine))

    def _nobody(self, engine: Engine) -> tuple[str, str]:
        """Return the model and tenant that bear idle energy of an engine that has served nobody yet."""
        models = engine.record.models
        return models[0] if models else UNKNOWN_MODEL, engine.tenant

    def _charge(self) -> None:
        """Charge what requests have collected to their accounts."""
        table = self._table
        for slot in np.flatnonzero((table.engine >= 0) & (table.account == NO_ACCOUNT)).tolist():
            inference = table.inferences[slot]
            assert inference is not None
            if inference.described:
                self._open_account(inference)
        slots = np.flatnonzero(table.account != NO_ACCOUNT)
        prefill, decode = table.prefill(slots), table.decode(slots)
        self._accounts.add(
            table.account[slots],
            np.maximum(prefill - table.paid_prefill[slots], 0.0),
            np.maximum(decode - table.paid_decode[slots], 0.0),
        )
        table.paid_prefill[slots] = np.maximum(prefill, table.paid_prefill[slots])
        table.paid_decode[slots] = np.maximum(decode, table.paid_decode[slots])

    def _open_account(self, inference: Inference) -> None:
        """Find the account as soon as the model is known; at the end a model is assumed."""
        engine = self._by_number[inference.engine]
        model = inference.model
        if model is None and len(engine.record.models) == 1:
            model = engine.record.models[0]
        if model is None and inference.status is not Status.RUNNING:
            model = UNKNOWN_MODEL
        if model is not None:
            number = self._accounts.number(model, inference.tenant or engine.tenant, engine.engine_id)
            self._table.account[inference.slot] = number
            # One string for all requests of an account: each record brings its own.
            model, tenant, _ = self._accounts.keys[number]
            inference.model = model if inference.model == model else inference.model
            inference.tenant = tenant if inference.tenant == tenant else inference.tenant

    # ---------------------------------------------------------------- the end of requests

    def _finish(self, now_ns: int) -> None:
        """Move requests whose whole life is settled to the answers."""
        table = self._table
        horizon = np.array([engine.settled_ns for engine in self._by_number] or [0], np.int64)
        done = (table.engine >= 0) & (table.account != NO_ACCOUNT) & (table.end_ns <= horizon[table.engine])
        if not done.any():
            return
        for engine in self._engines.values():
            if engine.steps:
                done[np.fromiter(engine.waiting_slots(), np.int64)] = False
        slots = np.flatnonzero(done)
        if not len(slots):
            return
        edge = edge_errors(table, slots, lambda number: self._views_of(self._by_number[number]))
        joules, off = table.joules(slots), table.error_joules[slots] + edge
        floats = np.stack(
            (
                table.prefill_fixed[slots],
                table.prefill_marginal[slots],
                table.decode_fixed[slots],
                table.decode_marginal[slots],
                np.maximum(joules - off, 0.0),
                joules + off,
            ),
            axis=1,
        )
        times = np.stack((table.start_ns[slots], table.end_ns[slots], np.full(len(slots), now_ns)), axis=1)
        inferences = [one for one in (table.inferences[slot] for slot in slots.tolist()) if one is not None]
        for row, inference in enumerate(inferences):
            if inference.arrival_ns is not None:
                times[row, 0] = inference.arrival_ns
        keys = self._accounts.keys
        accounts = [keys[number] for number in table.account[slots].tolist()]
        for one, (model, tenant, _), energy, end_ns in zip(
            inferences, accounts, joules.tolist(), times[:, 1].tolist(), strict=True
        ):
            self._tally.count(model, tenant, one.status, one.usage, joules=energy, trace_id=one.trace_id, end_ns=end_ns)
        self._settled.add(
            [(one.engine, one.request_id) for one in inferences],
            [self._words(one, account) for one, account in zip(inferences, accounts, strict=True)],
            floats=floats,
            times=times,
            statuses=[one.status for one in inferences],
            methods=methods(table, slots, self._by_number),
            output=[one.usage.output for one in inferences],
            attempts=[one.attempt for one in inferences],
        )
        output = np.array([one.usage.output for one in inferences], np.float64)
        for number in np.unique(table.engine[slots]).tolist():
            mine = np.flatnonzero(table.engine[slots] == number)
            self._by_number[number].learn_scale(table, slots[mine], output[mine])
            usages = [inferences[row].usage for row in mine.tolist()]
            self._by_number[number].count_ended(usages, float(joules[mine].sum()), requests=len(usages))
        for inference in inferences:
            self._intake.forget(self._by_number[inference.engine], inference)
        table.release(slots)

    def _words(self, inference: Inference, account: tuple[str, str, str]) -> tuple[str, str, str]:
        """Return engine, model and tenant for the answer: the names that were told, not the bounded ones."""
        model, tenant, engine_id = account
        if inference.model in (None, model) and inference.tenant in (None, tenant):
            return engine_id, model, tenant
        return engine_id, inference.model or model, tenant if inference.tenant is None else inference.tenant

    def expire(self, now_ns: int) -> None:
        """Give up on requests and orphans that nobody has heard of for too long, and forget old answers."""
        self._now_ns = max(self._now_ns, now_ns)
        table = self._table
        shortest_ns = min(self._limits.request_expiry_ns, self._limits.orphan_expiry_ns)
        for slot in np.flatnonzero((table.engine >= 0) & (table.seen_ns < now_ns - shortest_ns)).tolist():
            inference = table.inferences[slot]
            assert inference is not None
            silent_ns = now_ns - int(table.seen_ns[slot])
            if inference.described:
                if inference.status is Status.RUNNING and silent_ns > self._limits.request_expiry_ns:
                    ended = RequestRecord(request_id=inference.request_id, status=Status.FAILED, end_ns=now_ns)
                    self._intake.merge(self._by_number[inference.engine], inference, ended, now_ns)
            elif silent_ns > self._limits.orphan_expiry_ns:
                self._drop_orphan(inference)
        self._forgotten_ns = now_ns - self._limits.settled_ns
        self._settled.expire(self._forgotten_ns)
        for engine in list(self._engines.values()):
            self._end_orphaned(engine, now_ns)
            self._pass_over(engine, now_ns)
            self._retire(engine, now_ns)

    def _pass_over(self, engine: Engine, now_ns: int) -> None:
        """Close the past of an engine that has had no device for long: what ended then has used 0 J."""
        if self._devices_of(engine.record):
            engine.placed_ns = now_ns
        elif engine.placed_ns < now_ns - PLACE_PATIENCE_NS:
            engine.skip(now_ns - PLACE_PATIENCE_NS)

    def _end_orphaned(self, engine: Engine, now_ns: int) -> None:
        """End the requests of an engine whose processes were there and are gone: nobody else will tell."""
        known = engine.living_pids | ({engine.record.pid} if engine.record.pid is not None else set())
        living = {pid for pid in known if self.is_alive(replace_fields(engine.record, pid=pid))}
        died, engine.living_pids = bool(engine.living_pids) and not living, living
        if not died:
            return
        for slot in np.flatnonzero(self._table.engine == engine.number).tolist():
            inference = self._table.inferences[slot]
            if inference is not None and inference.described and inference.status is Status.RUNNING:
                ended = RequestRecord(request_id=inference.request_id, status=Status.FAILED, end_ns=now_ns)
                self._intake.merge(engine, inference, ended, now_ns)

    def is_alive(self, record: EngineRecord) -> bool:
        """Return whether a silent engine is known to be there; one who knows of processes says more."""
        return False

    def _retire(self, engine: Engine, now_ns: int) -> None:
        """Take an engine as gone when it has been silent for long: it owns no device any more."""
        if engine.steps or engine.heard_ns >= now_ns - self._limits.engine_expiry_ns:
            return
        if (self._table.engine == engine.number).any() or self.is_alive(engine.record):
            return
        self._lose(engine, engine.unclaimed.expire(NEVER))
        engine.retired_ns = now_ns
        del self._engines[engine.engine_id]

    def _drop_orphan(self, inference: Inference) -> None:
        engine = self._by_number[inference.engine]
        slot = np.array([inference.slot])
        if inference.slot in set(engine.waiting_slots()):
            return
        self._lose(engine, float(self._table.joules(slot)[0]))
        engine.dropped += 1
        self._intake.forget(engine, inference)
        self._table.release(slot)

    # ---------------------------------------------------------------- answers

    def price(self, request_id: str, engine_id: str | None = None) -> RequestEnergy | None:
        """Return a request's joules: final once its end is settled, else an estimate; None when it is not known.

        Without an engine id the newest request of that id on any engine. Up to the horizon an estimate holds what
        was measured, behind it a part of the energy since then (`estimate`).
        """
        request_id = joined_id(request_id)
        engines = self._by_number if engine_id is None else [e for e in self._by_number if e.engine_id == engine_id]
        found = []
        for engine in engines:
            inference = engine.ids.get(request_id)
            if inference is not None and inference.described:
                found.append(self._provisional(engine, inference))
            else:
                final = self._settled.get(engine.number, request_id)
                if final is not None:
                    found.append(final)
        return max(found, key=lambda one: one.arrival_ns, default=None)

    def running(self, limit: int) -> list[RequestEnergy]:
        """Return estimates for requests that have not ended, those of the most joules so far first."""
        table = self._table
        slots = np.flatnonzero((table.engine >= 0) & (table.end_ns >= NEVER))
        found: list[RequestEnergy] = []
        for slot in slots[np.argsort(-table.joules(slots), kind="stable")].tolist():
            if len(found) == limit:
                break
            inference = table.inferences[slot]
            if inference is not None and inference.described:
                found.append(self._provisional(self._by_number[inference.engine], inference))
        # What was used since the last settling is in the estimates alone.
        return sorted(found, key=lambda one: one.energy_joules, reverse=True)

    def _provisional(self, engine: Engine, inference: Inference) -> RequestEnergy:
        table = self._table
        slot = np.array([inference.slot])
        start_ns, end_ns = int(table.start_ns[inference.slot]), int(table.end_ns[inference.slot])
        values = {name: float(getattr(table, name)[inference.slot]) for name in FLOATS[:4]}
        measured = sum(values.values())
        timelines = [view.timeline for view in self._views_of(engine)]
        prefill, decode = unsettled_joules(engine, table, inference.slot, timelines, self._now_ns)
        # The estimate's parts by the law's proportion in a typical batch are not known: it counts as marginal.
        values["decode_marginal"] += decode
        values["prefill_marginal"] += prefill
        off = float(table.error_joules[inference.slot])
        values["low"] = max(0.0, measured - off)
        values["high"] = measured + off + 2 * (decode + prefill)
        account = int(table.account[inference.slot])
        named = self._accounts.keys[account] if account != NO_ACCOUNT else (UNKNOWN_MODEL, "", engine.engine_id)
        return answer(
            inference.request_id,
            self._words(inference, named),
            inference.status,
            values=values,
            output=inference.usage.output,
            method=method_of(int(methods(table, slot, self._by_number)[0])),
            final=False,
            arrival_ns=start_ns if inference.arrival_ns is None else inference.arrival_ns,
            end_ns=end_ns,
        )

    def snapshot(self) -> LedgerSnapshot:
        """Return the account as it stands, frozen."""
        attributed, allocated = {}, {}
        for (model, tenant, engine_id), prefill, decode, idle in self._accounts:
            if prefill or decode:
                attributed[model, tenant, engine_id, Phase.PREFILL] = prefill
                attributed[model, tenant, engine_id, Phase.DECODE] = decode
            allocated[model, tenant, engine_id] = prefill + decode + idle
        running = self._table.engine[(self._table.engine >= 0) & (self._table.end_ns >= NEVER)]
        count = np.bincount(running, minlength=len(self._by_number)).tolist()
        return LedgerSnapshot(
            settled_ns=self._settled_until(),
            device_joules=dict(self._device_joules),
            attributed_joules=attributed,
            allocated_joules=allocated,
            idle_joules=dict(self._idle),
            unattributed_joules={uuid: self._unattributed.get(uuid, 0.0) for uuid in self._device_joules}
            | self._unattributed,
            pending_joules={engine.engine_id: self._pending(engine) for engine in self._engines.values()},
            request_joules={model: histogram.buckets() for model, histogram in self._tally.histograms.items()},
            requests=dict(self._tally.requests),
            in_flight={engine.engine_id: count[engine.number] for engine in self._engines.values()},
            tokens=dict(self._tally.tokens),
            units=dict(self._tally.units),
            coverage={engine.engine_id: _coverage(engine) for engine in self._engines.values()},
            engine_totals={
                engine.engine_id: replace(engine.totals, settled_ns=engine.settled_ns)
                for engine in self._engines.values()
            },
            engine_states={engine.engine_id: engine.state for engine in self._engines.values()},
            engine_devices={
                engine.engine_id: tuple(self._devices_of(engine.record)) for engine in self._engines.values()
            },
            engine_models={engine.engine_id: engine.record.models for engine in self._engines.values()},
        )

    def _settled_until(self) -> int:
        """Return up to when the account of all devices stands that are there and have not stopped telling."""
        settled = {uuid: self._settled_ns[uuid] for uuid in self._views if uuid in self._settled_ns}
        fresh = [at for uuid, at in settled.items() if self._views[uuid].timeline.end_ns > self._now_ns - STALE_NS]
        return min(fresh or settled.values(), default=0)

    def _pending(self, engine: Engine) -> float:
        table = self._table
        mine = np.flatnonzero(table.engine == engine.number)
        unpaid = table.joules(mine) - table.paid_prefill[mine] - table.paid_decode[mine]
        return max(0.0, float(unpaid.sum()) + engine.unclaimed.joules)

    # ---------------------------------------------------------------- across restarts

    def dump(self) -> LedgerState:
        """Return what must outlive a restart."""
        unclaimed: dict[str, float] = {}
        for engine in self._engines.values():
            for uuid, joules in engine.returned(engine.unclaimed.joules).items():
                unclaimed[uuid] = unclaimed.get(uuid, 0.0) + joules
        return LedgerState(
            engines=list(self.engines),
            engine_settled_ns=[engine.settled_ns for engine in self._engines.values()],
            accounts={
                number: AccountState(*key, prefill, decode, idle)
                for number, (key, prefill, decode, idle) in enumerate(self._accounts)
            },
            settled_ns=dict(self._settled_ns),
            device_joules=dict(self._device_joules),
            idle_joules={
                uuid: {kind: joules for (owner, kind), joules in self._idle.items() if owner == uuid}
                for uuid in {owner for owner, _ in self._idle}
            },
            unattributed_joules=dict(self._unattributed),
            unclaimed_joules=unclaimed,
            counters=self._counters.states(),
            tenants=self._tally.tenants(),
            histograms={
                model: HistogramState(list(one.counts), one.total_joules)
                for model, one in self._tally.histograms.items()
            },
            in_flight=words_of(self._table, [engine.engine_id for engine in self._by_number]),
            in_flight_numbers=numbers_of(self._table),
        )

    @classmethod
    def restore(cls, state: LedgerState, limits: Limits, laws: LawBook, *, start_ns: int) -> "Ledger":
        """Return a ledger that goes on from a state at `start_ns`.

        Energy that waited to be claimed is unattributed from now on, and so is what devices used between the two
        processes, as far as their counters tell: the new timelines do not know it. No time of the state lies behind
        `start_ns`: where the clock was ahead before, all that comes would be late until then.
        """
        ledger = cls(limits, laws, start_ns=start_ns)
        for record, settled_ns in zip(state.engines, state.engine_settled_ns, strict=True):
            ledger._open_engine(record, min(settled_ns, start_ns), start_ns)
        ledger._settled_ns = {uuid: min(settled_ns, start_ns) for uuid, settled_ns in state.settled_ns.items()}
        ledger._device_joules = dict(state.device_joules)
        ledger._counters = Counters(state.counters, ledger._settled_ns)
        ledger._idle = {
            (uuid, kind): joules for uuid, kinds in state.idle_joules.items() for kind, joules in kinds.items()
        }
        ledger._unattributed = dict(state.unattributed_joules)
        for uuid, joules in state.unclaimed_joules.items():
            ledger._unattributed[uuid] = ledger._unattributed.get(uuid, 0.0) + joules
        for one in state.accounts.values():
            number = ledger._accounts.number(one.model, one.tenant, one.engine_id)
            ledger._accounts.prefill[number] += one.prefill
            ledger._accounts.decode[number] += one.decode
            ledger._accounts.idle[number] += one.idle
        ledger._tally = Tally.restored(state.tenants.values(), state.histograms)
        ledger._restore_requests(state, Rows(state, start_ns), start_ns)
        return ledger

    def _restore_requests(self, state: LedgerState, rows: Rows, start_ns: int) -> None:
        kept: list[int] = []
        slots: list[int] = []
        for row, (former, account) in enumerate(zip(rows.slots, rows.accounts.tolist(), strict=True)):
            words = state.in_flight[former]
            engine = self._engines[words.engine_id]
            inference = restore_words(words, self._table, engine.number, start_ns)
            if inference is None:
                # The configuration allows fewer than before: what was charged stays, the rest is nobody's.
                self._lose(engine, rows.unpaid_joules(row))
                continue
            kept.append(row)
            slots.append(inference.slot)
            if account != NO_ACCOUNT:
                one = state.accounts[account]
                number = self._accounts.number(one.model, one.tenant, one.engine_id)
                self._table.account[inference.slot] = number
            earlier = engine.ids.get(words.request_id)
            if earlier is not None:
                engine.superseded.setdefault(words.request_id, []).append(earlier)
            engine.ids[words.request_id] = inference
        rows.put(self._table, kept, slots)


def _counted(engine: Engine, taken: Taken, now_ns: int) -> Taken:
    engine.heard_ns = now_ns
    if taken is Taken.ACCEPTED:
        engine.accepted += 1
        engine.told_ns = now_ns
    elif taken is not Taken.DUPLICATE:
        engine.dropped += 1
    return taken


def _coverage(engine: Engine) -> float:
    """Return the attributed part of busy energy over the last minutes, lowered by the part of records dropped."""
    told = engine.accepted + engine.dropped
    kept = engine.accepted / told if told > 0 else 1.0
    found = 1.0 - engine.lost_joules / engine.busy_joules if engine.busy_joules > 0 else 1.0
    return min(max(found, 0.0), 1.0) * kept


def _note(engine: Engine, uuid: str, joules: float) -> None:
    engine.device_joules[uuid] = engine.device_joules.get(uuid, 0.0) + joules
