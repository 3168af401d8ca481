"""Who may read what is served: the web configuration in force, kept current while the daemon runs.

It counts for the metrics, the live page and its stream. Records and what requests used have rules of their own
(`entrance`), and health and readiness are open, as probes have no passwords. Client certificates and headers count for
all of them.
"""

import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from jouletrace.config import ConfigError
from jouletrace.followed import POLL_SECONDS, FollowedFiles, Note
from jouletrace.web.entrance import Entrance, Problem, origin_of
from jouletrace.web.passwords import Buckets, Passwords
from jouletrace.web.tls import Pems, names_of, read_pems, server_context
from jouletrace.web.web_config import TlsServerConfig, WebConfig, read_web_config

KEY: Final = "web.config.file"
PROBES: Final = frozenset({"/-/healthy", "/-/ready"})


@dataclass(frozen=True, slots=True)
class _InForce:
    """A web configuration with what is made of it."""

    config: WebConfig
    pems: Pems | None
    tls: ssl.SSLContext | None
    limits: Buckets


class Access:
    """The web configuration of a server, and the guard at its door. For the event loop."""

    def __init__(self, file: Path | None, entrance: Entrance, *, poll_seconds: float = POLL_SECONDS) -> None:
        """Read the file, None for none; raises ConfigError.

        `entrance` says whose token lets in without a password, and hears when these rules change.
        """
        self._entrance = entrance
        self._passwords = Passwords()
        self._told: list[Callable[[], None]] = []
        self._in_force = _InForce(WebConfig(), None, None, Buckets(0, 1))
        self.followed: FollowedFiles[_InForce] | None = None
        """The file with those that it names; None for none."""
        if file is not None:
            self.followed = FollowedFiles(
                KEY, lambda note: _read(file, note), on_change=self._take, poll_seconds=poll_seconds
            )
            self._in_force = self.followed.value

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context for new connections, None for plain HTTP."""
        return self._in_force.tls

    @property
    def tls_config(self) -> TlsServerConfig | None:
        """What is asked of TLS, None for plain text; for servers that are not `ssl`'s."""
        return self._in_force.config.tls_server_config

    @property
    def pems(self) -> Pems | None:
        """The certificates in force, None for plain text."""
        return self._in_force.pems

    def on_change(self, told: Callable[[], None]) -> None:
        """Let somebody know when it changes who is let in, or over which TLS; a renewed certificate changes neither."""
        self._told.append(told)

    def guard(self, app: web.Application, own_rules: Iterable[web.AbstractRouteDef] = ()) -> None:
        """Let an application answer the entitled only; routes with `own_rules` decide themselves who those are."""
        free = {route.handler for route in own_rules if isinstance(route, web.RouteDef)}

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            refusal = None
            if not _is_unix(request):  # Its mode says who may connect.
                refusal = self.name_refusal(names_of(_extra(request, "peercert") or {}))
            if refusal is None and request.match_info.handler not in free and not _is_probe(request):
                refusal = await self._refusal(request)
            return await handler(request) if refusal is None else _answer(request, refusal)

        app.middlewares.append(guard)
        app.on_response_prepare.append(self._prepare)

    def close(self) -> None:
        """Let go of the thread."""
        self._passwords.close()

    def name_refusal(self, names: frozenset[str]) -> Problem | None:
        """Return why a client whose certificate has these names is not answered, None for one that is."""
        tls = self.tls_config
        if tls is None or not tls.client_allowed_sans or names & frozenset(tls.client_allowed_sans):
            return None
        return Problem(403, "No name of your client certificate is in client_allowed_sans of the web configuration.")

    def _take(self, new: _InForce) -> None:
        old, self._in_force = self._in_force, new
        if _rules(old) != _rules(new):
            self._entrance.rules_changed()
            for told in self._told:
                told()

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
        refusal = await self._passwords.refusal(users, authorization, origin)
        # That took a while, and the rules that count are those at its end.
        return refusal if self._in_force is in_force else await self._refusal(request)

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        for name, value in self._in_force.config.http_server_config.headers.items():
            response.headers[name] = value
        if _extra(request, "sslcontext") is not self.tls and not _is_unix(request):
            # The client comes again, sees the new certificate and shows its own anew.
            response.headers[hdrs.CONNECTION] = "close"
            response.force_close()


def check(file: str) -> None:
    """Raise ConfigError when a web configuration, or a file that it names, is wrong; empty is none."""
    if file:
        _read(Path(file), lambda _: None)


def _read(file: Path, note: Note) -> _InForce:
    note(file)
    config = read_web_config(file)
    tls = config.tls_server_config
    limits = Buckets(config.rate_limit.interval_seconds, config.rate_limit.burst)
    if tls is None:
        return _InForce(config, None, None, limits)
    try:
        pems = read_pems(tls, note)
        return _InForce(config, pems, server_context(tls, pems), limits)
    except ConfigError as failure:
        raise ConfigError(f"{file}: {failure}") from None


def _rules(in_force: _InForce) -> tuple[object, ...]:
    config, pems = in_force.config, in_force.pems
    return config.basic_auth_users, config.tls_server_config, None if pems is None else pems.client_ca


def _is_probe(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical in PROBES


def _is_unix(request: web.Request) -> bool:
    connection = _extra(request, "socket")
    return connection is not None and connection.family == socket.AF_UNIX


def _extra(request: web.Request, name: str) -> Any:
    return None if request.transport is None else request.transport.get_extra_info(name)


def _answer(request: web.Request, problem: Problem) -> web.Response:
    if request.path.startswith("/v1/"):
        error = {"error": {"status": problem.status, "message": problem.message}}
        return web.json_response(error, status=problem.status, headers=problem.headers)
    return web.Response(text=problem.message + "\n", status=problem.status, headers=problem.headers)
