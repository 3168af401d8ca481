"""The sampler: one thread that reads all devices in tiers and keeps their meters.

No view ever waits for the driver: the thread publishes a frozen `NodeSnapshot` and everybody else reads that. A
driver call that does not return stops this thread only; its heartbeat then grows old, and `overdue_call` names
the call.
"""

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog

from jouletrace.energy.baseline import Baseline, IdleKind, IdleLevel, holds_context, work_watts
from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.energy.timeline import Timeline, WindowEnergy
from jouletrace.gpu.capabilities import LADDER, Capabilities, advice, answers, better_than, probe
from jouletrace.gpu.graphics import LOOK_SECONDS, GraphicsPace
from jouletrace.gpu.readings import (
    ActivityReading,
    Device,
    DeviceInfo,
    DeviceLostError,
    DriverGoneError,
    DriverMismatchError,
    Float64s,
    GpuError,
    HealthReading,
    Int64s,
    Link,
    NoDriverError,
    Pipe,
    PowerReading,
    ProcessReading,
    Sensor,
    Source,
    StateReading,
    UnsupportedError,
    XidEvent,
)
from jouletrace.logs import Transitions
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot, SamplerSnapshot

NS = 1_000_000_000
HEARTBEAT_SECONDS = 0.5
"""The thread wakes at least this often, so that a heartbeat older than a few of these means a hang."""
GOVERNOR_SECONDS = 5.0
GOVERNOR_STEP = 1.5
GOVERNOR_MOST = 8.0
GOVERNOR_RELAX_BELOW = 0.6
RING_MOST_SECONDS = 2.0
"""The ring of an H200 is 2.36 s deep: no stretch may go beyond this."""
COUNTER_COST_RATIO = 0.005
"""Share of a core that counter reads may take where the counter is the energy source."""
COUNTER_LEAST_SECONDS = 0.1
REFUSALS_TO_STOP = 5
"""NOT_SUPPORTED this often in a row: the tier is dropped for this device."""
ENERGY_REFUSALS = 2
"""The energy source is found anew sooner: what is used meanwhile is nowhere but in the hardware counter."""
EVENT_WAIT_SECONDS = 1.0
"""Waiting for critical errors; also how long the end of the process may have to wait for that thread."""
RETRY_FIRST_SECONDS = 1.0
RETRY_MOST_SECONDS = 60.0
DEVICES_PER_TURN = 4
"""Devices whose ring is read in one go. One each cost 1.0 % of a core for 8 devices, most of it for waking up with cold
caches; all at once would hold the driver's lock for 10 ms."""
REINIT_AFTER_SECONDS = 5.0
NOT_READY = 27
"""nvmlReturn_t of a device that has come back and gives no power yet."""
RETURN = "return"
"""The task that tries to get a lost device back."""
CLIMB_FIRST_SECONDS = 60.0
"""A sensor that has come back is back for good after a minute, or fails again; meanwhile the next one measures."""
CLIMB_MOST_SECONDS = 3600.0
"""Longest wait between two tries to get a better sensor back; one that was back for this long is trusted again."""
CLIMB_APART_SECONDS = 2.0
"""Time between such tries of two devices: one that works takes 0.6 s, and every ring is to be read in between."""
CLIMB = "climb"
"""The task that tries to get a device back to a better energy sensor."""
ENERGY_TIERS = frozenset(
    {
        ("ring", EnergySource.POWER_RING),
        ("counter", EnergySource.ENERGY_COUNTER),
        ("polling", EnergySource.POWER_POLLING),
        ("polling", EnergySource.POWER_AVERAGE),
    }
)
ACTIVITY_KEPT = 96
"""GPM intervals that the diagnosis can look back on: three quarters of a minute, so that as long as a reading of
GRAPHICS counts, SM activity is known of most of its interval."""
STATES_KEPT = 32
MEMORY_STEP_BYTES = 64 << 20
"""Memory in use that changes by this much since the processes were last listed means that one came or went: a context
takes some 500 MB on an H200."""
LISTING_LEAST_NS = 3 * NS
"""The processes are listed no more often than this for such a change: some programs allocate all the time."""
_SM_OCCUPANCY = Pipe.SM_OCCUPANCY
"""Looked up here, not in the loop: in Python 3.11 a member of an enumeration takes five times a dict's look-up."""
BUSY_KEPT = 2048
"""Intervals whose highest activity the ledger can look back on: 15 minutes at the usual two a second."""
IDLE_WINDOW_NS = 900_000_000
"""Shortest window that tells of idle: one ring reading, or ten ticks of the counter."""
IDLE_WINDOW_MOST_NS = 10 * NS
"""After a gap this long nobody knows what went on inside."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """How often to read what, seconds."""

    ring: float = 1.0
    activity: float = 0.5
    graphics: float = 30.0
    """The longest one; `GraphicsPace` says when it is shorter."""
    state: float = 1.0
    health: float = 10.0
    processes: float | None = None
    """Processes are listed by themselves this often; None: only with the health."""
    counter: float = 10.0
    polling: float = 0.01


class DriverLostError(Exception):
    """The driver is lost for good; the message says why and what to do. The process must end (exit code 4)."""


@dataclass(frozen=True, slots=True)
class _Failing:
    """A tier whose reads fail."""

    since_ns: int
    error: str


@dataclass(frozen=True, slots=True, eq=False)
class LiveDevice:
    """What the ledger and the diagnosis need of a device at one moment."""

    uuid: str
    info: DeviceInfo
    timeline: Timeline
    counter: tuple[int, float] | None
    """The hardware energy counter's newest reading: the time (ns) whose energy it shows, and joules."""
    held: bool | None
    """Whether a process holds a context; None when nobody can tell."""
    busy_ends_ns: Int64s
    """Ends of the intervals of the last quarter hour in which activity was measured, oldest first, shape (n,)."""
    busy_ratios: Float64s
    """The highest activity ratio in each, shape (n,): GPM's, without GPM NVML's duty cycles, without these 0 or 1 by
    power. Empty: nobody can tell work from rest."""
    processes: Sequence[ProcessReading] | None
    """Newest list, with the SM shares of the last health reading."""
    processes_ns: int | None
    """When these were listed; None before the first list."""
    readings: Sequence[ActivityReading]
    """GPM intervals of at least the last half minute, oldest first; those with GRAPHICS hold nothing else."""
    has_activity: bool
    """Whether there is GPM at all."""
    states: Sequence[StateReading]
    """Of the last half minute, oldest first."""
    health: HealthReading | None
    idle_watts: Mapping[str, float]
    """Learnt idle levels by kind (`bare`, `parked`)."""


class _BusyTrack:
    """How busy a device was by time. One thread appends; others get views of what is never written again."""

    def __init__(self) -> None:
        self._table = (np.empty(2 * BUSY_KEPT, np.int64), np.empty(2 * BUSY_KEPT), 0)
        """Ends, ratios, and how many rows there are."""

    def add(self, end_ns: int, ratio: float) -> None:
        """Append an interval, unless the newest one ends as late."""
        ends_ns, ratios, count = self._table
        if count and end_ns <= ends_ns[count - 1]:
            return
        if count == len(ends_ns):
            # Readers keep the old arrays.
            count = BUSY_KEPT
            ends_ns, ratios = np.roll(ends_ns, count), np.roll(ratios, count)
        ends_ns[count], ratios[count] = end_ns, ratio
        self._table = (ends_ns, ratios, count + 1)

    def rows(self) -> tuple[Int64s, Float64s]:
        """Return ends and ratios of the newest intervals, oldest first; may be called from any thread."""
        ends_ns, ratios, count = self._table
        part = slice(max(0, count - BUSY_KEPT), count)
        return ends_ns[part], ratios[part]


class _DeviceAccount:
    """All that is known of one device; touched by the sampler thread only."""

    def __init__(self, device: Device, capabilities: Capabilities, levels: Mapping[IdleKind, IdleLevel]) -> None:
        self.device = device
        self.status = DeviceStatus.STARTING
        self.problem = ""
        self.failing: dict[str, _Failing] = {}
        """By tier; empty again with the first read of it that works."""
        self.read_ns: int | None = None
        """When any read last worked."""
        self.idle_from_ns: int | None = None
        """Up to here the baseline has been shown the energy."""
        self.retry_seconds = RETRY_FIRST_SECONDS
        self.proven_sensors: frozenset[Sensor] = frozenset()
        """Those that have ever worked."""
        self.climb_seconds = CLIMB_FIRST_SECONDS
        """How long to wait before the next try to get a better sensor back."""
        self.whole_since_ns: int | None = None
        """Since when no sensor is missed; None while one is."""
        self.refusals: dict[str, int] = {}
        self.baseline = Baseline(dict(levels))
        self.dram_bytes: float | None = None
        self.busy_seconds: dict[Pipe, float] = {}
        self.link_bytes: dict[Link, float] = {}
        self.xid_errors: dict[int, int] = {}
        self.activities: deque[ActivityReading] = deque(maxlen=ACTIVITY_KEPT)
        self.states: deque[StateReading] = deque(maxlen=STATES_KEPT)
        self.listed_memory_bytes: int | None = None
        """Memory in use when the processes were last listed."""
        self.busy_track = _BusyTrack()
        """A device whose GPM is withdrawn goes on with less."""
        self.published: DeviceSnapshot | None = None
        self.meter: Meter | None = None
        self.adopt(device, capabilities)

    def adopt(self, device: Device, capabilities: Capabilities) -> None:
        """Take a device's (new) handle; what was read before is not valid any more, what was counted is."""
        self.power: PowerReading | None = None
        self.state: StateReading | None = None
        self.health: HealthReading | None = None
        self.listing: tuple[int, Sequence[ProcessReading] | None] | None = None
        """When the processes were last listed by themselves, and who they were."""
        self.activity: ActivityReading | None = None
        self.activities.clear()
        self.states.clear()
        self.failing.clear()
        self.measure_through(device, capabilities)

    def measure_through(self, device: Device, capabilities: Capabilities) -> None:
        """Go on with another handle and the best sensor that was found through it."""
        self.device = device
        self.capabilities = capabilities
        self.proven_sensors |= capabilities.sensors
        self.graphics_pace = GraphicsPace()
        self.refusals.clear()
        if self.meter is None:
            self.meter = self._new_meter()
        elif capabilities.energy_source is not None:
            self.meter.change_source(capabilities.energy_source)
            self.meter.has_counter = capabilities.has_counter
        if self.meter is not None and capabilities.ring is not None:
            self.meter.add_ring(capabilities.ring)

    def missed_sensors(self) -> list[Sensor]:
        """Return the sensors worth trying again, best first: better than the one in use, and the counter to check by.

        That is those that have ever worked, and those that failed when they were tried last without being refused.
        """
        wanted = set(better_than(self.meter.source if self.meter else None))
        if not self.capabilities.has_counter:
            wanted.add(Sensor.ENERGY_COUNTER)
        wanted &= self.proven_sensors | self.capabilities.failing
        return [sensor for sensor in LADDER if sensor in wanted]

    def forget(self, tier: str) -> None:
        """Let go of what a tier has read: it is not true any more, and absent is better than old."""
        match tier:
            case "state":
                self.state = self.power = None
            case "polling":
                self.power = None
            case "activity":
                self.activity = None
            case "health":
                self.health = None
            case "processes":
                self.listing = None

    def _new_meter(self) -> Meter | None:
        capabilities, info = self.capabilities, self.device.info
        if capabilities.energy_source is None:
            return None
        interval = capabilities.sensor_intervals.get(Sensor.POWER_INSTANT)
        return Meter(
            capabilities.energy_source,
            limit_watts=info.power_limit_watts,
            architecture=info.architecture,
            instant_update_ns=round(interval * NS) if interval else None,
            has_counter=capabilities.has_counter,
        )

    def add_activity(self, reading: ActivityReading) -> None:
        """Integrate a GPM interval: bytes and busy seconds are exact at any scrape interval."""
        self.activities.append(reading)
        busiest = _busiest_of(reading)
        if busiest is not None and Pipe.GRAPHICS not in reading.busy_ratio:
            self.busy_track.add(reading.end_ns, busiest)
        seconds = (reading.end_ns - reading.start_ns) / NS
        peak = self.device.info.peak_dram_bytes_per_second
        if reading.dram_ratio is not None and peak is not None:
            self.dram_bytes = (self.dram_bytes or 0.0) + reading.dram_ratio * peak * seconds
        for pipe, ratio in reading.busy_ratio.items():
            self.busy_seconds[pipe] = self.busy_seconds.get(pipe, 0.0) + ratio * seconds
        for link, rate in reading.bytes_per_second.items():
            self.link_bytes[link] = self.link_bytes.get(link, 0.0) + rate * seconds

    def add_state(self, state: StateReading) -> None:
        """Take in clocks and duty cycles; without GPM these tell when work ran."""
        self.state = state
        self.states.append(state)
        if not self.capabilities.has_activity and state.utilization_ratio:
            self.busy_track.add(state.t_ns, max(state.utilization_ratio.values()))

    def _track_power(self, end_ns: int, watts: float) -> None:
        """Tell work from rest by power alone: in MIG mode there are no duty cycles, and often no GPM."""
        if self.capabilities.has_activity or (self.state is not None and self.state.utilization_ratio):
            return
        parked = self.baseline.levels.get(IdleKind.PARKED)
        least = work_watts(None if parked is None else parked.watts, self.device.info.power_limit_watts)
        if least is not None:
            self.busy_track.add(end_ns, 1.0 if watts > least else 0.0)

    def learn_idle(self) -> None:
        """Show the baseline the energy since the last time."""
        end_ns = self.meter.end_ns if self.meter else None
        if self.meter is None or self.meter.timeline is None or end_ns is None:
            return
        start_ns = self.idle_from_ns
        if start_ns is not None and end_ns - start_ns < IDLE_WINDOW_NS:
            return
        self.idle_from_ns = end_ns
        if start_ns is None or end_ns - start_ns > IDLE_WINDOW_MOST_NS:
            return
        timeline = self.meter.timeline
        watts = (timeline.energy_at(end_ns) - timeline.energy_at(start_ns)) / ((end_ns - start_ns) / NS)
        self._track_power(end_ns, watts)
        seen = self.health if self.health is not None and self.health.processes is not None else self.state
        self.baseline.observe(
            end_ns,
            watts,
            context=self.held(),
            context_ns=seen.t_ns if seen else None,
            busiest_ratio=self._busiest(start_ns, end_ns),
        )

    def held(self) -> bool | None:
        """Return whether a process holds the device, as last seen."""
        health, state = self.health, self.state
        processes = None if health is None or health.processes is None else len(health.processes)
        memory_bytes = state.memory_used_bytes if state else None
        return holds_context(processes, memory_bytes, self.device.info.memory_total_bytes)

    def live(self) -> LiveDevice | None:
        """Return what the ledger needs; may be called from any thread. None before the first sample."""
        timeline, health = self.meter.timeline if self.meter else None, self.health
        if timeline is None:
            return None
        processes_ns, processes = self._processes()
        busy_ends_ns, busy_ratios = self.busy_track.rows()
        # One call each copies what the sampler may add to meanwhile.
        return LiveDevice(
            uuid=self.device.info.uuid,
            info=self.device.info,
            timeline=timeline,
            counter=self.meter.counter_at if self.meter else None,
            held=self.held(),
            busy_ends_ns=busy_ends_ns,
            busy_ratios=busy_ratios,
            processes=processes,
            processes_ns=processes_ns,
            readings=list(self.activities),
            has_activity=self.capabilities.has_activity,
            states=list(self.states),
            health=health,
            idle_watts={str(kind): level.watts for kind, level in list(self.baseline.levels.items())},
        )

    def _processes(self) -> tuple[int | None, Sequence[ProcessReading] | None]:
        """Return when the processes were last listed, and who they were."""
        health, listing = self.health, self.listing
        if listing is None or (health is not None and health.t_ns >= listing[0]):
            return (None, None) if health is None else (health.t_ns, health.processes)
        listed_ns, processes = listing
        if processes is None or health is None:
            return listing
        shares = {process.pid: process.sm_ratio for process in health.processes or ()}
        return listed_ns, [replace(process, sm_ratio=shares.get(process.pid)) for process in processes]

    def _busiest(self, start_ns: int, end_ns: int) -> float | None:
        """Return the highest activity in a window: GPM's, or NVML utilization where there is no GPM."""
        ratios: list[float] = []
        for reading in reversed(self.activities):
            if reading.end_ns <= start_ns:
                break
            if reading.start_ns < end_ns:
                busiest = _busiest_of(reading)
                ratios += [] if busiest is None else [busiest]
        if not self.capabilities.has_activity and self.state is not None:
            ratios += self.state.utilization_ratio.values()
        return max(ratios, default=None)

    def snapshot(self) -> DeviceSnapshot:
        """Return the frozen account. Of a lost device only what adds up stays; its gauges are gone."""
        meter, lost = self.meter, self.status is DeviceStatus.LOST
        state, health, power, activity = (
            (None, None, None, None) if lost else (self.state, self.health, self.power, self.activity)
        )
        limit = self.device.info.power_limit_watts
        if health is not None and health.power_limit_watts is not None:
            limit = health.power_limit_watts
        return DeviceSnapshot(
            info=self.device.info,
            status=self.status,
            problem=self.problem or "; ".join(f"{tier} reads fail: {f.error}" for tier, f in self.failing.items()),
            energy_source=str(meter.source) if meter else None,
            energy_joules=meter.joules if meter else 0.0,
            timeline_end_ns=meter.end_ns if meter else None,
            counter_joules=meter.counter_joules if meter else None,
            agreement_ratio=None if lost or meter is None else meter.agreement_ratio,
            power_watts=None if lost or meter is None else meter.power_watts,
            power_max_watts=None if lost or meter is None else meter.power_max_watts,
            memory_power_watts=power.memory_average_mw / 1e3 if power and power.memory_average_mw else None,
            power_limit_watts=None if lost else limit,
            idle_watts={str(kind): level.watts for kind, level in self.baseline.levels.items()},
            gap_seconds=meter.gap_seconds if meter else 0.0,
            rejected_samples=meter.rejected_samples if meter else 0,
            counter_resets=meter.counter_resets if meter else 0,
            sensor_intervals=self.capabilities.sensor_intervals,
            dram_bandwidth_ratio=activity.dram_ratio if activity else None,
            dram_bytes=self.dram_bytes,
            busy_seconds=dict(self.busy_seconds),
            pcie_bytes=self._directions(Link.PCIE_TRANSMIT, Link.PCIE_RECEIVE),
            nvlink_bytes=self._directions(Link.NVLINK_TRANSMIT, Link.NVLINK_RECEIVE),
            clock_hertz=state.clock_hertz if state else {},
            event_reasons=state.event_reasons if state else None,
            throttled_seconds={
                reason: spent_ns / NS
                for reading in (state, health)
                if reading is not None
                for reason, spent_ns in reading.throttled_ns.items()
            },
            memory_used_bytes=state.memory_used_bytes if state else None,
            temperature_celsius=state.temperature_celsius if state else {},
            utilization_ratio=state.utilization_ratio if state else {},
            xid_errors=dict(self.xid_errors),
            ecc_errors=health.ecc_errors if health else {},
        )

    def _directions(self, transmit: Link, receive: Link) -> Mapping[str, float]:
        named = (("transmit", transmit), ("receive", receive))
        return {name: self.link_bytes[link] for name, link in named if link in self.link_bytes}


def _busiest_of(reading: ActivityReading) -> float | None:
    """Return the highest activity ratio of an interval."""
    ratios = [ratio for pipe, ratio in reading.busy_ratio.items() if pipe is not _SM_OCCUPANCY]
    if reading.dram_ratio is not None:
        ratios.append(reading.dram_ratio)
    return max(ratios, default=None)


@dataclass(slots=True)
class _Task:
    """Something to do for a device at a time; `run` may raise GpuError."""

    due_ns: int
    order: int
    name: str
    account: _DeviceAccount
    interval: Callable[[], float]
    run: Callable[[_DeviceAccount], None]

    @property
    def row(self) -> tuple[int, int, "_Task"]:
        """Its row in the heap: tuples compare without a call of Python."""
        return (self.due_ns, self.order, self)


def _is_energy(account: _DeviceAccount, tier: str) -> bool:
    """Return whether a tier is where the device's energy comes from."""
    return account.meter is not None and (tier, account.meter.source) in ENERGY_TIERS


class Sampler:
    """Reads a source's devices. `start` makes the thread; tests drive `begin` and `run_due` themselves."""

    def __init__(
        self,
        source: Source,
        intervals: Intervals,
        *,
        choose: Callable[[Sequence[Device]], Sequence[Device]] = lambda devices: devices,
        levels: Mapping[str, Mapping[IdleKind, IdleLevel]] | None = None,
        cpu_budget_ratio: float = 1.0,
        give_up_after_seconds: float = 120.0,
        on_end: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.source = source
        self.snapshot = NodeSnapshot(source.clock.now_ns(), source.name)
        self._intervals = intervals
        self._choose = choose
        self._levels = levels or {}
        self._cpu_budget_ratio = cpu_budget_ratio
        self._give_up_after_seconds = give_up_after_seconds
        self._on_end = on_end
        self._accounts: list[_DeviceAccount] = []
        self._tasks: list[tuple[int, int, _Task]] = []
        """A heap."""
        self._planned_ns = 0
        self._order = itertools.count()
        self._stretch = 1.0
        self._governed_at: tuple[int, float] | None = None
        self._cpu_seconds = 0.0
        self._all_lost_since_ns: int | None = None
        self._reinit_seconds = RETRY_FIRST_SECONDS
        self._reinit_at_ns = 0
        self._xids: deque[XidEvent] = deque(maxlen=1024)
        self._stop = threading.Event()
        self._beat = time.monotonic()
        self._log = structlog.get_logger("jouletrace.sampler")
        self._transitions = Transitions(self._log, time.monotonic_ns)
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._event_thread = threading.Thread(target=self._run_events, name="gpu-events", daemon=True)

    # ---------------------------------------------------------------- seen from other threads

    def start(self) -> None:
        """Start the thread. It opens the source; failures to do so arrive through `on_end`."""
        self._thread.start()

    def stop(self, patience_seconds: float = 2.0) -> bool:
        """Ask the thread to end; return whether it did. A hung one is left behind: nothing may wait for it."""
        self._stop.set()
        self._thread.join(patience_seconds)
        return not self._thread.is_alive()

    @property
    def heartbeat_age_seconds(self) -> float:
        """How long ago the thread last came round."""
        return time.monotonic() - self._beat

    @property
    def overdue_call(self) -> str | None:
        """The driver call that is under way, in words; what to blame when the heartbeat is old."""
        pending = self.source.calls.pending
        if pending is None:
            return None
        call, gpu = pending
        return call if gpu is None else f"{call} on GPU {gpu}"

    def window(self, uuid: str, start_ns: int, end_ns: int) -> WindowEnergy | None:
        """Return a device's energy in (start_ns, end_ns], with bounds; None without such a device or any sample."""
        for account in self._accounts:
            if account.device.info.uuid == uuid and account.meter is not None:
                return account.meter.window(start_ns, end_ns)
        return None

    def live_devices(self) -> Sequence[LiveDevice]:
        """Return what the ledger needs of every device that has a sample; may be called from any thread."""
        return [device for account in self._accounts if (device := account.live()) is not None]

    def learnt_levels(self) -> dict[str, dict[IdleKind, IdleLevel]]:
        """Return the idle levels of all devices ever known, for the state file."""
        levels = {uuid: dict(kinds) for uuid, kinds in self._levels.items()}
        for account in self._accounts:
            if account.baseline.levels:
                levels[account.device.info.uuid] = dict(account.baseline.levels)
        return levels

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self.begin()
            self._event_thread.start()
            while not self._stop.is_set():
                next_ns = self.run_due()
                self.source.clock.wait(next_ns, self._stop)
        except Exception as failure:
            if not self._stop.is_set():
                self._on_end(failure)
        else:
            self.source.close()

    def _run_events(self) -> None:
        """Collect critical errors; they wait in a queue for the sampler thread."""
        while not self._stop.is_set():
            try:
                self.collect_events(EVENT_WAIT_SECONDS)
            except GpuError:
                self._stop.wait(EVENT_WAIT_SECONDS)

    def collect_events(self, timeout_seconds: float) -> None:
        """Wait for critical errors and keep them for the next `run_due`."""
        self._xids.extend(self.source.events(timeout_seconds))

    def begin(self) -> None:
        """Open the source, find out what its devices can do and plan the reads."""
        self._beat = time.monotonic()
        devices = self._choose(self.source.open())
        found = probe(devices, self.source.clock, self._stop)
        self._accounts = [
            _DeviceAccount(device, capabilities, self._levels.get(device.info.uuid, {}))
            for device, capabilities in zip(devices, found, strict=True)
        ]
        self._introduce()
        self._plan()
        for account in self._accounts:
            if account.capabilities.lost is not None:
                self._note_error(account.capabilities.lost)
                self._lose(account, account.capabilities.lost)
        self._watch_events()
        self._publish(self._accounts)

    def _introduce(self) -> None:
        """Log what each device can measure, and each shortcoming once with the devices that have it."""
        shortcomings: dict[str, list[int]] = {}
        for account in self._accounts:
            info, capabilities = account.device.info, account.capabilities
            if account.meter is not None:
                self._log.info(
                    "watching GPU",
                    gpu=info.gpu,
                    uuid=info.uuid,
                    name=info.name,
                    energy_source=str(account.meter.source),
                    activity=capabilities.has_activity,
                )
            elif capabilities.lost is None:
                account.problem = "it gives no power reading; `jouletrace doctor` says why"
            for sentence in advice(info, capabilities):
                shortcomings.setdefault(sentence, []).append(info.gpu)
        for sentence, gpus in shortcomings.items():
            self._log.info(sentence, gpus=gpus)

    def _plan(self) -> None:
        """Lay out the tasks: the devices take turns over the interval, a few of them a turn."""
        self._tasks = []
        self._planned_ns = self.source.clock.now_ns()
        for place, account in enumerate(self._accounts):
            self._plan_device(account, place // DEVICES_PER_TURN)

    def _plan_device(self, account: _DeviceAccount, turn: int) -> None:
        """Plan a device's tiers in place of what was planned for it.

        They begin on a common grid, so that faster tiers of all devices are read when the ring of some is: waking up
        costs more than most reads.
        """
        self._forget_tasks(account)
        turns = -(-len(self._accounts) // DEVICES_PER_TURN)
        tick_ns = int(self._intervals.ring * NS) // turns
        now_ns = self.source.clock.now_ns()
        tick_now_ns = now_ns - (now_ns - self._planned_ns) % tick_ns
        for name, interval, run in self._tiers(account):
            later_ns = int(interval() * NS) * turn // turns
            due_ns = tick_now_ns + later_ns - later_ns % tick_ns
            self._tasks.append(_Task(due_ns, next(self._order), name, account, interval, run).row)
        heapq.heapify(self._tasks)
        self._plan_climb(account)

    def _plan_climb(self, account: _DeviceAccount) -> None:
        """Plan the next try to get a better sensor back in place of what was planned, where one is missed."""
        now_ns, whole_since_ns = self.source.clock.now_ns(), account.whole_since_ns
        if not account.missed_sensors():
            account.whole_since_ns = now_ns if whole_since_ns is None else whole_since_ns
            return
        account.whole_since_ns = None
        if whole_since_ns is not None and now_ns - whole_since_ns >= CLIMB_MOST_SECONDS * NS:
            account.climb_seconds = CLIMB_FIRST_SECONDS
        self._tasks = [row for row in self._tasks if row[2].account is not account or row[2].name != CLIMB]
        heapq.heapify(self._tasks)
        due_ns, apart_ns = now_ns + int(account.climb_seconds * NS), int(CLIMB_APART_SECONDS * NS)
        others_ns = [row[0] for row in self._tasks if row[2].name == CLIMB]
        while any(abs(due_ns - other_ns) < apart_ns for other_ns in others_ns):
            due_ns += apart_ns
        task = _Task(due_ns, next(self._order), CLIMB, account, lambda: account.climb_seconds, self._climb)
        heapq.heappush(self._tasks, task.row)

    def _forget_tasks(self, account: _DeviceAccount) -> None:
        self._tasks = [row for row in self._tasks if row[2].account is not account]

    def _tiers(
        self, account: _DeviceAccount
    ) -> list[tuple[str, Callable[[], float], Callable[[_DeviceAccount], None]]]:
        """Return the reads that a device needs: (name, interval, read)."""
        intervals, capabilities = self._intervals, account.capabilities
        tiers: list[tuple[str, Callable[[], float], Callable[[_DeviceAccount], None]]] = [
            ("state", lambda: intervals.state * self._stretch, self._read_state),
        ]
        if capabilities.has_activity:
            tiers.append(("activity", lambda: intervals.activity * self._stretch, self._read_activity))
            tiers.append(("graphics", lambda: self._look_seconds() * self._stretch, self._read_graphics))
        # Memory in use must be known before the first idle window, the ring before the first snapshot.
        source = capabilities.energy_source
        if source is EnergySource.POWER_RING:
            tiers.append(("ring", lambda: min(intervals.ring * self._stretch, RING_MOST_SECONDS), self._read_ring))
        elif source is not None:
            tiers.append(("polling", lambda: self._polling_seconds(account), self._poll_power))
        if capabilities.has_counter:
            tiers.append(("counter", lambda: self._counter_seconds(account), self._read_counter))
        tiers.append(("health", lambda: intervals.health * self._stretch, self._read_health))
        seconds = intervals.processes
        if seconds is not None:
            tiers.append(("processes", lambda: seconds * self._stretch, self._read_processes))
        return tiers

    def _look_seconds(self) -> float:
        return min(LOOK_SECONDS, self._intervals.graphics)

    def _polling_seconds(self, account: _DeviceAccount) -> float:
        if account.meter is not None and account.meter.source is EnergySource.POWER_POLLING:
            return self._intervals.polling * self._stretch
        # As a shape inside a counter tick, and for a 1 s average, twice the sensor's own rate is enough.
        return max(self._intervals.polling, 0.05) * self._stretch

    def _counter_seconds(self, account: _DeviceAccount) -> float:
        if account.meter is not None and account.meter.source is EnergySource.ENERGY_COUNTER:
            cost = self.source.calls.seconds.get("nvmlDeviceGetTotalEnergyConsumption", 0.0)
            count = self.source.calls.count.get("nvmlDeviceGetTotalEnergyConsumption", 0)
            mean = cost / count if count else 0.0
            return max(COUNTER_LEAST_SECONDS, mean / COUNTER_COST_RATIO) * self._stretch
        return self._intervals.counter * self._stretch

    def run_due(self) -> int:
        """Do all that is due; return when (steady ns) to come again. Raises DriverLostError."""
        clock = self.source.clock
        self._beat = time.monotonic()
        now_ns = clock.now_ns()
        touched: list[_DeviceAccount] = []
        while self._tasks and self._tasks[0][0] <= now_ns and not self._stop.is_set():
            _, _, task = heapq.heappop(self._tasks)
            if self._perform(task):
                touched.append(task.account)
            interval_ns = max(int(task.interval() * NS), 1)
            # A late tier skips what it missed instead of catching up in a burst.
            late = max(0, (now_ns - task.due_ns) // interval_ns)
            task.due_ns += interval_ns * (1 + late)
            if self._goes_on(task):
                heapq.heappush(self._tasks, task.row)
            self._beat = time.monotonic()
        self._take_events()
        self._mend_all()
        self._govern()
        if touched:
            self._publish(touched)
        soonest = now_ns + int(HEARTBEAT_SECONDS * NS)
        return min(soonest, self._tasks[0][0]) if self._tasks else soonest

    def _goes_on(self, task: _Task) -> bool:
        """Return whether a task that just ran is to run again."""
        if (task.account.status is DeviceStatus.LOST) != (task.name == RETURN):
            return False
        if task.name == CLIMB:
            # Each try plans the next one itself, where another is needed.
            return False
        if task.name == "graphics" and not task.account.capabilities.has_activity:
            return False
        return task.account.refusals.get(task.name, 0) < REFUSALS_TO_STOP

    def _perform(self, task: _Task) -> bool:
        """Run one task; return whether the views should see the result."""
        account = task.account
        try:
            task.run(account)
        except DriverMismatchError as failure:
            raise DriverLostError(
                "the NVIDIA driver was updated under this process (library and kernel module differ,"
                f" {failure.call} code {failure.code}): restart jouletrace to load the new library"
            ) from failure
        except GpuError as failure:
            self._note_error(failure)
            if task.name == CLIMB:
                # What is read meanwhile is none the worse; a device that is lost shows in that.
                return False
            if task.name == RETURN:
                return True
            account.forget(task.name)
            if isinstance(failure, DeviceLostError):
                self._lose(account, failure)
            elif isinstance(failure, UnsupportedError):
                self._refused(account, task.name, failure)
            else:
                self._failing(account, task.name, failure)
            return True
        if task.name == CLIMB:
            return True
        account.read_ns = self.source.clock.now_ns()
        account.refusals.pop(task.name, None)
        if account.failing.pop(task.name, None) is not None and not account.failing:
            self._recovered(account, "GPU answers again")
        if account.status is DeviceStatus.STARTING and account.meter is not None and account.meter.joules > 0:
            account.status = DeviceStatus.OK
        if _is_energy(account, task.name):
            account.learn_idle()
        return task.name in ("ring", "counter", RETURN) or (
            task.name == "state" and account.capabilities.energy_source is not EnergySource.POWER_RING
        )

    # ---------------------------------------------------------------- the tiers

    def _read_ring(self, account: _DeviceAccount) -> None:
        meter = account.meter
        assert meter is not None
        meter.add_ring(account.device.power_ring())
        if meter.wants_counter:
            # On its own tier, where a counter that fails costs the counter and not the ring.
            self._hurry(account, "counter")

    def _hurry(self, account: _DeviceAccount, tier: str) -> None:
        """Let a tier of a device be read in this turn."""
        for place, (_, _, task) in enumerate(self._tasks):
            if task.account is account and task.name == tier:
                task.due_ns = self.source.clock.now_ns()
                self._tasks[place] = task.row
        heapq.heapify(self._tasks)

    def _read_counter(self, account: _DeviceAccount) -> None:
        meter = account.meter
        if meter is None:
            return
        source = meter.source
        meter.add_counter(account.device.energy_counter())
        if meter.source is not source:
            # A counter that stands still is left by the meter itself.
            self._plan_climb(account)

    def _poll_power(self, account: _DeviceAccount) -> None:
        account.power = account.device.power()
        if account.meter is not None:
            account.meter.add_power(account.power)

    def _read_activity(self, account: _DeviceAccount) -> None:
        reading = account.device.activity()
        if reading is not None:
            account.activity = reading
            account.add_activity(reading)

    def _read_graphics(self, account: _DeviceAccount) -> None:
        now_ns, pace = self.source.clock.now_ns(), account.graphics_pace
        if not pace.is_due(now_ns, account.activities, self._intervals.graphics, self._stretch):
            return
        pace.begin(now_ns)
        reading = account.device.graphics_activity()
        if reading is not None:
            pace.add(reading, account.activities, self._stretch)
            account.add_activity(reading)

    def _read_state(self, account: _DeviceAccount) -> None:
        state = account.device.state()
        account.add_state(state)
        used, listed = state.memory_used_bytes, account.listed_memory_bytes
        if account.health is not None and used is not None:
            is_new = listed is None or abs(used - listed) >= MEMORY_STEP_BYTES
            if is_new and state.t_ns - account.health.t_ns >= LISTING_LEAST_NS:
                self._hurry(account, "health")
        if account.capabilities.energy_source is EnergySource.POWER_RING:
            try:
                account.power = account.device.power()
            except UnsupportedError:
                account.power = None

    def _read_health(self, account: _DeviceAccount) -> None:
        account.health = account.device.health()
        account.listed_memory_bytes = account.state.memory_used_bytes if account.state else None

    def _read_processes(self, account: _DeviceAccount) -> None:
        listed = account.device.processes()
        account.listing = (self.source.clock.now_ns(), listed)

    # ---------------------------------------------------------------- failures

    def _refused(self, account: _DeviceAccount, tier: str, failure: UnsupportedError) -> None:
        """Count a refusal; a tier refused again and again is dropped, the energy source is found anew."""
        account.refusals[tier] = account.refusals.get(tier, 0) + 1
        if _is_energy(account, tier):
            if account.refusals[tier] >= ENERGY_REFUSALS:
                self._change_sensor(account, failure)
            return
        if account.refusals[tier] < REFUSALS_TO_STOP:
            return
        info = account.device.info
        self._log.warning("GPU refuses a reading, dropped", gpu=info.gpu, reading=tier, error=str(failure))
        if tier == "activity":
            account.capabilities = replace(account.capabilities, has_activity=False)

    def _change_sensor(self, account: _DeviceAccount, failure: GpuError) -> None:
        """Find out what the device can still measure, as for one that comes back, but at once."""
        source = str(account.meter.source) if account.meter else None
        self._fails(account, "GPU fails its energy sensor, looking for another one", failure, energy_source=source)
        self._away(account, f"its energy sensor fails ({failure}); another one is being looked for", 0.0)

    def _note_error(self, failure: GpuError) -> None:
        self.source.calls.add_error(failure.call, failure.name)

    def _failing(self, account: _DeviceAccount, tier: str, failure: GpuError) -> None:
        """Note a failed read; after some time without any good one the device counts as lost."""
        now_ns = self.source.clock.now_ns()
        since_ns = account.failing[tier].since_ns if tier in account.failing else now_ns
        account.failing[tier] = _Failing(since_ns, str(failure))
        self._fails(account, "GPU read fails", failure, reading=tier)
        if now_ns - since_ns <= REINIT_AFTER_SECONDS * NS:
            return
        if account.read_ns is None or account.read_ns <= min(f.since_ns for f in account.failing.values()):
            self._lose(account, failure)
        elif _is_energy(account, tier):
            self._change_sensor(account, failure)

    def _lose(self, account: _DeviceAccount, failure: GpuError) -> None:
        """Drop a device and try to get it back by UUID, with growing patience."""
        self._fails(account, "GPU lost", failure)
        self._away(account, f"lost ({failure}); it is picked up again when it returns", RETRY_FIRST_SECONDS)
        self._watch_events()

    def _away(self, account: _DeviceAccount, problem: str, retry_seconds: float) -> None:
        """Stop all reads of a device; what comes next is the try to get it back."""
        account.status = DeviceStatus.LOST
        account.problem = problem
        account.retry_seconds = retry_seconds
        self._forget_tasks(account)
        due_ns = self.source.clock.now_ns() + int(retry_seconds * NS)
        task = _Task(due_ns, next(self._order), RETURN, account, lambda: account.retry_seconds, self._try_return)
        heapq.heappush(self._tasks, task.row)

    def _try_return(self, account: _DeviceAccount) -> None:
        account.retry_seconds = min(max(account.retry_seconds * 2, RETRY_FIRST_SECONDS), RETRY_MOST_SECONDS)
        device = self.source.reopen_device(account.device.info.uuid)
        [capabilities] = probe([device], self.source.clock, self._stop)
        self._readmit(account, device, capabilities)
        self._watch_events()

    def _readmit(self, account: _DeviceAccount, device: Device, capabilities: Capabilities) -> None:
        """Read a device again; raises GpuError when it has not really come back."""
        if capabilities.lost is not None:
            raise capabilities.lost
        if capabilities.energy_source is None and account.meter is not None:
            raise GpuError("nvmlDeviceGetPowerUsage", NOT_READY, "NOT_READY")
        account.adopt(device, capabilities)
        account.status = DeviceStatus.OK
        account.problem = ""
        source = str(account.meter.source) if account.meter else None
        self._recovered(account, "GPU is back", energy_source=source)
        self._plan_device(account, 0)

    def _climb(self, account: _DeviceAccount) -> None:
        """Try to get back to a better sensor, with growing patience, while the one in use goes on."""
        account.climb_seconds = min(account.climb_seconds * 2, CLIMB_MOST_SECONDS)
        try:
            found = self._find_better(account)
        finally:
            self._plan_climb(account)
        if found is None:
            return
        before = str(account.meter.source) if account.meter else None
        device, capabilities = found
        account.measure_through(device, capabilities)
        account.problem = ""
        info = device.info
        self._log.info(
            "energy sensor is back",
            gpu=info.gpu,
            uuid=info.uuid,
            energy_source=str(capabilities.energy_source),
            energy_source_before=before,
        )
        self._plan_device(account, 0)

    def _find_better(self, account: _DeviceAccount) -> tuple[Device, Capabilities] | None:
        """Return a handle through which a missed sensor works; None without any. Raises GpuError.

        A single reading comes first: while it fails, all of this costs 5 ms, where `probe` takes 0.6 s.
        """
        uuid, missed = account.device.info.uuid, account.missed_sensors()
        device = self.source.reopen_device(uuid)
        if not any(self._answers(account, device, sensor) for sensor in missed):
            return None
        # Through a fresh handle, so that the timeline goes on with all that the ring holds.
        device = self.source.reopen_device(uuid)
        [capabilities] = probe([device], self.source.clock, self._stop)
        # This burst is not what sampling costs: the governor begins a new span after it.
        self._governed_at = None
        if capabilities.lost is not None:
            raise capabilities.lost
        in_use = better_than(account.meter.source if account.meter else None)
        is_worse = len(better_than(capabilities.energy_source)) > len(in_use)
        if is_worse or capabilities.sensors.isdisjoint(missed):
            account.capabilities = replace(account.capabilities, failing=capabilities.failing)
            return None
        return device, capabilities

    def _answers(self, account: _DeviceAccount, device: Device, sensor: Sensor) -> bool:
        """Return whether a missed sensor answers; one that is refused and never worked is not missed any more."""
        try:
            return answers(device, sensor)
        except (DeviceLostError, DriverGoneError, DriverMismatchError):
            raise
        except GpuError as failure:
            self._note_error(failure)
            if isinstance(failure, UnsupportedError):
                failing = account.capabilities.failing - {sensor}
                account.capabilities = replace(account.capabilities, failing=failing)
            return False

    def _fails(self, account: _DeviceAccount, event: str, failure: GpuError, **fields: str | None) -> None:
        """Log that a device begins to fail, in whatever way; the end of it is one line as well."""
        info = account.device.info
        self._transitions.failed(
            f"device {info.uuid}", event, gpu=info.gpu, uuid=info.uuid, error=str(failure), **fields
        )

    def _recovered(self, account: _DeviceAccount, event: str, **fields: str | None) -> None:
        info = account.device.info
        self._transitions.recovered(f"device {info.uuid}", event, gpu=info.gpu, uuid=info.uuid, **fields)

    def _mend_all(self) -> None:
        """When every device fails the driver itself may be gone: start NVML anew, or give up in the end."""
        if not self._accounts or any(account.status is not DeviceStatus.LOST for account in self._accounts):
            self._all_lost_since_ns = None
            self._reinit_seconds = RETRY_FIRST_SECONDS
            return
        now_ns = self.source.clock.now_ns()
        if self._all_lost_since_ns is None:
            self._all_lost_since_ns = now_ns
            self._reinit_at_ns = now_ns + int(REINIT_AFTER_SECONDS * NS)
        if now_ns - self._all_lost_since_ns > self._give_up_after_seconds * NS:
            what, _, _ = self._accounts[0].problem.partition(";")
            raise DriverLostError(
                f"no GPU has answered for {self._give_up_after_seconds:.0f} s ({what}): look at"
                " `nvidia-smi` and `dmesg | grep -i xid`; in a container, `systemctl daemon-reload` on the host may"
                " have revoked the devices, and only a restart brings them back"
            )
        if now_ns < self._reinit_at_ns:
            return
        self._reinit_seconds = min(self._reinit_seconds * 2, RETRY_MOST_SECONDS)
        self._reinit_at_ns = now_ns + int(self._reinit_seconds * NS)
        self.source.close()
        try:
            self._readmit_all(self.source.open())
        except DriverMismatchError as failure:
            raise DriverLostError(
                "the NVIDIA driver was updated under this process (library and kernel module differ):"
                " restart jouletrace to load the new library"
            ) from failure
        except (NoDriverError, GpuError) as failure:
            self._log.debug("driver is still away", error=str(failure))

    def _readmit_all(self, devices: Sequence[Device]) -> None:
        """Take back those of our devices that a driver started anew shows."""
        ours = {account.device.info.uuid: account for account in self._accounts}
        devices = [device for device in devices if device.info.uuid in ours]
        found = probe(devices, self.source.clock, self._stop)
        for device, capabilities in zip(devices, found, strict=True):
            try:
                self._readmit(ours[device.info.uuid], device, capabilities)
            except GpuError as failure:
                self._note_error(failure)
        self._watch_events()

    # ---------------------------------------------------------------- the rest

    def _watch_events(self) -> None:
        self.source.watch_events([a.device for a in self._accounts if a.status is not DeviceStatus.LOST])

    def _take_events(self) -> None:
        while self._xids:
            event = self._xids.popleft()
            for account in self._accounts:
                if account.device.info.uuid == event.uuid:
                    account.xid_errors[event.xid] = account.xid_errors.get(event.xid, 0) + 1
                    self._log.warning(
                        "GPU reported a critical error",
                        gpu=account.device.info.gpu,
                        uuid=event.uuid,
                        xid=event.xid,
                    )

    def _govern(self) -> None:
        """Keep within the CPU budget: lengthen the intervals above it, shorten them again well below."""
        now_ns, cpu = self.source.clock.now_ns(), time.thread_time()
        self._cpu_seconds = cpu
        if self._governed_at is None:
            self._governed_at = (now_ns, cpu)
        then_ns, cpu_then = self._governed_at
        if now_ns - then_ns < GOVERNOR_SECONDS * NS:
            return
        self._governed_at = (now_ns, cpu)
        used = (cpu - cpu_then) / ((now_ns - then_ns) / NS)
        if used > self._cpu_budget_ratio and self._stretch < GOVERNOR_MOST:
            self._stretch = min(self._stretch * GOVERNOR_STEP, GOVERNOR_MOST)
        elif used < GOVERNOR_RELAX_BELOW * self._cpu_budget_ratio and self._stretch > 1.0:
            self._stretch = max(self._stretch / GOVERNOR_STEP, 1.0)
        if self._stretch > 1.0:
            self._transitions.failed(
                "cpu budget",
                "reading less often to stay within the CPU budget",
                cpu_ratio=round(used, 4),
                budget_ratio=self._cpu_budget_ratio,
                stretch=round(self._stretch, 2),
            )
        else:
            self._transitions.recovered("cpu budget", "reading at the configured intervals again")

    def _publish(self, touched: Sequence[_DeviceAccount]) -> None:
        """Replace the snapshot; only the touched devices' parts are made anew."""
        calls = self.source.calls
        for account in touched:
            account.published = account.snapshot()
        self.snapshot = NodeSnapshot(
            t_ns=self.source.clock.now_ns(),
            source=self.source.name,
            devices=tuple(account.published for account in self._accounts if account.published),
            sampler=SamplerSnapshot(
                cpu_seconds=self._cpu_seconds,
                stretch=self._stretch,
                call_seconds=dict(calls.seconds),
                call_count=dict(calls.count),
                call_errors=dict(calls.errors),
            ),
        )
