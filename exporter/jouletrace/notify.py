"""Talk to systemd: state and watchdog over NOTIFY_SOCKET (sd_notify(3)), sockets from it (sd_listen_fds(3)).

The protocol is a datagram of lines and a few variables; the packages for it wrap libsystemd in C or know one of the
two halves alone. Without systemd all of this does nothing.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

import structlog

FIRST_SOCKET: Final = 3
"""SD_LISTEN_FDS_START of sd-daemon.h."""
WATCHDOG_BEATS: Final = 3
"""Beats within the watchdog's time; sd_watchdog_enabled(3) advises two, and one may come late."""
STATUS_CHARACTERS: Final = 500
"""Longest status; `systemctl status` shows it on one line."""

HTTP_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Whoever started this process and wants to hear of it; nobody when both fields are None."""

    address: str | None = None
    """The datagram socket that is told; an abstract one begins with `@`."""
    watchdog_seconds: float | None = None
    """Within this time it wants a sign of life, again and again."""

    @classmethod
    def of(cls, environment: Mapping[str, str], pid: int) -> "Supervisor":
        """Return whom the environment names; a watchdog that is meant for another process is nobody's here."""
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return cls()
        microseconds = environment.get("WATCHDOG_USEC", "")
        is_ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        seconds = int(microseconds) / 1e6 if microseconds.isdecimal() and is_ours else 0.0
        return cls(address, seconds or None)

    @property
    def beat_seconds(self) -> float | None:
        """How often to call `alive`; None without a watchdog."""
        return None if self.watchdog_seconds is None else self.watchdog_seconds / WATCHDOG_BEATS

    def ready(self, status: str) -> None:
        """Say that the service is up, at its start and after a reload."""
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """Say that the configuration is being read anew; `ready` ends it."""
        # systemd 253 and later wait for it and want to know that it is no older answer.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the service is going down."""
        self._send("STOPPING=1")

    def alive(self, status: str) -> None:
        """Give a sign of life."""
        self._send("WATCHDOG=1", _status(status))

    def tell(self, status: str) -> None:
        """Say how things are, without a sign of life."""
        self._send(_status(status))

    def _send(self, *lines: str) -> None:
        if self.address is None:
            return
        name = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        # A supervisor that is gone or busy must not harm the service.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), name)


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:STATUS_CHARACTERS]


@dataclass(frozen=True, slots=True)
class PassedSockets:
    """Listening sockets that systemd opened for this process and keeps open while it restarts."""

    metrics: tuple[socket.socket, ...] = ()
    """TCP or Unix stream, `FileDescriptorName=metrics`."""
    stream: socket.socket | None = None
    """Unix stream, `FileDescriptorName=ingest`."""
    datagram: socket.socket | None = None
    """Unix datagram, `FileDescriptorName=ingest`."""


def passed_sockets(environment: MutableMapping[str, str], pid: int) -> PassedSockets:
    """Return the sockets that are meant for process `pid`; taken once, the variables are removed.

    One that nobody here knows is closed, with a line in the log.
    """
    count, owner, names = (environment.pop(f"LISTEN_{name}", "") for name in ("FDS", "PID", "FDNAMES"))
    if owner != str(pid) or not count.isdecimal():
        return PassedSockets()
    metrics: list[socket.socket] = []
    ingest: dict[int, socket.socket] = {}
    for number, name in zip(range(int(count)), [*names.split(":"), *[""] * int(count)], strict=False):
        descriptor = FIRST_SOCKET + number
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        if name == "metrics" and sock.family in HTTP_FAMILIES and sock.type == socket.SOCK_STREAM:
            metrics.append(sock)
        elif name == "ingest" and sock.family == socket.AF_UNIX and sock.type not in ingest:
            ingest[sock.type] = sock
        else:
            _log.warning(
                "systemd passed a socket that has no use here: name stream sockets for HTTP metrics, and one Unix "
                "stream and one Unix datagram socket ingest (FileDescriptorName=)",
                name=name,
                family=sock.family.name,
                type=sock.type.name,
            )
            sock.close()
    return PassedSockets(tuple(metrics), ingest.get(socket.SOCK_STREAM), ingest.get(socket.SOCK_DGRAM))
