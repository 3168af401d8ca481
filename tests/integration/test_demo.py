"""The demo and the other commands as an operator types them."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.daemon_process import DaemonProcess, run_command, watts

pytestmark = pytest.mark.timeout(60)

ENERGY = "jouletrace_gpu_energy_joules_total"


def test_the_demo_end_to_end(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "--demo") as daemon:
        daemon.until("readiness", daemon.ready, seconds=5)
        assert time.monotonic() - daemon.started < 5
        status, page = daemon.get("/")
        assert status == 200
        assert "NVIDIA H200" in page
        assert daemon.get("/-/healthy") == (200, "healthy\n")
        samples = []
        for _ in range(11):
            [joules] = daemon.metric(ENERGY).values()
            samples.append((time.monotonic(), joules))
            time.sleep(1)
        # An H200: 79 W when nobody holds it, 700 W at its limit.
        assert 70 < watts(samples) < 720
        assert all(after > before for (_, before), (_, after) in itertools.pairwise(samples))
        [power] = daemon.metric("jouletrace_gpu_power_watts").values()
        assert 70 < power < 750
        assert daemon.get("/-/ready") == (200, "ready\n")
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.ends(5) == 0


def test_a_reader_that_goes_is_no_error() -> None:
    arguments = [sys.executable, "-m", "jouletrace", "check-config", "--print-config"]
    command = " ".join(arguments)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout == "source: nvml\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_module_runs_as_a_program() -> None:
    done = run_command("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("jouletrace ")
    assert run_command("run", "--no-such-flag").returncode == 2
