"""Who runs on the devices: processes, their pods' names and the pods' energy, joined off every scrape's path."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import structlog

from jouletrace.clock import Clock
from jouletrace.config import Workloads
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import HealthReading, ProcessReading
from jouletrace.logs import Transitions
from jouletrace.workloads.cgroups import Membership
from jouletrace.workloads.energy import OUTSIDE, DevicePods, Row
from jouletrace.workloads.naming import PodNaming
from jouletrace.workloads.pods import LivePod
from jouletrace.workloads.residents import Resident, Residents

LISTING_SECONDS: Final = 1.0
"""How often the processes of each device are listed: one call of 0.27 ms, 0.2 % of a core for eight H200s."""
LOOK_SECONDS: Final = 0.5
"""How often new lists are looked for. A pod is named within both times and an answer of the kubelet: under 2 s."""
BLIND_NS: Final = 5_000_000_000
"""After this long without any of the devices' processes in /proc they are not ours to see."""
MOST_WORKLOADS: Final = 64
"""Workloads of a device with a series of their own."""
SHORT_ID: Final = 12
"""Digits of a container's id that `docker ps` and `crictl ps` show."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a process is and belongs to; processes that agree in all of it are one workload."""

    process_name: str = ""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    """Its name in the pod."""
    home: Membership = field(default_factory=Membership)


@dataclass(frozen=True, slots=True)
class DeviceWorkloads:
    """Who is on a device now."""

    process_count: int
    workloads: Sequence[Workload]
    """All of them, those that have been there for longest first."""


@dataclass(frozen=True, slots=True)
class WorkloadSnapshot:
    """What is known of the workloads."""

    devices: Mapping[str, DeviceWorkloads] = field(default_factory=dict)
    """By uuid; without those whose processes are not known, none unless they are to be listed."""
    pod_joules: Mapping[str, Mapping[Row, float]] = field(default_factory=dict)
    """Energy by uuid and row."""
    kubelet_answer_ns: int | None = None
    """When the kubelet last answered."""
    kubelet_errors: Mapping[str, int] = field(default_factory=dict)
    """By gRPC's name of the reason."""


class HeldDevice(Protocol):
    """What is looked at of a device."""

    @property
    def uuid(self) -> str:
        """Its UUID."""

    @property
    def timeline(self) -> Timeline:
        """Its energy."""

    @property
    def processes(self) -> Sequence[ProcessReading] | None:
        """Who holds it, as last listed; None when the driver does not tell."""

    @property
    def processes_ns(self) -> int | None:
        """When that was; None before the first list and after one that failed."""

    @property
    def health(self) -> HealthReading | None:
        """SM shares of the processes."""


class WorkloadService:
    """Looks at the devices' processes twice a second; everybody else sees its snapshot.

    `devices` is called from a worker thread. Raises ConfigError when the kubelet is to be asked without grpcio.
    """

    def __init__(
        self, config: Workloads, clock: Clock, devices: Callable[[], Sequence[HeldDevice]], proc: Path = Path("/proc")
    ) -> None:
        self._config = config
        self._clock = clock
        self._devices = devices
        self._residents = Residents(proc)
        self._listed_ns: Mapping[str, int | None] = {}
        self._naming = PodNaming(config.pod_resources_socket, config.pod_logs_dir, clock) if config.pods else None
        self._energy: dict[str, DevicePods] = {}
        self._namespaces: Mapping[str, str] = {}
        self._scraped_ns = 0
        self._snapshot = WorkloadSnapshot()
        self._failures = Transitions(_log, time.monotonic_ns)

    def scraped(self) -> WorkloadSnapshot:
        """Return the snapshot for a scrape, which rows of pods that are gone wait for; from any thread."""
        self._scraped_ns = self._clock.now_ns()
        return self._snapshot

    def namespaces(self) -> Mapping[str, str]:
        """Return those of the pods on the devices, by pod uid and by container id; from any thread."""
        return self._namespaces

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # Not on the event loop: the kubelet may take its time.
            await asyncio.to_thread(self._try_look)

    def _try_look(self) -> None:
        try:
            self.look()
        except Exception:
            self._failures.failed(
                "look", "the workloads on the GPUs are not looked at; please report this", exc_info=True
            )
            return
        self._failures.recovered("look", "the workloads on the GPUs are looked at again")

    def look(self) -> None:
        """Take in what the devices show now and replace the snapshot; may wait a second for the kubelet."""
        devices, now_ns = self._devices(), self._clock.now_ns()
        listed_ns = {device.uuid: device.processes_ns for device in devices}
        if listed_ns != self._listed_ns:
            self._listed_ns = listed_ns
            self._residents.update({each.pid for device in devices for each in device.processes or ()}, now_ns)
            self._tell_if_blind(now_ns)
        if self._naming is not None:
            self._naming.update(self._live_pods(devices), listed_ns.keys())
            names = self._naming.names
            self._namespaces = {
                key: name.namespace
                for one in self._residents.by_pid.values()
                for key in (one.home.pod_uid, one.home.container_id)
                if key and (name := names[one.home.pod_uid])
            }
            for device in devices:
                self._account(device, now_ns)
        self._snapshot = WorkloadSnapshot(
            devices={device.uuid: self._on(device) for device in devices if self._lists(device)},
            pod_joules={uuid: pods.joules for uuid, pods in self._energy.items()},
            kubelet_answer_ns=self._naming.answered_ns if self._naming else None,
            kubelet_errors=dict(self._naming.errors) if self._naming else {},
        )

    def _tell_if_blind(self, now_ns: int) -> None:
        residents = self._residents.by_pid.values()
        if any(one.process for one in residents):
            self._failures.recovered("proc", "the processes on the GPUs are to be seen")
        elif any(now_ns - one.seen_ns >= BLIND_NS for one in residents):
            self._failures.failed(
                "proc",
                "none of the processes on the GPUs is to be seen in /proc, so nobody knows what they are: give "
                "jouletrace the host's process ids (hostPID: true in Kubernetes, --pid=host in Docker and Podman)",
            )

    def _live_pods(self, devices: Sequence[HeldDevice]) -> list[LivePod]:
        """Return the pods of the residents."""
        pods: dict[str, dict[str, set[str]]] = {}
        seen_ns: dict[str, int] = {}
        for device in devices:
            for process in device.processes or ():
                resident = self._residents.by_pid[process.pid]
                uid = resident.home.pod_uid
                if uid:
                    pods.setdefault(uid, {}).setdefault(resident.container, set()).add(device.uuid)
                    seen_ns[uid] = max(resident.seen_ns, seen_ns.get(uid, 0))
        return [
            LivePod(uid, seen_ns[uid], {name: frozenset(uuids) for name, uuids in containers.items()})
            for uid, containers in pods.items()
        ]

    def _workload(self, resident: Resident, device: HeldDevice) -> Workload:
        names = self._naming.names if self._naming else None
        uid, container = resident.home.pod_uid, resident.container
        name = names[uid] if names else None
        if names and name and not container:
            container = names.container(uid, device.uuid, self._listed_ns.keys())
        namespace, pod = name or ("", "")
        return Workload(resident.name, namespace, pod, container, resident.home)

    def _lists(self, device: HeldDevice) -> bool:
        return self._config.processes and device.processes is not None

    def _on(self, device: HeldDevice) -> DeviceWorkloads:
        residents = [self._residents.by_pid[process.pid] for process in device.processes or ()]
        residents.sort(key=lambda one: one.seen_ns)
        workloads = dict.fromkeys(self._workload(one, device) for one in residents)
        return DeviceWorkloads(len(residents), tuple(workloads))

    def _account(self, device: HeldDevice, now_ns: int) -> None:
        """Give a device's energy to the pods on it."""
        pods = self._energy.setdefault(device.uuid, DevicePods())
        rows = {
            process.pid: self._row(self._workload(self._residents.by_pid[process.pid], device))
            for process in device.processes or ()
        }
        # Without a list, after a failed read or where the driver has none, nobody is known to hold it.
        pods.hold(now_ns if device.processes_ns is None else device.processes_ns, rows)
        if device.health is not None:
            pods.share(device.health.t_ns, device.health.sm_ratios)
        pods.settle(device.timeline, now_ns)
        pods.drop_ended(now_ns, self._scraped_ns)

    @staticmethod
    def _row(workload: Workload) -> Row:
        return (workload.namespace, workload.pod, workload.container) if workload.pod else OUTSIDE
