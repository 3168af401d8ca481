"""What engines tell: engines, steps and requests, as they travel over HTTP and Unix sockets.

Strict where it matters (types, signs, order of times), lenient where the sender may know more than we do (unknown
fields are ignored). All times are wall-clock epoch nanoseconds of the sending machine's clock.
"""

from enum import StrEnum
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

Identifier = Annotated[str, Meta(min_length=1, max_length=256)]
"""An id: long enough for a UUID with prefixes; a megabyte of id is an attack or a bug."""
Label = Annotated[str, Meta(min_length=1, max_length=128)]
"""A value that may become a Prometheus label: model, tenant, kind."""
Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**40)]
UNKNOWN_MODEL = "unknown"
"""Label of a model that nobody has named."""
Many = 65_536
"""Most requests that one step may name (far above any engine's max_num_seqs)."""


class Role(StrEnum):
    """What an engine does with a request."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class Status(StrEnum):
    """How a request ended, or that it has not."""

    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Unit(StrEnum):
    """What a request without tokens produces."""

    IMAGE = "image"
    FRAME = "frame"
    STEP = "step"
    EMBEDDING = "embedding"
    SECOND = "second"
    """Of video or audio made, whole ones."""
    INFERENCE = "inference"


class RecordKind(StrEnum):
    """What a record is about; the value of its field `record` where a transport carries all of them."""

    ENGINE = "engine"
    STEP = "step"
    REQUEST = "request"
    LOAD = "load"


# Without gc: nothing in them can refer back to them, and a collector that walks through every record that is held
# stops the process for tens of milliseconds.
class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", gc=False):
    pass


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    pass


class EngineRecord(_Record, frozen=True, kw_only=True, tag=RecordKind.ENGINE.value):
    """A serving process group and the devices that it owns."""

    engine_id: Identifier
    kind: Label = "other"
    """vllm, sglang, tgi, trtllm, triton, llamacpp, ollama, diffusion, ...: decides how prefill is scheduled."""
    models: Annotated[tuple[Label, ...], Meta(max_length=256)] = ()
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    container_id: Identifier | None = None
    pod_uid: Identifier | None = None
    gpu_uuids: Annotated[tuple[Identifier, ...], Meta(max_length=1024)] = ()
    """Empty: every device of the node when it has one only, else found by pid."""
    role: Role = Role.MIXED
    max_num_seqs: Annotated[int, Meta(ge=1, le=2**40)] | None = None
    """Most sequences that it runs at once, as its configuration says."""
    ended: bool = False
    """It is gone, or goes by another id: it owns no device any more."""


class PrefillPart(_Part, frozen=True, kw_only=True):
    """The freshly computed prompt tokens of one request in one step."""

    request_id: Identifier
    tokens: Count


class StepRecord(_Record, frozen=True, kw_only=True, tag=RecordKind.STEP.value):
    """One forward pass (or a few in a row with the same members): when, and who took part."""

    engine_id: Identifier
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    prefill: Annotated[tuple[PrefillPart, ...], Meta(max_length=Many)] | None = None
    decode: Annotated[tuple[Identifier, ...], Meta(max_length=Many)] | None = None
    prefill_tokens: Count | None = None
    """Instead of `prefill`, when the engine gives no ids."""
    decode_requests: Count | None = None
    """Instead of `decode`, when the engine gives no ids."""
    prefill_requests: Count | None = None
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """How many passes this record stands for."""
    kv_tokens: Count | None = None
    flops: Annotated[float, Meta(ge=0)] | None = None
    bytes: Annotated[float, Meta(ge=0)] | None = None
    running: Count | None = None
    waiting: Count | None = None
    kv_usage: Annotated[float, Meta(ge=0, le=1)] | None = None

    @property
    def has_members(self) -> bool:
        """Whether the step names its requests."""
        return self.prefill is not None or self.decode is not None


class Usage(_Part, frozen=True, kw_only=True):
    """What a request consumed and produced: tokens, or a number of other units."""

    input: Count = 0
    """Prompt tokens, cached ones included."""
    cached_input: Count = 0
    """Prompt tokens that a prefix cache saved from being computed."""
    output: Count = 0
    unit: Unit | None = None
    count: Count = 0


class RequestRecord(_Record, frozen=True, kw_only=True, tag=RecordKind.REQUEST.value):
    """One inference. The same id may come again with more known: fields that are set replace older ones."""

    request_id: Identifier
    engine_id: Identifier | None = None
    attempt: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    model: Label | None = None
    tenant: Label | None = None
    trace_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")] | None = None
    arrival_ns: Nanoseconds | None = None
    scheduled_ns: Nanoseconds | None = None
    first_token_ns: Nanoseconds | None = None
    end_ns: Nanoseconds | None = None
    status: Status | None = None
    usage: Usage | None = None


class ModelLoad(_Part, frozen=True, kw_only=True):
    """What one model of an engine did in the time of a load record."""

    model: Label
    usage: Usage
    prefill_seconds: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Time that the engine computed prompts,"""
    decode_seconds: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """and that it decoded, or computed at all where there are no phases."""


class LoadRecord(_Record, frozen=True, kw_only=True, tag=RecordKind.LOAD.value):
    """What an engine's own counters say of some time, without naming requests; each time is told once."""

    engine_id: Identifier
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    models: Annotated[tuple[ModelLoad, ...], Meta(max_length=256)] = ()
    steps: Count = 0
    """Forward passes in this time, 0 when not known."""
    running: Count | None = None
    """At its end, as are those that follow."""
    waiting: Count | None = None
    kv_usage: Annotated[float, Meta(ge=0, le=1)] | None = None
    preemptions: Count | None = None
    """Since the engine started."""


Record = EngineRecord | StepRecord | RequestRecord | LoadRecord


def joined_id(request_id: str) -> str:
    """Return the id that all feeds share, from one that an OpenAI-compatible engine has made of it.

    vLLM calls what came with `X-Request-Id: req-0` `chatcmpl-req-0`, and `cmpl-req-0-0` where it completes text: in its
    answer, its spans and its statistics (vLLM 0.32). Proxy, middleware and gateway know `req-0`.
    """
    if request_id.startswith("chatcmpl-"):
        return request_id[9:] or request_id
    if request_id.startswith("cmpl-"):
        return request_id[5:].removesuffix("-0") or request_id
    return request_id


class RecordError(ValueError):
    """A record makes no sense; the message names the field, what is wrong and what is expected."""


def check_step(record: StepRecord) -> None:
    """Raise RecordError when a step's parts do not fit together."""
    if record.end_ns < record.start_ns:
        raise RecordError("end_ns: lies before start_ns")
    if record.prefill is not None and record.prefill_tokens is not None:
        raise RecordError("prefill_tokens: is given beside prefill; send one of the two")
    if record.decode is not None and record.decode_requests is not None:
        raise RecordError("decode_requests: is given beside decode; send one of the two")
    if not record.has_members and record.prefill_tokens is None and record.decode_requests is None:
        raise RecordError(
            "decode: a step needs its members (prefill, decode) or counts (prefill_tokens, decode_requests)"
        )


def check_load(record: LoadRecord) -> None:
    """Raise RecordError when a load's parts do not fit together."""
    if record.end_ns < record.start_ns:
        raise RecordError("end_ns: lies before start_ns")
    for part in record.models:
        check_usage(part.usage)


def check_usage(usage: Usage) -> None:
    """Raise RecordError when a usage contradicts itself."""
    if usage.cached_input > usage.input:
        raise RecordError("usage.cached_input: is more than usage.input, which includes it")
    if (usage.input or usage.output) and usage.unit is not None:
        raise RecordError("usage.unit: is given beside tokens; send one of the two")
    if usage.count and usage.unit is None:
        raise RecordError("usage.unit: is missing beside usage.count")


def check_request(record: RequestRecord) -> None:
    """Raise RecordError when a request's parts do not fit together."""
    order = (
        ("arrival_ns", record.arrival_ns),
        ("scheduled_ns", record.scheduled_ns),
        ("first_token_ns", record.first_token_ns),
        ("end_ns", record.end_ns),
    )
    known = [(name, value) for name, value in order if value is not None]
    for (before, earlier), (after, later) in pairwise(known):
        if later < earlier:
            raise RecordError(f"{after}: lies before {before}")
    usage = record.usage
    if usage is None:
        return
    check_usage(usage)
    if (usage.input or usage.output) and record.model is None and record.status not in (None, Status.RUNNING):
        raise RecordError("model: is missing; tokens are counted by model")
