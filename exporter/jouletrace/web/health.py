"""Whether the daemon can be relied on: pure functions of the snapshot."""

from collections.abc import Iterator
from dataclasses import dataclass

from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether every expected device has a fresh sample."""

    ready: bool
    reasons: tuple[str, ...] = ()
    """Why not: a line for the sampler and one for each device."""
    stalled: bool = False
    """The sampler has not come back in time, so all readings are old."""


def readiness(
    snapshot: NodeSnapshot,
    now_ns: int,
    stale_after_seconds: float,
    heartbeat_age_seconds: float,
    overdue_call: str | None = None,
) -> Readiness:
    """Return whether every device of the snapshot has an energy sample younger than `stale_after_seconds`.

    `now_ns` is on the clock of the snapshot's times; `heartbeat_age_seconds` is how long ago the sampler last
    came back from its driver calls, and `overdue_call` names the call that is under way.
    """
    stalled = heartbeat_age_seconds > stale_after_seconds
    reasons: list[str] = []
    if stalled:
        reasons.append(
            f"The sampler has not come back for {heartbeat_age_seconds:.1f} s: "
            f"{overdue_call or 'a driver call'} hangs. "
            "If it stays so, look for Xid errors in the kernel log (dmesg)."
        )
    if not snapshot.devices:
        reasons.append(f"The source {snapshot.source} has given no GPU yet.")
    reasons += _device_reasons(snapshot, now_ns, stale_after_seconds)
    return Readiness(ready=not reasons, reasons=tuple(reasons), stalled=stalled)


def _device_reasons(snapshot: NodeSnapshot, now_ns: int, stale_after_seconds: float) -> Iterator[str]:
    for device in snapshot.devices:
        reason = _device_reason(device, now_ns, stale_after_seconds)
        if reason:
            yield f"GPU {device.info.gpu} ({device.info.uuid}): {reason}"


def _device_reason(device: DeviceSnapshot, now_ns: int, stale_after_seconds: float) -> str:
    # The driver's words must not break the one line per device.
    problem = " ".join(device.problem.split())
    if device.status is DeviceStatus.LOST:
        return problem or "It is lost; jouletrace looks for it again and again."
    if device.timeline_end_ns is None:
        return problem or "There is no energy sample yet."
    age_seconds = (now_ns - device.timeline_end_ns) / 1e9
    if age_seconds > stale_after_seconds:
        late = f"Its newest energy sample is {age_seconds:.1f} s old; {stale_after_seconds:g} s is the limit."
        return f"{late} {problem}".rstrip()
    return ""
