"""`jouletrace doctor`: what this machine can measure, with which sensor, at which rate and cost, and what to mend."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jouletrace.clock import Clock
from jouletrace.energy.meter import EnergySource
from jouletrace.gpu.capabilities import Capabilities, advice, probe
from jouletrace.gpu.readings import Device, GpuError, Sensor, Source, UnsupportedError

ACTIVITY_TRIES = 3
ACTIVITY_SECONDS = 0.15
CALL_REPEATS = 5

QUALITY = {
    EnergySource.POWER_RING: "gap-free means; energy within about 0.05 % of the hardware counter",
    EnergySource.ENERGY_COUNTER: "exact totals; a window's edges are known to a counter tick",
    EnergySource.POWER_POLLING: "samples of power; bounds say what the sensor did not see",
    EnergySource.POWER_AVERAGE: "a 1 s average; only windows of many seconds mean something",
}


@dataclass(frozen=True, slots=True)
class Tier:
    """One group of readings: whether it works, what a read costs, why not."""

    works: bool
    milliseconds: float | None = None
    problem: str = ""
    provides: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found out about one device."""

    device: Device
    capabilities: Capabilities
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    advice: Sequence[str] = ()


def examine(source: Source, devices: Sequence[Device]) -> list[Examination]:
    """Try everything on every device; takes about two seconds. Raises DriverMismatchError, DriverGoneError."""
    found = probe(devices, source.clock, threading.Event())
    return [
        _examine_one(device, capabilities, source.clock) for device, capabilities in zip(devices, found, strict=True)
    ]


def _examine_one(device: Device, capabilities: Capabilities, clock: Clock) -> Examination:
    tiers = {
        "activity": _activity(device, clock),
        "state": _tier(device.state, _state_parts),
        "health": _tier(device.health, _health_parts),
    }
    return Examination(device, capabilities, tiers, tuple(_advice(device, capabilities, tiers)))


def _tier(read: Callable[[], Any], parts: Callable[[Any], Sequence[str]]) -> Tier:
    costs = []
    reading = None
    try:
        for _ in range(CALL_REPEATS):
            started = time.perf_counter()
            reading = read()
            costs.append((time.perf_counter() - started) * 1e3)
    except GpuError as failure:
        return Tier(works=False, problem=str(failure))
    return Tier(works=True, milliseconds=statistics.median(costs), provides=parts(reading))


def _activity(device: Device, clock: Clock) -> Tier:
    """Read GPM a few times; a first pair or a NaN may give nothing yet."""
    try:
        for _ in range(ACTIVITY_TRIES):
            clock.wait(clock.now_ns() + int(ACTIVITY_SECONDS * 1e9), threading.Event())
            started = time.perf_counter()
            reading = device.activity()
            cost = (time.perf_counter() - started) * 1e3
            if reading is not None:
                names = ["dram"] if reading.dram_ratio is not None else []
                names += [str(pipe) for pipe in reading.busy_ratio] + [str(link) for link in reading.bytes_per_second]
                return Tier(works=True, milliseconds=cost, provides=names)
    except UnsupportedError as failure:
        return Tier(works=False, problem=str(failure))
    except GpuError as failure:
        return Tier(works=False, problem=f"{failure}; try again")
    return Tier(works=False, problem="no valid reading yet; try again")


def _state_parts(reading: Any) -> list[str]:
    parts = [f"clock {domain}" for domain in reading.clock_hertz]
    parts += ["event reasons"] if reading.event_reasons is not None else []
    parts += [f"throttled {reason}" for reason in reading.throttled_ns]
    parts += [f"temperature {sensor}" for sensor in reading.temperature_celsius]
    parts += ["memory"] if reading.memory_used_bytes is not None else []
    return parts + [f"utilization {kind}" for kind in reading.utilization_ratio]


def _health_parts(reading: Any) -> list[str]:
    parts = [] if reading.processes is None else ["processes"]
    parts += ["power limit"] if reading.power_limit_watts is not None else []
    return parts + [f"ecc {kind}" for kind in reading.ecc_errors]


def _advice(device: Device, capabilities: Capabilities, tiers: Mapping[str, Tier]) -> list[str]:
    sentences = advice(device.info, capabilities)
    if capabilities.lost is None and "processes" not in tiers["health"].provides:
        sentences.append(
            "The driver does not list processes: idle is told from memory in use; in Kubernetes set hostPID: true."
        )
    return sentences


def as_json(source: Source, examinations: Sequence[Examination]) -> dict[str, Any]:
    """Return the examination as plain data; intervals and costs in seconds."""
    return {
        "source": source.name,
        "user_id": os.geteuid(),
        "devices": [
            {
                "gpu": one.device.info.gpu,
                "uuid": one.device.info.uuid,
                "name": one.device.info.name,
                "driver_version": one.device.info.driver_version,
                "architecture": one.device.info.architecture,
                "pci_bus_id": one.device.info.pci_bus_id,
                "mig": one.device.info.mig_enabled,
                "power_limit_watts": one.device.info.power_limit_watts,
                "peak_dram_bytes_per_second": one.device.info.peak_dram_bytes_per_second,
                "energy_source": one.capabilities.energy_source,
                "sensors": {
                    str(sensor): {
                        "works": sensor not in one.capabilities.missing,
                        "update_interval_seconds": one.capabilities.sensor_intervals.get(sensor),
                        "read_seconds": one.capabilities.call_seconds.get(sensor),
                        "problem": one.capabilities.missing.get(sensor),
                    }
                    for sensor in (
                        Sensor.POWER_RING,
                        Sensor.ENERGY_COUNTER,
                        Sensor.POWER_INSTANT,
                        Sensor.POWER_AVERAGE,
                    )
                },
                "tiers": {
                    name: {
                        "works": tier.works,
                        "read_seconds": None if tier.milliseconds is None else tier.milliseconds / 1e3,
                        "provides": list(tier.provides),
                        "problem": tier.problem or None,
                    }
                    for name, tier in one.tiers.items()
                },
                "advice": list(one.advice),
            }
            for one in examinations
        ],
    }


def render(source: Source, examinations: Sequence[Examination]) -> str:
    """Return the examination for a terminal."""
    lines: list[str] = []
    for one in examinations:
        info = one.device.info
        limit = f", limit {info.power_limit_watts:.0f} W" if info.power_limit_watts else ""
        lines.append(f"GPU {info.gpu}  {info.name}  {info.uuid}")
        lines.append(f"  driver {info.driver_version or '?'}{limit}{', MIG on' if info.mig_enabled else ''}")
        chosen = one.capabilities.energy_source
        lines.append(f"  energy from {chosen} ({QUALITY[chosen]})" if chosen else "  energy: not measurable")
        lines.append(f"    {'sensor':<16}{'works':<7}{'updates every':>14}{'a read costs':>14}")
        lines += [_sensor_line(one.capabilities, sensor) for sensor in Sensor]
        lines.append(f"    {'readings':<16}{'works':<7}{'':>14}{'a read costs':>14}")
        for name, tier in one.tiers.items():
            cost = "" if tier.milliseconds is None else f"{tier.milliseconds:.2f} ms"
            what = ", ".join(tier.provides) if tier.works else tier.problem
            lines.append(f"    {name:<16}{'yes' if tier.works else 'no':<7}{'':>14}{cost:>14}  {what}")
        lines += [f"  ! {sentence}" for sentence in one.advice] or ["  Nothing to mend."]
        lines.append("")
    return "\n".join(lines) + f"{len(examinations)} GPU{'s' if len(examinations) != 1 else ''} from {source.name}\n"


def _sensor_line(capabilities: Capabilities, sensor: Sensor) -> str:
    interval = capabilities.sensor_intervals.get(sensor)
    # Instant and average power come in one read.
    cost = capabilities.call_seconds.get(Sensor.POWER_INSTANT if sensor is Sensor.POWER_AVERAGE else sensor)
    problem = capabilities.missing.get(sensor, "")
    updates = f"{interval * 1e3:.1f} ms" if interval else "not seen"
    costs = f"{cost * 1e3:.3f} ms" if cost else ""
    works = "no" if problem else "yes"
    return f"    {sensor:<16}{works:<7}{'' if problem else updates:>14}{costs:>14}  {problem}".rstrip()
