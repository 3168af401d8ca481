"""The processes on the devices and what each of them is, read from /proc once for each."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jouletrace.workloads.cgroups import Membership, membership_of
from jouletrace.workloads.mounts import container_name_of
from jouletrace.workloads.processes import Process, process_of


@dataclass(frozen=True, slots=True)
class Resident:
    """A process on a device, as it was when it was first seen there."""

    seen_ns: int
    process: Process | None = None
    """None for one that /proc does not show."""
    name: str = ""
    home: Membership = field(default_factory=Membership)
    container: str = ""
    """The name of its container in its pod."""


class Residents:
    """The processes on all devices. A pid that another process has taken over is a new one."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self.by_pid: Mapping[int, Resident] = {}

    def update(self, pids: Collection[int], now_ns: int) -> None:
        """Take in who is there now."""
        self.by_pid = {pid: self._resident(pid, now_ns) for pid in pids}

    def _resident(self, pid: int, now_ns: int) -> Resident:
        known, found = self.by_pid.get(pid), process_of(pid, self._proc)
        if found is None:
            # It has ended since the driver listed it, or it is not in our process namespace.
            return known or Resident(now_ns)
        process, name = found
        if known is not None and known.process == process:
            return known
        home = membership_of(pid, self._proc)
        container = container_name_of(pid, home.pod_uid, self._proc) if home.pod_uid else ""
        return Resident(now_ns, process, name, home, container)
