"""The scraper against real HTTP servers: captured pages in sequence, llama.cpp in all its moods, and the real one."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.busy_recording import busy_recording
from tests.certificates import Authority, write_anew
from tests.daemon_process import DaemonProcess

from jouletrace.engines.scraping import EngineScraper, Target
from jouletrace.requests.records import EngineRecord, LoadRecord, Record

PAGES = Path(__file__).parents[1] / "data" / "engines"
VLLM = (PAGES / "vllm-0.32.0.prom").read_text()
LLAMA = (PAGES / "llamacpp-b11549.prom").read_text()


class Sent:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.room = True
        self.losses: list[str] = []

    def offer(self, records: Sequence[Record]) -> bool:
        if self.room:
            self.records += records
        return self.room

    def lost(self, reason: str, count: int = 1) -> None:
        self.losses.append(reason)

    @property
    def engines(self) -> list[EngineRecord]:
        return [one for one in self.records if isinstance(one, EngineRecord)]

    @property
    def loads(self) -> list[LoadRecord]:
        return [one for one in self.records if isinstance(one, LoadRecord)]

    def output(self) -> int:
        return sum(part.usage.output for load in self.loads for part in load.models)


class Engine:
    """A real server that answers each path with what a function says; counts what is asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[], str | dict[str, Any] | None]] = {}
        self.asked: list[str] = []
        self.key = ""
        """Without it in Authorization it answers 401, where there is one."""
        self.refused: list[str] = []
        self.tls: ssl.SSLContext | None = None
        self.delay = 0.0
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path_qs)
        await asyncio.sleep(self.delay)
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            self.refused.append(request.headers.get("Authorization", ""))
            return web.Response(status=401)
        answer = self.answers.get(request.path, lambda: None)()
        if answer is None:
            return web.Response(status=404)
        if isinstance(answer, dict):
            return web.json_response(answer)
        if answer.startswith(("http", "/")):
            raise web.HTTPTemporaryRedirect(answer)
        return web.Response(text=answer)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    one = Engine()
    await one.start()
    yield one
    await one.stop()


@asynccontextmanager
async def scraping(scraper: EngineScraper) -> AsyncIterator[None]:
    task = asyncio.create_task(scraper.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        await asyncio.sleep(0.01)


def scraper_of(
    sent: Sent,
    *targets: Target,
    known: Sequence[EngineRecord] = (),
    discover: Callable[[], Sequence[Target]] | None = None,
) -> EngineScraper:
    return EngineScraper(sent, targets, discover=discover, known=lambda: known, interval_seconds=0.05)


def counting(start: int = 425, step: int = 10) -> Callable[[], str]:
    """vLLM's page with ten more tokens each time."""
    seen = iter(range(start, 10**9, step))
    return lambda: re.sub(r"(?m)^(vllm:generation_tokens_total\{.*\}) .*$", rf"\g<1> {next(seen)}", VLLM)


async def test_a_redirect_is_followed_within_the_engine_alone(engine: Engine) -> None:
    """Else a tenant's engine could have this process, which may run as root, ask others in its name."""
    other = Engine()
    await other.start()
    other.answers["/metrics"] = engine.answers["/metrics/"] = counting()
    engine.answers["/metrics"] = lambda: other.url + "/metrics"
    sent = Sent()
    target = Target(url=engine.url, engine_id="v", kind="vllm", path="/metrics")
    async with scraping(scraper_of(sent, target)):
        await until(lambda: len(engine.asked) >= 3)
        engine.answers["/metrics"] = lambda: "/metrics/"
        await until(lambda: sent.loads)
    await other.stop()
    assert other.asked == []


def test_an_engine_behind_a_key_and_a_private_authority(tmp_path: Path) -> None:
    """vLLM's page behind TLS and a proxy's key, in the whole daemon: rotated, broken and rotated again."""
    authority = Authority(tmp_path)
    cert, key_file = authority.issue("engine", "engine.example")
    key, config = tmp_path / "key", tmp_path / "config.yml"
    key.write_text("hunter2\n")

    async def drive() -> None:
        engine = Engine()
        engine.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        engine.tls.load_cert_chain(cert, key_file)
        engine.key = "hunter2"
        engine.answers["/metrics"] = counting()
        await engine.start()
        config.write_text(
            f"engines:\n  discover: false\n  targets:\n    - url: {engine.url}\n      kind: vllm\n"
            f"      authorization: {{credentials_file: {key}}}\n"
            f"      tls_config: {{ca_file: {authority.file}, server_name: engine.example}}\n"
        )
        with DaemonProcess(
            tmp_path, "--source", f"replay:{busy_recording(tmp_path)}", "--config.file", str(config)
        ) as d:
            try:
                await asyncio.to_thread(d.until, "scraping", lambda: "scraping an engine" in d.text())
                assert engine.refused == []
                engine.key = "hunter3"
                await asyncio.to_thread(d.until, "refusals", lambda: "it wants a key for this page" in d.text(), 15)
                write_anew(key, b"two words")
                await asyncio.to_thread(d.until, "the complaint", lambda: "does not hold a token" in d.text())
                reloads = lambda: d.metric("jouletrace_file_reload_success", key="engines.targets")  # noqa: E731
                assert await asyncio.to_thread(reloads) == {"": 0.0}
                write_anew(key, b"hunter3")
                await asyncio.to_thread(d.until, "recovery", lambda: "engines.targets was reloaded" in d.text())
                again = "an engine's metrics can be read again"
                await asyncio.to_thread(d.until, "the new key", lambda: again in d.text(), 35)
                assert await asyncio.to_thread(reloads) == {"": 1.0}
            finally:
                await engine.stop()
            assert set(engine.refused) == {"Bearer hunter2"}
            assert "hunter" not in d.text()
            d.assert_calm()

    asyncio.run(drive())


async def test_an_engine_announces_itself_and_its_tokens_add_up(engine: Engine) -> None:
    engine.answers["/metrics"] = counting()
    sent = Sent()
    target = Target(url=engine.url, engine_id="v", kind="vllm", pid=4242, gpu_uuids=("GPU-1",), max_num_seqs=64)
    async with scraping(scraper_of(sent, target)):
        await until(lambda: len(sent.loads) >= 5)
    assert sent.engines == [
        EngineRecord(engine_id="v", kind="vllm", models=("tiny",), pid=4242, gpu_uuids=("GPU-1",), max_num_seqs=64)
    ]
    assert sent.output() == 10 * len(sent.loads)
    for before, after in zip(sent.loads, sent.loads[1:], strict=False):
        assert before.end_ns == after.start_ns
    assert set(engine.asked) == {"/metrics"}


async def test_an_engine_that_goes_and_comes_back_is_told_once_each(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.answers["/metrics"] = counting()
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="v", kind="vllm"))):
        await until(lambda: len(sent.loads) >= 2)
        await engine.stop()
        await asyncio.sleep(0.6)
        engine.answers["/metrics"] = counting(start=3)
        told = len(sent.loads)
        await engine.start()
        await until(lambda: len(sent.loads) >= told + 2)
    log = capsys.readouterr().out
    assert log.count("cannot be read") == 1
    assert log.count("can be read again") == 1
    # It counts from nothing again: 3 tokens, then ten each.
    assert [part.usage.output for load in sent.loads[told:][:2] for part in load.models] == [3, 10]


async def test_a_slow_engine_is_not_waited_for(engine: Engine) -> None:
    engine.answers["/metrics"] = counting()
    fast = Engine()
    await fast.start()
    fast.answers["/metrics"] = counting()
    engine.delay = 5.0
    sent = Sent()
    targets = [
        Target(url=engine.url, engine_id="slow", kind="vllm"),
        Target(url=fast.url, engine_id="fast", kind="vllm"),
    ]
    async with scraping(scraper_of(sent, *targets)):
        await until(lambda: len(sent.loads) >= 3, seconds=5.0)
    await fast.stop()
    assert {load.engine_id for load in sent.loads} == {"fast"}


async def test_a_full_inbox_loses_no_tokens(engine: Engine) -> None:
    engine.answers["/metrics"] = counting()
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="v", kind="vllm"))):
        await until(lambda: len(sent.loads) >= 2)
        sent.room = False
        asked = len(engine.asked)
        await until(lambda: len(engine.asked) >= asked + 5)
        sent.room = True
        told = len(sent.loads)
        await until(lambda: len(sent.loads) > told)
    assert sent.losses == ["queue_full"]
    assert sent.loads[told].start_ns == sent.loads[told - 1].end_ns
    assert sent.loads[told].models[0].usage.output >= 50


@pytest.mark.parametrize("path", ["/prometheus/metrics", "/v1/metrics"])
async def test_the_page_is_looked_for_where_it_may_be(engine: Engine, path: str) -> None:
    page = {"/prometheus/metrics": "trtllm-1.2.made", "/v1/metrics": "nim-1.x.made"}[path]
    engine.answers["/metrics"] = lambda: "[]"
    engine.answers[path] = (PAGES / f"{page}.prom").read_text
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="e"))):
        await until(lambda: sent.loads)
    assert sent.engines[0].kind == page.split("-")[0]
    assert engine.asked.count("/metrics") == 1


async def test_tgi_is_asked_for_its_model_and_never_for_its_health(engine: Engine) -> None:
    engine.answers["/metrics"] = (PAGES / "tgi-3.3.made.prom").read_text
    engine.answers["/info"] = lambda: {"model_id": "org/model", "max_concurrent_requests": 128}
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="t", kind="tgi"))):
        await until(lambda: len(sent.loads) >= 3)
    assert sent.engines[0].models == ("org/model",)
    assert engine.asked.count("/info") == 1
    assert not any("health" in path for path in engine.asked)


def llama_models(**statuses: str) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "owned_by": "llamacpp"}
            | ({"status": {"value": status, "args": ["llama-server"]}} if status else {})
            for name, status in statuses.items()
        ],
    }


async def test_a_sleeping_llama_is_left_asleep(engine: Engine) -> None:
    state = {"is_sleeping": True}
    engine.answers["/v1/models"] = lambda: llama_models(tiny="")
    engine.answers["/props"] = lambda: state
    engine.answers["/metrics"] = lambda: LLAMA
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="l"))):
        await until(lambda: len(engine.asked) >= 10)
        assert not any(path.startswith("/metrics") for path in engine.asked)
        state["is_sleeping"] = False
        await until(lambda: sent.loads)
    assert sent.engines[0].models == ("tiny",)


async def test_only_loaded_models_of_a_router_are_scraped(engine: Engine) -> None:
    engine.answers["/v1/models"] = lambda: llama_models(**{"a&b": "loaded", "c": "unloaded", "d": "sleeping"})
    engine.answers["/metrics"] = lambda: LLAMA
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="r"))):
        await until(lambda: len(sent.loads) >= 2)
    assert {path for path in engine.asked if "metrics" in path} == {"/metrics?model=a%26b&autoload=false"}
    assert [(one.engine_id, one.models) for one in sent.engines] == [("r:a&b", ("a&b",))]


async def test_one_that_falls_asleep_by_itself_is_never_scraped(engine: Engine) -> None:
    engine.answers["/metrics"] = lambda: LLAMA
    sent = Sent()
    target = Target(url=engine.url, engine_id="l", kind="llamacpp", falls_asleep=True)
    async with scraping(scraper_of(sent, target)):
        await asyncio.sleep(0.4)
    assert engine.asked == []


async def test_an_engine_that_a_feed_has_announced_keeps_its_id(engine: Engine) -> None:
    """The plugin of vLLM names its engine itself; one id for both, and the scraped one is taken back."""
    engine.answers["/metrics"] = counting()
    sent, known = Sent(), list[EngineRecord]()
    target = Target(url=engine.url, engine_id="vllm-8000", kind="vllm", pid=77, pids=frozenset({77, 78}))
    scraper = EngineScraper(sent, [target], discover=None, known=lambda: known, interval_seconds=0.05)
    async with scraping(scraper):
        await until(lambda: sent.loads)
        known += [sent.engines[0], EngineRecord(engine_id="vllm-host-1", kind="vllm", pid=77)]
        await until(lambda: sent.loads[-1].engine_id == "vllm-host-1")
        told = len(sent.records)
        await until(lambda: len(sent.records) >= told + 3)
        # Two ranks that tell of themselves: nobody knows whose a page's totals are.
        known.append(EngineRecord(engine_id="vllm-host-1-dp1", kind="vllm", pid=78))
        await asyncio.sleep(0.2)
        told = len(sent.records)
        await asyncio.sleep(0.2)
        assert len(sent.records) == told
    assert [(one.engine_id, one.ended) for one in sent.engines] == [("vllm-8000", False), ("vllm-8000", True)]
    assert sent.output() == 10 * len(sent.loads)


async def test_another_process_on_the_port_begins_anew_and_one_that_is_gone_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At each round: a page of the second process must not be taken for one of the first.
    monkeypatch.setattr("jouletrace.engines.scraping.DISCOVER_SECONDS", 0.0)
    engine.answers["/metrics"] = counting()
    found = [Target(url=engine.url, engine_id="vllm-1", kind="vllm", pid=1)]
    sent = Sent()
    async with scraping(scraper_of(sent, discover=lambda: list(found))):
        await until(lambda: len(sent.loads) >= 2)
        engine.answers["/metrics"] = counting(start=9000)
        found[:] = [Target(url=engine.url, engine_id="vllm-1", kind="vllm", pid=2)]
        told = len(sent.loads)
        await until(lambda: len(sent.loads) >= told + 3)
        found.clear()
        await until(lambda: sent.engines[-1].ended)
    assert [(one.pid, one.ended) for one in sent.engines] == [(1, False), (2, False), (None, True)]
    assert max(part.usage.output for load in sent.loads for part in load.models) <= 10


async def test_a_configured_engine_that_is_also_found_is_one_engine(engine: Engine) -> None:
    engine.answers["/metrics"] = counting()
    found = Target(url=engine.url, engine_id="vllm-1", kind="vllm", pid=11, gpu_uuids=("GPU-1",), max_num_seqs=8)
    configured = Target(url=engine.url.replace("127.0.0.1", "localhost"), engine_id="chat")
    sent = Sent()
    async with scraping(scraper_of(sent, configured, discover=lambda: [found])):
        await until(lambda: len(sent.loads) >= 3)
    assert sent.engines == [
        EngineRecord(engine_id="chat", kind="vllm", models=("tiny",), pid=11, gpu_uuids=("GPU-1",), max_num_seqs=8)
    ]
    assert {load.engine_id for load in sent.loads} == {"chat"}


@pytest.mark.parametrize("garbage", ["", "\x00\xff{{{", "vllm:" + "x" * 100_000, "[1,2]", "x" * (6 << 20)])
async def test_garbage_is_one_warning(engine: Engine, garbage: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine.answers["/metrics"] = lambda: garbage
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="e", path="/metrics"))):
        await until(lambda: len([path for path in engine.asked if path == "/metrics"]) >= 3)
    assert all(not load.models for load in sent.loads)
    assert capsys.readouterr().out.count("cannot be read") <= 1


@pytest.mark.parametrize(
    "garbage", ["[" * 100_000, "\x00", '{"data": 5}', '{"data": [{"id": "x\\u0000", "status": {"value": "loaded"}}]}']
)
async def test_garbage_where_llamacpp_is_asked_is_no_llamacpp(engine: Engine, garbage: str) -> None:
    engine.answers["/v1/models"] = engine.answers["/props"] = engine.answers["/info"] = lambda: garbage
    engine.answers["/metrics"] = lambda: VLLM
    sent = Sent()
    async with scraping(scraper_of(sent, Target(url=engine.url, engine_id="e"))):
        await until(lambda: len(sent.loads) >= 2)
    assert sent.engines[0].kind == "vllm"


# ---------------------------------------------------------------- the real llama.cpp


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("xllamacpp")
    from tests import tiny_gguf

    model = tmp_path / "tiny.gguf"
    tiny_gguf.write(model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "llama.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.llamacpp_server", str(model), str(port)], stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait(10)


def ask(url: str, tokens: int) -> dict[str, int]:
    body = {"prompt": "where do the joules go?", "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        usage: dict[str, int] = json.load(answer)["usage"]
    return usage


def test_the_daemon_counts_what_the_real_llamacpp_counts(llama: str, tmp_path: Path) -> None:
    """Tokens and joules of a model that sends no records at all."""
    arguments = ["--source", f"replay:{busy_recording(tmp_path)}", "--engines.targets", llama]
    with DaemonProcess(tmp_path, *arguments) as daemon:
        daemon.until("the engine", lambda: "scraping an engine" in daemon.text(), 20)
        time.sleep(1.2)  # Its first page says where the counters stand.
        usages = [ask(llama, 100 + 20 * number) for number in range(3)]
        expected = {
            "input": sum(one["prompt_tokens"] for one in usages),
            "output": sum(one["completion_tokens"] for one in usages),
        }

        def tokens() -> dict[str, int]:
            rows = json.loads(daemon.get("/v1/ledger")[1])["tokens"]
            # What its prompt cache had counts as input as well.
            return {row["direction"]: row["count"] for row in rows if row["direction"] in expected}

        daemon.until("its tokens", lambda: tokens() == expected, 45)
        rows = json.loads(daemon.get("/v1/ledger")[1])["attributed"]
        assert {(row["tenant"], row["phase"]) for row in rows} == {("", "prefill"), ("", "decode")}
        # A recorded H200 draws 350 to 700 W; two seconds of it at the most were llama.cpp's work.
        assert 0 < sum(row["joules"] for row in rows) < 700 * 5
        assert daemon.metric("jouletrace_events_total", source="scrape")
        daemon.assert_calm()
