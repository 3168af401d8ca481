"""What the live monitor costs and how smooth it is, with 8 simulated H200s: a real Chromium, and bare viewers.

Run: `python -m tests.benchmarks.live_cost [--soak-minutes N]`. Needs Debian's chromium and gcc.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil

from tests.benchmarks.daemon_cost import cpu_seconds, daemon
from tests.chromium import Chromium, Page

DEVICES = 8
FRAMES_SECONDS = 20.0
VIEWERS = (0, 1, 16)
LONG_FRAME_MS = 25.0
"""A frame at 60 Hz that was missed; half a frame of tolerance."""

_FRAMES = """
new Promise((done) => {
  const times = [];
  const end = performance.now() + %d;
  const frame = (now) => { times.push(now); now < end ? requestAnimationFrame(frame) : done(times); };
  requestAnimationFrame(frame);
})
"""


async def viewer(url: str) -> None:
    """Read the stream and do nothing with it."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/live") as answer:
        async for _ in answer.content.iter_any():
            pass


async def cost_by_viewers(process: psutil.Process, url: str, seconds: float) -> dict[int, float]:
    """Return the daemon's CPU, as a share of one core, by number of viewers."""
    found = {}
    for count in VIEWERS:
        tasks = [asyncio.create_task(viewer(url)) for _ in range(count)]
        await asyncio.sleep(3)
        before, at = cpu_seconds(process), time.monotonic()
        await asyncio.sleep(seconds)
        found[count] = (cpu_seconds(process) - before) / (time.monotonic() - at)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


async def first_paints(page: Page, url: str, times: int = 5) -> list[float]:
    """Return the times to the first contentful paint, ms, of loads one after the other."""
    found = []
    for _ in range(times):
        await page.open(url)
        await page.until("performance.getEntriesByName('first-contentful-paint').length")
        found.append(await page.js("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    return found


async def memory(page: Page) -> tuple[float, int]:
    """Return used JavaScript heap, MiB, after a collection, and the number of DOM nodes."""
    await page.call("HeapProfiler.collectGarbage")
    usage = await page.call("Runtime.getHeapUsage")
    counters = await page.call("Memory.getDOMCounters")
    return usage["usedSize"] / 2**20, counters["nodes"]


async def soak(page: Page, browser: psutil.Process, process: psutil.Process, minutes: float) -> None:
    """Print the memory of page and daemon each half minute, and what each grows by in the second half of the time.

    The daemon's timelines fill up in their first quarter of an hour.
    """
    rows = []
    began = time.monotonic()
    end = began + minutes * 60
    while True:
        heap, nodes = await memory(page)
        tree = sum(p.memory_info().rss for p in browser.children(recursive=True) if p.is_running()) / 2**20
        rows.append((time.monotonic(), heap, tree, process.memory_info().rss / 2**20))
        print(
            f"  {(rows[-1][0] - began) / 60:4.1f} min: heap {heap:.2f} MiB, {nodes} nodes, browser {tree:.0f} MiB, "
            f"daemon {rows[-1][3]:.1f} MiB",
            flush=True,
        )
        if time.monotonic() > end:
            break
        await asyncio.sleep(min(30.0, minutes * 10))
    settled = rows[len(rows) // 2 :]
    for name, column in (("heap", 1), ("browser", 2), ("daemon", 3)):
        values = [row[column] for row in settled]
        slope = statistics.linear_regression([row[0] for row in settled], values).slope
        print(
            f"{name}: {min(values):.2f} to {max(values):.2f} MiB in the second half, "
            f"{slope * 1800:+.2f} MiB in 30 minutes by its slope"
        )


async def measure(folder: Path, soak_minutes: float, seconds: float) -> None:
    """Run all of it."""
    with daemon(DEVICES, driver_costs=False, folder=folder) as (process, url, _):
        await asyncio.sleep(40)
        for count, share in (await cost_by_viewers(process, url, seconds)).items():
            print(f"daemon with {count} viewers: {share:.2%} of one core", flush=True)
        async with Chromium(folder) as browser:
            page = await browser.page()
            paints = await first_paints(page, url)
            print(f"first contentful paint: {', '.join(f'{ms:.0f}' for ms in paints)} ms", flush=True)
            await page.until("!document.getElementById('live').hidden")
            await asyncio.sleep(5)
            times = await asyncio.wait_for(page.js(_FRAMES % (FRAMES_SECONDS * 1000)), None)
            gaps = [after - before for before, after in itertools.pairwise(times)]
            rate = len(gaps) / (times[-1] - times[0]) * 1000
            long = [gap for gap in gaps if gap > LONG_FRAME_MS]
            print(
                f"frames: {rate:.1f} a second over {FRAMES_SECONDS:g} s; median {statistics.median(gaps):.1f} ms, "
                f"p99 {statistics.quantiles(gaps, n=100)[98]:.1f} ms, {len(long)} over {LONG_FRAME_MS:g} ms "
                f"(the longest {max(gaps):.0f} ms)",
                flush=True,
            )
            await soak(page, psutil.Process(browser.pid), process, soak_minutes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak-minutes", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each CPU measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        asyncio.run(measure(Path(folder), options.soak_minutes, options.seconds))


if __name__ == "__main__":
    main()
