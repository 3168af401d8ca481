import asyncio
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jouletrace.engines import sockets
from jouletrace.engines.sockets import DatagramServer, SocketError, StreamServer
from jouletrace.requests.inbox import Events, Inbox
from jouletrace.requests.records import EngineRecord, Record, RequestRecord

A = b'{"record":"request","request_id":"a"}\n'


def line(number: int) -> bytes:
    return b'{"record":"request","request_id":"%d"}\n' % number


@contextlib.asynccontextmanager
async def stream(path: Path, inbox: Inbox, **options: int) -> AsyncIterator[StreamServer]:
    server = StreamServer(inbox, **options)
    await server.start(path)
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def datagram(path: Path, inbox: Inbox) -> AsyncIterator[socket.socket]:
    """Yield a client of a datagram server."""
    server = DatagramServer(inbox)
    await server.start(path)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.connect(str(path))
    try:
        yield client
    finally:
        client.close()
        await server.stop()


def emptied(inbox: Inbox) -> list[Record]:
    records: list[Record] = []
    while (batch := inbox.take()) is not None:
        records += batch.records
        inbox.done(batch)
    return records


async def arrived(inbox: Inbox, origin: str, count: int) -> None:
    """Wait until so many records have come in, dropped ones included."""
    async with asyncio.timeout(10):
        while inbox.events().received.get(origin, 0) < count:  # noqa: ASYNC110 - from outside, as it is
            await asyncio.sleep(0.005)


async def sent(path: Path, *pieces: bytes) -> None:
    """Write pieces, each of which arrives by itself, and close."""
    _, writer = await asyncio.open_unix_connection(str(path))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()


async def test_lines_over_a_stream_however_they_are_cut(tmp_path: Path) -> None:
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox):
        await sent(tmp_path / "s", line(0) + line(1)[:9], line(1)[9:-1], b"\n" + line(2) + b"\n\r\n" + line(3)[:-1])
        await arrived(inbox, "stream", 4)
    assert emptied(inbox) == [RequestRecord(request_id=str(i)) for i in range(4)]
    assert inbox.events() == Events({"stream": 4}, {})


async def test_bad_lines_cost_only_themselves_and_are_logged_once(tmp_path: Path) -> None:
    inbox = Inbox()
    with capture_logs() as logs:
        async with stream(tmp_path / "s", inbox):
            await sent(
                tmp_path / "s", A + b"\xff\n" + b'{"request_id":"b"}\n' + A + b'{"record":"request","request_id":"h'
            )
            await arrived(inbox, "stream", 5)
    assert emptied(inbox) == [RequestRecord(request_id="a")] * 2
    assert inbox.events() == Events({"stream": 5}, {("stream", "invalid"): 2, ("stream", "incomplete"): 1})
    [entry] = [entry for entry in logs if entry["event"] == "a record was refused"]
    assert (entry["pid"], entry["problem"]) == (os.getpid(), "is not valid JSON (invalid character (byte 0))")


async def test_a_line_without_end_is_thrown_away_as_it_comes(tmp_path: Path) -> None:
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox, max_line_bytes=1000):
        await sent(tmp_path / "s", A, *[b"x" * 900] * 20, b"\n" + A, b"y" * 5000 + b"\n" + A, b"z" * 5000)
        await arrived(inbox, "stream", 6)
    assert emptied(inbox) == [RequestRecord(request_id="a")] * 3
    assert inbox.events() == Events({"stream": 6}, {("stream", "too_long"): 3})


async def test_a_full_inbox_holds_the_writer_back_and_loses_nothing(tmp_path: Path) -> None:
    inbox = Inbox(1024)
    total = 60_000
    async with stream(tmp_path / "s", inbox):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(b"".join(line(i) for i in range(total)))
        await asyncio.sleep(0.2)
        # Most of it is still with the writer, and others get in as soon as there is room.
        assert len(inbox) <= 1024
        assert writer.transport.get_write_buffer_size() > 1_000_000
        received: list[Record] = []
        async with asyncio.timeout(20):
            while len(received) < total:
                received += emptied(inbox)
                await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
        reader.feed_eof()
    assert received == [RequestRecord(request_id=str(i)) for i in range(total)]
    assert inbox.events() == Events({"stream": total}, {})


async def test_a_writer_that_leaves_while_it_is_held_back_loses_nothing(tmp_path: Path) -> None:
    inbox = Inbox(1024)
    async with stream(tmp_path / "s", inbox):
        await sent(tmp_path / "s", b"".join(line(i) for i in range(1600)))
        await asyncio.sleep(0.05)
        received: list[Record] = []
        async with asyncio.timeout(10):
            while len(received) < 1600:
                received += emptied(inbox)
                await asyncio.sleep(0)
    assert len({r.request_id for r in received if isinstance(r, RequestRecord)}) == 1600


async def test_the_end_counts_what_was_read_and_not_taken(tmp_path: Path) -> None:
    inbox = Inbox(1024)
    async with stream(tmp_path / "s", inbox):
        await sent(tmp_path / "s", b"".join(line(i) for i in range(1600)))
        await arrived(inbox, "stream", 1024)
    await asyncio.sleep(0.05)
    events = inbox.events()
    assert events.received["stream"] - events.dropped[("stream", "queue_full")] == 1024


async def test_slow_writers_do_not_hold_up_others(tmp_path: Path) -> None:
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox):
        slow = [await asyncio.open_unix_connection(str(tmp_path / "s")) for _ in range(50)]
        for _, writer in slow:
            writer.write(A[:10])
        await sent(tmp_path / "s", A * 100)
        await arrived(inbox, "stream", 100)
        for _, writer in slow:
            writer.write(A[10:])
        await arrived(inbox, "stream", 150)
        for _, writer in slow:
            writer.close()


async def test_no_more_connections_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_CONNECTIONS", 3)
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox):
        held = [await asyncio.open_unix_connection(str(tmp_path / "s")) for _ in range(3)]
        await asyncio.sleep(0.02)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        for _, each in held:
            each.close()
        await asyncio.sleep(0.02)
        await sent(tmp_path / "s", A)
        await arrived(inbox, "stream", 1)


async def test_an_engine_is_the_process_that_says_so(tmp_path: Path) -> None:
    inbox = Inbox()
    text = (
        "import socket,sys; s=socket.socket(socket.AF_UNIX,int(sys.argv[2])); s.connect(sys.argv[1]);"
        's.send(b\'{"record":"engine","engine_id":"e"}\\n\')'
    )
    async with stream(tmp_path / "s", inbox), datagram(tmp_path / "d", inbox):
        pids = []
        for path, kind in (("s", socket.SOCK_STREAM), ("d", socket.SOCK_DGRAM)):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", text, str(tmp_path / path), str(int(kind))
            )
            pids.append(child.pid)
            assert await asyncio.wait_for(child.wait(), 20) == 0
        await arrived(inbox, "stream", 1)
        await arrived(inbox, "datagram", 1)
        await sent(tmp_path / "s", b'{"record":"engine","engine_id":"e","pid":7}\n')
        await arrived(inbox, "stream", 2)
    assert emptied(inbox) == [EngineRecord(engine_id="e", pid=pid) for pid in (*pids, 7)]


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--pid", "--fork", "true"], check=False).returncode != 0,
    reason="no right to make a pid namespace",
)
async def test_a_process_in_a_container_has_the_pid_that_we_see(tmp_path: Path) -> None:
    inbox = Inbox()
    text = (
        "import os,socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        's.send(b\'{"record":"engine","engine_id":"%d"}\\n\' % os.getpid())'
    )
    async with stream(tmp_path / "s", inbox):
        child = await asyncio.create_subprocess_exec(
            "unshare", "--pid", "--fork", sys.executable, "-c", text, str(tmp_path / "s")
        )
        assert await asyncio.wait_for(child.wait(), 20) == 0
        await arrived(inbox, "stream", 1)
    [record] = emptied(inbox)
    assert isinstance(record, EngineRecord)
    assert record.engine_id == "1"
    assert record.pid is not None
    assert record.pid > 1


async def test_datagrams_of_one_record_and_of_several(tmp_path: Path) -> None:
    inbox = Inbox()
    async with datagram(tmp_path / "d", inbox) as client:
        client.send(A.strip())
        client.send(A * 3 + b"nonsense\n")
        client.send(b"")
        await arrived(inbox, "datagram", 5)
    assert emptied(inbox) == [RequestRecord(request_id="a")] * 4
    assert inbox.events() == Events({"datagram": 5}, {("datagram", "invalid"): 1})


async def test_many_datagrams_arrive_when_the_sender_tries_again(tmp_path: Path) -> None:
    inbox = Inbox()
    async with datagram(tmp_path / "d", inbox) as client:
        client.setblocking(False)
        for i in range(3000):
            while True:
                try:
                    client.send(line(i))
                    break
                except BlockingIOError:
                    await asyncio.sleep(0)
        await arrived(inbox, "datagram", 3000)
    assert emptied(inbox) == [RequestRecord(request_id=str(i)) for i in range(3000)]


async def test_datagrams_that_cannot_be_taken_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_DATAGRAM_BYTES", 4096)
    inbox = Inbox(1024)
    async with datagram(tmp_path / "d", inbox) as client:
        client.send(A * 100 + b" " * 10_000)
        await arrived(inbox, "datagram", 1)
        for _ in range(30):
            client.send(A * 50)
            await asyncio.sleep(0.002)
        await arrived(inbox, "datagram", 1501)
    assert inbox.events() == Events({"datagram": 1501}, {("datagram", "too_long"): 1, ("datagram", "queue_full"): 500})
    assert len(inbox) == 1000


@pytest.mark.parametrize(("access", "mode"), [("owner", 0o600), ("group", 0o660), ("everyone", 0o666)])
async def test_who_may_write(tmp_path: Path, access: str, mode: int) -> None:
    servers = StreamServer(Inbox()), DatagramServer(Inbox())
    for server, name in zip(servers, ("s", "d"), strict=True):
        await server.start(tmp_path / name, sockets.MODES[access])
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
        await server.stop()
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path, kind: socket.SocketKind) -> None:
    left = socket.socket(socket.AF_UNIX, kind)
    left.bind(str(tmp_path / "s"))
    left.close()
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox):
        await sent(tmp_path / "s", A)
        await arrived(inbox, "stream", 1)


@pytest.mark.parametrize("server", [StreamServer, DatagramServer])
async def test_a_socket_in_use_is_left_alone(tmp_path: Path, server: type[StreamServer | DatagramServer]) -> None:
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox):
        with pytest.raises(SocketError, match="somebody does already, perhaps another jouletrace"):
            await server(Inbox()).start(tmp_path / "s")
        await sent(tmp_path / "s", A)
        await arrived(inbox, "stream", 1)


async def test_what_else_can_be_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    cases = {
        tmp_path / "file": "there is a file that is not a socket",
        tmp_path / "no" / "s": "no does not exist; create it",
        tmp_path / ("x" * 120): "longer than the 107 bytes",
    }
    for path, reason in cases.items():
        with pytest.raises(SocketError, match=reason):
            await StreamServer(Inbox()).start(path)
    assert (tmp_path / "file").read_text() == "precious"
