"""Tells jouletrace about requests, from inside any Python program; needs the standard library only.

    client = Client("http://127.0.0.1:9841")        # or the path of one of jouletrace's Unix sockets

    with client.request(model="llama-3.1-8b", tenant="acme", engine_id="vllm-0") as request:
        request.first_token()
        request.usage(input=812, output=256)
    energy = request.energy(wait=2.0)                # None, or what GET /v1/requests/{id} answers

Nothing here raises into the program or holds it up: a call encodes a record and hands it over, 10 to 50 us, however
jouletrace fares. What cannot be delivered is counted in `client.dropped`. The file works alone: copy it if you like.
"""

import asyncio
import atexit
import contextlib
import errno
import functools
import http.client
import inspect
import json
import os
import pathlib
import queue
import socket
import threading
import time
import urllib.parse
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

QUEUE_RECORDS = 10_000
"""Records that wait while jouletrace is away; a second's worth of a very busy node."""
BATCH_RECORDS = 500
BATCH_BYTES = 1 << 20
"""Of one HTTP request; jouletrace takes 8 MiB."""
GATHER_SECONDS = 0.02
"""How long a record may wait for others to travel with it."""
TIMEOUT_SECONDS = 2.0
"""For one exchange with jouletrace; the program never waits for it, only the sending thread does."""
LONGEST_PAUSE_SECONDS = 5.0
"""Between two attempts to reach it."""
REPEAT_SECONDS = 60.0
"""How often engines are announced again, for a jouletrace that was restarted and forgot them."""
ENGINES = 64
"""Engines of one client that are announced again, those that were announced last."""
REREAD_SECONDS = 2.0
"""How often a token's file is read again at most while jouletrace refuses what it held; jouletrace looks as often."""
EXIT_SECONDS = 1.0
"""What the end of the program waits for records that are still queued."""

_PATHS = {"engine": "/v1/engines", "request": "/v1/requests", "step": "/v1/steps"}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Record = dict[str, Any]
Line = tuple[str, bytes]
"""A record as it travels: its kind, and its JSON with the newline."""


class Token:
    """What jouletrace is shown: a word, or the first in a file, which is read again when jouletrace refuses it.

    A file without one, or that cannot be read, shows nothing until jouletrace refuses that. Thread-safe.
    """

    def __init__(self, word: str | None = None, *, file: str | os.PathLike[str] | None = None) -> None:
        self._file = file
        self._word = word if file is None else _first_word(file)
        self._read_again_at = 0.0

    @property
    def headers(self) -> dict[str, str]:
        """The headers to send."""
        return {"Authorization": f"Bearer {self._word}"} if self._word else {}

    def renew(self, refused: Mapping[str, str]) -> bool:
        """Return whether there are other headers to send than these, which got a 401; reads the file to learn it."""
        old = refused.get("Authorization")
        now = time.monotonic()
        if self.headers.get("Authorization") == old and self._file is not None and now >= self._read_again_at:
            self._read_again_at = now + REREAD_SECONDS
            self._word = _first_word(self._file) or self._word
        return self.headers.get("Authorization") != old


class Client:
    """Sends records to one jouletrace. Thread-safe; after a fork the child has a client of its own.

    `target` is a URL, or the path of a Unix socket, stream or datagram. With a socket path, `api_url` is where
    `energy` asks. `token` is one of `ingest.token_file`, or `token_file` a file of which it is the first word: that is
    read again when jouletrace refuses the token, so that it can be replaced while the program runs.
    """

    def __init__(
        self,
        target: str = "http://127.0.0.1:9841",
        *,
        api_url: str | None = None,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        queue_records: int = QUEUE_RECORDS,
    ) -> None:
        is_url = target.startswith(("http://", "https://"))
        self._api_url = api_url or (target if is_url else None)
        self._token = Token(token, file=token_file)
        self._queue_records = queue_records
        self._make_sender: Callable[[], _Sender] = (
            functools.partial(_HttpSender, target, self._token) if is_url else functools.partial(_SocketSender, target)
        )
        # A child announces its parent's engines, too: servers fork, and then only the children serve.
        self._engines: dict[str, bytes] = {}
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        """Start with nothing queued and nothing open, as at first and in a forked child."""
        self._sender = self._make_sender()
        # An event in the queue is set when all before it has been dealt with.
        self._queue: queue.SimpleQueue[Line | threading.Event] = queue.SimpleQueue()
        self._lost = _Count()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._repeated_at = time.monotonic()
        self._repeated_on = 0

    @property
    def dropped(self) -> int:
        """How many records never reached jouletrace or were refused by it."""
        return self._lost.value

    def request(
        self,
        *,
        model: str | None = None,
        tenant: str | None = None,
        engine_id: str | None = None,
        request_id: str | None = None,
        trace_id: str | None = None,
        attempt: int = 0,
    ) -> "Request":
        """Return a context manager, plain and asynchronous, for one inference.

        `request_id` should be the engine's own where there is one, so that its steps find the request; by default it
        is a new UUID. `trace_id` is 32 hexadecimal digits (W3C Trace Context).
        """
        record: Record = {"request_id": request_id or uuid.uuid4().hex}
        given = {"model": model, "tenant": tenant, "engine_id": engine_id, "trace_id": trace_id}
        record |= {name: value for name, value in given.items() if value is not None}
        if attempt:
            record["attempt"] = attempt
        return Request(self, record)

    def unit(
        self, unit: str, *, count: int | Callable[[Any], int] = 1, **names: Any
    ) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
        """Return a decorator for a function, plain or asynchronous, whose every call is a request.

        `unit` is what it makes (image, frame, step, embedding), `count` how many, as a number or as a function of the
        result; `names` go to `request`. A `count` that fails counts as 0.
        """

        def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def asynchronous(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
                    async with self.request(**names) as request:
                        result = await function(*args, **kwargs)
                        request.usage(unit=unit, count=_counted(count, result))
                    return result

                return asynchronous  # type: ignore[return-value]

            @functools.wraps(function)
            def plain(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
                with self.request(**names) as request:
                    result = function(*args, **kwargs)
                    request.usage(unit=unit, count=_counted(count, result))
                return result

            return plain

        return decorate

    def engine(self, engine_id: str, **fields: Any) -> None:
        """Say what an engine is: kind, models, gpu_uuids, role; its pid is this process's unless given.

        Once is enough: it is said again after a reconnect and once a minute, as long as there are records.
        """
        self.send("engine", {"engine_id": engine_id, "pid": os.getpid(), **fields})

    def step(self, engine_id: str, start_ns: int, end_ns: int, **fields: Any) -> None:
        """Tell of one forward pass: epoch nanoseconds, and `prefill`, `decode` or their counts (docs/api.md)."""
        self.send("step", {"engine_id": engine_id, "start_ns": start_ns, "end_ns": end_ns, **fields})

    def send(self, kind: str, record: Mapping[str, Any]) -> None:
        """Hand over a record of kind engine, step or request."""
        try:
            line = json.dumps({"record": kind, **record}, separators=(",", ":"), allow_nan=False).encode() + b"\n"
            if self._closing.is_set():
                self._lost.add(1)
                return
            if kind == "engine":
                self._remember(str(record.get("engine_id")), line)
            if not self._is_repeat_due() and self._sender.send_now(line):
                return
            if self._queue.qsize() >= self._queue_records:
                self._lost.add(1)
                return
            self._queue.put((kind, line))
            if self._thread is None:
                self._start()
        except Exception:  # The program's work comes first.
            self._lost.add(1)

    def flush(self, timeout: float = EXIT_SECONDS) -> bool:
        """Wait until everything is delivered or given up; return whether it is."""
        if self._thread is None:
            return True
        reached = threading.Event()
        self._queue.put(reached)
        return reached.wait(timeout)

    def close(self, timeout: float = EXIT_SECONDS) -> None:
        """Deliver what is queued, as far as `timeout` seconds allow; what comes later is dropped."""
        self.flush(timeout)
        self._closing.set()
        self._queue.put(threading.Event())  # Wakes the thread, so that it can end.

    def energy(self, request_id: str, engine_id: str | None = None, wait: float = 0.0) -> dict[str, Any] | None:
        """Return what jouletrace answers about a request, None when it does not; takes `wait` seconds and a bit.

        In a coroutine use `await asyncio.to_thread(client.energy, ...)`.
        """
        if self._api_url is None:
            return None
        deadline = time.monotonic() + wait
        self.flush(min(wait, EXIT_SECONDS))
        rest = max(0.0, deadline - time.monotonic())
        query = {"wait": f"{round(rest * 1000)}ms"} | ({"engine_id": engine_id} if engine_id else {})
        path = f"/v1/requests/{urllib.parse.quote(request_id, safe='')}?{urllib.parse.urlencode(query)}"
        connection = None
        try:
            connection = _connection(self._api_url, rest + TIMEOUT_SECONDS)
            while True:
                headers = self._token.headers
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                content = response.read()
                if response.status != 401 or not self._token.renew(headers):
                    break
            answer = json.loads(content)
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            if connection is not None:
                connection.close()
        return answer if response.status == 200 and isinstance(answer, dict) else None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remember(self, engine_id: str, line: bytes) -> None:
        self._engines.pop(engine_id, None)
        self._engines[engine_id] = line
        if len(self._engines) > ENGINES:
            self._engines.pop(next(iter(self._engines)), None)

    def _is_repeat_due(self) -> bool:
        return bool(self._engines) and time.monotonic() - self._repeated_at > REPEAT_SECONDS

    def _repeat_engines(self, sender: "_Sender", batch: Sequence[Line]) -> None:
        """Announce the engines again when it is time or the connection is new; those of the batch are on their way."""
        if sender.connections == self._repeated_on and not self._is_repeat_due():
            return
        rest: Sequence[Line] = [("engine", line) for line in list(self._engines.values())]
        rest = [item for item in rest if item not in batch]
        while rest:
            # Nobody counts what is refused: the record was counted the first time.
            rest, _, wait = sender.send(rest)
            if rest and wait:
                return  # It has no room now; the next batch tries again.
        self._repeated_at, self._repeated_on = time.monotonic(), sender.connections

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver_until_closed, name="jouletrace", daemon=True)
                self._thread.start()

    def _deliver_until_closed(self) -> None:
        waiting, lost, sender = self._queue, self._lost, self._sender
        while True:
            item = waiting.get()
            batch: list[Line] = []
            until = time.monotonic() + GATHER_SECONDS
            while not isinstance(item, threading.Event):
                batch.append(item)
                if len(batch) == BATCH_RECORDS:
                    break
                try:
                    item = waiting.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
            if batch:
                lost.add(self._deliver(sender, batch))
            if isinstance(item, threading.Event):
                item.set()
            if self._closing.is_set() and waiting.empty():
                sender.close()
                return

    def _deliver(self, sender: "_Sender", batch: Sequence[Line]) -> int:
        """Send until it arrives, or until the queue is so full that the oldest give way; return how many were lost."""
        lost = 0
        pause = 0.05
        while batch and not self._closing.is_set():
            wait = pause
            try:
                sender.open()
                self._repeat_engines(sender, batch)
                batch, refused, wait = sender.send(batch)
                lost += refused + sender.refused_later()
                pause = 0.05
            except (OSError, http.client.HTTPException):
                if self._queue.qsize() >= self._queue_records:
                    break
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except Exception:  # An answer that makes no sense, from something that is not jouletrace.
                break
            if batch:
                self._closing.wait(wait)
        return lost + len(batch)


class Request:
    """One inference; made by `Client.request`."""

    def __init__(self, client: Client, record: Record) -> None:
        self._client = client
        self._record = record

    @property
    def request_id(self) -> str:
        """The id that jouletrace knows it by."""
        return str(self._record["request_id"])

    def scheduled(self) -> None:
        """Say that the engine has begun to work on it."""
        self._moment("scheduled_ns")

    def first_token(self) -> None:
        """Say that its first token is there; later calls say nothing."""
        if "first_token_ns" not in self._record:
            self._moment("first_token_ns")

    def usage(
        self,
        *,
        input: int = 0,  # noqa: A002 - the record's own word
        cached_input: int = 0,
        output: int = 0,
        unit: str | None = None,
        count: int = 0,
    ) -> None:
        """Say what it consumed and made; the last call counts. Sent at its end."""
        tokens = {"input": input, "cached_input": cached_input, "output": output}
        self._record["usage"] = tokens if unit is None else {"unit": unit, "count": count}

    def energy(self, wait: float = 0.0) -> dict[str, Any] | None:
        """Return what jouletrace answers about it, None when it does not; see `Client.energy`."""
        return self._client.energy(self.request_id, self._record.get("engine_id"), wait)

    def __enter__(self) -> "Request":
        self._record["status"] = "running"
        self._moment("arrival_ns")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cancelled = kind is not None and issubclass(kind, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt))
        self._record["status"] = "finished" if kind is None else "cancelled" if cancelled else "failed"
        self._moment("end_ns")

    async def __aenter__(self) -> "Request":
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def _moment(self, name: str) -> None:
        self._record[name] = time.time_ns()
        self._client.send("request", self._record)


class _Count:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


class _Sender:
    """A way to jouletrace; all but `send_now` is called by one thread only."""

    connections = 0
    """How often it was connected."""

    def open(self) -> None:
        """Connect unless it is; raises OSError or HTTPException when jouletrace cannot be reached."""
        raise NotImplementedError

    def send_now(self, line: bytes) -> bool:
        """Return True when the record could be handed to the kernel without waiting."""
        return False

    def send(self, batch: Sequence[Line]) -> tuple[Sequence[Line], int, float]:
        """Send, once open; return what has to be sent again, how many were refused for good, and seconds to wait.

        Raises OSError or HTTPException when jouletrace cannot be reached.
        """
        raise NotImplementedError

    def refused_later(self) -> int:
        """Return how many records were refused by answers that came since the last call."""
        return 0

    def close(self) -> None:
        """Let go of what is open."""


class _HttpSender(_Sender):
    def __init__(self, url: str, token: Token) -> None:
        self._url = url
        self._token = token
        self._open: http.client.HTTPConnection | None = None

    def open(self) -> None:
        if self._open is not None:
            return  # One that the server closed in good order after an answer is opened again by http.client.
        connection = _connection(self._url, TIMEOUT_SECONDS)
        connection.connect()
        self._open = connection
        self.connections += 1

    def send(self, batch: Sequence[Line]) -> tuple[Sequence[Line], int, float]:
        assert self._open is not None
        # One POST a kind: an engine before its requests and steps, else in order.
        kind = next(kind for kind in _PATHS if any(other == kind for other, _ in batch))
        now: list[Line] = []
        rest: list[Line] = []
        size = 0
        for item in batch:
            size += len(item[1]) if item[0] == kind else 0
            (now if item[0] == kind and (not now or size <= BATCH_BYTES) else rest).append(item)
        try:
            headers = self._token.headers | {"Content-Type": "application/x-ndjson"}
            self._open.request("POST", _PATHS[kind], b"".join(line for _, line in now), headers)
            response = self._open.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        if response.status == 401 and self._token.renew(headers):
            return batch, 0, 0.0
        if response.status in (429, 503):
            wait = _seconds(response.headers.get("Retry-After"))
            answer = json.loads(content)
            taken = int(answer.get("resend_from", 1)) - 1
            dropped = answer.get("dropped", {})
            refused = int(sum(dropped.values()) - dropped.get("queue_full", 0))
            return [*now[taken:], *rest], refused, wait
        if response.status in (200, 400):
            return rest, int(sum(json.loads(content).get("dropped", {"all": len(now)}).values())), 0.0
        return rest, len(now), 0.0

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class _SocketSender(_Sender):
    """A Unix socket; what its file is decides between stream and datagrams."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stream: socket.socket | None = None
        self._datagrams: socket.socket | None = None
        self._retry_at = 0.0

    def send_now(self, line: bytes) -> bool:
        sock = self._datagrams
        if sock is None:
            return False
        try:
            sock.send(line)
        except OSError:
            # Full, or jouletrace was restarted: the thread finds out.
            return False
        return True

    def send(self, batch: Sequence[Line]) -> tuple[Sequence[Line], int, float]:
        if self._datagrams is not None:
            return self._send_datagrams(self._datagrams, batch)
        assert self._stream is not None
        try:
            self._stream.sendall(b"".join(line for _, line in batch))
        except OSError:
            self.close()
            raise
        return (), 0, 0.0

    def refused_later(self) -> int:
        refused = 0
        if self._stream is not None:
            # A line for each, whenever it comes. A socket with a timeout never blocks in read() itself.
            with contextlib.suppress(OSError):
                while answers := os.read(self._stream.fileno(), 1 << 16):
                    refused += answers.count(b"\n")
        return refused

    def _send_datagrams(self, sock: socket.socket, batch: Sequence[Line]) -> tuple[Sequence[Line], int, float]:
        for number, (_, line) in enumerate(batch):
            try:
                sock.send(line)
            except BlockingIOError:
                return batch[number:], 0, 0.001
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    return batch[number + 1 :], 1, 0.0
                self.close()
                raise
        return (), 0, 0.0

    def open(self) -> None:
        if self._stream is not None or self._datagrams is not None:
            return
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            sock = socket.socket(socket.AF_UNIX, kind)
            sock.settimeout(TIMEOUT_SECONDS)
            try:
                sock.connect(self._path)
            except OSError as error:
                sock.close()
                if error.errno == errno.EPROTOTYPE and kind is socket.SOCK_STREAM:
                    continue
                raise
            self.connections += 1
            if kind is socket.SOCK_STREAM:
                self._stream = sock
            else:
                sock.setblocking(False)
                self._datagrams = sock
            return

    def close(self) -> None:
        for sock in (self._stream, self._datagrams):
            if sock is not None:
                sock.close()
        self._stream = self._datagrams = None


def _connection(url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(url)
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return make(parts.hostname or "127.0.0.1", parts.port, timeout=timeout)


def _first_word(file: str | os.PathLike[str]) -> str | None:
    try:
        with pathlib.Path(file).open(encoding="ascii") as opened:
            return next(iter(opened.read(1 << 16).split()), None)
    except (OSError, ValueError):
        return None


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(0.0, float(retry_after or 1)), LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 1.0


def _counted(count: int | Callable[[Any], int], result: object) -> int:
    try:
        return int(count(result)) if callable(count) else count
    except Exception:  # The program's own result stands, whatever it looks like.
        return 0


_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


def _after_fork() -> None:
    for client in _clients:
        # The thread stayed in the parent, and so do its queue and its connections.
        client._begin()


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for client in list(_clients):
        with contextlib.suppress(Exception):
            client.close(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
