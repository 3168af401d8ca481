import asyncio
import base64
import contextlib
import gzip
import io
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from structlog.testing import capture_logs
from tests.otlp_exports import CAPTURED, captured, export
from tests.recording_account import RecordingAccount, Totals

from jouletrace.clock import SystemClock
from jouletrace.config import Config, ConfigError, Otlp
from jouletrace.engines.otlp.decoding import UndecodableError, json_pieces, protobuf_pieces
from jouletrace.engines.otlp.receiver import OtlpReceiver, status
from jouletrace.engines.otlp.spans import request_record
from jouletrace.requests.admission import Admission
from jouletrace.requests.inbox import Inbox
from jouletrace.requests.records import EngineRecord, RequestRecord, Status, Usage
from jouletrace.requests.service import LedgerService
from jouletrace.web.api import Api
from jouletrace.web.application import errors
from jouletrace.web.entrance import Entrance
from jouletrace.web.serve import WebServer

WORD = "s3cret"
PROTOBUF, JSON = "application/x-protobuf", "application/json"


class Rig:
    """The receiver as the daemon serves it, on a recording account."""

    def __init__(
        self, *, capacity: int = 65_536, drain: bool = True, tokens: Sequence[str] = (), **options: int
    ) -> None:
        self.account = RecordingAccount()
        self.inbox = Inbox(capacity)
        clock = SystemClock()
        self.service: LedgerService[float, Totals] = LedgerService(
            self.account, self.inbox, clock=clock, devices=lambda: 0.0, settle_seconds=0.05
        )
        self._drain = drain
        api = Api(self.service, self.inbox, clock=clock, tokens=tokens, **options)
        receiver = OtlpReceiver(
            Config(), self.inbox, admission=api.admission, entrance=api.entrance, engines=lambda: ()
        )
        app = web.Application(middlewares=[errors])
        app.add_routes(receiver.routes())
        self.server = WebServer(app)
        self.session: aiohttp.ClientSession

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        await self.server.start(["127.0.0.1:0"])
        service = asyncio.create_task(self.service.run()) if self._drain else None
        async with aiohttp.ClientSession() as self.session:
            try:
                yield self
            finally:
                await self.server.stop()
                if service is not None:
                    service.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await service

    async def post(self, body: bytes, kind: str = PROTOBUF, **headers: str) -> tuple[int, bytes, str]:
        named = {"Content-Type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(
            f"{self.server.urls[0]}/v1/traces", data=io.BytesIO(body), headers=named
        ) as response:
            return response.status, await response.read(), response.content_type

    async def booked(self) -> tuple[list[EngineRecord], list[RequestRecord]]:
        await asyncio.wait_for(self.inbox.drained(), 5)
        records = self.account.records
        return (
            [one for one in records if isinstance(one, EngineRecord)],
            [one for one in records if isinstance(one, RequestRecord)],
        )


def recent(rows: list[dict[str, Any]] | None = None) -> ExportTraceServiceRequest:
    """Return the captured spans as of now: the last one ended a second ago."""
    rows = captured() if rows is None else rows
    latest = max(row["start_ns"] + round(row["dur_ms"] * 1e6) for row in captured())
    return export(rows, shift_ns=time.time_ns() - 1_000_000_000 - latest)


def row(request_id: str = "r", *, ago: float = 1.0, name: str = "llm_request", **attributes: object) -> dict[str, Any]:
    """Return a span of 100 ms that ended so long ago."""
    told = {"gen_ai.request.id": request_id, "gen_ai.usage.prompt_tokens": 5, "gen_ai.usage.completion_tokens": 3}
    return {
        "name": name, "trace": "0" * 31 + "1", "parent": "", "start_ns": time.time_ns() - round((ago + 0.1) * 1e9),
        "dur_ms": 100.0, "attrs": told | attributes, "res": {"service.name": "s", "vllm.process_id": "7"},
    }  # fmt: skip


def hexadecimal(message: ExportTraceServiceRequest) -> dict[str, Any]:
    """Return OTLP's JSON: protobuf's, with ids in hexadecimal and enums as numbers."""
    whole = MessageToDict(message, use_integers_for_enums=True)
    for resource_spans in whole["resourceSpans"]:
        for scope_spans in resource_spans["scopeSpans"]:
            for span in scope_spans["spans"]:
                for name in ("traceId", "spanId", "parentSpanId"):
                    if name in span:
                        span[name] = base64.b64decode(span[name]).hex()
    return whole


def as_json(message: ExportTraceServiceRequest) -> bytes:
    return json.dumps(hexadecimal(message)).encode()


def as_base64_json(message: ExportTraceServiceRequest) -> bytes:
    return json.dumps(MessageToDict(message)).encode()


@pytest.mark.parametrize(
    ("encode", "kind", "empty"),
    [
        (ExportTraceServiceRequest.SerializeToString, PROTOBUF, b""),
        (as_json, JSON, b"{}"),
        (as_base64_json, JSON, b"{}"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
async def test_captured_spans_become_requests(
    encode: Callable[[ExportTraceServiceRequest], bytes], kind: str, empty: bytes, packed: bool
) -> None:
    message = recent()
    body = encode(message)
    headers = {"Content_Encoding": "gzip"} if packed else {}
    async with Rig().running() as rig:
        assert await rig.post(gzip.compress(body) if packed else body, kind, **headers) == (200, empty, kind)
        engines, requests = await rig.booked()
        assert rig.inbox.events().received == {"otlp": 4}
    assert [engine.engine_id for engine in engines] == ["vllm-lab-16445"]
    assert engines[0].kind == "vllm"
    assert [request.request_id for request in requests] == ["chatcmpl-req-100", "chatcmpl-req-0", "chatcmpl-req-1"]
    assert [request.trace_id for request in requests] == [f"{number:032x}" for number in (0x65, 1, 2)]
    assert [request.usage for request in requests] == [
        Usage(input=25, output=12), Usage(input=47, output=24), Usage(input=53, output=25),
    ]  # fmt: skip
    assert {request.status for request in requests} == {Status.FINISHED}
    assert {request.model for request in requests} == {None}
    for request, sample in zip(requests, captured()[1:], strict=True):
        told, life = sample["attrs"], sample["dur_ms"] / 1e3
        arrival, scheduled, first, end = (
            getattr(request, f"{name}_ns") for name in ("arrival", "scheduled", "first_token", "end")
        )
        assert (end - arrival) / 1e9 == pytest.approx(told["gen_ai.latency.e2e"], abs=1e-6)
        assert (end - arrival) / 1e9 < life
        assert (end - first) / 1e9 == pytest.approx(told["gen_ai.latency.time_in_model_decode"], abs=1e-6)
        assert (first - scheduled) / 1e9 == pytest.approx(told["gen_ai.latency.time_in_model_prefill"], abs=1e-6)
        assert time.time_ns() - end < 5e9


async def test_one_span_that_is_wrong_does_not_cost_the_others() -> None:
    bad = row("bad")
    bad["attrs"]["gen_ai.usage.prompt_tokens"] = -5
    backwards = row("backwards") | {"dur_ms": -1.0}
    rows = [row("a"), bad, backwards, row("b"), row("load", name="Load weights")]
    async with Rig().running() as rig:
        code, body, _ = await rig.post(export(rows).SerializeToString())
        partial = ExportTraceServiceResponse.FromString(body).partial_success
        assert (code, partial.rejected_spans) == (200, 2)
        assert partial.error_message == "gen_ai.usage.prompt_tokens: is not a number of tokens"
        code, body, _ = await rig.post(as_json(export(rows[:3])), JSON)
        assert json.loads(body)["partialSuccess"]["rejectedSpans"] == "2"
        _, requests = await rig.booked()
        assert [request.request_id for request in requests] == ["a", "b", "a"]
        assert rig.inbox.events().dropped == {("otlp", "invalid"): 4}


async def test_json_that_is_wrong_in_one_span_costs_that_span() -> None:
    whole = hexadecimal(export([row("a"), row("b"), row("c")]))
    spans = [one["scopeSpans"][0]["spans"][0] for one in whole["resourceSpans"]]
    spans[0]["startTimeUnixNano"] = {"seconds": 1}
    spans[1]["endTimeUnixNano"] = "9" * 5000
    spans[2]["unknown"] = [{"field": None}]
    spans[2]["attributes"] += [{"key": "gen_ai.response.model", "value": {"stringValue": 5}}, {"value": {}}, {}]
    async with Rig().running() as rig:
        code, body, _ = await rig.post(json.dumps(whole).encode(), JSON)
        assert (code, json.loads(body)["partialSuccess"]["rejectedSpans"]) == (200, "2")
        _, requests = await rig.booked()
    assert [request.request_id for request in requests] == ["c"]


@pytest.mark.parametrize(("ago", "reason"), [(-60.0, "future"), (3600.0, "late")])
async def test_a_clock_that_is_off_is_refused_and_counted(ago: float, reason: str) -> None:
    async with Rig().running() as rig:
        _, body, _ = await rig.post(export([row(ago=ago), row("good")]).SerializeToString())
        partial = ExportTraceServiceResponse.FromString(body).partial_success
        assert partial.rejected_spans == 1
        assert partial.error_message.startswith("end_ns: ")
        _, requests = await rig.booked()
        assert [request.request_id for request in requests] == ["good"]
        assert rig.inbox.events().dropped == {("otlp", reason): 1}


async def test_times_of_64_bits_are_no_fault() -> None:
    message = export([row("huge")])
    message.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano = 2**64 - 1
    async with Rig().running() as rig:
        await rig.post(message.SerializeToString())
        assert rig.inbox.events().dropped == {("otlp", "future"): 1}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"\x0a\xff\xff\xff", PROTOBUF),
        (b"not protobuf at all", PROTOBUF),
        (b"{", JSON),
        (b"[]", JSON),
        (b'{"resourceSpans": 5}', JSON),
        (b"[" * 100_000, JSON),
        (b"\xff\xfe", JSON),
        (b"", JSON),
    ],
)
async def test_what_cannot_be_decoded_is_answered_with_a_status(body: bytes, kind: str) -> None:
    async with Rig().running() as rig:
        code, answer, answer_type = await rig.post(body, kind)
        assert (code, answer_type) == (400, kind)
        if kind == JSON:
            assert json.loads(answer)["code"] == 3
        else:
            assert answer[:3] == b"\x08\x03\x12"
        assert b"The body is not an ExportTraceServiceRequest" in answer
        assert rig.inbox.events().dropped == {("otlp", "invalid"): 1}


async def test_damaged_exports_are_logged_once() -> None:
    packed = gzip.compress(recent().SerializeToString())[:-5]
    async with Rig().running() as rig:
        with capture_logs() as logged:
            for _ in range(50):
                assert (await rig.post(b"\x0a\xff\xff\xff"))[0] == 400
                assert (await rig.post(packed, Content_Encoding="gzip"))[0] == 400
        assert rig.inbox.events().dropped == {("otlp", "invalid"): 100}
    [line] = [line for line in logged if line["log_level"] == "warning"]
    assert line["problem"] == "The body is not an ExportTraceServiceRequest: it is damaged or cut off."


async def test_a_protobuf_that_is_cut_anywhere_takes_whole_spans_or_none() -> None:
    body = recent().SerializeToString()
    async with Rig().running() as rig:
        for cut in range(0, len(body), 61):
            code, _, _ = await rig.post(body[:cut])
            assert code in (200, 400)
        _, requests = await rig.booked()
    whole = {"chatcmpl-req-100", "chatcmpl-req-0", "chatcmpl-req-1"}
    assert {request.request_id for request in requests} <= whole
    assert all(request.usage is not None and request.end_ns is not None for request in requests)


async def test_who_may_send_and_how() -> None:
    body = export([row()]).SerializeToString()
    async with Rig(tokens=[WORD]).running() as rig:
        code, answer, answer_type = await rig.post(body)
        assert (code, answer[:3], answer_type) == (401, b"\x08\x10\x12", PROTOBUF)
        assert (await rig.post(body, Authorization=f"Bearer {WORD}"))[0] == 200
    async with Rig().running() as rig:
        assert (await rig.post(body, Host="evil.example"))[0] == 403
        assert (await rig.post(body, Origin="http://evil.example"))[0] == 403
        code, answer, answer_type = await rig.post(body, "text/plain")
        assert (code, answer_type, json.loads(answer)["code"]) == (415, JSON, 3)
        assert (await rig.post(body, Content_Encoding="br"))[0] == 415
        assert (await rig.post(gzip.compress(body)[:-5], Content_Encoding="gzip"))[0] == 400
        assert (await rig.post(body, f"{PROTOBUF}; charset=utf-8"))[0] == 200


async def test_giant_spans_are_bounded_by_the_body() -> None:
    giant = row("giant") | {"attrs": row()["attrs"] | {"gen_ai.prompt": "x" * (1 << 20)}}
    async with Rig(max_body_bytes=1 << 20).running() as rig:
        body = export([giant]).SerializeToString()
        assert (await rig.post(body))[0] == 413
        assert (await rig.post(gzip.compress(body), Content_Encoding="gzip"))[0] == 413
        assert rig.inbox.events().dropped == {("otlp", "too_long"): 2}
    async with Rig().running() as rig:
        giant["attrs"]["gen_ai.request.id"] = "i" * (1 << 20)
        giant["attrs"]["gen_ai.response.model"] = "m" * (1 << 20)
        assert (await rig.post(export([giant]).SerializeToString()))[0] == 200
        _, [request] = await rig.booked()
    assert (request.request_id, request.model) == ("i" * 256, "m" * 128)


async def test_without_room_the_sender_is_asked_to_come_again() -> None:
    async with Rig(capacity=1024, drain=False).running() as rig:
        body = export([row(str(number)) for number in range(1000)]).SerializeToString()
        assert (await rig.post(body))[0] == 200
        async with rig.session.post(
            f"{rig.server.urls[0]}/v1/traces", data=body, headers={"Content-Type": PROTOBUF}
        ) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert (await response.read())[:3] == b"\x08\x08\x12"
        assert set(rig.inbox.events().dropped) == {("otlp", "queue_full")}


async def test_an_engine_is_announced_once_and_again_with_each_model() -> None:
    async with Rig().running() as rig:
        for model in ("a", "a", "b"):
            told = {"gen_ai.response.model": model}
            await rig.post(export([row(model, **told)]).SerializeToString())
        engines, requests = await rig.booked()
    assert [engine.models for engine in engines] == [(), ("a",), ("a", "b")]
    assert [request.model for request in requests] == ["a", "a", "b"]


async def test_nobody_waits_for_a_large_export() -> None:
    body = export([row(str(number)) for number in range(10_000)]).SerializeToString()
    waits: list[float] = []
    async with Rig().running() as rig:

        async def look() -> None:
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                waits.append(time.perf_counter() - began - 0.001)

        # Read in full before the first look: what is measured is the decoding.
        looking = asyncio.create_task(look())
        code, _, _ = await rig.post(body)
        looking.cancel()
        assert code == 200
    # 10,000 spans take 150 ms in all. The kernel may take this process's turn away, so not the very longest.
    assert sorted(waits)[int(len(waits) * 0.9)] < 0.02


def test_a_status_of_any_length() -> None:
    for length in (0, 1, 127, 128, 16_383, 16_384):
        encoded = status(3, "x" * length, PROTOBUF)
        # google.rpc.Status has the fields of a partial success: a number and a text.
        told = ExportTraceServiceResponse.FromString(b"").partial_success.FromString(encoded)
        assert (told.rejected_spans, told.error_message) == (3, "x" * length)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_fail(noise: bytes) -> None:
    for pieces in (protobuf_pieces, json_pieces):
        with contextlib.suppress(UndecodableError):
            list(pieces(noise))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=30),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "name",
                        "traceId",
                        "startTimeUnixNano",
                        "attributes",
                        "status",
                        "code",
                        "key",
                        "value",
                        "stringValue",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=15,
    )
)
def test_no_json_span_does_more_than_fail(noise: object) -> None:
    spans = [noise, {"name": "llm_request", "attributes": noise}, {"name": "llm_request", "status": noise}]
    body = msgspec.json.encode({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})
    for piece in json_pieces(body):
        assert len(piece.errors) + len(piece.spans) <= len(spans)


def test_grpc_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "jouletrace.engines.otlp.rpc", raising=False)
    inbox = Inbox()
    with pytest.raises(ConfigError) as caught:
        OtlpReceiver(
            Config(otlp=Otlp(grpc_listen_address=(":4317",))),
            inbox,
            admission=Admission(inbox, set, SystemClock()),
            entrance=Entrance(max_body_bytes=1 << 20),
            engines=lambda: (),
        )
    assert str(caught.value) == (
        "otlp.grpc_listen_address: needs the package grpcio, which is not installed; "
        "run `pip install 'jouletrace[grpc]'`, or let engines send http/protobuf"
    )


def test_the_bytes_of_a_real_vllm_are_requests_that_add_up() -> None:
    bodies = [base64.b64decode(line) for line in (CAPTURED.parent / "vllm-0.32.0.otlp.base64").read_text().split()]
    pieces = [piece for body in bodies for piece in protobuf_pieces(body)]
    requests = [request_record(span, kind, "e") for piece in pieces for kind, span in piece.spans]
    # Twelve clients, whose plug-in records of the same run are beside it.
    lines = (CAPTURED.parent / "vllm-0.32.0-full.datagrams.jsonl").read_text().splitlines()
    told = {record["request_id"]: record for record in map(json.loads, lines) if record.get("record") == "request"}
    by_id = {request.request_id: request for request in requests}
    assert len(by_id) == len(requests)
    assert by_id.keys() - told.keys() == {"chatcmpl-req-99"}  # Before the twelve, to warm up.
    for request_id, record in told.items():
        request = by_id[request_id]
        assert request.usage is not None
        assert (request.usage.input, request.usage.output) == (record["usage"]["input"], record["usage"]["output"])
        # Both count back from an end that the same server saw; the plug-in takes out waits of the event loop.
        for name in ("scheduled_ns", "first_token_ns", "end_ns"):
            assert abs(getattr(request, name) - record[name]) < 1_000_000, name
