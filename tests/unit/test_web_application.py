import asyncio
import gzip
import io
import threading
from collections.abc import Awaitable, Callable, Iterable

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from structlog.testing import capture_logs
from tests.snapshots import NOW_NS, full_device, node_snapshot

from jouletrace.metrics.exporter import node_registry
from jouletrace.web.application import accepts_gzip, application
from jouletrace.web.health import Readiness

Client = Callable[[web.Application], Awaitable[TestClient[web.Request, web.Application]]]
PLAIN = {"Accept-Encoding": "identity"}


class SlowCollector:
    """A collector that waits until it is let go and notes in which thread it ran."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.started = threading.Semaphore(0)
        self.threads: set[str] = set()

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily("slow", "Slow.")]

    def collect(self) -> Iterable[Metric]:
        self.threads.add(threading.current_thread().name)
        self.started.release()
        assert self.go.wait(20)
        yield GaugeMetricFamily("slow", "Slow.", value=1)


def app(
    *, registry: CollectorRegistry | None = None, readiness: Readiness | None = None, path: str = "/metrics"
) -> web.Application:
    snapshot = node_snapshot(full_device(0), full_device(1))
    verdict = readiness or Readiness(ready=True)
    full = registry or node_registry(
        lambda: snapshot, now_ns=lambda: NOW_NS, heartbeat_age_seconds=lambda: 0.1, stale_after_seconds=5.0
    )
    return application(snapshot=lambda: snapshot, registry=full, readiness=lambda: verdict, telemetry_path=path)


async def test_metrics_as_text(aiohttp_client: Client) -> None:
    client = await aiohttp_client(app())
    response = await client.get("/metrics", headers=PLAIN)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.headers["Vary"] == "Accept, Accept-Encoding"
    text = await response.text()
    assert 'jouletrace_up{source="nvml"} 1.0' in text
    assert "process_cpu_seconds_total" in text


async def test_metrics_as_openmetrics(aiohttp_client: Client) -> None:
    client = await aiohttp_client(app())
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    response = await client.get("/metrics", headers=PLAIN | {"Accept": accept})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0;")
    assert (await response.text()).endswith("# EOF\n")


async def test_two_accept_headers_are_one_list(aiohttp_client: Client) -> None:
    client = await aiohttp_client(app())
    headers = [("Accept", "text/plain"), ("Accept", "application/openmetrics-text;version=1.0.0")]
    response = await client.get("/metrics", headers=headers)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")


async def test_gzip_when_asked(aiohttp_client: Client) -> None:
    client = await aiohttp_client(app())
    async with client.session.get(
        client.make_url("/metrics"), headers={"Accept-Encoding": "gzip"}, auto_decompress=False
    ) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        packed = await response.read()
        assert int(response.headers["Content-Length"]) == len(packed)
    assert b"jouletrace_gpu_energy_joules_total" in gzip.decompress(packed)
    plain = await client.get("/metrics", headers=PLAIN)
    assert "Content-Encoding" not in plain.headers
    assert len(packed) < len(await plain.read()) / 4


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("", False),
        ("identity", False),
        ("gzip", True),
        ("GZIP", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip;q=0.001", True),
        ("*", True),
        ("*;q=0", False),
        ("gzip;q=0, *", False),
        ("br", False),
    ],
)
def test_accept_encoding(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


async def test_head_and_names_filter(aiohttp_client: Client) -> None:
    client = await aiohttp_client(app())
    head = await client.head("/metrics", headers=PLAIN)
    assert head.status == 200
    assert head.headers["Content-Type"].startswith("text/plain")
    assert int(head.headers["Content-Length"]) > 10_000
    assert await head.read() == b""
    url = "/metrics?name[]=jouletrace_up&name[]=process_open_fds"
    lines = (await (await client.get(url)).text()).splitlines()
    assert [line.partition("{")[0].partition(" ")[0] for line in sorted(lines) if line[0] != "#"] == [
        "jouletrace_up",
        "process_open_fds",
    ]


async def test_rendering_never_runs_on_the_loop_and_has_a_limit(aiohttp_client: Client) -> None:
    slow = SlowCollector()
    registry = CollectorRegistry()
    registry.register(slow)
    client = await aiohttp_client(app(registry=registry))
    waiting: list[asyncio.Task[ClientResponse]] = [asyncio.create_task(client.get("/metrics")) for _ in range(4)]
    try:
        for _ in waiting:
            assert await asyncio.to_thread(slow.started.acquire, timeout=20)
        # Four are under way and stuck; the loop still answers, and a fifth scrape is sent away.
        assert (await client.get("/-/healthy")).status == 200
        refused = await client.get("/metrics")
        assert refused.status == 503
        assert refused.headers["Retry-After"] == "1"
        assert "4 scrapes" in await refused.text()
    finally:
        slow.go.set()
    assert [(await task).status for task in waiting] == [200] * 4
    assert (await client.get("/metrics")).status == 200
    assert all(name.startswith("metrics") for name in slow.threads)


async def test_health_and_readiness(aiohttp_client: Client) -> None:
    ready = await aiohttp_client(app())
    assert (await (await ready.get("/-/healthy")).text()) == "healthy\n"
    response = await ready.get("/-/ready")
    assert (response.status, await response.text()) == (200, "ready\n")
    unready = await aiohttp_client(
        app(readiness=Readiness(ready=False, reasons=("GPU 0: gone.", "GPU 1: late."), stalled=True))
    )
    response = await unready.get("/-/ready")
    assert (response.status, await response.text()) == (503, "GPU 0: gone.\nGPU 1: late.\n")
    assert (await unready.get("/-/healthy")).status == 200


async def test_live_page_and_another_telemetry_path(aiohttp_client: Client) -> None:
    client = await aiohttp_client(app(path="/telemetry"))
    response = await client.get("/")
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert 'href="telemetry"' in await response.text()
    assert (await client.get("/telemetry")).status == 200
    assert (await client.get("/metrics")).status == 404


async def test_errors_are_json_below_v1_and_text_elsewhere(aiohttp_client: Client) -> None:
    async def broken(_: web.Request) -> web.Response:
        raise RuntimeError("secret detail")

    async def large(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    whole = app()
    whole.router.add_get("/v1/broken", broken)
    whole.router.add_get("/broken", broken)
    whole.router.add_post("/v1/large", large)
    client = await aiohttp_client(whole)

    missing = await client.get("/v1/nothing")
    assert missing.status == 404
    assert await missing.json() == {"error": {"status": 404, "message": "Not found; / lists what is here."}}
    plain = await client.get("/nothing<script>")
    assert (plain.status, await plain.text()) == (404, "Not found; / lists what is here.\n")
    assert plain.headers["Content-Type"] == "text/plain; charset=utf-8"

    wrong = await client.post("/metrics")
    assert wrong.status == 405
    assert set(wrong.headers["Allow"].split(",")) == {"GET", "HEAD"}

    too_large = await client.post("/v1/large", data=io.BytesIO(b"x" * (1024 * 1024 + 1)))
    assert too_large.status == 413
    assert (await too_large.json())["error"]["status"] == 413

    with capture_logs() as logs:
        for path in ("/v1/broken", "/broken"):
            failed = await client.get(path)
            assert failed.status == 500
            assert "secret" not in await failed.text()
    assert [(entry["log_level"], entry["path"]) for entry in logs] == [
        ("error", "/v1/broken"),
        ("error", "/broken"),
    ]


@pytest.mark.parametrize("path", ["/", "/metrics", "/-/healthy", "/-/ready", "/nothing", "/v1/nothing"])
async def test_security_headers_are_on_every_answer(aiohttp_client: Client, path: str) -> None:
    client = await aiohttp_client(app())
    response = await client.get(path)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert response.headers["Server"] == "jouletrace"
    assert response.headers["Cache-Control"] == "no-store"
