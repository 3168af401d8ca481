import asyncio
import contextlib
import errno
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from jouletrace.unix_sockets import SocketError
from jouletrace.web.serve import Limits, ListenError, WebServer

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def app(delay_seconds: float = 0.0) -> web.Application:
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(delay_seconds)
        return web.Response(text="here")

    made = web.Application()
    made.router.add_get("/", answer)
    return made


@pytest.fixture(name="server")
async def fixture_server() -> AsyncIterator[WebServer]:
    server = WebServer(app(), shutdown_seconds=2.0)
    yield server
    await server.stop()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


async def raw(url: str, request: bytes) -> bytes:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_port_0_reports_the_real_port(server: WebServer) -> None:
    await server.start(["127.0.0.1:0"])
    [url] = server.urls
    assert not url.endswith(":0")
    assert await get(url) == "here"


async def test_connections_that_stand_end_and_answers_under_way_arrive() -> None:
    answers = asyncio.Event()
    asked = 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        await answers.wait()
        return web.Response(text="here")

    made = web.Application()
    made.router.add_get("/", answer)
    server = WebServer(made, shutdown_seconds=2.0)
    server.end_connections()  # Before it has any.
    await server.start(["127.0.0.1:0"])
    [url] = server.urls
    async with asyncio.timeout(10), contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(server.stop)
        idle, busy = [await closing.enter_async_context(connection(url)) for _ in range(2)]
        answers.set()
        idle[1].write(GET)
        assert b"200 OK" in await idle[0].readuntil(b"here")
        answers.clear()
        busy[1].write(GET)
        while asked < 2:  # noqa: ASYNC110 - the other side's state
            await asyncio.sleep(0.01)
        server.end_connections()
        assert await idle[0].read() == b""
        answers.set()
        assert (await busy[0].read()).endswith(b"here")
        assert await get(url) == "here"


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    yield reader, writer
    writer.close()
    await writer.wait_closed()


async def test_several_addresses(server: WebServer) -> None:
    await server.start(["127.0.0.1:0", "127.0.0.2:0"])
    assert len(server.urls) == 2
    assert [await get(url) for url in server.urls] == ["here", "here"]


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = WebServer(app(), socket_mode=0o600)
    await server.start(["127.0.0.1:0", f"unix:{path}"])
    [url] = server.urls
    assert url.startswith("http://127.0.0.1:")
    assert server.paths == (str(path),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        async with session.get("http://localhost/") as response:
            assert await response.text() == "here"
        await server.stop()
    assert not path.exists()


async def test_a_unix_socket_that_somebody_listens_on_stays_theirs(server: WebServer, tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        with pytest.raises(SocketError, match="somebody does already"):
            await server.start(["127.0.0.1:0", f"unix:{path}"])
        assert server.urls == ()
        assert path.exists()


async def test_a_passed_unix_socket_is_served_and_its_file_stays(server: WebServer, tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    passed = socket.socket(socket.AF_UNIX)
    passed.bind(str(path))
    passed.listen()
    await server.start((), passed=[passed])
    connector = aiohttp.UnixConnector(str(path))
    async with aiohttp.ClientSession(connector=connector) as session, session.get("http://localhost/") as response:
        assert await response.text() == "here"
    await server.stop()
    assert path.exists()


async def test_connections_on_a_unix_socket_have_a_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "web.sock")
    server = WebServer(app(), limits=Limits(connections=4, connections_per_origin=2))
    await server.start([f"unix:{path}"])
    opened = [await asyncio.open_unix_connection(path) for _ in range(3)]
    # The third is closed without an answer.
    assert await asyncio.wait_for(opened[2][0].read(), 5) == b""
    opened[1][1].write(GET)
    assert b"200 OK" in await asyncio.wait_for(opened[1][0].readline(), 5)
    for _, writer in opened:
        writer.close()
    await server.stop()


async def test_no_host_means_every_interface_of_both_families(server: WebServer) -> None:
    await server.start([":0"])
    [url] = server.urls
    port = url.rpartition(":")[2]
    assert url == f"http://localhost:{port}"
    assert await get(f"http://127.0.0.1:{port}") == "here"
    if has_ipv6():
        assert await get(f"http://[::1]:{port}") == "here"


async def test_no_host_without_ipv6_means_ipv4(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    await server.start([":0"])
    port = server.urls[0].rpartition(":")[2]
    assert await get(f"http://127.0.0.1:{port}") == "here"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
async def test_ipv6_address(server: WebServer) -> None:
    await server.start(["[::1]:0"])
    assert server.urls[0].startswith("http://[::1]:")
    assert await get(server.urls[0]) == "here"


@pytest.mark.parametrize("form", ["127.0.0.1:{}", ":{}"])
async def test_a_port_in_use_is_one_sentence_and_leaves_nothing_open(server: WebServer, form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            await server.start(["127.0.0.1:0", form.format(port)])
    message = str(caught.value)
    assert message.startswith(f"Cannot listen on {form.format(port)}: the port is in use")
    assert f"sport = :{port}" in message
    assert "--web.listen-address" in message
    assert "\n" not in message
    assert server.urls == ()


async def test_an_address_of_another_machine(server: WebServer) -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0: this machine has no such address"):
        await server.start(["192.0.2.1:0"])


async def test_an_unknown_host_name(server: WebServer) -> None:
    with pytest.raises(ListenError, match=r"the host name nowhere\.invalid is unknown"):
        await server.start(["nowhere.invalid:0"])


async def test_stop_lets_a_running_request_finish_and_closes_idle_connections() -> None:
    server = WebServer(app(delay_seconds=0.2), shutdown_seconds=5.0)
    await server.start(["127.0.0.1:0"])
    [url] = server.urls
    host, _, port = url.removeprefix("http://").rpartition(":")
    idle, idle_writer = await asyncio.open_connection(host, int(port))
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(GET)
    await asyncio.sleep(0.05)
    await asyncio.wait_for(server.stop(), 5)
    assert (await reader.read()).endswith(b"here")
    assert await idle.read() == b""
    for each in (writer, idle_writer):
        each.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_a_malformed_request_gets_an_answer_without_versions(server: WebServer) -> None:
    await server.start(["127.0.0.1:0"])
    answer = await raw(server.urls[0], b"\x16\x03\x01\x00 nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 400") or answer.startswith(b"HTTP/1.1 400")
    assert b"Server: jouletrace\r\n" in answer
    assert b"aiohttp" not in answer
    assert b"ython" not in answer


async def test_headers_have_a_limit(server: WebServer) -> None:
    await server.start(["127.0.0.1:0"])
    long = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n"
    assert b" 400 " in (await raw(server.urls[0], long)).partition(b"\r\n")[0]


async def test_idle_connections_are_closed_after_the_keep_alive_time(server: WebServer) -> None:
    await server.start(["127.0.0.1:0"], keep_alive_seconds=0.05)
    # read() returns when the server closes, which it does well within raw's 10 s.
    assert (await raw(server.urls[0], GET)).endswith(b"here")


async def test_slow_headers_are_not_waited_for() -> None:
    server = WebServer(app(), limits=Limits(head_seconds=0.2))
    await server.start(["127.0.0.1:0"])
    host, _, port = server.urls[0].removeprefix("http://").rpartition(":")
    # Silent from the start, slow in the first head, slow in a later one.
    for beginning, expected in ((b"", b""), (b"GET / HTTP/1.1\r\n", b""), (GET + b"GET / HTTP/1.1\r\nX", b"here")):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(beginning)

        async def dribble(writer: asyncio.StreamWriter = writer) -> None:
            while not writer.is_closing():
                await asyncio.sleep(0.05)
                writer.write(b"X")
                await writer.drain()

        dribbling = asyncio.create_task(dribble())
        try:
            assert (await asyncio.wait_for(reader.read(), 2)).endswith(expected)
        except ConnectionError:
            assert not expected
        dribbling.cancel()
        await asyncio.wait({dribbling})
        writer.close()
    await server.stop()


async def test_a_slow_answer_is_not_a_slow_head() -> None:
    server = WebServer(app(delay_seconds=0.4), limits=Limits(head_seconds=0.1))
    await server.start(["127.0.0.1:0"])
    assert await get(server.urls[0]) == "here"
    await server.stop()


async def test_all_headers_together_have_a_limit(server: WebServer) -> None:
    await server.start(["127.0.0.1:0"])
    host, _, port = server.urls[0].removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n")
    # Just over the limit: a client that goes on sending is reset and may miss the answer.
    for number in range(9):
        writer.write(f"X-{number}: ".encode() + b"a" * 4000 + b"\r\n")
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(reader.read(100), 5)).startswith(b"HTTP/1.1 431 ")
    writer.close()


async def test_connections_have_a_limit_and_room_is_found_again() -> None:
    server = WebServer(app(), limits=Limits(connections=4, connections_per_origin=3))
    await server.start(["127.0.0.1:0"])
    host, _, port = server.urls[0].removeprefix("http://").rpartition(":")

    async def connect(local: str) -> tuple[bool, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=(local, 0))
        writer.write(GET)
        try:
            return b"here" in await asyncio.wait_for(reader.read(500), 5), writer
        except ConnectionError:
            return False, writer

    origins = ["127.0.0.1"] * 4 + ["127.0.0.2"] * 2
    connected = [await connect(origin) for origin in origins]
    assert [answered for answered, _ in connected] == [True, True, True, False, True, False]
    for _, writer in connected:
        writer.close()
    await asyncio.sleep(0.1)
    again, writer = await connect("127.0.0.1")
    assert again
    writer.close()
    await server.stop()
