"""What a device's diagnosis rests on: its readings over one and the same span of time.

A value that nobody gave is absent (None, or missing from the mapping), never 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jouletrace.gpu.readings import Link, Pipe, ThrottleReason


@dataclass(frozen=True, slots=True)
class DeviceSignals:
    """One device over (start_ns, end_ns], a whole number of GPM intervals where there is GPM."""

    start_ns: int
    end_ns: int
    energy_joules: float | None = None
    """From the timeline, over exactly this span."""
    dram_ratio: float | None = None
    """DRAM bandwidth as a part of the theoretical peak, 0 to 1."""
    busy_ratio: Mapping[Pipe, float] = field(default_factory=dict)
    """Busy part of the span's cycles by pipe, 0 to 1: cycles, not seconds, so a lower clock raises it."""
    bytes_per_second: Mapping[Link, float] = field(default_factory=dict)
    sm_clock_hertz: float | None = None
    max_sm_clock_hertz: float | None = None
    power_limit_watts: float | None = None
    event_reasons: int | None = None
    """Bit mask of clock event reasons, all that were seen in the span."""
    throttled_ratio: Mapping[ThrottleReason, float] = field(default_factory=dict)
    """Part of the span for which the driver counted the clocks as held down, 0 to 1."""
    utilization_ratio: Mapping[str, float] = field(default_factory=dict)
    """NVML's duty cycles by kind (`gpu`, `memory`): what is there without GPM."""
    held: bool | None = None
    """Whether a process holds a context."""
    processes: int | None = None
    idle_watts: Mapping[str, float] = field(default_factory=dict)
    """Learnt idle levels by kind (`bare`, `parked`)."""
    mig_enabled: bool = False

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def watts(self) -> float | None:
        """Mean power."""
        return None if self.energy_joules is None or self.seconds <= 0 else self.energy_joules / self.seconds
