"""A real Prometheus scrapes the real daemon, which replays the recording of a real H200."""

import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

ENERGY = "jouletrace_gpu_energy_joules_total"
AGE = "jouletrace_sample_age_seconds"
SCRAPES = 28
"""One a second; rate() over 20 s then has several different windows."""

CONFIGURATION = """\
global: {{scrape_interval: 1s, scrape_timeout: 900ms}}
scrape_configs:
  - job_name: jouletrace
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        body: bytes = response.read()
        return body


def wait_for(what: Callable[[], Any], seconds: float, running: subprocess.Popen[bytes], log: Path) -> Any:
    """Return the first true answer; fail with the program's log when there is none or the program ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running.poll() is None:
        try:
            answer = what()
        except (urllib.error.URLError, ConnectionError):
            answer = None
        if answer:
            return answer
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s in vain; the log says:\n{log.read_text(errors='replace')[-4000:]}")


@contextmanager
def program(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(15)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            raise


class Recorded:
    """The recording's energy as a function of its own time, from the file alone."""

    def __init__(self) -> None:
        file = resources.files("jouletrace") / "demo" / "recording.json.gz"
        rows = json.loads(gzip.decompress(file.read_bytes()))["streams"]["power_ring_20ms"]["rows"]
        ring = np.array([row for row in rows if row[1] is not None], np.float64)
        self.seconds: NDArray[np.float64] = (ring[:, 0] - ring[0, 0]) / 1e9
        steps = np.diff(self.seconds) * ring[1:, 1] / 1e3
        self.joules: NDArray[np.float64] = np.concatenate(([0.0], np.cumsum(steps)))

    def energy(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.interp(seconds, self.seconds, self.joules), np.float64)


@dataclass(frozen=True)
class Scrapes:
    """What Prometheus stored: scrape times, the end of the energy samples it saw, and their joules."""

    times: NDArray[np.float64]
    energy_ends: NDArray[np.float64]
    joules: NDArray[np.float64]


class Api:
    """The query API of a Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        answer = json.loads(fetch(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success"
        return answer["data"]

    def series(self, query: str) -> list[list[Any]]:
        """Return the (time, value) pairs of the only series that a query finds, if there is one."""
        found = self.get("query", query=query)["result"]
        assert len(found) <= 1
        return found[0]["values"] if found else []

    def value(self, query: str, **parameters: str) -> float:
        """Return the value of the only series that a query finds."""
        [found] = self.get("query", query=query, **parameters)["result"]
        return float(found["value"][1])

    def scrapes(self) -> Scrapes:
        joules = {float(t): float(value) for t, value in self.series(f"{ENERGY}[5m]")}
        ages = {float(t): float(value) for t, value in self.series(f"{AGE}[5m]")}
        times = np.array(sorted(set(joules) & set(ages)))
        ends = times - np.array([ages[t] for t in times])
        return Scrapes(times, ends, np.array([joules[t] for t in times]))


def recorded_joules(recorded: Recorded, scrapes: Scrapes, process_start: float) -> NDArray[np.float64]:
    """Return what the recording says was used between the first scrape's sample and each scrape's sample.

    When exactly the replay began is the daemon's affair, so this one number is fitted; within 5 s after the
    start of the process, at 10 ms.
    """

    def truth(start: float) -> NDArray[np.float64]:
        joules: NDArray[np.float64] = recorded.energy(scrapes.energy_ends - start)
        joules -= joules[0]
        return joules

    measured = scrapes.joules - scrapes.joules[0]
    candidates = process_start + np.arange(-5.0, 5.0, 0.01)
    errors = [float(np.sum((truth(start) - measured) ** 2)) for start in candidates]
    best = int(np.argmin(errors))
    assert 0 < best < len(candidates) - 1, "no start of the replay fits what was scraped"
    return truth(float(candidates[best]))


def test_rate_of_the_joules_is_the_recorded_power(tmp_path: Path) -> None:
    port, prometheus_port = free_port(), free_port()
    daemon_log, prometheus_log = tmp_path / "daemon.log", tmp_path / "prometheus.log"
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(CONFIGURATION.format(port=port))
    process_start = time.time()
    daemon_command = [
        *(sys.executable, "-m", "jouletrace", "run", "--demo"),
        *(f"--web.listen-address=127.0.0.1:{port}", f"--state-dir={tmp_path / 'state'}"),
    ]
    prometheus_command = [
        *("prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"),
        *(f"--web.listen-address=127.0.0.1:{prometheus_port}", "--log.level=warn"),
    ]
    api = Api(f"http://127.0.0.1:{prometheus_port}")
    with program(daemon_command, daemon_log) as daemon:
        wait_for(lambda: fetch(f"http://127.0.0.1:{port}/-/ready"), 15, daemon, daemon_log)
        with program(prometheus_command, prometheus_log) as server:
            wait_for(lambda: len(api.series(f"{ENERGY}[5m]")) >= SCRAPES, 90, server, prometheus_log)
            scrapes = api.scrapes()
            # Asked for half a second after a scrape, so that no sample lies on the edge of the window.
            rates = {
                end: api.value(f"rate({ENERGY}[20s])", time=f"{scrapes.times[end] + 0.5:.3f}")
                for end in range(len(scrapes.times) - 6, len(scrapes.times))
            }
            up = api.value('jouletrace_up{source="replay"}')
            scraped = api.value("min_over_time(up[1m])")
            metadata = api.get("metadata", metric="jouletrace_gpu_energy_joules")
    assert (up, scraped, daemon.returncode) == (1, 1, 0), daemon_log.read_text()
    # Only OpenMetrics carries units, and names counters without _total: it is what was negotiated.
    [described] = metadata["jouletrace_gpu_energy_joules"]
    assert (described["type"], described["unit"]) == ("counter", "joules")

    truth = recorded_joules(Recorded(), scrapes, process_start)
    assert np.ptp(np.diff(truth)) > 20, "the recording is flat here, so the test would prove nothing"
    for end, rate in rates.items():
        window = np.flatnonzero(scrapes.times > scrapes.times[end] + 0.5 - 20.0)
        first = int(window[0])
        # rate() divides by scrape times; the energy in between belongs to the samples' own times.
        measured = rate * (scrapes.times[end] - scrapes.times[first])
        assert measured == pytest.approx(truth[end] - truth[first], rel=0.03)
