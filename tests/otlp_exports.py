"""Exports as engines send them, made with OpenTelemetry's own protobuf classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

CAPTURED = Path(__file__).parent / "data" / "engines" / "vllm-0.32.otlp.jsonl"
"""A model-loading span and three requests, as a real vLLM 0.32 sent them, decoded."""


def captured() -> list[dict[str, Any]]:
    """Return the captured spans: name, trace, parent, start_ns, dur_ms, attrs, res."""
    return [json.loads(line) for line in CAPTURED.read_text(encoding="utf-8").splitlines()]


def put(pairs: Any, values: Mapping[str, object]) -> None:
    """Write attributes into a message."""
    for key, value in values.items():
        told = pairs.add(key=key).value
        match value:
            case bool():
                told.bool_value = value
            case int():
                told.int_value = value
            case float():
                told.double_value = value
            case str():
                told.string_value = value
            case list():
                for item in value:
                    told.array_value.values.add(string_value=item)


def export(rows: Sequence[Mapping[str, Any]], *, shift_ns: int = 0) -> ExportTraceServiceRequest:
    """Return rows such as the captured ones as one export, with all times moved by `shift_ns`."""
    message = ExportTraceServiceRequest()
    for number, row in enumerate(rows):
        resource_spans = message.resource_spans.add()
        put(resource_spans.resource.attributes, row["res"])
        start_ns = row["start_ns"] + shift_ns
        span = resource_spans.scope_spans.add().spans.add(
            name=row["name"],
            trace_id=bytes.fromhex(row["trace"]),
            span_id=(number + 1).to_bytes(8, "big"),
            parent_span_id=bytes.fromhex(row["parent"]),
            start_time_unix_nano=start_ns,
            end_time_unix_nano=start_ns + round(row["dur_ms"] * 1e6),
        )
        put(span.attributes, row["attrs"])
    return message
