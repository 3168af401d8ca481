"""What taking records costs the whole daemon: sustained load, a burst, single POSTs, many requests in flight.

Run it from the repository: `python -m tests.benchmarks.ingest`. The daemon is a process of its own on a replayed
recording, with its journal and its sampler at work; the load comes from this process. A minute and a half.

Single POSTs are sent in turn to the daemon and to a bare aiohttp handler in a process of its own, so that what the
machine was busy with shows in both.
"""

import argparse
import asyncio
import gc
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import psutil
from aiohttp import web

from jouletrace.daemon import demo_recording
from jouletrace.requests.records import (
    EngineRecord,
    PrefillPart,
    RequestRecord,
    Status,
    StepRecord,
    Usage,
)
from jouletrace.trace import recording

ENGINES = 8
REQUESTS_PER_SECOND = 5000
STEPS_PER_SECOND = 2000
TICK_SECONDS = 0.02
DECODING = 32
"""Requests that a step names beside those that it prefills."""
LIFE_SECONDS = 0.2
BURST = 50_000
SINGLE_PER_SECOND = 2000
CONNECTIONS = 16
IN_FLIGHT = 16_384
PAIRS = 3
"""Turns of single POSTs, each to the bare handler and to the daemon."""
MODELS = ("llama-3.1-8b", "qwen-3-32b", "bge-m3")
WRK_SCRIPT = """
local n = 0
local body = '{"request_id":"wrk-%%s-%%d","engine_id":"engine-0","model":"bge-m3","arrival_ns":%d,"status":"running"}'
request = function()
  n = n + 1
  return wrk.format("POST", "/v1/requests", nil, string.format(body, tostring(wrk.thread), n))
end
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    goal: str


class Daemon:
    """A running daemon, or another server that takes records, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self._process = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process so far."""
        times = self._process.cpu_times()
        return times.user + times.system

    def resident_mib(self) -> float:
        """Return what it has in memory."""
        return self._process.memory_info().rss / 2**20

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        """Return the exposition."""
        async with session.get(f"{self.url}/metrics") as response:
            return await response.text()


@contextmanager
def started() -> Iterator[Daemon]:
    """Yield a daemon that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        # Without events: the replay's own engine would share the GPU and hold back the account of the others.
        quiet = Path(directory) / "quiet.json.gz"
        demo = recording.read(demo_recording())
        recording.write(quiet, recording.Recording(demo.meta, demo.streams, (), demo.name))
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jouletrace", "run", "--source", f"replay:{quiet}"),
                *("--web.listen-address", f"127.0.0.1:{port}", "--log.level", "warning"),
                *("--state-dir", directory),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            daemon = Daemon(process, f"http://127.0.0.1:{port}")
            asyncio.run(_ready(daemon))
            yield daemon
        finally:
            process.terminate()
            process.wait(20)


async def _ready(daemon: Daemon) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while True:
            try:
                async with session.get(f"{daemon.url}/-/ready") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientConnectorError:
                pass
            await asyncio.sleep(0.1)
        uuid = re.search(r'uuid="([^"]+)"', await daemon.metrics(session))
        assert uuid is not None
        engines = [EngineRecord(engine_id=f"engine-{n}", kind="vllm", gpu_uuids=(uuid[1],)) for n in range(ENGINES)]
        await _post(session, daemon, "/v1/engines", engines)


async def _post(session: aiohttp.ClientSession, daemon: Daemon, path: str, records: Sequence[msgspec.Struct]) -> int:
    """Send records as NDJSON; return how many were accepted."""
    body = b"\n".join(msgspec.json.encode(record) for record in records)
    async with session.post(daemon.url + path, data=body) as response:
        return int((await response.json())["accepted"])


def _total(exposition: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's series with these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    lines = [line for line in exposition.splitlines() if line.startswith(name + "{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Traffic:
    """Requests that live for a moment and the steps that they take part in."""

    def __init__(self) -> None:
        self._number = 0
        self._random = random.Random(1)
        self._recent: list[list[str]] = [[] for _ in range(ENGINES)]
        self._step = 0
        self._until_ns = [time.time_ns()] * ENGINES

    def requests(self, count: int) -> list[RequestRecord]:
        """Return requests that end now."""
        now_ns = time.time_ns()
        made = []
        for _ in range(count):
            self._number += 1
            engine = self._number % ENGINES
            request_id = f"chatcmpl-{self._number:032x}"
            life_ns = int(self._random.expovariate(1 / LIFE_SECONDS) * 1e9)
            self._recent[engine] = [*self._recent[engine][-DECODING * 2 :], request_id]
            made.append(
                RequestRecord(
                    request_id=request_id,
                    engine_id=f"engine-{engine}",
                    model=MODELS[self._number % len(MODELS)],
                    tenant=f"tenant-{self._number % 50}",
                    trace_id=f"{self._number:032x}",
                    arrival_ns=now_ns - life_ns,
                    first_token_ns=now_ns - life_ns // 2,
                    end_ns=now_ns,
                    status=Status.FINISHED,
                    usage=Usage(input=512, cached_input=128, output=64),
                )
            )
        return made

    def steps(self, count: int) -> list[StepRecord]:
        """Return steps that end now, each after the last of its engine."""
        made = []
        for _ in range(count):
            self._step += 1
            engine = self._step % ENGINES
            start_ns, end_ns = self._until_ns[engine], max(time.time_ns(), self._until_ns[engine] + 1000)
            self._until_ns[engine] = end_ns
            members = self._recent[engine]
            made.append(
                StepRecord(
                    engine_id=f"engine-{engine}",
                    start_ns=start_ns,
                    end_ns=end_ns,
                    prefill=tuple(PrefillPart(request_id=one, tokens=128) for one in members[-3:]),
                    decode=tuple(members[-DECODING - 3 : -3]),
                    running=len(members),
                )
            )
        return made


async def sustained(daemon: Daemon, seconds: float) -> list[Row]:
    """Send requests and steps in batches at the goal's rates."""
    traffic = Traffic()
    sent = 0
    ages: list[float] = []
    resident = 0.0
    async with aiohttp.ClientSession() as session:
        before = await daemon.metrics(session)
        cpu, began = daemon.cpu_seconds(), time.monotonic()
        due = began
        while due < began + seconds:
            requests = traffic.requests(round(REQUESTS_PER_SECOND * TICK_SECONDS))
            steps = traffic.steps(round(STEPS_PER_SECOND * TICK_SECONDS))
            await asyncio.gather(
                _post(session, daemon, "/v1/requests", requests), _post(session, daemon, "/v1/steps", steps)
            )
            sent += len(requests) + len(steps)
            if len(ages) < (due - began) * 4:
                page = await daemon.metrics(session)
                ages.append(_total(page, "jouletrace_sample_age_seconds"))
                resident = max(resident, daemon.resident_mib())
            due += TICK_SECONDS
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        took = time.monotonic() - began
        share = (daemon.cpu_seconds() - cpu) / took
        await asyncio.sleep(1.5)
        after = await daemon.metrics(session)

    def increase(name: str, **labels: str) -> float:
        return _total(after, name, **labels) - _total(before, name, **labels)

    # A replay may send its own requests as well: then more arrive than were sent here.
    arrived, lost = increase("jouletrace_events_total"), increase("jouletrace_events_dropped_total")
    reasons = sorted(set(re.findall(r'events_dropped_total\{reason="(\w+)"', after)))
    return [
        Row("sustained: records/s", f"{sent / took:,.0f}", f"{REQUESTS_PER_SECOND + STEPS_PER_SECOND:,}"),
        Row("sustained: CPU, part of one core", f"{share:.1%}", "<= 60 %"),
        Row("sustained: records lost", f"{max(0, sent - arrived) + lost:,.0f} {reasons if lost else ''}".strip(), "0"),
        Row("sustained: resident memory", f"{resident:.0f} MiB", ""),
        Row("sustained: sample age p99", f"{_percentile(ages, 99):.2f} s", "<= 2 s"),
    ]


async def burst(daemon: Daemon) -> list[Row]:
    """Send 50,000 records as fast as they go, and watch how long others wait meanwhile."""
    records = Traffic().requests(BURST)
    waits: list[float] = []
    async with aiohttp.ClientSession() as session:
        began = time.monotonic()
        sending = asyncio.gather(
            *(_post(session, daemon, "/v1/requests", records[at : at + 5000]) for at in range(0, BURST, 5000))
        )
        while not sending.done():
            asked = time.perf_counter()
            async with session.get(f"{daemon.url}/-/healthy"):
                waits.append(time.perf_counter() - asked)
            await asyncio.sleep(0.005)
        accepted = sum(await sending)
        took = time.monotonic() - began
    return [
        Row("burst: accepted of 50,000", f"{accepted:,}", f"{BURST:,}"),
        Row("burst: time until all were accepted", f"{took:.2f} s", ""),
        Row("burst: longest wait of another client", f"{max(waits) * 1e3:.0f} ms", ""),
    ]


async def _single(host: str, port: int, dues: Sequence[float], waits: list[float], failures: list[bytes]) -> None:
    """POST one record at each due time over one connection; the wait counts from when it was due."""
    reader, writer = await asyncio.open_connection(host, port)
    for due in dues:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        record = RequestRecord(
            request_id=f"single-{due}", engine_id="engine-0", model="bge-m3", arrival_ns=time.time_ns() - 10_000_000,
            end_ns=time.time_ns(), status=Status.FINISHED, usage=Usage(input=300),
        )  # fmt: skip
        body = msgspec.json.encode(record)
        writer.write(
            b"POST /v1/requests HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
        waits.append(time.monotonic() - due)
        if b" 200 " not in head[:20]:
            failures.append(head)
    writer.close()


@contextmanager
def bare() -> Iterator[Daemon]:
    """Yield a server that reads a body with aiohttp and answers the same, and does nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.benchmarks.ingest", "--serve-bare", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    try:
        server = Daemon(process, f"http://127.0.0.1:{port}")
        asyncio.run(_listening(port))
        yield server
    finally:
        process.terminate()
        process.wait(20)


async def _listening(port: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


async def serve_bare(port: int) -> None:
    """Serve until terminated."""

    async def post(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b'{"accepted":1,"dropped":{},"errors":[]}', content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/requests", post)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    gc.freeze()
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class Singles:
    """What single POSTs at a steady rate took."""

    per_second: float
    failed: int
    p50_seconds: float
    p99_seconds: float
    cpu_share: float


async def singles(server: Daemon, seconds: float) -> Singles:
    """Send single POSTs at a steady rate."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    waits: list[float] = []
    failures: list[bytes] = []
    begin = time.monotonic() + 0.2
    count = round(SINGLE_PER_SECOND * seconds)
    dues = [[begin + i / SINGLE_PER_SECOND for i in range(n, count, CONNECTIONS)] for n in range(CONNECTIONS)]
    cpu = server.cpu_seconds()
    # The collector of this process must not count as the server's wait.
    gc.freeze()
    gc.disable()
    await asyncio.gather(*(_single(host, int(port), each, waits, failures) for each in dues))
    gc.enable()
    took = time.monotonic() - begin
    share = (server.cpu_seconds() - cpu) / took
    return Singles(len(waits) / took, len(failures), _percentile(waits, 50), _percentile(waits, 99), share)


def pairs_of_singles(daemon: Daemon, seconds: float) -> list[Row]:
    """Send single POSTs to the bare handler and to the daemon in turn; each figure is the median of its turns."""
    turns: dict[str, list[Singles]] = {"bare": [], "daemon": []}
    with bare() as handler:
        for _ in range(PAIRS):
            turns["bare"].append(asyncio.run(singles(handler, seconds)))
            turns["daemon"].append(asyncio.run(singles(daemon, seconds)))

    def median(what: str, name: str) -> float:
        return statistics.median(getattr(turn, name) for turn in turns[what])

    def beside(name: str, unit: float, form: str) -> str:
        return f"{median('daemon', name) * unit:{form}}, bare aiohttp {median('bare', name) * unit:{form}}"

    spread = ", ".join(f"{turn.p99_seconds * 1e3:.1f}" for turn in turns["daemon"])
    failed = sum(turn.failed for turn in turns["daemon"])
    return [
        Row("single POSTs/s", f"{median('daemon', 'per_second'):,.0f}, {failed} failed", f"{SINGLE_PER_SECOND:,}"),
        Row("single POSTs: p50, ms", beside("p50_seconds", 1e3, ".1f"), ""),
        Row("single POSTs: p99, ms", f"{beside('p99_seconds', 1e3, '.1f')} (turns: {spread})", "<= 10"),
        Row("single POSTs: CPU each, us", beside("cpu_share", 1e6 / SINGLE_PER_SECOND, ".0f"), ""),
    ]


def wrk(daemon: Daemon, seconds: float) -> list[Row]:
    """Return what wrk measures, which sends as fast as it is answered; nothing where it is not installed."""
    program = shutil.which("wrk")
    if program is None:
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK_SCRIPT % time.time_ns())
        script.flush()
        command = [program, "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--latency", "-s", script.name, daemon.url]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert rate is not None
    waits = re.findall(r"^\s+(50|75|90|99)%\s+(\S+)", text, re.MULTILINE)
    return [
        Row(f"wrk: single POSTs/s, closed loop of {CONNECTIONS}", rate[1], ""),
        Row("wrk: latency at that rate", ", ".join(f"p{percent} {wait}" for percent, wait in waits), ""),
    ]


async def in_flight(daemon: Daemon) -> list[Row]:
    """Begin as many requests as may be in flight and let them run for some seconds."""
    now_ns = time.time_ns()
    records = [
        RequestRecord(
            request_id=f"flying-{number:032x}",
            engine_id=f"engine-{number % ENGINES}",
            model=MODELS[number % len(MODELS)],
            tenant=f"tenant-{number % 50}",
            arrival_ns=now_ns,
            status=Status.RUNNING,
        )
        for number in range(IN_FLIGHT)
    ]
    waits: list[float] = []
    async with aiohttp.ClientSession() as session:
        for at in range(0, IN_FLIGHT, 1024):
            await _post(session, daemon, "/v1/requests", records[at : at + 1024])
        await asyncio.sleep(2)
        cpu, began = daemon.cpu_seconds(), time.monotonic()
        while time.monotonic() < began + 5:
            asked = time.perf_counter()
            async with session.get(f"{daemon.url}/-/healthy"):
                waits.append(time.perf_counter() - asked)
            await asyncio.sleep(0.005)
        share = (daemon.cpu_seconds() - cpu) / (time.monotonic() - began)
        count = _total(await daemon.metrics(session), "jouletrace_requests_in_flight")
    return [
        Row("in flight", f"{count:,.0f}", f"{IN_FLIGHT:,}"),
        Row("in flight: resident memory", f"{daemon.resident_mib():.0f} MiB", "<= 100 MiB"),
        Row("in flight: CPU, part of one core", f"{share:.1%}", ""),
        Row("in flight: p99 wait of another client", f"{_percentile(waits, 99) * 1e3:.0f} ms", ""),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each sustained part (default: 10)")
    parser.add_argument("--serve-bare", type=int, metavar="PORT", help="be the bare handler; for this benchmark itself")
    options = parser.parse_args()
    if options.serve_bare:
        asyncio.run(serve_bare(options.serve_bare))
        return
    seconds = options.seconds
    rows: list[Row] = []
    with started() as daemon:
        # First, while the process is young: memory is that of what is in flight.
        rows += asyncio.run(in_flight(daemon))
    with started() as daemon:
        rows += asyncio.run(sustained(daemon, seconds))
        rows += asyncio.run(burst(daemon))
        time.sleep(3)
        rows += pairs_of_singles(daemon, seconds)
        rows += wrk(daemon, min(seconds, 5.0))
    print("| what | measured | goal |\n|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.measured} | {row.goal} |")


if __name__ == "__main__":
    main()
