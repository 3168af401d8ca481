"""The middleware around ASGI applications that answer as vLLM and transformers do, message by message."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

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

from jouletrace.engines.middleware import App, EnergyMiddleware, Message, Receive, Scope, Send

pytestmark = pytest.mark.timeout(20)

EVENTS = (VLLM_ROLE, VLLM_TOKEN, VLLM_FINISH, VLLM_USAGE, DONE)
PLAIN = {"model": "tiny", "choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 4}}
ENERGY = {"request_id": "r1", "energy_joules": 2.5, "method": "steps", "final": False}


@pytest.fixture
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordInbox]:
    found = RecordInbox(tmp_path)
    monkeypatch.setenv("JOULETRACE_DATAGRAM_SOCKET", found.path)
    yield found
    found.close()


@pytest.fixture
async def daemon(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, Any]]:
    """Serve an energy; the answer and the seconds that it takes may be changed."""
    state: dict[str, Any] = {"energy": ENERGY, "seconds": 0.0, "asked": 0}

    async def get(_: web.Request) -> web.Response:
        state["asked"] += 1
        await asyncio.sleep(state["seconds"])
        return web.json_response(state["energy"])

    app = web.Application()
    app.router.add_get("/v1/requests/{id}", get)
    server = TestServer(app)
    await server.start_server()
    monkeypatch.setenv("JOULETRACE_URL", str(server.make_url("")))
    monkeypatch.setenv("JOULETRACE_ENERGY", "1")
    yield state
    await server.close()


def answering(*bodies: bytes, content_type: str = "text/event-stream", status: int = 200) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def ask(app: App, *, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None) -> list[Message]:
    """Return what the application has sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    await app(scope, receive, send)
    return sent


def body(sent: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


async def test_a_stream_passes_as_it_is_and_is_told(inbox: RecordInbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULETRACE_ENGINE_ID", "vllm-0")
    monkeypatch.setenv("JOULETRACE_TENANT_HEADERS", "x-team, X-Tenant")
    app = EnergyMiddleware(answering(*EVENTS))
    headers = {"X-Request-Id": "r1", "X-Tenant": "acme", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    sent = await ask(app, headers=headers)
    assert [message.get("body") for message in sent[1:]] == [*EVENTS, b""]
    [ended] = await inbox.ended()
    assert (ended.request_id, ended.engine_id, ended.tenant, ended.trace_id) == ("r1", "vllm-0", "acme", "a" * 32)
    assert (ended.status, ended.model) == ("finished", "tiny")
    assert ended.usage is not None
    assert (ended.usage.input, ended.usage.cached_input, ended.usage.output) == (18, 16, 3)
    assert [record.status for record in inbox.requests()] == ["running", "running", "finished"]
    assert ended.arrival_ns is not None
    assert ended.first_token_ns is not None
    assert ended.end_ns is not None
    assert ended.arrival_ns <= ended.first_token_ns <= ended.end_ns


async def test_no_message_is_held_back(inbox: RecordInbox) -> None:
    go_on = asyncio.Event()
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answering(VLLM_TOKEN[:40])(scope, receive, send)
        await go_on.wait()

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        seen.append(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    task = asyncio.create_task(EnergyMiddleware(app)(scope, receive, send))
    await asyncio.sleep(0.05)
    assert seen == [b"", VLLM_TOKEN[:40], b""]
    go_on.set()
    await task


async def test_a_stream_gets_the_energy_before_its_end(inbox: RecordInbox, daemon: dict[str, Any]) -> None:
    sent = await ask(EnergyMiddleware(answering(*EVENTS)), headers={"X-Request-Id": "r1"})
    before, _, after = body(sent).partition(b": energy ")
    note, _, last = after.partition(b"\n\n")
    assert before == b"".join(EVENTS[:-1])
    assert last == DONE
    assert json.loads(note) == {
        "energy_joules": 2.5,
        "joules_per_output_token": 0.833333,
        "method": "steps",
        "final": False,
        "request_id": "r1",
    }


async def test_the_end_may_share_its_message(inbox: RecordInbox, daemon: dict[str, Any]) -> None:
    sent = await ask(EnergyMiddleware(answering(b"".join(EVENTS))))
    assert body(sent).startswith(b"".join(EVENTS[:-1]) + b': energy {"energy_joules": 2.5')
    assert body(sent).endswith(b"}\n\n" + DONE)


async def test_an_end_that_is_cut_in_two_goes_without(inbox: RecordInbox, daemon: dict[str, Any]) -> None:
    sent = await ask(EnergyMiddleware(answering(*EVENTS[:-1], DONE[:9], DONE[9:])))
    assert body(sent) == b"".join(EVENTS)
    [ended] = await inbox.ended()
    assert ended.status == "finished"


async def test_a_plain_answer_gets_a_header(inbox: RecordInbox, daemon: dict[str, Any]) -> None:
    content = json.dumps(PLAIN).encode()
    sent = await ask(EnergyMiddleware(answering(content[:30], content[30:], content_type="application/json")))
    assert [message["type"].rpartition(".")[2] for message in sent] == ["start", "body", "body", "body"]
    headers = dict(sent[0]["headers"])
    assert (headers[b"x-energy-joules"], headers[b"x-energy-final"]) == (b"2.5", b"false")
    assert body(sent) == content
    ended = (await inbox.ended())[-1]
    assert ended.usage is not None
    assert (ended.model, ended.usage.input, ended.usage.output) == ("tiny", 12, 4)


async def test_a_large_answer_is_read_at_its_ends(inbox: RecordInbox) -> None:
    embeddings = [{"object": "embedding", "embedding": [0.125] * 5000} for _ in range(20)]
    document = {"object": "list", "model": "bge-m3", "data": embeddings, "usage": {"prompt_tokens": 640}}
    content = json.dumps(document).encode()
    assert len(content) > 500_000
    pieces = [content[at : at + 50_000] for at in range(0, len(content), 50_000)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": pieces[-1]})

    assert body(await ask(EnergyMiddleware(app), path="/v1/embeddings")) == content
    [ended] = await inbox.ended()
    assert ended.usage is not None
    assert (ended.model, ended.usage.input, ended.usage.output) == ("bge-m3", 640, 0)


async def test_json_lines(inbox: RecordInbox) -> None:
    app = EnergyMiddleware(answering(OLLAMA_LINE, OLLAMA_LAST, content_type="application/x-ndjson"))
    assert body(await ask(app, path="/api/chat")) == OLLAMA_LINE + OLLAMA_LAST
    [ended] = await inbox.ended()
    assert ended.usage is not None
    assert (ended.status, ended.usage.output) == ("finished", 282)


async def test_the_application_learns_the_id(inbox: RecordInbox) -> None:
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))
        await answering(*EVENTS)(scope, receive, send)

    await ask(EnergyMiddleware(app), headers={"Host": "h"})
    [ended] = await inbox.ended()
    assert seen == [{b"host": b"h", b"x-request-id": ended.request_id.encode()}]


@pytest.mark.parametrize(
    ("app", "status"),
    [
        (answering(b'{"error": {"message": "no such model"}}', content_type="application/json", status=404), "failed"),
        (answering(VLLM_TOKEN, b'data: {"error": {"message": "CUDA"}}\n\n', DONE), "failed"),
        (answering(VLLM_TOKEN, VLLM_FINISH[:30]), "failed"),
    ],
)
async def test_what_fails(inbox: RecordInbox, app: App, status: str) -> None:
    await ask(EnergyMiddleware(app))
    [ended] = await inbox.ended()
    assert ended.status == status


async def test_an_application_that_raises(inbox: RecordInbox) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(EnergyMiddleware(app))
    [ended] = await inbox.ended()
    assert ended.status == "failed"


async def test_a_client_that_goes(inbox: RecordInbox) -> None:
    # As uvicorn and starlette do it: the application learns of it from `receive`, and ends its stream.
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": VLLM_TOKEN, "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await EnergyMiddleware(app)(scope, receive, send)
    [ended] = await inbox.ended()
    assert (ended.status, ended.model) == ("cancelled", "tiny")


async def test_a_request_that_is_cancelled(inbox: RecordInbox) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(10)

    task = asyncio.create_task(ask(EnergyMiddleware(app)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [ended] = await inbox.ended()
    assert ended.status == "cancelled"


async def test_a_jouletrace_that_hangs_delays_one_answer(inbox: RecordInbox, daemon: dict[str, Any]) -> None:
    daemon["seconds"] = 3.0
    app = EnergyMiddleware(answering(*EVENTS))
    began = time.monotonic()
    for _ in range(10):
        assert body(await ask(app)) == b"".join(EVENTS)
    assert 0.15 <= time.monotonic() - began < 0.8
    assert daemon["asked"] == 1


async def test_without_jouletrace_everything_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JOULETRACE_DATAGRAM_SOCKET", str(tmp_path / "nothing"))
    monkeypatch.setenv("JOULETRACE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("JOULETRACE_ENERGY", "1")
    assert body(await ask(EnergyMiddleware(answering(*EVENTS)))) == b"".join(EVENTS)


async def test_other_requests_are_not_touched(inbox: RecordInbox) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"scope": scope})

    given: list[Scope] = [
        {"type": "http", "method": "GET", "path": "/v1/models", "headers": []},
        {"type": "websocket", "path": "/v1/chat/completions"},
        {"type": "lifespan"},
    ]
    for scope in given:
        seen: list[Message] = []

        async def send(message: Message, seen: list[Message] = seen) -> None:
            seen.append(message)

        async def receive() -> Message:
            return {}

        await EnergyMiddleware(app)(scope, receive, send)
        assert seen[0]["scope"] is scope
    assert inbox.read() == []


async def test_the_engine_is_announced(inbox: RecordInbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULETRACE_ENGINE_ID", "flux-0")
    monkeypatch.setenv("JOULETRACE_ENGINE_KIND", "diffusion")
    middleware = EnergyMiddleware(answering())
    await ask(middleware)
    await inbox.ended()
    [engine] = [record for record in inbox.records if not hasattr(record, "request_id")]
    # The kernel tells the daemon which process sent it.
    assert (engine.engine_id, engine.kind, engine.pid) == ("flux-0", "diffusion", None)


@pytest.mark.parametrize("seconds", ["soon", "-1", "31", "nan"])
def test_a_budget_that_makes_no_sense_does_not_stop_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: str
) -> None:
    monkeypatch.setenv("JOULETRACE_ENERGY", "1")
    monkeypatch.setenv("JOULETRACE_ENERGY_BUDGET", seconds)
    monkeypatch.setenv("JOULETRACE_TOKEN_FILE", "/nowhere")
    EnergyMiddleware(answering())
    assert "is not a number of seconds" in caplog.text
    assert "/nowhere cannot be read" in caplog.text


def test_nothing_else_is_imported() -> None:
    code = (
        "import sys; before = set(sys.modules); import jouletrace.engines.middleware\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "['jouletrace']\n"
