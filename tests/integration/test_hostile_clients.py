"""What somebody on the node, or on its network, can send to the whole daemon: it answers, forgets and goes on."""

import contextlib
import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.busy_recording import busy_recording
from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.timeout(90)

HOST = b"Host: localhost\r\n"
GROWTH_MEBIBYTES = 64
"""What an attack of hundreds of megabytes may leave behind in the daemon's peak: bodies may hold as much."""


@pytest.fixture(name="daemon", scope="module")
def fixture_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("hostile")
    source = f"replay:{busy_recording(folder)}"
    with DaemonProcess(folder, "--source", source, "--otlp.grpc-listen-address", "127.0.0.1:0") as daemon:
        daemon.until("readiness", daemon.ready)
        yield daemon
        daemon.until("readiness", daemon.ready)
        daemon.assert_calm()
        assert "please report this" not in daemon.text()


def connected(daemon: DaemonProcess, local: str = "127.0.0.1") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", int(daemon.url.rpartition(":")[2])), 5, (local, 0))
    sock.settimeout(5)
    return sock


def statuses(daemon: DaemonProcess, request: bytes) -> list[int]:
    """Return the status of each answer to what is sent on one connection, which is then half closed."""
    with connected(daemon) as sock:
        answer = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
        # The server closes at `Connection: close`, after an error, or when it has waited in vain.
        sock.settimeout(1)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := sock.recv(1 << 16):
                answer += part
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def post(path: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in (*headers, b"Connection: close"))
    return b"POST %s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n%s" % (path, HOST, lines, len(body), body)


@contextlib.contextmanager
def little_is_kept(daemon: DaemonProcess) -> Iterator[None]:
    """Assert that the daemon's memory at its peak is little more than before."""
    # proc(5): 5 sets the peak back to what is resident now.
    Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")
    before = _peak_mebibytes(daemon)
    yield
    assert _peak_mebibytes(daemon) - before < GROWTH_MEBIBYTES


def _peak_mebibytes(daemon: DaemonProcess) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


SMUGGLED = b"GET /v1/ledger HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 2\r\nContent-Length: 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"X: a\r\n Transfer-Encoding: chunked\r\n",
        b"X: a\0b\r\n",
        b"Host: other\r\n",
    ],
)
def test_nothing_is_smuggled_behind_an_ambiguous_request(daemon: DaemonProcess, head: bytes) -> None:
    ambiguous = b"POST /v1/requests HTTP/1.1\r\n" + HOST + head + b"\r\n0\r\n\r\n"
    assert statuses(daemon, ambiguous + SMUGGLED) == [400]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (b"/../metrics", 404), (b"//metrics", 404), (b"/%2e%2e/metrics", 404), (b"/metrics%2f", 404),
        (b"/-/live/../../../etc/passwd", 404), (b"/-/live/%2e%2e%2fpage.py", 404), (b"/-/live/live.js%00", 404),
        (b"/v1//requests", 404), (b"/V1/requests", 404), (b"/v1/requests/..%2fledger", 404),
        (b"/%6detrics", 200), (b"/" + b"a" * 9000, 400),
    ],
)  # fmt: skip
def test_a_path_is_a_route_or_nothing(daemon: DaemonProcess, path: bytes, status: int) -> None:
    assert statuses(daemon, b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n") == [status]


@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PATCH"])
def test_other_methods_are_refused(daemon: DaemonProcess, method: bytes) -> None:
    assert statuses(daemon, method + b" /metrics HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n") == [405]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"TLS/1.0"])
def test_no_other_protocol_is_taken_up(daemon: DaemonProcess, protocol: bytes) -> None:
    head = b"GET /-/healthy HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n"
    assert statuses(daemon, head) == [200]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Host: evil.example\r\n", 403),
        (b"Host: localhost.evil.example:9841\r\n", 403),
        (HOST + b"Origin: http://evil.example\r\n", 403),
        (HOST + b"X-Forwarded-For: 127.0.0.1\r\n", 403),
        (HOST + b"Forwarded: for=10.0.0.7\r\n", 403),
        (HOST, 200),
    ],
)
def test_what_requests_used_is_not_for_pages_and_proxies(daemon: DaemonProcess, headers: bytes, status: int) -> None:
    """A page whose name was made to point here (DNS rebinding), one of another origin, and whoever asks a proxy."""
    asked = b"GET /v1/ledger HTTP/1.1\r\n" + headers + b"Connection: close\r\n\r\n"
    assert statuses(daemon, asked) == [status]


DEEP = b'{"arrayValue":{"values":[' * 5000
VALUE = b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"attributes":[{"key":"a","value":'


@pytest.mark.parametrize(
    "path", [b"/v1/requests", b"/v1/steps", b"/v1/engines", b"/v1/traces", b"/v1/requests/a/start"]
)
@pytest.mark.parametrize(
    "body",
    [b"[" * 3_000_000, b'{"a":' * 1_000_000, VALUE + DEEP, b"1" * 3_000_000, b'"' + b"\\ud800" * 100_000 + b'"'],
    ids=["arrays", "objects", "values", "digits", "surrogates"],
)
def test_json_of_any_depth_is_refused(daemon: DaemonProcess, path: bytes, body: bytes) -> None:
    assert statuses(daemon, post(path, body, b"Content-Type: application/json")) == [400]


def test_a_bomb_is_not_unpacked(daemon: DaemonProcess) -> None:
    bomb = gzip.compress(bytes(500 << 20), 1)
    kind = b"Content-Type: application/json"
    with little_is_kept(daemon):
        for path in (b"/v1/requests", b"/v1/traces"):
            assert statuses(daemon, post(path, bomb, b"Content-Encoding: gzip", kind)) == [413]
            assert statuses(daemon, post(path, bomb[:99], b"Content-Encoding: gzip, gzip", kind)) == [415]


def test_spans_over_grpc_have_the_same_bounds(daemon: DaemonProcess) -> None:
    [port] = [event["port"] for event in daemon.events() if "port" in event]
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel, little_is_kept(daemon):
        export = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        bomb, noise = bytes(200 << 20), b"\xff" * 100_000
        for message, packed, code in (
            (bomb, grpc.Compression.Gzip, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (bomb, grpc.Compression.Deflate, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (bomb[: 9 << 20], grpc.Compression.NoCompression, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (noise, grpc.Compression.Gzip, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                export(message, compression=packed, timeout=20)
            assert caught.value.code() is code  # type: ignore[attr-defined]
        # Gone before the answer, and gone before the message: neither leaves a line in the log.
        gone = [export.future(bytes(9 << 20)) for _ in range(20)]
        stream = channel.stream_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        with pytest.raises(grpc.RpcError) as caught:
            stream(iter(()), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert all(call.exception() is not None for call in gone)


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", SMUGGLED * 1000),
        (b"GET /v1/live HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", bytes(1 << 16)),
        (b"POST /v1/requests HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5;a=", b"x" * (1 << 16)),
        (b"POST /v1/requests HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 9000),
        (b"GET / HTTP/1.1\r\n" + HOST, b"X: y\r\n" * 9000),
    ],
    ids=["pipelined", "upgraded", "chunk extension", "trailers", "headers"],
)
def test_a_flood_is_not_kept(daemon: DaemonProcess, begin: bytes, more: bytes) -> None:
    """Of a client that only writes: it is stopped, sent away or forgotten as it comes."""
    with little_is_kept(daemon), connected(daemon) as sock, contextlib.suppress(OSError):
        sock.settimeout(1)
        sock.sendall(begin)
        for _ in range((200 << 20) // len(more)):
            sock.sendall(more)
    assert daemon.get("/-/healthy")[0] == 200


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\r\n123", b"-1\r\n\r\n", b"FFFFFFFFFFFFFFFFF\r\n"])
def test_a_body_that_breaks_off_leaves_no_trace(daemon: DaemonProcess, chunk: bytes) -> None:
    """Neither a line in the log nor a handler that waits: whoever may send could fill the disk."""
    said = len(daemon.events())
    for path in (b"/v1/requests", b"/v1/traces"):
        for _ in range(5):
            with connected(daemon) as sock:
                kind = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                sock.sendall(b"POST " + path + b" HTTP/1.1\r\n" + HOST + kind)
                time.sleep(0.01)
                sock.sendall(chunk)
                time.sleep(0.01)
    assert daemon.get("/-/healthy")[0] == 200
    assert len([event for event in daemon.events()[said:] if event["event"] != "a span was refused"]) == 0


def test_connections_that_take_nothing_leave_room_for_a_scrape(daemon: DaemonProcess) -> None:
    """256 of one address ask for metrics and read none; another address is answered all the same."""
    with little_is_kept(daemon), contextlib.ExitStack() as stack:
        for _ in range(256):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.bind(("127.0.0.7", 0))
            sock.connect(("127.0.0.1", int(daemon.url.rpartition(":")[2])))
            sock.sendall(b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n")
        daemon.until("an answer", lambda: daemon.get("/metrics")[0] == 200)
        with connected(daemon, "127.0.0.7") as one_more:
            assert one_more.recv(1) == b""


def test_lies_move_joules_and_make_none(daemon: DaemonProcess) -> None:
    """A tenant that may send records invents engines, models, tenants and requests without end."""
    uuids = re.findall(r'jouletrace_gpu_info\{.*?uuid="([^"]+)"', daemon.get("/metrics")[1])

    def tell(path: bytes, rows: list[dict[str, object]]) -> None:
        body = b"\n".join(json.dumps(row).encode() for row in rows)
        assert statuses(daemon, post(path, body, b"Content-Type: application/x-ndjson")) == [200]

    def ledger() -> dict[str, float]:
        totals: dict[str, float] = json.loads(daemon.get("/v1/ledger")[1])["totals"]
        return totals

    engines = [{"engine_id": f"liar-{n}", "kind": "vllm", "gpu_uuids": uuids} for n in range(1000)]
    tell(b"/v1/engines", engines)  # type: ignore[arg-type]
    for turn in range(3):
        now = time.time_ns()
        times = {"arrival_ns": now - 900_000_000, "first_token_ns": now - 800_000_000, "end_ns": now}
        usage = {"input": 10, "output": 2**31}
        tell(
            b"/v1/requests",
            [
                {
                    "request_id": f"{turn}-{n}", "engine_id": f"liar-{n % 50}", "model": f"model-{n % 300}",
                    "tenant": f"tenant-{n}", "status": "finished", "usage": usage, **times,
                }
                for n in range(5000)
            ],
        )  # fmt: skip
        time.sleep(1)
    daemon.until("what they took", lambda: ledger()["attributed_joules"] > 0)
    totals = ledger()
    parts = ("attributed_joules", "pending_joules", "idle_joules", "unattributed_joules")
    assert sum(totals[part] for part in parts) == pytest.approx(totals["device_joules"], rel=1e-9)
    measured = daemon.metric("jouletrace_gpu_energy_joules_total")["0"]
    assert totals["device_joules"] <= measured
    # 700 W is what an H200 may draw: nothing that was told made it more.
    assert totals["device_joules"] / (time.monotonic() - daemon.started) < 700
    status, page = daemon.get("/metrics")
    assert (status, len([line for line in page.splitlines() if not line.startswith("#")]) < 20_000) == (200, True)
    assert daemon.metric("jouletrace_sample_age_seconds")["0"] < 5
    assert "overflow" in {row["reason"] for row in json.loads(daemon.get("/v1/ledger")[1])["dropped"]}
