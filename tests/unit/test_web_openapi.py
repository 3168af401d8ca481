import json
from collections.abc import Iterable

import pytest
from aiohttp import web
from tests.recording_account import RecordingAccount
from tests.unit.test_web_application import app

from jouletrace.clock import SystemClock
from jouletrace.requests.inbox import Inbox
from jouletrace.requests.service import LedgerService
from jouletrace.web.api import Api
from jouletrace.web.openapi import openapi_document, openapi_route


def api_routes() -> Iterable[web.RouteDef]:
    clock, inbox = SystemClock(), Inbox(1024, 1 << 20)
    service = LedgerService(RecordingAccount(), inbox, clock=clock, devices=lambda: 0.0)
    return [*Api(service, inbox, clock=clock).routes(), openapi_route("/metrics")]


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    served = {(route.method, route.path) for route in api_routes()}
    for resource in app().router.resources():
        served |= {(route.method, resource.canonical) for route in resource if route.method != "HEAD"}
    paths = json.loads(openapi_document())["paths"]
    told = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    # The page's own files are no interface. Its stream and OTLP are made elsewhere, tested with the daemon.
    assert {each for each in served if not each[1].startswith("/-/live/")} == told - {
        ("GET", "/v1/live"),
        ("POST", "/v1/traces"),
    }


def test_every_reference_is_defined() -> None:
    text = openapi_document()
    schemas = json.loads(text)["components"]["schemas"]
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(schemas)
    assert "record" not in schemas["RequestRecord"]["required"]


@pytest.mark.parametrize("path", ["/metrics", "/m"])
def test_the_telemetry_path_is_the_configured_one(path: str) -> None:
    assert path in json.loads(openapi_document(path))["paths"]
