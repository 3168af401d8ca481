"""The proxy between real sockets: a scripted server behind it, a client before it, a Unix socket for its records."""

import asyncio
import gzip
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.record_inbox import RecordInbox
from tests.unit.test_engines_answers import (
    DONE,
    OLLAMA_LAST,
    OLLAMA_LINE,
    VLLM_FINISH,
    VLLM_ROLE,
    VLLM_TOKEN,
    VLLM_USAGE,
)
from yarl import URL

from jouletrace.engines.proxy import forward
from jouletrace.engines.proxy.forward import Proxy
from jouletrace.engines.proxy.options import Options
from jouletrace.engines.proxy.run import serving

pytestmark = pytest.mark.timeout(20)

CHAT = "/v1/chat/completions"
PLAIN = {
    "id": "chatcmpl-1",
    "model": "tiny",
    "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16},
}
ENERGY = {"request_id": "r1", "energy_joules": 2.5, "low": 2.0, "high": 3.0, "method": "steps", "final": False}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Bench:
    """The proxy, what is before it and what is behind it."""

    proxy: Proxy
    url: str
    session: aiohttp.ClientSession
    inbox: RecordInbox
    seen: list[tuple[web.Request, bytes]] = field(default_factory=list)
    energy: dict[str, Any] | None = None
    energy_status = 200
    energy_seconds = 0.0
    energy_queries: list[dict[str, str]] = field(default_factory=list)
    energy_token: str | None = None


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Return a function that starts a proxy before a handler; its other arguments are the proxy's options."""
    inbox = RecordInbox(tmp_path)
    closing: list[Callable[[], Awaitable[Any]]] = []

    async def begin(handler: Handler | None, **options: Any) -> Bench:
        bench: Bench

        async def behind(request: web.Request) -> web.StreamResponse:
            bench.seen.append((request, await request.read()))
            assert handler is not None
            return await handler(request)

        async def daemon(request: web.Request) -> web.Response:
            bench.energy_queries.append(dict(request.query))
            if bench.energy_token and request.headers.get("Authorization") != f"Bearer {bench.energy_token}":
                return web.json_response({"error": {}}, status=401)
            await asyncio.sleep(bench.energy_seconds)
            if bench.energy is None:
                return web.json_response({"error": {}}, status=404)
            return web.json_response(bench.energy, status=bench.energy_status)

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", behind)
        server = TestServer(app)
        await server.start_server()
        closing.append(server.close)
        energies = web.Application()
        energies.router.add_get("/v1/requests/{id}", daemon)
        desk = TestServer(energies)
        await desk.start_server()
        closing.append(desk.close)
        given = Options(str(server.make_url("")), ("127.0.0.1:0",), inbox.path, jouletrace_api=str(desk.make_url("")))
        running = serving(replace(given, **options))
        proxy, urls = await running.__aenter__()
        closing.append(lambda: running.__aexit__(None, None, None))
        session = aiohttp.ClientSession(auto_decompress=False)
        closing.append(session.close)
        bench = Bench(proxy, urls[0], session, inbox)
        return bench

    yield begin
    for close in reversed(closing):
        await close()
    inbox.close()


def streaming(*events: bytes, content_type: str = "text/event-stream", cut: bool = False) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        for event in events:
            await response.write(event)
            await asyncio.sleep(0)
        if cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handler


async def plain(_: web.Request) -> web.Response:
    return web.json_response(PLAIN)


# --- plain answers ---


async def test_a_plain_answer_with_its_energy(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(plain, engine_id="vllm-0", tenant_headers=("x-tenant",))
    bench.energy = ENERGY
    headers = {"X-Request-Id": "r1", "X-Tenant": "acme", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    before_ns = time.time_ns()
    async with bench.session.post(bench.url + CHAT, json={"model": "tiny", "messages": []}, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["X-Energy-Joules"] == "2.5"
        assert answer.headers["X-Energy-Final"] == "false"
        assert answer.headers["X-Request-Id"] == "r1"
        document = await answer.json()
    assert document == PLAIN | {
        "energy": {
            "energy_joules": 2.5,
            "joules_per_output_token": 0.625,
            "method": "steps",
            "final": False,
            "request_id": "r1",
        }
    }
    request, _ = bench.seen[0]
    assert (request.headers["X-Request-Id"], request.headers["traceparent"]) == ("r1", headers["traceparent"])
    [ended] = await bench.inbox.ended()
    first = bench.inbox.requests()[0]
    assert (first.status, first.engine_id, first.tenant) == ("running", "vllm-0", "acme")
    # A name is not believed before the server has answered to it.
    assert first.model is None
    assert (ended.status, ended.model, ended.trace_id) == ("finished", "tiny", "a" * 32)
    assert ended.usage is not None
    assert (ended.usage.input, ended.usage.output) == (12, 4)
    assert first.arrival_ns is not None
    assert ended.end_ns is not None
    assert before_ns <= first.arrival_ns <= ended.end_ns <= time.time_ns()
    # 150 ms are too little for a final figure: it is not waited for.
    assert bench.energy_queries == [{"engine_id": "vllm-0"}]


async def test_from_a_second_on_the_final_figure_is_waited_for(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(plain, energy_budget_seconds=5.0)
    bench.energy = ENERGY | {"final": True}
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        assert (await answer.json())["energy"]["final"] is True
        assert answer.headers["X-Energy-Final"] == "true"
    assert bench.energy_queries == [{"wait": "4950ms"}]


async def test_a_replaced_token_is_read_again(start: Callable[..., Awaitable[Bench]], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    bench = await start(plain, token_file=file)
    bench.energy, bench.energy_token = ENERGY, "new"
    file.write_text("new\nold\n")
    for asked in (2, 3):  # The first answer has its energy already.
        async with bench.session.post(bench.url + CHAT, json={}) as answer:
            assert (await answer.json())["energy"]["energy_joules"] == 2.5
        assert len(bench.energy_queries) == asked


async def test_other_bytes_of_an_answer_stay(start: Callable[..., Awaitable[Bench]]) -> None:
    body = b'{ "usage" :{"prompt_tokens":1},  "n":1e400, "x":"\\u00e9"\n}\n'

    async def odd(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json", headers={"ETag": '"1"'})

    bench = await start(odd)
    bench.energy = ENERGY
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        content = await answer.read()
        assert "ETag" not in answer.headers
    assert content.startswith(body.rstrip()[:-1])
    assert content.endswith(b"}}\n")
    bench.energy = None
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        assert await answer.read() == body
        assert answer.headers["ETag"] == '"1"'
        assert "X-Energy-Joules" not in answer.headers


@pytest.mark.parametrize(
    "energy",
    [
        *(ENERGY | {"energy_joules": joules} for joules in (0.0, -1.0, "much", None)),
        {},
        [],
    ],
)
async def test_no_figure_is_better_than_a_wrong_one(start: Callable[..., Awaitable[Bench]], energy: Any) -> None:
    bench = await start(plain)
    bench.energy = energy
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        assert await answer.json() == PLAIN


async def test_an_answer_that_has_an_energy_keeps_it(start: Callable[..., Awaitable[Bench]]) -> None:
    async def with_energy(_: web.Request) -> web.Response:
        return web.json_response(PLAIN | {"energy": {"energy_joules": 1.0}})

    bench = await start(with_energy)
    bench.energy = ENERGY
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        assert (await answer.json())["energy"] == {"energy_joules": 1.0}


# --- streams ---


async def test_usage_is_asked_for_and_stripped(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(streaming(VLLM_ROLE, VLLM_TOKEN, VLLM_FINISH, VLLM_USAGE, DONE))
    bench.energy = ENERGY
    question = b'{"model":"tiny","stream":true, "seed": 12345678901234567890}'
    async with bench.session.post(bench.url + CHAT, data=question) as answer:
        content = await answer.read()
    sent = json.loads(bench.seen[0][1])
    assert sent == json.loads(question) | {"stream_options": {"include_usage": True}}
    before, comment, after = content.partition(b": energy ")
    assert before == VLLM_ROLE + VLLM_TOKEN + VLLM_FINISH
    note, _, last = after.partition(b"\n\n")
    assert comment
    assert last == DONE
    assert json.loads(note) == {
        "energy_joules": 2.5,
        "joules_per_output_token": 0.833333,
        "method": "steps",
        "final": False,
        "request_id": "r1",
    }
    [ended] = await bench.inbox.ended()
    assert ended.usage is not None
    assert (ended.usage.input, ended.usage.cached_input, ended.usage.output) == (18, 16, 3)
    assert ended.arrival_ns is not None
    assert ended.first_token_ns is not None
    assert ended.end_ns is not None
    assert ended.arrival_ns < ended.first_token_ns <= ended.end_ns


async def test_usage_that_was_asked_for_stays(start: Callable[..., Awaitable[Bench]]) -> None:
    events = (VLLM_ROLE, VLLM_TOKEN, VLLM_FINISH, VLLM_USAGE, DONE)
    bench = await start(streaming(*events))
    question = b'{"stream":true,"stream_options":{"include_usage":true}}'
    async with bench.session.post(bench.url + CHAT, data=question) as answer:
        assert await answer.read() == b"".join(events)
    assert bench.seen[0][1] == question


async def test_a_server_that_does_not_know_the_option_gets_the_request_as_it_was(
    start: Callable[..., Awaitable[Bench]],
) -> None:
    async def strict(request: web.Request) -> web.StreamResponse:
        if "stream_options" in await request.json():
            return web.json_response({"error": "unknown field"}, status=422)
        return await streaming(VLLM_TOKEN, VLLM_FINISH, DONE)(request)

    bench = await start(strict)
    async with bench.session.post(bench.url + CHAT, data=b'{"stream":true}') as answer:
        assert answer.status == 200
        assert await answer.read() == VLLM_TOKEN + VLLM_FINISH + DONE
    [ended] = await bench.inbox.ended()
    assert (ended.status, ended.usage) == ("finished", None)


async def test_ollamas_last_line_gets_the_energy(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(streaming(OLLAMA_LINE, OLLAMA_LINE, OLLAMA_LAST, content_type="application/x-ndjson"))
    bench.energy = ENERGY
    question = b'{"model":"llama3.2","messages":[]}'
    async with bench.session.post(bench.url + "/api/chat", data=question) as answer:
        lines = (await answer.read()).splitlines()
    assert bench.seen[0][1] == question
    assert [line + b"\n" for line in lines[:2]] == [OLLAMA_LINE, OLLAMA_LINE]
    last = json.loads(lines[2])
    assert last["energy"]["energy_joules"] == 2.5
    assert last["energy"]["joules_per_output_token"] == float(f"{2.5 / 282:.6g}")
    [ended] = await bench.inbox.ended()
    assert ended.usage is not None
    assert (ended.usage.input, ended.usage.output) == (26, 282)


async def test_each_event_goes_on_before_the_next_comes(start: Callable[..., Awaitable[Bench]]) -> None:
    go_on = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(VLLM_TOKEN)
        await go_on.wait()
        await response.write(DONE)
        return response

    bench = await start(slow)
    async with bench.session.post(bench.url + CHAT, json={"stream": True}) as answer:
        assert await answer.content.readexactly(len(VLLM_TOKEN)) == VLLM_TOKEN
        go_on.set()
        assert await answer.content.read() == DONE


# --- what goes wrong ---


async def test_a_client_that_goes_cancels_the_request(start: Callable[..., Awaitable[Bench]]) -> None:
    began, gone = asyncio.Event(), asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(VLLM_TOKEN)
                began.set()
                await asyncio.sleep(0.01)
        finally:
            gone.set()

    bench = await start(endless)
    async with bench.session.post(bench.url + CHAT, json={"stream": True, "model": "tiny"}) as answer:
        await answer.content.readany()
        answer.close()
    await asyncio.wait_for(gone.wait(), 5)
    [ended] = await bench.inbox.ended()
    assert (ended.status, ended.model) == ("cancelled", "tiny")
    assert ended.first_token_ns is not None


async def test_a_client_that_goes_before_the_answer(start: Callable[..., Awaitable[Bench]]) -> None:
    async def thinking(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(10)
        return web.Response()

    bench = await start(thinking)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await bench.session.post(bench.url + CHAT, json={})
    [ended] = await bench.inbox.ended()
    assert ended.status == "cancelled"


async def test_a_stream_that_breaks_off(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(streaming(VLLM_ROLE, VLLM_TOKEN, VLLM_USAGE[:60], cut=True))
    bench.energy = ENERGY
    async with bench.session.post(bench.url + CHAT, json={"stream": True}) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    [ended] = await bench.inbox.ended()
    assert (ended.status, ended.usage) == ("failed", None)
    assert bench.energy_queries == []


async def test_a_stream_that_ends_without_its_end(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(streaming(VLLM_ROLE, VLLM_TOKEN, VLLM_FINISH[:50]))
    async with bench.session.post(bench.url + CHAT, json={"stream": True}) as answer:
        assert await answer.read() == VLLM_ROLE + VLLM_TOKEN + VLLM_FINISH[:50]
    [ended] = await bench.inbox.ended()
    assert ended.status == "failed"


async def test_a_body_that_breaks_off(start: Callable[..., Awaitable[Bench]]) -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"usage": ')
        assert request.transport is not None
        request.transport.abort()
        return response

    bench = await start(broken)
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        assert answer.status == 502
        assert (await answer.json())["error"]["type"] == "upstream_broke_off"
    [ended] = await bench.inbox.ended()
    assert ended.status == "failed"


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_errors_pass(start: Callable[..., Awaitable[Bench]], status: int) -> None:
    async def refusing(_: web.Request) -> web.Response:
        body = b'{"error":{"message":"no"},"usage":{"prompt_tokens":9}}'
        return web.Response(status=status, body=body, headers={"Retry-After": "7"}, content_type="application/json")

    bench = await start(refusing)
    bench.energy = ENERGY
    async with bench.session.post(bench.url + CHAT, json={"model": "no such model"}) as answer:
        assert answer.status == status
        assert answer.headers["Retry-After"] == "7"
        assert await answer.read() == b'{"error":{"message":"no"},"usage":{"prompt_tokens":9}}'
    [ended] = await bench.inbox.ended()
    # A name that the server does not know must not become a label.
    assert (ended.status, ended.model, ended.usage) == ("failed", None, None)


async def test_a_server_that_is_away(
    start: Callable[..., Awaitable[Bench]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bench = await start(None, upstream=f"http://127.0.0.1:{port}")
    for _ in range(3):
        async with bench.session.post(bench.url + CHAT, json={}) as answer:
            assert answer.status == 502
            assert "does not answer" in (await answer.json())["error"]["message"]
    async with bench.session.get(bench.url + "/v1/models") as answer:
        assert answer.status == 502
    assert [record.status for record in await bench.inbox.ended(3)] == ["failed"] * 3
    written = capsys.readouterr()
    assert (written.out + written.err).count("clients get 502") == 1


async def test_without_jouletrace_everything_passes(
    start: Callable[..., Awaitable[Bench]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    bench = await start(plain, jouletrace=str(tmp_path / "nothing"), jouletrace_api=nobody)
    for _ in range(20):
        async with bench.session.post(bench.url + CHAT, json={}) as answer:
            assert await answer.json() == PLAIN
    written = capsys.readouterr()
    assert (written.out + written.err).count("does not tell energies") == 1


async def test_a_jouletrace_that_hangs_delays_one_answer_by_the_budget(
    start: Callable[..., Awaitable[Bench]],
) -> None:
    bench = await start(plain, energy_budget_seconds=0.2)
    bench.energy, bench.energy_seconds = ENERGY, 3.0
    began = time.monotonic()
    for _ in range(10):
        async with bench.session.post(bench.url + CHAT, json={}) as answer:
            assert await answer.json() == PLAIN
    assert 0.2 <= time.monotonic() - began < 0.8
    assert len(bench.energy_queries) == 1


async def test_a_jouletrace_that_refuses(
    start: Callable[..., Awaitable[Bench]], capsys: pytest.CaptureFixture[str]
) -> None:
    bench = await start(plain)
    bench.energy, bench.energy_status = {}, 401
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        assert await answer.json() == PLAIN
    written = capsys.readouterr()
    assert "HTTP status 401" in written.out + written.err


# --- what passes untouched ---


async def test_other_paths_pass_both_ways_piece_by_piece(start: Callable[..., Awaitable[Bench]]) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        response = web.StreamResponse(status=207, reason="Odd", headers={"X-Length": str(len(body))})
        response.headers.add("Set-Cookie", "a=1")
        response.headers.add("Set-Cookie", "b=2")
        await response.prepare(request)
        await response.write(body)
        return response

    bench = await start(echo)
    large = bytes(range(256)) * 4096 * 8

    async def pieces() -> AsyncIterator[bytes]:
        for start_at in range(0, len(large), 1 << 20):
            yield large[start_at : start_at + (1 << 20)]

    url = URL(bench.url + "/api/blobs/sha256:12?x=%2F..%2f&y=a+b", encoded=True)
    async with bench.session.put(url, data=pieces(), headers={"Cookie": "c=3"}) as answer:
        assert (answer.status, answer.reason, answer.headers["X-Length"]) == (207, "Odd", str(len(large)))
        assert answer.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        assert await answer.read() == large
    request, _ = bench.seen[0]
    assert request.raw_path == "/api/blobs/sha256:12?x=%2F..%2f&y=a+b"
    assert request.headers["Cookie"] == "c=3"
    assert bench.inbox.read() == []


async def test_headers_of_one_connection_stay_behind(start: Callable[..., Awaitable[Bench]]) -> None:
    async def odd(_: web.Request) -> web.Response:
        return web.Response(text="x", headers={"Keep-Alive": "timeout=9", "X-Own": "1", "Connection": "X-Own"})

    bench = await start(odd)
    headers = {"TE": "trailers", "Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-End": "2", "User-Agent": "mine"}
    async with bench.session.get(bench.url + "/v1/models", headers=headers) as answer:
        assert "Keep-Alive" not in answer.headers
        assert "X-Own" not in answer.headers
    seen = bench.seen[0][0].headers
    assert not {"TE", "X-Hop"} & set(seen)
    assert (seen["X-End"], seen["User-Agent"]) == ("2", "mine")
    assert seen["Host"] != bench.url.removeprefix("http://")


async def test_compressed_answers_pass_unread(start: Callable[..., Awaitable[Bench]]) -> None:
    packed = gzip.compress(json.dumps(PLAIN).encode())

    async def compressing(_: web.Request) -> web.Response:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"}, content_type="application/json")

    bench = await start(compressing)
    bench.energy = ENERGY
    async with bench.session.post(bench.url + CHAT, json={}, headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert await answer.read() == packed
    assert bench.seen[0][0].headers["Accept-Encoding"] == "identity"
    async with bench.session.get(bench.url + "/v1/models", headers={"Accept-Encoding": "gzip"}) as answer:
        assert await answer.read() == packed
    assert bench.seen[1][0].headers["Accept-Encoding"] == "gzip"
    [ended] = await bench.inbox.ended()
    assert (ended.status, ended.usage) == ("finished", None)


async def test_a_compressed_request_passes_as_it_is(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(plain)
    packed = gzip.compress(b'{"stream":true}')
    async with bench.session.post(bench.url + CHAT, data=packed, headers={"Content-Encoding": "gzip"}) as answer:
        assert await answer.json() == PLAIN
    # The server behind has unpacked it, so it came with its header.
    assert bench.seen[0][1] == b'{"stream":true}'


async def test_bodies_too_large_to_look_at_pass(
    start: Callable[..., Awaitable[Bench]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "LOOKED_AT_BYTES", 100_000)

    async def large(_: web.Request) -> web.Response:
        return web.json_response(PLAIN | {"filler": "y" * 300_000})

    bench = await start(large)
    bench.energy = ENERGY
    question = json.dumps({"stream": True, "filler": "x" * 300_000}).encode()
    async with bench.session.post(bench.url + CHAT, data=question) as answer:
        assert await answer.json() == PLAIN | {"filler": "y" * 300_000}
    assert bench.seen[0][1] == question
    assert bench.proxy.held_bytes == 0
    [ended] = await bench.inbox.ended()
    assert (ended.status, ended.usage) == ("finished", None)


@pytest.mark.parametrize(
    "body", [b"", b"not json", b"[1]", b'{"stream":tru', b"[" * 50_000, b'{"stream":true,"stream_options":7}']
)
async def test_bodies_that_make_no_sense_pass(start: Callable[..., Awaitable[Bench]], body: bytes) -> None:
    bench = await start(plain)
    async with bench.session.post(bench.url + CHAT, data=body) as answer:
        assert await answer.json() == PLAIN
    assert bench.seen[0][1] == body


async def test_websockets_are_refused(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(plain)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await bench.session.ws_connect(bench.url + "/v1/realtime")
    assert refusal.value.status == 501
    assert bench.seen == []


async def test_many_at_once_are_told_apart(start: Callable[..., Awaitable[Bench]]) -> None:
    async def own(request: web.Request) -> web.StreamResponse:
        number = int(request.headers["X-Request-Id"].removeprefix("r-"))
        usage = {"choices": [], "usage": {"prompt_tokens": number, "completion_tokens": 2 * number}}
        event = b"data: " + json.dumps(usage).encode() + b"\n\n"
        return await streaming(*([VLLM_TOKEN] * (number % 7)), VLLM_FINISH, event, DONE)(request)

    bench = await start(own)

    async def ask(number: int) -> bytes:
        headers = {"X-Request-Id": f"r-{number}"}
        async with bench.session.post(bench.url + CHAT, json={"stream": True}, headers=headers) as answer:
            return await answer.read()

    # No more than the kernel keeps for the socket (net.unix.max_dgram_qlen): nobody empties it meanwhile.
    for first in range(1, 41, 3):
        numbers = range(first, first + 3)
        contents = await asyncio.gather(*map(ask, numbers))
        assert contents == [VLLM_TOKEN * (number % 7) + VLLM_FINISH + DONE for number in numbers]
        bench.inbox.read()
    ended = {record.request_id: record for record in await bench.inbox.ended(42)}
    for number in range(1, 43):
        usage = ended[f"r-{number}"].usage
        assert usage is not None
        assert (usage.input, usage.output) == (number, 2 * number)


async def test_an_engine_is_announced_when_asked_for(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(plain, engine_id="ollama-0", engine_kind="ollama", gpu_uuids=("GPU-1",))
    for _ in range(200):
        if bench.inbox.read():
            break
        await asyncio.sleep(0.01)
    [engine] = bench.inbox.read()
    assert (engine.engine_id, engine.kind, engine.gpu_uuids, engine.pid) == ("ollama-0", "ollama", ("GPU-1",), None)


async def test_requests_without_an_id_get_one(start: Callable[..., Awaitable[Bench]]) -> None:
    bench = await start(plain)
    async with bench.session.post(bench.url + CHAT, json={}) as answer:
        given = answer.headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", given)
    assert bench.seen[0][0].headers["X-Request-Id"] == given
    [ended] = await bench.inbox.ended()
    assert ended.request_id == given
