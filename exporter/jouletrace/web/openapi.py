"""The OpenAPI document of everything that is served over HTTP, made from the structs that decode and encode it."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from jouletrace.requests.account import RequestEnergy
from jouletrace.requests.records import EngineRecord, RequestRecord, StepRecord
from jouletrace.web.api import Receipt

VERSION: Final = "3.1.0"
"""Of OpenAPI; its schemas are JSON Schema 2020-12, as `/v1/schema` is."""
_JSON: Final = "application/json"
_TEXT: Final = "text/plain"


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request was not served."""

    status: int
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Any answer below `/v1/` with a status of 400 or more, but for the receipts of records."""

    error: ErrorDetail


_COMPONENTS: Final = (EngineRecord, StepRecord, RequestRecord, Receipt, RequestEnergy, ErrorAnswer)


def openapi_route(telemetry_path: str) -> web.RouteDef:
    """Return the route of the document; everybody may read it, it says nothing about this node."""

    async def get(_: web.Request) -> web.Response:
        return web.Response(text=openapi_document(telemetry_path), content_type=_JSON)

    return web.get("/v1/openapi.json", get)


@functools.cache
def openapi_document(telemetry_path: str = "/metrics") -> str:
    """Return the document as indented JSON. Its `servers` are those who gave it."""
    _, schemas = msgspec.json.schema_components(_COMPONENTS, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        if "record" in schema.get("properties", {}):
            schema["required"].remove("record")
    schemas["Moment"] = {"type": "object", "description": "Any fields of RequestRecord but request_id."}
    document = {
        "openapi": VERSION,
        "info": {
            "title": "jouletrace",
            "version": "1",
            "description": "Where do the joules of AI inference go?",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(telemetry_path),
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A word of ingest.token_file."},
                "password": {"type": "http", "scheme": "basic", "description": "A user of the web configuration."},
            },
        },
    }
    return json.dumps(document, indent=2) + "\n"


def _paths(telemetry_path: str) -> dict[str, Any]:
    records = {"engines": "EngineRecord", "steps": "StepRecord", "requests": "RequestRecord"}
    moments = {"start": "begins", "first-token": "has its first token", "finish": "ends"}
    request_id = _parameter("path", "request_id", {"type": "string", "minLength": 1, "maxLength": 256})
    paths: dict[str, Any] = {
        telemetry_path: {"get": _read("Metrics for Prometheus.", _media(_TEXT), {503: "Too many scrapes."})},
        "/": {"get": _read("The live page.", _media("text/html"))},
        "/-/healthy": {
            "get": _operation("Whether the process answers.", [], {200: _answer("It does.", _media(_TEXT))})
        },
        "/-/ready": {
            "get": _operation(
                "Whether every GPU has a fresh sample.",
                [],
                {200: _answer("Yes.", _media(_TEXT)), 503: _answer("No, and why.", _media(_TEXT))},
            )
        },
        "/v1/live": {"get": _live()},
        "/v1/schema": {
            "get": _operation(
                "The JSON Schema of records.",
                [],
                {200: _answer("It.", {"application/schema+json": {"schema": {"type": "object"}}})},
            )
        },
        "/v1/openapi.json": {"get": _operation("This document.", [], {200: _answer("It.", _object())})},
        "/v1/ledger": {"get": _entitled("The node's account.", _object())},
        "/v1/diagnosis": {"get": _entitled("What each GPU and engine wastes, and why.", _object())},
        "/v1/requests/{request_id}": {
            "get": _entitled(
                "What a request used.",
                _json(_reference("RequestEnergy")),
                {
                    400: "A parameter makes no sense.",
                    404: "It is not known.",
                    503: "Who may ask has changed: ask again.",
                },
                [
                    request_id,
                    _parameter("query", "engine_id", {"type": "string"}),
                    _parameter("query", "wait", _WAIT),
                ],
            )
        },
        "/v1/traces": {
            "post": _entitled(
                "OTLP traces (opentelemetry-proto, ExportTraceServiceRequest).",
                {"application/x-protobuf": {}, _JSON: {}},
                _REFUSED_BODIES,
                body={"application/x-protobuf": {}, _JSON: {"schema": {"type": "object"}}},
                error_media={"application/x-protobuf": {}, _JSON: {}},
            )
        },
    }
    for name, struct in records.items():
        schema = {"anyOf": [_reference(struct), {"type": "array", "items": _reference(struct), "maxItems": 65_536}]}
        path = paths.setdefault(f"/v1/{name}", {})
        path["post"] = _entitled(
            f"Take {name}: one, an array, or one a line.",
            _json(_reference("Receipt")),
            _REFUSED_BODIES,
            body={_JSON: {"schema": schema}, "application/x-ndjson": {"schema": {"type": "string"}}},
            error_media=_json({"anyOf": [_reference("Receipt"), _reference("ErrorAnswer")]}),
        )
    paths["/v1/requests"]["get"] = _entitled(
        "What the requests that ended last used, the newest first.",
        _json(
            {
                "type": "object",
                "properties": {"requests": {"type": "array", "items": _reference("RequestEnergy")}},
                "required": ["requests"],
            }
        ),
        {400: "The limit makes no sense."},
        [_parameter("query", "limit", {"type": "integer", "minimum": 1, "maximum": 1000})],
    )
    for name, what in moments.items():
        paths[f"/v1/requests/{{request_id}}/{name}"] = {
            "post": _entitled(
                f"Say that a request {what}.",
                _json(_reference("Receipt")),
                _REFUSED_BODIES,
                [request_id],
                body={_JSON: {"schema": _reference("Moment")}},
                error_media=_json({"anyOf": [_reference("Receipt"), _reference("ErrorAnswer")]}),
            )
        }
    return paths


_WAIT: Final = {
    "type": "string",
    "pattern": "^[0-9]{1,3}ms$",
    "description": "How long to wait for the final figure; other durations, such as 2s, are taken up to 30s.",
}
_REFUSED_BODIES: Final = {
    400: "Nothing of it can be taken.",
    408: "The body did not come in time.",
    413: "Too large.",
    415: "An unknown encoding.",
    429: "The queue is full: come again.",
}


def _live() -> dict[str, Any]:
    """Return the live monitor's stream. OpenAPI 3.1 has no schema for events; docs/live.md says what is in each."""
    errors = _json(_reference("ErrorAnswer"))
    operation = _read("What the live page shows, as server-sent events.", _media("text/event-stream"))
    operation["responses"]["200"]["description"] = (
        "A stream that does not end. Each event is a line `event: NAME`, a line `data: JSON` and an empty line: "
        "`hello` once, then each second `trace`, `drivers`, `node` and, for clients on this machine or with the token, "
        "`requests`. The first `trace` and `drivers` go a minute back."
    )
    operation["responses"]["503"] = _answer("Too many look already: come again after Retry-After seconds.", errors)
    return operation


def _read(summary: str, media: Mapping[str, Any], more: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return a GET that the web configuration guards."""
    refusals = {
        401: "User or password is missing or wrong.",
        403: "No name of the client certificate is allowed.",
        429: "Too often.",
        503: "Busy.",
    } | dict(more or {})
    answers = {200: _answer("It.", media)} | {status: _answer(text, {}) for status, text in refusals.items()}
    return _operation(summary, [], answers) | {"security": [{}, {"password": []}, {"token": []}]}


def _entitled(
    summary: str,
    media: Mapping[str, Any],
    refusals: Mapping[int, str] | None = None,
    parameters: Sequence[Mapping[str, Any]] = (),
    *,
    body: Mapping[str, Any] | None = None,
    error_media: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return an operation for clients on the machine and those with the token."""
    errors = error_media or _json(_reference("ErrorAnswer"))
    why = {401: "The token is missing or wrong.", 403: "Not a client on this machine."} | dict(refusals or {})
    answers = {200: _answer("It.", media)} | {status: _answer(text, errors) for status, text in sorted(why.items())}
    operation = _operation(summary, parameters, answers) | {"security": [{}, {"token": []}]}
    if body is not None:
        operation["requestBody"] = {"content": body}
    return operation


def _operation(
    summary: str, parameters: Sequence[Mapping[str, Any]], answers: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {str(status): answer for status, answer in answers.items()},
    }


def _answer(text: str, media: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": media} if media else {"description": text}


def _media(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string"}}}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {_JSON: {"schema": schema}}


def _object() -> dict[str, Any]:
    return _json({"type": "object"})


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameter(place: str, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
