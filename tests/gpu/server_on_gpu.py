"""Joules of a served model on a real GPU: a batched HTTP server, scraped, and with the proxy before it.

`python -m tests.gpu.server_on_gpu OUTDIR SECONDS` on one GPU. Half of SECONDS clients ask the server itself, so that
the daemon knows its metrics page alone; then they ask `jouletrace proxy`. Leaves in OUTDIR the recording, what the
engine did (`truth.json.gz`), what clients and daemon said (`answers.json`), and `result.json` (by
`tests.gpu.evaluate_server`). Takes about 60 s longer than SECONDS. Ends at the first failure, which it prints and which
`result.json` then holds.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pynvml

from tests.gpu import evaluate_server
from tests.gpu.engine import OUTPUTS, PROMPTS, TENANTS
from tests.gpu.engine_server import MODEL

ENGINE_ID = "torch-server"
RATES = (4.0, 8.0, 6.0)
LOAD_SECONDS, PAUSE_SECONDS = 14.0, 3.0
LONGEST_ANSWER_SECONDS = 4.0
"""About what the last requests of a burst take."""
LOADING_SECONDS = 60.0
SETTLE_SECONDS = 17.0
"""The account of an engine that tells of no requests lies 16 s behind."""
SETTLE_LIMIT_SECONDS = 25.0
LOOK_SECONDS = 0.5
SPARE_SECONDS = 75.0
"""On top of SECONDS: a longer run hangs."""
REASON_SECONDS = 3.0
"""Within which a process that failed has ended."""
COUNTER_SECONDS = 0.2
TENANT_HEADER = "X-Tenant"
SERVER = (sys.executable, "-m", "tests.gpu.engine_server")
JOULETRACE = (sys.executable, "-m", "jouletrace")


class RunError(Exception):
    """The run cannot go on; the message says why."""


class Counter(threading.Thread):
    """Reads the hardware energy counter of a GPU now and then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.uuid = str(pynvml.nvmlDeviceGetUUID(self._handle))
        self.rows: list[tuple[int, int]] = []
        """Epoch nanoseconds and millijoules."""

    def run(self) -> None:
        """Read until the process ends."""
        while True:
            before_ns = time.time_ns()
            energy_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self.rows.append(((before_ns + time.time_ns()) // 2, energy_mj))
            time.sleep(COUNTER_SECONDS)


@dataclass
class Asked:
    """A request as its client saw it."""

    request_id: str
    phase: str
    tenant: str
    prompt: int
    output: int
    stream: bool
    asks_usage: bool
    sent_ns: int = 0
    first_ns: int = 0
    end_ns: int = 0
    usage: dict[str, int] | None = None
    energy: dict[str, Any] | None = None
    """The `energy` object, or that of the comment in a stream."""
    header_joules: float | None = None
    problem: str = ""

    def body(self) -> dict[str, Any]:
        """Return what is posted."""
        body: dict[str, Any] = {"model": MODEL, "prompt": "joule " * self.prompt, "max_tokens": self.output}
        if self.stream:
            body["stream"] = True
        if self.asks_usage:
            body["stream_options"] = {"include_usage": True}
        return body


class Clients:
    """Poisson arrivals of many clients."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.asked: list[Asked] = []
        self._session = session
        self._random = random.Random(7)

    async def load(self, url: str, phase: str, seconds: float) -> None:
        """Ask in bursts with pauses for about `seconds`; raises RunError at the first answer that is not whole."""
        begin, burst = time.monotonic(), 0
        while (left := seconds - PAUSE_SECONDS - LONGEST_ANSWER_SECONDS - (time.monotonic() - begin)) > 1.0:
            # Equal bursts, so that the last is no stump.
            bursts = max(round(left / (LOAD_SECONDS + LONGEST_ANSWER_SECONDS + PAUSE_SECONDS)), 1)
            each = left if bursts == 1 else LOAD_SECONDS
            await self._burst(url, phase, RATES[burst % len(RATES)], each)
            burst += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def _burst(self, url: str, phase: str, rate: float, seconds: float) -> None:
        ends = time.monotonic() + seconds
        async with asyncio.TaskGroup() as answers:
            while time.monotonic() < ends:
                chance = self._random
                asked = Asked(
                    f"{phase}-{len(self.asked)}",
                    phase,
                    chance.choice(TENANTS),
                    chance.choice(PROMPTS),
                    chance.choice(OUTPUTS),
                    stream=chance.random() < 0.7,
                    asks_usage=False,
                )
                asked.asks_usage = asked.stream and chance.random() < 0.5
                self.asked.append(asked)
                answers.create_task(self._ask(url, asked))
                await asyncio.sleep(chance.expovariate(rate))

    async def _ask(self, url: str, asked: Asked) -> None:
        headers = {"X-Request-Id": asked.request_id, TENANT_HEADER: asked.tenant}
        asked.sent_ns = time.time_ns()
        try:
            async with self._session.post(f"{url}/v1/completions", json=asked.body(), headers=headers) as answer:
                if answer.status != 200:
                    raise RunError(f"status {answer.status}: {(await answer.text())[:300]}")
                if answer.headers.get("X-Request-Id") != asked.request_id:
                    raise RunError(f"X-Request-Id came back as {answer.headers.get('X-Request-Id')}")
                if asked.stream:
                    await self._read_stream(answer, asked)
                else:
                    document = await answer.json()
                    asked.usage, asked.energy = document["usage"], document.get("energy")
                    joules = answer.headers.get("X-Energy-Joules")
                    asked.header_joules = None if joules is None else float(joules)
        except (aiohttp.ClientError, OSError, ValueError, KeyError, RunError) as failure:
            asked.problem = f"{type(failure).__name__}: {failure}"
            raise RunError(f"request {asked.request_id} to {url}: {asked.problem}") from failure
        asked.end_ns = time.time_ns()

    async def _read_stream(self, answer: aiohttp.ClientResponse, asked: Asked) -> None:
        is_done = False
        async for raw in answer.content:
            line = raw.decode().strip()
            if line.startswith(": energy "):
                asked.energy = json.loads(line.removeprefix(": energy "))
            elif line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                asked.first_ns = asked.first_ns or time.time_ns()
                asked.usage = json.loads(line.removeprefix("data: ")).get("usage") or asked.usage
        if not is_done:
            raise RunError("the stream ended before its end")
        if (asked.usage is not None) != asked.asks_usage:
            raise RunError(f"usage in the stream: {asked.usage}, asked for it: {asked.asks_usage}")


class Parts:
    """The processes of the run. Their output goes to files; the first that ends unasked ends the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.exit_codes: dict[str, int | None] = {}

    async def start(self, name: str, *command: str) -> None:
        """Start a process."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        self._running[name] = process
        self._watches.add(asyncio.create_task(self._watch(name, process)))

    async def _watch(self, name: str, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self.exit_codes[name] = code
        if name in self._running and not self.failed.done():
            self.failed.set_exception(RunError(f"{name} ended with exit code {code}; its log ends:\n{self.tail(name)}"))

    def tail(self, name: str) -> str:
        """Return the end of a process's log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-2500:]

    def logs(self) -> str:
        """Return all logs."""
        found = sorted(self._folder.glob("*.log"))
        return "\n".join(f"---- {path.stem}\n{path.read_text(errors='replace')}" for path in found)

    async def stop(self, name: str, number: signal.Signals = signal.SIGTERM, seconds: float = 30.0) -> None:
        """Stop a process; one that does not end is killed, which is a failure."""
        process = self._running.pop(name)
        if process.returncode is None:
            process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            process.kill()
            raise RunError(
                f"{name} did not end within {seconds:.0f} s of {number.name}; its log ends:\n{self.tail(name)}"
            ) from None

    async def stop_all(self) -> None:
        """Stop what still runs, to leave what it knows."""
        for name in list(self._running):
            with contextlib.suppress(RunError):
                await self.stop(name, signal.SIGINT if name == "recorder" else signal.SIGTERM, 10.0)


class Run:
    """One run and what it found so far."""

    def __init__(self, folder: Path, scratch: Path, seconds: float, session: aiohttp.ClientSession) -> None:
        self._folder, self._scratch, self._seconds, self._session = folder, scratch, seconds, session
        self._begin = time.monotonic()
        self.parts = Parts(scratch)
        self._counter = Counter()
        self._clients = Clients(session)
        self._ports = dict(zip(("server", "daemon", "proxy"), _free_ports(3), strict=True))
        self._looks: list[dict[str, Any]] = []
        self._phases: dict[str, dict[str, Any]] = {}
        self._finals: dict[str, dict[str, Any]] = {}
        self._seconds_at: dict[str, float] = {}

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    def _note(self, what: str) -> None:
        self._seconds_at[what] = round(time.monotonic() - self._begin, 1)
        print(f"{self._seconds_at[what]:6.1f} s  {what}", flush=True)

    async def go(self) -> None:
        """Do all of it."""
        self._counter.start()
        recording = str(self._folder / "serve.json.gz")
        await self.parts.start("recorder", *JOULETRACE, "record", "--devices=0", "-o", recording)
        server = ("--port", str(self._ports["server"]), "--truth", str(self._folder / "truth.json.gz"))
        await self.parts.start("server", *SERVER, *server, "--model", MODEL)
        await self._until_answered("server", "/v1/models", LOADING_SECONDS)
        self._note("the server answers")
        await self._start_daemon()
        proxy = ("--upstream", self._url("server"), "--listen", f"127.0.0.1:{self._ports['proxy']}")
        told = ("--jouletrace", self._url("daemon"), "--engine-id", ENGINE_ID, "--tenant-header", TENANT_HEADER)
        await self.parts.start("proxy", *JOULETRACE, "proxy", *proxy, *told)
        await self._until_answered("proxy", "/v1/models", 15)
        # The scraper's first page only says where the counters stand.
        await self._until_log("daemon", "scraping an engine", 15)
        self._note("daemon and proxy answer")
        watching = asyncio.create_task(self._watch_account())
        rested_ns = time.time_ns()
        await asyncio.sleep(PAUSE_SECONDS)
        # All of it must be settled before the first request is told: from then on energy waits for requests.
        rested_ns = await self._phase("scrape", "server", rested_ns, self._seconds / 2 - SETTLE_SECONDS)
        await self._phase("proxy", "proxy", rested_ns, self._seconds / 2)
        await self._ask_finals()
        watching.cancel()
        for name in ("proxy", "daemon", "server"):
            await self.parts.stop(name)
        await self.parts.stop("recorder", signal.SIGINT)
        self._note("all has ended")

    async def _start_daemon(self) -> None:
        target = {"url": self._url("server"), "kind": "vllm", "engine_id": ENGINE_ID, "gpu_uuids": [self._counter.uuid]}
        config = self._scratch / "jouletrace.yaml"
        # JSON is YAML.
        config.write_text(json.dumps({"engines": {"discover": False, "targets": [target]}}))
        options = ("--config.file", str(config), "--devices=0", "--log.format=json")
        places = (f"--web.listen-address=127.0.0.1:{self._ports['daemon']}", f"--state-dir={self._scratch / 'state'}")
        await self.parts.start("daemon", *JOULETRACE, "run", *options, *places)
        await self._until_answered("daemon", "/-/ready", 20)

    async def _phase(self, phase: str, through: str, rested_ns: int, seconds: float) -> int:
        """Load the server, at rest since a time, through one path, and let all be settled; return when it rested."""
        begin_ns, before = time.time_ns(), await self._get("server", "/metrics")
        await self._clients.load(self._url(through), phase, seconds)
        end_ns, after = time.time_ns(), await self._get("server", "/metrics")
        settled = await self._settled(rested_ns, begin_ns), await self._settled(end_ns, None)
        self._phases[phase] = {
            "before": {"ledger": settled[0], "server_metrics": before},
            "after": {"ledger": settled[1], "server_metrics": after},
        }
        asked = sum(one.phase == phase for one in self._clients.asked)
        self._note(f"{phase}: {asked} requests")
        if not asked:
            raise RunError(f"there was no time for a request in phase {phase}; give more SECONDS")
        return end_ns

    async def _watch_account(self) -> None:
        while True:
            ledger = json.loads(await self._get("daemon", "/v1/ledger"))
            if not self._looks or ledger["settled_ns"] != self._looks[-1]["settled_ns"]:
                self._looks.append(ledger)
            await asyncio.sleep(LOOK_SECONDS)

    async def _settled(self, from_ns: int, until_ns: int | None) -> dict[str, Any]:
        """Return the account as it is settled up to a moment of a rest, with the least pending; waits for one."""
        deadline = time.monotonic() + SETTLE_LIMIT_SECONDS
        while True:
            found = [
                look
                for look in self._looks
                if from_ns < (look["settled_ns"] or 0) and (until_ns is None or look["settled_ns"] <= until_ns)
            ]
            best = min(found, key=lambda look: abs(look["totals"]["pending_joules"]), default=None)
            if best is not None and (until_ns is not None or abs(best["totals"]["pending_joules"]) < 1.0):
                return best
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(LOOK_SECONDS)
        if best is None:
            last = json.dumps(self._looks[-1:])[:1500]
            raise RunError(f"no account of between {from_ns} and {until_ns} came in {SETTLE_LIMIT_SECONDS} s: {last}")
        return best

    async def _ask_finals(self) -> None:
        proxied = [one.request_id for one in self._clients.asked if one.phase == "proxy"]
        deadline = time.monotonic() + SETTLE_LIMIT_SECONDS
        for request_id in proxied:
            while True:
                final = json.loads(await self._get("daemon", f"/v1/requests/{request_id}?engine_id={ENGINE_ID}"))
                if final.get("final") or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.2)
            self._finals[request_id] = final
        (self._folder / "metrics.txt").write_text(await self._get("daemon", "/metrics"))
        self._note(f"{sum(bool(one.get('final')) for one in self._finals.values())} final figures")

    async def _get(self, name: str, path: str) -> str:
        """Return a page, also that of an error."""
        async with self._session.get(self._url(name) + path, timeout=aiohttp.ClientTimeout(total=10)) as answer:
            return await answer.text()

    async def _until_answered(self, name: str, path: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.get(self._url(name) + path) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
        raise RunError(f"{name} does not answer {path} within {seconds:.0f} s; its log ends:\n{self.parts.tail(name)}")

    async def _until_log(self, name: str, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.parts.tail(name):
            if time.monotonic() > deadline:
                raise RunError(f"{name} does not log {text!r}; its log ends:\n{self.parts.tail(name)}")
            await asyncio.sleep(0.1)

    def write(self) -> None:
        """Write down what was found."""
        found = {
            "engine_id": ENGINE_ID,
            "model": MODEL,
            "gpu": {"uuid": self._counter.uuid, "name": str(pynvml.nvmlDeviceGetName(self._counter._handle))},
            "counter": self._counter.rows,
            "phases": self._phases,
            "requests": [asdict(one) for one in self._clients.asked],
            "finals": self._finals,
            "seconds_at": self._seconds_at,
            "exit_codes": self.parts.exit_codes,
        }
        (self._folder / "answers.json").write_text(json.dumps(found))
        (self._folder / "logs.txt").write_text(self.parts.logs())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@contextlib.asynccontextmanager
async def _prepared(folder: Path, seconds: float) -> AsyncIterator[Run]:
    with tempfile.TemporaryDirectory() as scratch:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
        ) as session:
            run = Run(folder, Path(scratch), seconds, session)
            try:
                yield run
            finally:
                await run.parts.stop_all()
                run.write()


async def _run(folder: Path, seconds: float) -> None:
    async with _prepared(folder, seconds) as run:
        work = asyncio.create_task(run.go())
        done, _ = await asyncio.wait(
            {work, run.parts.failed}, timeout=seconds + SPARE_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            work.cancel()
            raise RunError(f"the run takes more than {seconds + SPARE_SECONDS:.0f} s")
        # What ended by itself is the reason of whatever else went wrong.
        if work in done and work.exception() is not None:
            await asyncio.wait({run.parts.failed}, timeout=REASON_SECONDS)
        if run.parts.failed.done():
            work.cancel()
            await run.parts.failed
        await work


def _reason(failure: BaseException) -> str:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return str(failure) if isinstance(failure, RunError) else "".join(traceback.format_exception(failure))


def main() -> int:
    """Run, compare, print; return the exit code."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    begin, problem, result = time.monotonic(), "", {}
    try:
        asyncio.run(_run(folder, seconds))
    except Exception as failure:
        # Whatever it is, what was found must not be lost.
        problem = _reason(failure)
    try:
        result = evaluate_server.evaluate(folder)
    except Exception as failure:
        problem = problem or _reason(failure)
    result = {"problem": problem, "run_seconds": round(time.monotonic() - begin, 1), **result}
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1), flush=True)
    print(f"FAILED: {problem}" if problem else "done", flush=True)
    return 1 if problem else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # The counter's thread may be inside of the driver.
