"""What the live monitor is told, ready for JSON: pure functions of the snapshots.

Times are wall-clock epoch milliseconds (a browser's own), energies joules, powers watts. A value that is not known is
null, and a device that cannot be read has no values at all, only its state and why.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from jouletrace.clock import Clock
from jouletrace.diagnosis.drivers import Driver
from jouletrace.diagnosis.node import DeviceFinding, DiagnosisSnapshot, EngineFinding
from jouletrace.energy.meter import GUESS_LONGEST_NS
from jouletrace.energy.timeline import Float64s, Int64s, Timeline
from jouletrace.requests.account import EngineState, LedgerSnapshot, RequestEnergy
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot
from jouletrace.web.health import Readiness

WINDOW_SECONDS: Final = 60.0
"""How far back the trace goes."""
POINTS_PER_SECOND: Final = 50
"""Most points of a trace: the power ring's rate. A denser timeline is thinned out, each point a mean over more."""
NS_PER_MS: Final = 1_000_000
Bools = npt.NDArray[np.bool_]
_NO_STATE: Final = EngineState()


class DeviceState(StrEnum):
    """Whether a device's values are to be believed."""

    OK = "ok"
    STARTING = "starting"
    STALE = "stale"
    """Its newest energy sample is too old."""
    LOST = "lost"
    STALLED = "stalled"
    """A driver call hangs, so no device has new values."""


@dataclass(frozen=True, slots=True)
class Moment:
    """All that the views see at one moment."""

    now_ns: int
    node: NodeSnapshot
    readiness: Readiness
    account: LedgerSnapshot
    diagnosis: DiagnosisSnapshot
    stale_after_seconds: float


def node_document(moment: Moment, clock: Clock) -> dict[str, Any]:
    """Return everything but traces and requests."""
    findings = {found.uuid: found for found in moment.diagnosis.devices}
    gpus = {device.info.uuid: device.info.gpu for device in moment.node.devices}
    return {
        "now_ms": _ms(moment.now_ns, clock),
        "source": moment.node.source,
        "problems": moment.readiness.reasons,
        "devices": [_device(device, findings.get(device.info.uuid), moment, clock) for device in moment.node.devices],
        "engines": [
            _engine(engine_id, moment.account, moment.diagnosis.engines.get(engine_id), gpus)
            for engine_id in sorted({*moment.account.engine_devices, *moment.account.in_flight})
        ],
        "account": _account(moment, clock),
    }


def trace(timeline: Timeline, after_ns: int, clock: Clock) -> tuple[dict[str, Any] | None, int]:
    """Return what a timeline has got since a time, None for nothing, and up to when it goes (ns).

    Each point is the mean power between two nodes of E(t), so leaving nodes out loses no energy. It is null for a time
    of which the meter knows nothing, which has no energy in the timeline.
    """
    times, joules = timeline.nodes()
    first = max(int(times.searchsorted(after_ns, "right")) - 1, 0)
    times, joules = times[first:], joules[first:]
    if len(times) < 2:
        return None, after_ns
    span_seconds = float(times[-1] - times[0]) / 1e9
    stride = int(np.ceil((len(times) - 1) / max(POINTS_PER_SECOND * span_seconds * 1.5, 1.0)))
    if stride > 1:
        # Counted from the newest node, which must be in it: the next call goes on from there. So must be what bounds
        # an unknown time.
        unknown = _unknown(times, joules).nonzero()[0]
        kept = np.unique(
            np.concatenate(([0], unknown, unknown + 1, np.arange(len(times) - 1, -1, -stride, dtype=np.int64)))
        )
        times, joules = times[kept], joules[kept]
    shift_ns = clock.to_wall(int(times[0])) - int(times[0])
    watts = np.diff(joules) / np.diff(times) * 1e9
    told: list[int | None] = np.rint(watts).astype(np.int64).tolist()
    for place in _unknown(times, joules).nonzero()[0].tolist():
        told[place] = None
    # Rounded before the differences are taken: the steps then add up, however many there are.
    edges_ms = np.rint((times + shift_ns) / NS_PER_MS).astype(np.int64)
    content = {
        "start_ms": int(edges_ms[0]),
        "steps_ms": np.diff(edges_ms).tolist(),
        "watts": told,
    }
    return content, int(times[-1])


def _unknown(times: Int64s, joules: Float64s) -> Bools:
    """Return of each segment whether it is one of those to which the meter gives 0 J, for want of readings."""
    unknown: Bools = (np.diff(times) > GUESS_LONGEST_NS) & (np.diff(joules) == 0)
    return unknown


def requests_document(
    in_flight: Iterable[RequestEnergy], settled: Iterable[RequestEnergy], clock: Clock
) -> dict[str, Any]:
    """Return requests with their joules."""
    return {
        "in_flight": [_request(energy, clock) for energy in in_flight],
        "settled": [_request(energy, clock) for energy in settled],
    }


def _device(device: DeviceSnapshot, found: DeviceFinding | None, moment: Moment, clock: Clock) -> dict[str, Any]:
    info, uuid = device.info, device.info.uuid
    end_ns = device.timeline_end_ns
    age_seconds = None if end_ns is None else (moment.now_ns - end_ns) / 1e9
    state = _state(device, age_seconds, moment)
    readable = state is DeviceState.OK
    account = moment.account
    return {
        "uuid": uuid,
        "gpu": info.gpu,
        "name": info.name,
        "state": state,
        "problem": " ".join(device.problem.split()),
        "age_seconds": None if age_seconds is None else round(age_seconds, 1),
        "watts": device.power_watts if readable else None,
        "max_watts": device.power_max_watts if readable else None,
        # A limit is no reading: it stays on the chart of a device that is gone for a while.
        "limit_watts": device.power_limit_watts or info.power_limit_watts,
        "idle_watts": device.idle_watts,
        "temperature_celsius": device.temperature_celsius.get("gpu") if readable else None,
        "energy_source": device.energy_source if readable else None,
        "verdict": _verdict(found, clock) if readable and found is not None else None,
        "drivers": _drivers(found, clock) if readable and found is not None else None,
        "idle_joules": {kind: joules for (owner, kind), joules in account.idle_joules.items() if owner == uuid},
        "unattributed_joules": account.unattributed_joules.get(uuid),
        "wasted_joules": {
            str(cause): joules for (owner, cause), joules in moment.diagnosis.wasted_joules.items() if owner == uuid
        },
    }


def _state(device: DeviceSnapshot, age_seconds: float | None, moment: Moment) -> DeviceState:
    if moment.readiness.stalled:
        return DeviceState.STALLED
    if device.status is DeviceStatus.LOST:
        return DeviceState.LOST
    if age_seconds is None or device.status is DeviceStatus.STARTING:
        return DeviceState.STARTING
    return DeviceState.STALE if age_seconds > moment.stale_after_seconds else DeviceState.OK


def _verdict(found: DeviceFinding, clock: Clock) -> dict[str, Any]:
    judgement = found.judgement
    return {
        "verdict": judgement.verdict,
        "since_ms": _ms(found.since_ns, clock),
        "sentence": judgement.sentence,
        "confidence": judgement.confidence,
        "flags": judgement.flags,
        "evidence": judgement.evidence,
    }


def _drivers(found: DeviceFinding, clock: Clock) -> dict[str, Any]:
    return {
        "start_ms": _ms(found.start_ns, clock),
        "end_ms": _ms(found.end_ns, clock),
        "confidence": found.driver_confidence,
        "watts": {str(driver): round(watts, 2) for driver, watts in found.driver_watts.items()},
    }


def _engine(
    engine_id: str, account: LedgerSnapshot, found: EngineFinding | None, gpus: Mapping[str, int]
) -> dict[str, Any]:
    state = account.engine_states.get(engine_id, _NO_STATE)
    answer: dict[str, Any] = {
        "engine_id": engine_id,
        "models": account.engine_models.get(engine_id, ()),
        "gpus": [gpus[uuid] for uuid in account.engine_devices.get(engine_id, ()) if uuid in gpus],
        "in_flight": account.in_flight.get(engine_id, 0),
        "running": state.running,
        "waiting": state.waiting,
        "kv_usage": state.kv_usage,
        "coverage": account.coverage.get(engine_id),
        "diagnosis": None,
    }
    if found is not None:
        diagnosis: dict[str, Any] = msgspec.to_builtins(found.diagnosis)
        del diagnosis["engine_id"]
        reference = found.reference
        diagnosis["reference"] = (
            None
            if reference is None
            else {
                "gpu_model": reference.gpu_model,
                "joules_per_token": reference.joules_per_token,
            }
        )
        answer["diagnosis"] = diagnosis
    return answer


def _account(moment: Moment, clock: Clock) -> dict[str, Any]:
    account = moment.account
    idle = {"bare": 0.0, "parked": 0.0}
    for (_, kind), joules in account.idle_joules.items():
        idle[kind] = idle.get(kind, 0.0) + joules
    wasted: dict[str, float] = {}
    for (_, cause), joules in moment.diagnosis.wasted_joules.items():
        wasted[str(cause)] = wasted.get(str(cause), 0.0) + joules
    return {
        "settled_ms": _ms(account.settled_ns, clock) if account.settled_ns else None,
        "age_seconds": round((moment.now_ns - account.settled_ns) / 1e9, 1) if account.settled_ns else None,
        "device_joules": sum(account.device_joules.values()),
        "attributed_joules": sum(account.attributed_joules.values()),
        "pending_joules": sum(account.pending_joules.values()),
        "idle_joules": idle,
        "unattributed_joules": sum(account.unattributed_joules.values()),
        "wasted_joules": wasted,
        "requests": sum(account.requests.values()),
    }


def _request(energy: RequestEnergy, clock: Clock) -> dict[str, Any]:
    return {
        "request_id": energy.request_id,
        "engine_id": energy.engine_id,
        "model": energy.model,
        "tenant": energy.tenant,
        "status": energy.status,
        "energy_joules": round(energy.energy_joules, 4),
        "low": round(energy.low, 4),
        "high": round(energy.high, 4),
        "prefill_joules": round(energy.prefill_joules, 4),
        "decode_joules": round(energy.decode_joules, 4),
        "joules_per_output_token": energy.joules_per_output_token,
        "method": energy.method,
        "final": energy.final,
        "arrival_ms": _ms(energy.arrival_ns, clock),
        "end_ms": None if energy.end_ns is None else _ms(energy.end_ns, clock),
    }


def _ms(steady_ns: int, clock: Clock) -> int:
    return clock.to_wall(steady_ns) // NS_PER_MS


def traces(
    timelines: Iterable[tuple[str, Timeline]], after_ns: Mapping[str, int], now_ns: int, clock: Clock
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the traces by uuid that have something new, and up to when each goes; all within the window."""
    earliest_ns = now_ns - int(WINDOW_SECONDS * 1e9)
    content: dict[str, Any] = {}
    until_ns: dict[str, int] = {}
    for uuid, timeline in timelines:
        found, until_ns[uuid] = trace(timeline, max(after_ns.get(uuid, 0), earliest_ns), clock)
        if found is not None:
            content[uuid] = found
    return content, until_ns


def driver_pieces(
    findings: Iterable[DeviceFinding], after_ns: Mapping[str, int], now_ns: int, clock: Clock
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return, as `traces` does, what the power went to in the spans that have ended since.

    By uuid: edges of the spans, and by driver the mean watts of each.
    """
    earliest_ns = now_ns - int(WINDOW_SECONDS * 1e9)
    content: dict[str, Any] = {}
    until_ns: dict[str, int] = {}
    for found in findings:
        after = max(after_ns.get(found.uuid, 0), earliest_ns)
        spans = [span for span in found.recent if span.end_ns > after]
        if spans:
            until_ns[found.uuid] = spans[-1].end_ns
            content[found.uuid] = {
                "starts_ms": [_ms(span.start_ns, clock) for span in spans],
                "ends_ms": [_ms(span.end_ns, clock) for span in spans],
                "watts": {str(driver): [round(span.watts[driver], 1) for span in spans] for driver in Driver},
            }
    return content, until_ns


def encode(event: str, data: object) -> bytes:
    """Return a server-sent event; JSON never has a line break in it."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), msgspec.json.encode(data))
