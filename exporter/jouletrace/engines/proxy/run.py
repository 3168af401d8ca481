"""The proxy as a process: its start and its end."""

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
import structlog
from aiohttp import web

from jouletrace import logs
from jouletrace.engines.callers import Callers
from jouletrace.engines.client import Client, Token
from jouletrace.engines.proxy.energy import EnergyDesk
from jouletrace.engines.proxy.forward import Proxy
from jouletrace.engines.proxy.options import Options
from jouletrace.web.serve import Limits, WebServer

CONNECT_SECONDS: Final = 10.0
"""To reach the server behind; how long it then takes to answer is its business."""
IDLE_SECONDS: Final = 4.0
"""An idle connection to the server is kept for so long: uvicorn, under vLLM, closes its own after 5 s."""
DRAIN_SECONDS: Final = 10.0
"""What running answers get to end in when the proxy is stopped."""
MAX_HEADER_BYTES: Final = 64 << 10
LIMITS: Final = Limits(connections=16384, connections_per_origin=16384, head_bytes=MAX_HEADER_BYTES)
"""As many as there may be requests in flight; a gateway before the proxy is one address."""
SWITCH_SECONDS: Final = 0.0005
"""The thread that sends records must not keep the chunks of a stream waiting for the usual 5 ms."""

_log = structlog.get_logger(__name__)


def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code 0. Raises ListenError."""
    logs.configure(options.log_level, options.log_format)
    _keep_latency_low()
    return asyncio.run(_run(options))


def _keep_latency_low() -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    # The collector need not walk through what was loaded at start, nor look after each 700 objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


async def _run(options: Options) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(options) as (proxy, urls):
        for url in urls:
            _log.info("passing requests on", url=url, upstream=options.upstream, jouletrace=options.jouletrace)
        await stop.wait()
        # Written before the running answers end: whoever looks for the reason finds it while clients complain.
        _log.warning(
            "the proxy was told to stop: clients of this address are not answered until it runs again",
            url=", ".join(urls),
            in_flight=proxy.in_flight,
            **proxy.statuses,
        )
    return 0


@contextlib.asynccontextmanager
async def serving(options: Options) -> AsyncIterator[tuple[Proxy, tuple[str, ...]]]:
    """Yield a proxy that listens, and its URLs; raises ListenError."""
    client = Client(options.jouletrace, api_url=options.api_url, token_file=options.token_file)
    async with _session() as upstream, _session() as daemon:
        token = Token(file=options.token_file)
        desk = EnergyDesk(daemon, options.api_url, token=token, budget_seconds=options.energy_budget_seconds)
        callers = Callers(options.engine_id, options.tenant_headers)
        proxy = Proxy(options.upstream, upstream, client=client, desk=desk, callers=callers)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        # A client that goes ends its request: else the server behind would work on for nobody.
        server = WebServer(
            app, shutdown_seconds=DRAIN_SECONDS, address_flag="--listen", cancels_handlers=True, limits=LIMITS
        )
        try:
            await server.start(options.listen)
            _announce(client, options)
            yield proxy, server.urls
        finally:
            await server.stop()
            await asyncio.to_thread(client.close)
            if client.dropped:
                _log.warning("records never reached jouletrace", count=client.dropped)


def _announce(client: Client, options: Options) -> None:
    if options.engine_kind is not None:
        client.send(
            "engine", {"engine_id": options.engine_id, "kind": options.engine_kind, "gpu_uuids": options.gpu_uuids}
        )


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    )
