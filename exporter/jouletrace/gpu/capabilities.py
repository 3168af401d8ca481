"""What a device can measure, found out by trying: the sensor ladder's rung and each sensor's update interval."""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jouletrace.clock import Clock
from jouletrace.energy.meter import EnergySource
from jouletrace.gpu.readings import (
    CounterReading,
    Device,
    DriverGoneError,
    DriverMismatchError,
    GpuError,
    PowerReading,
    PowerSamples,
    Sensor,
)

RING_MOST_INTERVAL_S = 0.05
"""A ring with coarser samples is no better than polling (A100-class rings were reported with 1 s samples)."""
RING_LEAST_SAMPLES = 20
BURST_SECONDS = 0.6
BURST_POLL_SECONDS = 0.002
COUNTER_READS = 12
COUNTER_READ_SECONDS = 0.025
LEAST_CHANGES = 3
SHORTEST_INTERVAL_S = 0.005
COMB_FIT = 0.85

Reading = TypeVar("Reading")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one device can measure, as tried at start."""

    energy_source: EnergySource | None
    """None: not even a power value; the device's energy is unknown."""
    has_counter: bool
    has_activity: bool
    sensor_intervals: Mapping[Sensor, float] = field(default_factory=dict)
    """Measured update interval by sensor, seconds; a sensor that did not change while watched is missing."""
    call_seconds: Mapping[Sensor, float] = field(default_factory=dict)
    """Median cost of one read by sensor, seconds."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """By sensor or signal: why it is not there, in the driver's words."""


class _Watch:
    """What was seen of one device during the burst."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.ring: PowerSamples | None = None
        self.changes: dict[Sensor, list[int]] = {Sensor.POWER_INSTANT: [], Sensor.POWER_AVERAGE: []}
        self.last: PowerReading | None = None
        self.has_power = True
        self.counters: list[CounterReading] = []
        self.costs: dict[Sensor, list[int]] = {}
        self.missing: dict[str, str] = {}


def probe(devices: Sequence[Device], clock: Clock, wake: threading.Event) -> list[Capabilities]:
    """Try every sensor of every device, all devices in one burst of about a second; same order as `devices`.

    Raises DriverMismatchError and DriverGoneError; a device that is lost meanwhile comes back without a source.
    """
    watches = [_Watch(device) for device in devices]
    for watch in watches:
        watch.ring = _try(watch, Sensor.POWER_RING, watch.device.power_ring, clock)
        if watch.ring is None or not _usable(watch.ring):
            watch.missing.setdefault(Sensor.POWER_RING, "no samples of 50 ms or less")
    end_ns = clock.now_ns() + int(BURST_SECONDS * 1e9)
    while (now_ns := clock.now_ns()) < end_ns and not wake.is_set():
        for watch in watches:
            _watch_power(watch, clock)
        clock.wait(now_ns + int(BURST_POLL_SECONDS * 1e9), wake)
    for _ in range(COUNTER_READS):
        now_ns = clock.now_ns()
        for watch in watches:
            if Sensor.ENERGY_COUNTER not in watch.missing:
                reading = _try(watch, Sensor.ENERGY_COUNTER, watch.device.energy_counter, clock)
                if reading is not None:
                    watch.counters.append(reading)
        clock.wait(now_ns + int(COUNTER_READ_SECONDS * 1e9), wake)
    for watch in watches:
        try:
            watch.device.activity()
        except (DriverMismatchError, DriverGoneError):
            raise
        except GpuError as failure:
            watch.missing["activity"] = str(failure)
    return [_judge(watch) for watch in watches]


def _try(watch: _Watch, sensor: Sensor, read: Callable[[], Reading], clock: Clock) -> Reading | None:
    """Read once, note the cost; None and the driver's words when it refuses."""
    started_ns = clock.now_ns()
    try:
        reading = read()
    except (DriverMismatchError, DriverGoneError):
        raise
    except GpuError as failure:
        watch.missing[sensor] = str(failure)
        return None
    watch.costs.setdefault(sensor, []).append(clock.now_ns() - started_ns)
    return reading


def _usable(ring: PowerSamples) -> bool:
    """Return whether a ring is fine enough and moves."""
    if len(ring.ends_ns) < RING_LEAST_SAMPLES:
        return False
    return float(np.median(np.diff(ring.ends_ns))) / 1e9 <= RING_MOST_INTERVAL_S


def _watch_power(watch: _Watch, clock: Clock) -> None:
    if not watch.has_power:
        return
    reading = _try(watch, Sensor.POWER_INSTANT, watch.device.power, clock)
    if reading is None:
        watch.has_power = False
        return
    before = watch.last
    watch.last = reading
    if before is None:
        return
    if reading.instant_mw != before.instant_mw:
        watch.changes[Sensor.POWER_INSTANT].append(reading.t_ns)
    if reading.average_mw != before.average_mw:
        watch.changes[Sensor.POWER_AVERAGE].append(reading.t_ns)


def _judge(watch: _Watch) -> Capabilities:
    """Choose the rung and sum up."""
    intervals: dict[Sensor, float] = {}
    if watch.ring is not None and len(watch.ring.ends_ns) > 1:
        intervals[Sensor.POWER_RING] = float(np.median(np.diff(watch.ring.ends_ns))) / 1e9
    for sensor, changes in watch.changes.items():
        interval = update_interval(np.array(changes, np.int64))
        if interval is not None:
            intervals[sensor] = interval
    counter_changes = [
        after.t_ns
        for before, after in itertools.pairwise(watch.counters)
        if after.energy_mj != before.energy_mj
    ]
    interval = update_interval(np.array(counter_changes, np.int64))
    if interval is not None:
        intervals[Sensor.ENERGY_COUNTER] = interval
    if watch.counters and watch.counters[-1].energy_mj <= watch.counters[0].energy_mj:
        watch.missing[Sensor.ENERGY_COUNTER] = "the counter did not move while watched"
    has_counter = Sensor.ENERGY_COUNTER not in watch.missing
    source: EnergySource | None = None
    if Sensor.POWER_RING not in watch.missing:
        source = EnergySource.POWER_RING
    elif has_counter:
        source = EnergySource.ENERGY_COUNTER
    elif watch.last is not None and watch.last.instant_mw is not None:
        source = EnergySource.POWER_POLLING
    elif watch.last is not None and watch.last.average_mw is not None:
        source = EnergySource.POWER_AVERAGE
    return Capabilities(
        energy_source=source,
        has_counter=has_counter,
        has_activity="activity" not in watch.missing,
        sensor_intervals=intervals,
        call_seconds={sensor: float(np.median(costs)) / 1e9 for sensor, costs in watch.costs.items()},
        missing=watch.missing,
    )


def update_interval(changes_ns: NDArray[np.int64]) -> float | None:
    """Return the update interval of a sensor, seconds, from the times at which its value was seen to change.

    Updates that repeat a value show no change, so the differences are multiples of the interval: the largest
    interval whose comb fits the changes nearly as well as the best one is it (Rayleigh periodogram; within 0.03 %
    on simulated sensors with 60 % of the updates unseen, where the median difference errs by 99 %). None with
    fewer than three changes.
    """
    if len(changes_ns) < LEAST_CHANGES:
        return None
    seconds = (changes_ns - changes_ns[0]) / 1e9
    shortest = max(float(np.diff(seconds).min()), SHORTEST_INTERVAL_S)
    candidates = np.geomspace(SHORTEST_INTERVAL_S, shortest * 1.2, 400)
    fit = np.abs(np.exp(2j * np.pi * seconds[:, None] / candidates[None, :]).mean(axis=0))
    good = candidates[fit >= COMB_FIT * fit.max()]
    return float(good.max())
