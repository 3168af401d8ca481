"""Passes what came on to the user's collector, byte for byte, and waits for it while it is away."""

import asyncio
import contextlib
import io
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import aiohttp
import structlog
from aiohttp import hdrs

from jouletrace.logs import Transitions

SENDERS: Final = 4
"""Exports under way at a time."""
ANSWER_SECONDS: Final = 10.0
"""A collector that has not answered by then is asked again; the OTLP exporters' default."""
FIRST_WAIT_SECONDS: Final = 0.5
LONGEST_WAIT_SECONDS: Final = 5.0
"""Between two attempts; each is longer than the one before, so that a collector that comes back is not run over."""
FLUSH_SECONDS: Final = 3.0
"""Time to pass on what is left when the daemon stops."""
HEADERS_BYTES: Final = 1536
"""What an export takes beside its body: 1,430 bytes with the eight headers of OpenTelemetry's Python exporter."""
RETRYABLE: Final = frozenset({429, 502, 503, 504})
"""OTLP specification, "Failures", "Retryable Response Codes"; all others are final."""
_NOT_PASSED_ON = frozenset(
    name.lower()
    for name in (
        hdrs.CONNECTION, hdrs.CONTENT_LENGTH, hdrs.EXPECT, hdrs.HOST, hdrs.KEEP_ALIVE, hdrs.TE, hdrs.TRAILER,
        hdrs.TRANSFER_ENCODING, hdrs.UPGRADE,
    )
)  # fmt: skip
"""Headers of one connection (RFC 9110 section 7.6.1) and those that aiohttp writes itself."""

_log = structlog.get_logger(__name__)


class Drop(StrEnum):
    """Why an export was not passed on; the label `reason`."""

    BUFFER_FULL = "buffer_full"
    REFUSED = "refused"
    """The collector does not want it."""
    LOOP = "loop"
    """It has been through here before: `otlp.forward_url` leads back to us."""
    STOPPED = "stopped"
    """The collector was away when the daemon stopped."""


@dataclass(frozen=True, slots=True)
class TeeCounts:
    """Exports since the start of the process, and what waits now."""

    forwarded: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Export:
    """A request as it came."""

    body: bytes
    headers: Mapping[str, str]

    @property
    def held_bytes(self) -> int:
        """What it takes of the buffer."""
        return len(self.body) + HEADERS_BYTES


class Tee:
    """A bounded queue of exports and those who send them. Belongs to the event loop.

    `headers` are added to each export, over those that came. `hides_authorization`: whether senders' Authorization is
    meant for us.
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str], buffer_bytes: int, hides_authorization: bool = False
    ) -> None:
        self._url = url
        self._via = f"jouletrace-{secrets.token_hex(4)}"
        """Our name in the Via header (RFC 9110 section 7.6.3), by which we know what has been through here."""
        self._headers = headers
        self._buffer_bytes = buffer_bytes
        self._hidden = {*_NOT_PASSED_ON, *(name.lower() for name in headers)}
        if hides_authorization:
            self._hidden.add(hdrs.AUTHORIZATION.lower())
        self._waiting: deque[Export] = deque()
        self._held = 0
        self._held_bytes = 0
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._forwarded = 0
        self._dropped: Counter[str] = Counter()
        self._transitions = Transitions(_log, time.monotonic_ns)
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def counts(self) -> TeeCounts:
        """Return the counts; may be called from any thread."""
        return TeeCounts(self._forwarded, dict(self._dropped), self._held_bytes)

    async def start(self) -> None:
        """Begin to send."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
            connector=aiohttp.TCPConnector(limit=SENDERS),
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT_ENCODING, hdrs.ACCEPT, hdrs.CONTENT_TYPE),
        )
        self._tasks = [asyncio.create_task(self._send_all()) for _ in range(SENDERS)]

    async def stop(self) -> None:
        """Send what is left if the collector takes it, and count the rest as dropped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._drained.wait()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        while self._waiting:
            self._drop(self._waiting.popleft(), Drop.STOPPED)
        if self._session is not None:
            await self._session.close()
        if self._dropped[Drop.STOPPED]:
            _log.warning(
                "spans were not passed on: the collector was away when jouletrace stopped",
                url=self._url,
                exports=self._dropped[Drop.STOPPED],
            )

    def offer(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Take an export to pass on, or drop it when there is no room."""
        passed = {name: value for name, value in headers.items() if name.lower() not in self._hidden}
        came_by = next((value for name, value in passed.items() if name.lower() == "via"), "")
        if self._via in came_by:
            self._dropped[Drop.LOOP] += 1
            self._transitions.failed(
                Drop.LOOP,
                "spans come back from where they are passed on to: otlp.forward_url leads here; name the collector",
                url=self._url,
            )
            return
        for name in [name for name in passed if name.lower() == "via"]:
            del passed[name]
        passed[hdrs.VIA] = f"{came_by}, 1.1 {self._via}".removeprefix(", ")
        export = Export(body, {**passed, **self._headers})
        if self._held_bytes + export.held_bytes > self._buffer_bytes:
            self._dropped[Drop.BUFFER_FULL] += 1
            self._transitions.failed(
                Drop.BUFFER_FULL,
                "spans are dropped: the collector is away or too slow and the buffer is full; see to the collector, or "
                "raise otlp.forward_buffer_mebibytes",
                url=self._url,
            )
            return
        self._transitions.recovered(Drop.BUFFER_FULL, "there is room for spans again", url=self._url)
        self._held += 1
        self._held_bytes += export.held_bytes
        self._waiting.append(export)
        self._filled.set()
        self._drained.clear()

    async def _send_all(self) -> None:
        while True:
            while not self._waiting:
                self._filled.clear()
                await self._filled.wait()
            export = self._waiting.popleft()
            try:
                await self._send(export)
            except asyncio.CancelledError:
                self._waiting.appendleft(export)
                raise

    async def _send(self, export: Export) -> None:
        """Send an export until the collector takes or refuses it."""
        longest = FIRST_WAIT_SECONDS
        while (wait := await self._attempt(export)) is not None:
            # Spread, so that those who wait for the same collector do not come back as one.
            await asyncio.sleep(wait or longest * random.uniform(0.5, 1.0))
            longest = min(2 * longest, LONGEST_WAIT_SECONDS)

    async def _attempt(self, export: Export) -> float | None:
        """Send once; return None when that is settled, else for how long to wait, 0 when the collector does not say."""
        assert self._session is not None
        try:
            async with self._session.post(
                self._url, data=io.BytesIO(export.body), headers=export.headers, allow_redirects=False
            ) as response:
                status = response.status
                wait = _seconds(response.headers.get(hdrs.RETRY_AFTER, ""))
                await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            return self._failed(str(failure) or "no answer in time", 0.0)
        if status in RETRYABLE:
            return self._failed(f"status {status}", wait)
        self._transitions.recovered("send", "the collector takes spans again", url=self._url)
        if 200 <= status < 300:
            self._forwarded += 1
            self._let_go(export)
            self._transitions.recovered(Drop.REFUSED, "the collector no longer refuses spans", url=self._url)
        else:
            self._drop(export, Drop.REFUSED)
            self._transitions.failed(
                Drop.REFUSED,
                "the collector refuses spans; see its log, and otlp.forward_url and otlp.forward_headers_file",
                url=self._url,
                status=status,
            )
        return None

    def _failed(self, problem: str, wait: float) -> float:
        self._transitions.failed(
            "send",
            "the collector does not take spans; they wait until it does",
            url=self._url,
            problem=problem,
        )
        return wait

    def _drop(self, export: Export, reason: str) -> None:
        self._dropped[reason] += 1
        self._let_go(export)

    def _let_go(self, export: Export) -> None:
        self._held_bytes -= export.held_bytes
        self._held -= 1
        if not self._held:
            self._drained.set()


def _seconds(retry_after: str) -> float:
    """Return what a Retry-After header in seconds asks for, at most a minute; 0 for anything else."""
    return min(float(retry_after), 60.0) if retry_after.isascii() and retry_after.isdigit() else 0.0
