"""Listening: addresses in, sockets open, requests answered, all closed again."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Sequence

import structlog
from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from jouletrace.config import split_address
from jouletrace.web.application import SERVER_NAME

KEEP_ALIVE_SECONDS = 180.0
"""An idle connection lives through two scrapes at the longest usual interval of one minute, and then some."""
MAX_LINE_BYTES = 8190
"""Longest request line and longest header field; Apache's and aiohttp's default."""
SHUTDOWN_SECONDS = 5.0
"""Time that running requests get to finish when the daemon stops."""

_log = structlog.get_logger(__name__)


class ListenError(Exception):
    """An address cannot be listened on; the message says which, why and what to do."""


class WebServer:
    """An application that is being served."""

    def __init__(
        self,
        app: web.Application,
        *,
        shutdown_seconds: float = SHUTDOWN_SECONDS,
        address_flag: str = "--web.listen-address",
        cancels_handlers: bool = False,
    ) -> None:
        """`cancels_handlers`: whether a client that goes ends the answering of its request, too."""
        self._runner = web.AppRunner(app, shutdown_timeout=shutdown_seconds, handler_cancellation=cancels_handlers)
        self._address_flag = address_flag
        self._servers: list[asyncio.Server] = []
        self._secure = False

    @property
    def urls(self) -> tuple[str, ...]:
        """Return the base URL of each socket, with the real port where 0 was asked for."""
        scheme = "https" if self._secure else "http"
        names = [_name(sock) for server in self._servers for sock in server.sockets]
        return tuple(f"{scheme}://{name}" for name in names)

    async def start(
        self,
        addresses: Sequence[str],
        *,
        passed: Sequence[socket.socket] = (),
        ssl_context: ssl.SSLContext | None = None,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        """Listen on all addresses (such as `:9841`, `[::1]:9841`) or, raising ListenError, on none.

        `passed` are TCP sockets that listen already; they are served, too.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        manager = self._runner.server
        assert manager is not None

        def connection() -> asyncio.Protocol:
            return _Connection(
                manager,
                loop=loop,
                keepalive_timeout=keep_alive_seconds,
                max_line_size=MAX_LINE_BYTES,
                max_field_size=MAX_LINE_BYTES,
                # Handlers unpack bodies themselves, with a limit; aiohttp logs a traceback for a damaged one.
                auto_decompress=False,
                # None turns the access log off, as in AppRunner; only the annotation denies it.
                access_log=None,  # type: ignore[arg-type]
            )

        self._secure = ssl_context is not None
        try:
            for sock in passed:
                self._servers.append(await loop.create_server(connection, sock=sock, ssl=ssl_context))
            for address in addresses:
                for sock in await _open(address, self._address_flag):
                    server = await loop.create_server(connection, sock=sock, ssl=ssl_context)
                    self._servers.append(server)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Take no more requests, let the running ones finish, and close everything."""
        for server in self._servers:
            server.close()
        await self._runner.cleanup()
        self._servers.clear()


class _Connection(RequestHandler):
    """A connection whose answers to malformed requests name no versions and leave no traceback in the log."""

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


async def _open(address: str, flag: str) -> list[socket.socket]:
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
