"""What `jouletrace proxy` adds: time to first token at 200 streams, CPU a chunk; and what a kill does.

Run it from the repository: `python -m tests.benchmarks.proxy`. Server, proxy and daemon are processes of their own; the
clients are this one. Rounds straight to the server and rounds through the proxy take turns, so that whatever else the
machine does falls on both. A minute and a half.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from aiohttp import web

from jouletrace.daemon import demo_recording
from tests.daemon_process import DaemonProcess
from tests.proxy_process import ProxyProcess

STREAMS = 200
TOKENS = 50
TOKENS_PER_SECOND = 25
"""Of one stream; what a server of a large model gives at this concurrency."""
PREFILL_SECONDS = 0.1
ROUND_SECONDS = 6.0
ROUNDS = 4
"""Of each kind."""
PATH = "/v1/chat/completions"
QUESTION = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "x" * 2000}]}


def _event(choices: list[object], **more: object) -> bytes:
    document = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1795375993}
    return b"data: " + json.dumps(document | {"model": "tiny", "choices": choices} | more).encode() + b"\n\n"


TOKEN = _event([{"index": 0, "delta": {"content": " joules"}, "logprobs": None, "finish_reason": None}])
FINISH = _event([{"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "length"}])
USAGE = _event([], usage={"prompt_tokens": 500, "completion_tokens": TOKENS, "total_tokens": 500 + TOKENS})
DONE = b"data: [DONE]\n\n"


# --- the server ---


async def _answer(request: web.Request) -> web.StreamResponse:
    await request.read()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await asyncio.sleep(PREFILL_SECONDS)
    await response.prepare(request)
    due = time.monotonic()
    for _ in range(TOKENS):
        # Each is a write of its own, as a server makes one when a token is there.
        await response.write(TOKEN)
        due += 1 / TOKENS_PER_SECOND
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    await response.write(FINISH + USAGE + DONE)
    return response


async def _serve() -> None:
    app = web.Application()
    app.router.add_post(PATH, _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def _server() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.proxy", "--serve"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait(10)


# --- the clients ---


@dataclass
class Round:
    """What the clients of one or more rounds saw."""

    first_token_seconds: list[float] = field(default_factory=list)
    chunks: int = 0
    failures: int = 0
    energies: int = 0

    def percentile(self, ratio: float) -> float:
        """Return a percentile of the time to first token, ms."""
        ordered = sorted(self.first_token_seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(ratio * len(ordered)))]


async def _stream(session: aiohttp.ClientSession, url: str, seen: Round) -> None:
    began = time.monotonic()
    first = None
    last = b""
    try:
        async with session.post(url + PATH, json=QUESTION) as response:
            async for chunk in response.content.iter_any():
                if first is None:
                    first = time.monotonic() - began
                    seen.first_token_seconds.append(first)
                seen.chunks += chunk.count(b"data: {")
                seen.energies += chunk.count(b": energy {")
                last = (last + chunk)[-len(DONE) :]
    except aiohttp.ClientError:
        pass
    seen.failures += last != DONE


async def _round(url: str, seen: Round, seconds: float = ROUND_SECONDS) -> None:
    ends = time.monotonic() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one_after_another() -> None:
            await asyncio.sleep(random.uniform(0, TOKENS / TOKENS_PER_SECOND))
            while time.monotonic() < ends:
                await _stream(session, url, seen)

        await asyncio.gather(*(one_after_another() for _ in range(STREAMS)))


# --- the table ---


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    goal: str = ""


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _measure(folder: Path) -> Iterator[Row]:
    inbox = str(folder / "ingest.dgram")
    arguments = ("--source", f"replay:{demo_recording()}", "--ingest.datagram-socket", inbox)
    with _server() as server, DaemonProcess(folder, *arguments) as daemon:
        daemon.until("readiness", daemon.ready)
        options = ["--upstream", server, "--engine-id", "bench", "--engine-kind", "vllm"]
        options += ["--jouletrace", inbox, "--jouletrace-api", daemon.url]
        with ProxyProcess(folder, *options) as proxy:
            yield from _compare(server, proxy, daemon)


def _compare(server: str, proxy: ProxyProcess, daemon: DaemonProcess) -> Iterator[Row]:
    process = psutil.Process(proxy.process.pid)
    asyncio.run(_round(proxy.url, Round(), 2.0))
    straight, through = Round(), Round()
    differences = []
    cpu = 0.0
    for _ in range(ROUNDS):
        pair = Round(), Round()
        asyncio.run(_round(server, pair[0]))
        before = _cpu_seconds(process)
        asyncio.run(_round(proxy.url, pair[1]))
        cpu += _cpu_seconds(process) - before
        differences.append(pair[1].percentile(0.5) - pair[0].percentile(0.5))
        for total, one in zip((straight, through), pair, strict=True):
            total.first_token_seconds += one.first_token_seconds
            total.chunks += one.chunks
            total.failures += one.failures
            total.energies += one.energies
    added = statistics.median(differences)
    each = ", ".join(f"{one:.2f}" for one in differences)
    name = f"time to first token, {STREAMS} streams"
    yield Row(f"{name}: p50 straight", f"{straight.percentile(0.5):.2f} ms (the server's own part is 100 ms)")
    yield Row(f"{name}: p50 through the proxy", f"{through.percentile(0.5):.2f} ms")
    yield Row(f"{name}: added p50, median of {ROUNDS} pairs", f"{added:.2f} ms ({each})", "2 ms")
    yield Row(
        f"{name}: p99 straight, through", f"{straight.percentile(0.99):.1f} ms, {through.percentile(0.99):.1f} ms"
    )
    requests = len(through.first_token_seconds)
    per_chunk = cpu / through.chunks
    yield Row(
        "proxy's CPU a chunk, requests' own share included",
        f"{per_chunk * 1e6:.0f} us: {1 / per_chunk:,.0f} chunks/s per core ({requests} requests of {TOKENS} tokens)",
    )
    yield Row("requests that failed: straight, through", f"{straight.failures}, {through.failures}", "0, 0")
    yield Row("answers with their energy", f"{through.energies} of {requests}")
    daemon.process.kill()
    alone = Round()
    asyncio.run(_round(proxy.url, alone))
    lines = sum("does not tell energies" in event["event"] for event in proxy.events())
    yield Row(
        "after the daemon was killed: failed, p50, lines in the log",
        f"{alone.failures} of {len(alone.first_token_seconds)}, {alone.percentile(0.5):.2f} ms, {lines}",
        "0, unchanged, 1",
    )
    yield Row("proxy's memory at the end", f"{process.memory_info().rss / 2**20:.0f} MiB")
    proxy.process.send_signal(signal.SIGTERM)
    proxy.process.wait(20)
    [line] = [event for event in proxy.events() if "was told to stop" in event["event"]]
    yield Row("proxy's line when stopped", json.dumps(line))


def _print(rows: Sequence[Row]) -> None:
    print("| | measured | goal |\n|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.measured} | {row.goal} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().serve:
        asyncio.run(_serve())
        return
    with tempfile.TemporaryDirectory() as folder:
        _print(list(_measure(Path(folder))))


if __name__ == "__main__":
    main()
