"""The whole daemon on the simulated driver, with real processes in pods' cgroups and a kubelet's socket."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.daemon_process import DaemonProcess, simulated
from tests.kubelet_server import KubeletServer, Pod
from tests.namespaced_pod import NamespacedPod
from tests.nvml_shim import Constant, Device, Process, Scenario

pytestmark = pytest.mark.timeout(90)

NS = 1_000_000_000
GPU = "GPU-00000000-0000-4000-8000-00000000000{}"
WATTS = 300
START_S = 4
"""When the pods' processes come to the GPU, after the daemon's first look at the driver."""
LLM, TRAIN = ("team-a", "llm-0", "engine"), ("team-b", "train-7", "trainer")
ENDED = ("team-b", "train-6", "trainer")

Page = dict[str, dict[tuple[str, ...], float]]
"""By metric: values by (gpu, namespace, pod, container), as far as a series has these labels."""


@pytest.fixture(name="pods")
def fixture_pods(tmp_path: Path) -> Iterator[tuple[NamespacedPod, NamespacedPod]]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(NamespacedPod(tmp_path, LLM[2])),
            stack.enter_context(NamespacedPod(tmp_path, TRAIN[2])),
        )


@pytest.fixture(name="kubelet")
def fixture_kubelet(tmp_path: Path) -> Iterator[KubeletServer]:
    """A GPU in time slices, one of which an ended pod is still listed with."""
    listed = (
        Pod(*ENDED[:2], {ENDED[2]: [GPU.format(0) + "::1"]}),
        Pod(*LLM[:2], {LLM[2]: [GPU.format(0) + "::0"], "proxy": []}),
    )
    with KubeletServer(tmp_path / "kubelet.sock", *listed) as kubelet:
        yield kubelet


def start_trainer(kubelet: KubeletServer) -> None:
    """Let the kubelet give the ended pod's slice to the next one."""
    kubelet.pods = (*kubelet.pods, Pod(*TRAIN[:2], {TRAIN[2]: [GPU.format(0) + "::1"]}))


def page(daemon: DaemonProcess) -> Page:
    status, text = daemon.get("/metrics")
    assert status == 200
    found: Page = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (sample.labels.get(name) for name in ("gpu", "namespace", "pod", "container"))
            key = tuple(label for label in labels if label is not None)
            found.setdefault(sample.name.removeprefix("jouletrace_"), {})[key] = sample.value
    return found


def post(daemon: DaemonProcess, path: str, record: dict[str, Any]) -> None:
    request = urllib.request.Request(
        daemon.url + path, json.dumps(record).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=5) as response:
        assert response.status < 300


def named(daemon: DaemonProcess) -> set[tuple[str, ...]]:
    """Return the names of the pods that are shown on GPU 0."""
    info = page(daemon).get("gpu_process_info", {})
    return {key[1:] for key in info if key[0] == "0"}


def run(library: Path, folder: Path, socket: Path, *processes: Process) -> DaemonProcess:
    devices = [
        Device(power=Constant(WATTS), processes=processes),
        Device(power=Constant(100), processes=[Process(os.getpid(), 1000)]),
    ]
    folder.mkdir(exist_ok=True)
    return DaemonProcess(
        folder,
        "--no-engines.discover",
        "--sampling.health-interval",
        "1s",
        "--workloads.processes",
        "--workloads.pods",
        "--workloads.pod-resources-socket",
        str(socket),
        "--workloads.pod-logs-dir",
        str(folder / "logs"),
        variables=simulated(library, folder, Scenario(devices, epoch_ns=time.time_ns())),
    )


def test_pods_are_named_within_two_seconds(
    library: Path, tmp_path: Path, pods: tuple[NamespacedPod, NamespacedPod], kubelet: KubeletServer
) -> None:
    took = []
    # The best of three: the machine may be busy with something else.
    for attempt in range(3):
        kubelet.pods = kubelet.pods[:2]
        processes = [Process(pod.pid, 2000, from_s=START_S) for pod in pods]
        start_ns = time.time_ns()
        with run(library, tmp_path / str(attempt), kubelet.socket, *processes) as daemon:
            daemon.until("readiness", daemon.ready)
            daemon.until("the first question to the kubelet", lambda: "kubelet_answer_age_seconds" in page(daemon))
            start_trainer(kubelet)
            daemon.until("the names of both", lambda: named(daemon) == {LLM, TRAIN})
            took.append((time.time_ns() - start_ns) / NS - START_S)
            daemon.assert_calm()
        if took[-1] < 2:
            break
    assert min(took) < 2


def test_pods_come_share_and_go_and_their_energy_adds_up(
    library: Path, tmp_path: Path, pods: tuple[NamespacedPod, NamespacedPod], kubelet: KubeletServer
) -> None:
    seconds = 6
    processes = [
        Process(pod.pid, 2000, from_s=START_S, to_s=START_S + seconds, sm_percent=percent)
        for pod, percent in zip(pods, (60, 20), strict=True)
    ]
    with run(library, tmp_path / "daemon", kubelet.socket, *processes) as daemon:
        daemon.until("the first question to the kubelet", lambda: "kubelet_answer_age_seconds" in page(daemon))
        start_trainer(kubelet)
        daemon.until("the names of both", lambda: named(daemon) == {LLM, TRAIN})
        daemon.until("their end", lambda: named(daemon) == set())
        reached = page(daemon)["gpu_energy_joules_total"][("0",)]

        def settled() -> Page | None:
            now = page(daemon)
            rows = [joules for key, joules in now["pod_energy_joules_total"].items() if key[0] == "0"]
            assert sum(rows) <= now["gpu_energy_joules_total"][("0",)] + 1e-6
            return now if sum(rows) >= reached else None

        found = daemon.until("the energy of all of that", settled, seconds=20)["pod_energy_joules_total"]
        assert found.keys() == {("0", "", "", ""), ("0", *LLM), ("0", *TRAIN), ("1", "", "", "")}
        llm, train = found["0", *LLM], found["0", *TRAIN]
        # Lists are a second apart, so each end of their time is within half a second.
        assert llm + train == pytest.approx(WATTS * seconds, abs=WATTS * 1.2)
        # SM time 60 to 20; the second around each end has no readings of it, and is shared equally.
        assert llm / (llm + train) == pytest.approx(0.75, abs=0.1)
        time.sleep(1.5)
        later = page(daemon)["pod_energy_joules_total"]
        assert (later["0", *LLM], later["0", *TRAIN]) == (llm, train), "settled once"
        daemon.process.terminate()
        assert daemon.ends() == 0


def test_the_namespace_pays_for_requests_of_its_engine_that_name_nobody(
    library: Path, tmp_path: Path, pods: tuple[NamespacedPod, NamespacedPod], kubelet: KubeletServer
) -> None:
    """An engine says its pid; its devices, its pod and with it the tenant follow."""
    with run(library, tmp_path / "daemon", kubelet.socket, Process(pods[0].pid, 2000)) as daemon:
        daemon.until("its name", lambda: named(daemon) == {LLM})
        engine = {"engine_id": "e", "kind": "vllm", "models": ["m"], "pid": pods[0].pid}
        post(daemon, "/v1/engines", engine)
        times = {"arrival_ns": time.time_ns(), "first_token_ns": time.time_ns(), "end_ns": time.time_ns() + NS // 10}
        usage = {"input": 10, "output": 10}
        record = {"request_id": "r", "engine_id": "e", "model": "m", "status": "finished", "usage": usage, **times}
        post(daemon, "/v1/requests", record)
        daemon.until("its energy", lambda: json.loads(daemon.get("/v1/requests/r")[1]).get("final"))
        assert json.loads(daemon.get("/v1/requests/r")[1])["tenant"] == LLM[0]
        daemon.process.terminate()
        assert daemon.ends() == 0


def test_a_kubelet_that_hangs_delays_only_names(
    library: Path, tmp_path: Path, pods: tuple[NamespacedPod, NamespacedPod], kubelet: KubeletServer
) -> None:
    kubelet.release.clear()
    with run(library, tmp_path / "daemon", kubelet.socket, Process(pods[0].pid, 2000)) as daemon:
        daemon.until(
            "a question without answer",
            lambda: page(daemon).get("kubelet_errors_total") and named(daemon) == {("", "", LLM[2])},
        )
        assert "kubelet_answer_age_seconds" not in page(daemon)
        rows = daemon.until("energy of nobody known", lambda: page(daemon).get("pod_energy_joules_total"))
        assert {key[1:] for key in rows} == {("", "", "")}
        kubelet.release.set()
        daemon.until("its name", lambda: named(daemon) == {LLM})
        daemon.until("its energy", lambda: ("0", *LLM) in page(daemon)["pod_energy_joules_total"])
        daemon.process.terminate()
        assert daemon.ends() == 0
