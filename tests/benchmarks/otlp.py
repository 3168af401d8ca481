"""What taking spans costs the whole daemon: 10,000 a second for a while, with the collector away in between.

Run it from the repository: `python -m tests.benchmarks.otlp`. The daemon and the collector are processes of their own;
the load, which is encoded beforehand but for its times, comes from this one. Three quarters of a minute.
"""

import argparse
import asyncio
import contextlib
import http.client
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jouletrace.daemon import demo_recording
from jouletrace.trace import recording
from tests.otlp_exports import captured, export

SPANS_PER_SECOND = 10_000
BATCH = 500
"""Spans of one export; the SDK's batch processor sends 512 at most."""
AWAY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    goal: str


class Load:
    """Exports of the captured requests with 13 attributes each, with ids and times of their own."""

    def __init__(self, request_part: float) -> None:
        rows = captured()[1:]
        span_rows = [rows[number % len(rows)] for number in range(BATCH)]
        self._message = ExportTraceServiceRequest()
        self._message.CopyFrom(export(span_rows[:1]))
        self._spans = self._message.resource_spans[0].scope_spans[0].spans
        for number, row in enumerate(span_rows[1:], 1):
            self._spans.add().CopyFrom(export([row]).resource_spans[0].scope_spans[0].spans[0])
            if number >= BATCH * request_part:
                self._spans[number].name = "prefill_forward"
        self._lives = [span.end_time_unix_nano - span.start_time_unix_nano for span in self._spans]
        self._number = 0
        self.span_bytes = len(self._message.SerializeToString()) / BATCH

    def batch(self) -> bytes:
        """Return the next export; its spans end now."""
        now_ns = time.time_ns()
        for span, life_ns in zip(self._spans, self._lives, strict=True):
            self._number += 1
            span.trace_id = self._number.to_bytes(16, "big")
            span.end_time_unix_nano, span.start_time_unix_nano = now_ns, now_ns - life_ns
            for attribute in span.attributes:
                if attribute.key == "gen_ai.request.id":
                    attribute.value.string_value = f"chatcmpl-{self._number}"
        return self._message.SerializeToString()


async def serve_collector(port: int) -> None:
    """Be a collector that counts what it gets; `GET /` tells exports and bytes."""
    exports = size = 0

    async def post(request: web.Request) -> web.Response:
        nonlocal exports, size
        size += len(await request.read())
        exports += 1
        return web.Response(content_type="application/x-protobuf")

    async def get(_: web.Request) -> web.Response:
        return web.Response(text=f"{exports} {size}")

    app = web.Application(client_max_size=64 << 20)
    app.add_routes([web.post("/v1/traces", post), web.get("/", get)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _started(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-m", *arguments], env=environment)


class Rig:
    """The daemon, a collector that can be away, and a client."""

    def __init__(self, session: aiohttp.ClientSession, daemon: int, collector: int) -> None:
        self.session = session
        self.url, self.collector_url = f"http://127.0.0.1:{daemon}", f"http://127.0.0.1:{collector}"
        self._collector_port = collector
        self.process: psutil.Process
        self._collector: subprocess.Popen[bytes] | None = None

    async def start_collector(self) -> None:
        """Start the collector and wait until it answers."""
        self._collector = _started("tests.benchmarks.otlp", "--serve-collector", str(self._collector_port))
        await self._answers(self.collector_url)

    def stop_collector(self) -> None:
        """End it; what it has counted is lost."""
        if self._collector is not None:
            self._collector.terminate()
            self._collector.wait(10)
            self._collector = None

    async def collected(self) -> tuple[int, int]:
        """Return exports and bytes that the collector got."""
        async with self.session.get(self.collector_url) as response:
            exports, size = (await response.text()).split()
            return int(exports), int(size)

    async def metric(self, name: str) -> float:
        """Return the sum of a metric's series."""
        async with self.session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    async def _answers(self, url: str) -> None:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    async with self.session.get(url) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.05)

    async def ready(self) -> None:
        """Wait for the daemon."""
        await self._answers(f"{self.url}/-/ready")


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Rig]:
    """Yield a daemon that passes spans on to a collector which is not there yet."""
    with TemporaryDirectory() as directory:
        quiet = Path(directory) / "quiet.json.gz"
        demo = recording.read(demo_recording())
        recording.write(quiet, recording.Recording(demo.meta, demo.streams, (), demo.name))
        async with aiohttp.ClientSession() as session:
            rig = Rig(session, _free_port(), _free_port())
            daemon = _started(
                "jouletrace", "run", "--source", f"replay:{quiet}", "--state-dir", directory, "--log.level", "warning",
                "--web.listen-address", rig.url.removeprefix("http://"),
                "--otlp.forward-url", f"{rig.collector_url}/v1/traces",
                # 10,000 requests that end each second are more than 16,384 until they are settled.
                "--ledger.in-flight-requests", "100000",
            )  # fmt: skip
            try:
                rig.process = psutil.Process(daemon.pid)
                await rig.ready()
                yield rig
            finally:
                rig.stop_collector()
                daemon.terminate()
                daemon.wait(20)


@dataclass(slots=True)
class Sent:
    """What was sent, and how the daemon bore it."""

    exports: int = 0
    size: int = 0
    refused: int = 0
    cpu_share: float = 0.0
    waits: Sequence[float] = ()
    """Of another client of the daemon."""


async def send(rig: Rig, load: Load, seconds: float) -> Sent:
    """Send at the goal's rate and ask for something else meanwhile."""
    sent = Sent()
    waits: list[float] = []

    done = threading.Event()

    def ask() -> None:
        # In a thread and with short turns: what this process is busy with must not count as the daemon's wait.
        connection = http.client.HTTPConnection(rig.url.removeprefix("http://"), timeout=10)
        while not done.wait(0.01):
            asked = time.perf_counter()
            connection.request("GET", "/-/healthy")
            connection.getresponse().read()
            waits.append(time.perf_counter() - asked)
        connection.close()

    asking = asyncio.create_task(asyncio.to_thread(ask))
    cpu, began = sum(rig.process.cpu_times()[:2]), time.monotonic()
    due = began
    while due < began + seconds:
        body = load.batch()
        headers = {"Content-Type": "application/x-protobuf"}
        async with rig.session.post(f"{rig.url}/v1/traces", data=body, headers=headers) as response:
            sent.refused += response.status != 200
        sent.exports += 1
        sent.size += len(body)
        due += BATCH / SPANS_PER_SECOND
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    took = time.monotonic() - began
    sent.cpu_share = (sum(rig.process.cpu_times()[:2]) - cpu) / took
    done.set()
    await asking
    sent.waits = waits
    rate = sent.exports * BATCH / took
    if rate < SPANS_PER_SECOND * 0.98:
        print(f"only {rate:,.0f} spans/s could be sent", file=sys.stderr)
    return sent


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def measure(seconds: float, away_seconds: float) -> list[Row]:
    """Return the table."""
    rows: list[Row] = []
    for what, part in (("all of them requests", 1.0), ("one in ten a request", 0.1)):
        async with started() as rig:
            await rig.start_collector()
            load = Load(part)
            sent = await send(rig, load, seconds)
            await asyncio.sleep(1)
            exports, size = await rig.collected()
            dropped = await rig.metric("jouletrace_events_dropped_total")
            taken = await rig.metric("jouletrace_events_total")
        label = f"{SPANS_PER_SECOND:,} spans/s of {load.span_bytes:.0f} bytes, {what}"
        rows += [
            Row(f"{label}: CPU, part of one core", f"{sent.cpu_share:.1%}", "<= 50 %"),
            Row(f"{label}: records taken, dropped", f"{taken:,.0f}, {dropped:,.0f}", "0 dropped"),
            Row(f"{label}: exports refused", str(sent.refused), "0"),
            Row(
                f"{label}: passed on", f"{exports:,} of {sent.exports:,} exports, {size - sent.size:+,} bytes", "all, 0"
            ),
            Row(f"{label}: wait of another client, p99", f"{_percentile(sent.waits, 99) * 1e3:.1f} ms", ""),
        ]
    async with started() as rig:
        sent = await send(rig, Load(0.1), away_seconds)
        held = await rig.metric("jouletrace_otlp_forward_buffer_bytes")
        resident = rig.process.memory_info().rss / 2**20
        await rig.start_collector()
        began = time.monotonic()
        for _ in range(300):
            if not await rig.metric("jouletrace_otlp_forward_buffer_bytes"):
                break
            await asyncio.sleep(0.2)
        caught_up = time.monotonic() - began
        exports, size = await rig.collected()
        label = f"collector away for {away_seconds:.0f} s at {SPANS_PER_SECOND:,} spans/s"
        rows += [
            Row(f"{label}: held, resident memory", f"{held / 2**20:.0f} MiB, {resident:.0f} MiB", ""),
            Row(
                f"{label}: passed on", f"{exports:,} of {sent.exports:,} exports, {size - sent.size:+,} bytes", "all, 0"
            ),
            Row(f"{label}: time to catch up", f"{caught_up:.1f} s", ""),
        ]
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each sustained part (default: 10)")
    parser.add_argument("--away-seconds", type=float, default=AWAY_SECONDS, help="of the collector (default: 30)")
    parser.add_argument(
        "--serve-collector", type=int, metavar="PORT", help="be the collector; for the benchmark itself"
    )
    options = parser.parse_args()
    if options.serve_collector:
        asyncio.run(serve_collector(options.serve_collector))
        return
    sys.setswitchinterval(0.0005)
    print("| what | measured | goal |\n|---|---|---|")
    for row in asyncio.run(measure(options.seconds, options.away_seconds)):
        print(f"| {row.what} | {row.measured} | {row.goal} |")


if __name__ == "__main__":
    main()
