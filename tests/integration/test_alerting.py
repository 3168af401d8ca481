"""The rules in real Prometheus tools, and an alert on its whole way: daemon, Prometheus, Alertmanager, webhook."""

import http.server
import json
import shutil
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.daemon_process import DaemonProcess
from tests.integration.test_prometheus import Api, fetch, free_port, program, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
ALERTMANAGER = DEPLOY / "alertmanager" / "alertmanager.yml"
RULES = sorted([*PROMETHEUS.glob("recording/*.yml"), *PROMETHEUS.glob("alerts/*.yml")])

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(
        shutil.which("promtool") is None or shutil.which("amtool") is None,
        reason="prometheus or prometheus-alertmanager is not installed",
    ),
]


def tool(*command: str | Path) -> str:
    """Run a tool to its end and return what it wrote; fail with that when the tool does."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_rules_and_the_example() -> None:
    tool("promtool", "check", "rules", "--lint=all", "--lint-fatal", *RULES)
    tool("promtool", "check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.parametrize("file", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda file: file.stem)
def test_rules_fire_when_they_should_and_only_then(file: Path) -> None:
    tool("promtool", "test", "rules", file)


@pytest.mark.parametrize(
    ("severity", "receiver"), [("critical", "pager"), ("warning", "tickets"), ("info", "nobody"), ("new", "tickets")]
)
def test_alerts_go_to_whom_their_severity_concerns(severity: str, receiver: str) -> None:
    tool("amtool", "check-config", ALERTMANAGER)
    routes = tool("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}")
    assert routes.split() == [receiver]


class Inbox:
    """A webhook on loopback that keeps the alerts that it gets."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, dict[str, Any]]] = []
        """Receiver and alert, in the order of arrival."""
        inbox = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                inbox.alerts += [(body["receiver"], alert) for alert in body["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class names it)
                pass

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "Inbox":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def find(self, name: str, status: str) -> tuple[str, dict[str, Any]] | None:
        """Return the first alert of a name and status, and for whom it was."""
        found = ((to, alert) for to, alert in self.alerts if alert["status"] == status)
        return next(((to, alert) for to, alert in found if alert["labels"]["alertname"] == name), None)


def hurried_rules(folder: Path, *alerts: str) -> None:
    """Copy the rules as they are, but evaluated each second; the named alerts wait for 2 s instead of minutes.

    Without it the test would take a quarter of an hour. No expression is touched.
    """
    for file in RULES:
        content = yaml.safe_load(file.read_text())
        for group in content["groups"]:
            group["interval"] = "1s"
            for rule in group["rules"]:
                if rule.get("alert") in alerts:
                    rule["for"] = "2s"
        copy = folder / file.relative_to(PROMETHEUS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(content))


def hurried_prometheus(folder: Path, daemon: str, alertmanager: int) -> Path:
    """Write the shipped example with this test's addresses; scraped and evaluated each second."""
    content = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": "1s", "scrape_timeout": "900ms", "evaluation_interval": "1s"}
    content["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
    content["scrape_configs"][0]["static_configs"][0]["targets"] = [daemon.removeprefix("http://")]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(content))
    return file


def hurried_alertmanager(folder: Path, url: str) -> Path:
    """Write the shipped example with the test's webhook behind every receiver, and waits of seconds."""
    content = yaml.safe_load(ALERTMANAGER.read_text())
    for route in (content["route"], *content["route"]["routes"]):
        route["group_wait"] = "1s"
    content["route"]["group_interval"] = "2s"
    for receiver in content["receivers"]:
        for webhook in receiver.get("webhook_configs", ()):
            webhook["url"] = url
    file = folder / "alertmanager.yml"
    file.write_text(yaml.safe_dump(content))
    return file


@contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[tuple[int, Callable[..., Any]]]:
    """Run an Alertmanager; yields its port and a function that waits while it runs."""
    port, log = free_port(), folder / "alertmanager.log"
    # An empty cluster address: else it opens a port for its like beyond loopback.
    command = [
        *("prometheus-alertmanager", f"--config.file={hurried_alertmanager(folder, webhook)}"),
        *(f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address="),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with program(command, log) as running:
        wait_for(lambda: fetch(f"http://127.0.0.1:{port}/-/ready"), 15, running, log)
        yield port, lambda what, seconds: wait_for(what, seconds, running, log)


@contextmanager
def alerting(folder: Path, daemon: str, webhook: str) -> Iterator[tuple[Api, Callable[..., Any]]]:
    """Run an Alertmanager and a Prometheus; yields the latter's API and a function that waits while both run."""
    port, log = free_port(), folder / "prometheus.log"
    with alertmanager(folder, webhook) as (alertmanager_port, _):
        command = [
            *("prometheus", f"--config.file={hurried_prometheus(folder, daemon, alertmanager_port)}"),
            *(f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
        ]
        with program(command, log) as running:
            yield Api(f"http://127.0.0.1:{port}"), lambda what, seconds: wait_for(what, seconds, running, log)


def test_one_fault_is_told_once(tmp_path: Path) -> None:
    """The inhibitions of the shipped configuration, asked of a real Alertmanager."""
    here = {"cluster": "c", "instance": "n1:9841"}
    gpu = {**here, "uuid": "GPU-1"}
    elsewhere = {"cluster": "c", "instance": "n2:9841"}
    fleet = {"alertname": "JouletraceWasteBudgetBurn", "cluster": "c"}
    kept = [
        {"alertname": "JouletraceExporterDown", "severity": "warning", **here},
        {"alertname": "JouletraceCoverageLow", "severity": "warning", **elsewhere},
        {"alertname": "JouletraceGpusIdle", "severity": "info", "cluster": "c"},
        {**fleet, "severity": "warning", "long": "1h"},
        {"alertname": "KubeNodeNotReady", "severity": "warning", "cluster": "c", "node": "n3"},
        {"alertname": "JouletraceSourceDown", "severity": "critical", "cluster": "c", "instance": "n4:9841"},
        {"alertname": "JouletraceGpuXidCritical", "severity": "critical", **elsewhere, "uuid": "GPU-2"},
        {"alertname": "JouletraceGpuXid", "severity": "info", **elsewhere, "uuid": "GPU-3"},
        {"alertname": "JouletraceManyExportersDown", "severity": "critical", "cluster": "d"},
    ]
    quiet = [
        {"alertname": "JouletraceCoverageLow", "severity": "warning", **here},
        {"alertname": "JouletraceGpuXidCritical", "severity": "critical", **gpu},
        {**fleet, "severity": "warning", "long": "6h"},
        {**fleet, "severity": "info", "long": "3d"},
        {"alertname": "JouletraceExporterDown", "severity": "warning", "cluster": "c", "node": "n3", "instance": "n3"},
        {"alertname": "JouletraceDriverSlow", "severity": "warning", "cluster": "c", "instance": "n4:9841"},
        {"alertname": "JouletraceGpuXid", "severity": "info", **elsewhere, "uuid": "GPU-2"},
        {"alertname": "JouletraceExporterDown", "severity": "warning", "cluster": "d", "instance": "n5:9841"},
    ]
    with alertmanager(tmp_path, "http://127.0.0.1:9/") as (port, wait):
        url = f"http://127.0.0.1:{port}/api/v2/alerts"
        body = json.dumps([{"labels": labels} for labels in (*kept, *quiet)]).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=5).close()

        def states() -> list[tuple[dict[str, str], str]]:
            alerts = [(alert["labels"], alert["status"]["state"]) for alert in json.loads(fetch(url))]
            settled = len(alerts) == len(kept) + len(quiet) and all(state != "unprocessed" for _, state in alerts)
            return alerts if settled else []

        found = wait(states, 20)
    assert [labels for labels, state in found if state == "active" and labels not in kept] == []
    assert [labels for labels, state in found if state == "suppressed" and labels not in quiet] == []


def test_an_alert_reaches_a_webhook_and_is_taken_back(tmp_path: Path) -> None:
    hurried_rules(tmp_path, "JouletraceCoverageLow", "JouletraceExporterDown")
    with DaemonProcess(tmp_path, "--demo", "--replay.speed", "25") as daemon, Inbox() as inbox:
        daemon.until("readiness", daemon.ready)
        with alerting(tmp_path, daemon.url, inbox.url) as (api, wait):
            # The recording has much work that is no request's: a fifth of it is soon unattributed.
            receiver, fired = wait(lambda: inbox.find("JouletraceCoverageLow", "firing"), 40)
            [coverage] = api.get("query", query="jouletrace_attribution_coverage_ratio")["result"]
            watts = api.value('jouletrace:cluster:power_watts:rate5m{cluster="example"}')
            broken = [
                (rule["name"], rule["lastError"])
                for group in api.get("rules")["groups"]
                for rule in group["rules"]
                if rule["health"] != "ok"
            ]
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.ends() == 0
            down_receiver, down = wait(lambda: inbox.find("JouletraceExporterDown", "firing"), 20)
            wait(lambda: inbox.find("JouletraceCoverageLow", "resolved"), 20)
    instance = daemon.url.removeprefix("http://")
    assert receiver == down_receiver == "tickets"
    assert fired["labels"] == {
        **{"alertname": "JouletraceCoverageLow", "severity": "warning", "cluster": "example"},
        **{"job": "jouletrace", "instance": instance, "engine": "recorded"},
    }
    assert float(coverage["value"][1]) < 0.8
    assert f"engine recorded on {instance}" in fired["annotations"]["description"]
    assert fired["annotations"]["runbook_url"].endswith("/deploy/runbooks/JouletraceCoverageLow.md")
    assert fired["annotations"]["dashboard"] == f"/d/jouletrace-exporter?var-instance={instance}"
    assert down["labels"]["instance"] == instance
    assert watts > 0
    assert broken == [], "a rule that real series make fail"
