"""The real llama.cpp server with the real `openai` client, through the proxy, into the real daemon.

The GPU is a replayed recording, so the joules are those of an H200 while llama.cpp works on the CPU: they are real
figures of a real account, of two things that did not happen together.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from tests import tiny_gguf
from tests.daemon_process import DaemonProcess
from tests.proxy_process import ProxyProcess

from jouletrace.daemon import demo_recording
from jouletrace.engines.client import Client
from jouletrace.trace import recording
from jouletrace.trace.recording import Recording

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.timeout(90)

H200_LIMIT_WATTS = 700.0
BUSY_SECONDS = (234.0, 269.0)
"""Of the demo's recording: 350 W at least all the time."""
MODEL = "tiny"
QUESTION: Any = [{"role": "user", "content": "where do the joules go?"}]
NO_END = {"ignore_eos": True}
"""Random weights must not end an answer early."""


@dataclass(frozen=True)
class Chain:
    """Client -> proxy -> llama.cpp, and the daemon."""

    llama_url: str
    daemon: DaemonProcess
    proxy: ProxyProcess
    client: openai.OpenAI

    def settled(self, request_id: str) -> dict[str, Any]:
        """Return what the daemon knows of a request that has ended."""
        answer: dict[str, Any] = self.daemon.until(
            f"the final figure of {request_id}",
            lambda: (found := json.loads(self.daemon.get(f"/v1/requests/{request_id}")[1])).get("final") and found,
        )
        return answer

    def tokens(self) -> Counter[str]:
        """Return the daemon's token counters by direction."""
        found: Counter[str] = Counter()
        for row in json.loads(self.daemon.get("/v1/ledger")[1])["tokens"]:
            found[row["direction"]] += row["count"]
        return found


def busy_part(whole: Recording) -> Recording:
    """Return the part of the recording in which the GPU is never idle, without its engine's events."""
    origin_ns = whole.streams[recording.POWER_RING].t_ns[0]
    begin_ns, end_ns = (origin_ns + round(second * 1e9) for second in BUSY_SECONDS)
    streams = {}
    for name, stream in whole.streams.items():
        kept = (stream.t_ns >= begin_ns) & (stream.t_ns < end_ns)
        values = {column: numbers[kept] for column, numbers in stream.values.items()}
        streams[name] = recording.Stream(stream.t_ns[kept], values)
    return Recording(whole.meta, streams, (), whole.name)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("llamacpp")
    model = folder / "tiny.gguf"
    tiny_gguf.write(model)
    busy = folder / "busy.json.gz"
    recording.write(busy, busy_part(recording.read(demo_recording())))
    with served(folder, model) as url, DaemonProcess(folder, "--source", f"replay:{busy}") as daemon:
        arguments = ["--upstream", url, "--jouletrace", daemon.url, "--energy-budget", "10s"]
        arguments += ["--engine-id", "llama-0", "--engine-kind", "llamacpp", "--tenant-header", "x-tenant"]
        with ProxyProcess(folder, *arguments) as proxy:
            daemon.until("readiness", daemon.ready)
            daemon.until("llama.cpp", lambda: urllib.request.urlopen(f"{url}/health", timeout=2).status == 200)
            with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
                yield Chain(url, daemon, proxy, client)
            proxy.assert_calm()
            daemon.assert_calm()


@contextlib.contextmanager
def served(folder: Path, model: Path, *key: str) -> Iterator[str]:
    """Serve a model by llama.cpp, with a key or without, and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "llama.log").open("wb") as log:
        command = [sys.executable, "-m", "tests.llamacpp_server", str(model), str(port), *key]
        llama = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        llama.kill()
        llama.wait(10)


def test_its_metrics_want_the_key_and_get_it(tmp_path: Path) -> None:
    """As docs/engines/README.md has it: `--api-key` covers llama.cpp's metrics."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    (tmp_path / "key").write_text("sesame\n")
    with served(tmp_path, tmp_path / "tiny.gguf", "sesame") as url:
        (tmp_path / "jouletrace.yml").write_text(
            "engines:\n  discover: false\n  targets:\n"
            f"    - {{url: '{url}', engine_id: llama, authorization: {{credentials_file: {tmp_path / 'key'}}}}}\n"
        )
        with DaemonProcess(tmp_path, "--demo", "--config.file", str(tmp_path / "jouletrace.yml")) as daemon:
            daemon.until("llama.cpp", lambda: urllib.request.urlopen(f"{url}/health", timeout=2).status == 200)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/metrics", timeout=2)
            daemon.until("a scrape", lambda: any(e["event"] == "scraping an engine" for e in daemon.events()))
            daemon.assert_calm()


def test_a_plain_answer_carries_its_joules(chain: Chain) -> None:
    before = chain.tokens()
    began = time.monotonic()
    answer = chain.client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=1200,
        extra_headers={"X-Request-Id": "plain-1", "X-Tenant": "acme", "traceparent": f"00-{'7' * 32}-{'1' * 16}-01"},
        extra_body=NO_END,
    )
    seconds = time.monotonic() - began
    parsed = answer.parse()
    energy = parsed.model_extra["energy"] if parsed.model_extra else {}
    assert energy["final"] is True
    assert energy["request_id"] == "plain-1"
    # A request that was alone used what the GPU used meanwhile: not nothing, and no more than it can draw.
    assert 0 < energy["energy_joules"] < H200_LIMIT_WATTS * seconds
    assert float(answer.headers["X-Energy-Joules"]) == energy["energy_joules"]
    assert parsed.usage is not None
    assert parsed.usage.completion_tokens == 1200
    assert energy["joules_per_output_token"] == pytest.approx(energy["energy_joules"] / 1200, rel=1e-5)
    known = chain.settled("plain-1")
    assert known["energy_joules"] == pytest.approx(energy["energy_joules"], rel=1e-5)
    assert (known["model"], known["tenant"], known["engine_id"]) == (MODEL, "acme", "llama-0")
    assert (known["status"], known["final"]) == ("finished", True)
    # The counts are llama.cpp's own.
    details = parsed.usage.prompt_tokens_details
    expected = {"output": 1200, "input": parsed.usage.prompt_tokens, "cached_input": details and details.cached_tokens}
    after = chain.tokens()
    assert after - before == {direction: count for direction, count in expected.items() if count}


@pytest.mark.parametrize("asks_for_usage", [True, False])
def test_a_stream_carries_its_joules(chain: Chain, asks_for_usage: bool) -> None:
    request_id = f"stream-{asks_for_usage}"
    before = chain.tokens()["output"]
    options: Any = {"stream_options": {"include_usage": True}} if asks_for_usage else {}
    stream = chain.client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=600,
        stream=True,
        extra_headers={"X-Request-Id": request_id},
        extra_body=NO_END,
        **options,
    )
    chunks = list(stream)
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [usage.completion_tokens for usage in usages] == ([600] if asks_for_usage else [])
    assert all(chunk.choices for chunk in chunks) is not asks_for_usage
    known = chain.settled(request_id)
    assert known["final"] is True
    assert known["energy_joules"] > 0
    assert known["prefill_joules"] + known["decode_joules"] == pytest.approx(known["energy_joules"])
    # Chunks are not tokens, but the usage is told in both cases.
    assert chain.tokens()["output"] - before == 600


def test_the_comment_stands_before_the_end_of_a_stream(chain: Chain) -> None:
    body = json.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 300, "stream": True} | NO_END).encode()
    question = urllib.request.Request(f"{chain.proxy.url}/v1/chat/completions", body, {"X-Request-Id": "raw-1"})
    with urllib.request.urlopen(question, timeout=30) as answer:
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert events[-3].startswith(": energy {")
    energy = json.loads(events[-3].removeprefix(": energy "))
    assert energy["final"] is True
    assert energy["energy_joules"] == pytest.approx(chain.settled("raw-1")["energy_joules"], rel=1e-5)


def test_a_client_that_goes_pays_for_what_it_used(chain: Chain) -> None:
    stream = chain.client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=1900,
        stream=True,
        extra_headers={"X-Request-Id": "gone-1"},
        extra_body=NO_END,
    )
    for _ in range(20):
        next(stream)
    stream.close()
    known = chain.settled("gone-1")
    assert known["status"] == "cancelled"


def test_a_request_that_the_server_refuses(chain: Chain) -> None:
    question: Any = [{"role": "user", "content": "too long " * 4000}]
    with pytest.raises(openai.BadRequestError) as through:
        chain.client.chat.completions.create(
            model=MODEL, messages=question, stream=True, extra_headers={"X-Request-Id": "bad-1"}
        )
    direct = openai.OpenAI(base_url=f"{chain.llama_url}/v1", api_key="none", max_retries=0)
    with direct, pytest.raises(openai.BadRequestError) as straight:
        direct.chat.completions.create(model=MODEL, messages=question)
    assert through.value.body == straight.value.body
    assert chain.settled("bad-1")["status"] == "failed"


def test_other_pages_pass(chain: Chain) -> None:
    with urllib.request.urlopen(f"{chain.proxy.url}/metrics", timeout=5) as through:
        text = through.read().decode()
    assert "llamacpp:tokens_predicted_total" in text
    assert [model.id for model in chain.client.models.list()]


def test_the_client_path(chain: Chain) -> None:
    direct = openai.OpenAI(base_url=f"{chain.llama_url}/v1", api_key="none", max_retries=0)
    with direct, Client(chain.daemon.url) as client:
        with client.request(model=MODEL, engine_id="llama-0") as request:
            answer = direct.completions.create(model=MODEL, prompt="hello", max_tokens=600, extra_body=NO_END)
            assert answer.usage is not None
            request.usage(input=answer.usage.prompt_tokens, output=answer.usage.completion_tokens)
        energy = request.energy(wait=10)
    assert energy is not None
    assert energy["final"] is True
    assert energy["energy_joules"] > 0


def test_the_account_adds_up(chain: Chain) -> None:
    account = json.loads(chain.daemon.get("/v1/ledger")[1])
    totals = account["totals"]
    assert totals["device_joules"] > 0
    assert abs(totals["residual_joules"]) < 1e-6 * totals["device_joules"]
    assert not account["dropped"]


# The last two: they end what the others need.


def test_the_proxy_goes_on_without_the_daemon(chain: Chain) -> None:
    chain.daemon.process.kill()
    chain.daemon.process.wait(10)
    began = time.monotonic()
    for _ in range(10):
        answer = chain.client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=5, extra_body=NO_END)
        assert answer.usage is not None
        assert "energy" not in (answer.model_extra or {})
    # The budget of 10 s is not spent on a daemon that is not there.
    assert time.monotonic() - began < 5
    assert sum("does not tell energies" in event["event"] for event in chain.proxy.events()) == 1


def test_a_proxy_that_is_stopped_says_so_once(chain: Chain) -> None:
    chain.proxy.process.send_signal(signal.SIGTERM)
    assert chain.proxy.ends(15) == 0
    lines = [event for event in chain.proxy.events() if "was told to stop" in event["event"]]
    assert len(lines) == 1
    assert lines[0]["level"] == "warning"
    assert lines[0]["url"] == chain.proxy.url
    assert lines[0]["finished"] >= 14
    assert (lines[0]["failed"], lines[0]["cancelled"]) == (1, 1)
