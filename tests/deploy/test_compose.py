"""The compose files: by compose's own schema, and what they mount by those who will read it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import ROOT

COMPOSE = ROOT / "deploy" / "compose"


class _Merging(yaml.SafeLoader):
    """Reads compose's tag for what an overriding file takes away."""


_Merging.add_constructor("!reset", lambda _loader, _node: None)


def read(name: str) -> dict[str, Any]:
    return yaml.load((COMPOSE / name).read_text(), _Merging)  # noqa: S506  (a safe loader with one tag more)


def with_demo() -> dict[str, Any]:
    """Return compose.yaml as demo.yaml overrides it."""
    merged = read("compose.yaml")
    for key, value in read("demo.yaml")["services"]["jouletrace"].items():
        if value is None:
            del merged["services"]["jouletrace"][key]
        else:
            merged["services"]["jouletrace"][key] = value
    return merged


def schema_verdict(document: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "compose.json"
    file.write_text(json.dumps(document))
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def mounts(service: str) -> dict[str, Path]:
    """Return what a service sees of this repository, by its path in the container."""
    found = {}
    for volume in read("compose.yaml")["services"][service]["volumes"]:
        source, target = volume.split(":")[:2]
        if source.startswith("."):
            assert volume.endswith(":ro")
            found[target] = (COMPOSE / source).resolve()
    return found


def test_both_forms_fit_the_schema(tmp_path: Path) -> None:
    for document in (read("compose.yaml"), with_demo()):
        done = schema_verdict(document, tmp_path)
        assert done.returncode == 0, done.stdout


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    document = read("compose.yaml")
    document["services"]["jouletrace"]["read_olny"] = True
    done = schema_verdict(document, tmp_path)
    assert done.returncode == 1
    assert "read_olny" in done.stdout


def test_the_demo_needs_no_gpu() -> None:
    assert "nvidia" in json.dumps(read("compose.yaml")["services"]["jouletrace"]["deploy"])
    service = with_demo()["services"]["jouletrace"]
    assert service["command"] == ["run", "--demo"]
    assert not {"deploy", "pid"} & service.keys()


def test_jouletrace_has_no_rights() -> None:
    service = read("compose.yaml")["services"]["jouletrace"]
    assert service["user"] == "65532:65532"
    assert service["read_only"] is True
    for name, each in read("compose.yaml")["services"].items():
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in each["ports"]), name


def test_whatever_is_mounted_is_there() -> None:
    paths = [path for service in ("prometheus", "alertmanager", "grafana") for path in mounts(service).values()]
    assert len(paths) == 6
    assert [path for path in paths if not path.exists()] == []


@pytest.mark.prometheus
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_its_configuration_with_the_rules(tmp_path: Path) -> None:
    for target, source in mounts("prometheus").items():
        copy = tmp_path / Path(target).relative_to("/etc/prometheus")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    done = subprocess.run(
        ["promtool", "check", "config", "--lint=none", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = [*(tmp_path / "alerts").iterdir(), *(tmp_path / "recording").iterdir()]
    assert len(re.findall(r"SUCCESS: \d+ rules found", done.stdout)) == len(files)


def test_names_of_services_are_those_that_are_called() -> None:
    services = read("compose.yaml")["services"]
    prometheus = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    called = [*scrape["static_configs"][0]["targets"]]
    called += prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    provisioning = COMPOSE / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    called.append(source["url"].removeprefix("http://"))
    for name, port in (address.split(":") for address in called):
        assert any(mapping.endswith(f":{port}") for mapping in services[name]["ports"]), name
    assert scrape["job_name"] == "jouletrace"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


def test_grafana_finds_the_dashboards() -> None:
    provisioning = COMPOSE / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "jouletrace.yaml").read_text())["providers"]
    folder = mounts("grafana")[provider["options"]["path"]]
    assert folder == ROOT / "dashboards" / "generated"
    home = read("compose.yaml")["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).relative_to(provider["options"]["path"])).exists()
