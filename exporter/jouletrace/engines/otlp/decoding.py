"""Bytes to spans: OTLP's protobuf and its JSON, in pieces that take about a millisecond at most.

Of the spans only those are decoded further that are named as a request's.
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status as StatusMessage

from jouletrace.engines.otlp.spans import ATTRIBUTES, Attributes, Span, Value, engine_kind

PIECE_SPANS: Final = 64
"""Spans of a piece: 0.6 ms when all are requests (9 us each)."""
DIGITS: Final = 20
"""Most characters of a 64-bit integer."""
SHOWN_CHARACTERS: Final = 120
"""An error repeats at most this much of what somebody else wrote."""

_ERROR = StatusMessage.StatusCode.STATUS_CODE_ERROR


class UndecodableError(ValueError):
    """A body is not an ExportTraceServiceRequest; the message says why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some spans that come from one process."""

    resource: Attributes
    spans: list[tuple[str, Span]] = field(default_factory=list)
    """Those that are named as a request's, each with the kind of its engine."""
    errors: list[str] = field(default_factory=list)
    """What is wrong with those that could not be decoded, one entry a span."""


def protobuf_pieces(content: bytes) -> Iterator[Piece]:
    """Decode a protobuf body; raises UndecodableError."""
    try:
        message = ExportTraceServiceRequest.FromString(content)
    except DecodeError:
        raise UndecodableError("The body is not an ExportTraceServiceRequest: it is damaged or cut off.") from None
    for resource_spans in message.resource_spans:
        resource: Mapping[str, Value] | None = None
        for scope_spans in resource_spans.scope_spans:
            spans = scope_spans.spans
            for start in range(0, len(spans), PIECE_SPANS):
                some = spans[start : start + PIECE_SPANS]
                found = [(kind, span) for span in some if (kind := engine_kind(span.name)) is not None]
                if found and resource is None:
                    resource = _attributes(resource_spans.resource.attributes, None)
                yield Piece(resource or {}, [(kind, _span(span)) for kind, span in found])


def _span(span: SpanMessage) -> Span:
    return Span(
        span.name,
        span.trace_id.hex() if len(span.trace_id) == 16 else "",
        span.span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == _ERROR,
        _attributes(span.attributes, ATTRIBUTES),
    )


def _attributes(pairs: Any, wanted: frozenset[str] | None) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for pair in pairs:
        key = pair.key
        if wanted is None or key in wanted:
            value = _value(pair.value)
            if value is not None:
                found[key] = value
    return found


def _value(value: AnyValue) -> Value | None:
    kind = value.WhichOneof("value")
    if kind is None or kind in ("kvlist_value", "bytes_value"):
        return None
    if kind == "array_value":
        return tuple(item.string_value for item in value.array_value.values)
    plain: Value = getattr(value, kind)
    return plain


# --- JSON: protobuf's mapping, except that ids are hexadecimal and enums numbers (OTLP, "JSON Protobuf Encoding") ---


class _Json(msgspec.Struct, frozen=True, rename="camel"):
    pass


class _JsonArray(_Json, frozen=True):
    values: list["_JsonValue"] = []


class _JsonValue(_Json, frozen=True):
    string_value: str | None = None
    int_value: int | str | None = None
    """64-bit integers are written as text."""
    double_value: float | str | None = None
    bool_value: bool | None = None
    array_value: _JsonArray | None = None


class _JsonAttribute(_Json, frozen=True):
    key: str = ""
    value: msgspec.Raw = msgspec.Raw(b"{}")


class _JsonStatus(_Json, frozen=True):
    code: int | str = 0


class _JsonName(_Json, frozen=True):
    name: str = ""


class _JsonSpan(_JsonName, frozen=True):
    trace_id: str = ""
    span_id: str = ""
    start_time_unix_nano: int | str = 0
    end_time_unix_nano: int | str = 0
    status: _JsonStatus = _JsonStatus()
    attributes: list[_JsonAttribute] = []


class _JsonScopeSpans(_Json, frozen=True):
    spans: list[msgspec.Raw] = []


class _JsonResource(_Json, frozen=True):
    attributes: list[_JsonAttribute] = []


class _JsonResourceSpans(_Json, frozen=True):
    resource: _JsonResource = _JsonResource()
    scope_spans: list[_JsonScopeSpans] = []


class _JsonExport(_Json, frozen=True):
    resource_spans: list[_JsonResourceSpans] = []


_JSON_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_export = msgspec.json.Decoder(_JsonExport)
_name = msgspec.json.Decoder(_JsonName)
_json_span = msgspec.json.Decoder(_JsonSpan)
_json_value = msgspec.json.Decoder(_JsonValue)


def json_pieces(content: bytes) -> Iterator[Piece]:
    """Decode a JSON body; raises UndecodableError. A span with a wrong type is an error of its own."""
    try:
        export = _export.decode(content)
    except _JSON_ERRORS as error:
        raise UndecodableError(f"The body is not an ExportTraceServiceRequest as JSON: {_said(error)}.") from None
    for resource_spans in export.resource_spans:
        resource = _json_attributes(resource_spans.resource.attributes, None)
        for scope_spans in resource_spans.scope_spans:
            spans = scope_spans.spans
            for start in range(0, len(spans), PIECE_SPANS):
                piece = Piece(resource)
                for raw in spans[start : start + PIECE_SPANS]:
                    try:
                        kind = engine_kind(_name.decode(raw).name)
                        if kind is not None:
                            piece.spans.append((kind, _from_json(_json_span.decode(raw))))
                    except (*_JSON_ERRORS, ValueError) as error:
                        piece.errors.append(_said(error))
                yield piece


def _from_json(span: _JsonSpan) -> Span:
    return Span(
        span.name,
        _hexadecimal(span.trace_id, 16),
        _hexadecimal(span.span_id, 8),
        _whole(span.start_time_unix_nano),
        _whole(span.end_time_unix_nano),
        span.status.code in (_ERROR, "STATUS_CODE_ERROR"),
        _json_attributes(span.attributes, ATTRIBUTES),
    )


def _json_attributes(pairs: list[_JsonAttribute], wanted: frozenset[str] | None) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for pair in pairs:
        if wanted is None or pair.key in wanted:
            try:
                value = _from_json_value(_json_value.decode(pair.value))
            except (*_JSON_ERRORS, ValueError):
                continue  # What the attribute would have told is missing, and said so where it is needed.
            if value is not None:
                found[pair.key] = value
    return found


def _from_json_value(value: _JsonValue) -> Value | None:
    if value.string_value is not None:
        return value.string_value
    if value.int_value is not None:
        return _whole(value.int_value)
    if value.double_value is not None:
        return float(value.double_value)
    if value.array_value is not None:
        return tuple(item.string_value or "" for item in value.array_value.values)
    return value.bool_value


def _whole(value: int | str) -> int:
    if isinstance(value, int):
        return value
    if len(value) > DIGITS:
        raise ValueError("holds a number of more than 64 bits")
    return int(value)


def _hexadecimal(text: str, size: int) -> str:
    """Return an id of so many bytes as hexadecimal digits, empty when it is none.

    Senders that follow protobuf's own mapping write ids as base64.
    """
    convert: Callable[[str], bytes] = bytes.fromhex if len(text) == 2 * size else base64.b64decode
    try:
        plain = convert(text)
    except (ValueError, binascii.Error):
        return ""
    return plain.hex() if len(plain) == size else ""


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
