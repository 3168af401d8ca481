"""The whole daemon as a process of its own, driven from outside over HTTP, signals and its log."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.nvml_shim import Scenario, environment


class DaemonProcess:
    """A running `jouletrace`; a context manager that ends it by its own pid."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        command: str = "run",
        launcher: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`launcher` is a command that becomes the daemon, whose command line follows it."""
        self.log = folder / "daemon.log"
        self.started = time.monotonic()
        options = ["--state-dir", str(folder / "state"), "--web.listen-address", "127.0.0.1:0"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, "-m", "jouletrace", command, *options, *arguments],
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                env=dict(os.environ if variables is None else variables),
            )
        self._url = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)

    def text(self) -> str:
        """Return all that it has written."""
        return self.log.read_text(errors="replace")

    def events(self) -> list[dict[str, Any]]:
        """Return the log's lines."""
        lines = [line for line in self.text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [json.loads(line) for line in lines]

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Return the first true answer of a condition; fail with the log when there is none in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                answer = condition()
            except (urllib.error.URLError, ConnectionError):
                answer = None
            if answer:
                return answer
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        return pytest.fail(f"in vain: {what}; the log says:\n{self.text()[-4000:]}")

    @property
    def url(self) -> str:
        """Return the URL that its log prints."""
        if not self._url:
            self._url = self.until(
                "the URL in the log", lambda: next((e["url"] for e in self.events() if "url" in e), None)
            ).rstrip("/")
        return self._url

    def get(self, path: str, timeout: float = 3.0) -> tuple[int, str]:
        """Return status and text of a page."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
                return int(response.status), response.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return int(answer.code), answer.read().decode()

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """Return a metric's values by GPU index, of the series with these labels."""
        status, text = self.get("/metrics")
        assert status == 200
        return {
            sample.labels.get("gpu", ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def ready(self) -> bool:
        """Return whether it says so."""
        return self.get("/-/ready")[0] == 200

    def ends(self, seconds: float = 10.0) -> int:
        """Wait for the end and return the exit code; assert that there is no traceback in the log."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end; the log says:\n{self.text()[-4000:]}")
        self.assert_calm()
        return code

    def assert_calm(self) -> None:
        """Assert that nothing that it has written is a traceback."""
        assert "Traceback" not in self.text(), self.text()


def simulated(library: Path, folder: Path, scenario: Scenario) -> dict[str, str]:
    """Return the environment of a process that sees a scenario."""
    return environment(library, scenario.write(folder / "scenario"))


def run_command(
    *arguments: str, variables: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command of `jouletrace` to its end; asserts that it writes no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "jouletrace", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=dict(os.environ if variables is None else variables),
        **options,
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


def watts(samples: Sequence[tuple[float, float]]) -> float:
    """Return the mean power between the first and the last of (seconds, joules)."""
    return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])
