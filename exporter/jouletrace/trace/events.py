"""What ran during a recording, as the records that its engine would have sent.

Events understood: `request_start` (id, tenant, prompt_tokens), `first_token` (id), `request_end` (id, prompt_tokens,
output_tokens), `iteration` (iter, start_ns, steps; ids and tokens, or prefill and decode) and `work` (what a steady
phase got done).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jouletrace.requests.calibrate import SHORTEST_NS, Sample
from jouletrace.requests.law import PrefillSchedule
from jouletrace.requests.records import (
    EngineRecord,
    PrefillPart,
    RequestRecord,
    Status,
    StepRecord,
    Usage,
)
from jouletrace.trace.recording import Recording, RecordingError

ENGINE_ID = "recorded"
"""The engine of a recording; it has one."""


class Fidelity(StrEnum):
    """Which events may be used."""

    STEPS = "steps"
    """All of them."""
    BOUNDARIES = "boundaries"
    """Three a request: start, first token, end."""


def engine_of(recording: Recording) -> EngineRecord | None:
    """Return the engine that served the recorded requests; None when there were none."""
    if not any(event["kind"] == "request_start" for event in recording.events):
        return None
    meta = recording.meta.get("engine") or {}
    if not isinstance(meta, Mapping):
        raise RecordingError(f"{recording.name}: meta.engine is not an object; correct it or record it again")
    models = tuple(str(model) for model in meta.get("models", ())) or ("recorded",)
    return EngineRecord(engine_id=ENGINE_ID, kind=str(meta.get("kind", "other")), models=models)


def schedule_of(recording: Recording) -> PrefillSchedule | None:
    """Return how the recorded engine ran prompts; None when nothing but its kind tells."""
    chunked = any(event.get("iter") == "mixed" or event.get("phase") == "serve_chunked" for event in recording.events)
    if chunked:
        return PrefillSchedule.CHUNKED
    exclusive = any(event.get("iter") == "prefill" or event.get("phase") == "serve" for event in recording.events)
    return PrefillSchedule.EXCLUSIVE if exclusive else None


def records(recording: Recording, fidelity: Fidelity) -> Iterator[tuple[int, StepRecord | RequestRecord]]:
    """Yield the records with the times (ns) at which they could be sent, in order.

    Raises RecordingError naming the event that cannot be used.
    """
    decoding: dict[str, None] = {}
    """Requests that have their first token and have not ended, oldest first."""
    for number, event in enumerate(recording.events):
        try:
            record = _record(event, decoding, fidelity)
        except (KeyError, TypeError, ValueError) as failure:
            what = f"has no {failure}" if isinstance(failure, KeyError) else f"makes no sense ({failure})"
            raise RecordingError(
                f"{recording.name}: event {number} ({event['kind']}) {what}; correct it or record it again"
            ) from None
        if record is not None:
            yield event["t_ns"], record


def _record(
    event: Mapping[str, Any], decoding: dict[str, None], fidelity: Fidelity
) -> StepRecord | RequestRecord | None:
    kind, t_ns = event["kind"], event["t_ns"]
    if kind == "request_start":
        return RequestRecord(
            request_id=event["id"],
            engine_id=ENGINE_ID,
            tenant=event.get("tenant"),
            arrival_ns=t_ns,
            status=Status.RUNNING,
            usage=Usage(input=event["prompt_tokens"]),
        )
    if kind == "first_token":
        decoding[event["id"]] = None
        return RequestRecord(request_id=event["id"], engine_id=ENGINE_ID, first_token_ns=t_ns)
    if kind == "request_end":
        decoding.pop(event["id"], None)
        return RequestRecord(
            request_id=event["id"],
            engine_id=ENGINE_ID,
            end_ns=t_ns,
            status=Status.FINISHED,
            usage=Usage(input=event["prompt_tokens"], output=event["output_tokens"]),
        )
    if kind == "iteration" and fidelity is Fidelity.STEPS:
        return _step(event, decoding)
    return None


def _step(event: Mapping[str, Any], decoding: Mapping[str, None]) -> StepRecord:
    prefill: Sequence[tuple[str, int]] = ()
    decode: Sequence[str] = ()
    if event["iter"] == "prefill":
        prefill = list(zip(event["ids"], event["tokens"], strict=True))
    elif "decode" in event:
        part = event.get("prefill")
        prefill = [(part["id"], part["tokens"])] if part else ()
        decode = event["decode"]
    else:
        # An exclusive engine's decode step takes every request that has its first token.
        decode = list(decoding)
    return StepRecord(
        engine_id=ENGINE_ID,
        start_ns=event["start_ns"],
        end_ns=event["t_ns"],
        steps=event.get("steps", 1),
        prefill=tuple(PrefillPart(request_id=name, tokens=tokens) for name, tokens in prefill),
        decode=tuple(decode),
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Steps that ran back to back in (start_ns, end_ns], totals over all of them."""

    start_ns: int
    end_ns: int
    steps: float
    prefill_tokens: float
    decode_sequences: float


def steady_phases(recording: Recording) -> list[Span]:
    """Return what every `work` event that tells its steps got done.

    A steady phase lasts `seconds` up to its `work` event. Known are `mixed_steps` (prefill_tokens and decode per
    step), `decode` (batch) and `prefill` (batch and prompt).
    """
    found = []
    for event in recording.events:
        if event["kind"] != "work" or not event.get("seconds"):
            continue
        if event["phase"] == "mixed_steps":
            steps = event["steps"]
            counts = (steps, steps * event["prefill_tokens"], steps * event["decode"])
        elif event["phase"] == "decode":
            counts = (event["steps"], 0, event["steps"] * event["batch"])
        elif event["phase"] == "prefill":
            counts = (event["prompt_tokens"] / (event["batch"] * event["prompt"]), event["prompt_tokens"], 0)
        else:
            continue
        end_ns = event["t_ns"]
        found.append(Span(end_ns - round(event["seconds"] * 1e9), end_ns, *map(float, counts)))
    return found


def step_windows(recording: Recording, window_ns: int = 2 * SHORTEST_NS) -> list[Span]:
    """Return windows of back-to-back steps, each at least `window_ns` long.

    A pause between two steps that could not be told from work ends a window early.
    """
    found = []
    begin_ns = end_ns = 0
    steps = tokens = sequences = 0.0
    for _, record in records(recording, Fidelity.STEPS):
        if not isinstance(record, StepRecord):
            continue
        if record.start_ns - end_ns > _PAUSE_NS or end_ns - begin_ns >= window_ns:
            if end_ns - begin_ns >= SHORTEST_NS:
                found.append(Span(begin_ns, end_ns, steps, tokens, sequences))
            # Without a pause the next window goes on where this one ended, so that no host time is lost.
            begin_ns = record.start_ns if record.start_ns - end_ns > _PAUSE_NS else end_ns
            steps = tokens = sequences = 0.0
        end_ns = record.end_ns
        steps += record.steps
        tokens += sum(part.tokens for part in record.prefill or ())
        sequences += record.steps * len(record.decode or ())
    if end_ns - begin_ns >= SHORTEST_NS:
        found.append(Span(begin_ns, end_ns, steps, tokens, sequences))
    return found


_PAUSE_NS = 2_000_000
"""Gaps between steps under load are below 1 ms on both recordings."""


def samples(spans: Sequence[Span], joules: Sequence[float | None]) -> list[Sample]:
    """Return calibration samples of the spans whose energy (J) is known."""
    return [
        Sample(span.end_ns - span.start_ns, energy, span.steps, span.prefill_tokens, span.decode_sequences)
        for span, energy in zip(spans, joules, strict=True)
        if energy is not None
    ]
