import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console
from tests.snapshots import (
    NOW_NS,
    SECOND_NS,
    diagnosis_snapshot,
    full_device,
    ledger_snapshot,
    lost_device,
    node_snapshot,
)

from jouletrace import top
from jouletrace.cli import main
from jouletrace.clock import SystemClock
from jouletrace.requests.account import Method, RequestEnergy
from jouletrace.requests.records import Status
from jouletrace.web.health import Readiness
from jouletrace.web.live.document import Moment, encode, node_document, requests_document
from jouletrace.web.serve import WebServer

NOW_MS = NOW_NS // 1_000_000
REQUEST = RequestEnergy(
    "chat-[red]1\x1b[2J", "vllm-0", "llama-3.1-8b", "acme", Status.FINISHED, 41.3, 40.0, 42.0, 8.1, 33.2, 20.0, 21.3,
    0.32, Method.STEPS, True, NOW_NS - 3 * SECOND_NS, NOW_NS - SECOND_NS,
)  # fmt: skip


def a_round(refused: str | None = None) -> dict[str, Any]:
    """Return the events of a round as they are on the wire."""
    clock = SystemClock()
    devices = (full_device(0), lost_device(1))
    moment = Moment(
        NOW_NS,
        node_snapshot(*devices),
        Readiness(ready=True),
        ledger_snapshot(),
        diagnosis_snapshot(),
        stale_after_seconds=5,
    )
    trace = {
        full_device(0).info.uuid: {"start_ms": NOW_MS - 60_000, "steps_ms": [20] * 3000, "watts": [100, 700] * 1500}
    }
    told: dict[str, Any] = {
        "hello": {"version": "1.2.3", "interval_seconds": 1, "window_seconds": 60, "requests_refused": refused},
        "trace": trace,
        "node": node_document(moment, clock),
    }
    if refused is None:
        told["requests"] = requests_document([], [REQUEST], clock)
    return {name: json.loads(encode(name, data).split(b"data: ")[1]) for name, data in told.items()}


def seen(refused: str | None = None) -> top.Seen:
    known = top.Seen()
    for name, data in a_round(refused).items():
        known.take(name, data)
    return known


def screen(known: top.Seen, width: int = 160, height: int | None = 40, encoding: str = "utf-8", **options: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=file, width=width, highlight=False)
    console.print(top.view(known, "http://n:9841", top.Look.of(console), height=height, **options))
    file.flush()
    buffer = file.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(encoding)


@contextlib.asynccontextmanager
async def served(*rounds: dict[str, Any], status: int = 200, port: str = "0") -> AsyncIterator[str]:
    """Serve rounds and then keep silent."""

    async def get(request: web.Request) -> web.StreamResponse:
        if status != 200:
            return web.json_response({"error": {"message": "32 viewers are looking already."}}, status=status)
        response = web.StreamResponse()
        await response.prepare(request)
        text = b"".join(encode(name, data) for one in rounds for name, data in one.items())
        # In pieces that split events anywhere.
        for at in range(0, len(text), 1000):
            await response.write(text[at : at + 1000])
        await asyncio.sleep(3600)
        return response

    app = web.Application()
    app.router.add_get("/v1/live", get)
    server = WebServer(app, shutdown_seconds=0.1)
    await server.start([f"127.0.0.1:{port}"])
    try:
        yield server.urls[0]
    finally:
        await server.stop()


def test_the_screen_has_what_the_page_has() -> None:
    text = screen(seen())
    for part in (
        "431 W of 700 W, 1 GPU, 17 requests in flight, waste 12.3 kJ",
        "requests 80 kJ, idle bare 5.01 kJ parked 7.5 kJ, unattributed 7 kJ",
        "memory bound 95 %",
        "for 60 s: while active, memory is at 61 % of its peak",
        "idle bare 79 W parked 122 W, idle energy bare 5 kJ parked 7.5 kJ",
        "tensor 72 W",
        "dram intensity ratio 0.61",
        "waste parked 12.3 kJ",
        "LOST: The GPU has fallen off the bus",
        "17 in flight, 5 waiting  small batch 90 %  0.512 J/token  batch 8, B* 47.5  coverage 98 %",
        "Batch 8 is under B* = 48",
        "acme",
        "41.3 J",
        "0.32 J",
        "2.0 s",
    ):
        assert part in text, part


def test_texts_of_others_drive_no_terminal() -> None:
    text = screen(seen())
    assert "chat-[red]1�[2J" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("height", [8, 12, 24, 40])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_terminal(width: int, height: int) -> None:
    lines = screen(seen(), width, height, problem="x", has_keys=True).splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert lines[-1].startswith("q quit")
    assert any("GPU 0" in line for line in lines)


def test_eight_gpus_fit_a_small_terminal() -> None:
    known = seen()
    one = known.node["devices"][0]
    known.node = {**known.node, "devices": [{**one, "gpu": gpu} for gpu in range(8)]}
    text = screen(known, 80, 24, has_keys=True)
    assert all(f"GPU {gpu} " in text for gpu in range(8))
    assert len(text.splitlines()) <= 24


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_neither_flags_nor_waste_nor_that_what_is_shown_is_old(width: int) -> None:
    text = screen(seen(), width, 24, problem=f"Old, trying again in 3 s: {'x' * 200}", has_keys=True)
    assert "power capped" in text
    assert "Old, trying again in 3 s" in text
    assert "waste 12.3 kJ" in text


def test_before_anything_is_known_nothing_is_0() -> None:
    known = seen()
    account = {**known.node["account"], "settled_ms": None, "wasted_joules": {}, "attributed_joules": 0.0}
    known.node = {**known.node, "account": account, "devices": []}
    text = screen(known)
    assert "no power known, waste 0 J" in text
    assert "requests 0 J" not in text


def test_power_that_nobody_knows_is_not_0() -> None:
    known = seen()
    known.node["devices"][0]["watts"] = None
    assert "? W of 700 W" in screen(known)
    assert " 0 W of" not in screen(known)


def test_ascii_terminals_get_ascii() -> None:
    text = screen(seen(), encoding="ascii")
    [line] = [line for line in text.splitlines() if "GPU 0" in line]
    # 400 of 700 W is the fifth of nine letters.
    assert line.count("=") > 20


def test_without_entitlement_it_says_why() -> None:
    text = screen(seen("The token is missing or wrong."))
    assert "Requests are not shown. The token is missing or wrong." in text
    assert "acme" not in text


def test_the_sparkline_is_the_mean_over_time() -> None:
    points = [(ms, 700.0 if ms < 30_000 else 350.0) for ms in range(0, 60_000, 20)]
    assert top.sparkline(points, 60_000, 6, 700.0) == "███▄▄▄"
    # No data is not the same as no power.
    assert top.sparkline([(50_000.0, 0.0)], 60_000, 6, 700.0) == "     ▁"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 J"), (4.4e-16, "0 J"), (0.0512, "0.0512 J"), (99.96, "100 J"), (1234, "1.23 kJ"), (3.6e6, "3.6 MJ")],
)
def test_joules(value: float, text: str) -> None:
    assert top.joules(value) == text


def test_a_trace_goes_on_and_forgets() -> None:
    known = seen()
    uuid = full_device(0).info.uuid
    assert len(known.traces[uuid]) == 3000
    # What is known already does not count twice.
    known.take("trace", {uuid: {"start_ms": NOW_MS - 1000, "steps_ms": [20] * 100, "watts": [50] * 100}})
    assert len(known.traces[uuid]) == 3001
    assert known.traces[uuid][-1] == (NOW_MS + 1000, 50)
    assert sum(watts == 50 for _, watts in known.traces[uuid]) == 50


def test_a_trace_goes_on_when_somebody_sets_the_clock_back() -> None:
    known = top.Seen()
    known.take("trace", {"a": {"start_ms": 3_600_000, "steps_ms": [20] * 100, "watts": [300] * 100}})
    # A device that stands still is told again, with other roundings.
    known.take("trace", {"a": {"start_ms": 3_600_999, "steps_ms": [1000], "watts": [300]}})
    assert len(known.traces["a"]) == 100
    known.take("trace", {"a": {"start_ms": 2000, "steps_ms": [20, 20], "watts": [200, 100]}})
    assert list(known.traces["a"]) == [(2020, 200), (2040, 100)]


def test_of_what_nobody_knows_nothing_is_drawn() -> None:
    known = top.Seen()
    known.take("trace", {"a": {"start_ms": 0, "steps_ms": [1000, 8000, 1000], "watts": [300, None, 300]}})
    assert list(known.traces["a"]) == [(1000, 300), (10_000, 300)]


async def run_top(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "jouletrace", "top", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_once_and_json() -> None:
    first, second = a_round(), a_round()
    async with served(first, second) as url:
        code, out, err = await run_top(url, "--once")
        assert (code, err) == (0, "")
        assert "memory bound" in out
        assert "\x1b" not in out
        code, out, err = await run_top(url, "--once", "--json")
        assert (code, err) == (0, "")
        assert json.loads(out) == first


async def test_json_is_an_object_a_line() -> None:
    one = a_round()
    later = {name: data for name, data in one.items() if name != "hello"}
    async with served(one, later, later) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "jouletrace", "top", url, "--json", stdout=subprocess.PIPE, limit=1 << 20
        )
        assert process.stdout is not None
        lines = [json.loads(await asyncio.wait_for(process.stdout.readline(), 20)) for _ in range(3)]
        process.kill()
        await process.wait()
    assert lines == [one, later, later]


async def test_what_goes_wrong_is_one_sentence() -> None:
    async with served(status=503) as url:
        code, out, err = await run_top(url, "--once")
        assert (code, out, err) == (1, "", f"jouletrace: {url}: 32 viewers are looking already.\n")
    code, out, err = await run_top(url, "--json")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"jouletrace: {url} cannot be reached \(.+\); is `jouletrace run` running there, .+\n", err)


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["top"]) == 1
    assert "top needs a terminal; in a script use --once, --json or both" in capsys.readouterr().err
    word = tmp_path / "word"
    word.write_text("s3cret\n")
    for arguments, problem in {
        ("--token-file", "/no"): "--token-file: /no cannot be read (No such file or directory)",
        ("--user", "ops"): "--user and --password-file go together",
        ("--user", "ops", "--password-file", str(word), "--token-file", str(word)): "exclude each other",
        ("https://n:1", "--ca-file", str(word)): f"--ca-file: {word} cannot be used",
        ("https://n:1", "--ca-file", "/no"): "--ca-file: /no cannot be used (No such file or directory)",
        ("https://n:1", "--cert-file", str(word)): f"--key-file: {word} cannot be used",
        ("https://n:1", "--key-file", str(word)): "--key-file goes with --cert-file",
        ("http://n:1", "--ca-file", str(word)): "are for a URL that begins with https://",
        ("unix:/run/web.sock", "--cert-file", str(word)): "are for a URL that begins with https://",
        ("node-7:9841",): "node-7:9841: is not where a daemon can be; write http://HOST:PORT",
        ("https://ops:s3cret@n:1",): "n:1: is not where a daemon can be",
    }.items():
        assert main(["top", "--once", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert problem in told
        assert "s3cret" not in told


def test_without_an_address_a_socket_that_listens_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "web.sock"
    monkeypatch.setattr(top, "DEFAULT_SOCKET", path)
    assert top.find_target(None).name == "http://127.0.0.1:9841"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        # Nobody listens there any more.
        assert top.find_target(None).socket is None
        sock.listen()
        assert top.find_target(None).socket == path


def test_secrets_are_not_in_what_a_traceback_shows(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("s3cret")
    target = top.find_target("http://n:1", user="ops", password_file=tmp_path / "word")
    # RFC 7617 section 2: base64("ops:s3cret").
    assert target.headers() == {"Authorization": "Basic b3BzOnMzY3JldA=="}
    assert "b3BzOnMzY3JldA" not in repr(target)


def test_a_replaced_token_counts_for_the_next_connection(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\nnew\n")
    target = top.find_target("http://n:1", token_file=file)
    assert target.headers() == {"Authorization": "Bearer old"}
    file.write_text("new\n")
    assert target.headers() == {"Authorization": "Bearer new"}


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.settings = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jouletrace", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
        )
        self.text = ""

    def until(self, what: str, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while what not in self.text:
            assert time.monotonic() < deadline, f"in vain: {what}; the terminal:\n{self.text[-3000:]}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.text += os.read(self._master, 65536).decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._slave) == self.settings

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)
        os.close(self._slave)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    made = Terminal(*arguments)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("ends_by", ["q", signal.SIGTERM, signal.SIGINT])
async def test_the_terminal_is_left_as_it_was(ends_by: str | signal.Signals) -> None:
    async with served(a_round()) as url:
        with terminal("top", url) as shown:
            await asyncio.to_thread(shown.until, "memory bound")
            assert "\x1b[?1049h" in shown.text  # The alternate screen (xterm control sequences).
            shown.press("p")
            await asyncio.to_thread(shown.until, "on hold")
            if isinstance(ends_by, str):
                shown.press(ends_by)
            else:
                shown.process.send_signal(ends_by)
            await asyncio.to_thread(shown.until, "\x1b[?1049l")
            assert await asyncio.to_thread(shown.process.wait, 5) == 0
            assert shown.is_as_before()


async def test_it_says_that_it_tries_again_and_comes_back() -> None:
    async with served(a_round()) as url:
        port = url.rpartition(":")[2]
    with terminal("top", url) as shown:
        await asyncio.to_thread(shown.until, "trying again in 1 s")
        async with served(a_round(), port=port):
            await asyncio.to_thread(shown.until, "memory bound")
            shown.press("q")
            assert await asyncio.to_thread(shown.process.wait, 5) == 0
