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
from dataclasses import dataclass, field

import structlog

from jouletrace.energy.baseline import Baseline, IdleKind, IdleLevel, holds_context
from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.energy.timeline import WindowEnergy
from jouletrace.gpu.capabilities import Capabilities, probe
from jouletrace.gpu.readings import (
    ActivityReading,
    Device,
    DeviceLostError,
    DriverMismatchError,
    GpuError,
    HealthReading,
    Link,
    NoDriverError,
    Pipe,
    PowerReading,
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
RETRY_FIRST_SECONDS = 1.0
RETRY_MOST_SECONDS = 60.0
REINIT_AFTER_SECONDS = 5.0
RETURN = "return"
"""The task that tries to get a lost device back."""
ENERGY_TIERS = frozenset(
    {
        ("ring", EnergySource.POWER_RING),
        ("counter", EnergySource.ENERGY_COUNTER),
        ("polling", EnergySource.POWER_POLLING),
        ("polling", EnergySource.POWER_AVERAGE),
    }
)
ACTIVITY_KEPT = 16


@dataclass(frozen=True, slots=True)
class Intervals:
    """How often to read what, seconds."""

    ring: float = 1.0
    activity: float = 0.5
    state: float = 1.0
    health: float = 10.0
    counter: float = 10.0
    polling: float = 0.01


class DriverLostError(Exception):
    """The driver is lost for good; the message says why and what to do. The process must end (exit code 4)."""


class _DeviceAccount:
    """All that is known of one device; touched by the sampler thread only."""

    def __init__(
        self, device: Device, capabilities: Capabilities, levels: Mapping[IdleKind, IdleLevel]
    ) -> None:
        self.device = device
        self.status = DeviceStatus.STARTING
        self.problem = ""
        self.failing_since_ns: int | None = None
        self.retry_seconds = RETRY_FIRST_SECONDS
        self.refusals: dict[str, int] = {}
        self.baseline = Baseline(dict(levels))
        self.dram_bytes: float | None = None
        self.busy_seconds: dict[Pipe, float] = {}
        self.link_bytes: dict[Link, float] = {}
        self.xid_errors: dict[int, int] = {}
        self.activities: deque[ActivityReading] = deque(maxlen=ACTIVITY_KEPT)
        self.published: DeviceSnapshot | None = None
        self.adopt(device, capabilities)
        self.meter = self._new_meter()

    def adopt(self, device: Device, capabilities: Capabilities) -> None:
        """Take a device's (new) handle; what was read before is not valid any more."""
        self.device = device
        self.capabilities = capabilities
        self.power: PowerReading | None = None
        self.state: StateReading | None = None
        self.health: HealthReading | None = None
        self.activity: ActivityReading | None = None

    def _new_meter(self) -> Meter | None:
        capabilities, info = self.capabilities, self.device.info
        if capabilities.energy_source is None:
            return None
        return Meter(
            capabilities.energy_source,
            limit_watts=info.power_limit_watts,
            architecture=info.architecture,
            has_counter=capabilities.has_counter,
        )

    def add_activity(self, reading: ActivityReading) -> None:
        """Integrate a GPM interval: bytes and busy seconds are exact at any scrape interval."""
        self.activity = reading
        self.activities.append(reading)
        seconds = (reading.end_ns - reading.start_ns) / NS
        peak = self.device.info.peak_dram_bytes_per_second
        if reading.dram_ratio is not None and peak is not None:
            self.dram_bytes = (self.dram_bytes or 0.0) + reading.dram_ratio * peak * seconds
        for pipe, ratio in reading.busy_ratio.items():
            self.busy_seconds[pipe] = self.busy_seconds.get(pipe, 0.0) + ratio * seconds
        for link, rate in reading.bytes_per_second.items():
            self.link_bytes[link] = self.link_bytes.get(link, 0.0) + rate * seconds

    def learn_idle(self, start_ns: int, end_ns: int) -> None:
        """Show the baseline the window that the ring just added."""
        if self.meter is None or self.meter.timeline is None or end_ns - start_ns < NS // 2:
            return
        info = self.device.info
        watts = self.meter.timeline.window(start_ns, end_ns).joules / ((end_ns - start_ns) / NS)
        processes = (
            None if self.health is None or self.health.processes is None else len(self.health.processes)
        )
        context = holds_context(
            processes, self.state.memory_used_bytes if self.state else None, info.memory_total_bytes
        )
        self.baseline.observe(end_ns, watts, context=context, busiest_ratio=self._busiest(start_ns, end_ns))

    def _busiest(self, start_ns: int, end_ns: int) -> float | None:
        """Return the highest activity in a window: GPM's, or NVML utilization where there is no GPM."""
        ratios: list[float] = []
        for reading in self.activities:
            if reading.end_ns > start_ns and reading.start_ns < end_ns:
                ratios += [r for p, r in reading.busy_ratio.items() if p is not Pipe.SM_OCCUPANCY]
                ratios += [] if reading.dram_ratio is None else [reading.dram_ratio]
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
            problem=self.problem,
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
            throttled_seconds={r: ns / NS for r, ns in state.throttled_ns.items()} if state else {},
            memory_used_bytes=state.memory_used_bytes if state else None,
            temperature_celsius=state.temperature_celsius if state else {},
            utilization_ratio=state.utilization_ratio if state else {},
            xid_errors=dict(self.xid_errors),
            ecc_errors=health.ecc_errors if health else {},
            processes=health.processes if health else None,
        )

    def _directions(self, transmit: Link, receive: Link) -> Mapping[str, float]:
        named = (("transmit", transmit), ("receive", receive))
        return {name: self.link_bytes[link] for name, link in named if link in self.link_bytes}


@dataclass(order=True, slots=True)
class _Task:
    """Something to do for a device at a time; `run` may raise GpuError."""

    due_ns: int
    order: int
    name: str = field(compare=False)
    account: _DeviceAccount = field(compare=False)
    interval: Callable[[], float] = field(compare=False)
    run: Callable[[_DeviceAccount], None] = field(compare=False)


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
        self._tasks: list[_Task] = []
        self._order = itertools.count()
        self._stretch = 1.0
        self._governed_at = (0.0, 0.0)
        self._cpu_seconds = 0.0
        self._all_failing_since: float | None = None
        self._reinit_seconds = RETRY_FIRST_SECONDS
        self._reinit_at = 0.0
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
        return f"{pending[0]} on GPU {pending[1]}" if pending else None

    def window(self, uuid: str, start_ns: int, end_ns: int) -> WindowEnergy | None:
        """Return a device's energy in (start_ns, end_ns], with bounds; None without such a device or any sample."""
        for account in self._accounts:
            if account.device.info.uuid == uuid and account.meter is not None:
                return account.meter.window(start_ns, end_ns)
        return None

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
            self._on_end(failure)
        else:
            self.source.close()

    def _run_events(self) -> None:
        """Collect critical errors; they wait in a queue for the sampler thread."""
        while not self._stop.is_set():
            try:
                self._xids.extend(self.source.events(1.0))
            except GpuError:
                self._stop.wait(1.0)

    def begin(self) -> None:
        """Open the source, find out what its devices can do and plan the reads."""
        self._beat = time.monotonic()
        devices = self._choose(self.source.open())
        found = probe(devices, self.source.clock, self._stop)
        self._accounts = [
            _DeviceAccount(device, capabilities, self._levels.get(device.info.uuid, {}))
            for device, capabilities in zip(devices, found, strict=True)
        ]
        for account in self._accounts:
            info = account.device.info
            if account.meter is None:
                self._log.warning(
                    "GPU gives no power reading, its energy stays unknown",
                    gpu=info.gpu,
                    uuid=info.uuid,
                    **account.capabilities.missing,
                )
            else:
                self._log.info(
                    "watching GPU",
                    gpu=info.gpu,
                    uuid=info.uuid,
                    name=info.name,
                    energy_source=str(account.meter.source),
                    activity=account.capabilities.has_activity,
                )
        self.source.watch_events(devices)
        self._plan()
        self._publish(self._accounts)

    def _plan(self) -> None:
        """Lay out the tasks, devices staggered over the interval so that no two are read back to back."""
        self._tasks = []
        for place, account in enumerate(self._accounts):
            self._plan_device(account, place / len(self._accounts))

    def _plan_device(self, account: _DeviceAccount, phase: float) -> None:
        """Plan a device's tiers in place of what was planned for it; `phase` (0 to 1) is its turn."""
        self._tasks = [task for task in self._tasks if task.account is not account]
        now_ns = self.source.clock.now_ns()
        for name, interval, run in self._tiers(account):
            due_ns = now_ns + int(interval() * NS * phase)
            self._tasks.append(_Task(due_ns, next(self._order), name, account, interval, run))
        heapq.heapify(self._tasks)

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
        # Memory in use must be known before the first idle window, the ring before the first snapshot.
        source = capabilities.energy_source
        if source is EnergySource.POWER_RING:
            tiers.append(
                ("ring", lambda: min(intervals.ring * self._stretch, RING_MOST_SECONDS), self._read_ring)
            )
        elif source is not None:
            tiers.append(("polling", lambda: self._polling_seconds(account), self._poll_power))
        if capabilities.has_counter:
            tiers.append(("counter", lambda: self._counter_seconds(account), self._read_counter))
        tiers.append(("health", lambda: intervals.health * self._stretch, self._read_health))
        return tiers

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
        while self._tasks and self._tasks[0].due_ns <= now_ns and not self._stop.is_set():
            task = heapq.heappop(self._tasks)
            if self._perform(task):
                touched.append(task.account)
            interval_ns = max(int(task.interval() * NS), 1)
            # A late tier skips what it missed instead of catching up in a burst.
            late = max(0, (now_ns - task.due_ns) // interval_ns)
            task.due_ns += interval_ns * (1 + late)
            if self._goes_on(task):
                heapq.heappush(self._tasks, task)
            self._beat = time.monotonic()
        self._take_events()
        self._mend_all()
        self._govern()
        if touched:
            self._publish(touched)
        soonest = now_ns + int(HEARTBEAT_SECONDS * NS)
        return min(soonest, self._tasks[0].due_ns) if self._tasks else soonest

    def _goes_on(self, task: _Task) -> bool:
        """Return whether a task that just ran is to run again."""
        if (task.account.status is DeviceStatus.LOST) != (task.name == RETURN):
            return False
        return task.account.refusals.get(task.name, 0) < REFUSALS_TO_STOP

    def _perform(self, task: _Task) -> bool:
        """Run one task; return whether the views should see the result."""
        account = task.account
        try:
            task.run(account)
        except UnsupportedError as failure:
            self._note_error(failure)
            self._refused(task, failure)
            return False
        except DriverMismatchError as failure:
            raise DriverLostError(
                "the NVIDIA driver was updated under this process (library and kernel module differ,"
                f" {failure.call} code {failure.code}): restart jouletrace to load the new library"
            ) from failure
        except GpuError as failure:
            self._note_error(failure)
            if task.name == RETURN:
                return False
            if isinstance(failure, DeviceLostError):
                self._lose(account, failure)
            else:
                self._failing(account, failure)
            return account.status is DeviceStatus.LOST
        account.refusals.pop(task.name, None)
        if account.failing_since_ns is not None:
            account.failing_since_ns = None
            account.problem = ""
            self._recovered(account, "GPU answers again")
        if account.status is DeviceStatus.STARTING and account.meter is not None and account.meter.joules > 0:
            account.status = DeviceStatus.OK
        return task.name in ("ring", "counter", RETURN) or (
            task.name == "state" and account.capabilities.energy_source is not EnergySource.POWER_RING
        )

    # ---------------------------------------------------------------- the tiers

    def _read_ring(self, account: _DeviceAccount) -> None:
        meter = account.meter
        assert meter is not None
        before_ns = meter.end_ns
        meter.add_ring(account.device.power_ring())
        if meter.wants_counter:
            self._read_counter(account)
        if before_ns is not None and meter.end_ns is not None and meter.end_ns > before_ns:
            account.learn_idle(before_ns, meter.end_ns)

    def _read_counter(self, account: _DeviceAccount) -> None:
        if account.meter is not None:
            account.meter.add_counter(account.device.energy_counter())

    def _poll_power(self, account: _DeviceAccount) -> None:
        account.power = account.device.power()
        if account.meter is not None:
            account.meter.add_power(account.power)

    def _read_activity(self, account: _DeviceAccount) -> None:
        reading = account.device.activity()
        if reading is not None:
            account.add_activity(reading)

    def _read_state(self, account: _DeviceAccount) -> None:
        account.state = account.device.state()
        if account.capabilities.energy_source is EnergySource.POWER_RING:
            try:
                account.power = account.device.power()
            except UnsupportedError:
                account.power = None

    def _read_health(self, account: _DeviceAccount) -> None:
        account.health = account.device.health()

    # ---------------------------------------------------------------- failures

    def _refused(self, task: _Task, failure: UnsupportedError) -> None:
        """Count a refusal; a tier refused again and again is dropped, the energy source's is found anew."""
        account = task.account
        account.refusals[task.name] = account.refusals.get(task.name, 0) + 1
        if account.refusals[task.name] < REFUSALS_TO_STOP:
            return
        info = account.device.info
        self._log.warning(
            "GPU refuses a reading, dropped", gpu=info.gpu, reading=task.name, error=str(failure)
        )
        source = account.meter.source if account.meter else None
        if (task.name, source) in ENERGY_TIERS:
            self._lose(account, failure)

    def _note_error(self, failure: GpuError) -> None:
        self.source.calls.add_error(failure.call, failure.name)

    def _failing(self, account: _DeviceAccount, failure: GpuError) -> None:
        """Note a failed read; after some time without any good one the device counts as lost."""
        now_ns = self.source.clock.now_ns()
        account.failing_since_ns = account.failing_since_ns or now_ns
        account.problem = str(failure)
        # What was read before is not true any more, and absent is better than old.
        account.power = account.state = account.health = account.activity = None
        self._transitions.failed(
            f"device {account.device.info.uuid}",
            "GPU read fails",
            gpu=account.device.info.gpu,
            uuid=account.device.info.uuid,
            error=str(failure),
        )
        if now_ns - account.failing_since_ns > REINIT_AFTER_SECONDS * NS:
            self._lose(account, failure)

    def _lose(self, account: _DeviceAccount, failure: GpuError) -> None:
        """Drop a device and try to get it back by UUID, with growing patience."""
        info = account.device.info
        if account.status is not DeviceStatus.LOST:
            account.status = DeviceStatus.LOST
            account.problem = f"lost ({failure}); it is picked up again when it returns"
            account.retry_seconds = RETRY_FIRST_SECONDS
            self._transitions.failed(
                f"device {info.uuid}", "GPU lost", gpu=info.gpu, uuid=info.uuid, error=str(failure)
            )
        self._tasks = [task for task in self._tasks if task.account is not account]
        heapq.heapify(self._tasks)
        due_ns = self.source.clock.now_ns() + int(account.retry_seconds * NS)
        task = _Task(
            due_ns, next(self._order), RETURN, account, lambda: account.retry_seconds, self._try_return
        )
        heapq.heappush(self._tasks, task)

    def _try_return(self, account: _DeviceAccount) -> None:
        account.retry_seconds = min(account.retry_seconds * 2, RETRY_MOST_SECONDS)
        device = self.source.reopen_device(account.device.info.uuid)
        [capabilities] = probe([device], self.source.clock, self._stop)
        self._readmit(account, device, capabilities)

    def _readmit(self, account: _DeviceAccount, device: Device, capabilities: Capabilities) -> None:
        account.adopt(device, capabilities)
        account.status = DeviceStatus.OK
        account.problem = ""
        account.failing_since_ns = None
        account.refusals.clear()
        if account.meter is not None and capabilities.energy_source is not None:
            account.meter.change_source(capabilities.energy_source)
        self._recovered(account, "GPU is back")
        self._plan_device(account, 0.0)

    def _recovered(self, account: _DeviceAccount, event: str) -> None:
        info = account.device.info
        self._transitions.recovered(f"device {info.uuid}", event, gpu=info.gpu, uuid=info.uuid)

    def _mend_all(self) -> None:
        """When every device fails the driver itself may be gone: start NVML anew, or give up in the end."""
        if not self._accounts or any(account.status is not DeviceStatus.LOST for account in self._accounts):
            self._all_failing_since = None
            self._reinit_seconds = RETRY_FIRST_SECONDS
            return
        now = time.monotonic()
        if self._all_failing_since is None:
            self._all_failing_since = now
            self._reinit_at = now + REINIT_AFTER_SECONDS
        if now - self._all_failing_since > self._give_up_after_seconds:
            raise DriverLostError(
                f"no GPU has answered for {self._give_up_after_seconds:.0f} s ({self._accounts[0].problem}): look at"
                " `nvidia-smi` and `dmesg | grep -i xid`; in a container, `systemctl daemon-reload` on the host may"
                " have revoked the devices, and only a restart brings them back"
            )
        if now < self._reinit_at:
            return
        self._reinit_seconds = min(self._reinit_seconds * 2, RETRY_MOST_SECONDS)
        self._reinit_at = now + self._reinit_seconds
        try:
            self.source.close()
            devices = {device.info.uuid: device for device in self.source.open()}
        except DriverMismatchError as failure:
            raise DriverLostError(
                "the NVIDIA driver was updated under this process (library and kernel module differ):"
                " restart jouletrace to load the new library"
            ) from failure
        except (NoDriverError, GpuError) as failure:
            self._log.debug("driver is still away", error=str(failure))
            return
        for account in self._accounts:
            device = devices.get(account.device.info.uuid)
            if device is not None:
                [capabilities] = probe([device], self.source.clock, self._stop)
                self._readmit(account, device, capabilities)
        self.source.watch_events(list(devices.values()))

    # ---------------------------------------------------------------- the rest

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
        now, cpu = time.monotonic(), time.thread_time()
        then, cpu_then = self._governed_at
        self._cpu_seconds = cpu
        if now - then < GOVERNOR_SECONDS:
            return
        self._governed_at = (now, cpu)
        if then == 0.0:
            return
        used = (cpu - cpu_then) / (now - then)
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
