"""`GET /v1/diagnosis`: the sentence, the evidence and the advice, one object per device and per engine."""

from collections.abc import Mapping
from typing import Any

import msgspec

from jouletrace.clock import Clock
from jouletrace.diagnosis.node import DeviceFinding, DiagnosisSnapshot, EngineFinding

STALE_NS = 30 * 1_000_000_000
"""A device whose newest span ended this long ago cannot be read now; a busy driver call takes seconds at most."""


def diagnosis_document(snapshot: DiagnosisSnapshot, clock: Clock) -> dict[str, Any]:
    """Return the answer, ready for JSON; times are wall-clock epoch nanoseconds, drivers are watts.

    A device with `stale` is not read any more: what is said of it is of `end_ns`, not of now.
    """
    return {
        "devices": [_device(found, snapshot, clock) for found in snapshot.devices],
        "engines": [_engine(engine_id, found, clock) for engine_id, found in snapshot.engines.items()],
    }


def _device(found: DeviceFinding, snapshot: DiagnosisSnapshot, clock: Clock) -> dict[str, Any]:
    judgement = found.judgement
    return {
        "gpu": found.gpu,
        "uuid": found.uuid,
        "start_ns": clock.to_wall(found.start_ns),
        "end_ns": clock.to_wall(found.end_ns),
        "stale": found.end_ns < clock.now_ns() - STALE_NS,
        "verdict": judgement.verdict,
        "since_ns": clock.to_wall(found.since_ns),
        "sentence": judgement.sentence,
        "confidence": judgement.confidence,
        "flags": judgement.flags,
        "evidence": judgement.evidence,
        "watts": found.watts,
        "drivers_watts": found.driver_watts,
        "drivers_confidence": found.driver_confidence,
        "drivers_joules": found.driver_joules,
        "wasted_joules": {
            str(cause): joules for (uuid, cause), joules in snapshot.wasted_joules.items() if uuid == found.uuid
        },
    }


def _engine(engine_id: str, found: EngineFinding, clock: Clock) -> dict[str, Any]:
    diagnosis: Mapping[str, Any] = msgspec.to_builtins(found.diagnosis)
    return {
        **diagnosis,
        "engine_id": engine_id,
        "models": found.models,
        "gpu_uuids": found.devices,
        "start_ns": clock.to_wall(found.start_ns),
        "end_ns": clock.to_wall(found.end_ns),
        "law": found.law,
        "reference": found.reference,
    }
