"""A real Chromium without a window, driven over its DevTools protocol: what people see, tested where they see it.

A hundred lines over aiohttp, which is there anyway, in the place of a wheel of 45 MB with a Node.js in it.
"""

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses to run as root with it, and CI containers are root.
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--js-flags=--expose-gc",
    "--remote-debugging-port=0",
)
START_SECONDS = 20.0
CALL_SECONDS = 60.0


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """What stands in the console as a warning or an error: violations of the security policy, too."""
        self.requested: list[str] = []
        """The URLs that were asked for."""
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(answer, CALL_SECONDS)

    async def open(self, url: str) -> None:
        """Go to a URL."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")

    async def js(self, expression: str) -> Any:
        """Return the value of an expression."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 10.0) -> Any:
        """Return the first true value of an expression; fail when there is none in time."""
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            if value := await self.js(expression):
                return value
            await asyncio.sleep(0.05)
        text = await self.js("document.body.innerText")
        return pytest.fail(f"in vain: {expression}; the console: {self.complaints}; the page:\n{text[:3000]}")

    async def text(self, selector: str) -> str:
        """Return the text of the first element that matches, as it is seen."""
        return str(await self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def size(self, width: int, height: int, scale: float = 1) -> None:
        """Give the page a size, in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    async def media(self, **features: str) -> None:
        """Emulate media features, `_` for `-`: `prefers_color_scheme="dark"`."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.call("Emulation.setEmulatedMedia", features=given)

    async def picture(self, file: Path, *, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what is in view."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    async def close(self) -> None:
        """Stop listening."""
        await self._socket.close()
        await asyncio.wait({self._reading})

    async def _read(self) -> None:
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                answer = self._answers.pop(content["id"])
                if not answer.done():
                    if "error" in content:
                        answer.set_exception(AssertionError(content["error"]))
                    else:
                        answer.set_result(content["result"])
            else:
                self._note(content["method"], content["params"])

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Log.entryAdded" if parameters["entry"]["level"] in ("warning", "error"):
                self.complaints.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("warning", "error", "assert"):
                self.complaints.append(str([one.get("value") for one in parameters["args"]]))
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description", details["text"]))
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])


class Chromium:
    """A running browser; an asynchronous context manager that ends it by its own pid."""

    def __init__(self, folder: Path) -> None:
        self._profile = folder / "chromium"
        self._pages: list[Page] = []
        self._process: subprocess.Popen[bytes]
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        assert PROGRAM is not None
        self._process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond, before anything runs
            [PROGRAM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self._profile.parent)},
        )
        self._session = aiohttp.ClientSession()
        file = self._profile / "DevToolsActivePort"
        port = await _first(lambda: file.exists() and file.read_text().partition("\n")[0], START_SECONDS)
        self._url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for page in self._pages:
            await page.close()
        await self._session.close()
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait, 10)

    @property
    def pid(self) -> int:
        """Its first process."""
        return self._process.pid

    async def page(self, width: int = 1400, height: int = 900) -> Page:
        """Return a new tab."""
        async with self._session.put(f"{self._url}/json/new") as answer:
            target = await answer.json()
        page = Page(await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0))
        self._pages.append(page)
        await page.size(width, height)
        return page


async def _first(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        if value := condition():
            return value
        await asyncio.sleep(0.05)
    return pytest.fail("Chromium does not start")
