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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jouletrace.energy.baseline import IdleKind
from jouletrace.energy.timeline import DEPTH_NS
from jouletrace.requests.account import LedgerSnapshot, Phase, RequestEnergy, Taken
from jouletrace.requests.bounds import edge_errors, methods
from jouletrace.requests.devices import Bools, BusyTrack, DeviceView, HeldHistory, slack
from jouletrace.requests.engine import UNCLAIMED_NS, Engine, Seen, Step
from jouletrace.requests.inflight import NO_ACCOUNT, NOBODY, Inference, InFlight
from jouletrace.requests.law import LawBook
from jouletrace.requests.records import EngineRecord, RequestRecord, Role, Status, StepRecord, Usage
from jouletrace.requests.settled import FLOATS, Settled, answer, method_of
from jouletrace.requests.split import NEVER
from jouletrace.requests.state import (
    AccountState,
    HistogramState,
    InFlightState,
    LedgerState,
    not_after,
    requests_of,
    restore_request,
    unpaid_joules,
)
from jouletrace.requests.tally import Tally
from jouletrace.requests.tenants import Accounts

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
S = 1_000_000_000

FUTURE_NS = 5 * S
"""How far a record's time may lie ahead: clocks of containers on one node agree, NTP steps are below this."""
STALE_NS = 30 * S
"""A device whose timeline stands still this long no longer holds back the other devices of its engines."""
BUSY_PATIENCE_NS = 5 * S
"""How long a pass waits at least for the activity readings that belong to it (they come 2-5 times a second),"""
BUSY_PATIENCE_READINGS = 3
"""and for how many of them where they come more seldom."""
COVERAGE_HALF_LIFE_S = 120.0
SILENT_NS = 300 * S
"""An engine that has told nothing for this long is taken to have no feed."""
PLACE_PATIENCE_NS = 60 * S
"""How long the requests of an engine without device wait for one: loading a model takes minutes, but nothing ends."""
RESTART_NS = 1 * S
"""A running request that arrives again this much later is another life of its id."""
UNKNOWN_MODEL = "unknown"


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
    """See the module. `default_tenant` pays where no tenant is given; energy before `start_ns` is not counted."""

    def __init__(self, limits: Limits, laws: LawBook, *, default_tenant: str = "", start_ns: int = 0) -> None:
        self._limits = limits
        self._laws = laws
        self._default_tenant = default_tenant
        self._start_ns = start_ns
        self._engines: dict[str, Engine] = {}
        self._by_number: list[Engine] = []
        """With those that are gone: answers about their requests are kept by their numbers."""
        self._forgotten_ns = 0
        """Answers older than this are forgotten."""
        self._table = InFlight(limits.in_flight)
        self._settled = Settled(limits.settled)
        self._accounts = Accounts(models=limits.models, tenants_per_model=limits.tenants_per_model)
        self._views: Mapping[str, DeviceView] = {}
        self._settled_ns: dict[str, int] = {}
        self._held: dict[str, HeldHistory] = {}
        self._device_joules: dict[str, float] = {}
        self._idle: dict[tuple[str, str], float] = {}
        self._unattributed: dict[str, float] = {}
        self._tally = Tally()
        self._faded_ns = 0
        self._now_ns = 0

    # ---------------------------------------------------------------- records

    @property
    def engines(self) -> Sequence[EngineRecord]:
        """What the engines have said of themselves."""
        return [engine.record for engine in self._engines.values()]

    def add_engine(self, record: EngineRecord, now_ns: int) -> Taken:
        """Take in an engine, or what has changed of a known one (from the next pass on)."""
        self._now_ns = max(self._now_ns, now_ns)
        if record.gpu_uuids and self._views and not any(uuid in self._views for uuid in record.gpu_uuids):
            return Taken.UNKNOWN_DEVICE
        known = self._engines.get(record.engine_id)
        if known is not None:
            known.describe(record, self._laws)
            known.heard_ns = now_ns
            return Taken.ACCEPTED
        if len(self._engines) >= self._limits.engines:
            return Taken.OVERFLOW
        settled_ns = max((self._settled_ns.get(uuid, 0) for uuid in self._devices_of(record)), default=0)
        self._open_engine(record, settled_ns, now_ns)
        return Taken.ACCEPTED

    def place(self, record: EngineRecord) -> None:
        """Take over where a known engine runs; that is no sign of life of it."""
        self._engines[record.engine_id].describe(record, self._laws)

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
        taken = self._add_step(engine, record, now_ns)
        return _counted(engine, taken, now_ns)

    def _add_step(self, engine: Engine, record: StepRecord, now_ns: int) -> Taken:
        if record.end_ns > now_ns + FUTURE_NS:
            return Taken.FUTURE
        if record.end_ns <= max(engine.settled_ns, now_ns - DEPTH_NS):
            return Taken.LATE
        if len(engine.steps) >= self._limits.steps:
            return Taken.OVERFLOW
        prefill = record.prefill or ()
        tokens = record.prefill_tokens or 0
        step = Step(
            record.end_ns,
            record.start_ns,
            record.steps,
            record.kv_tokens or 0,
            [self._slot(engine, part.request_id, record) for part in prefill],
            [part.tokens for part in prefill],
            self._slots(engine, record),
            record.prefill_requests or min(tokens, 1),
            tokens,
            record.decode_requests or 0,
        )
        if not engine.add_step(step):
            return Taken.DUPLICATE
        engine.observe_delay(now_ns - record.end_ns, now_ns)
        if not engine.counting and (step.other_prefills or step.other_decodes):
            self._begin_counting(engine)
        return Taken.ACCEPTED

    def _slots(self, engine: Engine, record: StepRecord) -> list[int]:
        ids = engine.ids
        if engine.superseded:
            return [self._slot(engine, request_id, record) for request_id in record.decode or ()]
        try:
            return [ids[request_id].slot for request_id in record.decode or ()]
        except KeyError:
            return [self._slot(engine, request_id, record) for request_id in record.decode or ()]

    def _slot(self, engine: Engine, request_id: str, step: StepRecord) -> int:
        """Return the slot of the life that a step means; a new one for an id that nobody has described yet."""
        inference = engine.ids.get(request_id)
        if inference is not None:
            if engine.superseded and (inference.arrival_ns or 0) > step.end_ns:
                earlier = engine.superseded.get(request_id)
                return earlier[-1].slot if earlier else inference.slot
            return inference.slot
        life = self._settled.life(engine.number, request_id)
        if life is not None and step.start_ns < life[2] + FUTURE_NS:
            return NOBODY
        inference = self._table.open(request_id, 0, engine.number)
        if inference is None:
            return NOBODY
        self._table.seen_ns[inference.slot] = step.end_ns
        engine.ids[request_id] = inference
        return inference.slot

    def _begin_counting(self, engine: Engine) -> None:
        """From now on the engine's requests claim from its steps' curves."""
        engine.counting = True
        table = self._table
        mine = np.flatnonzero(table.engine == engine.number)
        table.claimed_ns[mine] = np.maximum(np.minimum(table.start_ns[mine], NEVER - 1), engine.settled_ns)

    def add_request(self, record: RequestRecord, now_ns: int) -> Taken:
        """Take in what a record tells of a request; fields that are set replace older ones."""
        self._now_ns = max(self._now_ns, now_ns)
        engine = self._engine_of(record, now_ns)
        if engine is None:
            return Taken.UNKNOWN_ENGINE
        return _counted(engine, self._add_request(engine, record, now_ns), now_ns)

    def _engine_of(self, record: RequestRecord, now_ns: int) -> Engine | None:
        if record.engine_id is not None:
            return self._known_engine(record.engine_id, now_ns)
        if not self._engines and len(self._by_number) == 1:
            return self._known_engine(self._by_number[0].engine_id, now_ns)
        return next(iter(self._engines.values())) if len(self._engines) == 1 else None

    def _add_request(self, engine: Engine, record: RequestRecord, now_ns: int) -> Taken:
        newest = record.end_ns or record.first_token_ns or record.scheduled_ns or record.arrival_ns
        if newest is not None and newest > now_ns + FUTURE_NS:
            return Taken.FUTURE
        inference = engine.ids.get(record.request_id)
        if inference is not None and inference.described:
            if inference.attempt != record.attempt:
                earlier = engine.superseded.get(record.request_id, ())
                match = next((one for one in earlier if one.attempt == record.attempt), None)
                if match is not None:
                    return self._add_known(engine, match, record, now_ns)
                return self._supersede(engine, inference, record, now_ns)
            if self._is_other_life(inference, record):
                return self._supersede(engine, inference, record, now_ns)
            return self._add_known(engine, inference, record, now_ns)
        life = self._settled.life(engine.number, record.request_id)
        # Another attempt, or an arrival after the settled life's end, is another inference.
        if life is not None and life[0] == record.attempt and (record.arrival_ns or 0) <= life[2]:
            return Taken.DUPLICATE
        return self._add_new(engine, inference, record, now_ns)

    def _is_other_life(self, inference: Inference, record: RequestRecord) -> bool:
        """Whether an engine that restarted has begun to use an id again."""
        if record.arrival_ns is None or inference.arrival_ns is None:
            return False
        if inference.status is not Status.RUNNING:
            return record.arrival_ns > int(self._table.end_ns[inference.slot])
        return record.arrival_ns > max(inference.arrival_ns + RESTART_NS, int(self._table.seen_ns[inference.slot]))

    def _supersede(self, engine: Engine, old: Inference, record: RequestRecord, now_ns: int) -> Taken:
        if old.status is Status.RUNNING and old.attempt == record.attempt:
            # The engine that ran it is gone; it ended when it was last heard of.
            seen_ns = int(self._table.seen_ns[old.slot])
            ended = RequestRecord(request_id=old.request_id, status=Status.FAILED, end_ns=seen_ns)
            self._merge(engine, old, ended, now_ns)
        engine.superseded.setdefault(old.request_id, []).append(old)
        del engine.ids[old.request_id]
        taken = self._add_new(engine, None, record, now_ns)
        if old.request_id not in engine.ids:
            engine.ids[old.request_id] = engine.superseded[old.request_id].pop()
            if not engine.superseded[old.request_id]:
                del engine.superseded[old.request_id]
        return taken

    def _add_new(self, engine: Engine, orphan: Inference | None, record: RequestRecord, now_ns: int) -> Taken:
        """Take in the first record of a request; `orphan` is its row when steps have named it before."""
        start_ns = record.scheduled_ns or record.arrival_ns or record.first_token_ns or record.end_ns or now_ns
        # Before that there is no energy; a stamp of 1970 must not count as a life of 50 years.
        start_ns = max(start_ns, now_ns - DEPTH_NS)
        ended = _is_end(record)
        end_ns = (record.end_ns or now_ns) if ended else NEVER
        if end_ns <= now_ns - DEPTH_NS:
            return Taken.LATE
        stepless = orphan is None
        if stepless and end_ns <= engine.settled_ns and engine.unclaimed.start_ns > end_ns:
            return Taken.LATE
        inference = orphan or self._table.open(record.request_id, record.attempt, engine.number)
        if inference is None:
            return Taken.OVERFLOW
        inference.described = True
        inference.attempt = record.attempt
        engine.ids[record.request_id] = inference
        self._table.start_ns[inference.slot] = start_ns
        if engine.counting:
            self._table.claimed_ns[inference.slot] = start_ns
        elif stepless and start_ns < engine.settled_ns and not engine.sends_steps(now_ns):
            self._table.claimed_ns[inference.slot] = start_ns
            engine.late.append(inference.slot)
        self._merge(engine, inference, record, now_ns)
        if not engine.sends_steps(now_ns):
            # A feed that tells of requests when they are over needs their whole life to stay open.
            engine.observe_delay(
                now_ns - (start_ns if ended or record.first_token_ns else newest_of(record, now_ns)), now_ns
            )
        return Taken.ACCEPTED

    def _add_known(self, engine: Engine, inference: Inference, record: RequestRecord, now_ns: int) -> Taken:
        if inference.status is not Status.RUNNING:
            # Another source may still say who paid for it; what it used is told already.
            again = _is_end(record)
            inference.model = inference.model or record.model
            inference.tenant = inference.tenant or record.tenant
            inference.trace_id = inference.trace_id or record.trace_id
            if record.usage is not None and inference.usage == Usage():
                inference.usage = record.usage
            return Taken.DUPLICATE if again else Taken.ACCEPTED
        self._merge(engine, inference, record, now_ns)
        if not engine.sends_steps(now_ns):
            engine.observe_delay(now_ns - newest_of(record, now_ns), now_ns)
        return Taken.ACCEPTED

    def _merge(self, engine: Engine, inference: Inference, record: RequestRecord, now_ns: int) -> None:
        table, slot = self._table, inference.slot
        if record.model is not None:
            inference.model = record.model
        if record.tenant is not None:
            inference.tenant = record.tenant
        if record.trace_id is not None:
            inference.trace_id = record.trace_id
        if record.arrival_ns is not None:
            inference.arrival_ns = record.arrival_ns
        start_ns = record.scheduled_ns or record.arrival_ns
        if start_ns is not None:
            start_ns = max(start_ns, now_ns - DEPTH_NS)
        if start_ns is not None and (record.scheduled_ns is not None or start_ns < table.start_ns[slot]):
            table.start_ns[slot] = start_ns
        usage = record.usage
        if usage is not None:
            inference.usage = usage
            if usage.input or usage.unit is not None:
                # A decode engine gets its prompts computed elsewhere.
                fresh = 0 if engine.record.role is Role.DECODE else usage.input - usage.cached_input
                table.tokens[slot] = fresh
                engine.note_prompt(fresh)
            if usage.unit is not None:
                table.first_token_ns[slot] = table.start_ns[slot]
        if record.first_token_ns is not None:
            table.first_token_ns[slot] = record.first_token_ns
        if _is_end(record):
            inference.status = Status.FINISHED if record.status in (None, Status.RUNNING) else record.status
            end_ns = max(record.end_ns or now_ns, int(table.start_ns[slot]))
            table.end_ns[slot] = end_ns
            if table.first_token_ns[slot] >= NEVER:
                table.first_token_ns[slot] = engine.estimated_first_token_ns(
                    int(table.start_ns[slot]), end_ns, float(table.tokens[slot]), inference.usage.output
                )
            table.first_token_ns[slot] = min(int(table.first_token_ns[slot]), end_ns)
        told_ns = record.end_ns or record.first_token_ns
        if told_ns is not None:
            engine.evidence_ns = max(engine.evidence_ns, told_ns)
        alive_ns = told_ns or start_ns or now_ns
        # Whoever tells of so old a time does it now.
        table.seen_ns[slot] = max(int(table.seen_ns[slot]), alive_ns if alive_ns > now_ns - DEPTH_NS else now_ns)

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
        for engines, uuids in self._groups(devices):
            self._settle_group(engines, uuids, now_ns, close_ns)
        self._charge()
        self._finish(now_ns)

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
        return min([until, *(engine.horizon(now_ns, self._table) for engine in engines)])

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
            keep_ns = max(UNCLAIMED_NS, round(engine.hold_ns(now_ns)))
            self._lose(engine, engine.unclaimed.expire(NEVER if close_ns is not None else engine.settled_ns - keep_ns))
            # Slot 0 of the table belongs to nobody: what it collected while this engine was settled is lost.
            nobody = float(self._table.joules(np.array([NOBODY]))[0])
            if nobody > 0:
                self._lose(engine, nobody)
                self._table.wipe_sums(np.array([NOBODY]))

    def _lose(self, engine: Engine, joules: float) -> None:
        """Book energy of an engine as unattributed."""
        if joules <= 0:
            return
        engine.lost_joules += joules
        for uuid, part in engine.returned(joules).items():
            self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + part

    def _settle_span(self, engines: Sequence[Engine], uuids: Sequence[str], until_ns: int) -> None:
        from_ns = min(self._settled_ns[uuid] for uuid in uuids)
        due = [engine for engine in engines if engine.settled_ns < until_ns and self._devices_of(engine.record)]
        for engine in due:
            # An engine's time begins with that of its devices; without energy there is nothing to hand out before.
            engine.settled_ns = max(engine.settled_ns, from_ns)
        plans = [engine.plan(until_ns, self._table) for engine in due]
        times = [*(plan.edges() for plan in plans), *(self._held[uuid].changes() for uuid in uuids)]
        edges = _edges(times, [self._views[uuid] for uuid in uuids], from_ns, until_ns)
        middle = (edges[:-1] + edges[1:]) // 2
        seen = [
            engine.see(plan, edges, _any_busy([view.busy for view in self._views_of(engine)], middle))
            for engine, plan in zip(due, plans, strict=True)
        ]
        joules = [np.zeros(len(middle)) for _ in due]
        slacks = [0.0 for _ in due]
        for uuid in uuids:
            owners = [at for at, engine in enumerate(due) if uuid in self._devices_of(engine.record)]
            used = self._take_energy(uuid, edges, until_ns)
            left = self._share_device(
                uuid, used, [due[at] for at in owners], [seen[at] for at in owners], [joules[at] for at in owners]
            )
            for at in owners:
                slacks[at] = max(slacks[at], slack(self._views[uuid], plans[at].from_ns, until_ns))
            worked = self._worked(uuid, edges, [due[at] for at in owners], [seen[at].active for at in owners])
            self._book_rest(uuid, left, worked, edges, [due[at] for at in owners])
        for engine, plan, sight, energy, off in zip(due, plans, seen, joules, slacks, strict=True):
            engine.busy_joules += float(energy.sum())
            if sight.active.any():
                engine.last_active_ns = int(edges[1:][sight.active][-1])
            engine.distribute(plan, sight, edges, energy, slack=off, table=self._table)
            waited = (self._table.engine == engine.number) & (self._table.first_token_ns >= NEVER)
            waited &= self._table.start_ns < until_ns
            # Whoever is still without first token has waited in a queue so far.
            self._table.start_ns[waited] = until_ns

    def _take_energy(self, uuid: str, edges: Int64s, until_ns: int) -> Float64s:
        """Return the device's energy by slice, without what was handed out before, and count it as handed out."""
        timeline = self._views[uuid].timeline
        begin_ns = self._settled_ns[uuid]
        end_ns = max(begin_ns, min(until_ns, timeline.end_ns))
        energies = timeline.energies_at(np.clip(edges, begin_ns, end_ns))
        used: Float64s = np.maximum(np.diff(energies), 0.0)
        self._settled_ns[uuid] = end_ns
        self._device_joules[uuid] = self._device_joules.get(uuid, 0.0) + float(used.sum())
        return used

    def _share_device(
        self, uuid: str, used: Float64s, engines: Sequence[Engine], seen: Sequence[Seen], joules: Sequence[Float64s]
    ) -> Float64s:
        """Add each engine's part of a device's energy (by slice) to `joules`; return what is left.

        Where one engine is active it gets the slice. Where several are, they share by SM time. An engine that has SM
        time but has told nothing for minutes keeps its part, as unattributed: nobody else's requests used it.
        """
        if not engines:
            return used
        if len(engines) == 1:
            active = seen[0].active
            taken = np.where(active, used, 0.0)
            joules[0][:] += taken
            _note(engines[0], uuid, float(taken.sum()))
            return np.where(active, 0.0, used)
        shares = self._views[uuid].engine_shares or {}
        known = [shares[engine.engine_id] for engine in engines if shares.get(engine.engine_id, 0.0) > 0]
        # An engine that the reading does not know, or saw idle, counts as an average one while it is active.
        usual = sum(known) / len(known) if known else 1.0
        actives = [sight.active for sight in seen]
        weights = [
            np.where(active, shares.get(engine.engine_id) or usual, 0.0)
            if active.any() or self._tells(engine)
            else np.full(len(used), shares.get(engine.engine_id, 0.0))
            for engine, active in zip(engines, actives, strict=True)
        ]
        total = np.sum(weights, axis=0)
        somebody = np.any(actives, axis=0)
        scale = np.divide(used, total, out=np.zeros(len(used)), where=somebody & (total > 0))
        given = np.zeros(len(used))
        for at, (engine, active, weight) in enumerate(zip(engines, actives, weights, strict=True)):
            taken = np.where(active, weight * scale, 0.0)
            joules[at][:] += taken
            given += taken
            _note(engine, uuid, float(taken.sum()))
            if not active.any() and not self._tells(engine):
                silent = float((weight * scale).sum())
                engine.busy_joules += silent
                engine.lost_joules += silent
                self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + silent
                given += weight * scale
        return np.maximum(used - given, 0.0)

    def _tells(self, engine: Engine) -> bool:
        """Whether the engine's requests are known at present."""
        return engine.told_ns > self._now_ns - SILENT_NS

    def _worked(self, uuid: str, edges: Int64s, engines: Sequence[Engine], actives: Sequence[Bools]) -> Bools:
        """Return the slices in which the device worked for nobody that is known."""
        track = self._views[uuid].busy
        if track is None:
            return np.zeros(len(edges) - 1, np.bool_)
        return _unexplained(track, edges, actives, max((engine.last_active_ns for engine in engines), default=0))

    def _book_rest(self, uuid: str, left: Float64s, worked: Bools, edges: Int64s, engines: Sequence[Engine]) -> None:
        """Book energy of slices without request: work without owner, or idle."""
        work = float(left[worked].sum())
        if len(engines) == 1 and work > 0:
            engine = engines[0]
            engine.busy_joules += work
            _note(engine, uuid, work)
            rows = worked & (left > 0)
            engine.unclaimed.append_unknown(edges[:-1][rows], edges[1:][rows], left[rows])
        elif work > 0:
            self._unattributed[uuid] = self._unattributed.get(uuid, 0.0) + work
            for engine in engines:
                engine.busy_joules += work / len(engines)
                engine.lost_joules += work / len(engines)
        held = self._held[uuid].at((edges[:-1] + edges[1:]) // 2, unknown=bool(engines))
        for kind, chosen in ((IdleKind.PARKED, held & ~worked), (IdleKind.BARE, ~held & ~worked)):
            idle = float(left[chosen].sum())
            key = (uuid, kind.value)
            self._idle[key] = self._idle.get(key, 0.0) + idle
            if kind is IdleKind.PARKED:
                for engine in engines:
                    self._accounts.spread_idle(engine.engine_id, idle / len(engines), self._nobody(engine))

    def _nobody(self, engine: Engine) -> tuple[str, str]:
        """Return the model and tenant that bear idle energy of an engine that has served nobody yet."""
        models = engine.record.models
        return models[0] if models else UNKNOWN_MODEL, self._default_tenant

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
            tenant = self._default_tenant if inference.tenant is None else inference.tenant
            self._table.account[inference.slot] = self._accounts.number(model, tenant, engine.engine_id)

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
            mine = table.engine[slots] == number
            self._by_number[number].learn_scale(table, slots[mine], output[mine])
        for inference in inferences:
            self._forget(inference)
        table.release(slots)

    def _words(self, inference: Inference, account: tuple[str, str, str]) -> tuple[str, str, str]:
        """Return engine, model and tenant for the answer: the names that were told, not the bounded ones."""
        model, tenant, engine_id = account
        if inference.model in (None, model) and inference.tenant in (None, tenant):
            return engine_id, model, tenant
        return engine_id, inference.model or model, tenant if inference.tenant is None else inference.tenant

    def _forget(self, inference: Inference) -> None:
        """Remove a request from its engine's ids."""
        engine = self._by_number[inference.engine]
        if engine.ids.get(inference.request_id) is inference:
            del engine.ids[inference.request_id]
            return
        earlier = engine.superseded.get(inference.request_id)
        if earlier is not None and inference in earlier:
            earlier.remove(inference)
            if not earlier:
                del engine.superseded[inference.request_id]

    def expire(self, now_ns: int) -> None:
        """Give up on requests and orphans that nobody has heard of for too long, and forget old answers."""
        self._now_ns = max(self._now_ns, now_ns)
        table = self._table
        live = np.flatnonzero(table.engine >= 0)
        for slot in live.tolist():
            inference = table.inferences[slot]
            assert inference is not None
            silent_ns = now_ns - int(table.seen_ns[slot])
            if inference.described:
                if inference.status is Status.RUNNING and silent_ns > self._limits.request_expiry_ns:
                    self._merge(
                        self._by_number[inference.engine],
                        inference,
                        RequestRecord(request_id=inference.request_id, status=Status.FAILED, end_ns=now_ns),
                        now_ns,
                    )
            elif silent_ns > self._limits.orphan_expiry_ns:
                self._drop_orphan(inference)
        self._forgotten_ns = now_ns - self._limits.settled_ns
        self._settled.expire(self._forgotten_ns)
        for engine in list(self._engines.values()):
            self._pass_over(engine, now_ns)
            self._retire(engine, now_ns)

    def _pass_over(self, engine: Engine, now_ns: int) -> None:
        """Close the past of an engine that has had no device for long: what ended then has used 0 J."""
        if self._devices_of(engine.record):
            engine.placed_ns = now_ns
        elif engine.placed_ns < now_ns - PLACE_PATIENCE_NS:
            engine.skip(now_ns - PLACE_PATIENCE_NS)

    def _retire(self, engine: Engine, now_ns: int) -> None:
        """Take an engine as gone when it has been silent for long: it owns no device any more."""
        if engine.steps or engine.heard_ns >= now_ns - self._limits.engine_expiry_ns:
            return
        if (self._table.engine == engine.number).any():
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
        self._forget(inference)
        self._table.release(slot)

    # ---------------------------------------------------------------- answers

    def price(self, request_id: str, engine_id: str | None = None) -> RequestEnergy | None:
        """Return a request's joules: final once its end is settled, else an estimate; None when it is not known.

        Without an engine id the newest request of that id on any engine. Up to the horizon an estimate holds what
        was measured, behind it the engine's last power per sequence and energy per prompt token.
        """
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

    def _provisional(self, engine: Engine, inference: Inference) -> RequestEnergy:
        table = self._table
        slot = np.array([inference.slot])
        start_ns, first_ns, end_ns = (
            int(column[inference.slot]) for column in (table.start_ns, table.first_token_ns, table.end_ns)
        )
        values = {name: float(getattr(table, name)[inference.slot]) for name in FLOATS[:4]}
        measured = sum(values.values())
        decoding_ns = min(end_ns, self._now_ns) - max(first_ns, engine.settled_ns)
        decode = engine.sequence_watts * max(0, decoding_ns) / 1e9
        prefill = 0.0
        if first_ns > engine.settled_ns and measured == 0:
            tokens = float(table.tokens[inference.slot])
            prefill = engine.token_joules * (engine.typical_prompt if np.isnan(tokens) else tokens)
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
            settled_ns=min(self._settled_ns.values(), default=0),
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
        )

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
            tenants=self._tally.tenants(),
            histograms={
                model: HistogramState(list(one.counts), one.total_joules)
                for model, one in self._tally.histograms.items()
            },
            in_flight=requests_of(self._table, [engine.engine_id for engine in self._by_number]),
        )

    @classmethod
    def restore(
        cls, state: LedgerState, limits: Limits, laws: LawBook, *, default_tenant: str = "", start_ns: int
    ) -> "Ledger":
        """Return a ledger that goes on from a state at `start_ns`.

        Energy that waited to be claimed is unattributed from now on, and the time between the two processes is not
        in anybody's account: the new timelines do not know it. No time of the state lies behind `start_ns`: where
        the clock was ahead before, all that comes would be late until then.
        """
        ledger = cls(limits, laws, default_tenant=default_tenant, start_ns=start_ns)
        for record, settled_ns in zip(state.engines, state.engine_settled_ns, strict=True):
            ledger._open_engine(record, min(settled_ns, start_ns), start_ns)
        ledger._settled_ns = {uuid: min(settled_ns, start_ns) for uuid, settled_ns in state.settled_ns.items()}
        ledger._device_joules = dict(state.device_joules)
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
        for request in sorted(state.in_flight.values(), key=lambda one: one.seen_ns):
            ledger._restore_request(not_after(request, start_ns), state.accounts)
        return ledger

    def _restore_request(self, state: InFlightState, accounts: Mapping[int, AccountState]) -> None:
        engine = self._engines[state.engine_id]
        number = NO_ACCOUNT
        if state.account is not None:
            account = accounts[state.account]
            number = self._accounts.number(account.model, account.tenant, account.engine_id)
        inference = restore_request(state, self._table, engine.number, number)
        if inference is None:
            # The configuration allows fewer than before: what was charged stays, the rest is nobody's.
            self._lose(engine, unpaid_joules(state))
            return
        earlier = engine.ids.get(state.request_id)
        if earlier is not None:
            engine.superseded.setdefault(state.request_id, []).append(earlier)
        engine.ids[state.request_id] = inference


def newest_of(record: RequestRecord, now_ns: int) -> int:
    """Return the latest time that a record tells, or now."""
    return record.end_ns or record.first_token_ns or record.scheduled_ns or record.arrival_ns or now_ns


def _is_end(record: RequestRecord) -> bool:
    return record.end_ns is not None or record.status not in (None, Status.RUNNING)


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


def _edges(known: Sequence[Int64s], views: Sequence[DeviceView], from_ns: int, until_ns: int) -> Int64s:
    """Return all times at which something may change, sorted, from from_ns to until_ns."""
    times = [np.array([from_ns, until_ns], np.int64), *known]
    times += [view.busy.changes(from_ns, until_ns) for view in views if view.busy is not None]
    edges: Int64s = np.unique(np.clip(np.concatenate(times), from_ns, until_ns))
    return edges


def _any_busy(tracks: Sequence[BusyTrack | None], times_ns: Int64s) -> Bools | None:
    """Return where any device may have worked; None when one of them cannot tell."""
    known = [track.around(times_ns) for track in tracks if track is not None]
    if not known or len(known) < len(tracks):
        return None
    worked: Bools = np.any(known, axis=0)
    return worked


def _unexplained(track: BusyTrack, edges: Int64s, actives: Sequence[Bools], last_active_ns: int) -> Bools:
    """Return the slices in which a device worked too far from any request's activity to have been its blur."""
    middle = (edges[:-1] + edges[1:]) // 2
    worked = track.at(middle)
    active = np.any(actives, axis=0) if actives else np.zeros(len(middle), np.bool_)
    before = np.maximum.accumulate(np.where(active, edges[1:], last_active_ns))
    after = np.minimum.accumulate(np.where(active, edges[:-1], NEVER)[::-1])[::-1]
    alone: Bools = worked & (middle - before > track.blur_ns) & (after - middle > track.blur_ns)
    return alone


def _note(engine: Engine, uuid: str, joules: float) -> None:
    engine.device_joules[uuid] = engine.device_joules.get(uuid, 0.0) + joules
