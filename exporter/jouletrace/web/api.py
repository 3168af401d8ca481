"""The HTTP interface for records and answers, everything below `/v1/`."""

import asyncio
import hmac
import ipaddress
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Set
from functools import lru_cache, partial
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

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
from jouletrace.web.schema import records_schema

BODY_SECONDS: Final = 30.0
"""A client that has not sent its body by then is sent away."""
BODIES_BYTES: Final = 64 << 20
"""All bodies that are being received or decoded together; past it clients are asked to wait."""
WAIT_SECONDS: Final = 30.0
"""Longest `?wait=`."""
MAX_WAITING: Final = 4096
"""Answers that may be waited for at a time; more get the provisional figure at once."""
MAX_ERRORS: Final = 20
"""Errors that one answer lists; the rest are only counted."""
MAX_LISTED: Final = 1000
"""Most requests that `GET /v1/requests` lists."""
RETRY_SECONDS: Final = 1
PEERS: Final = 256
"""Addresses and Host headers of which is remembered whether they are this machine's."""

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

    Clients on this machine and those with the token are answered, nobody else: what a tenant uses is nobody else's
    business, and records decide who pays.
    """

    def __init__(
        self,
        answers: Answers,
        inbox: Inbox,
        *,
        clock: Clock,
        diagnosis: Callable[[], DiagnosisSnapshot] = DiagnosisSnapshot,
        token: str | None = None,
        max_body_bytes: int = 8 << 20,
        max_records: int = 65_536,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._answers = answers
        self._inbox = inbox
        self._clock = clock
        self._diagnosis = diagnosis
        self._token = token.encode() if token else None
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self.admission = Admission(inbox, self._settled_engines, clock)
        """What is said of records before they are queued; for the sockets as well."""
        self._decoders = {kind: RecordDecoder(kind, max_records=max_records) for kind in RecordKind}
        self._body_bytes = 0
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
            refusal = self._refusal(request)
            return await handler(request) if refusal is None else refusal

        return entitled

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Return why this client is not answered, None for one that is."""
        if hdrs.ORIGIN in request.headers:
            # A page in somebody's browser on this machine would count as a client on this machine.
            return _problem(403, "Web pages of other origins are not answered here; remove the Origin header.")
        if self._token is None:
            if not _is_loopback(request):
                return _problem(
                    403,
                    "Only clients on this machine are answered; set ingest.token_file to let others in, with the "
                    "token.",
                )
            if not names_loopback(request.headers.get(hdrs.HOST, "")):
                # A page whose name was made to point at this machine (DNS rebinding) sends no Origin with a GET.
                return _problem(
                    403,
                    "The Host header does not name this machine's loopback; ask localhost or 127.0.0.1, or set "
                    "ingest.token_file and send the token.",
                )
            return None
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(errors="surrogateescape"), self._token
        ):
            return None
        return _problem(
            401,
            "The token is missing or wrong: send the one of ingest.token_file as Authorization: Bearer TOKEN.",
            {hdrs.WWW_AUTHENTICATE: 'Bearer realm="jouletrace"'},
        )

    # --- records in ---

    def _with_body(self, handler: BodyHandler) -> Handler:
        """Return a handler for the entitled that is given the unpacked body, which counts until it is answered."""

        async def answered(request: web.Request) -> web.StreamResponse:
            content = await self._read(request)
            if isinstance(content, web.Response):
                return content
            self._body_bytes += len(content)
            try:
                return await handler(request, content)
            finally:
                self._body_bytes -= len(content)

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

    async def _read(self, request: web.Request) -> bytes | web.Response:
        """Return the unpacked body, or the answer to a client whose body is refused."""
        limit = self._max_body_bytes
        parts: list[bytes] = []
        size = 0
        encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
        if encoding == "identity" and request.content.is_eof():
            # It came with the headers, as small ones do; waiting for it costs more than decoding it.
            whole = request.content.read_nowait()
            return whole if len(whole) <= limit else _too_large(limit)
        if encoding not in ("identity", "gzip"):
            return _problem(415, "The body's Content-Encoding is not known here; send it as it is, or with gzip.")
        packed_body = _Gunzip(limit + 1) if encoding == "gzip" else None
        try:
            async with asyncio.timeout(self._body_seconds):
                async for received in request.content.iter_any():
                    part = received if packed_body is None else packed_body.unpack(received)
                    size += len(part)
                    self._body_bytes += len(part)
                    parts.append(part)
                    if size > limit:
                        return _too_large(limit)
                    if self._body_bytes > max(BODIES_BYTES, limit):
                        return _problem(
                            429,
                            "Too much is being received at a time; send this again.",
                            {hdrs.RETRY_AFTER: str(RETRY_SECONDS)},
                        )
            if packed_body is not None:
                packed_body.check_end()
        except TimeoutError:
            return _problem(408, f"The body did not come within {self._body_seconds:g} s; send it at once.")
        except zlib.error:
            return _problem(
                400, "The body cannot be unpacked: it is damaged or not gzip, as its Content-Encoding says."
            )
        finally:
            self._body_bytes -= size
        return b"".join(parts)

    # --- answers out ---

    async def _get_request(self, request: web.Request) -> web.StreamResponse:
        request_id = request.match_info["request_id"]
        wait_seconds = _wait_seconds(request)
        if wait_seconds is None:
            return _problem(400, "wait: is not a duration; write ?wait=2s or ?wait=500ms, at most 30s.")
        if self._waiting >= MAX_WAITING:
            wait_seconds = 0.0
        self._waiting += 1
        try:
            energy = await self._answers.price(request_id, request.query.get("engine_id"), wait_seconds)
        finally:
            self._waiting -= 1
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


class _Gunzip:
    """Unpacks a gzip stream piece by piece, up to a limit: a kilobyte of it can hold a megabyte of nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._stream = zlib.decompressobj(wbits=31)  # A gzip header and trailer (zlib.h, inflateInit2).

    def unpack(self, packed: bytes) -> bytes:
        """Return what a piece unpacks to, no more than the limit in all; raises zlib.error."""
        part = self._stream.decompress(packed, self._left) if self._left else b""
        self._left -= len(part)
        return part

    def check_end(self) -> None:
        """Raise zlib.error when the stream was cut off."""
        if not self._stream.eof:
            raise zlib.error("incomplete")


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


@lru_cache(PEERS)
def names_loopback(host: str) -> bool:
    """Return whether a Host header, with or without a port, is localhost or a loopback address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_loopback(request: web.Request) -> bool:
    transport = request.transport
    peer = None if transport is None else transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return False
    return _is_loopback_address(str(peer[0]))


@lru_cache(PEERS)
def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _receipt(
    status: int, accepted: int, dropped: Counter[str], errors: list[LineError], resend_from: int | None = None
) -> web.Response:
    listed: list[dict[str, str | int]] = [
        {"line": error.line, "field": error.field, "message": error.message} for error in errors
    ]
    receipt = Receipt(accepted=accepted, dropped=dict(dropped), errors=listed, resend_from=resend_from)
    headers: dict[str, str] | None = {hdrs.RETRY_AFTER: str(RETRY_SECONDS)} if status == 429 else None
    return _json(receipt, status, headers)


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, headers=headers, content_type="application/json"
    )


def _too_large(limit_bytes: int) -> web.Response:
    return _problem(
        413,
        f"The body is over {limit_bytes >> 20} MiB, unpacked; send it in parts, or raise ingest.max_body_mebibytes.",
    )


def _problem(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return _json({"error": {"status": status, "message": message}}, status, headers)
