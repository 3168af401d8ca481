"""What the whole daemon costs: CPU, memory, scrape latency and start, on simulated H200s.

The shim's calls burn the CPU time that an H200's driver was seen to burn (spaced calls, nvml.h functions), so
"with driver" is what an operator would see; the same run with free calls is our own code alone. CPU is user and
system time of the process over wall time, as a share of one core.

Run: `make benchmark`, or `python -m tests.benchmarks.daemon_cost [--seconds N]`.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.nvml_shim import Device, Latency, Scenario, Square, build, environment

SETTLE_SECONDS = 35.0
"""The account settles each second for the first 30 s, then less often while no record comes."""
SCRAPES = 200
SCRAPE_PAUSE_SECONDS = 0.1
START_LIMIT_SECONDS = 20.0


@dataclass(frozen=True)
class Cost:
    """One run's figures; CPU as a share of one core, times in seconds, memory in MiB."""

    cpu: float
    sampler_cpu: float
    resident_mib: float
    first_sample_seconds: float
    scrape_p50: float
    scrape_p99: float
    series: int
    rejected: float
    gaps: float


@contextlib.contextmanager
def daemon(devices: int, *, driver_costs: bool, folder: Path) -> Iterator[tuple[psutil.Process, str, float]]:
    """Run a daemon on simulated H200s; yield its process, its URL and when it was started (monotonic)."""
    activity = {"graphics_util": "95/0", "sm_util": "90/0", "any_tensor_util": "40/0", "dram_bw_util": "60/0"}
    scenario = Scenario(
        devices=[
            Device("h200", Square(120, 680, period_s=0.2 + 0.1 * i), gpm=activity, uuid=f"GPU-bench-{i}")
            for i in range(devices)
        ],
        latencies=[Latency.h200()] if driver_costs else [],
    )
    variables = environment(build(), scenario.write(folder / "scenario"))
    started = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jouletrace",
            "run",
            "--web.listen-address=127.0.0.1:0",
            f"--state-dir={folder / 'state'}",
            "--log.format=json",
        ],
        env=variables,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            event = json.loads(line)
            if "url" in event:
                url = event["url"].rstrip("/")
                break
        # The rest of the log must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield psutil.Process(process.pid), url, started
    finally:
        process.terminate()
        process.wait(10)


def fetch(url: str) -> str:
    """Return a page, as a scraper would ask for it."""
    request = urllib.request.Request(url, headers={"Accept": "text/plain"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def total(page: str, metric: str) -> float:
    """Return the sum of a metric's series."""
    return sum(float(value) for value in re.findall(rf"^{metric}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE))


def cpu_seconds(process: psutil.Process) -> float:
    """Return user and system time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def run(devices: int, *, driver_costs: bool, seconds: float) -> Cost:
    """Measure one configuration."""
    with (
        tempfile.TemporaryDirectory() as folder,
        daemon(devices, driver_costs=driver_costs, folder=Path(folder)) as (process, url, started),
    ):
        while time.monotonic() - started < START_LIMIT_SECONDS:
            with contextlib.suppress(OSError):
                if fetch(f"{url}/-/ready"):
                    break
            time.sleep(0.02)
        first_sample = time.monotonic() - started
        time.sleep(SETTLE_SECONDS)
        page = fetch(f"{url}/metrics")
        cpu, sampler, at = cpu_seconds(process), total(page, "jouletrace_sampler_cpu_seconds_total"), time.monotonic()
        # Prometheus' own habit: a scrape every 15 s.
        while time.monotonic() - at < seconds:
            time.sleep(min(15.0, seconds))
            page = fetch(f"{url}/metrics")
        wall = time.monotonic() - at
        cpu_share = (cpu_seconds(process) - cpu) / wall
        sampler_share = (total(page, "jouletrace_sampler_cpu_seconds_total") - sampler) / wall
        latencies = []
        for _ in range(SCRAPES):
            before = time.perf_counter()
            page = fetch(f"{url}/metrics")
            latencies.append(time.perf_counter() - before)
            time.sleep(SCRAPE_PAUSE_SECONDS)
        cuts = statistics.quantiles(latencies, n=100)
        return Cost(
            cpu=cpu_share,
            sampler_cpu=sampler_share,
            resident_mib=process.memory_info().rss / 2**20,
            first_sample_seconds=first_sample,
            scrape_p50=cuts[49],
            scrape_p99=cuts[98],
            series=sum(1 for line in page.splitlines() if not line.startswith("#")),
            rejected=total(page, "jouletrace_rejected_samples_total"),
            gaps=total(page, "jouletrace_energy_gap_seconds_total"),
        )


def main() -> None:
    """Run the configurations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45.0, help="length of each CPU measurement")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        "| devices | driver calls | CPU of one core | sampler thread | resident | first sample | scrape p50 | p99 |"
        " series | gaps |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for devices, driver_costs in ((8, True), (8, False), (1, True), (1, False)):
        cost = run(devices, driver_costs=driver_costs, seconds=options.seconds)
        print(
            f"| {devices} | {'as on an H200' if driver_costs else 'free'} | {cost.cpu:.2%} | {cost.sampler_cpu:.2%} |"
            f" {cost.resident_mib:.0f} MiB | {cost.first_sample_seconds:.2f} s | {cost.scrape_p50 * 1e3:.1f} ms |"
            f" {cost.scrape_p99 * 1e3:.1f} ms | {cost.series} | {cost.gaps:.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
