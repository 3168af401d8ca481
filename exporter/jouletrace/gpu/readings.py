"""What a GPU says, in units, and the Protocol of those that say it.

A reading holds what the driver gave at one moment. A value that the driver refused or that makes no sense is
absent (`None`, or missing from the mapping), never 0 and never the value before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jouletrace.clock import Clock

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]


class Sensor(StrEnum):
    """The sensors that power or energy can be read from."""

    POWER_RING = "power_ring"
    ENERGY_COUNTER = "energy_counter"
    POWER_INSTANT = "power_instant"
    POWER_AVERAGE = "power_average"


class Pipe(StrEnum):
    """Parts of a GPU whose busy share GPM reports (ratio of cycles, 0 to 1)."""

    GRAPHICS = "graphics"
    SM = "sm"
    SM_OCCUPANCY = "sm_occupancy"
    TENSOR = "tensor"
    INTEGER = "integer"
    FP64 = "fp64"
    FP32 = "fp32"
    FP16 = "fp16"


class Link(StrEnum):
    """Links whose traffic GPM reports, seen from the GPU."""

    PCIE_TRANSMIT = "pcie_transmit"
    PCIE_RECEIVE = "pcie_receive"
    NVLINK_TRANSMIT = "nvlink_transmit"
    NVLINK_RECEIVE = "nvlink_receive"


class ThrottleReason(StrEnum):
    """Why the clocks were held down, as the driver's cumulative counters name it."""

    SW_POWER_CAP = "sw_power_cap"
    SYNC_BOOST = "sync_boost"
    BOARD_LIMIT = "board_limit"
    RELIABILITY = "reliability"
    THERMAL = "thermal"
    """Field 75 of drivers without the three below: software and hardware thermal slowdown together."""
    SW_THERMAL = "sw_thermal"
    HW_THERMAL = "hw_thermal"
    HW_POWER_BRAKE = "hw_power_brake"


class GpuError(Exception):
    """A driver call failed.

    `call` is the NVML function, `code` its return code (nvml.h nvmlReturn_t), `name` the code's name.
    """

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} (code {code})")
        self.call = call
        self.code = code
        self.name = name


class UnsupportedError(GpuError):
    """The device, driver or library does not have this call (codes 3, 13, 25, 26), or withholds it (4)."""


class DeviceLostError(GpuError):
    """The device fell off the bus or needs a reset (codes 15, 16, 28)."""


class DriverGoneError(GpuError):
    """The driver itself is not there or not initialized (codes 1, 9, 17)."""


class DriverMismatchError(GpuError):
    """The loaded library and the kernel driver differ (code 18): only a new process can mend it."""


class NoDriverError(Exception):
    """There is no driver or no GPU to read; the message says what to do."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What does not change while a device is there."""

    uuid: str
    gpu: int
    """Index of the device in the driver's enumeration."""
    name: str
    driver_version: str
    architecture: str = ""
    pci_bus_id: str = ""
    memory_total_bytes: int | None = None
    peak_dram_bytes_per_second: float | None = None
    """2 x maximum memory clock x bus width; 4.81e12 on an H200 (nvml.h; datasheet 4.8 TB/s)."""
    max_sm_clock_hertz: float | None = None
    power_limit_watts: float | None = None
    """Enforced limit at start; `HealthReading` carries changes."""
    default_power_limit_watts: float | None = None
    """The board's own limit, before anybody set another one."""
    mig_enabled: bool = False

    @property
    def board_limit_watts(self) -> float | None:
        """What the board was made for: its default limit, or where the driver does not tell the enforced one."""
        return self.power_limit_watts if self.default_power_limit_watts is None else self.default_power_limit_watts


@dataclass(frozen=True, slots=True)
class PowerSamples:
    """Samples of the driver's power ring; sample i is the mean power over (ends_ns[i-1], ends_ns[i]].

    Shapes (n,); ends_ns is strictly increasing steady epoch time, milliwatts as the driver gave them.
    """

    ends_ns: Int64s
    milliwatts: Float64s


@dataclass(frozen=True, slots=True)
class CounterReading:
    """The hardware energy counter: millijoules since the driver was loaded."""

    t_ns: int
    """When the call returned."""
    energy_mj: int
    call_ns: int
    """How long the call took."""


@dataclass(frozen=True, slots=True)
class PowerReading:
    """The driver's power values at one moment, in milliwatts."""

    t_ns: int
    instant_mw: int | None = None
    """NVML field 186."""
    average_mw: int | None = None
    """NVML field 185 or nvmlDeviceGetPowerUsage where that is a 1 s average (Ampere and later, not GA100)."""
    memory_average_mw: int | None = None
    """Field 185, memory scope."""


@dataclass(frozen=True, slots=True)
class ActivityReading:
    """GPM between two samples: means over (start_ns, end_ns], at least 100 ms."""

    start_ns: int
    end_ns: int
    dram_ratio: float | None = None
    """DRAM bandwidth as a part of the theoretical peak, 0 to 1."""
    busy_ratio: Mapping[Pipe, float] = field(default_factory=dict)
    bytes_per_second: Mapping[Link, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateReading:
    """Clocks, temperatures, memory and throttle state at one moment."""

    t_ns: int
    clock_hertz: Mapping[str, float] = field(default_factory=dict)
    """By domain: `sm`, `memory`, `graphics`, `video`."""
    event_reasons: int | None = None
    """Bit mask of nvmlDeviceGetCurrentClocksEventReasons."""
    throttled_ns: Mapping[ThrottleReason, int] = field(default_factory=dict)
    """Cumulative since the driver was loaded."""
    temperature_celsius: Mapping[str, float] = field(default_factory=dict)
    """By sensor: `gpu`, `memory`."""
    memory_used_bytes: int | None = None
    utilization_ratio: Mapping[str, float] = field(default_factory=dict)
    """NVML's own duty cycles by kind (`gpu`, `memory`): part of the time with any kernel or any access."""


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """A process that holds a context on the device; `pid` as the driver gives it (the host's)."""

    pid: int
    memory_bytes: int | None = None
    sm_ratio: float | None = None
    """Time-weighted SM share since the reading before; only read when several processes share a device."""


@dataclass(frozen=True, slots=True)
class HealthReading:
    """What changes rarely: who is on the device, its limit, its memory errors."""

    t_ns: int
    processes: Sequence[ProcessReading] | None = None
    """`None`: the driver does not tell."""
    sm_ratios: Mapping[int, float] = field(default_factory=dict)
    """By pid the time-weighted SM share since the reading before, also of processes that have ended in between; only
    read when several processes share a device."""
    power_limit_watts: float | None = None
    ecc_errors: Mapping[str, int] = field(default_factory=dict)
    """Volatile totals by kind: `corrected`, `uncorrected`."""
    throttled_ns: Mapping[ThrottleReason, int] = field(default_factory=dict)
    """Cumulative since the driver was loaded, like `StateReading`'s: the reasons that take long to read. As they last
    were read, up to half a minute ago while no event reason has shown that one of them holds."""


@dataclass(frozen=True, slots=True)
class XidEvent:
    """A critical error that the driver reported (Xid number as in NVIDIA's Xid catalogue)."""

    t_ns: int
    uuid: str
    xid: int


class Device(Protocol):
    """One GPU. Every method may raise `GpuError`; times are steady epoch nanoseconds."""

    info: DeviceInfo

    def power_ring(self) -> PowerSamples:
        """Return the ring's samples that are newer than the last returned ones (at first: all it holds)."""

    def energy_counter(self) -> CounterReading:
        """Return the hardware energy counter. May take milliseconds: slow tier only."""

    def power(self) -> PowerReading:
        """Return the driver's power values; raises `UnsupportedError` when it has none of them."""

    def activity(self) -> ActivityReading | None:
        """Return GPM means since the last returned reading; `None` when under 100 ms have passed."""

    def graphics_activity(self) -> ActivityReading | None:
        """Return only `Pipe.GRAPHICS`, otherwise as `activity`, which leaves it out: slow tier, it takes 2 ms."""

    def state(self) -> StateReading:
        """Return clocks, temperatures, memory and throttle state."""

    def processes(self) -> Sequence[ProcessReading] | None:
        """Return who holds a context now, without SM shares; `None` when the driver does not tell. 0.3 ms."""

    def health(self) -> HealthReading:
        """Return processes with their SM shares, limit and memory errors."""


@dataclass(slots=True)
class CallStatistics:
    """Cost and failures of driver calls, written by the sampler thread alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    errors: dict[tuple[str, str], int] = field(default_factory=dict)
    """By call and code name."""
    pending: tuple[str, int | None] | None = None
    """The call that is under way and the index of its device, if it has one; what to name when it does not return."""

    def add(self, call: str, seconds: float) -> None:
        """Count one call and the wall time it took."""
        self.seconds[call] = self.seconds.get(call, 0.0) + seconds
        self.count[call] = self.count.get(call, 0) + 1

    def add_error(self, call: str, code: str) -> None:
        """Count one failed call."""
        key = (call, code)
        self.errors[key] = self.errors.get(key, 0) + 1


class Source(Protocol):
    """Where devices come from: the driver, or a recording that stands in for it."""

    name: str
    """`nvml` or `replay`."""
    clock: Clock
    calls: CallStatistics

    def open(self) -> Sequence[Device]:
        """Start and return the devices; raises `NoDriverError` or `DriverMismatchError`."""

    def reopen_device(self, uuid: str) -> Device:
        """Return a fresh handle of a device that was lost; raises `GpuError` while it is still away."""

    def watch_events(self, devices: Sequence[Device]) -> None:
        """Watch these devices and no others for critical errors, where the driver can report them."""

    def events(self, timeout_seconds: float) -> Sequence[XidEvent]:
        """Wait for critical errors, at most `timeout_seconds`; called from a thread of its own."""

    def close(self) -> None:
        """Let go of the driver. Only called when no call is under way."""
