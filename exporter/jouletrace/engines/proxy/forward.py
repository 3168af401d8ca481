"""Passes requests on to the server behind, and what it answers back; tells jouletrace about those for the GPU.

Whatever is not understood passes as it is: other paths, bodies that are not JSON or too large to look at, answers that
are compressed all the same. Streams are not collected: what has come goes on before the next is read, and a client
that reads slowly slows down its own stream alone.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any, Final, Self

import aiohttp
import msgspec
import structlog
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from jouletrace.engines.answers import TELLING_KEYS, Answer, AnswerStream, is_inference
from jouletrace.engines.callers import Callers, label
from jouletrace.engines.client import Client
from jouletrace.engines.proxy.energy import Energy, EnergyDesk
from jouletrace.logs import Transitions

LOOKED_AT_BYTES: Final = 32 << 20
"""Larger bodies pass unread: a chat with a dozen photographs has 20 MiB, an answer with 2,000 embeddings as much."""
HELD_BYTES: Final = 256 << 20
"""Of bodies that are being looked at; more at a time pass unread, so that slow or many clients cost no more memory."""
_HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
"""RFC 9110 section 7.6.1: they are about one connection, not about the message."""
_OF_THE_BODY: Final = frozenset({"content-length", "content-md5", "content-digest", "digest", "etag", "repr-digest"})
"""Not true any more of a body that was changed."""
_STREAMS: Final = {"text/event-stream": True, "application/x-ndjson": False}
"""Whether a stream of this type is of server-sent events."""
_REFUSED: Final = frozenset({400, 422})
"""How servers refuse a field that they do not know."""

_log = structlog.get_logger(__name__)


class _ClientGoneError(Exception):
    """The client has closed its connection."""


class Proxy:
    """Answers every request by the server at `upstream`."""

    def __init__(
        self,
        upstream: str,
        session: aiohttp.ClientSession,
        *,
        client: Client,
        desk: EnergyDesk,
        callers: Callers,
    ) -> None:
        self._upstream = upstream.rstrip("/")
        self._session = session
        self._client = client
        self._desk = desk
        self._callers = callers
        self._states = Transitions(_log, time.monotonic_ns)
        self.statuses: Counter[str] = Counter()
        """How the requests for the GPU ended."""
        self.in_flight = 0
        """Requests of any kind that are being answered."""
        self.held_bytes = 0
        """Of bodies that are being looked at."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        if not request.raw_path.startswith("/"):
            return _problem(400, "The request's target is not a path.", "invalid_request_error")
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            return _problem(501, "WebSockets do not pass here; connect to the server itself.", "not_supported")
        self.in_flight += 1
        try:
            if is_inference(request.method, request.path):
                return await _Inference(self, request).answer()
            return await self._pass(request)
        except _ClientGoneError:
            return web.Response()  # Nobody is there to see it.
        finally:
            self.in_flight -= 1

    async def send(
        self, request: web.Request, headers: CIMultiDict[str], body: bytes | AsyncIterable[bytes] | None
    ) -> aiohttp.ClientResponse:
        """Return the server's answer as soon as its headers are there; raises aiohttp.ClientError, OSError."""
        try:
            response = await self._session.request(
                request.method,
                URL(self._upstream + request.raw_path, encoded=True),
                headers=headers,
                data=body,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as failure:
            self._states.failed(
                "upstream",
                "the server behind does not answer: clients get 502; see whether it runs, and --upstream",
                upstream=self._upstream,
                problem=f"{type(failure).__name__}: {failure}",
            )
            raise
        self._states.recovered("upstream", "the server behind answers again", upstream=self._upstream)
        return response

    def cut_off(self, request: web.Request, response: web.StreamResponse | None, failure: Exception) -> web.Response:
        """Return what to answer when the server broke off in the middle of an answer."""
        self._states.failed(
            "answer",
            "the server behind broke off an answer; the client's is cut off, too",
            upstream=self._upstream,
            problem=f"{type(failure).__name__}: {failure}",
        )
        if response is not None and response.prepared and request.transport is not None:
            # An end without the end of the answer is how HTTP says that it is not whole.
            request.transport.abort()
        return _problem(502, "The inference server behind jouletrace proxy broke off its answer.", "upstream_broke_off")

    def note_end(self, status: str) -> None:
        """Count how a request for the GPU ended."""
        self.statuses[status] += 1
        if status == "finished":
            self._states.recovered("answer", "answers of the server behind are whole again", upstream=self._upstream)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = request.content if request.can_read_body else None
        try:
            answer = await self.send(request, passed_headers(request.headers), body)
        except (aiohttp.ClientError, OSError):
            return _unreachable()
        async with answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=passed_headers(answer.headers)
            )
            try:
                await _prepare(response, request)
                async for chunk in answer.content.iter_any():
                    await _write(response, chunk)
            except aiohttp.ClientError as failure:
                return self.cut_off(request, response, failure)
            return response


class _Inference:
    """One request for the GPU, on its way there and back."""

    def __init__(self, proxy: Proxy, request: web.Request) -> None:
        self._proxy = proxy
        self._request = request
        self._answer = Answer()
        self._model: str | None = None
        self._record = proxy._callers.record(request.headers.get, time.time_ns())
        self._response: web.StreamResponse | None = None
        self._is_open = True
        self._began_ns: int | None = None

    async def answer(self) -> web.StreamResponse:
        """Pass it on and return the answer, having told jouletrace how it went."""
        self._tell()
        try:
            return await self._exchange()
        except (asyncio.CancelledError, _ClientGoneError):
            self._end("cancelled")
            raise
        finally:
            self._end("failed")  # Unless it has ended.

    async def _exchange(self) -> web.StreamResponse:
        request = self._request
        headers = passed_headers(request.headers)
        headers["X-Request-Id"] = self._record["request_id"]
        headers[hdrs.ACCEPT_ENCODING] = "identity"
        try:
            answer, is_edited = await self._send(headers)
        except (aiohttp.ClientError, OSError):
            return _unreachable()
        async with answer:
            if answer.status == 200:
                # Not before: a name that the server does not know must not become a label.
                self._record |= {"model": self._model} if self._model else {}
            try:
                if answer.status != 200 or answer.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
                    return await self._pass_on(answer)
                if answer.content_type in _STREAMS:
                    return await self._pass_stream(answer, drops_usage=is_edited)
                if answer.content_type == "application/json":
                    return await self._pass_document(answer)
                return await self._pass_on(answer)
            except aiohttp.ClientError as failure:
                self._end("failed")
                return self._proxy.cut_off(request, self._response, failure)

    async def _send(self, headers: CIMultiDict[str]) -> tuple[aiohttp.ClientResponse, bool]:
        """Send the request, with a question for the usage where it lacks one; return whether that was added."""
        request, send = self._request, self._proxy.send
        with _Held(self._proxy) as held:
            body, is_whole = await held.read(request.content.iter_any())
            if not is_whole:
                return await send(request, headers, _resumed(body, request.content)), False
            headers.popall(hdrs.CONTENT_LENGTH, None)
            edited = None
            if hdrs.CONTENT_ENCODING not in request.headers:
                self._model, edited = asking_for_usage(request.path, body)
            if edited is not None:
                answer = await send(request, headers, edited)
                if answer.status not in _REFUSED:
                    return answer, True
                # Perhaps for what was added: what the client gets must be an answer to what it sent.
                answer.close()
            return await send(request, headers, body), False

    async def _pass_on(self, answer: aiohttp.ClientResponse, beginning: bytes = b"") -> web.StreamResponse:
        """Pass an answer that nothing is read from."""
        response = await self._begin(answer)
        if beginning:
            await _write(response, beginning)
        async for chunk in answer.content.iter_any():
            await _write(response, chunk)
        self._end("finished" if answer.status < 400 else "failed")
        return response

    async def _pass_stream(self, answer: aiohttp.ClientResponse, *, drops_usage: bool) -> web.StreamResponse:
        is_sse = _STREAMS[answer.content_type]
        stream = AnswerStream(self._answer, is_sse=is_sse, drops_usage=drops_usage)
        response = await self._begin(answer, without=_OF_THE_BODY)
        async for chunk in answer.content.iter_any():
            passed = stream.feed(chunk)
            if passed:
                await _write(response, passed)
            if stream.began and self._began_ns is None:
                self._note_first_token()
            if stream.held:
                await self._write_last(response, stream, is_sse)
        if passed := stream.end():
            await _write(response, passed)
        await self._write_last(response, stream, is_sse)
        return response

    async def _write_last(self, response: web.StreamResponse, stream: AnswerStream, is_sse: bool) -> None:
        """Put the energy before the last event, or at the end of a stream that has none."""
        if not self._is_open:
            return
        ended = self._answer.ended and not self._answer.failed
        self._end("finished" if ended else "failed")
        energy = await self._proxy._desk.ask(self._record) if ended else None
        last = stream.release()
        if energy is not None:
            document = msgspec.json.encode(energy.document(self._output))
            last = b": energy " + document + b"\n\n" + last if is_sse else _with_energy(last, document)
        if last:
            await _write(response, last)

    async def _pass_document(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        with _Held(self._proxy) as held:
            body, is_whole = await held.read(answer.content.iter_any())
            if not is_whole:
                return await self._pass_on(answer, body)
            document = read_document(body)
            self._answer.read(document)
            self._end("failed" if self._answer.failed else "finished")
            energy = await self._proxy._desk.ask(self._record) if not self._answer.failed else None
            return self._with_energy(answer, body, energy, has_room=document is not None and "energy" not in document)

    def _with_energy(
        self, answer: aiohttp.ClientResponse, body: bytes, energy: Energy | None, *, has_room: bool
    ) -> web.Response:
        without = _OF_THE_BODY if energy is not None else frozenset({"content-length"})
        headers = self._headers(answer, without)
        if energy is not None:
            headers.update(energy.headers())
            if has_room:
                body = _with_energy(body, msgspec.json.encode(energy.document(self._output)))
        return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=body)

    @property
    def _output(self) -> int | None:
        usage = self._answer.usage
        return None if usage is None else usage["output"]

    async def _begin(self, answer: aiohttp.ClientResponse, without: frozenset[str] = frozenset()) -> web.StreamResponse:
        """Start an answer that is passed on piece by piece."""
        headers = self._headers(answer, without)
        self._response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        await _prepare(self._response, self._request)
        return self._response

    def _headers(self, answer: aiohttp.ClientResponse, without: frozenset[str]) -> CIMultiDict[str]:
        headers = passed_headers(answer.headers)
        for name in without & {name.lower() for name in headers}:
            headers.popall(name)
        # Whoever wants the final figure asks for it by this name.
        headers.setdefault("X-Request-Id", self._record["request_id"])
        return headers

    def _note_first_token(self) -> None:
        self._began_ns = time.time_ns()
        self._record["first_token_ns"] = self._began_ns
        self._tell()

    def _end(self, status: str) -> None:
        """Tell how it ended; the first call counts."""
        if not self._is_open:
            return
        self._is_open = False
        self._proxy._callers.ended(self._record)
        self._proxy.note_end(status)
        end_ns = time.time_ns()
        self._record |= {"status": status, "end_ns": end_ns}
        if self._began_ns is None and self._answer.decode_ns is not None:
            first_ns = max(self._record["arrival_ns"], end_ns - self._answer.decode_ns)
            self._record["first_token_ns"] = first_ns
        model = self._record.get("model") or label(self._answer.model)
        usage = self._answer.usage
        if model is not None:
            self._record["model"] = model
            if usage is not None:
                self._record["usage"] = usage
        self._tell()

    def _tell(self) -> None:
        self._proxy._client.send("request", self._record)


class _Held:
    """A body that is being looked at; counted in `Proxy.held_bytes` inside of `with`."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._size = 0

    async def read(self, chunks: AsyncIterable[bytes]) -> tuple[bytes, bool]:
        """Return the body and True, or as much of it as may be held and False."""
        parts: list[bytes] = []
        async for chunk in chunks:
            parts.append(chunk)
            self._size += len(chunk)
            self._proxy.held_bytes += len(chunk)
            if self._size > LOOKED_AT_BYTES or self._proxy.held_bytes > HELD_BYTES:
                return b"".join(parts), False
        return b"".join(parts), True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.held_bytes -= self._size


async def _resumed(beginning: bytes, rest: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield a body whose beginning has been read already."""
    yield beginning
    async for chunk in rest.iter_any():
        yield chunk


def passed_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the headers that a message keeps on its way."""
    named = {name.strip().lower() for value in headers.getall(hdrs.CONNECTION, ()) for name in value.split(",")}
    dropped = _HOP_BY_HOP | named | {"host", "expect"}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def asking_for_usage(path: str, body: bytes) -> tuple[str | None, bytes | None]:
    """Return the model that a request names, and its body with `include_usage` where it has to be added."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        model = msgspec.json.decode(fields["model"]) if "model" in fields else None
        model = label(model) if isinstance(model, str) else None
        is_stream = "stream" in fields and msgspec.json.decode(fields["stream"]) is True
        if not is_stream or not path.rstrip("/").endswith(("/chat/completions", "/completions")):
            return model, None
        options = msgspec.json.decode(fields.get("stream_options", b"null"))
        if options is not None and (not isinstance(options, dict) or options.get("include_usage") is True):
            return model, None
        fields["stream_options"] = msgspec.Raw(msgspec.json.encode((options or {}) | {"include_usage": True}))
        return model, msgspec.json.encode(fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, None


def read_document(body: bytes) -> Mapping[str, Any] | None:
    """Return the fields of an answer that tell something, the others as None; None when it is not an object."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return {name: msgspec.json.decode(raw) if name in TELLING_KEYS else None for name, raw in fields.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _with_energy(document: bytes, energy: bytes) -> bytes:
    """Return a JSON object with one more field, its other bytes as they are."""
    at = document.rindex(b"}")
    comma = b"" if document[:at].rstrip().endswith(b"{") else b","
    return document[:at] + comma + b'"energy":' + energy + document[at:]


async def _prepare(response: web.StreamResponse, request: web.Request) -> None:
    try:
        await response.prepare(request)
    except ConnectionError as error:
        raise _ClientGoneError from error


async def _write(response: web.StreamResponse, data: bytes) -> None:
    try:
        await response.write(data)
    except ConnectionError as error:
        raise _ClientGoneError from error


def _unreachable() -> web.Response:
    return _problem(502, "The inference server behind jouletrace proxy does not answer.", "upstream_unreachable")


def _problem(status: int, message: str, kind: str) -> web.Response:
    """Return an error in the form that OpenAI's clients read."""
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "code": status}})
    return web.Response(status=status, body=body, content_type="application/json")
