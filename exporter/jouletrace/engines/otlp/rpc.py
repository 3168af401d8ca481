"""OTLP over gRPC: `TraceService/Export` on the same intake as HTTP. Needs grpcio."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import grpc
import structlog

from jouletrace.config import ConfigError, split_address
from jouletrace.engines.otlp.decoding import UndecodableError
from jouletrace.engines.otlp.receiver import PROTOBUF, FullError, Outcome, answer
from jouletrace.web.access import Access
from jouletrace.web.entrance import BODIES_BYTES, BODY_SECONDS, Entrance, Problem
from jouletrace.web.serve import KEEP_ALIVE_SECONDS, Limits, ListenError
from jouletrace.web.tls import Pems
from jouletrace.web.web_config import ClientAuth, TlsVersion

SERVICE: Final = "opentelemetry.proto.collector.trace.v1.TraceService"
CALLS_PER_CONNECTION: Final = 8
"""At a time; an exporter makes one. gRPC's own bound on all calls answers with a status that exporters do not retry."""
STOP_SECONDS: Final = 2.0
"""Time that running calls get to finish when the daemon stops."""

Export = Callable[[bytes, str, bytes, Mapping[str, str]], Awaitable[Outcome]]
"""Takes a body, its media type, the bytes to pass on and their HTTP headers."""
Context = grpc.aio.ServicerContext[Any, bytes]

_REFUSALS = {401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED}

_log = structlog.get_logger(__name__)

# Of a client that has gone before its answer; it would be a traceback each time.
logging.getLogger("grpc._cython.cygrpc").addFilter(
    lambda record: not record.getMessage().startswith("ExecuteBatchError")
)


@dataclass(frozen=True, slots=True)
class _Security:
    """What of the web configuration a listening port cannot change."""

    tls: bool = False
    asks_for_certificate: bool = False
    client_ca: bytes = b""
    """gRPC would take a new one, too, but let the connections stand whose certificates are of the old one."""


class GrpcServer:
    """Serves exports at addresses such as `:4317`. What came goes on over HTTP, as protobuf.

    A rotated certificate counts from the next connection on. When TLS comes, goes, or begins to ask for certificates
    or for those of another authority, the ports are closed and opened again.
    """

    def __init__(self, addresses: Sequence[str], entrance: Entrance, export: Export) -> None:
        self._addresses = addresses
        self._entrance = entrance
        self._export = export
        # All that is being received or taken in is in memory; a slow sender waits here, not there.
        self._turns = asyncio.Semaphore(max(1, BODIES_BYTES // entrance.max_body_bytes))
        self._access: Access
        self._security: _Security | None = None
        """Of the listening ports; None while there are none."""
        self._served: Pems | None = None
        self._server: grpc.aio.Server | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def start(self, access: Access) -> None:
        """Listen; raises ListenError, and ConfigError when gRPC cannot be held to what is asked of TLS."""
        self._access = access
        await self._listen()
        access.on_change(self._renew_soon)

    async def stop(self) -> None:
        """Take no more calls and let the running ones finish."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait({self._renewal})
        if self._server is not None:
            await self._server.stop(STOP_SECONDS)

    async def _listen(self) -> None:
        security = _security_of(self._access)
        limits = Limits()
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._entrance.max_body_bytes),
                ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
                ("grpc.max_allowed_incoming_connections", limits.connections_per_origin),
                ("grpc.server_handshake_timeout_ms", int(limits.head_seconds * 1000)),
                ("grpc.max_connection_idle_ms", int(KEEP_ALIVE_SECONDS * 1000)),
                ("grpc.so_reuseport", 0),  # Else a second daemon would share the port, and the spans.
            ],
        )
        # A stream of one message is the same on the wire, and lets strangers be refused before they have sent it.
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(self._answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        credentials = self._credentials(security) if security.tls else None
        bound = [_bind(server, address, credentials) for address in self._addresses]
        await server.start()
        self._server, self._security = server, security
        self._addresses = [address for address, _ in bound]
        for _, port in bound:
            _log.info("receiving spans over gRPC", port=port, tls=security.tls)

    def _credentials(self, security: _Security) -> grpc.ServerCredentials:
        self._served = self._access.pems
        assert self._served is not None
        return grpc.dynamic_ssl_server_credentials(
            _certificates(self._served),
            self._new_certificates,  # type: ignore[arg-type]  # the stubs do not know that None means no new ones
            security.asks_for_certificate,
        )

    def _new_certificates(self) -> grpc.ServerCertificateConfiguration | None:
        """Return certificates that have come since the last call, None for no new ones. Called by gRPC's threads."""
        pems = self._access.pems
        if pems is None or pems == self._served:
            return None
        self._served = pems
        return _certificates(pems)

    def _renew_soon(self) -> None:
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        try:
            while _security_of(self._access) != self._security:
                if self._server is not None:
                    await self._server.stop(STOP_SECONDS)
                    self._server = None
                await self._listen()
        except (ConfigError, ListenError) as failure:
            # Rather nothing than less than what is asked for.
            if self._server is not None:
                await self._server.stop(STOP_SECONDS)
            self._server = self._security = None
            _log.error("no more spans are received over gRPC", problem=str(failure))

    async def _answer(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        told: dict[str, str] = {name: str(value) for name, value in context.invocation_metadata() or ()}
        refusal = self._refusal(told, context)
        if refusal is not None:
            await context.abort(_REFUSALS[refusal.status], refusal.message)
        headers = {"Content-Type": PROTOBUF}
        if "authorization" in told:
            headers["Authorization"] = told["authorization"]
        try:
            async with asyncio.timeout(BODY_SECONDS), self._turns:
                request = await anext(requests, None)
                if request is None:  # It was over the limit, or its client has gone.
                    raise UndecodableError("An export is one message, and none came.")
                outcome = await self._export(request, PROTOBUF, request, headers)
        except UndecodableError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (FullError, TimeoutError):
            # Retried by exporters as it is; RESOURCE_EXHAUSTED would need a RetryInfo.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Too many records wait to be booked; send this again.")
        return answer(outcome, PROTOBUF)

    def _refusal(self, told: Mapping[str, str], context: Context) -> Problem | None:
        names = context.auth_context().get("x509_subject_alternative_name", ())
        refusal = self._access.name_refusal(frozenset(name.decode(errors="replace") for name in names))
        return refusal or self._entrance.stranger(_address(context.peer()), told)


def _security_of(access: Access) -> _Security:
    """Return what a port must do; raises ConfigError for what grpcio cannot be told."""
    tls, pems = access.tls_config, access.pems
    if tls is None or pems is None:
        return _Security()
    if (
        (tls.min_version, tls.max_version) != (TlsVersion.TLS12, TlsVersion.TLS13)
        or tls.cipher_suites
        or tls.curve_preferences
    ):
        raise ConfigError(
            "otlp.grpc_listen_address: gRPC cannot be held to min_version, max_version, cipher_suites and "
            "curve_preferences of the web configuration: it takes TLS 1.2 and 1.3; remove these, or use OTLP over HTTP"
        )
    # Which certificates are taken is asked at each call; gRPC knows no "if given".
    asks = tls.client_auth_type is ClientAuth.REQUIRED or bool(tls.client_allowed_sans)
    return _Security(True, asks, pems.client_ca)


def _certificates(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.client_ca or None)


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> tuple[str, int]:
    """Return the address and the port that were bound; raises ListenError."""
    host, port = split_address(address)
    name = "[::]" if host is None else f"[{host}]" if ":" in host else host
    try:
        place = f"{name}:{port}"
        bound: int = (
            server.add_insecure_port(place) if credentials is None else server.add_secure_port(place, credentials)
        )
    except RuntimeError:
        bound = 0
    if not bound:
        raise ListenError(
            f"Cannot listen on {address}: the port is in use or this machine has no such address; "
            f"`ss -ltnp 'sport = :{port}'` shows who has it: stop that, or choose another with "
            "--otlp.grpc-listen-address."
        )
    return f"{name}:{bound}", bound


def _address(peer: str) -> str:
    """Return the IP address of a gRPC peer such as `ipv4:127.0.0.1:52` or `ipv6:%5B::1%5D:52`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""
