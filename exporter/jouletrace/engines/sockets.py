"""Unix sockets for records: NDJSON over a stream, and records in datagrams for senders that must never wait.

Both know the sender's process: the kernel tells its pid, as this process's own pid namespace counts it. A stream hears
of the records that are refused, a line of JSON each; a datagram's sender hears nothing.
"""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import Struct
from typing import Final

import msgspec
import structlog

from jouletrace.requests.decoding import Check, LineError, RecordDecoder, Slice, slices
from jouletrace.requests.inbox import Inbox, Loss, Origin
from jouletrace.requests.records import EngineRecord, Record
from jouletrace.unix_sockets import MODES, bound, remove

MAX_LINE_BYTES: Final = 1 << 20
"""A step of 16,384 requests with ids of 40 bytes takes 700 kB."""
MAX_DATAGRAM_BYTES: Final = 256 << 10
"""Linux sends nothing larger than the sender's SO_SNDBUF, 208 kB by default (net.core.wmem_default)."""
MAX_CONNECTIONS: Final = 256
DATAGRAMS_PER_TURN: Final = 64
"""Datagrams that are read before others on the event loop get their turn: about a millisecond."""
MAX_ERRORS: Final = 20
"""Errors of one piece of a stream that its sender is told; the rest are only counted."""
COMPLAINT_SECONDS: Final = 60.0
"""Refused records are logged at most this often; the metrics count each."""

_CREDENTIALS: Final = Struct("3i")  # struct ucred of sys/socket.h: pid, uid, gid

_log = structlog.get_logger(__name__)


class Intake:
    """Takes lines of one way in: names the sender's process, counts and reports what is refused.

    `check` is asked for a check of the records that come now, as `decoding.Body.slices` does.
    """

    def __init__(self, inbox: Inbox, origin: Origin, check: Callable[[], Check] | None) -> None:
        self.inbox = inbox
        self.origin = origin
        self._check = check
        self._decoder = RecordDecoder()
        self._quiet_until = 0.0

    def decode(self, lines: Sequence[bytes], first_line: int = 1) -> Slice:
        """Decode and check lines; nothing is counted yet."""
        return self._decoder.lines(lines, first_line, None if self._check is None else self._check())

    def offer(self, part: Slice, pid: int) -> bool:
        """Hand the good records on and count the others, or return False when there is no room for the good ones."""
        if not self.inbox.offer(self.origin, [_with_pid(record, pid) for record in part.records], part.held_bytes):
            return False
        self.count_errors(part, pid)
        return True

    def count_errors(self, part: Slice, pid: int) -> None:
        """Count the records that were refused and say why, now and then."""
        for reason, count in Counter(error.reason for error in part.errors).items():
            self.inbox.lost(self.origin, reason, count)
        if part.errors:
            self._complain(f"{part.errors[0].field}: {part.errors[0].message}".removeprefix(": "), pid)

    def refuse(self, reason: Loss, problem: str, pid: int) -> None:
        """Count a record that cannot be taken and say why, now and then."""
        self.inbox.lost(self.origin, reason)
        self._complain(problem, pid)

    def _complain(self, problem: str, pid: int) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + COMPLAINT_SECONDS
            _log.warning("a record was refused", source=self.origin.value, pid=pid, problem=problem)


def _with_pid(record: Record, pid: int) -> Record:
    # A sender in a pid namespace that we cannot see into has no pid here.
    if type(record) is EngineRecord and record.pid is None and pid > 0:
        return msgspec.structs.replace(record, pid=pid)
    return record


class StreamServer:
    """Listens on a Unix stream socket. A full inbox stops the reading, which in time stops the writers."""

    def __init__(
        self, inbox: Inbox, check: Callable[[], Check] | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
    ) -> None:
        self._intake = Intake(inbox, Origin.STREAM, check)
        self._max_line_bytes = max_line_bytes
        self._connections: set[_Connection] = set()
        self._path: Path | None = None
        self._server: asyncio.Server | None = None

    async def start(self, path: Path, mode: int = MODES["group"]) -> None:
        """Listen; raises SocketError."""
        sock = bound(path, socket.SOCK_STREAM, mode)
        sock.listen(socket.SOMAXCONN)
        await self.serve(sock)
        self._path = path

    async def serve(self, sock: socket.socket) -> None:
        """Take lines from a socket that listens already and whose file is somebody else's."""
        sock.setblocking(False)
        # Not create_unix_server(): from Python 3.13 on it removes the file at the end.
        self._server = await asyncio.get_running_loop().create_server(self._connection, sock=sock)

    async def stop(self) -> None:
        """Close the socket and all connections and remove the file if it is ours."""
        if self._server is None:
            return
        self._server.close()
        for connection in tuple(self._connections):
            connection.end()
        if self._path is not None:
            remove(self._path)
        self._server = self._path = None

    def _connection(self) -> "_Connection":
        return _Connection(self._intake, self._connections, self._max_line_bytes)


class _Connection(asyncio.Protocol):
    """One writer's lines."""

    def __init__(self, intake: Intake, connections: "set[_Connection]", max_line_bytes: int) -> None:
        self._intake = intake
        self._connections = connections
        self._max_line_bytes = max_line_bytes
        self._transport: asyncio.Transport | None = None
        self._answers: socket.socket | None = None
        """The same socket: a transport whose write fails throws away what has not been read yet."""
        self._pid = 0
        self._line = 1
        """Number of the line whose beginning is kept, counted from 1 since the connection began."""
        self._rest = bytearray()
        """The beginning of a line whose end has not come yet."""
        self._skipping = False
        """Whether that line is over the limit, so that what comes of it is thrown away."""
        self._feeding: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._connections) >= MAX_CONNECTIONS:
            _log.warning("a connection was turned away: too many at a time", limit=MAX_CONNECTIONS)
            transport.abort()
            return
        self._transport = transport
        self._connections.add(self)
        sock = transport.get_extra_info("socket")
        self._answers = sock.dup()
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self._pid = _CREDENTIALS.unpack(raw)[0]

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        head, newline, tail = data.rpartition(b"\n")
        if not newline:
            self._keep(tail)
            return
        lines = (bytes(self._rest) + head).split(b"\n")
        first_line = self._line
        self._line += len(lines)
        self._rest.clear()
        if self._skipping:
            lines[0] = b""  # Its beginning was over the limit and has been counted.
            self._skipping = False
        self._keep(tail)
        self._feed(lines, first_line)

    def eof_received(self) -> bool:
        self._take_last_line("the connection ended in the middle of a line")
        return False

    def connection_lost(self, failure: Exception | None) -> None:
        # A sender that closes without having read its answers resets the connection after its last byte.
        self._take_last_line("the connection broke in the middle of a line")
        if self._feeding is None:
            self._connections.discard(self)
        if self._answers is not None:
            self._answers.close()
            self._answers = None

    def _take_last_line(self, problem: str) -> None:
        """Take a last line without its newline if it is whole: a JSON object shows its end."""
        line = bytes(self._rest)
        self._rest.clear()
        if line.strip() and not self._skipping:
            if line.rstrip().endswith(b"}"):
                self._feed([line], self._line)
            else:
                self._intake.refuse(Loss.INCOMPLETE, problem, self._pid)

    def end(self) -> None:
        """Close from our side; lines that were read and not taken are counted."""
        if self._feeding is not None:
            self._feeding.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _keep(self, tail: bytes) -> None:
        if self._skipping:
            return
        self._rest += tail
        if len(self._rest) > self._max_line_bytes:
            self._too_long(self._line)
            self._rest.clear()
            self._skipping = True

    def _too_long(self, line: int) -> None:
        problem = f"is over {self._max_line_bytes} bytes; send less in one record"
        self._intake.refuse(Loss.TOO_LONG, f"a line {problem}", self._pid)
        self._answer([LineError(line, "", problem, Loss.TOO_LONG)])

    def _answer(self, errors: Sequence[LineError]) -> None:
        """Tell what was refused. A sender that does not read is told no more once the kernel's buffer is full."""
        if errors and self._answers is not None:
            lines = b"".join(msgspec.json.encode(error) + b"\n" for error in errors[:MAX_ERRORS])
            # Linux takes what fits into half of the buffer (104 kB) whole or not at all, so no line is cut.
            with contextlib.suppress(OSError):
                self._answers.send(lines, socket.MSG_DONTWAIT)

    def _feed(self, lines: Sequence[bytes], first_line: int) -> bool:
        """Hand lines on; while the inbox is full, nothing more is read. Returns whether all have been taken."""
        for part in slices(lines):
            if not self._take(lines[part.start : part.stop], first_line + part.start):
                assert self._transport is not None
                self._transport.pause_reading()
                rest = lines[part.start :]
                self._feeding = asyncio.create_task(self._feed_later(rest, first_line + part.start))
                return False
        return True

    def _take(self, lines: Sequence[bytes], first_line: int) -> bool:
        """Take one slice or, while the inbox is full, nothing of it."""
        # What waits for room waits as it came: decoded it is several times larger, and there are many connections.
        if self._intake.inbox.is_full:
            return False
        short = [line if len(line) <= self._max_line_bytes else b"" for line in lines]
        part = self._intake.decode(short, first_line)
        if not self._intake.offer(part, self._pid):
            return False
        for number, line in enumerate(lines, first_line):
            if len(line) > self._max_line_bytes:
                self._too_long(number)
        self._answer(part.errors)
        return True

    async def _feed_later(self, lines: Sequence[bytes], first_line: int) -> None:
        intake = self._intake
        try:
            await intake.inbox.room()
        except asyncio.CancelledError:
            intake.inbox.lost(intake.origin, Loss.QUEUE_FULL, sum(1 for line in lines if line.strip()))
            raise
        self._feeding = None
        if self._feed(lines, first_line) and self._transport is not None:
            if self._transport.is_closing():
                self._connections.discard(self)
            else:
                self._transport.resume_reading()


class DatagramServer:
    """Listens on a Unix datagram socket. What finds the inbox full is dropped: its senders must never wait.

    The kernel holds only net.unix.max_dgram_qlen datagrams (10 where nobody has raised it) and refuses more to the
    sender with EAGAIN; several records in a datagram, a line each, go further.
    """

    def __init__(self, inbox: Inbox, check: Callable[[], Check] | None = None) -> None:
        self._intake = Intake(inbox, Origin.DATAGRAM, check)
        self._buffer = bytearray(MAX_DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self._path: Path | None = None
        self._sock: socket.socket | None = None

    async def start(self, path: Path, mode: int = MODES["group"]) -> None:
        """Listen; raises SocketError."""
        self.serve(bound(path, socket.SOCK_DGRAM, mode))
        self._path = path

    def serve(self, sock: socket.socket) -> None:
        """Take datagrams from a bound socket whose file is somebody else's."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock = sock
        asyncio.get_running_loop().add_reader(sock.fileno(), self._read)

    async def stop(self) -> None:
        """Close the socket and remove the file if it is ours."""
        if self._sock is None:
            return
        self._read()
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()
        if self._path is not None:
            remove(self._path)
        self._sock = self._path = None

    def _read(self) -> None:
        assert self._sock is not None
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                size, ancillary, flags, _ = self._sock.recvmsg_into(
                    [self._buffer], socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return
            pid = next(
                (_CREDENTIALS.unpack(data)[0] for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS), 0
            )
            if flags & socket.MSG_TRUNC:
                self._intake.refuse(Loss.TOO_LONG, f"a datagram is over {MAX_DATAGRAM_BYTES} bytes", pid)
                continue
            part = self._intake.decode(bytes(self._view[:size]).split(b"\n"))
            if not self._intake.offer(part, pid):
                self._intake.inbox.lost(self._intake.origin, Loss.QUEUE_FULL, len(part.records))
                self._intake.count_errors(part, pid)
