"""The daemon on a real GPU: what it can measure, what it costs, how it agrees, what it does to the workload.

Run on a machine with one NVIDIA GPU and torch: `python -m tests.gpu.daemon_on_gpu OUTDIR`. Writes doctor.txt,
metrics.txt, a recording and result.json into OUTDIR and prints the tables of docs/accuracy.md.
"""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pynvml

ROUNDS = 3
OFF_SECONDS = 12.0
ON_SECONDS = 20.0
POLL_SECONDS = 12.0
SCRAPE_SECONDS = 5.0


def jouletrace(*arguments: str) -> list[str]:
    """Return the command line of a jouletrace command."""
    return [sys.executable, "-m", "jouletrace", *arguments]


class Loop:
    """The decode loop in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.decode_loop"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def run(self, seconds: float) -> dict[str, float]:
        """Run steps for a while; return their times' summary."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        result: dict[str, float] = json.loads(self._process.stdout.readline())
        return result

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def total(page: str, metric: str) -> float:
    """Return the sum of a metric's series."""
    return sum(float(value) for value in re.findall(rf"^{metric}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE))


class Daemon:
    """A daemon that is scraped meanwhile."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            jouletrace("run", "--web.listen-address=127.0.0.1:0", f"--state-dir={folder / 'state'}", *options),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        self.url = ""
        for line in self._process.stderr:
            event = json.loads(line)
            if "url" in event:
                self.url = event["url"].rstrip("/")
                break
        self.log: list[str] = []
        threading.Thread(target=lambda: self.log.extend(self._process.stderr or ()), daemon=True).start()
        self.process = psutil.Process(self._process.pid)
        while "ready" not in self._get("/-/ready"):
            time.sleep(0.02)
        self.first_sample_seconds = time.monotonic() - self.started
        self.scrape_seconds: list[float] = []
        self._stop = threading.Event()
        threading.Thread(target=self._scrape_regularly, daemon=True).start()

    def _get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def _scrape_regularly(self) -> None:
        while not self._stop.wait(SCRAPE_SECONDS):
            before = time.perf_counter()
            self.page()
            self.scrape_seconds.append(time.perf_counter() - before)

    def page(self) -> str:
        """Return /metrics."""
        return self._get("/metrics")

    def cpu_seconds(self) -> float:
        """Return user and system time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def close(self) -> int:
        """Stop it; return the exit code."""
        self._stop.set()
        self._process.terminate()
        return self._process.wait(20)


class KilohertzPoller:
    """What many tools do: POWER_INSTANT through pynvml's wrapper, a thousand times a second."""

    CODE = (
        "import pynvml,time\npynvml.nvmlInit(); h=pynvml.nvmlDeviceGetHandleByIndex(0); t=time.perf_counter()\n"
        "while True:\n pynvml.nvmlDeviceGetFieldValues(h,[186]); t+=0.001; time.sleep(max(0,t-time.perf_counter()))\n"
    )

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", self.CODE])
        self.process = psutil.Process(self._process.pid)
        time.sleep(1.0)

    def cpu_seconds(self) -> float:
        """Return user and system time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(10)


def main() -> None:
    """Run everything and print."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {}
    doctor = subprocess.run(jouletrace("doctor"), capture_output=True, text=True, timeout=60, check=False)
    (folder / "doctor.txt").write_text(doctor.stdout + doctor.stderr)
    print(doctor.stdout + doctor.stderr, flush=True)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    loop = Loop()
    rows: dict[str, list[dict[str, float]]] = {"off": [], "on": [], "1 kHz polling": []}
    costs: dict[str, list[float]] = {"on": [], "1 kHz polling": []}
    agreement: list[float] = []
    for round_number in range(ROUNDS):
        rows["off"].append(loop.run(OFF_SECONDS))
        daemon = Daemon(folder)
        # Two looks at our total and the counter, each at the same moment of the same clock.
        time.sleep(1.0)
        cpu, at = daemon.cpu_seconds(), time.monotonic()
        rows["on"].append(loop.run(ON_SECONDS))
        costs["on"].append((daemon.cpu_seconds() - cpu) / (time.monotonic() - at))
        page = daemon.page()
        ratio = total(page, "jouletrace_energy_agreement_ratio")
        agreement.append(ratio)
        if round_number == ROUNDS - 1:
            (folder / "metrics.txt").write_text(page)
            results["resident_mib"] = daemon.process.memory_info().rss / 2**20
            results["first_sample_seconds"] = daemon.first_sample_seconds
            results["scrape_ms"] = [round(s * 1e3, 2) for s in daemon.scrape_seconds]
        results["exit_code"] = daemon.close()
        results["log"] = daemon.log
        poller = KilohertzPoller()
        cpu, at = poller.cpu_seconds(), time.monotonic()
        rows["1 kHz polling"].append(loop.run(POLL_SECONDS))
        costs["1 kHz polling"].append((poller.cpu_seconds() - cpu) / (time.monotonic() - at))
        poller.close()
    # One minute of mixed load under one daemon: total against counter.
    daemon = Daemon(folder)
    time.sleep(2.0)
    record = subprocess.Popen(jouletrace("record", "-o", str(folder / "recording.json.gz"), "--seconds=60"))
    begin = time.monotonic()
    cpu = daemon.cpu_seconds()
    while time.monotonic() - begin < 58:
        loop.run(4.0)
        time.sleep(1.5)
        loop.run(0.3)
        time.sleep(0.3)
    seconds = time.monotonic() - begin
    results["mixed_cpu"] = (daemon.cpu_seconds() - cpu) / seconds
    time.sleep(12.0)
    page = daemon.page()
    results["mixed_agreement"] = total(page, "jouletrace_energy_agreement_ratio")
    results["energy_joules"] = total(page, "jouletrace_gpu_energy_joules_total")
    results["gap_seconds"] = total(page, "jouletrace_energy_gap_seconds_total")
    (folder / "metrics-mixed.txt").write_text(page)
    record.wait(30)
    daemon.close()
    loop.close()
    measured = subprocess.run(
        jouletrace("measure", "--json", "--", "sleep", "3"), capture_output=True, text=True, timeout=60, check=False
    )
    (folder / "measure.json").write_text(measured.stdout + measured.stderr)
    results |= {"rows": rows, "costs": costs, "agreement": agreement}
    results["power_watts_now"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
    (folder / "result.json").write_text(json.dumps(results, indent=1))
    for name, runs in rows.items():
        for key in ("mean_ms", "p50_ms", "p99_ms", "p99.9_ms"):
            print(name, key, [round(run[key], 4) for run in runs])
    print(json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
