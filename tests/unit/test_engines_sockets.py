import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from jouletrace.clock import SystemClock
from jouletrace.engines import sockets
from jouletrace.engines.sockets import DatagramServer, StreamServer
from jouletrace.requests.admission import Admission
from jouletrace.requests.decoding import Check
from jouletrace.requests.inbox import Events, Inbox
from jouletrace.requests.records import EngineRecord, Record, RequestRecord
from jouletrace.unix_sockets import MODES

A = b'{"record":"request","request_id":"a"}\n'


def line(number: int) -> bytes:
    return b'{"record":"request","request_id":"%d"}\n' % number


@contextlib.asynccontextmanager
async def stream(
    path: Path, inbox: Inbox, check: Callable[[], Check] | None = None, **options: int
) -> AsyncIterator[StreamServer]:
    server = StreamServer(inbox, check, **options)
    await server.start(path)
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def datagram(path: Path, inbox: Inbox, check: Callable[[], Check] | None = None) -> AsyncIterator[socket.socket]:
    """Yield a client of a datagram server."""
    server = DatagramServer(inbox, check)
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
        await server.start(tmp_path / name, MODES[access])
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
        await server.stop()
        assert not (tmp_path / name).exists()


def admission(inbox: Inbox) -> Callable[[], Check]:
    """Return the daemon's own check, with one engine in the account."""
    return Admission(inbox, lambda: {"e"}, SystemClock()).check


def requests_by_line(now_ns: int) -> list[bytes]:
    return [
        json.dumps({"record": "request", "request_id": "r"} | more).encode()
        for more in (
            {"engine_id": "e", "end_ns": now_ns},
            {"engine_id": "e", "end_ns": now_ns + 60 * 10**9},
            {"engine_id": "e", "arrival_ns": 1, "end_ns": now_ns - 3600 * 10**9},
            {"engine_id": "typo"},
        )
    ]


LATE = "is older than the 15 minutes that the timeline keeps"
UNKNOWN = "no engine of this name is known; send it to /v1/engines first"


async def test_a_stream_hears_what_was_refused_and_where(tmp_path: Path) -> None:
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox, admission(inbox), max_line_bytes=1000):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        good, future, late, unknown = requests_by_line(time.time_ns())
        writer.write(good + b"\n" + future + b"\n\n" + late + b"\n" + unknown[:20])
        told = [json.loads(await asyncio.wait_for(reader.readline(), 5)) for _ in range(2)]
        writer.write(unknown[20:] + b"\n" + b"x" * 1001 + b"\n" + b'{"record":"request"}\n')
        told += [json.loads(await asyncio.wait_for(reader.readline(), 5)) for _ in range(3)]
        writer.close()
        await writer.wait_closed()
    assert sorted(told, key=lambda answer: int(answer["line"])) == [
        {"line": 2, "field": "end_ns", "message": "lies 60 s in the future", "reason": "future"},
        {"line": 4, "field": "end_ns", "message": LATE, "reason": "late"},
        {"line": 5, "field": "engine_id", "message": UNKNOWN, "reason": "unknown_engine"},
        {"line": 6, "field": "", "message": "is over 1000 bytes; send less in one record", "reason": "too_long"},
        {"line": 7, "field": "request_id", "message": "is missing", "reason": "invalid"},
    ]
    reasons = ("future", "late", "unknown_engine", "too_long", "invalid")
    assert inbox.events() == Events({"stream": 6}, {("stream", reason): 1 for reason in reasons})


async def test_datagrams_are_refused_in_silence_and_counted_by_reason(tmp_path: Path) -> None:
    inbox = Inbox()
    async with datagram(tmp_path / "d", inbox, admission(inbox)) as client:
        client.send(b"\n".join(requests_by_line(time.time_ns())))
        await arrived(inbox, "datagram", 4)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
    reasons = ("future", "late", "unknown_engine")
    assert inbox.events() == Events({"datagram": 4}, {("datagram", reason): 1 for reason in reasons})


async def test_a_writer_that_never_reads_its_answers_loses_nothing(tmp_path: Path) -> None:
    inbox = Inbox()
    async with stream(tmp_path / "s", inbox):
        # 3 MB of answers, of which the kernel holds 200 kB; then it goes, and its last line has no newline.
        await sent(tmp_path / "s", *[b"nonsense\n" * 500 + A] * 60, A.strip())
        await arrived(inbox, "stream", 30_061)
    assert inbox.events() == Events({"stream": 30_061}, {("stream", "invalid"): 30_000})
    assert len(inbox) == 61


async def test_records_that_name_very_many_requests_hold_the_writer_back(tmp_path: Path) -> None:
    inbox = Inbox(65_536, 16 << 20)
    ids = ",".join(f'"{number}"' for number in range(50_000))
    step = f'{{"record":"step","engine_id":"e","start_ns":1,"end_ns":2,"decode":[{ids}]}}\n'.encode()
    async with stream(tmp_path / "s", inbox):
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(step * 20)
        await asyncio.sleep(0.3)
        # 390 kB of JSON, and 5 MB of strings each.
        assert 1 <= len(inbox) <= 3
        assert inbox.held_bytes <= 16 << 20
        received: list[Record] = []
        async with asyncio.timeout(20):
            while len(received) < 20:
                received += emptied(inbox)
                await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
    assert inbox.events() == Events({"stream": 20}, {})


@given(cuts=st.lists(st.integers(1, 400), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_lines_of_several_writers_however_they_are_cut_and_mixed(
    cuts: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    order = random.Random(seed)
    texts = [line(number) + b"nonsense\n" + b'{"record":"request","request_id":"\xff\x00"}\n' for number in range(4)]

    async def told() -> Inbox:
        inbox = Inbox()
        path = tmp_path_factory.mktemp("sock") / "s"
        async with stream(path, inbox):
            writers = [(await asyncio.open_unix_connection(str(path)))[1] for _ in texts]
            rest = dict(zip(writers, texts, strict=True))
            while rest:
                writer = order.choice(list(rest))
                size = order.choice(cuts)
                writer.write(rest[writer][:size])
                await asyncio.sleep(0)
                rest[writer] = rest[writer][size:]
                if not rest[writer]:
                    del rest[writer]
            await arrived(inbox, "stream", 12)
            for writer in writers:
                writer.close()
        return inbox

    inbox = asyncio.run(told())
    assert inbox.events() == Events({"stream": 12}, {("stream", "invalid"): 8})
    found = {record.request_id for record in emptied(inbox) if isinstance(record, RequestRecord)}
    assert found == {"0", "1", "2", "3"}
