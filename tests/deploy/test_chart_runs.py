"""What the chart's objects do, done here: the daemon with its arguments, probes, relabelings, the init container."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from jouletrace.metrics import names
from tests.daemon_process import DaemonProcess
from tests.deploy.chart import of_kind, only, render, rendering

OPERATORS_RELABELINGS = [
    {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
    {"source_labels": ["__meta_kubernetes_pod_container_name"], "target_label": "container"},
    {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
    {"target_label": "job", "replacement": "monitoring/jt-jouletrace"},
    {"target_label": "endpoint", "replacement": "metrics"},
]
"""What the Prometheus operator puts before those of a PodMonitor (its pkg/prometheus/promcfg.go)."""


def scrape(host: str, port: int) -> subprocess.CompletedProcess[str]:
    """Run what the test's pod runs, against another address."""
    (container,) = only(rendering("default"), "Pod")["spec"]["containers"]
    program, *options, service, _, path = container["command"]
    assert (program, service) == ("python3", "jt-jouletrace.monitoring.svc")
    return subprocess.run(
        [sys.executable, *options, host, str(port), path], capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize("case", ["default", "records"])
def test_the_daemon_serves_what_pods_and_kubelet_ask_for(tmp_path: Path, case: str) -> None:
    objects = rendering(case)
    (container,) = only(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    (configuration,) = of_kind(objects, "ConfigMap")
    text = configuration["data"]["jouletrace.yml"]
    # The paths and ports of the pod are not this machine's; the file's other keys stay.
    for folder in ("/etc/jouletrace", "/run/jouletrace"):
        text = text.replace(folder, str(tmp_path))
    for port in ("4317", "4318", "9842"):
        text = text.replace(f"- :{port}", "- 127.0.0.1:0")
    file = tmp_path / "jouletrace.yml"
    file.write_text(text)
    (tmp_path / "token").mkdir()
    (tmp_path / "token" / "token").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "laws").mkdir()
    (tmp_path / "laws" / "laws.yml").write_text("{}\n")
    command, argument = container["args"]
    arguments = [argument.replace("/etc/jouletrace", str(tmp_path)), "--log.format=json", "--demo"]
    with DaemonProcess(tmp_path, *arguments, command=command) as daemon:
        daemon.until("readiness", daemon.ready)
        for probe in ("livenessProbe", "readinessProbe"):
            assert daemon.get(container[probe]["httpGet"]["path"])[0] == 200
        if case == "default":
            address = urlsplit(daemon.url)
            daemon.until("the test's pod to be content", lambda: scrape("127.0.0.1", address.port or 0).returncode == 0)


def test_the_pod_of_the_test_fails_where_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("# HELP jouletrace_gpu_energy_joules_total of no GPU\n")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split(" port ")[1].split()[0])
        done = scrape("127.0.0.1", port)
    finally:
        server.kill()
        server.communicate(timeout=10)
    assert done.returncode == 1
    assert "has measured no GPU" in done.stderr


@pytest.mark.prometheus
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_labels_of_a_workload_are_not_pushed_aside_by_those_of_the_daemons_pod(tmp_path: Path) -> None:
    (endpoint,) = only(rendering("kube-prometheus-stack"), "PodMonitor")["spec"]["podMetricsEndpoints"]

    def as_prometheus_has_it(relabeling: dict[str, Any]) -> dict[str, Any]:
        return {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", key): relabeling[key] for key in relabeling}

    discovered = {
        "__meta_kubernetes_namespace": "monitoring",
        "__meta_kubernetes_pod_container_name": "jouletrace",
        "__meta_kubernetes_pod_name": "jt-jouletrace-x7k2p",
        "__meta_kubernetes_pod_node_name": "gpu-node-7",
    }
    job = {
        "job_name": "jouletrace",
        "relabel_configs": [*OPERATORS_RELABELINGS, *map(as_prometheus_has_it, endpoint["relabelings"])],
        "static_configs": [{"targets": ["127.0.0.1:9841"], "labels": discovered}],
    }
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    done = subprocess.run(
        # It looks for targets until the time is up.
        ["promtool", "check", "service-discovery", "--timeout=300ms", file, "jouletrace"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    (found,) = json.loads(done.stdout)
    target = {name: value for name, value in found["labels"].items() if not name.startswith("__")}
    assert target == {
        "instance": "gpu-node-7",
        "node": "gpu-node-7",
        "job": "jouletrace",
        "namespace": "monitoring",
        "endpoint": "metrics",
    }, "nothing changes when the pod is replaced"
    assert endpoint["honorLabels"] is True, "as a pod's namespace is that of the workload"
    exported = {label for metric in names.ALL for label in metric.labels}
    assert exported & target.keys() == {"namespace"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_the_node_s_folders_become_the_daemons_whoever_had_them(tmp_path: Path) -> None:
    """The pods were another user's before: his files are mode 0600, and the container has no right but CHOWN."""
    folder, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    folder.mkdir(mode=0o700)
    elsewhere.write_text("of the node")
    journal = folder / "ledger.journal"
    journal.touch(mode=0o600)
    (folder / "link").symlink_to(elsewhere)
    for path in (folder, journal):
        os.chown(path, 4711, 4711)
    tmp_path.chmod(0o755)
    for attribution, user in (({"discoverEngines": True}, 0), ({}, 65532)):
        values = {"attribution": attribution, "state": {"hostPath": "/var/lib/jouletrace"}}
        (container,) = only(render(values), "DaemonSet")["spec"]["template"]["spec"]["initContainers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
        program, *options, folder_of_pod = container["command"]
        assert (program, folder_of_pod) == ("python3", "/var/lib/jouletrace")
        subprocess.run(
            ["setpriv", "--bounding-set=-all,+chown", "--no-new-privs", sys.executable, *options, str(folder)],
            timeout=30,
            check=True,
        )
        assert [(path.stat().st_uid, path.stat().st_gid) for path in (folder, journal)] == [(user, 65532)] * 2
        assert (elsewhere.stat().st_uid, stat.S_IMODE(journal.stat().st_mode)) == (0, 0o600)
