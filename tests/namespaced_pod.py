"""A process as the kubelet starts one: in the cgroup of a pod, with a process and a mount namespace of its own."""

import contextlib
import os
import secrets
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Self

import pytest

PROGRAM = "jt-decode-loop"


class NamespacedPod:
    """A context manager; needs root and a cgroup hierarchy that can be written, and skips the test without."""

    def __init__(self, folder: Path, container: str) -> None:
        self.uid = str(uuid.uuid4())
        self.container_id = secrets.token_hex(32)
        self.container = container
        self.pid = 0
        """As the host counts; its own namespace says 1."""
        self._folder = folder
        self._base = _writable_hierarchy() / f"jouletrace-{secrets.token_hex(4)}"
        self._group = self._base / "kubepods" / "burstable" / f"pod{self.uid}" / self.container_id
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        own_file = self._folder / "pods" / self.uid / "containers" / self.container / secrets.token_hex(4)
        own_file.parent.mkdir(parents=True)
        own_file.touch()
        message = self._folder / f"termination-log-{self.uid}"
        message.touch()
        program = self._folder / PROGRAM
        with contextlib.suppress(FileExistsError):
            program.symlink_to("/bin/sleep")
        try:
            self._group.mkdir(parents=True)
        except OSError as error:
            pytest.skip(f"no cgroup can be made here: {error}")
        script = f"mount --bind {own_file} {message} && exec {program} 300"
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + 5
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while time.monotonic() < deadline and not self.pid:
            found = children.read_text().split()
            # It has mounted its file once it has become the program.
            if found and Path(f"/proc/{found[0]}/comm").read_text().strip() == PROGRAM:
                self.pid = int(found[0])
            elif self._process.poll() is not None:
                break
            time.sleep(0.01)
        if not self.pid:
            self.__exit__()
            pytest.skip("no namespaces can be made here: `unshare --mount --pid` fails")
        (self._group / "cgroup.procs").write_text(str(self.pid))
        return self

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait(5)
            self._process = None

    def __exit__(self, *_: object) -> None:
        self.end()
        group = self._group
        while group != self._base.parent:
            for _attempt in range(100):
                try:
                    group.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    # The kernel lets go of an ended process a moment later.
                    time.sleep(0.01)
                    continue
                break
            group = group.parent


def _writable_hierarchy() -> Path:
    """Return the mount point of a cgroup hierarchy in which groups can be made."""
    if os.geteuid() != 0:
        pytest.skip("making cgroups and namespaces needs root")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        kind = words[words.index("-") + 1]
        # cpuset's groups take no process before they are set up.
        if kind in ("cgroup", "cgroup2") and not words[4].endswith("cpuset") and os.access(words[4], os.W_OK):
            return Path(words[4])
    return pytest.skip("no cgroup hierarchy is mounted writable here")
