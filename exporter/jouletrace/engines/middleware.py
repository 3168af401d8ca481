"""Tells jouletrace about the requests of any ASGI server, from inside it; needs the standard library only.

    vllm serve ... --middleware jouletrace.engines.middleware.EnergyMiddleware
    app.add_middleware(EnergyMiddleware)                                        # FastAPI, Starlette

It looks at messages on their way and hands on each at once. With JOULETRACE_ENERGY=1 it adds the energy: a header to
plain answers, a comment before the `[DONE]` of streams; those two alone then wait for the daemon, as long as
JOULETRACE_ENERGY_BUDGET says.

    JOULETRACE_DATAGRAM_SOCKET   the daemon's datagram socket; /run/jouletrace/ingest.dgram where that is there, else
    JOULETRACE_URL               the daemon's URL, http://127.0.0.1:9841, where energy is asked for in any case
    JOULETRACE_TOKEN_FILE        ingest.token_file, where the daemon has one
    JOULETRACE_ENGINE_ID         what the engine is called: as the daemon or the vLLM plug-in calls it
    JOULETRACE_ENGINE_KIND       announces the engine to a daemon that does not find it: vllm, diffusion, ...
    JOULETRACE_TENANT_HEADERS    headers that name who pays, separated by commas; none by default
    JOULETRACE_ENERGY            1: add the energy to answers
    JOULETRACE_ENERGY_BUDGET     seconds, 0.15; from 1 on it waits for the final figure
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from jouletrace.engines.answers import Answer, AnswerStream, is_inference
from jouletrace.engines.callers import Callers, label
from jouletrace.engines.client import Client

DEFAULT_URL: Final = "http://127.0.0.1:9841"
DEFAULT_SOCKET: Final = "/run/jouletrace/ingest.dgram"
"""Where the packaged systemd service has it."""
DEFAULT_BUDGET_SECONDS: Final = 0.15
SETTLE_SECONDS: Final = 1.0
"""The daemon settles once a second: with a smaller budget the estimate is taken at once."""
PAUSE_SECONDS: Final = 5.0
"""A daemon that did not answer is not asked for so long."""
ASKING_THREADS: Final = 4
"""Answers that energy is asked for at a time: one takes a millisecond or two."""
WHOLE_BYTES: Final = 64 << 10
"""A plain answer up to this size is decoded (0.5 ms at most); of a larger one (embeddings, images) the end is searched
for the usage and the beginning for the model, so that the server's event loop is not held up."""
END_BYTES: Final = 8 << 10

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_USAGE: Final = re.compile(r'"usage"\s*:\s*(?=\{)')
_MODEL: Final = re.compile(r'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_DONE: Final = re.compile(rb"(?:^|\n)(?=data: ?\[DONE\])")

_log = logging.getLogger("jouletrace")


class EnergyMiddleware:
    """Wraps an ASGI application; see the module."""

    def __init__(self, app: App) -> None:
        self._app = app
        variables = os.environ
        engine_id = variables.get("JOULETRACE_ENGINE_ID") or None
        names = variables.get("JOULETRACE_TENANT_HEADERS", "").lower().split(",")
        self._callers = Callers(engine_id, [name.strip() for name in names if name.strip()])
        url = variables.get("JOULETRACE_URL") or DEFAULT_URL
        found = DEFAULT_SOCKET if "JOULETRACE_URL" not in variables and Path(DEFAULT_SOCKET).is_socket() else url
        target = variables.get("JOULETRACE_DATAGRAM_SOCKET") or found
        self._client = Client(target, api_url=url, token_file=_token_file(variables.get("JOULETRACE_TOKEN_FILE")))
        if engine_id is not None and variables.get("JOULETRACE_ENGINE_KIND"):
            # Over a socket the kernel tells the process, in the daemon's own numbers.
            pid = {"pid": os.getpid()} if target == url else {}
            self._client.send("engine", {"engine_id": engine_id, "kind": variables["JOULETRACE_ENGINE_KIND"], **pid})
        self._budget_seconds = 0.0
        if variables.get("JOULETRACE_ENERGY") == "1":
            self._budget_seconds = _seconds(variables.get("JOULETRACE_ENERGY_BUDGET"))
        # Threads of its own: a daemon that hangs must not use up those of the server.
        self._threads = ThreadPoolExecutor(ASKING_THREADS, thread_name_prefix="jouletrace")
        self._ask_again_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the application, and tell how it went."""
        if scope["type"] != "http" or not is_inference(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.end("cancelled")
            raise
        finally:
            exchange.end("cancelled" if exchange.is_client_gone else "failed")  # Unless it has ended.

    async def energy(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what jouletrace answers about a request, None when it does not, in time; never raises."""
        if not self._budget_seconds or time.monotonic() < self._ask_again_at:
            return None
        asked_at = time.monotonic()
        try:
            asking = asyncio.get_running_loop().run_in_executor(self._threads, self._ask, record)
            answer = await asyncio.wait_for(asking, self._budget_seconds)
        except TimeoutError:
            self._ask_again_at = time.monotonic() + PAUSE_SECONDS
            return None
        except Exception:  # The answer to the client comes first.
            return None
        if answer is None and time.monotonic() - asked_at > self._budget_seconds / 2:
            self._ask_again_at = time.monotonic() + PAUSE_SECONDS
        return answer

    def _ask(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        self._client.flush(self._budget_seconds / 2)
        wait = self._budget_seconds - 0.05 if self._budget_seconds >= SETTLE_SECONDS else 0.0
        answer = self._client.energy(record["request_id"], record.get("engine_id"), wait)
        joules = None if answer is None else answer.get("energy_joules")
        # An estimate of 0 says that nothing is known yet.
        is_known = isinstance(joules, int | float) and (joules > 0 or (answer or {}).get("final") is True)
        return answer if is_known else None


class _Exchange:
    """One request and its answer on their way through."""

    def __init__(self, middleware: EnergyMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self._middleware = middleware
        self._receive = receive
        self._send = send
        headers = list(scope.get("headers", ()))
        texts = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reversed(headers)}
        self._record = middleware._callers.record(texts.get, time.time_ns())
        if texts.get("x-request-id", "").strip() != self._record["request_id"]:
            # The engine then calls the request by this name, too.
            headers = [item for item in headers if item[0].lower() != b"x-request-id"]
            headers.append((b"x-request-id", self._record["request_id"].encode()))
        self.scope: Scope = {**scope, "headers": headers}
        self.is_client_gone = False
        self._answer = Answer()
        self._stream: AnswerStream | None = None
        self._document: bytearray | None = None
        self._start: Message | None = None
        """The start of a plain answer, which waits for its body when it is to get a header."""
        self._status = 0
        self._is_open = True
        self._tell()

    async def receive(self) -> Message:
        """Receive for the application."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_client_gone = True
        return message

    async def send(self, message: Message) -> None:
        """Send for the application."""
        if message["type"] == "http.response.start":
            self._look_at_start(message)
            if self._document is not None and self._middleware._budget_seconds:
                self._start = message
                return
        elif message["type"] == "http.response.body":
            await self._look_at_body(message)
            return
        await self._send(message)

    def _look_at_start(self, message: Message) -> None:
        self._status = message["status"]
        headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", ())}
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if self._status != 200 or headers.get(b"content-encoding", b"identity") != b"identity":
            return
        if kind in (b"text/event-stream", b"application/x-ndjson"):
            self._stream = AnswerStream(self._answer, is_sse=kind == b"text/event-stream")
        elif kind == b"application/json":
            self._document = bytearray()

    async def _look_at_body(self, message: Message) -> None:
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        if self._stream is not None:
            await self._look_at_stream(self._stream, message, is_last)
            return
        if self._document is not None and len(self._document) <= WHOLE_BYTES:
            self._document += body
        if self._document is not None and (is_last or self._start is not None):
            if is_last and len(self._document) <= WHOLE_BYTES:
                with contextlib.suppress(ValueError, RecursionError):
                    self._answer.read(json.loads(self._document))
            elif is_last:
                self._answer.read(_found(bytes(self._document), bytes(body)))
        if is_last:
            self._end_whole()
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(await self._with_header(start))
        await self._send(message)

    async def _look_at_stream(self, stream: AnswerStream, message: Message, is_last: bool) -> None:
        body = message.get("body", b"")
        stream.feed(body)
        if stream.began and "first_token_ns" not in self._record:
            self._record["first_token_ns"] = time.time_ns()
            self._tell()
        if is_last:
            stream.end()
        if self._is_open and (stream.held or is_last):
            self._end_whole()
            stream.release()
            done = _DONE.search(body)
            energy = await self._middleware.energy(self._record) if done is not None else None
            if energy is not None and done is not None:
                note = b": energy " + json.dumps(self._document_of(energy)).encode() + b"\n\n"
                message = {**message, "body": body[: done.end()] + note + body[done.end() :]}
        await self._send(message)

    async def _with_header(self, start: Message) -> Message:
        energy = await self._middleware.energy(self._record)
        if energy is None:
            return start
        is_final = b"true" if energy.get("final") is True else b"false"
        added = [
            (b"x-energy-joules", f"{energy['energy_joules']:.6g}".encode()),
            (b"x-energy-final", is_final),
        ]
        return {**start, "headers": [*start.get("headers", ()), *added]}

    def _document_of(self, energy: Mapping[str, Any]) -> dict[str, Any]:
        usage = self._answer.usage
        output = usage["output"] if usage else 0
        joules = float(energy["energy_joules"])
        return {
            "energy_joules": float(f"{joules:.6g}"),
            "joules_per_output_token": float(f"{joules / output:.6g}") if output else None,
            "method": energy.get("method"),
            "final": energy.get("final") is True,
            "request_id": self._record["request_id"],
        }

    def _end_whole(self) -> None:
        """Tell of an answer that the application has ended."""
        is_cut = self._stream is not None and not self._answer.ended
        failed = self._status != 200 or self._answer.failed or is_cut
        self.end("cancelled" if self.is_client_gone else "failed" if failed else "finished")

    def end(self, status: str) -> None:
        """Tell how it ended; the first call counts."""
        if not self._is_open:
            return
        self._is_open = False
        self._middleware._callers.ended(self._record)
        end_ns = time.time_ns()
        self._record |= {"status": status, "end_ns": end_ns}
        if self._answer.decode_ns is not None and "first_token_ns" not in self._record:
            self._record["first_token_ns"] = max(self._record["arrival_ns"], end_ns - self._answer.decode_ns)
        model, usage = label(self._answer.model), self._answer.usage
        if model is not None:
            self._record["model"] = model
            if usage is not None:
                self._record["usage"] = usage
        self._tell()

    def _tell(self) -> None:
        self._middleware._client.send("request", self._record)


def _found(beginning: bytes, end: bytes) -> dict[str, Any]:
    """Return model and usage of a large JSON document, from its two ends."""
    found: dict[str, Any] = {}
    for part in (beginning[:END_BYTES], beginning[-END_BYTES:], end[-END_BYTES:]):
        text = part.decode(errors="replace")
        if (model := _MODEL.search(text)) is not None:
            found.setdefault("model", json.loads(model[1]))
        for usage in _USAGE.finditer(text):
            with contextlib.suppress(ValueError, RecursionError):
                found["usage"] = json.JSONDecoder().raw_decode(text, usage.end())[0]
    return found


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or DEFAULT_BUDGET_SECONDS)
    except ValueError:
        seconds = -1.0
    if 0 <= seconds <= 30:
        return seconds
    _log.warning(
        "JOULETRACE_ENERGY_BUDGET: %r is not a number of seconds from 0 to 30; %g is used", text, DEFAULT_BUDGET_SECONDS
    )
    return DEFAULT_BUDGET_SECONDS


def _token_file(path: str | None) -> str | None:
    if not path:
        return None
    try:
        Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        # The server must start all the same; jouletrace refuses what it is told until the file can be read.
        _log.warning("JOULETRACE_TOKEN_FILE: %s cannot be read (%s): jouletrace will refuse the records", path, error)
    return path
