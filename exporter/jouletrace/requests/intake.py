"""What records tell of steps and requests, put where a pass of settling finds it.

The same id may come again: with more known, as another attempt, or as another life of an engine that restarted and
counts anew. A step may name requests that nobody has described yet; these wait for their record as orphans.
"""

import msgspec
import numpy as np

from jouletrace.energy.timeline import DEPTH_NS
from jouletrace.requests.account import Taken
from jouletrace.requests.engine import Engine, Step
from jouletrace.requests.inflight import NOBODY, NOTHING, Inference, InFlight
from jouletrace.requests.records import RequestRecord, Role, Status, StepRecord, joined_id
from jouletrace.requests.settled import Settled
from jouletrace.requests.split import NEVER

S = 1_000_000_000
FUTURE_NS = 5 * S
"""How far a record's time may lie ahead: clocks of containers on one node agree, NTP steps are below this."""
RESTART_NS = 1 * S
"""A running request that arrives again this much later is another life of its id."""


class Intake:
    """Writes records into the table of requests in flight and the engines' steps; `most_steps` may wait by engine."""

    def __init__(self, table: InFlight, settled: Settled, most_steps: int) -> None:
        self._table = table
        self._settled = settled
        self._most_steps = most_steps

    def add_step(self, engine: Engine, record: StepRecord, now_ns: int) -> Taken:
        """Take in a step of an engine; its requests need not be known yet."""
        if record.end_ns > now_ns + FUTURE_NS:
            return Taken.FUTURE
        engine.note_queue(record)
        if record.end_ns <= max(engine.settled_ns, now_ns - DEPTH_NS):
            return Taken.LATE
        if len(engine.steps) >= self._most_steps:
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
        request_id = joined_id(request_id)
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

    def add_request(self, engine: Engine, record: RequestRecord, now_ns: int) -> Taken:
        """Take in what a record tells of a request of an engine."""
        request_id = joined_id(record.request_id)
        if request_id is not record.request_id:
            record = msgspec.structs.replace(record, request_id=request_id)
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
            self.merge(engine, old, ended, now_ns)
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
        inference.saved = None
        engine.ids[record.request_id] = inference
        self._table.start_ns[inference.slot] = start_ns
        if engine.counting:
            self._table.claimed_ns[inference.slot] = start_ns
        elif stepless and start_ns < engine.settled_ns and not engine.sends_steps(now_ns):
            self._table.claimed_ns[inference.slot] = start_ns
            engine.late.append(inference.slot)
        self.merge(engine, inference, record, now_ns)
        if not engine.sends_steps(now_ns):
            # A feed that tells of requests when they are over needs their whole life to stay open.
            engine.observe_delay(
                now_ns - (start_ns if ended or record.first_token_ns else _newest_of(record, now_ns)), now_ns
            )
        return Taken.ACCEPTED

    def _add_known(self, engine: Engine, inference: Inference, record: RequestRecord, now_ns: int) -> Taken:
        if inference.status is not Status.RUNNING:
            # Another source may still say who paid for it; what it used is told already.
            again = _is_end(record)
            inference.saved = None
            inference.model = inference.model or record.model
            inference.tenant = inference.tenant or record.tenant
            inference.trace_id = inference.trace_id or record.trace_id
            if record.usage is not None and inference.usage == NOTHING:
                inference.usage = record.usage
            return Taken.DUPLICATE if again else Taken.ACCEPTED
        self.merge(engine, inference, record, now_ns)
        if not engine.sends_steps(now_ns):
            engine.observe_delay(now_ns - _newest_of(record, now_ns), now_ns)
        return Taken.ACCEPTED

    def merge(self, engine: Engine, inference: Inference, record: RequestRecord, now_ns: int) -> None:
        """Take over the fields that a record sets."""
        table, slot = self._table, inference.slot
        inference.saved = None
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

    def forget(self, engine: Engine, inference: Inference) -> None:
        """Remove a request from its engine's ids."""
        if engine.ids.get(inference.request_id) is inference:
            del engine.ids[inference.request_id]
            return
        earlier = engine.superseded.get(inference.request_id)
        if earlier is not None and inference in earlier:
            earlier.remove(inference)
            if not earlier:
                del engine.superseded[inference.request_id]


def _newest_of(record: RequestRecord, now_ns: int) -> int:
    """Return the latest time that a record tells, or now."""
    return record.end_ns or record.first_token_ns or record.scheduled_ns or record.arrival_ns or now_ns


def _is_end(record: RequestRecord) -> bool:
    return record.end_ns is not None or record.status not in (None, Status.RUNNING)
