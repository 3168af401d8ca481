import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jouletrace.notify import Supervisor, passed_sockets


@pytest.fixture(name="listener")
def fixture_listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def test_what_is_said_is_what_sd_notify_documents(listener: socket.socket) -> None:
    supervisor = Supervisor.of({"NOTIFY_SOCKET": listener.getsockname()}, 1)
    supervisor.ready("8 GPUs\nsampled")
    assert listener.recv(1024) == b"READY=1\nSTATUS=8 GPUs sampled"
    supervisor.alive("fine")
    assert listener.recv(1024) == b"WATCHDOG=1\nSTATUS=fine"
    supervisor.tell("x" * 2000)
    assert listener.recv(4096) == b"STATUS=" + b"x" * 500
    supervisor.stopping()
    assert listener.recv(1024) == b"STOPPING=1"
    before = time.monotonic_ns() // 1000
    supervisor.reloading()
    first, _, usec = listener.recv(1024).partition(b"\nMONOTONIC_USEC=")
    assert first == b"RELOADING=1"
    assert before <= int(usec) <= time.monotonic_ns() // 1000


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0jouletrace-test-{os.getpid()}")
        Supervisor.of({"NOTIFY_SOCKET": f"@jouletrace-test-{os.getpid()}"}, 1).stopping()
        assert sock.recv(64) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["/nowhere/at/all", "", "vsock:2:1"])
def test_nobody_listens(address: str) -> None:
    Supervisor.of({"NOTIFY_SOCKET": address}, 1).ready("fine")


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0", "WATCHDOG_PID": "7"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdogs_time(variables: dict[str, str], seconds: float | None) -> None:
    supervisor = Supervisor.of({"NOTIFY_SOCKET": "/run/systemd/notify", **variables}, 7)
    assert supervisor.watchdog_seconds == seconds
    assert supervisor.beat_seconds == (None if seconds is None else seconds / 3)


@pytest.mark.parametrize(
    "variables", [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "8"}, {"LISTEN_FDS": "x", "LISTEN_PID": "7"}]
)
def test_sockets_of_others_are_not_touched(variables: dict[str, str]) -> None:
    passed = passed_sockets(variables, 7)
    assert (passed.metrics, passed.stream, passed.datagram) == ((), None, None)


def test_sockets_are_told_apart_by_name_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    ]
    # Numbers in a row that nobody has, in the place of 3 and on, which pytest has.
    first = 200
    for number, sock in enumerate(made):
        os.dup2(sock.fileno(), first + number, inheritable=True)
        sock.close()
    monkeypatch.setattr("jouletrace.notify.FIRST_SOCKET", first)
    names = "ingest:metrics:ingest:metrics:metrics"
    variables = {"LISTEN_FDS": "5", "LISTEN_PID": "7", "LISTEN_FDNAMES": names, "HOME": "/"}
    with capture_logs() as logs:
        passed = passed_sockets(variables, 7)
    assert variables == {"HOME": "/"}
    assert passed.datagram is not None
    assert passed.stream is not None
    numbers = [sock.fileno() for sock in (passed.datagram, passed.stream, *passed.metrics)]
    assert numbers == [first, first + 2, first + 1, first + 3]
    assert not any(os.get_inheritable(number) for number in numbers)
    [warning] = logs
    assert (warning["name"], warning["type"]) == ("metrics", "SOCK_DGRAM")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first + 4)
    for sock in (passed.datagram, *passed.metrics, passed.stream):
        sock.close()
