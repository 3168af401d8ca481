"""Request spans of serving engines, as request records.

vLLM and SGLang write `gen_ai.*` attributes, in the older names of OpenTelemetry's semantic conventions for generative
AI (`prompt_tokens`) or the newer ones (`input_tokens`); TGI writes durations as Rust prints them. Attribute names are
those in the engines' sources: vLLM 0.12 to 0.32 (`vllm/tracing`), SGLang 0.5.23 (`srt/observability/trace.py`), TGI 3
(`router/src/server.rs`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from jouletrace.requests.records import RecordError, RequestRecord, Role, Status, Usage, check_request

Value = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Value]

ID_CHARACTERS: Final = 256
LABEL_CHARACTERS: Final = 128
COUNT_LIMIT: Final = 2**40
"""What records may hold at most."""

VLLM: Final = "vllm"
SGLANG: Final = "sglang"
TGI: Final = "tgi"

_SGLANG_NAME = re.compile(r"(prefill|decode|) ?Req \S*")
_TGI_NAMES = frozenset({"generate", "generate_stream", "completions", "chat_completions", "vertex_compatibility"})
_MODEL = ("gen_ai.response.model", "gen_ai.request.model")
_INPUT = ("gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens")
_OUTPUT = ("gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens")
_CACHED = ("gen_ai.usage.cached_tokens", "gen_ai.usage.cache_read.input_tokens")
_REASONS = "gen_ai.response.finish_reasons"
_LATENCY = "gen_ai.latency."
_LATENCIES = ("e2e", "time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode")
_RUST = ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ns|µs|ms|s)")
_UNIT_NS = {"ns": 1, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


_LATENCY_NAMES = tuple(_LATENCY + name for name in _LATENCIES)
ATTRIBUTES: Final = frozenset(
    ("gen_ai.request.id", "rid", _REASONS, *_MODEL, *_INPUT, *_OUTPUT, *_CACHED, *_LATENCY_NAMES, *_RUST)
)
"""The attributes that are looked at; others are not even decoded, and may hold prompts."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """What matters of a span. Times are wall-clock epoch nanoseconds of its sender."""

    name: str
    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: Attributes


def engine_kind(name: str) -> str | None:
    """Return which kind of engine names a request's span so, None for any other span."""
    if name == "llm_request":
        return VLLM
    if "Req " in name and _SGLANG_NAME.fullmatch(name):
        return SGLANG
    return TGI if name in _TGI_NAMES else None


def engine_role(name: str, kind: str) -> Role:
    """Return what the engine that a request's span comes from does: SGLang begins the name with it."""
    role = name.partition(" ")[0]
    return Role(role) if kind == SGLANG and role in (Role.PREFILL, Role.DECODE) else Role.MIXED


def is_request(span: Span, kind: str) -> bool:
    """Return whether a span is a request's, and not only named like one."""
    told = span.attributes
    if kind == TGI:  # Spans within a request have the same names.
        return isinstance(told.get("total_time"), str) and "inference_time" in told
    return bool(_request_id(told))


def request_record(span: Span, kind: str, engine_id: str | None) -> RequestRecord:
    """Return what a request's span tells; raises RecordError when it contradicts itself."""
    record = _from_tgi(span, engine_id) if kind == TGI else _from_gen_ai(span, kind, engine_id)
    # The model may be known from the engine; its absence is no contradiction.
    check_request(record if record.model is not None else msgspec.structs.replace(record, model="known"))
    return record


def _request_id(told: Attributes) -> str:
    found = told.get("gen_ai.request.id") or told.get("rid")
    return found[-ID_CHARACTERS:] if isinstance(found, str) else ""


def _from_gen_ai(span: Span, kind: str, engine_id: str | None) -> RequestRecord:
    told = span.attributes
    start_ns, end_ns = _life(span)
    latest = (end_ns - start_ns) / 1e9
    # Their own clock says how long a request took; the span is closed a little later.
    took = _seconds(told, "e2e", latest)
    if took:
        end_ns = start_ns + round(took * 1e9)
    scheduled_ns, first_ns = _moments(told, kind, start_ns, end_ns)
    prompt = _count(told, _INPUT)
    output = _count(told, _OUTPUT)
    usage = None
    if prompt is not None or output is not None:
        usage = Usage(input=prompt or 0, cached_input=min(_count(told, _CACHED) or 0, prompt or 0), output=output or 0)
    return RequestRecord(
        request_id=_request_id(told),
        engine_id=engine_id,
        model=_model(told),
        trace_id=_trace_id(span),
        arrival_ns=start_ns,
        scheduled_ns=scheduled_ns,
        first_token_ns=first_ns,
        end_ns=end_ns,
        status=_status(span),
        usage=usage,
    )


def _moments(told: Attributes, kind: str, start_ns: int, end_ns: int) -> tuple[int | None, int | None]:
    """Return when a request was scheduled and had its first token, as far as that is told.

    Counted back from the end by the engine's own durations: the time to first token also holds what a busy front end
    added (40 ms of 47 in a vLLM on two cores), when the GPU was at work on the next tokens already.
    """
    life = (end_ns - start_ns) / 1e9
    # A moment that never came is 0 in vLLM, and what is counted from it is years long.
    decode = _seconds(told, "time_in_model_decode", life)
    if decode is None:
        first = _seconds(told, "time_to_first_token", life)
        queue = _seconds(told, "time_in_queue", life if first is None else first)
        return (
            None if queue is None else start_ns + round(queue * 1e9),
            None if first is None else start_ns + round(first * 1e9),
        )
    first_ns = max(end_ns - round(decode * 1e9), start_ns)
    # SGLang counts the wait in its scheduler's queue into the prefill.
    prefill = _seconds(told, "time_in_model_prefill", life) if kind == VLLM else None
    return None if prefill is None else max(first_ns - round(prefill * 1e9), start_ns), first_ns


def _from_tgi(span: Span, engine_id: str | None) -> RequestRecord:
    told = span.attributes
    start_ns, end_ns = _life(span)
    total = _rust_ns(told, "total_time")
    if total is not None:
        end_ns = min(end_ns, start_ns + total)
    waited = (_rust_ns(told, "validation_time") or 0) + (_rust_ns(told, "queue_time") or 0)
    inference, each = _rust_ns(told, "inference_time"), _rust_ns(told, "time_per_token")
    return RequestRecord(
        request_id=f"tgi-{span.span_id}",
        engine_id=engine_id,
        trace_id=_trace_id(span),
        arrival_ns=start_ns,
        scheduled_ns=min(start_ns + waited, end_ns),
        end_ns=end_ns,
        status=_status(span),
        # TGI divides the one by the number of tokens to get the other, and tells neither that nor the prompt's.
        usage=Usage(output=round(inference / each)) if inference and each else None,
    )


def _life(span: Span) -> tuple[int, int]:
    if not span.start_ns:
        raise RecordError("start_time_unix_nano: is missing")
    if span.end_ns < span.start_ns:
        raise RecordError("end_time_unix_nano: lies before start_time_unix_nano")
    return span.start_ns, span.end_ns


def _status(span: Span) -> Status:
    if span.failed:
        return Status.FAILED
    reasons = span.attributes.get(_REASONS, ())
    if isinstance(reasons, str):  # SGLang writes the list as JSON.
        try:
            reasons = json.loads(reasons)
        except (ValueError, RecursionError):
            reasons = ()
    if not isinstance(reasons, Sequence):
        return Status.FINISHED
    if "abort" in reasons:
        return Status.CANCELLED
    return Status.FAILED if "error" in reasons else Status.FINISHED


def _model(told: Attributes) -> str | None:
    named = next((value for name in _MODEL if isinstance(value := told.get(name), str)), "")
    return named.strip()[:LABEL_CHARACTERS] or None


def _trace_id(span: Span) -> str | None:
    return span.trace_id if span.trace_id.strip("0") else None


def _count(told: Attributes, names: Sequence[str]) -> int | None:
    """Return a number of tokens, None when none of the attributes is there; raises RecordError."""
    for name in names:
        value = told.get(name)
        if value is None:
            continue
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 14:
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= COUNT_LIMIT:
            raise RecordError(f"{name}: is not a number of tokens")
        return value
    return None


def _seconds(told: Attributes, name: str, most: float) -> float | None:
    """Return a latency, None when it is not there or cannot be: NaN, negative, or longer than the request."""
    value = told.get(_LATENCY + name)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and 0 <= value <= most else None


def _rust_ns(told: Attributes, name: str) -> int | None:
    """Return a duration as Rust prints it, such as `1.5s`, `12.3ms`, `4µs`; None when there is none."""
    value = told.get(name)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return None if match is None else round(float(match[1]) * _UNIT_NS[match[2]])
