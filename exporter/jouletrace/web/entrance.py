"""Who may send records, and what they send: the rules of every way in over HTTP."""

import asyncio
import hmac
import ipaddress
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

BODY_SECONDS: Final = 30.0
"""A client that has not sent its body by then is sent away."""
BODIES_BYTES: Final = 64 << 20
"""All bodies that are being received or decoded together; past it clients are asked to wait."""
RETRY_SECONDS: Final = 1
FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers of which a proxy sends one or another (RFC 7239, RFC 9110 section 7.6.3, and the habits of nginx and Envoy):
whoever asked it may be anywhere, though the proxy is on this machine."""
PEERS: Final = 256
"""Addresses and Host headers of which is remembered whether they are this machine's."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a client is not served: the HTTP status and a sentence for whoever runs it."""

    status: int
    message: str
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """What a client sent."""

    content: bytes
    """Unpacked."""
    sent: bytes
    """As it came over the wire; empty for a packed body that nobody asked to keep so."""

    @property
    def held_bytes(self) -> int:
        """What it takes in memory."""
        return len(self.content) if self.sent is self.content else len(self.content) + len(self.sent)


class Entrance:
    """Lets clients on this machine in and those with a token, nobody else, and takes their bodies.

    What a tenant uses is nobody else's business, and records decide who pays.
    """

    def __init__(self, *, tokens: Sequence[str] = (), max_body_bytes: int, body_seconds: float = BODY_SECONDS) -> None:
        """Of several tokens each is good; without one only clients on this machine are let in."""
        self._tokens = _encoded(tokens)
        self.rules = 0
        """How often it has changed who is let in. What was begun before is over: its client may be one no more."""
        self.max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._body_bytes = 0

    @property
    def needs_token(self) -> bool:
        """Whether clients must send a token."""
        return bool(self._tokens)

    def use_tokens(self, tokens: Sequence[str]) -> None:
        """Ask for one of these, at least one, from now on. There is no way back to none."""
        if _encoded(tokens) != self._tokens:
            self._tokens = _encoded(tokens)
            self.rules_changed()

    def rules_changed(self) -> None:
        """Say that something else decides now who is let in."""
        self.rules += 1

    def refusal(self, request: web.Request) -> Problem | None:
        """Return why this client is not served, None for one that is."""
        if hdrs.ORIGIN in request.headers:
            # A page in somebody's browser on this machine would count as a client on this machine.
            return Problem(403, "Web pages of other origins are not answered here; remove the Origin header.")
        refusal = self.stranger(_address_of(request.transport), request.headers)
        if refusal is None and not self._tokens and not names_loopback(request.headers.get(hdrs.HOST, "")):
            # A page whose name was made to point at this machine (DNS rebinding) sends no Origin with a GET.
            return Problem(
                403,
                "The Host header does not name this machine's loopback; ask localhost or 127.0.0.1, or set "
                "ingest.token_file and send the token.",
            )
        return refusal

    def stranger(self, address: str, headers: Mapping[str, str]) -> Problem | None:
        """Return why a client from this address is not served, None for one that is.

        `headers` takes names in lower case, as gRPC's metadata does.
        """
        if not self._tokens:
            if is_loopback(address):
                if not any(name in headers for name in FORWARDED):
                    return None
                return Problem(
                    403,
                    "A proxy has passed this on, and who asked it may be anywhere; ask without the proxy, or set "
                    "ingest.token_file and send the token.",
                )
            return Problem(
                403,
                "Only clients on this machine are answered; set ingest.token_file to let others in, with the token.",
            )
        if self.has_token(headers.get("authorization", "")):
            return None
        return Problem(
            401,
            "The token is missing or wrong: send that of ingest.token_file as Authorization: Bearer TOKEN.",
            {hdrs.WWW_AUTHENTICATE: 'Bearer realm="jouletrace"'},
        )

    def has_token(self, authorization: str) -> bool:
        """Return whether an Authorization is a token, which lets in everywhere; never, where there is none."""
        scheme, _, given = authorization.partition(" ")
        word = given.strip().encode(errors="surrogateescape")
        # All are compared, so that the time does not tell which one it is.
        return sum(hmac.compare_digest(word, token) for token in self._tokens) > 0 and scheme.lower() == "bearer"

    def hold(self, body: Body) -> None:
        """Count a body as being dealt with; `release` must follow."""
        self._body_bytes += body.held_bytes

    def release(self, body: Body) -> None:
        """Give its room back."""
        self._body_bytes -= body.held_bytes

    async def read(self, request: web.Request, *, keep_sent: bool = False) -> Body | Problem:
        """Return the body, or why it is refused. `keep_sent`: whether a packed one is wanted as it came, too."""
        limit = self.max_body_bytes
        parts: list[bytes] = []
        sent: list[bytes] = []
        size = held = 0
        encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
        if encoding == "identity" and request.content.is_eof():
            # It came with the headers, as small ones do; waiting for it costs more than decoding it.
            whole = request.content.read_nowait()
            return Body(whole, whole) if len(whole) <= limit else _too_large(limit)
        if encoding not in ("identity", "gzip"):
            return Problem(415, "The body's Content-Encoding is not known here; send it as it is, or with gzip.")
        packed_body = _Gunzip(limit + 1) if encoding == "gzip" else None
        try:
            async with asyncio.timeout(self._body_seconds):
                async for received in request.content.iter_any():
                    part = received if packed_body is None else packed_body.unpack(received)
                    size += len(part)
                    parts.append(part)
                    more = len(part)
                    if packed_body is not None and keep_sent:
                        sent.append(received)
                        more += len(received)
                    self._body_bytes += more
                    held += more
                    if size > limit:
                        return _too_large(limit)
                    if self._body_bytes > max(BODIES_BYTES, limit):
                        return Problem(
                            429,
                            "Too much is being received at a time; send this again.",
                            {hdrs.RETRY_AFTER: str(RETRY_SECONDS)},
                        )
            if packed_body is not None:
                packed_body.check_end()
        except TimeoutError:
            return Problem(408, f"The body did not come within {self._body_seconds:g} s; send it at once.")
        except ConnectionError:
            return Problem(408, "The connection ended before the body did; send this again.")
        except web.RequestPayloadError:
            return Problem(
                400, "The body's chunks are not as HTTP has them; send it again, with its length or chunked."
            )
        except zlib.error:
            return Problem(400, "The body cannot be unpacked: it is damaged or not gzip, as its Content-Encoding says.")
        finally:
            self._body_bytes -= held
        content = b"".join(parts)
        return Body(content, content if packed_body is None else b"".join(sent))


OTHER_RULES: Final = Problem(
    503, "It was changed meanwhile who is answered; ask again.", {hdrs.RETRY_AFTER: str(RETRY_SECONDS)}
)
"""To a client that waited for its answer."""


def _encoded(tokens: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(token.encode() for token in tokens)


def _address_of(transport: asyncio.BaseTransport | None) -> str:
    """Return a client's IP address, empty for one that has gone; one on a Unix socket is a client on this machine."""
    if transport is None:
        return ""
    listening, peer = transport.get_extra_info("socket"), transport.get_extra_info("peername")
    if listening is not None and listening.family == socket.AF_UNIX:
        return "127.0.0.1"
    return str(peer[0]) if isinstance(peer, tuple) else ""


class _Gunzip:
    """Unpacks a gzip stream piece by piece, up to a limit: a kilobyte of it can hold a megabyte of nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._stream = zlib.decompressobj(wbits=31)  # A gzip header and trailer (zlib.h, inflateInit2).

    def unpack(self, packed: bytes) -> bytes:
        """Return what a piece unpacks to, no more than the limit in all; raises zlib.error."""
        part = self._stream.decompress(packed, self._left) if self._left else b""
        self._left -= len(part)
        return part

    def check_end(self) -> None:
        """Raise zlib.error when the stream was cut off."""
        if not self._stream.eof:
            raise zlib.error("incomplete")


@lru_cache(PEERS)
def names_loopback(host: str) -> bool:
    """Return whether a Host header, with or without a port, is localhost or a loopback address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@lru_cache(PEERS)
def is_loopback(address: str) -> bool:
    """Return whether an IP address, with or without a zone, is this machine's loopback; empty is not."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


@lru_cache(PEERS)
def origin_of(address: str) -> str:
    """Return whom an IP address stands for when attempts are counted: an IPv4 address, or the /64 of an IPv6 one.

    Whoever has one IPv6 address has 2^64 of them (RFC 6177).
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _too_large(limit_bytes: int) -> Problem:
    return Problem(
        413,
        f"The body is over {limit_bytes >> 20} MiB, unpacked; send it in parts, or raise ingest.max_body_mebibytes.",
    )
