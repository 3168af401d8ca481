import asyncio
import contextlib
import gzip
import re
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import structlog
from aiohttp import web

from jouletrace.engines.otlp import tee as module
from jouletrace.engines.otlp.tee import HEADERS_BYTES, Tee, TeeCounts

SENT = {"Content-Type": "application/x-protobuf", "User-Agent": "OTel-OTLP-Exporter-Python/1.45.2"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(module, "LONGEST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.3)


class Collector:
    """A collector that keeps what it is sent, and answers with the statuses that it is given first."""

    def __init__(self, *statuses: int, headers: Mapping[str, str] | None = None) -> None:
        self.statuses = list(statuses)
        self.headers = headers
        self.kept: list[tuple[bytes, Mapping[str, str]]] = []
        self.asked = 0
        self.port = 0

    async def _post(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.read()
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            self.kept.append((body, request.headers.copy()))
        return web.Response(status=status, headers=self.headers)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Collector"]:
        # A plain server: an application would unpack what is packed.
        runner = web.ServerRunner(web.Server(self._post, auto_decompress=False))  # type: ignore[arg-type]
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def passing_on(collector: Collector, **options: Any) -> AsyncIterator[Tee]:
    tee = Tee(
        f"http://127.0.0.1:{collector.port}/v1/traces",
        **({"headers": {}, "buffer_bytes": 1 << 20} | options),
    )
    await tee.start()
    try:
        yield tee
    finally:
        await tee.stop()


async def settled(tee: Tee) -> TeeCounts:
    for _ in range(500):
        if not tee.counts().held_bytes:
            break
        await asyncio.sleep(0.01)
    return tee.counts()


async def test_bytes_and_headers_arrive_as_they_came() -> None:
    body = gzip.compress(b"\x0a\x00" * 100)
    headers = SENT | {
        "Content-Encoding": "gzip", "X-Scope-OrgID": "acme", "Authorization": "Bearer theirs", "Host": "here:9841",
        "Connection": "keep-alive", "Content-Length": "5", "Via": "1.1 gateway",
    }  # fmt: skip
    async with Collector().running() as collector:
        async with passing_on(collector, headers={"x-api-key": "k"}) as tee:
            tee.offer(body, headers)
            assert await settled(tee) == TeeCounts(forwarded=1)
        [(kept, came)] = collector.kept
    assert kept == body
    assert re.fullmatch("1.1 gateway, 1.1 jouletrace-[0-9a-f]{8}", came["Via"])
    assert dict(came) == SENT | {
        "Content-Encoding": "gzip", "X-Scope-OrgID": "acme", "Authorization": "Bearer theirs",
        "Host": f"127.0.0.1:{collector.port}", "Content-Length": str(len(body)), "Via": came["Via"],
        "x-api-key": "k",
    }  # fmt: skip


async def test_a_token_for_us_stays_here_and_a_key_of_ours_wins() -> None:
    async with Collector().running() as collector:
        async with passing_on(collector, hides_authorization=True) as tee:
            tee.offer(b"x", SENT | {"Authorization": "Bearer ours"})
            await settled(tee)
        async with passing_on(collector, headers={"authorization": "Basic key"}) as tee:
            tee.offer(b"y", SENT | {"Authorization": "Bearer theirs"})
            await settled(tee)
        assert "Authorization" not in collector.kept[0][1]
        assert collector.kept[1][1].getall("Authorization") == ["Basic key"]  # type: ignore[attr-defined]


async def test_nothing_is_lost_while_the_collector_is_away() -> None:
    collector = Collector()
    async with collector.running():
        pass  # Its port is known, and nobody listens there.
    with structlog.testing.capture_logs() as logs:
        async with passing_on(collector) as tee:
            for number in range(50):
                tee.offer(b"%d" % number, SENT)
            await asyncio.sleep(0.2)
            assert tee.counts().forwarded == 0
            async with collector.running():
                assert await settled(tee) == TeeCounts(forwarded=50)
    assert sorted(int(body) for body, _ in collector.kept) == list(range(50))
    assert [(entry["log_level"], entry["event"].partition(";")[0]) for entry in logs] == [
        ("warning", "the collector does not take spans"),
        ("info", "the collector takes spans again"),
    ]


def test_the_buffer_holds_no_more_memory_than_it_says() -> None:
    """Small exports, whose headers take more than their bodies."""
    tee = Tee("http://127.0.0.1:1/v1/traces", headers={}, buffer_bytes=1 << 20)
    names = ("User-Agent", "Accept-Encoding", "Accept", "Content-Type", "traceparent")
    tracemalloc.start()
    try:
        for number in range(1000):
            tee.offer(b"%0200d" % number, dict.fromkeys(names, f"something of the usual length {number}"))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tee.counts().dropped["buffer_full"] > 300
    assert taken < 1.1 * (1 << 20)


async def test_what_finds_the_buffer_full_is_dropped_and_counted_and_logged_once() -> None:
    collector = Collector()
    held_bytes = 100 + HEADERS_BYTES
    async with collector.running():
        pass
    with structlog.testing.capture_logs() as logs:
        async with passing_on(collector, buffer_bytes=10 * held_bytes) as tee:
            for _ in range(15):
                tee.offer(b"x" * 100, SENT)
            counts = tee.counts()
            assert (counts.held_bytes, counts.dropped) == (10 * held_bytes, {"buffer_full": 5})
        assert tee.counts() == TeeCounts(0, {"buffer_full": 5, "stopped": 10})
    assert sum("the buffer is full" in entry["event"] for entry in logs) == 1
    assert [entry["exports"] for entry in logs if "stopped" in entry["event"]] == [10]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_what_may_come_again_does(status: int) -> None:
    async with Collector(status, status).running() as collector, passing_on(collector) as tee:
        tee.offer(b"x", SENT)
        assert await settled(tee) == TeeCounts(forwarded=1)
        assert (collector.asked, len(collector.kept)) == (3, 1)


@pytest.mark.parametrize("status", [400, 401, 404, 500, 301])
async def test_what_is_refused_is_not_repeated(status: int) -> None:
    async with Collector(status).running() as collector, passing_on(collector) as tee:
        with structlog.testing.capture_logs() as logs:
            for body in (b"x", b"y"):
                tee.offer(body, SENT)
                await settled(tee)
        assert tee.counts() == TeeCounts(1, {"refused": 1})
        assert [(entry["log_level"], entry.get("status")) for entry in logs] == [("warning", status), ("info", None)]
        assert collector.asked == 2


async def test_the_collectors_own_wait_is_kept() -> None:
    async with Collector(503, headers={"Retry-After": "1"}).running() as collector, passing_on(collector) as tee:
        tee.offer(b"x", SENT)
        await asyncio.sleep(0.5)
        assert collector.asked == 1
        assert await settled(tee) == TeeCounts(forwarded=1)


async def test_what_comes_back_from_ourselves_goes_round_no_more() -> None:
    async with Collector().running() as collector, passing_on(collector) as tee:
        tee.offer(b"x", SENT)
        assert await settled(tee) == TeeCounts(forwarded=1)
        [(body, came)] = collector.kept
        tee.offer(body, dict(came) | {"Via": f"{came['Via']}, 1.1 nginx"})
        assert tee.counts() == TeeCounts(1, {"loop": 1})
