"""Who may read what is served: the web configuration in force, kept current while the daemon runs.

It counts for the metrics, the live page and its stream. Records and what requests used have rules of their own
(`entrance`), and health and readiness are open, as probes have no passwords. Client certificates and headers count for
all of them.
"""

import asyncio
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from jouletrace.config import ConfigError
from jouletrace.logs import Transitions
from jouletrace.web.entrance import Entrance, Problem, origin_of
from jouletrace.web.passwords import Buckets, Passwords
from jouletrace.web.tls import names_of, server_context
from jouletrace.web.web_config import TlsServerConfig, WebConfig, read_web_config

POLL_SECONDS: Final = 2.0
"""How often the files are looked at; a `stat` of four files takes 10 us."""
PROBES: Final = frozenset({"/-/healthy", "/-/ready"})

_log = structlog.get_logger(__name__)

_State = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _InForce:
    """A web configuration with what is made of it."""

    config: WebConfig
    tls: ssl.SSLContext | None
    limits: Buckets


class Access:
    """The web configuration of a server, and the guard at its door. For the event loop."""

    def __init__(self, file: Path | None, entrance: Entrance, *, poll_seconds: float = POLL_SECONDS) -> None:
        """Read the file, None for none; raises ConfigError. `entrance` says whose token lets in without a password."""
        self._file = file
        self._entrance = entrance
        self._poll_seconds = poll_seconds
        self._passwords = Passwords()
        self._failures = Transitions(_log, time.monotonic_ns)
        self._watched: tuple[Path, ...] = () if file is None else (file,)
        self._seen = _state(self._watched)
        self._in_force = _InForce(WebConfig(), None, Buckets(0, 1)) if file is None else self._read(file)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context for new connections, None for plain HTTP."""
        return self._in_force.tls

    def guard(self, app: web.Application, own_rules: Iterable[web.AbstractRouteDef] = ()) -> None:
        """Let an application answer the entitled only; routes with `own_rules` decide themselves who those are."""
        free = {route.handler for route in own_rules if isinstance(route, web.RouteDef)}

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            refusal = self._certificate_refusal(request)
            if refusal is None and request.match_info.handler not in free and not _is_probe(request):
                refusal = await self._refusal(request)
            return await handler(request) if refusal is None else _answer(request, refusal)

        app.middlewares.append(guard)
        app.on_response_prepare.append(self._prepare)

    def close(self) -> None:
        """Let go of the thread."""
        self._passwords.close()

    async def follow(self) -> None:
        """Apply changes of the files until cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            if self._file is not None and await asyncio.to_thread(_state, self._watched) != self._seen:
                await self.reload()

    async def reload(self) -> None:
        """Read the files again; while they are wrong, what was in force stays, with one line in the log."""
        if self._file is None:
            return
        try:
            new = await asyncio.to_thread(self._read, self._file)
        except ConfigError as failure:
            self._failures.failed(
                "web.config", "the web configuration was not reloaded, the old one stays", problem=str(failure)
            )
            return
        self._failures.recovered("web.config", "the web configuration can be read again")
        self._in_force = new
        _log.info("the web configuration was reloaded", tls=new.tls is not None, users=len(new.config.basic_auth_users))

    def _read(self, file: Path) -> _InForce:
        # Looked at before it is read: what changes meanwhile is seen the next time.
        self._seen = _state(self._watched)
        config = read_web_config(file)
        watched = (file, *_files_of(config.tls_server_config))
        if watched != self._watched:
            self._watched = watched
            self._seen = _state(watched)
        try:
            tls = None if config.tls_server_config is None else server_context(config.tls_server_config)
        except ConfigError as failure:
            raise ConfigError(f"{file}: {failure}") from None
        limits = Buckets(config.rate_limit.interval_seconds, config.rate_limit.burst)
        return _InForce(config, tls, limits)

    def _certificate_refusal(self, request: web.Request) -> Problem | None:
        tls = self._in_force.config.tls_server_config
        if tls is None or not tls.client_allowed_sans:
            return None
        certificate = _extra(request, "peercert")
        if certificate and names_of(certificate) & frozenset(tls.client_allowed_sans):
            return None
        return Problem(403, "No name of your client certificate is in client_allowed_sans of the web configuration.")

    async def _refusal(self, request: web.Request) -> Problem | None:
        in_force = self._in_force
        origin = origin_of(request.remote or "")
        if not in_force.limits.take(origin):
            return Problem(
                429,
                "Your address asks more often than rate_limit of the web configuration says.",
                {hdrs.RETRY_AFTER: "1"},
            )
        users = in_force.config.basic_auth_users
        authorization = request.headers.get(hdrs.AUTHORIZATION, "")
        if not users or self._entrance.has_token(authorization):
            return None
        return await self._passwords.refusal(users, authorization, origin)

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        for name, value in self._in_force.config.http_server_config.headers.items():
            response.headers[name] = value
        if _extra(request, "sslcontext") is not self.tls:
            # The client comes again with the new certificate, and shows its own anew.
            response.force_close()


def check(file: str) -> None:
    """Raise ConfigError when a web configuration, or a file that it names, is wrong; empty is none."""
    if file:
        Access(Path(file), Entrance(token=None, max_body_bytes=0)).close()


def _files_of(tls: TlsServerConfig | None) -> tuple[Path, ...]:
    names = () if tls is None else (tls.cert_file, tls.key_file, tls.client_ca_file)
    return tuple(Path(name) for name in names if name)


def _state(files: Iterable[Path]) -> _State:
    """Return what tells a new file from the old: rotation writes a new one, or points a link elsewhere."""
    states: list[tuple[int, ...]] = []
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            states.append((error.errno or 0,))
        else:
            states.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode))
    return tuple(states)


def _is_probe(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical in PROBES


def _extra(request: web.Request, name: str) -> Any:
    return None if request.transport is None else request.transport.get_extra_info(name)


def _answer(request: web.Request, problem: Problem) -> web.Response:
    if request.path.startswith("/v1/"):
        error = {"error": {"status": problem.status, "message": problem.message}}
        return web.json_response(error, status=problem.status, headers=problem.headers)
    return web.Response(text=problem.message + "\n", status=problem.status, headers=problem.headers)
