"""Joules that a named cause burned and that somebody could have saved, per device, as counters.

What cannot be shown to be avoidable is not called waste, so each cause is a lower bound; only throttling is an upper
one. In one window a device's waste has one cause, the first that applies in the order of WasteCause, so parts never
overlap and never exceed its joules.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from jouletrace.diagnosis.causes import BatchLimit, Cause, EngineDiagnosis

LONGEST_GAP_NS: Final = 10 * 10**9
"""A few evaluations that failed; after a longer gap a parked device's time starts anew, for it may have worked."""


class WasteCause(StrEnum):
    """What burned joules that could have been saved."""

    PARKED = "parked"
    """A process held the device without any request for longer than the configured time: all energy beyond it, less
    what the device draws when nobody holds it, for that stays."""
    UNDERUTILIZED_WITH_DEMAND = "underutilized_with_demand"
    """The device stood still under waiting requests: the parked level of power for the time it was not active."""
    THROTTLING = "throttling"
    """Heat or a brake made work take longer: the parked level of power for that longer time, taken as if all of the
    work were bound by the clock."""
    SMALL_BATCH_WHILE_WAITING = "small_batch_while_waiting"
    """max_num_seqs kept the batch small while requests waited: the fixed energy that the larger batch saves."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device over (start_ns, end_ns]; None is unknown, and what is unknown is not called waste."""

    uuid: str
    start_ns: int
    end_ns: int
    energy_joules: float | None = None
    parked: bool | None = None
    """Its verdict: a process holds a context and nothing runs."""
    underutilized: bool | None = None
    """Its verdict: active under half of the time."""
    active_ratio: float | None = None
    """Part of the time that it was active (graphics activity), 0 to 1."""
    parked_watts: float | None = None
    """The learnt level of a held device that does nothing."""
    bare_watts: float | None = None
    """The level of a device that nobody holds: learnt, or that of its model."""
    throttled_ratio: float | None = None
    """Part of the time that clocks were held down by heat or a brake, not by the power limit."""
    clock_ratio: float | None = None
    """Mean SM clock over the highest one."""


@dataclass(frozen=True, slots=True)
class EngineDemand:
    """What an engine that holds devices asked of them in the same time."""

    devices: Sequence[str]
    active: bool
    """Whether any of its requests was active."""
    waiting: float | None = None
    diagnosis: EngineDiagnosis | None = None


class Waste:
    """Counters by device and cause. One writer; a window is added once."""

    def __init__(self, parked_after_seconds: float) -> None:
        """`parked_after_seconds`: how long a held device may wait for the next request before that is waste."""
        self._parked_after_ns = round(parked_after_seconds * 1e9)
        self._quiet: dict[str, tuple[int, int]] = {}
        """By uuid of a parked device: since when, and up to when that is known."""
        self._joules: dict[tuple[str, WasteCause], float] = defaultdict(float)

    @property
    def joules(self) -> Mapping[tuple[str, WasteCause], float]:
        """Totals by uuid and cause since the start; they never go down."""
        return dict(self._joules)

    def add(self, devices: Sequence[DeviceUse], engines: Sequence[EngineDemand]) -> None:
        """Add one window of every device, and what the engines asked of them in it."""
        holders: dict[str, list[EngineDemand]] = defaultdict(list)
        for engine in engines:
            for uuid in engine.devices:
                holders[uuid].append(engine)
        energies = {one.uuid: energy for one in devices if (energy := _energy(one)) is not None}
        for device in devices:
            quiet_ns = self._quiet_ns(device, holders[device.uuid])
            energy = energies.get(device.uuid)
            if not energy:
                continue
            found = _waste(device, holders[device.uuid], energies, quiet_ns)
            if found is not None and found[1] > 0:
                self._joules[device.uuid, found[0]] += min(found[1], energy)

    def forget(self, uuid: str) -> None:
        """Start anew to wait for a device's next request (it was lost); its totals stay."""
        self._quiet.pop(uuid, None)

    def _quiet_ns(self, device: DeviceUse, holders: Sequence[EngineDemand]) -> int:
        """Return how much of the window lies beyond the time that a device may be parked."""
        wanted = any(one.active or one.waiting for one in holders)
        if device.parked is not True or wanted or device.end_ns <= device.start_ns:
            self._quiet.pop(device.uuid, None)
            return 0
        since_ns, known_ns = self._quiet.get(device.uuid, (device.start_ns, device.start_ns))
        if device.start_ns - known_ns > LONGEST_GAP_NS:
            since_ns = device.start_ns
        self._quiet[device.uuid] = (since_ns, device.end_ns)
        return device.end_ns - max(device.start_ns, min(since_ns + self._parked_after_ns, device.end_ns))


def _energy(device: DeviceUse) -> float | None:
    joules = device.energy_joules
    return joules if joules is not None and 0 <= joules < math.inf and device.end_ns > device.start_ns else None


def _ratio(value: float | None) -> float | None:
    return min(value, 1.0) if value is not None and value >= 0 else None


def _watts(value: float | None) -> float | None:
    return value if value is not None and 0 <= value < math.inf else None


def _waste(
    device: DeviceUse, holders: Sequence[EngineDemand], energies: Mapping[str, float], quiet_ns: int
) -> tuple[WasteCause, float] | None:
    """Return the cause and the joules of one window, or None."""
    seconds = (device.end_ns - device.start_ns) / 1e9
    if quiet_ns > 0:
        bare = _watts(device.bare_watts)
        if bare is None:
            return None
        avoidable = energies[device.uuid] - bare * seconds
        return WasteCause.PARKED, avoidable * quiet_ns / (device.end_ns - device.start_ns)
    parked = _watts(device.parked_watts)
    static = None if parked is None else parked * seconds
    active, clock = _ratio(device.active_ratio), _ratio(device.clock_ratio)
    waited_for = any((one.waiting or 0) > 0 for one in holders)
    if device.underutilized and waited_for and static is not None and active is not None:
        return WasteCause.UNDERUTILIZED_WITH_DEMAND, static * (1 - active)
    throttled = _ratio(device.throttled_ratio)
    if throttled and static is not None and clock is not None:
        return WasteCause.THROTTLING, static * throttled * (1 - clock)
    saved_watts = sum(_saved_watts(one, device.uuid, energies) for one in holders)
    return (WasteCause.SMALL_BATCH_WHILE_WAITING, saved_watts * seconds) if saved_watts > 0 else None


def _saved_watts(engine: EngineDemand, uuid: str, energies: Mapping[str, float]) -> float:
    """Return the device's part, by energy, of what the engine's larger batch would save."""
    found = engine.diagnosis
    if found is None or found.cause is not Cause.SMALL_BATCH or found.batch_limit is not BatchLimit.MAX_NUM_SEQS:
        return 0.0
    if not (engine.waiting or 0) > 0 or not 0 < found.saved_watts < math.inf:
        return 0.0
    if not all(one in energies for one in engine.devices):
        return 0.0
    total = sum(energies[one] for one in engine.devices)
    return found.saved_watts * energies[uuid] / total if total > 0 else 0.0
