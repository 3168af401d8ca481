"""OTLP over gRPC: `TraceService/Export` on the same intake as HTTP. Needs grpcio."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

import grpc
import structlog

from jouletrace.config import split_address
from jouletrace.engines.otlp.decoding import UndecodableError
from jouletrace.engines.otlp.receiver import PROTOBUF, FullError, Outcome, answer
from jouletrace.web.entrance import Entrance
from jouletrace.web.serve import ListenError

SERVICE: Final = "opentelemetry.proto.collector.trace.v1.TraceService"
MAX_CALLS: Final = 64
"""Calls that are answered at a time; more are told to come again."""
STOP_SECONDS: Final = 2.0
"""Time that running calls get to finish when the daemon stops."""

Export = Callable[[bytes, str, bytes, Mapping[str, str]], Awaitable[Outcome]]
"""Takes a body, its media type, the bytes to pass on and their HTTP headers."""

_REFUSALS = {401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED}

_log = structlog.get_logger(__name__)


class GrpcServer:
    """Serves exports at addresses such as `:4317`. What came goes on over HTTP, as protobuf."""

    def __init__(self, addresses: Sequence[str], entrance: Entrance, export: Export) -> None:
        self._addresses = addresses
        self._entrance = entrance
        self._export = export
        self._server: grpc.aio.Server | None = None
        self.ports: Sequence[int] = ()
        """The real ones, once it has started."""

    async def start(self) -> None:
        """Listen; raises ListenError."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._entrance.max_body_bytes),
                ("grpc.so_reuseport", 0),  # Else a second daemon would share the port, and the spans.
            ],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        self.ports = [self._bind(server, address) for address in self._addresses]
        await server.start()
        self._server = server
        for port in self.ports:
            _log.info("receiving spans over gRPC", port=port)

    async def stop(self) -> None:
        """Take no more calls and let the running ones finish."""
        if self._server is not None:
            await self._server.stop(STOP_SECONDS)

    @staticmethod
    def _bind(server: grpc.aio.Server, address: str) -> int:
        host, port = split_address(address)
        name = "[::]" if host is None else f"[{host}]" if ":" in host else host
        try:
            bound: int = server.add_insecure_port(f"{name}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise ListenError(
                f"Cannot listen on {address}: the port is in use or this machine has no such address; "
                f"`ss -ltnp 'sport = :{port}'` shows who has it: stop that, or choose another with "
                "--otlp.grpc-listen-address."
            )
        return bound

    async def _answer(self, request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        told: dict[str, Any] = dict(context.invocation_metadata() or ())
        refusal = self._entrance.stranger(_address(context.peer()), str(told.get("authorization", "")))
        if refusal is not None:
            await context.abort(_REFUSALS[refusal.status], refusal.message)
        headers = {"Content-Type": PROTOBUF}
        if "authorization" in told:
            headers["Authorization"] = str(told["authorization"])
        try:
            outcome = await self._export(request, PROTOBUF, request, headers)
        except UndecodableError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except FullError:
            # Retried by exporters as it is; RESOURCE_EXHAUSTED would need a RetryInfo.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Too many records wait to be booked; send this again.")
        return answer(outcome, PROTOBUF)


def _address(peer: str) -> str:
    """Return the IP address of a gRPC peer such as `ipv4:127.0.0.1:52` or `ipv6:%5B::1%5D:52`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""
