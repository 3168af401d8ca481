"""Which container, pod, systemd unit or SLURM job a process belongs to, from /proc/PID/cgroup (cgroups(7))."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 64 << 10
"""A longer file is not read further; a line is some 200 bytes and there are at most a dozen."""

_CONTAINER: Final = re.compile(r"(?:^|[/:]|(?<!-conmon)-)([0-9a-f]{64})(?:\.scope)?(?=[/:]|$)")
"""Docker, containerd, CRI-O and Podman name containers by 64 hexadecimal digits; `crio-conmon-` is one's monitor."""
_POD: Final = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?=[./:]|$)")
"""The kubelet's name of a pod's group; systemd's slices have `_` for `-`. A static pod's uid is 32 digits."""
_JOB: Final = re.compile(r"(?:/[^/]*slurm[^/]*(?:/[^/]+)*?)/job_([0-9]{1,12})(?=/|$)")
"""`slurm_NODE/uid_U/job_J/step_S` in cgroup v1, `slurmstepd.scope/job_J/step_S` in v2; `NODE_slurmstepd.scope` where a
machine plays several nodes."""
_UNIT: Final = re.compile(r"/([^/]+\.service)(?=/|$)")
_ESCAPE: Final = re.compile(rb"\\x([0-9a-f]{2})")
"""A byte; systemd.unit(5), string escaping."""


@dataclass(frozen=True, slots=True)
class Membership:
    """What a process belongs to; empty for what it is not in."""

    container_id: str = ""
    pod_uid: str = ""
    """With dashes, as the API has it."""
    unit: str = ""
    """The innermost systemd service."""
    slurm_job: str = ""


def membership(text: str) -> Membership:
    """Return what the content of /proc/PID/cgroup says.

    In a private cgroup namespace a path may begin with `/../..`; names are found anywhere in it. A pod is the
    outermost one, and its container the first below: what runs inside may make groups of its own with any name. Of
    containers in containers outside of pods the innermost counts.
    """
    found = {"container_id": "", "pod_uid": "", "unit": "", "slurm_job": ""}
    for line in text.splitlines():
        path = line.partition(":")[2].partition(":")[2]
        pod = _POD.search(path)
        container = None if pod is None else _CONTAINER.search(path, pod.end())
        names = {
            "container_id": _last(_CONTAINER, path) if pod is None else container[1] if container else "",
            "pod_uid": pod[1].replace("_", "-") if pod else "",
            "unit": _unescaped(_last(_UNIT, path)),
            "slurm_job": _last(_JOB, path),
        }
        for key, name in names.items():
            found[key] = found[key] or name
    return Membership(**found)


def membership_of(pid: int, proc: Path = Path("/proc")) -> Membership:
    """Return what a process belongs to; nothing when it is gone or cannot be read."""
    try:
        with (proc / str(pid) / "cgroup").open("rb") as file:
            return membership(file.read(MOST_BYTES).decode(errors="replace"))
    except OSError:
        return Membership()


def _unescaped(unit: str) -> str:
    return _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), unit.encode()).decode(errors="replace")


def _last(pattern: re.Pattern[str], path: str) -> str:
    matches: list[str] = pattern.findall(path)
    return matches[-1] if matches else ""
