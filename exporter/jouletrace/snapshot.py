"""What the views see: one frozen account of the node, made by the sampler, replaced as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jouletrace.gpu.readings import DeviceInfo, Pipe, Sensor, ThrottleReason


class DeviceStatus(StrEnum):
    """Whether a device can be read."""

    STARTING = "starting"
    OK = "ok"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """One device. `None` or a missing key means that there is no valid value now."""

    info: DeviceInfo
    status: DeviceStatus
    problem: str = ""
    """One sentence when the status is not OK."""
    energy_source: str | None = None
    """The rung of the sensor ladder in use: power_ring, energy_counter, power_polling, power_average."""
    energy_joules: float = 0.0
    """Since this process began to watch the device; never goes down."""
    timeline_end_ns: int | None = None
    """Energy is known up to here."""
    counter_joules: float | None = None
    """The hardware counter itself, since driver load."""
    agreement_ratio: float | None = None
    """Our energy over the counter's, for the same span; healthy within 3 % of 1."""
    power_watts: float | None = None
    """Newest value of the energy source."""
    power_max_watts: float | None = None
    """Highest value of the energy source in the last minute."""
    memory_power_watts: float | None = None
    power_limit_watts: float | None = None
    idle_watts: Mapping[str, float] = field(default_factory=dict)
    """Learnt idle levels by kind: `bare`, `parked`."""
    gap_seconds: float = 0.0
    """Total time whose energy was filled in from the counter or not at all."""
    rejected_samples: int = 0
    counter_resets: int = 0
    sensor_intervals: Mapping[Sensor, float] = field(default_factory=dict)
    """Measured update interval of each sensor, seconds."""
    dram_bandwidth_ratio: float | None = None
    dram_bytes: float | None = None
    busy_seconds: Mapping[Pipe, float] = field(default_factory=dict)
    pcie_bytes: Mapping[str, float] = field(default_factory=dict)
    """By direction: `transmit`, `receive`."""
    nvlink_bytes: Mapping[str, float] = field(default_factory=dict)
    clock_hertz: Mapping[str, float] = field(default_factory=dict)
    event_reasons: int | None = None
    throttled_seconds: Mapping[ThrottleReason, float] = field(default_factory=dict)
    memory_used_bytes: int | None = None
    temperature_celsius: Mapping[str, float] = field(default_factory=dict)
    utilization_ratio: Mapping[str, float] = field(default_factory=dict)
    xid_errors: Mapping[int, int] = field(default_factory=dict)
    ecc_errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplerSnapshot:
    """How the sampler itself fares."""

    cpu_seconds: float = 0.0
    """CPU time of the sampler thread, driver calls included."""
    stretch: float = 1.0
    """Factor by which the governor has lengthened the intervals; 1 = as configured."""
    call_seconds: Mapping[str, float] = field(default_factory=dict)
    call_count: Mapping[str, int] = field(default_factory=dict)
    call_errors: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """The whole node at one moment."""

    t_ns: int
    source: str
    devices: tuple[DeviceSnapshot, ...] = ()
    sampler: SamplerSnapshot = field(default_factory=SamplerSnapshot)
