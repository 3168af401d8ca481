"""The plain manifests: as kustomize builds them, and the same pods as the chart's."""

import json
import os
import re
import subprocess
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from jouletrace.config import load
from tests.deploy.chart import (
    KUBERNETES,
    OPERATOR,
    ROOT,
    kubectl,
    kubernetes_problem,
    only,
    operator_verdict,
    render,
    rendering,
    restricted_problems,
)

MANIFESTS = ROOT / "deploy" / "kubernetes"


@cache
def built(folder: str) -> list[dict[str, Any]]:
    """Return what `kubectl kustomize` makes of a folder."""
    done = subprocess.run(
        [kubectl(), "kustomize", MANIFESTS / folder], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def with_pods(folder: Path) -> list[dict[str, Any]]:
    """Return what kustomize makes of the operator's kustomization with the component `pods`."""
    paths = {
        name: [os.path.relpath(MANIFESTS / below, folder)]
        for name, below in (("resources", "operator"), ("components", "pods"))
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"kind": "Kustomization", **paths}))
    return built(str(folder))


def written(folder: str) -> list[dict[str, Any]]:
    """Return the objects that a kustomization names files of."""
    names = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text())["resources"]
    return [yaml.safe_load((MANIFESTS / folder / name).read_text()) for name in names if name.endswith(".yaml")]


@pytest.mark.parametrize("folder", ["base", "operator"])
def test_every_object_is_one_of_kubernetes(folder: str) -> None:
    objects = built(folder)
    core = [o for o in objects if o["apiVersion"] != OPERATOR]
    assert [o["kind"] for o in core] == [
        "Namespace",
        "ServiceAccount",
        "ConfigMap",
        "Service",
        "DaemonSet",
        "NetworkPolicy",
    ]
    assert [kubernetes_problem(o, version) for version in KUBERNETES for o in core] == [""] * len(KUBERNETES) * len(
        core
    )
    assert {o["metadata"].get("namespace", o["metadata"]["name"]) for o in objects} == {"jouletrace"}


def test_files_are_valid_before_kustomize() -> None:
    objects = written("base")
    assert len(objects) == 5
    assert [kubernetes_problem(o, version) for version in KUBERNETES for o in objects] == [""] * len(KUBERNETES) * 5
    assert sorted(path.name for path in (MANIFESTS / "base").iterdir()) == [
        "daemonset.yaml",
        "jouletrace.yml",
        "kustomization.yaml",
        "namespace.yaml",
        "networkpolicy.yaml",
        "service.yaml",
        "serviceaccount.yaml",
    ]


def test_the_monitor_fits_its_definition_and_is_the_charts() -> None:
    (monitor,) = written("operator")
    assert operator_verdict([monitor]) == (0, "PodMonitor jouletrace: valid\n")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (charts,) = only(rendering("kube-prometheus-stack"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint == {key: value for key, value in charts.items() if key not in {"interval", "scrapeTimeout"}}


def plain(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's spec without what names differ by, its volumes in the order of their names."""
    text = json.dumps(pod).replace("jt-jouletrace", "jouletrace")
    text = re.sub(r'"jouletrace-[0-9a-z]{10}"', '"jouletrace"', text)
    found = json.loads(re.sub(r'"ghcr.io/jouletrace/jouletrace(:[^"]*)?"', '"image"', text))
    found["volumes"].sort(key=itemgetter("name"))
    found["containers"][0]["volumeMounts"].sort(key=itemgetter("name"))
    return found


def test_pods_are_those_of_the_chart() -> None:
    ours = only(written("base"), "DaemonSet")["spec"]["template"]["spec"]
    charts = only(rendering("default"), "DaemonSet")["spec"]["template"]["spec"]

    assert plain(ours) == plain(charts)
    assert restricted_problems(ours) == []
    assert only(written("base"), "NetworkPolicy")["spec"]["egress"] == []


def test_pods_with_energy_by_pod_are_those_of_the_chart(tmp_path: Path) -> None:
    objects = with_pods(tmp_path)
    assert [
        kubernetes_problem(o, version) for version in KUBERNETES for o in objects if o["apiVersion"] != OPERATOR
    ] == [""] * 12
    ours = only(objects, "DaemonSet")["spec"]["template"]["spec"]
    charts = only(render({"attribution": {"pods": True}}), "DaemonSet")["spec"]["template"]["spec"]
    assert plain(ours) == plain(charts)
    assert only(objects, "Namespace")["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "privileged"}
    file = tmp_path / "jouletrace.yml"
    file.write_text(only(objects, "ConfigMap")["data"]["jouletrace.yml"])
    workloads = load(file, {}, None).workloads
    assert (workloads.processes, workloads.pods, workloads.pod_resources_socket) == (True, True, "")


def test_the_service_is_that_of_the_chart() -> None:
    ours = only(written("base"), "Service")["spec"]
    charts = only(rendering("default"), "Service")["spec"]
    assert {**ours, "selector": None} == {**charts, "selector": None}
    labels = only(written("base"), "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert ours["selector"].items() <= labels.items()


def test_the_daemon_takes_the_configuration() -> None:
    config = load(MANIFESTS / "base" / "jouletrace.yml", {}, None)
    assert config.state_dir == "/var/lib/jouletrace"
    assert config.engines.discover is False


def test_the_image_is_that_of_this_version() -> None:
    (image,) = yaml.safe_load((MANIFESTS / "base" / "kustomization.yaml").read_text())["images"]
    chart = yaml.safe_load((ROOT / "helm" / "jouletrace" / "Chart.yaml").read_text())
    assert image["newTag"] == chart["appVersion"]
