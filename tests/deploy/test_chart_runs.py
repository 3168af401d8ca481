"""What the chart's pods do, done here: the daemon with its arguments, the kubelet's probes, the pod of `helm test`."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.daemon_process import DaemonProcess
from tests.deploy.chart import of_kind, only, rendering


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
    text = text.replace("- :4318", "- 127.0.0.1:0").replace("- :4317", "- 127.0.0.1:0")
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
