"""Pod names and pod energy on a real GPU: decode loops in pods' control groups, beside the daemon.

Run as root on a machine with one NVIDIA GPU, torch and control groups that can be made:
`python -m tests.gpu.pods_on_gpu OUTDIR`. There is no kubelet: the names come from log
folders such as it makes.
Prints how long each pod went without its name, what each row got, and how the rows add up; writes the same to
OUTDIR/result.json.
"""

import json
import secrets
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pynvml
from prometheus_client.parser import text_string_to_metric_families

from tests.gpu.daemon_on_gpu import Daemon

ALONE_SECONDS = 20.0
TOGETHER_SECONDS = 45.0
DUTY = (0.3, 1.0)
"""The second pod's loop runs for the first of these seconds in each of the second."""
AFTER_SECONDS = 100.0
POLL_SECONDS = 0.02

Row = tuple[str, str]
"""Namespace and pod; the name of the container comes from a mount that only the kubelet makes."""


def hierarchy() -> Path:
    """Return where control groups can be made."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[words.index("-") + 1] in ("cgroup", "cgroup2") and not words[4].endswith("cpuset"):
            probe = Path(words[4]) / f"jouletrace-{secrets.token_hex(4)}"
            try:
                probe.mkdir()
            except OSError:
                continue
            return probe
    raise SystemExit("no control group can be made here")


class Pod:
    """A decode loop in a pod's control group, with the pod's log folder."""

    def __init__(self, base: Path, logs: Path, row: Row) -> None:
        self.row = row
        namespace, name = row
        uid = str(uuid.uuid4())
        (logs / f"{namespace}_{name}_{uid}").mkdir(parents=True)
        group = base / "kubepods" / f"pod{uid}" / secrets.token_hex(32)
        group.mkdir(parents=True)
        self._process = subprocess.Popen(
            ["sh", "-c", f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m tests.gpu.decode_loop"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def ready(self) -> None:
        """Wait until the model is loaded."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def run(self, seconds: float) -> None:
        """Run steps for a while."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(20)


class Watch:
    """Who holds the GPU by NVML, and whom the daemon names; with times."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.held: dict[int, float] = {}
        self.named: dict[Row, float] = {}
        self.unnamed: dict[Row, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            now = time.monotonic()
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._device):
                self.held.setdefault(process.pid, now)
            named = set(rows(self._daemon, "jouletrace_gpu_process_info"))
            now = time.monotonic()
            for row in named:
                self.named.setdefault(row, now)
            for row in self.named.keys() - named:
                self.unnamed.setdefault(row, now)

    def close(self) -> None:
        """End the watch."""
        self._over.set()
        self._thread.join()


def rows(daemon: Daemon, metric: str) -> dict[Row, float]:
    """Return a metric's values by pod."""
    found: dict[Row, float] = {}
    for family in text_string_to_metric_families(daemon.page()):
        for sample in family.samples:
            if sample.name == metric:
                labels = sample.labels
                row = (labels.get("namespace", ""), labels.get("pod", ""))
                found[row] = found.get(row, 0.0) + sample.value
    return found


def reading(daemon: Daemon) -> dict[str, Any]:
    """Return the pods' joules and the device's."""
    pods = rows(daemon, "jouletrace_pod_energy_joules_total")
    device = sum(rows(daemon, "jouletrace_gpu_energy_joules_total").values())
    return {"pods": {"/".join(row): joules for row, joules in pods.items()}, "device": device, "t": time.monotonic()}


def main() -> None:
    """Run the phases and print what came of them."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    pynvml.nvmlInit()
    base, logs = hierarchy(), out / "logs"
    logs.mkdir()
    daemon = Daemon(
        out,
        "--workloads.processes",
        "--workloads.pods",
        "--workloads.pod-resources-socket=",
        f"--workloads.pod-logs-dir={logs}",
        "--no-engines.discover",
    )
    watch = Watch(daemon)
    marks = {"start": reading(daemon)}
    large = Pod(base, logs, ("team-a", "llm-0"))
    large.ready()
    marks["alone"] = reading(daemon)
    large.run(ALONE_SECONDS)
    marks["alone_end"] = reading(daemon)
    small = Pod(base, logs, ("team-b", "batch-7"))
    small.ready()
    time.sleep(15)
    marks["together"] = reading(daemon)
    busy = threading.Thread(target=large.run, args=(TOGETHER_SECONDS,))
    busy.start()
    until = time.monotonic() + TOGETHER_SECONDS
    while time.monotonic() < until:
        small.run(DUTY[0])
        time.sleep(DUTY[1] - DUTY[0])
    busy.join()
    marks["together_end"] = reading(daemon)
    large.end()
    ended = {large.row: time.monotonic()}
    time.sleep(15)
    small.end()
    ended[small.row] = time.monotonic()
    gone: dict[str, float] = {}
    last: dict[str, list[float]] = {}
    deadline = time.monotonic() + AFTER_SECONDS
    while time.monotonic() < deadline:
        now = reading(daemon)
        for row, ended_at in ended.items():
            name = "/".join(row)
            if name in now["pods"]:
                seen = last.setdefault(name, [])
                if not seen or seen[-1] != now["pods"][name]:
                    seen.append(now["pods"][name])
            elif name not in gone:
                gone[name] = now["t"] - ended_at
        time.sleep(0.5)
    marks["end"] = reading(daemon)
    watch.close()
    result = {
        "seconds_to_name": {
            "/".join(pod.row): watch.named[pod.row] - watch.held[pod.pid]
            for pod in (large, small)
            if pod.row in watch.named
        },
        "seconds_named_after_end": {
            "/".join(row): watch.unnamed[row] - ended[row] for row in ended if row in watch.unnamed
        },
        "seconds_until_row_is_gone": gone,
        "values_after_end": last,
        "marks": marks,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    daemon.close()
    for group in sorted(base.rglob("*"), reverse=True):
        if group.is_dir():
            group.rmdir()
    base.rmdir()


if __name__ == "__main__":
    main()
