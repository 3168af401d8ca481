import re

import pytest

from jouletrace.engines.callers import Callers, trace_id_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
"""The example of W3C Trace Context, section 3.2."""


def test_a_record_of_what_the_headers_say() -> None:
    headers = {"x-request-id": "req-0", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-tenant-id": " acme "}
    callers = Callers("vllm-0", ["x-team", "x-tenant-id"])
    assert callers.record(headers.get, 17) == {
        "request_id": "req-0",
        "arrival_ns": 17,
        "status": "running",
        "engine_id": "vllm-0",
        "trace_id": TRACE,
        "tenant": "acme",
    }


def test_only_listed_headers_say_who_pays() -> None:
    record = Callers(None, []).record({"x-tenant-id": "acme"}.get, 1)
    assert "tenant" not in record
    assert "engine_id" not in record


@pytest.mark.parametrize("given", [None, "", "  ", "x" * 257, "a\x00b"])
def test_an_id_that_cannot_be_one_is_replaced(given: str | None) -> None:
    record = Callers(None, []).record(lambda name: given if name == "x-request-id" else None, 1)
    assert re.fullmatch("[0-9a-f]{32}", record["request_id"])


@pytest.mark.parametrize("tenant", ["", "x" * 129, "a\nb"])
def test_a_tenant_that_cannot_be_a_label_is_left_out(tenant: str) -> None:
    assert "tenant" not in Callers(None, ["x-tenant"]).record({"x-tenant": tenant}.get, 1)


def test_one_id_for_several_requests_at_once() -> None:
    callers = Callers(None, [])
    first, second, third = (callers.record({"x-request-id": "same"}.get, 1) for _ in range(3))
    assert [record.get("attempt", 0) for record in (first, second, third)] == [0, 1, 2]
    callers.ended(second)
    assert callers.record({"x-request-id": "same"}.get, 1)["attempt"] == 1
    for record in (first, second, third):
        callers.ended(record)
    # Once they have ended the account tells a new one by its arrival.
    assert "attempt" not in callers.record({"x-request-id": "same"}.get, 1)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"cc-{TRACE}-b7ad6b7169203331-01-what-the-future-will-be-like", TRACE),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}", None),
        ("", None),
        (None, None),
    ],
)
def test_traceparent(header: str | None, expected: str | None) -> None:
    assert trace_id_of(header) == expected
