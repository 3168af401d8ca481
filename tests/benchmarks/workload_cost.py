"""What naming pods costs and how soon they are named: 8 simulated H200s, 16 real processes in pods' cgroups, a kubelet.

Pods come one by one while the page is read every 50 ms; the delay of a name is from the moment at which the driver
shows the process. CPU is user and system time of the whole daemon, driver calls as on an H200, with workloads switched
on and off in turn.

Run as root: `python -m tests.benchmarks.workload_cost [--seconds N]`.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.benchmarks.daemon_cost import SETTLE_SECONDS, cpu_seconds
from tests.daemon_process import DaemonProcess, simulated
from tests.kubelet_server import KubeletServer, Pod
from tests.namespaced_pod import NamespacedPod
from tests.nvml_shim import Device, Latency, Process, Scenario, Square, build

GPUS, PODS = 8, 16
FIRST_S, LAST_S = 6.0, 30.0
"""Between these times after the start the pods come."""
NS = 1_000_000_000


def uuid(gpu: int) -> str:
    """Return the UUID of a GPU, two of whose time slices two pods hold."""
    return f"GPU-00000000-0000-4000-8000-{gpu:012d}"


def run(folder: Path, pods: Sequence[NamespacedPod], seconds: float, *, on: bool) -> tuple[float, list[float]]:
    """Return the share of a core that the daemon takes with all pods there, and the delays of their names, seconds."""
    folder.mkdir()
    starts_s = sorted(random.Random(1).uniform(FIRST_S, LAST_S) for _ in pods)
    devices = [
        Device(
            power=Square(120, 680, period_s=0.2 + 0.1 * gpu),
            uuid=uuid(gpu),
            gpm={"graphics_util": "95/0", "sm_util": "90/0", "any_tensor_util": "40/0", "dram_bw_util": "60/0"},
            processes=[
                Process(pods[number].pid, 20_000, from_s=starts_s[number], sm_percent=40)
                for number in range(gpu, PODS, GPUS)
            ],
        )
        for gpu in range(GPUS)
    ]
    kubelet = KubeletServer(
        folder / "kubelet.sock",
        *(
            Pod("team", f"pod-{number}", {"engine": [f"{uuid(number % GPUS)}::{number // GPUS}"]})
            for number in range(PODS)
        ),
    )
    logs = folder / "logs"
    for number, pod in enumerate(pods):
        (logs / f"team_pod-{number}_{pod.uid}").mkdir(parents=True)
    options = ["--workloads.processes", "--workloads.pods"] if on else []
    options += ["--workloads.pod-resources-socket", str(kubelet.socket), "--workloads.pod-logs-dir", str(logs)]
    epoch_ns = time.time_ns()
    scenario = Scenario(devices, latencies=[Latency.h200()], epoch_ns=epoch_ns)
    delays: dict[int, float] = {}
    with kubelet, DaemonProcess(folder, *options, variables=simulated(build(), folder, scenario)) as daemon:
        daemon.until("readiness", daemon.ready, 20)
        while (now_s := (time.time_ns() - epoch_ns) / NS) < SETTLE_SECONDS:
            if on:
                text = daemon.get("/metrics")[1]
                now_s = (time.time_ns() - epoch_ns) / NS
                for number in range(PODS):
                    if number not in delays and f'pod="pod-{number}"' in text:
                        delays[number] = now_s - starts_s[number]
            time.sleep(0.05)
        process = psutil.Process(daemon.process.pid)
        before, at = cpu_seconds(process), time.monotonic()
        while time.monotonic() - at < seconds:
            time.sleep(min(15.0, seconds))
            daemon.get("/metrics")
        share = (cpu_seconds(process) - before) / (time.monotonic() - at)
        daemon.assert_calm()
    return share, list(delays.values())


def main() -> None:
    """Measure both in turn and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each CPU measurement")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    shares: dict[bool, list[float]] = {False: [], True: []}
    delays: list[float] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pods = [stack.enter_context(NamespacedPod(Path(folder), "engine")) for _ in range(PODS)]
        for number in range(options.rounds):
            for on in (False, True):
                share, found = run(Path(folder, f"{number}-{on}"), pods, options.seconds, on=on)
                shares[on].append(share)
                delays += found
                print(f"workloads {'on' if on else 'off'}: {share:.2%} of a core, {len(found)} pods named", flush=True)
    print(f"difference: {statistics.mean(shares[True]) - statistics.mean(shares[False]):.2%} of a core")
    print(f"delay of {len(delays)} names: median {statistics.median(delays):.2f} s, longest {max(delays):.2f} s")


if __name__ == "__main__":
    main()
