"""OpenTelemetry's own exporters send spans to the whole daemon, which passes them on to a collector."""

import contextlib
import gzip
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.daemon_process import DaemonProcess

from jouletrace.daemon import demo_recording
from jouletrace.trace import recording

pytestmark = pytest.mark.timeout(90)

BUSY_AFTER_NS = 95_000_000_000
"""From there on the recorded GPU draws 390 to 700 W for half a minute."""
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


@pytest.fixture(name="quiet", scope="module")
def fixture_quiet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recording of a real H200 from where it is busy, without the requests of its own engine."""
    file = tmp_path_factory.mktemp("quiet") / "quiet.json.gz"
    demo = recording.read(demo_recording())
    begin_ns = min(int(stream.t_ns[0]) for stream in demo.streams.values()) + BUSY_AFTER_NS
    streams = {}
    for name, stream in demo.streams.items():
        later = stream.t_ns >= begin_ns
        values = {column: rows[later] for column, rows in stream.values.items()}
        streams[name] = recording.Stream(stream.t_ns[later], values)
    recording.write(file, recording.Recording(demo.meta, streams, (), demo.name))
    return f"replay:{file}"


class Collector:
    """A collector that keeps what it is sent."""

    def __init__(self, port: int = 0) -> None:
        self.kept: list[tuple[bytes, Mapping[str, str]]] = []
        kept = self.kept

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                kept.append((self.rfile.read(int(self.headers["Content-Length"])), dict(self.headers)))
                # HTTP/1.0: the connection ends with the answer, and none outlives the server.
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def spans(self) -> list[str]:
        """Return the names of the spans that came."""
        messages = [
            ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
            for body, _ in self.kept
        ]
        return [
            span.name
            for message in messages
            for resource_spans in message.resource_spans
            for scope_spans in resource_spans.scope_spans
            for span in scope_spans.spans
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator["Collector"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def send(exporter: SpanExporter, requests: int, *, model: str = "tiny", first: int = 0) -> list[str]:
    """Send requests' spans as vLLM does, among others; return their trace ids."""
    resource = Resource.create({"service.name": "chat", "vllm.process_id": "7"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=50))
    tracer = provider.get_tracer("vllm.llm_engine")
    now_ns = time.time_ns()
    traces = []
    tracer.start_span("Load weights").end()
    for number in range(first, first + requests):
        span = tracer.start_span("llm_request", kind=SpanKind.SERVER, start_time=now_ns - 2_000_000_000)
        span.set_attributes(
            {
                "gen_ai.request.id": f"chatcmpl-{number}",
                "gen_ai.response.model": model,
                "gen_ai.usage.prompt_tokens": 100,
                "gen_ai.usage.completion_tokens": 20,
                "gen_ai.latency.e2e": 1.9,
                "gen_ai.latency.time_in_model_prefill": 0.2,
                "gen_ai.latency.time_in_model_decode": 1.6,
            }
        )
        span.end(now_ns - 90_000_000)
        traces.append(f"{span.get_span_context().trace_id:032x}")
    provider.shutdown()
    return traces


def exemplars(daemon: DaemonProcess) -> set[str]:
    """Return the trace ids in the histogram of joules per request."""
    request = urllib.request.Request(f"{daemon.url}/metrics", headers={"Accept": OPENMETRICS})
    with urllib.request.urlopen(request, timeout=5) as response:
        text = response.read().decode()
    return {
        sample.exemplar.labels["trace_id"]
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        if family.name == "jouletrace_request_energy_joules"
        for sample in family.samples
        if sample.exemplar
    }


def test_spans_get_their_joules_and_their_trace_ids_are_exemplars(tmp_path: Path, quiet: str) -> None:
    with Collector().running() as collector:
        url = f"http://127.0.0.1:{collector.port}/v1/traces"
        with DaemonProcess(tmp_path, "--source", quiet, "--otlp.forward-url", url) as daemon:
            daemon.until("readiness", daemon.ready)
            time.sleep(4)  # So that the energy of the requests' time is known.
            exporter = HttpExporter(f"{daemon.url}/v1/traces", compression=Compression.Gzip)
            traces = send(exporter, 3)
            found = daemon.until("an exemplar", lambda: exemplars(daemon), seconds=20)
            assert found <= set(traces)
            assert daemon.metric("jouletrace_requests_total", model="tiny", status="finished") == {"": 3.0}
            assert daemon.metric("jouletrace_tokens_total", model="tiny", direction="input") == {"": 300.0}
            energies = [
                json.loads(daemon.get(f"/v1/requests/chatcmpl-{number}?wait=10s", timeout=12)[1]) for number in range(3)
            ]
            assert {(one["engine_id"], one["final"]) for one in energies} == {("chat-7", True)}
            joules = [one["energy_joules"] for one in energies]
            assert joules == pytest.approx([joules[0]] * 3)
            # They share 1.8 s of an H200 that draws up to 700 W, and pauses for a third of the time at most.
            assert 1.2 * 390 < sum(joules) < 1.8 * 700
            attributed = json.loads(daemon.get("/v1/ledger")[1])["attributed"]
            assert sum(one["joules"] for one in attributed if one["model"] == "tiny") == pytest.approx(sum(joules))
            assert daemon.metric("jouletrace_events_total", source="otlp")[""] == 5.0
            assert daemon.metric("jouletrace_events_dropped_total", source="otlp") == {}
            daemon.until("what was passed on", lambda: "Load weights" in collector.spans())
            assert sorted(collector.spans()) == ["Load weights", *["llm_request"] * 3]
            headers = collector.kept[0][1]
            assert (headers["Content-Encoding"], headers["Content-Type"]) == ("gzip", "application/x-protobuf")
            daemon.assert_calm()


def test_nothing_is_lost_while_the_collector_is_down(tmp_path: Path, quiet: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/traces"
    with DaemonProcess(tmp_path, "--source", quiet, "--otlp.forward-url", url) as daemon:
        daemon.until("readiness", daemon.ready)
        with Collector(port).running() as before:
            send(HttpExporter(f"{daemon.url}/v1/traces"), 1)
            daemon.until("the first spans", lambda: len(before.spans()) == 2)
        for number in range(1, 6):
            send(HttpExporter(f"{daemon.url}/v1/traces"), 1, first=number)
        waiting = daemon.metric("jouletrace_otlp_forward_buffer_bytes")[""]
        assert waiting > 5 * 200
        with Collector(port).running() as after:
            daemon.until("the other spans", lambda: len(after.spans()) == 10, seconds=15)
        assert daemon.metric("jouletrace_otlp_forward_buffer_bytes") == {"": 0.0}
        assert daemon.metric("jouletrace_otlp_exports_dropped_total") == {}
        said = [event["event"] for event in daemon.events() if "collector" in event["event"]]
        assert said == ["the collector does not take spans; they wait until it does", "the collector takes spans again"]


def test_grpc_and_a_listener_of_its_own(tmp_path: Path, quiet: str) -> None:
    http, grpc = free_port(), free_port()
    with Collector().running() as collector:
        arguments = [
            *("--source", quiet, "--otlp.listen-address", f"127.0.0.1:{http}"),
            *("--otlp.grpc-listen-address", f"127.0.0.1:{grpc}"),
            *("--otlp.forward-url", f"http://127.0.0.1:{collector.port}/v1/traces"),
        ]
        with DaemonProcess(tmp_path, *arguments) as daemon:
            daemon.until("readiness", daemon.ready)
            send(GrpcExporter(f"http://127.0.0.1:{grpc}", insecure=True), 2, model="by-grpc")
            send(HttpExporter(f"http://127.0.0.1:{http}/v1/traces"), 2, model="by-http", first=2)
            for model in ("by-grpc", "by-http"):
                count = ("jouletrace_requests_total", {"model": model, "status": "finished"})
                daemon.until(model, lambda count=count: daemon.metric(count[0], **count[1]) == {"": 2.0}, seconds=20)
            daemon.until("what was passed on", lambda: len(collector.spans()) == 6)


def test_grpc_asks_for_the_token(tmp_path: Path, quiet: str) -> None:
    port = free_port()
    token = tmp_path / "token"
    token.write_text("s3cret")
    arguments = [
        "--source",
        quiet,
        "--otlp.grpc-listen-address",
        f"127.0.0.1:{port}",
        "--ingest.token-file",
        str(token),
    ]
    with DaemonProcess(tmp_path, *arguments) as daemon:
        daemon.until("readiness", daemon.ready)
        send(GrpcExporter(f"http://127.0.0.1:{port}", insecure=True), 1, model="without")
        headers = {"authorization": "Bearer s3cret"}
        send(GrpcExporter(f"http://127.0.0.1:{port}", insecure=True, headers=headers), 1, model="with", first=1)
        daemon.until("the request", lambda: daemon.metric("jouletrace_requests_total", model="with"), seconds=20)
        assert daemon.metric("jouletrace_requests_total", model="without") == {}
