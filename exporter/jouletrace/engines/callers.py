"""Who asks: the id, trace and tenant that a request's headers name. Standard library only.

The same rules hold in the proxy and in the middleware, so that what both see is one request.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

MAX_ID: Final = 256
MAX_LABEL: Final = 128
"""What the daemon takes at most (docs/api.md); a longer value would cost the whole record."""

_TRACEPARENT: Final = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
"""W3C Trace Context, section 3.2."""


class Callers:
    """Turns headers into the beginning of a request record. For one thread.

    Tenants are taken from `tenant_headers` alone, the first that is there: whoever can set one decides who pays.
    """

    def __init__(self, engine_id: str | None, tenant_headers: Sequence[str]) -> None:
        self._engine_id = engine_id
        self._tenant_headers = tenant_headers
        self._in_flight: dict[str, set[int]] = {}

    def record(self, header: Callable[[str], str | None], arrival_ns: int) -> dict[str, Any]:
        """Return the record of a request that has just come; `header` returns a header by its lower-case name."""
        given = (header("x-request-id") or "").strip()
        request_id = given if 0 < len(given) <= MAX_ID and given.isprintable() else uuid.uuid4().hex
        record: dict[str, Any] = {"request_id": request_id, "arrival_ns": arrival_ns, "status": "running"}
        if self._engine_id is not None:
            record["engine_id"] = self._engine_id
        if attempt := self._attempt(request_id):
            record["attempt"] = attempt
        trace_id = trace_id_of(header("traceparent"))
        if trace_id is not None:
            record["trace_id"] = trace_id
        tenant = next((value for name in self._tenant_headers if (value := label(header(name)))), None)
        if tenant is not None:
            record["tenant"] = tenant
        return record

    def ended(self, record: Mapping[str, Any]) -> None:
        """Say that a request has ended, once: its id is free for another one."""
        attempts = self._in_flight.get(record["request_id"], set())
        attempts.discard(record.get("attempt", 0))
        if not attempts:
            self._in_flight.pop(record["request_id"], None)

    def _attempt(self, request_id: str) -> int:
        """Return a number that no other request in flight has under this id: some clients send one id for all."""
        attempts = self._in_flight.setdefault(request_id, set())
        attempt = next(number for number in range(len(attempts) + 1) if number not in attempts)
        attempts.add(attempt)
        return attempt


def trace_id_of(traceparent: str | None) -> str | None:
    """Return the trace id of a `traceparent` header, None when there is none or it is not valid."""
    match = _TRACEPARENT.fullmatch((traceparent or "").strip())
    return match[1] if match is not None and match[1].strip("0") else None


def label(text: str | None) -> str | None:
    """Return text as model or tenant: without spaces around it, None when it is empty, too long or not printable."""
    text = (text or "").strip()
    return text if 0 < len(text) <= MAX_LABEL and text.isprintable() else None
