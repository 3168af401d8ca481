"""OTLP receiver for traces: `POST /v1/traces` and, where grpcio is installed, `TraceService/Export`.

Spans of requests become request records. Whatever came and could be read goes on to the user's collector unchanged,
spans of other kinds and those of requests alike. Answers follow the OTLP specification 1.x: the request's encoding,
`partial_success` for spans that were refused, google.rpc.Status for a body that was, 429 for one that may come again.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
from aiohttp import hdrs, web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from jouletrace.config import Config, ConfigError, Otlp
from jouletrace.engines.otlp.decoding import Piece, UndecodableError, json_pieces, protobuf_pieces
from jouletrace.engines.otlp.senders import Sender, Senders, identity
from jouletrace.engines.otlp.spans import engine_role, is_request, request_record
from jouletrace.engines.otlp.tee import Tee, TeeCounts
from jouletrace.requests.account import Taken
from jouletrace.requests.admission import Admission
from jouletrace.requests.decoding import Check
from jouletrace.requests.inbox import Inbox, Loss, Origin
from jouletrace.requests.records import EngineRecord, Record, RecordError, Role
from jouletrace.web.access import Access
from jouletrace.web.application import api_application
from jouletrace.web.entrance import RETRY_SECONDS, Entrance, Problem
from jouletrace.web.serve import WebServer

PATH: Final = "/v1/traces"
PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
TURN_SECONDS: Final = 0.002
"""Longest time for which spans are decoded before others on the event loop get their turn."""
ROOM_SECONDS: Final = 1.0
"""How long an export waits for room among the records before its sender is asked to come again."""
COMPLAINT_SECONDS: Final = 60.0
"""Refused spans are logged at most this often; the metrics count each."""

_GRPC_CODES = {400: 3, 401: 16, 403: 7, 408: 4, 413: 8, 415: 3, 429: 8}
"""HTTP statuses as codes of google.rpc.Status (google/rpc/code.proto)."""
_LOST = {400: Loss.INVALID, 413: Loss.TOO_LONG}
"""Why a body was not taken that its sender does not send again."""

_SEVERAL = (
    "several engines are this process: set jouletrace.engine_id to one of them, or with data-parallel ranks in one "
    "server leave the requests to the plug-in"
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the spans of one export."""

    taken: int
    """Requests."""
    rejected: int
    """Requests' spans that were refused, each for a reason of its own."""
    message: str
    """Why the first of those was."""


class FullError(Exception):
    """There is no room for records; the export may come again."""


class SpanIntake:
    """Turns exports into records in the inbox. `engines` returns the engines in the account. For the event loop."""

    def __init__(self, inbox: Inbox, admission: Admission, engines: Callable[[], Sequence[EngineRecord]]) -> None:
        self._inbox = inbox
        self._admission = admission
        self._senders = Senders(engines)
        self._looking_up = asyncio.Lock()
        self._quiet_until = 0.0

    async def take(self, content: bytes, media_type: str) -> Outcome:
        """Take what an export tells of requests; raises UndecodableError and FullError.

        After FullError a part may have been taken: taking it again does no harm.
        """
        taken = 0
        refused: Counter[str] = Counter()
        message = ""
        turn_ends = time.perf_counter() + TURN_SECONDS
        try:
            for piece in json_pieces(content) if media_type == JSON else protobuf_pieces(content):
                if time.perf_counter() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.perf_counter() + TURN_SECONDS
                records, problems = await self._records(piece)
                await self._offer(records)
                taken += len(records)
                for reason, problem in problems:
                    refused[reason] += 1
                    message = message or problem
        except UndecodableError as error:
            self.refuse(Loss.INVALID, str(error))
            raise
        for reason, count in refused.items():
            self._inbox.lost(Origin.OTLP, reason, count)
        if refused:
            self._complain(message)
        return Outcome(taken, refused.total(), message)

    async def _records(self, piece: Piece) -> tuple[list[Record], list[tuple[str, str]]]:
        """Return the records of a piece, and the reason and the problem of each span that is refused."""
        problems: list[tuple[str, str]] = [(Loss.INVALID, error) for error in piece.errors]
        records: list[Record] = []
        senders: dict[tuple[str, Role], Sender] = {}
        check: Check | None = None
        for kind, span in piece.spans:
            if not is_request(span, kind):
                continue
            role = engine_role(span.name, kind)
            sender = senders.get((kind, role))
            if sender is None:
                sender = senders[kind, role] = await self._sender(piece, kind, role)
                check = self._admission.check()
            assert check is not None
            if sender.engine_id is None:
                problems.append((Taken.UNKNOWN_ENGINE, _SEVERAL))
                continue
            try:
                record = request_record(span, kind, sender.engine_id)
            except RecordError as error:
                problems.append((Loss.INVALID, str(error)))
                continue
            if record.model is not None and record.model not in sender.models:
                sender.serve(record.model)
                await self._announce(sender)
            refusal = check(record)
            if refusal is None:
                records.append(record)
            else:
                problems.append((refusal.reason, f"{refusal.field}: {refusal.message}"))
        return records, problems

    async def _sender(self, piece: Piece, kind: str, role: Role) -> Sender:
        who = identity(piece.resource, kind, role)
        sender = self._senders.find(who)
        if sender is None:
            async with self._looking_up:
                sender = self._senders.find(who)
                if sender is None:
                    # A look at /proc takes its time.
                    sender = await asyncio.to_thread(self._senders.look_up, who)
        await self._announce(sender)
        return sender

    async def _announce(self, sender: Sender) -> None:
        if sender.record is not None and sender.announced != sender.record:
            await self._offer([sender.record])
            sender.announced = sender.record

    async def _offer(self, records: Sequence[Record]) -> None:
        if self._inbox.offer(Origin.OTLP, records):
            return
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await self._inbox.room()
        except TimeoutError:
            pass
        else:
            if self._inbox.offer(Origin.OTLP, records):
                return
        self._inbox.lost(Origin.OTLP, Loss.QUEUE_FULL, len(records))
        raise FullError

    def refuse(self, reason: Loss, problem: str) -> None:
        """Count an export that cannot be taken and say why, now and then."""
        self._inbox.lost(Origin.OTLP, reason)
        self._complain(problem)

    def _complain(self, problem: str) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + COMPLAINT_SECONDS
            _log.warning("a span was refused", source=Origin.OTLP.value, problem=problem)


class _Listening(Protocol):
    """The gRPC server, whose module cannot be imported everywhere."""

    async def start(self, access: Access) -> None: ...

    async def stop(self) -> None: ...


class OtlpReceiver:
    """Everything that receives and passes on spans, as one service."""

    def __init__(
        self,
        config: Config,
        inbox: Inbox,
        *,
        admission: Admission,
        entrance: Entrance,
        engines: Callable[[], Sequence[EngineRecord]],
    ) -> None:
        """Raises ConfigError when the configuration asks for what cannot be."""
        otlp = config.otlp
        self._config = otlp
        self._entrance = entrance
        self._intake = SpanIntake(inbox, admission, engines)
        self._tee = _tee(otlp, entrance)
        self._server: WebServer | None = None
        self._grpc: _Listening | None = None
        if otlp.grpc_listen_address:
            try:
                # grpcio takes 60 ms to import and 8 MiB, and not everybody has it.
                from jouletrace.engines.otlp.rpc import GrpcServer  # noqa: PLC0415
            except ModuleNotFoundError:
                raise ConfigError(
                    "otlp.grpc_listen_address: needs the package grpcio, which is not installed; "
                    "run `pip install 'jouletrace[grpc]'`, or let engines send http/protobuf"
                ) from None
            self._grpc = GrpcServer(otlp.grpc_listen_address, entrance, self._export)

    def routes(self) -> Sequence[web.AbstractRouteDef]:
        """Return the route of the receiver, for the daemon's own listener."""
        return [web.post(PATH, self._post)]

    def tee(self) -> TeeCounts | None:
        """Return what was passed on, None when nothing is to be; may be called from any thread."""
        return None if self._tee is None else self._tee.counts()

    async def start(self, access: Access) -> None:
        """Listen and begin to pass on; raises ListenError and ConfigError.

        `access` says what TLS the listeners speak and which certificates they ask for.
        """
        if self._tee is not None:
            await self._tee.start()
        if self._config.listen_address:
            app = api_application(self.routes())
            access.guard(app, own_rules=self.routes())
            self._server = WebServer(app, tls=lambda: access.tls, address_flag="--otlp.listen-address")
            await self._server.start(self._config.listen_address)
            access.on_change(self._server.end_connections)
            for url in self._server.urls:
                _log.info("receiving spans", endpoint=f"{url}{PATH}")
        if self._grpc is not None:
            await self._grpc.start(access)

    async def stop(self) -> None:
        """Take no more, and pass on what is left if the collector takes it."""
        if self._server is not None:
            await self._server.stop()
        if self._grpc is not None:
            await self._grpc.stop()
        if self._tee is not None:
            await self._tee.stop()

    async def _export(self, content: bytes, media_type: str, sent: bytes, headers: Mapping[str, str]) -> Outcome:
        """Take an export and pass it on as it came; raises UndecodableError and FullError."""
        outcome = await self._intake.take(content, media_type)
        if self._tee is not None:
            self._tee.offer(sent, headers)
        return outcome

    async def _post(self, request: web.Request) -> web.Response:
        media_type = request.content_type
        answer_type = media_type if media_type in (PROTOBUF, JSON) else JSON
        problem = self._entrance.refusal(request)
        if problem is None and media_type not in (PROTOBUF, JSON):
            problem = Problem(415, f"The Content-Type is not known here; send {PROTOBUF} or {JSON}.")
        if problem is not None:
            return _refused(problem, answer_type)
        body = await self._entrance.read(request, keep_sent=self._tee is not None)
        if isinstance(body, Problem):
            if body.status in _LOST:  # The others come again.
                self._intake.refuse(_LOST[body.status], body.message)
            return _refused(body, answer_type)
        self._entrance.hold(body)
        try:
            outcome = await self._export(body.content, media_type, body.sent, request.headers)
        except UndecodableError as error:
            return _refused(Problem(400, str(error)), answer_type)
        except FullError:
            again: dict[str, str] = {hdrs.RETRY_AFTER: str(RETRY_SECONDS)}
            return _refused(Problem(429, "Too many records wait to be booked; send this again.", again), answer_type)
        finally:
            self._entrance.release(body)
        return web.Response(body=answer(outcome, answer_type), content_type=answer_type)


def answer(outcome: Outcome, media_type: str) -> bytes:
    """Return an ExportTraceServiceResponse, protobuf or JSON."""
    if media_type == JSON:
        partial = {"rejectedSpans": str(outcome.rejected), "errorMessage": outcome.message}
        return json.dumps({"partialSuccess": partial} if outcome.rejected else {}).encode()
    if not outcome.rejected:
        return b""
    rejected = ExportTracePartialSuccess(rejected_spans=outcome.rejected, error_message=outcome.message)
    return ExportTraceServiceResponse(partial_success=rejected).SerializeToString()


def status(code: int, message: str, media_type: str) -> bytes:
    """Return a google.rpc.Status, protobuf or JSON: field 1 is the code, field 2 the message."""
    if media_type == JSON:
        return json.dumps({"code": code, "message": message}).encode()
    text = message.encode()
    return bytes((0x08, code, 0x12, *_varint(len(text)))) + text


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes((low | 0x80,)) + _varint(rest) if rest else bytes((low,))


def _refused(problem: Problem, media_type: str) -> web.Response:
    body = status(_GRPC_CODES[problem.status], problem.message, media_type)
    return web.Response(body=body, status=problem.status, headers=problem.headers, content_type=media_type)


def _tee(config: Otlp, entrance: Entrance) -> Tee | None:
    if not config.forward_url:
        return None
    return Tee(
        config.forward_url,
        headers=config.forward_headers(),
        buffer_bytes=int(config.forward_buffer_mebibytes) << 20,
        hides_authorization=entrance.needs_token,
    )
