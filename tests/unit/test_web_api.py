import asyncio
import contextlib
import gzip
import io
import json
import resource
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from tests.recording_account import RecordingAccount, Totals

from jouletrace.clock import SystemClock
from jouletrace.requests.account import LedgerSnapshot, Phase
from jouletrace.requests.inbox import Events, Inbox
from jouletrace.requests.records import EngineRecord, RequestRecord, Status, StepRecord, Unit, Usage
from jouletrace.requests.service import LedgerService
from jouletrace.web.api import Api, ledger_document
from jouletrace.web.application import errors
from jouletrace.web.schema import records_schema
from jouletrace.web.serve import WebServer

WORD = "s3cret"


def _bytes(body: bytes | str) -> bytes:
    return body.encode() if isinstance(body, str) else body


class Rig:
    """The API as the daemon serves it, on a recording account."""

    def __init__(
        self, *, capacity: int = 65_536, capacity_bytes: int = 64 << 20, drain: bool = True, **options: Any
    ) -> None:
        self.account = RecordingAccount()
        self.inbox = Inbox(capacity, capacity_bytes)
        clock = SystemClock()
        self.service: LedgerService[float, Totals] = LedgerService(
            self.account, self.inbox, clock=clock, devices=lambda: 0.0, settle_seconds=0.05
        )
        self._drain = drain
        app = web.Application(middlewares=[errors])
        self.api = Api(self.service, self.inbox, clock=clock, **options)
        app.add_routes(self.api.routes())
        self.server = WebServer(app)
        self.session: aiohttp.ClientSession
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        await self.server.start(["127.0.0.1:0"])
        self.url = self.server.urls[0]
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

    async def post(self, path: str, body: bytes | str = b"", **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.url + path, data=io.BytesIO(_bytes(body)), headers=named) as response:
            return response.status, await response.json()

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, await response.json()

    async def booked(self) -> list[Any]:
        await asyncio.wait_for(self.inbox.drained(), 5)
        return self.account.records


TAKEN = {"accepted": 1, "dropped": {}, "errors": []}


async def test_one_record_an_array_and_lines() -> None:
    async with Rig().running() as rig:
        one = '{"request_id": "a"}'
        assert await rig.post("/v1/requests", one) == (200, TAKEN)
        assert await rig.post("/v1/requests", f"[{one}, {one}]") == (200, TAKEN | {"accepted": 2})
        assert await rig.post("/v1/requests", f"{one}\n{one}\n", Content_Type="application/x-ndjson") == (
            200,
            TAKEN | {"accepted": 2},
        )
        now_ns = time.time_ns()
        step = f'{{"engine_id":"e","start_ns":{now_ns - 1},"end_ns":{now_ns},"decode":["a"]}}'
        assert await rig.post("/v1/steps", step) == (200, TAKEN)
        assert await rig.post("/v1/engines", '{"engine_id": "e", "kind": "vllm"}') == (200, TAKEN)
        records = await rig.booked()
    assert records[:5] == [RequestRecord(request_id="a")] * 5
    assert records[5:] == [
        StepRecord(engine_id="e", start_ns=now_ns - 1, end_ns=now_ns, decode=("a",)),
        EngineRecord(engine_id="e", kind="vllm"),
    ]


async def test_good_lines_count_and_bad_ones_are_reported() -> None:
    async with Rig().running() as rig:
        body = '{"request_id":"a"}\n{"request_id":"b","usage":{"output":"1"}}\n{"request_id":\n'
        assert await rig.post("/v1/requests", body) == (
            200,
            {
                "accepted": 1,
                "dropped": {"invalid": 2},
                "errors": [
                    {"line": 2, "field": "usage.output", "message": "expected int, got str"},
                    {"line": 3, "field": "", "message": "is not valid JSON (Input data was truncated)"},
                ],
            },
        )
        status, answer = await rig.post("/v1/requests", b"\xff\n" * 1000)
        assert (status, answer["accepted"], answer["dropped"], len(answer["errors"])) == (400, 0, {"invalid": 1000}, 20)
        assert await rig.booked() == [RequestRecord(request_id="a")]
        assert rig.inbox.events() == Events({"http": 1003}, {("http", "invalid"): 1002})


async def test_bodies_that_are_refused_as_a_whole() -> None:
    async with Rig(max_body_bytes=1 << 20, max_records=100).running() as rig:
        status, answer = await rig.post("/v1/requests", "")
        assert (status, answer["error"]["message"][:17]) == (400, "The body is empty")
        status, answer = await rig.post("/v1/requests", b" " * 10_000_000)
        assert status == 413
        assert answer["error"]["message"].startswith("The body is over 1 MiB, unpacked; send it in parts")
        status, answer = await rig.post("/v1/requests", '{"request_id":"a"}\n' * 101)
        assert (status, answer["error"]["message"]) == (
            413,
            "Nothing was taken: the body holds 101 records and 100 are allowed; send it in parts.",
        )
        assert (await rig.post("/v1/requests", '{"request_id":"a"}'))[0] == 200
        assert len(await rig.booked()) == 1


async def test_gzip_and_a_gzip_bomb() -> None:
    async with Rig().running() as rig:
        packed = gzip.compress(b'{"request_id":"a"}\n' * 1000)
        assert await rig.post("/v1/requests", packed, Content_Encoding="gzip") == (200, TAKEN | {"accepted": 1000})
        packer = zlib.compressobj(9, wbits=31)
        bomb = b"".join(packer.compress(b" " * (1 << 20)) for _ in range(512)) + packer.flush()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status, answer = await rig.post("/v1/requests", bomb, Content_Encoding="gzip")
        assert (status, "8 MiB, unpacked" in answer["error"]["message"]) == (413, True)
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown_mib < 100
        assert (await rig.post("/v1/requests", b"not gzip", Content_Encoding="gzip"))[0] == 400
        assert (await rig.post("/v1/requests", packed[:-20], Content_Encoding="gzip"))[0] == 400
        assert (await rig.post("/v1/requests", packed, Content_Encoding="br"))[0] == 415
        assert (await rig.post("/v1/requests", '{"request_id":"a"}'))[0] == 200


async def test_a_full_inbox_says_where_to_go_on() -> None:
    async with Rig(capacity=1024, drain=False).running() as rig:
        lines = "".join(f'{{"request_id":"{i}"}}\n' for i in range(1500))
        async with rig.session.post(rig.url + "/v1/requests", data=lines) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"
            assert await response.json() == {
                "accepted": 1024,
                "dropped": {"queue_full": 476},
                "errors": [],
                "resend_from": 1025,
            }
        assert rig.inbox.events() == Events({"http": 1500}, {("http", "queue_full"): 476})
        status, answer = await rig.post("/v1/requests/x/start")
        assert (status, answer["dropped"]) == (429, {"queue_full": 1})


async def test_few_records_that_name_very_many_requests_fill_the_inbox() -> None:
    now_ns = time.time_ns()
    ids = ",".join(f'"{number}"' for number in range(50_000))
    step = f'{{"engine_id":"e","start_ns":{now_ns - 1},"end_ns":{now_ns},"decode":[{ids}]}}\n'
    async with Rig(capacity_bytes=16 << 20, drain=False).running() as rig:
        status, answer = await rig.post("/v1/steps", step * 10)
        # 390 kB of JSON and about 5 MB of memory each.
        assert (status, answer) == (
            429,
            {"accepted": 3, "dropped": {"queue_full": 7}, "errors": [], "resend_from": 4},
        )
        assert rig.inbox.held_bytes <= 16 << 20


async def test_a_small_body_over_the_limit_and_one_that_comes_in_pieces() -> None:
    async with Rig(max_body_bytes=1000).running() as rig:
        host, port = rig.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /v1/requests HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % 1001 + b" " * 1001)
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)).split()[1] == b"413"
        writer.close()
        reader, writer = await asyncio.open_connection(host, int(port))
        for piece in (head % 18, b'{"request_', b'id":"a"}'):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)).split()[1] == b"200"
        writer.close()
        assert await rig.booked() == [RequestRecord(request_id="a")]


async def test_the_live_form_stamps_the_time() -> None:
    async with Rig().running() as rig:
        before_ns = time.time_ns()
        start = '{"model": "m", "tenant": "t", "engine_id": "e"}'
        assert await rig.post("/v1/requests/r%2F1/start", start) == (200, TAKEN)
        assert await rig.post("/v1/requests/r%2F1/first-token") == (200, TAKEN)
        # The model came with the start.
        finish = '{"usage": {"input": 7, "output": 3}}'
        assert await rig.post("/v1/requests/r%2F1/finish", finish) == (200, TAKEN)
        start_record, first, end = await rig.booked()
        after_ns = time.time_ns()
    assert start_record == RequestRecord(
        request_id="r/1",
        model="m",
        tenant="t",
        engine_id="e",
        arrival_ns=start_record.arrival_ns,
        status=Status.RUNNING,
    )
    assert first == RequestRecord(request_id="r/1", first_token_ns=first.first_token_ns)
    assert end == RequestRecord(
        request_id="r/1", end_ns=end.end_ns, status=Status.FINISHED, usage=Usage(input=7, output=3)
    )
    times = [before_ns - 3_000_000, start_record.arrival_ns, first.first_token_ns, end.end_ns, after_ns + 3_000_000]
    assert times == sorted(times)


async def test_the_live_form_believes_a_client_that_knows_better() -> None:
    async with Rig().running() as rig:
        end_ns = time.time_ns() - 60_000_000_000
        assert await rig.post("/v1/requests/a/finish", f'{{"end_ns": {end_ns}, "status": "cancelled"}}') == (200, TAKEN)
        [record] = await rig.booked()
        assert record == RequestRecord(request_id="a", end_ns=end_ns, status=Status.CANCELLED)
        status, answer = await rig.post("/v1/requests/a/finish", '{"usage": {"output": -1}}')
        assert (status, answer["errors"]) == (
            400,
            [{"line": 1, "field": "usage.output", "message": "expected int >= 0"}],
        )
        status, answer = await rig.post("/v1/requests/a/finish", '{"end_ns": 5, "arrival_ns": 6}')
        assert (status, answer["errors"][0]["field"]) == (400, "end_ns")
        for body in ("[]", "{", b"\xff", "[" * 100_000):
            status, answer = await rig.post("/v1/requests/a/start", body)
            assert (status, answer["error"]["message"][:8]) == (400, "The body")


async def test_asking_for_a_request() -> None:
    async with Rig().running() as rig:
        now_ns = time.time_ns()
        record = {"request_id": "a", "engine_id": "e", "model": "m", "arrival_ns": now_ns, "end_ns": now_ns + 10}
        await rig.post("/v1/requests", json.dumps(record | {"status": "finished", "usage": {"output": 40}}))
        status, answer = await rig.get("/v1/requests/a?wait=5s")
        assert status == 200
        assert answer == {
            "request_id": "a",
            "engine_id": "e",
            "model": "m",
            "tenant": "other",
            "status": "finished",
            "energy_joules": 40.0,
            "low": 39.5,
            "high": 40.5,
            "prefill_joules": 0.0,
            "decode_joules": 40.0,
            "fixed_joules": 0.0,
            "marginal_joules": 40.0,
            "joules_per_output_token": 1.0,
            "method": "steps",
            "final": True,
            "arrival_ns": now_ns,
            "end_ns": now_ns + 10,
        }
        assert (await rig.get("/v1/requests?limit=10"))[1] == {"requests": [answer]}
        status, answer = await rig.get("/v1/requests/nobody")
        assert (status, answer["error"]["message"][:31]) == (404, "This request is not known: its ")
        for wrong in ("x", "-1s", "5", "1e3s"):
            assert (await rig.get(f"/v1/requests/a?wait={wrong}"))[0] == 400
        for wrong in ("0", "1001", "x"):
            assert (await rig.get(f"/v1/requests?limit={wrong}"))[0] == 400


async def test_without_a_token_only_this_machine_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig().running() as rig:
        assert (await rig.get("/v1/ledger"))[0] == 200
        monkeypatch.setattr("jouletrace.web.entrance.is_loopback", lambda address: False)
        status, answer = await rig.get("/v1/ledger")
        assert (status, answer["error"]["message"][:41]) == (403, "Only clients on this machine are answered")
        assert (await rig.post("/v1/requests", '{"request_id":"a"}'))[0] == 403
        assert (await rig.get("/v1/schema"))[0] == 200
        assert rig.inbox.events() == Events()


async def test_with_a_token_it_is_needed() -> None:
    async with Rig(tokens=[WORD]).running() as rig:
        async with rig.session.get(rig.url + "/v1/ledger") as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="jouletrace"'
        for wrong in ("Bearer", "Bearer s3cre", "Basic s3cret", "Bearer s3crét"):
            assert (await rig.get("/v1/ledger", Authorization=wrong))[0] == 401
        host, port = rig.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/ledger HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()
        assert (await rig.get("/v1/ledger", Authorization="bearer s3cret"))[0] == 200
        assert await rig.post("/v1/requests", '{"request_id":"a"}', Authorization="Bearer s3cret") == (200, TAKEN)


async def test_who_waited_while_the_token_was_replaced_is_asked_anew() -> None:
    async with Rig(tokens=[WORD]).running() as rig:
        await rig.post("/v1/requests", '{"request_id":"a","model":"m"}', Authorization=f"Bearer {WORD}")
        await rig.booked()
        waiting = asyncio.create_task(rig.get("/v1/requests/a?wait=300ms", Authorization=f"Bearer {WORD}"))
        await asyncio.sleep(0.1)
        rig.api.entrance.use_tokens(["other"])
        status, answer = await waiting
        assert (status, "ask again" in answer["error"]["message"]) == (503, True)
        assert (await rig.get("/v1/requests/a", Authorization=f"Bearer {WORD}"))[0] == 401
        assert (await rig.get("/v1/requests/a", Authorization="Bearer other"))[0] == 200


async def test_a_page_in_a_browser_is_not_a_client_on_this_machine() -> None:
    async with Rig().running() as rig:
        status, _ = await rig.post("/v1/requests", '{"request_id":"a"}', Origin="http://evil.example")
        assert status == 403
        assert await rig.booked() == []


async def test_times_that_no_account_can_have_are_reported_by_line() -> None:
    async with Rig().running() as rig:
        now_ns = time.time_ns()
        fine, ahead, old = now_ns, now_ns + 12_300_000_000, now_ns - 901_000_000_000
        steps = [{"engine_id": "e", "start_ns": at - 1, "end_ns": at, "decode": ["a"]} for at in (fine, ahead, old)]
        late = {"line": 3, "field": "end_ns", "message": "is older than the 15 minutes that the timeline keeps"}
        assert await rig.post("/v1/steps", "\n".join(map(json.dumps, steps))) == (
            200,
            {
                "accepted": 1,
                "dropped": {"future": 1, "late": 1},
                "errors": [{"line": 2, "field": "end_ns", "message": "lies 12 s in the future"}, late],
            },
        )
        # A request may have arrived long ago, as long as it ends now.
        requests = [
            {"request_id": "a", "arrival_ns": ahead},
            {"request_id": "b", "arrival_ns": old, "end_ns": fine},
            {"request_id": "c", "arrival_ns": old - 1, "end_ns": old},
        ]
        status, answer = await rig.post("/v1/requests", json.dumps(requests))
        assert (status, answer["accepted"], answer["dropped"]) == (200, 1, {"future": 1, "late": 1})
        assert answer["errors"] == [{"line": 1, "field": "arrival_ns", "message": "lies 12 s in the future"}, late]
        status, answer = await rig.post("/v1/requests/d/finish", json.dumps({"end_ns": old}))
        assert (status, answer) == (400, {"accepted": 0, "dropped": {"late": 1}, "errors": [late | {"line": 1}]})
        assert len(await rig.booked()) == 2
        assert rig.inbox.events() == Events({"http": 7}, {("http", "future"): 2, ("http", "late"): 3})


async def test_records_of_an_engine_that_nobody_announced_are_reported_by_line() -> None:
    async with Rig(drain=False).running() as rig:
        now_ns = time.time_ns()
        step = f'{{"engine_id": "typo", "start_ns": {now_ns - 1}, "end_ns": {now_ns}, "decode": ["a"]}}'
        # Without any engine there is nothing to compare with: the ledger decides.
        assert await rig.post("/v1/steps", step) == (200, TAKEN)
        # Waiting in the inbox is as good as known.
        assert await rig.post("/v1/engines", '{"engine_id": "e"}') == (200, TAKEN)
        assert await rig.post("/v1/steps", step.replace("typo", "e")) == (200, TAKEN)
        unknown = {
            "line": 1,
            "field": "engine_id",
            "message": "no engine of this name is known; send it to /v1/engines first",
        }
        refused = {"accepted": 0, "dropped": {"unknown_engine": 1}, "errors": [unknown]}
        assert await rig.post("/v1/steps", step) == (400, refused)
        assert await rig.post("/v1/requests/a/start", '{"engine_id": "typo"}') == (400, refused)
        assert await rig.post("/v1/requests/a/start") == (200, TAKEN)
        assert rig.inbox.events().dropped == {("http", "unknown_engine"): 2}


async def test_a_client_on_a_unix_socket_is_on_this_machine(tmp_path: Path) -> None:
    for tokens, expected in (((), 200), ((WORD,), 401)):
        rig = Rig(drain=False)
        app = web.Application()
        app.add_routes(Api(rig.service, rig.inbox, clock=SystemClock(), tokens=tokens).routes())
        runner = web.AppRunner(app)
        await runner.setup()
        path = str(tmp_path / f"{expected}")
        await web.UnixSite(runner, path).start()
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
                session.get("http://localhost/v1/ledger") as response,
            ):
                assert response.status == expected
        finally:
            await runner.cleanup()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9841", 200),
        ("127.8.9.10:80", 200),
        ("[::1]:9841", 200),
        ("evil.example", 403),
        ("localhost.evil.example:9841", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("[::1", 403),
    ],
)
async def test_a_name_that_was_made_to_point_here_is_not_answered(host: str, status: int) -> None:
    async with Rig().running() as rig:
        assert (await rig.get("/v1/ledger", Host=host))[0] == status
    async with Rig(tokens=[WORD]).running() as rig:
        assert (await rig.get("/v1/ledger", Host=host, Authorization=f"Bearer {WORD}"))[0] == 200


async def test_a_client_that_does_not_send_its_body_is_sent_away() -> None:
    async with Rig(body_seconds=0.2).running() as rig:
        host, port = rig.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/requests HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"408"
        writer.close()
        assert (await rig.post("/v1/requests", '{"request_id":"a"}'))[0] == 200


async def test_a_large_body_does_not_hold_up_others() -> None:
    async with Rig().running() as rig:
        body = b"".join(b'{"request_id":"%d","usage":{"input":12}}\n' % i for i in range(60_000))
        sending = asyncio.create_task(rig.post("/v1/requests", body))
        longest = 0.0
        while not sending.done():
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)
        assert (await sending)[1]["accepted"] == 60_000
        assert longest < 0.2
        assert len(await rig.booked()) == 60_000


def test_the_ledger_document_adds_up() -> None:
    account = LedgerSnapshot(
        settled_ns=5,
        device_joules={"GPU-0": 100.0, "GPU-1": 50.0},
        attributed_joules={("m", "t", "e", Phase.PREFILL): 30.0, ("m", "t", "e", Phase.DECODE): 40.0},
        allocated_joules={("m", "t", "e"): 75.0},
        idle_joules={("GPU-0", "bare"): 20.0, ("GPU-1", "parked"): 45.0},
        unattributed_joules={"GPU-0": 8.0},
        pending_joules={"e": 6.0},
        requests={("m", "t", Status.FINISHED): 3},
        in_flight={"e": 2},
        tokens={("m", "t", "output"): 99},
        units={("m", "t", Unit.IMAGE): 1},
        coverage={"e": 0.5},
    )
    found = ledger_document(account, Events({"http": 4}, {("http", "late"): 1}), SystemClock())
    assert found["totals"] == {
        "device_joules": 150.0,
        "attributed_joules": 70.0,
        "pending_joules": 6.0,
        "idle_joules": 65.0,
        "unattributed_joules": 8.0,
        "residual_joules": 1.0,
    }
    assert found["devices"] == [
        {"uuid": "GPU-0", "device_joules": 100.0, "idle_joules": {"bare": 20.0}, "unattributed_joules": 8.0},
        {"uuid": "GPU-1", "device_joules": 50.0, "idle_joules": {"parked": 45.0}, "unattributed_joules": 0.0},
    ]
    assert found["engines"] == [{"engine_id": "e", "pending_joules": 6.0, "in_flight": 2, "coverage": 0.5}]
    assert found["attributed"][0] == {"model": "m", "tenant": "t", "engine_id": "e", "phase": "prefill", "joules": 30.0}
    assert found["dropped"] == [{"source": "http", "reason": "late", "count": 1}]
    assert json.loads(msgspec.json.encode(found)) == found


async def test_the_schema_is_the_published_one_and_names_every_field() -> None:
    async with Rig().running() as rig, rig.session.get(rig.url + "/v1/schema") as response:
        assert response.content_type == "application/schema+json"
        text = await response.text()
    assert text == Path("docs/schema/records.schema.json").read_text(encoding="utf-8") == records_schema()
    definitions = json.loads(text)["$defs"]
    for struct in (EngineRecord, StepRecord, RequestRecord, Usage):
        assert set(struct.__struct_fields__) <= set(definitions[struct.__name__]["properties"])
    assert definitions["RequestRecord"]["required"] == ["request_id"]
