"""Listening: addresses in, sockets open, requests answered, all closed again."""

import asyncio
import errno
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from jouletrace.config import split_address, unix_path
from jouletrace.logs import Transitions
from jouletrace.unix_sockets import MODES, bound, remove
from jouletrace.web.application import SERVER_NAME
from jouletrace.web.entrance import origin_of

KEEP_ALIVE_SECONDS = 180.0
"""An idle connection lives through two scrapes at the longest usual interval of one minute, and then some."""
MAX_LINE_BYTES = 8190
"""Longest request line and longest header field; Apache's and aiohttp's default."""
SHUTDOWN_SECONDS = 5.0
"""Time that running requests get to finish when the daemon stops."""
RETRY_ACCEPT_SECONDS: Final = 1.0
"""Pause when the kernel gives no more connections, for want of descriptors mostly; clients wait in its queue."""
COMPLAINT_SECONDS: Final = 60.0
"""Connections that are closed for being too many are logged at most this often."""
TLS_SHUTDOWN_SECONDS: Final = 5.0
"""Time that a client gets to say goodbye."""

_UNIX: Final = "unix"

_log = structlog.get_logger(__name__)


class ListenError(Exception):
    """An address cannot be listened on; the message says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may hold of a server. Beyond it connections are closed."""

    connections: int = 512
    """A scrape, a probe and the feeds of 8 engines need some 50; systemd's soft limit of descriptors is 1024."""
    connections_per_origin: int = 256
    """Of one address, so that one host cannot keep all others out."""
    head_seconds: float = 10.0
    """For the TLS handshake, and from there, or from a later request's first byte, to the end of the headers."""
    head_bytes: int = 32 * 1024
    """All headers together; nginx takes as much."""
    silent_seconds: float = 60.0
    """A client that takes nothing of its answer for so long is gone (TCP_USER_TIMEOUT, tcp(7))."""


class WebServer:
    """An application that is being served."""

    def __init__(
        self,
        app: web.Application,
        *,
        shutdown_seconds: float = SHUTDOWN_SECONDS,
        address_flag: str = "--web.listen-address",
        cancels_handlers: bool = False,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        limits: Limits = Limits(),
        socket_mode: int = MODES["group"],
    ) -> None:
        """`cancels_handlers`: whether a client that goes ends the answering of its request, too.

        `tls` is asked at each new TCP connection: a rotated certificate needs no new socket. What goes over a Unix
        socket leaves no machine: its mode, `socket_mode`, says who may connect.
        """
        self._runner = web.AppRunner(app, shutdown_timeout=shutdown_seconds, handler_cancellation=cancels_handlers)
        self._address_flag = address_flag
        self._tls = tls
        self._limits = limits
        self._socket_mode = socket_mode
        self._keep_alive_seconds = KEEP_ALIVE_SECONDS
        self._sockets: list[socket.socket] = []
        self._own_paths: list[Path] = []
        """Files of Unix sockets that are removed at the end; those of passed sockets are somebody else's."""
        self._accepting: list[asyncio.Task[None]] = []
        self._arriving: set[asyncio.Task[None]] = set()
        self._connections: Counter[str] = Counter()
        self._failures = Transitions(_log, time.monotonic_ns)
        self._closed = 0
        self._quiet_until = 0.0

    @property
    def urls(self) -> tuple[str, ...]:
        """Return the base URL of each TCP socket, with the real port where 0 was asked for."""
        scheme = "http" if self._tls() is None else "https"
        return tuple(f"{scheme}://{_name(sock)}" for sock in self._sockets if sock.family != socket.AF_UNIX)

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the path of each Unix socket."""
        return tuple(str(sock.getsockname()) for sock in self._sockets if sock.family == socket.AF_UNIX)

    async def start(
        self,
        addresses: Sequence[str],
        *,
        passed: Sequence[socket.socket] = (),
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        """Listen on all addresses (such as `:9841`, `[::1]:9841`, `unix:/run/jouletrace/web.sock`) or on none.

        Raises ListenError, SocketError for a Unix socket. `passed` are sockets that listen already; they are served,
        too.
        """
        await self._runner.setup()
        self._keep_alive_seconds = keep_alive_seconds
        self._sockets += passed
        try:
            for address in addresses:
                self._sockets += await self._open(address)
        except BaseException:
            await self.stop()
            raise
        for sock in self._sockets:
            sock.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(sock)))

    async def stop(self) -> None:
        """Take no more requests, let the running ones finish, and close everything."""
        tasks = {*self._accepting, *self._arriving}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for sock in self._sockets:
            sock.close()
        for path in self._own_paths:
            remove(path)
        await self._runner.cleanup()
        self._sockets.clear()
        self._own_paths.clear()
        self._accepting.clear()

    def end_connections(self) -> None:
        """End those that stand idle now, and the others after the answer that is under way; clients come again."""
        for task in self._arriving:
            task.cancel()
        for connection in () if self._runner.server is None else self._runner.server.connections:
            assert isinstance(connection, _Connection)
            connection.end()

    async def _open(self, address: str) -> list[socket.socket]:
        path = unix_path(address)
        if path is None:
            return await _open_tcp(address, self._address_flag)
        sock = bound(path, socket.SOCK_STREAM, self._socket_mode)
        self._own_paths.append(path)
        sock.listen()
        return [sock]

    async def _accept(self, listening: socket.socket) -> None:
        """Take connections one by one. asyncio's own server counts none before its TLS handshake is done."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except ConnectionError:
                continue  # The client went before it was its turn.
            except OSError as error:
                self._failures.failed("accept", "no connection can be accepted", problem=error.strerror)
                await asyncio.sleep(RETRY_ACCEPT_SECONDS)
                continue
            self._failures.recovered("accept", "connections are accepted again")
            # Clients on a Unix socket count together, whatever they call themselves.
            self._admit(sock, _UNIX if sock.family == socket.AF_UNIX else origin_of(str(address[0])))
            # A flood of connections takes turns with everybody else.
            await asyncio.sleep(0)

    def _admit(self, sock: socket.socket, origin: str) -> None:
        limits, manager = self._limits, self._runner.server
        assert manager is not None
        if (
            self._connections.total() >= limits.connections
            or self._connections[origin] >= limits.connections_per_origin
        ):
            sock.close()
            self._complain(origin)
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.silent_seconds * 1000))
        self._connections[origin] += 1

        def left() -> None:
            self._connections[origin] -= 1
            if not self._connections[origin]:
                del self._connections[origin]

        connection = _Connection(
            manager,
            limits=limits,
            left=left,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._keep_alive_seconds,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            # Handlers unpack bodies themselves, with a limit; aiohttp logs a traceback for a damaged one.
            auto_decompress=False,
            # None turns the access log off, as in AppRunner.
            access_log=None,
        )

        def arrived(task: "asyncio.Task[None]") -> None:
            self._arriving.discard(task)
            if not connection.began:
                sock.close()
                left()

        task = asyncio.create_task(self._connect(sock, connection))
        self._arriving.add(task)
        task.add_done_callback(arrived)

    async def _connect(self, sock: socket.socket, connection: "_Connection") -> None:
        context = None if sock.family == socket.AF_UNIX else self._tls()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._limits.head_seconds,
                ssl_shutdown_timeout=None if context is None else TLS_SHUTDOWN_SECONDS,
            )
        except OSError as error:
            _log.debug("A connection came to nothing.", problem=str(error))

    def _complain(self, origin: str) -> None:
        self._closed += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            _log.warning("too many connections: further ones are closed", remote=origin, closed=self._closed)
            self._closed = 0
            self._quiet_until = now + COMPLAINT_SECONDS


class _Connection(RequestHandler):
    """A connection that does not wait for slow headers.

    Its answers to malformed requests name no versions and leave no traceback in the log.
    """

    def __init__(self, manager: web.Server, *, limits: Limits, left: Callable[[], None], **options: Any) -> None:
        super().__init__(manager, **options)
        self.began = False
        """Whether it was made, its TLS handshake included; `left` is called when it is lost."""
        self._limits = limits
        self._left = left
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Close it when it is idle, else after the answer that is under way."""
        # aiohttp's own `close` leaves an idle one open with nobody who reads from it.
        (self.close if self._waiter is None else self.force_close)()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.began = True
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._end_head()
        super().connection_lost(exc)
        self._left()

    def data_received(self, data: bytes) -> None:
        # aiohttp says neither when a head begins nor when it is complete, but for these two.
        waiter, count = self._waiter, self._request_count
        awaits_head = waiter is not None and not waiter.done()
        super().data_received(data)
        if self._request_count != count:
            self._end_head()
        elif awaits_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._await_head()
            if self._head_bytes > self._limits.head_bytes:
                if self.transport is not None:
                    self.transport.write(_HEAD_TOO_LARGE)
                self.force_close()

    def _await_head(self) -> None:
        self._head_timer = self._loop.call_later(self._limits.head_seconds, self.force_close)

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        _log.debug("A malformed request was refused.", remote=request.remote, status=status, error=repr(exc))
        response = web.Response(status=status, text="This is not an HTTP request that can be answered.\n")
        response.headers[hdrs.SERVER] = SERVER_NAME
        response.force_close()
        return response


_HEAD_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nServer: "
    + SERVER_NAME.encode()
    + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


async def _open_tcp(address: str, flag: str) -> list[socket.socket]:
    host, port = split_address(address)
    if host is None:
        return [_bind_everywhere(address, port, flag)]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ListenError(
            f"Cannot listen on {address}: the host name {host} is unknown ({error.strerror}); "
            "write an IP address of this machine."
        ) from error
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, where in dict.fromkeys(found):
            # A name with two addresses and port 0 gets the same port on both.
            chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
            sockets.append(_bind(address, family, (where[0], chosen, *where[2:]), flag))
    except ListenError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind_everywhere(address: str, port: int, flag: str) -> socket.socket:
    """Return one socket for IPv6 and IPv4, or for IPv4 alone on a machine without IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise _listen_error(address, error, flag) from error
    return _bind(address, socket.AF_INET, ("0.0.0.0", port), flag)  # noqa: S104 - ":port" asks for all interfaces


def _bind(address: str, family: int, where: tuple[str | int, ...], flag: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        # Listening here and not later in asyncio, so that a taken port is found here too.
        sock.listen()
    except OSError as error:
        sock.close()
        raise _listen_error(address, error, flag) from error
    return sock


def _listen_error(address: str, error: OSError, flag: str) -> ListenError:
    port = address.rpartition(":")[2]
    reasons = {
        errno.EADDRINUSE: "the port is in use, perhaps by another jouletrace; "
        f"`ss -ltnp 'sport = :{port}'` shows by whom: stop that, or choose another port "
        f"with {flag}.",
        errno.EACCES: f"ports below 1024 need CAP_NET_BIND_SERVICE; choose a higher one with {flag}.",
        errno.EADDRNOTAVAIL: "this machine has no such address; `ip address` shows those it has.",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror}.")
    return ListenError(f"Cannot listen on {address}: {reason}")


def _name(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    if host in ("::", "0.0.0.0"):  # noqa: S104 - compared, not bound
        return f"localhost:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
