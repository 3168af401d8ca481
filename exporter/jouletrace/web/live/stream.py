"""`GET /v1/live`: one round of server-sent events a second, made once for everybody who looks."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog
from aiohttp import hdrs, web

import jouletrace
from jouletrace.clock import Clock
from jouletrace.energy.timeline import Timeline
from jouletrace.logs import Transitions
from jouletrace.requests.account import RequestEnergy
from jouletrace.web.entrance import Entrance
from jouletrace.web.live.document import (
    WINDOW_SECONDS,
    Moment,
    driver_pieces,
    encode,
    node_document,
    requests_document,
    traces,
)

INTERVAL_SECONDS: Final = 1.0
"""As often as the power ring is harvested and the account settled: nothing new is known before."""
MAX_VIEWERS: Final = 32
"""Each may hold `BACKLOG` rounds (15 kB with 8 GPUs, twice that with requests) and the last minute (205 kB)."""
BACKLOG: Final = 5
"""Rounds that a viewer may be behind before it is cut off."""
SEND_BUFFER_BYTES: Final = 256 * 1024
"""What the kernel may hold for a viewer that does not read; left alone it lets megabytes pile up."""
MOST_REQUESTS: Final = 20
"""Requests listed, in flight and settled each: a screen of them."""

_log = structlog.get_logger(__name__)


class WatchedDevice(Protocol):
    """What a trace needs of a device."""

    @property
    def uuid(self) -> str:
        """Its UUID."""

    @property
    def timeline(self) -> Timeline:
        """Its energy."""


class Requests(Protocol):
    """Who knows what requests have used."""

    async def running(self, limit: int) -> list[RequestEnergy]:
        """Return provisional answers about those in flight."""

    async def recent(self, limit: int) -> list[RequestEnergy]:
        """Return final answers about those that ended last."""


class _Viewer:
    """Somebody who looks."""

    def __init__(self, request: web.Request, *, sees_requests: bool) -> None:
        self.sees_requests = sees_requests
        self.rounds: asyncio.Queue[bytes | None] = asyncio.Queue(BACKLOG)
        self._transport = request.transport

    def offer(self, round_: bytes | None) -> bool:
        """Queue a round, None for the end; return whether there was room."""
        try:
            self.rounds.put_nowait(round_)
        except asyncio.QueueFull:
            return False
        return True

    def cut_off(self) -> None:
        """End the connection, whatever is on its way."""
        if self._transport is not None:
            self._transport.abort()


@dataclass(frozen=True, slots=True)
class _Sent:
    """Up to when, by uuid, traces and drivers have been sent."""

    traces_ns: Mapping[str, int] = field(default_factory=dict)
    drivers_ns: Mapping[str, int] = field(default_factory=dict)

    def __or__(self, later: "_Sent") -> "_Sent":
        return _Sent({**self.traces_ns, **later.traces_ns}, {**self.drivers_ns, **later.drivers_ns})


class LiveStream:
    """The stream and its viewers. Collects only while somebody looks.

    `moment` is called on the event loop, `devices` in a thread. Rounds are made in a thread of their own: a few
    milliseconds on the loop would be felt by those who send records.
    """

    def __init__(
        self,
        *,
        moment: Callable[[], Moment],
        devices: Callable[[], Sequence[WatchedDevice]],
        requests: Requests,
        entrance: Entrance,
        clock: Clock,
        interval_seconds: float = INTERVAL_SECONDS,
        max_viewers: int = MAX_VIEWERS,
    ) -> None:
        self._moment = moment
        self._devices = devices
        self._requests = requests
        self._entrance = entrance
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._max_viewers = max_viewers
        self._arriving = 0
        self._viewers: set[_Viewer] = set()
        self._rounds: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="live")
        self._sent = _Sent()
        self._failures = Transitions(_log, time.monotonic_ns)
        self._closed = False

    def add_to(self, app: web.Application) -> None:
        """Add the route, and the end of all streams when the application stops."""
        app.router.add_get("/v1/live", self.get, allow_head=False)
        app.on_shutdown.append(self.close)

    async def close(self, _: web.Application | None = None) -> None:
        """End all streams."""
        self._closed = True
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.wait({self._rounds})
        for viewer in tuple(self._viewers):
            if not viewer.offer(None):
                viewer.cut_off()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Stream to one viewer until either side has had enough."""
        if len(self._viewers) + self._arriving >= self._max_viewers or self._closed:
            raise web.HTTPServiceUnavailable(
                text=f"{self._max_viewers} viewers are looking already; close one, or watch in Grafana.",
                headers={hdrs.RETRY_AFTER: "10"},
            )
        rules = self._entrance.rules
        refusal = self._entrance.refusal(request)
        viewer = _Viewer(request, sees_requests=refusal is None)
        response = web.StreamResponse(
            headers={hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
        )
        _hold_little(request)
        self._arriving += 1
        try:
            await response.prepare(request)
            hello = {
                "version": jouletrace.__version__,
                "interval_seconds": self._interval_seconds,
                "window_seconds": WINDOW_SECONDS,
                "requests_refused": None if refusal is None else refusal.message,
            }
            first = await self._first_round(viewer)
        finally:
            self._arriving -= 1
        # Gone, cut off, or at the end: a client that leaves is no error.
        with contextlib.suppress(ConnectionError):
            try:
                round_: bytes | None = encode("hello", hello) + first
                # Once other rules say who may look, they are asked anew: viewers come again by themselves.
                while round_ is not None and self._entrance.rules == rules:
                    await response.write(round_)
                    round_ = await viewer.rounds.get()
                await response.write_eof()
            finally:
                self._viewers.discard(viewer)
        return response

    async def _first_round(self, viewer: _Viewer) -> bytes:
        """Return the traces of the whole window and the newest round; from then on the viewer gets every round."""
        async with self._one_at_a_time:
            if not self._viewers:
                self._sent = _Sent()
            requests = await self._requests_round([viewer])
            history, until = await self._in_thread(self._round_after, self._moment(), _Sent())
            # What was sent to the others goes on from where it was.
            self._sent = until | self._sent
            self._viewers.add(viewer)
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._run())
        whole: bytes = history + requests
        return whole

    async def _run(self) -> None:
        """Send rounds until nobody looks any more."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + self._interval_seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            if not self._viewers:
                return
            async with self._one_at_a_time:
                try:
                    await self._round()
                except Exception:
                    self._failures.failed(
                        "live", "the live monitor fails and stands still; please report this", exc_info=True
                    )
                else:
                    self._failures.recovered("live", "the live monitor goes on")

    async def _round(self) -> None:
        entitled = [viewer for viewer in self._viewers if viewer.sees_requests]
        requests = await self._requests_round(entitled)
        public, until = await self._in_thread(self._round_after, self._moment(), self._sent)
        self._sent |= until
        whole = public + requests
        for viewer in tuple(self._viewers):
            if not viewer.offer(whole if viewer.sees_requests else public):
                self._viewers.discard(viewer)
                viewer.cut_off()

    def _round_after(self, moment: Moment, sent: _Sent) -> tuple[bytes, _Sent]:
        """Return what everybody may see and has not been sent yet, and up to when it goes."""
        timelines = [(device.uuid, device.timeline) for device in self._devices()]
        trace, traces_ns = traces(timelines, sent.traces_ns, moment.now_ns, self._clock)
        drivers, drivers_ns = driver_pieces(moment.diagnosis.devices, sent.drivers_ns, moment.now_ns, self._clock)
        node = node_document(moment, self._clock)
        told = encode("trace", trace) + encode("drivers", drivers) + encode("node", node)
        return told, _Sent(traces_ns, drivers_ns)

    async def _requests_round(self, viewers: Sequence[_Viewer]) -> bytes:
        if not any(viewer.sees_requests for viewer in viewers):
            return b""
        running, recent = await self._requests.running(MOST_REQUESTS), await self._requests.recent(MOST_REQUESTS)
        return encode("requests", requests_document(running, recent, self._clock))

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def _hold_little(request: web.Request) -> None:
    connection = None if request.transport is None else request.transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
