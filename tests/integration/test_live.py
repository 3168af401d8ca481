"""The live monitor in a real Chromium, on the whole daemon with simulated GPUs."""

import asyncio
import contextlib
import json
import re
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest
from tests.chromium import PROGRAM, Chromium, Page
from tests.daemon_process import DaemonProcess, simulated
from tests.nvml_shim import Constant, Device, Fault, Process, Scenario, Square, write_control

from jouletrace.web.live.figures import all_figures

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]

BUSY = {"graphics_util": "95", "sm_util": "90", "any_tensor_util": "40", "dram_bw_util": "60"}
UUIDS = ("GPU-live-0", "GPU-live-1")
LIVE = "document.getElementById('connection').dataset.state == 'live'"
CARD = "document.querySelector('#gpus article:nth-child({})')"

BASICS = r"""
(() => {
  const wrong = [];
  const shown = (e) => e.checkVisibility() && getComputedStyle(e).visibility !== 'hidden';
  const named = (e) => (e.getAttribute('aria-label') || e.textContent || '').trim() ||
    e.labels?.length || document.getElementById(e.getAttribute('aria-labelledby'));
  for (const e of document.querySelectorAll('a, button, input, summary, [role=img], [role=region], article, section'))
    if (shown(e) && !named(e)) wrong.push(`without a name: ${e.outerHTML.slice(0, 80)}`);
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  for (const id of ids) if (ids.filter((other) => other === id).length > 1) wrong.push(`id twice: ${id}`);
  for (const e of document.querySelectorAll('[aria-labelledby]'))
    if (!document.getElementById(e.getAttribute('aria-labelledby')))
      wrong.push(`label is gone: ${e.outerHTML.slice(0, 80)}`);
  let level = 0;
  for (const e of document.querySelectorAll('h1, h2, h3, h4')) {
    if (!shown(e)) continue;
    const next = Number(e.tagName[1]);
    if (next > level + 1) wrong.push(`a heading is left out before: ${e.textContent}`);
    level = next;
  }
  if (document.querySelectorAll('main').length !== 1 || document.querySelectorAll('h1').length !== 1)
    wrong.push('not one main and one h1');
  // Contrast (WCAG 2.2, 1.4.3): every piece of text against the first background behind it.
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const part = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !shown(e) || e.closest('.unseen, .skip, .chart')) continue;
    let behind = e;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(rgba(getComputedStyle(behind).backgroundColor))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(1)}: ${e.textContent.slice(0, 40)}`);
  }
  return wrong;
})()
"""


def two_gpus(control: Path | None = None) -> Scenario:
    return Scenario(
        [
            Device(
                "h200",
                Square(150, 650, period_s=0.5),
                gpm=BUSY,
                uuid=UUIDS[0],
                processes=[Process(4242, memory_mib=90_000)],
            ),
            Device("h200", Constant(80), uuid=UUIDS[1]),
        ],
        control=control,
    )


def post(daemon: DaemonProcess, path: str, **record: Any) -> None:
    request = urllib.request.Request(daemon.url + path, json.dumps(record).encode())
    with urllib.request.urlopen(request, timeout=3) as answer:
        assert answer.status == 200


class Relay:
    """A way to the daemon that can be cut, blocked and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        self._passes = asyncio.Event()
        self._passes.set()
        self.is_open = True
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.mend()
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        self.is_open = False
        for writer in self._writers:
            writer.transport.abort()

    def block(self) -> None:
        self._passes.clear()

    def mend(self) -> None:
        self.is_open = True
        self._passes.set()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            writer.transport.abort()
            return
        there = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, there[1]}
        await asyncio.gather(self._pass_on(reader, there[1]), self._pass_on(there[0], writer))
        self._writers -= {writer, there[1]}

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(65536):
                await self._passes.wait()
                writer.write(part)
        writer.close()


@contextlib.asynccontextmanager
async def opened(folder: Path, url: str, width: int = 1400) -> AsyncIterator[Page]:
    async with Chromium(folder) as browser:
        page = await browser.page(width)
        await page.open(url)
        yield page


async def test_content_and_updates(library: Path, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, two_gpus())) as daemon:
        daemon.until("readiness", daemon.ready)
        post(daemon, "/v1/engines", engine_id="vllm-0", kind="vllm", models=["llama"], gpu_uuids=[UUIDS[0]])
        now_ns = time.time_ns()
        ended = {"arrival_ns": now_ns - 2_000_000_000, "first_token_ns": now_ns - 1_900_000_000, "end_ns": now_ns}
        usage = {"input": 64, "output": 32}
        who = {"model": "llama", "tenant": "<b>acme</b>", "engine_id": "vllm-0"}
        post(daemon, "/v1/requests", request_id="done-1", status="finished", usage=usage, **who, **ended)
        post(daemon, "/v1/requests/open-1/start", **who)
        post(daemon, "/v1/requests/open-1/first-token")
        async with opened(tmp_path, daemon.url) as page:
            await page.until(LIVE)
            paint = await page.until("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
            assert paint < 1000
            await page.until("document.querySelectorAll('#gpus article').length == 2")

            # Each GPU: power against its limit, verdict with its sentence, confidence, evidence, drivers.
            first = CARD.format(1)
            await page.until(f"{first}.querySelector('[data-figure=verdict]').textContent != 'no verdict'")
            card = await page.text("#gpus article:nth-child(1)")
            assert "of 700 W" in card
            assert re.search(r"confidence \d+ %", card)
            [told] = [one for one in json.loads(daemon.get("/v1/diagnosis")[1])["devices"] if one["gpu"] == 0]
            assert told["verdict"].replace("_", " ") in card
            assert len(await page.text("#gpus article:nth-child(1) .sentence")) > 20
            shown = await page.js(
                f"[...{first}.querySelectorAll('.parts .value')]"
                ".map((e) => parseFloat(e.textContent)).reduce((a, b) => a + b)"
            )
            assert 100 < shown < 750
            assert "80 W" in await page.text("#gpus article:nth-child(2) .power")
            await page.js(f"{first}.querySelector('details').open = true")
            await page.until(f"{first}.querySelector('details').innerText.includes('dram intensity ratio')")

            # The trace is 50 Hz: the square wave of 0.5 s reaches both of its levels, pixel by pixel.
            await page.until(f"{first}.querySelector('canvas').getAttribute('aria-label').includes('mean')", 25)
            label = await page.js(f"{first}.querySelector('canvas').getAttribute('aria-label')")
            low, high, mean = (float(number) for number in re.findall(r"(\d+) W", label))
            assert (low, high) == (pytest.approx(150, abs=10), pytest.approx(650, abs=10))
            assert mean == pytest.approx(400, abs=60)

            # Requests: in flight with a growing estimate, and just settled with the API's joules.
            await page.until("document.querySelector('#requests').innerText.includes('done-1')", 15)
            exact = json.loads(daemon.get("/v1/requests/done-1?wait=2s")[1])
            row = await page.js(
                "[...document.querySelectorAll('#requests tr')].find((r) => r.innerText.includes('done-1')).innerText"
            )
            assert exact["final"]
            assert f"{exact['energy_joules']:.0f} J" in row
            assert "tenant <b>acme</b>" in row
            running = (
                "[...document.querySelectorAll('#requests tr')].find((r) => r.innerText.includes('open-1')).innerText"
            )
            before = await page.js(running)
            await page.until(f"{running} != {json.dumps(before)}")
            engine = await page.text("#engines article")
            assert "vllm-0 llama" in engine
            assert "1 in flight" in engine

            # Every number that stands there is in the documentation, and the other way round. Nothing was asked
            # elsewhere; nothing broke the policy.
            keys = set(await page.js("[...document.querySelectorAll('[data-figure]')].map((e) => e.dataset.figure)"))
            assert keys == {figure.key for figure in all_figures()}
            assert all(url.startswith((daemon.url, "data:,")) for url in page.requested)
            assert page.complaints == []


async def test_a_dropped_and_a_silent_connection(library: Path, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, two_gpus())) as daemon:
        daemon.until("readiness", daemon.ready)
        async with Relay(int(daemon.url.rpartition(":")[2])) as relay, opened(tmp_path, relay.url) as page:
            state, status = "document.getElementById('connection').dataset.state", "#connection"
            await page.until(LIVE)
            await page.until("document.querySelectorAll('#gpus article').length == 2")
            relay.cut()
            await page.until(f"{state} == 'waiting'")
            assert re.search(r"What is shown is \d\.\d s old\. Trying again in \d+ s", await page.text(status))
            assert await page.js("document.title") == "Not live · jouletrace"
            # It is in view wherever one has scrolled to, and what is old can still be read.
            await page.js("scrollTo(0, document.body.scrollHeight)")
            place = "document.getElementById('connection').getBoundingClientRect()"
            assert await page.js(f"{place}.top > 0 && {place}.bottom < innerHeight")
            assert await page.js(BASICS) == []
            assert await page.js("document.body.hasAttribute('data-stale') && !document.getElementById('retry').hidden")
            await page.until("document.getElementById('announcements').textContent.includes('What is shown is old')")
            # What was known stays to be seen, and it comes back by itself.
            assert "GPU 0" in await page.text("#gpus")
            relay.mend()
            await page.until(LIVE, 10)
            assert not await page.js("document.body.hasAttribute('data-stale')")
            # A connection that is open and says nothing.
            relay.block()
            await page.until(f"{state} == 'stale'")
            assert re.fullmatch(r"No data for \d+ s", await page.text(status))
            relay.mend()
            await page.until(LIVE)


CLOCK_SET_BACK = r"""
(async () => {
  const { Trace } = await import('/-/live/trace.js');
  const trace = new Trace(60);
  trace.add({start_ms: 3600000, steps_ms: [20, 20], watts: [300, 300]});
  trace.addDrivers({starts_ms: [3600000], ends_ms: [3600040], watts: {static: [300]}}, ['static']);
  trace.add({start_ms: 3600019, steps_ms: [20], watts: [300]});
  const before = trace.endMs;
  trace.add({start_ms: 2000, steps_ms: [20, 20], watts: [200, 100]});
  return [before, trace.endMs, trace.summary()];
})()
"""


async def test_a_trace_goes_on_when_somebody_sets_the_clock_back(library: Path, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, two_gpus())) as daemon:
        daemon.until("readiness", daemon.ready)
        async with opened(tmp_path, daemon.url) as page:
            before, end, summary = await page.js(CLOCK_SET_BACK)
    assert (before, end) == (3_600_040, 2040)
    assert summary == {"least": 100, "most": 200, "mean": 150}


async def test_a_lost_gpu_shows_no_old_value(library: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    quick = ("--sampling.ring-interval", "200ms", "--readiness.stale-after", "1s")
    with DaemonProcess(tmp_path, *quick, variables=simulated(library, tmp_path, two_gpus(control))) as daemon:
        daemon.until("readiness", daemon.ready)
        async with opened(tmp_path, daemon.url) as page:
            await page.until("document.querySelectorAll('#gpus article').length == 2")
            write_control(control, [Fault.lost(1)])
            second = CARD.format(2)
            await page.until(f"{second}.dataset.state == 'lost'")
            card = await page.text("#gpus article:nth-child(2)")
            assert "Lost" in card
            assert "80 W" not in card.split("of 700 W")[0]
            assert "no data" in card
            assert "verdict" not in card
            assert await page.js("!document.getElementById('problems').hidden")
            await page.until("document.getElementById('announcements').textContent.includes('GPU 1: lost')", 15)
            # The other one goes on.
            assert await page.js(f"{CARD.format(1)}.dataset.state") == "ok"


async def test_requests_need_the_token_where_there_is_one(library: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef0123456789abcdef\n")
    options = ("--ingest.token-file", str(tmp_path / "token"))
    with DaemonProcess(tmp_path, *options, variables=simulated(library, tmp_path, two_gpus())) as daemon:
        daemon.until("readiness", daemon.ready)
        async with opened(tmp_path, daemon.url) as page:
            await page.until("document.querySelectorAll('#gpus article').length == 2")
            assert "token is missing" in await page.text("#refused")
            assert await page.js("document.getElementById('requests').hidden")
            enter = "document.getElementById('token').value = '{}'; document.querySelector('#entitle button').click()"
            await page.js(enter.format("wrong"))
            await page.until(LIVE)
            assert "token is missing or wrong" in await page.text("#refused")
            await page.js(enter.format("0123456789abcdef0123456789abcdef"))
            await page.until("document.getElementById('entitle').hidden && !document.getElementById('requests').hidden")
            assert page.complaints == []


async def test_narrow_dark_still_and_by_keyboard(library: Path, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, variables=simulated(library, tmp_path, two_gpus())) as daemon:
        daemon.until("readiness", daemon.ready)
        async with opened(tmp_path, daemon.url) as page:
            await page.until(f"{LIVE} && document.querySelectorAll('#gpus article').length == 2")
            await page.js("document.querySelectorAll('details').forEach((e) => (e.open = true))")
            backgrounds = []
            for scheme in ("light", "dark"):
                await page.media(prefers_color_scheme=scheme)
                for width in (1400, 360):
                    await page.size(width, 800)
                    assert await page.js("document.documentElement.scrollWidth") <= width
                    assert await page.js(BASICS) == []
                backgrounds.append(await page.js("getComputedStyle(document.body).backgroundColor"))
            assert backgrounds[0] != backgrounds[1]

            # The first key leads past the links to the GPUs.
            for kind in ("keyDown", "keyUp"):
                await page.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
            assert await page.js("document.activeElement.textContent") == "Skip to the GPUs"

            # The strip moves between rounds, unless the reader wants no motion or has paused it.
            moves = (
                "new Promise((done) => {const c = document.querySelector('canvas'); const seen = new Set();"
                " const look = (n) => {seen.add(c.style.transform); n ? requestAnimationFrame(() => look(n - 1))"
                " : done(seen.size)}; look(30)})"
            )
            assert await page.js(moves) > 10
            await page.media(prefers_reduced_motion="reduce")
            assert await page.js(moves) <= 2
            await page.media()
            await page.js("document.getElementById('pause').click()")
            assert await page.js("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
            held = await page.text("#gpus")
            assert await page.js(moves) == 1
            await asyncio.sleep(1.5)
            assert await page.text("#gpus") == held
            await page.js("document.getElementById('pause').click()")
            await page.until(f"document.querySelector('#gpus').innerText != {json.dumps(held)}")
