"""Pictures of the live page in every state that an operator may find it in, to be looked at.

`python -m tests.live_pictures FOLDER [SCENE ...]`; `make live-pictures` takes those that docs/live.md shows from them.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from tests.chromium import Chromium, Page
from tests.daemon_process import DaemonProcess, simulated
from tests.nvml_shim import Constant, Device, Fault, Process, Scenario, Square, build, write_control

DECODE = {"graphics_util": "98", "sm_util": "92", "any_tensor_util": "12", "dram_bw_util": "78"}
PREFILL = {"graphics_util": "99", "sm_util": "97", "any_tensor_util": "82", "dram_bw_util": "24"}
STARVED = {"graphics_util": "22", "sm_util": "18", "any_tensor_util": "3", "dram_bw_util": "9"}
HISTORY_SECONDS = 70.0
"""The page shows a minute."""
SIZES = ((1440, 900), (768, 1024), (360, 740))
PROCESS = (Process(4242, memory_mib=120_000),)

Scene = Callable[[Path, Path], Coroutine[Any, Any, None]]


def decoding(gpu: int, period_s: float = 0.5) -> Device:
    """Return a GPU in the middle of decoding."""
    return Device("h200", Square(430, 560, period_s=period_s), gpm=DECODE, uuid=f"GPU-picture-{gpu}", processes=PROCESS)


def eight_gpus() -> list[Device]:
    """Return a node on which everything happens at once."""
    return [
        decoding(0),
        Device(
            "h200", Square(640, 699, period_s=0.3), gpm=PREFILL, uuid="GPU-picture-1", processes=PROCESS,
            throttle={"sw_power_cap": 0.9},
        ),
        Device("h200", Constant(121), uuid="GPU-picture-2", processes=PROCESS),
        Device("h200", Constant(79), uuid="GPU-picture-3"),
        Device(
            "h200", Constant(410), gpm=DECODE, uuid="GPU-picture-4", processes=PROCESS,
            throttle={"hw_thermal": 0.8, "sw_thermal": 0.8}, state={"temperature_c": 92, "sm_mhz": 900},
        ),
        Device("h200", Square(130, 380, period_s=4), gpm=STARVED, uuid="GPU-picture-5", processes=PROCESS),
        decoding(6, 1.0),
        decoding(7, 2.0),
    ]  # fmt: skip


class Engine:
    """Sends the records of an engine with a few requests on the way, as any engine would."""

    def __init__(self, url: str, uuids: Sequence[str]) -> None:
        self._url = url
        self._number = 0
        self._running: list[str] = []
        self._post("/v1/engines", engine_id="vllm-0", kind="vllm", models=["llama-3.1-8b"], gpu_uuids=list(uuids))

    async def run(self) -> None:
        """Begin a request each half second, end the oldest of eight."""
        while True:
            self._number += 1
            name = f"chat-{self._number:05d}"
            who = {"model": "llama-3.1-8b", "tenant": ("acme", "globex")[self._number % 2], "engine_id": "vllm-0"}
            self._post(f"/v1/requests/{name}/start", **who)
            self._post(f"/v1/requests/{name}/first-token")
            self._running.append(name)
            if len(self._running) > 8:
                usage = {"input": 512, "output": 220}
                self._post(f"/v1/requests/{self._running.pop(0)}/finish", status="finished", usage=usage)
            await asyncio.sleep(0.5)

    def _post(self, path: str, **record: Any) -> None:
        request = urllib.request.Request(self._url + path, json.dumps(record).encode())
        with urllib.request.urlopen(request, timeout=3):
            pass


@contextlib.asynccontextmanager
async def watched(
    folder: Path, devices: Sequence[Device], *arguments: str, wait_seconds: float = HISTORY_SECONDS
) -> AsyncIterator[tuple[DaemonProcess, Page, Path]]:
    """Run a daemon for a while, with an engine on its first GPU; yield it, a page that looks at it, its control."""
    control = folder / "control"
    scenario = Scenario(devices, control=control)
    with DaemonProcess(folder, *arguments, variables=simulated(build(), folder, scenario)) as daemon:
        if wait_seconds:
            daemon.until("readiness", daemon.ready)
        engine = Engine(daemon.url, [devices[0].uuid or ""])
        running = asyncio.create_task(engine.run())
        try:
            async with Chromium(folder) as browser:
                page = await browser.page(*SIZES[0])
                await asyncio.sleep(wait_seconds)
                await page.open(daemon.url)
                yield daemon, page, control
        finally:
            running.cancel()
            await asyncio.wait({running})


async def shoot(page: Page, folder: Path, name: str, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    """Take pictures in all sizes, light and dark."""
    for scheme in ("light", "dark"):
        await page.media(prefers_color_scheme=scheme)
        for width, height in sizes:
            await page.size(width, height)
            await asyncio.sleep(1.5)
            await page.picture(folder / f"live-{name}-{width}-{scheme}.png")


async def full(folder: Path, pictures: Path) -> None:
    """Eight GPUs: capped, hot, parked, idle, starved, one lost, one stale."""
    quick = ("--readiness.stale-after", "3s")
    async with watched(folder, eight_gpus(), *quick) as (_, page, control):
        await page.until("document.querySelectorAll('#gpus article').length == 8")
        await shoot(page, pictures, "eight-gpus-well", SIZES[:1])
        stuck = Fault.error("nvmlDeviceGetSamples", 999, gpu=7)
        counter = Fault.error("nvmlDeviceGetTotalEnergyConsumption", 999, gpu=7)
        write_control(control, [Fault.lost(6), stuck, counter])
        await page.until("document.querySelectorAll('#gpus article:not([data-state=ok])').length == 2", 30)
        await asyncio.sleep(8)
        await shoot(page, pictures, "eight-gpus")


async def one(folder: Path, pictures: Path) -> None:
    """One GPU, then the daemon gone."""
    async with watched(folder, [decoding(0)]) as (daemon, page, _):
        await page.until("document.querySelectorAll('#gpus article').length == 1")
        await shoot(page, pictures, "one-gpu")
        daemon.process.kill()
        await page.until("document.getElementById('connection').dataset.state == 'waiting'")
        await asyncio.sleep(4)
        await shoot(page, pictures, "gone", (SIZES[0], SIZES[2]))


async def two(folder: Path, pictures: Path) -> None:
    """Two GPUs; then a driver call hangs."""
    devices = [decoding(0), Device("h200", Constant(79), uuid="GPU-picture-1")]
    async with watched(folder, devices, "--readiness.stale-after", "3s") as (_, page, control):
        await page.until("document.querySelectorAll('#gpus article').length == 2")
        await shoot(page, pictures, "two-gpus")
        write_control(control, [Fault.hang("nvmlDeviceGetSamples")])
        await page.until("document.querySelectorAll('#gpus article[data-state=stalled]').length == 2", 30)
        await asyncio.sleep(3)
        await shoot(page, pictures, "stalled", (SIZES[0], SIZES[2]))


async def start(folder: Path, pictures: Path) -> None:
    """A daemon whose sensors say nothing yet."""
    slow = [Fault.slow("nvmlDeviceGetSamples", 8e6), Fault.slow("nvmlDeviceGetTotalEnergyConsumption", 8e6)]
    scenario_devices = [decoding(0), decoding(1)]
    control = folder / "control"
    scenario = Scenario(scenario_devices, control=control, faults=slow)
    with DaemonProcess(folder, variables=simulated(build(), folder, scenario)) as daemon:
        async with Chromium(folder) as browser:
            page = await browser.page(*SIZES[0])
            await page.open(daemon.url)
            await page.picture(pictures / "live-starting-at-once.png")
            await asyncio.sleep(2)
            await shoot(page, pictures, "starting", (SIZES[0], SIZES[2]))


SCENES: dict[str, Scene] = {"full": full, "one": one, "two": two, "start": start}


def main() -> None:
    """Take the pictures of the scenes that are named, of all without a name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=", ".join(SCENES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.scenes or SCENES:
        at = time.monotonic()
        folder = Path(tempfile.mkdtemp())
        asyncio.run(SCENES[name](folder, options.folder))
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}: {time.monotonic() - at:.0f} s", flush=True)


if __name__ == "__main__":
    main()
