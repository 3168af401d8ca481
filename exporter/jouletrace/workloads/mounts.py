"""A container's name in its pod, from /proc/PID/mountinfo (proc_pid_mountinfo(5)), which everybody may read."""

import re
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 256 << 10
"""A longer file is not read further; a container has some 50 mounts of 150 bytes."""

_OWN_FILE: Final = re.compile(
    r"/pods/([0-9a-f-]{32,36})/containers/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)/[0-9a-f]{1,16}"
)
"""The kubelet mounts `/var/lib/kubelet/pods/UID/containers/NAME/HASH` into each container, at the container's
`terminationMessagePath`, usually `/dev/termination-log`. A container's name is a DNS label (RFC 1123)."""


def container_name(text: str, pod_uid: str) -> str:
    """Return the name that a mountinfo gives its container in a pod; empty for none or more than one.

    Mounts that name another pod do not count: a process may mount what it likes inside its container.
    """
    found = set()
    for line in text.splitlines():
        words = line.split(" ", 5)
        # The fourth field is the mounted path in its file system, which may begin below /var/lib/kubelet.
        match = _OWN_FILE.search(words[3]) if len(words) > 4 else None
        if match and match.end() == len(words[3]) and match[1] == pod_uid:
            found.add(match[2])
    return found.pop() if len(found) == 1 else ""


def container_name_of(pid: int, pod_uid: str, proc: Path = Path("/proc")) -> str:
    """Return the name of a process's container in its pod; empty when it is gone or nothing tells."""
    try:
        with (proc / str(pid) / "mountinfo").open("rb") as file:
            return container_name(file.read(MOST_BYTES).decode(errors="replace"), pod_uid)
    except OSError:
        return ""
