"""The HTTP interface for records and answers, everything below `/v1/`."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, Final, Protocol

import msgspec
from aiohttp import hdrs, web

from jouletrace.clock import Clock
from jouletrace.config import parse_duration
from jouletrace.diagnosis.node import DiagnosisSnapshot
from jouletrace.requests.account import LedgerSnapshot, RequestEnergy
from jouletrace.requests.admission import Admission
from jouletrace.requests.decoding import LineError, RecordDecoder, TooManyRecordsError, held_bytes
from jouletrace.requests.inbox import Events, Inbox, Loss, Origin
from jouletrace.requests.records import RecordError, RecordKind, RequestRecord, Status, check_request
from jouletrace.web.diagnosis import diagnosis_document
from jouletrace.web.entrance import BODY_SECONDS, OTHER_RULES, RETRY_SECONDS, Entrance, Problem
from jouletrace.web.schema import records_schema

WAIT_SECONDS: Final = 30.0
"""Longest `?wait=`."""
MAX_WAITING: Final = 4096
"""Answers that may be waited for at a time; more get the provisional figure at once."""
MAX_ERRORS: Final = 20
"""Errors that one answer lists; the rest are only counted."""
MAX_LISTED: Final = 1000
"""Most requests that `GET /v1/requests` lists."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BodyHandler = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


class Answers(Protocol):
    """Who knows what was used."""

    @property
    def snapshot(self) -> LedgerSnapshot:
        """The account."""

    def events(self) -> Events:
        """Return the counts of records."""

    async def recent(self, limit: int) -> list[RequestEnergy]:
        """Return the requests that were settled last."""

    async def price(
        self, request_id: str, engine_id: str | None = None, wait_seconds: float = 0.0
    ) -> RequestEnergy | None:
        """Return what a request used, None for an unknown one."""


class Receipt(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to records."""

    accepted: int
    dropped: dict[str, int]
    """By reason."""
    errors: list[dict[str, str | int]]
    """The first 20: line, field, message."""
    resend_from: int | None = None
    """With 429: the first line that was not looked at; send it and all after it again."""


class Api:
    """The routes below `/v1/`.

    Clients on this machine and those with a token are answered, nobody else: what a tenant uses is nobody else's
    business, and records decide who pays.
    """

    def __init__(
        self,
        answers: Answers,
        inbox: Inbox,
        *,
        clock: Clock,
        diagnosis: Callable[[], DiagnosisSnapshot] = DiagnosisSnapshot,
        tokens: Sequence[str] = (),
        max_body_bytes: int = 8 << 20,
        max_records: int = 65_536,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._answers = answers
        self._inbox = inbox
        self._clock = clock
        self._diagnosis = diagnosis
        self.entrance = Entrance(tokens=tokens, max_body_bytes=max_body_bytes, body_seconds=body_seconds)
        """Who may come in, and how much at a time; for other routes that take records as well."""
        self.admission = Admission(inbox, self._settled_engines, clock)
        """What is said of records before they are queued; for the sockets as well."""
        self._decoders = {kind: RecordDecoder(kind, max_records=max_records) for kind in RecordKind}
        self._waiting = 0

    def routes(self) -> list[web.RouteDef]:
        """Return the routes for an application."""
        open_to, takes = self._for_the_entitled, self._with_body
        return [
            web.post("/v1/engines", takes(partial(self._post, RecordKind.ENGINE))),
            web.post("/v1/steps", takes(partial(self._post, RecordKind.STEP))),
            web.post("/v1/requests", takes(partial(self._post, RecordKind.REQUEST))),
            web.post("/v1/requests/{request_id}/start", takes(partial(self._live, "arrival_ns", Status.RUNNING))),
            web.post("/v1/requests/{request_id}/first-token", takes(partial(self._live, "first_token_ns", None))),
            web.post("/v1/requests/{request_id}/finish", takes(partial(self._live, "end_ns", Status.FINISHED))),
            web.get("/v1/requests/{request_id}", open_to(self._get_request)),
            web.get("/v1/requests", open_to(self._get_requests)),
            web.get("/v1/ledger", open_to(self._get_ledger)),
            web.get("/v1/diagnosis", open_to(self._get_diagnosis)),
            web.get("/v1/schema", self._get_schema),
        ]

    def _settled_engines(self) -> Set[str]:
        return self._answers.snapshot.in_flight.keys()

    # --- who may ---

    def _for_the_entitled(self, handler: Handler) -> Handler:
        async def entitled(request: web.Request) -> web.StreamResponse:
            refusal = self.entrance.refusal(request)
            return await handler(request) if refusal is None else _refused(refusal)

        return entitled

    # --- records in ---

    def _with_body(self, handler: BodyHandler) -> Handler:
        """Return a handler for the entitled that is given the unpacked body, which counts until it is answered."""

        async def answered(request: web.Request) -> web.StreamResponse:
            body = await self.entrance.read(request)
            if isinstance(body, Problem):
                return _refused(body)
            self.entrance.hold(body)
            try:
                return await handler(request, body.content)
            finally:
                self.entrance.release(body)

        return self._for_the_entitled(answered)

    async def _post(self, kind: RecordKind, _: web.Request, content: bytes) -> web.StreamResponse:
        try:
            body = self._decoders[kind].body(content)
        except TooManyRecordsError as error:
            return _problem(413, f"Nothing was taken: {error}.")
        accepted = 0
        dropped: Counter[str] = Counter()
        errors: list[LineError] = []
        for part in body.slices(self.admission.check):
            if part.first_line > 1:
                # A large body must not hold up everybody else.
                await asyncio.sleep(0)
            if not self._inbox.offer(Origin.HTTP, part.records, part.held_bytes):
                left = body.count(part.first_line)
                self._inbox.lost(Origin.HTTP, Loss.QUEUE_FULL, left)
                dropped[Loss.QUEUE_FULL] = left
                return _receipt(429, accepted, dropped, errors, resend_from=part.first_line)
            accepted += len(part.records)
            if part.errors:
                reasons = Counter(error.reason for error in part.errors)
                for reason, count in reasons.items():
                    self._inbox.lost(Origin.HTTP, reason, count)
                dropped += reasons
                errors += part.errors[: MAX_ERRORS - len(errors)]
        if not accepted and not dropped:
            return _problem(400, "The body is empty; send a record, a JSON array of records, or one record per line.")
        return _receipt(200 if accepted else 400, accepted, dropped, errors)

    async def _live(
        self, stamp: str, status: Status | None, request: web.Request, content: bytes
    ) -> web.StreamResponse:
        """Take one moment of a request's life; the time is now unless the client says otherwise."""
        try:
            fields = msgspec.json.decode(content or b"{}", type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._inbox.lost(Origin.HTTP, Loss.INVALID)
            return _problem(400, "The body is not a JSON object; send one with what is known, or nothing.")
        own: dict[str, Any] = {stamp: self._clock.to_wall(self._clock.now_ns())}
        if status is not None:
            own["status"] = status
        given = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in own.items()} | fields
        given["request_id"] = msgspec.Raw(msgspec.json.encode(request.match_info["request_id"]))
        line = msgspec.json.encode(given)
        record, errors = self._decode_moment(line)
        if record is None:
            reason = errors[0].reason
            self._inbox.lost(Origin.HTTP, reason)
            return _receipt(400, 0, Counter({reason: 1}), errors)
        if not self._inbox.offer(Origin.HTTP, [record], held_bytes(record, len(line))):
            self._inbox.lost(Origin.HTTP, Loss.QUEUE_FULL)
            return _receipt(429, 0, Counter({Loss.QUEUE_FULL: 1}), [], resend_from=1)
        return _receipt(200, 1, Counter(), [])

    def _decode_moment(self, line: bytes) -> tuple[RequestRecord | None, list[LineError]]:
        try:
            record = msgspec.json.decode(line, type=RequestRecord)
            # The model may have come with the start, so that the end need not repeat it.
            check_request(msgspec.structs.replace(record, model=record.model or "known"))
        except RecordError as error:
            field, _, message = str(error).partition(": ")
            return None, [LineError(1, field, message)]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None, list(self._decoders[RecordKind.REQUEST].lines([line]).errors)
        refusal = self.admission.check()(record)
        if refusal is not None:
            return None, [LineError(1, refusal.field, refusal.message, refusal.reason)]
        return record, []

    # --- answers out ---

    async def _get_request(self, request: web.Request) -> web.StreamResponse:
        request_id = request.match_info["request_id"]
        wait_seconds = _wait_seconds(request)
        if wait_seconds is None:
            return _problem(400, "wait: is not a duration; write ?wait=2s or ?wait=500ms, at most 30s.")
        if self._waiting >= MAX_WAITING:
            wait_seconds = 0.0
        self._waiting += 1
        rules = self.entrance.rules
        try:
            energy = await self._answers.price(request_id, request.query.get("engine_id"), wait_seconds)
        finally:
            self._waiting -= 1
        if self.entrance.rules != rules:
            return _refused(OTHER_RULES)
        if energy is None:
            return _problem(
                404,
                "This request is not known: its record has not come in, was refused, or is older than what is kept "
                "(jouletrace_events_dropped_total counts what was refused, by reason).",
            )
        return _json(self._energy(energy))

    async def _get_requests(self, request: web.Request) -> web.StreamResponse:
        try:
            limit = int(request.query.get("limit", "100"))
        except ValueError:
            limit = 0
        if not 1 <= limit <= MAX_LISTED:
            return _problem(400, f"limit: is not a number from 1 to {MAX_LISTED}.")
        return _json({"requests": [self._energy(energy) for energy in await self._answers.recent(limit)]})

    async def _get_ledger(self, _: web.Request) -> web.StreamResponse:
        return _json(ledger_document(self._answers.snapshot, self._answers.events(), self._clock))

    async def _get_diagnosis(self, _: web.Request) -> web.StreamResponse:
        return _json(diagnosis_document(self._diagnosis(), self._clock))

    async def _get_schema(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=records_schema().encode(), content_type="application/schema+json")

    def _energy(self, energy: RequestEnergy) -> dict[str, Any]:
        answer: dict[str, Any] = msgspec.to_builtins(energy)
        for name in ("arrival_ns", "end_ns"):
            if answer[name] is not None:
                answer[name] = self._clock.to_wall(answer[name])
        return answer


def ledger_document(account: LedgerSnapshot, events: Events, clock: Clock) -> dict[str, Any]:
    """Return the account as JSON has it: joules, and lists of objects in place of maps with several keys."""
    idle: dict[str, dict[str, float]] = {uuid: {} for uuid in account.device_joules}
    for (uuid, kind), joules in account.idle_joules.items():
        idle.setdefault(uuid, {})[kind] = joules
    sums = {
        "device_joules": sum(account.device_joules.values()),
        "attributed_joules": sum(account.attributed_joules.values()),
        "pending_joules": sum(account.pending_joules.values()),
        "idle_joules": sum(account.idle_joules.values()),
        "unattributed_joules": sum(account.unattributed_joules.values()),
    }
    engines = sorted({*account.pending_joules, *account.in_flight, *account.coverage})
    return {
        "settled_ns": clock.to_wall(account.settled_ns) if account.settled_ns else None,
        "totals": sums | {"residual_joules": 2 * sums["device_joules"] - sum(sums.values())},
        "devices": [
            {
                "uuid": uuid,
                "device_joules": joules,
                "idle_joules": idle[uuid],
                "unattributed_joules": account.unattributed_joules.get(uuid, 0.0),
            }
            for uuid, joules in account.device_joules.items()
        ],
        "engines": [
            {
                "engine_id": engine,
                "pending_joules": account.pending_joules.get(engine, 0.0),
                "in_flight": account.in_flight.get(engine, 0),
                "coverage": account.coverage.get(engine),
            }
            for engine in engines
        ],
        "attributed": _rows(account.attributed_joules, ("model", "tenant", "engine_id", "phase"), "joules"),
        "allocated": _rows(account.allocated_joules, ("model", "tenant", "engine_id"), "joules"),
        "requests": _rows(account.requests, ("model", "tenant", "status"), "count"),
        "tokens": _rows(account.tokens, ("model", "tenant", "direction"), "count"),
        "units": _rows(account.units, ("model", "tenant", "unit"), "count"),
        "events": [{"source": source, "received": count} for source, count in events.received.items()],
        "dropped": _rows(events.dropped, ("source", "reason"), "count"),
    }


def _rows(values: Any, names: tuple[str, ...], value_name: str) -> list[dict[str, Any]]:
    return [dict(zip(names, key, strict=True)) | {value_name: value} for key, value in values.items()]


def _wait_seconds(request: web.Request) -> float | None:
    """Return what `?wait=` asks for, at most WAIT_SECONDS; None when it makes no sense."""
    try:
        return min(parse_duration(request.query["wait"]), WAIT_SECONDS) if "wait" in request.query else 0.0
    except ValueError:
        return None


def _receipt(
    status: int, accepted: int, dropped: Counter[str], errors: list[LineError], resend_from: int | None = None
) -> web.Response:
    listed: list[dict[str, str | int]] = [
        {"line": error.line, "field": error.field, "message": error.message} for error in errors
    ]
    receipt = Receipt(accepted=accepted, dropped=dict(dropped), errors=listed, resend_from=resend_from)
    headers: dict[str, str] | None = {hdrs.RETRY_AFTER: str(RETRY_SECONDS)} if status == 429 else None
    return _json(receipt, status, headers)


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, headers=headers, content_type="application/json"
    )


def _refused(problem: Problem) -> web.Response:
    return _problem(problem.status, problem.message, problem.headers)


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return _json({"error": {"status": status, "message": message}}, status, headers)
