"""The Helm chart: what it makes of each file of values, judged by the schemas of those who will read it."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import pytest
import yaml

from jouletrace.config import Config, load
from jouletrace.web.web_config import read_web_config
from tests.deploy.chart import (
    CASES,
    CHART,
    KUBERNETES,
    OPERATOR,
    RELEASE,
    ROOT,
    Object,
    kubernetes_problem,
    of_kind,
    only,
    operator_verdict,
    render,
    rendering,
    restricted_problems,
    schema_nodes,
    values_of,
    values_schema,
)

WARNING = 2
"""Severity of Helm's linter; 1 is information, such as that there is no icon."""
KUBELET = "/var/lib/kubelet/pod-resources"
LARGEST_APPLIED_BYTES = 262144
"""Of an object that `kubectl apply` can note in its annotation (TotalAnnotationSizeLimitB of Kubernetes)."""


def pod_of(objects: list[Object]) -> Object:
    return only(objects, "DaemonSet")["spec"]["template"]["spec"]


def container_of(objects: list[Object]) -> Object:
    (container,) = pod_of(objects)["containers"]
    return container


def daemon_config(objects: list[Object], folder: Path) -> Config:
    (configuration,) = [o for o in of_kind(objects, "ConfigMap") if "jouletrace.yml" in o["data"]]
    file = folder / "jouletrace.yml"
    file.write_text(configuration["data"]["jouletrace.yml"])
    return load(file, {}, None)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def objects(case: str) -> list[Object]:
    return rendering(case)


def test_generated_parts_and_copies_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "helm" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_copies_are_equal_byte_by_byte() -> None:
    pairs = [
        (CHART / "files" / "rules" / f"{folder}-{file.name}", file)
        for folder in ("alerts", "recording")
        for file in (ROOT / "deploy" / "prometheus" / folder).glob("*.yml")
    ]
    pairs += [
        (CHART / "files" / "dashboards" / file.name, file)
        for file in (ROOT / "dashboards" / "generated").glob("*.json")
    ]
    assert {copy for copy, _ in pairs} == {path for path in (CHART / "files").rglob("*") if path.is_file()}
    assert [copy.name for copy, original in pairs if copy.read_bytes() != original.read_bytes()] == []


def test_lint_has_no_warning(case: str) -> None:
    report = helm_python.lint(str(CHART), values_of(case), strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= WARNING] == []


def test_every_object_is_one_of_kubernetes(objects: list[Object]) -> None:
    core = [o for o in objects if o["apiVersion"] != OPERATOR]
    assert {"DaemonSet", "Service", "ConfigMap", "Pod"} <= {o["kind"] for o in core}
    problems = [
        (version, o["kind"], o["metadata"]["name"], problem)
        for version, o in itertools.product(KUBERNETES, core)
        if (problem := kubernetes_problem(o, version))
    ]
    assert problems == []


def test_a_misspelt_key_of_kubernetes_would_be_found() -> None:
    daemon_set = json.loads(json.dumps(only(rendering("default"), "DaemonSet")))
    daemon_set["spec"]["template"]["spec"]["hostPid"] = True
    assert all("hostPid" in kubernetes_problem(daemon_set, version) for version in KUBERNETES)


def test_every_object_of_the_operator_fits_its_definition() -> None:
    theirs = [o for name in CASES for o in rendering(name) if o["apiVersion"] == OPERATOR]
    assert {o["kind"] for o in theirs} == {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
    code, lines = operator_verdict(theirs)
    assert (code, lines.count(": valid\n")) == (0, len(theirs)), lines


def test_a_wrong_object_of_the_operator_would_be_found() -> None:
    monitor = json.loads(json.dumps(only(rendering("kube-prometheus-stack"), "PodMonitor")))
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = "soon"
    code, lines = operator_verdict([monitor])
    assert code == 1
    assert "interval" in lines


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.prometheus
def test_rules_pass_promtool(tmp_path: Path) -> None:
    files = []
    for name in CASES:
        for rule in of_kind(rendering(name), "PrometheusRule"):
            file = tmp_path / f"{name}-{rule['metadata']['name']}.yml"
            file.write_text(yaml.safe_dump(rule["spec"]))
            files.append(file)
    assert len(files) == 2 * len(list((CHART / "files" / "rules").iterdir()))
    done = subprocess.run(
        # The same alert may stand there for several ranges, so that `--lint=all` takes it for a duplicate.
        ["promtool", "check", "rules", "--lint=none", *files],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SUCCESS") == len(files)


def test_rules_say_what_the_files_say() -> None:
    shown = [
        g for rule in of_kind(rendering("kube-prometheus-stack"), "PrometheusRule") for g in rule["spec"]["groups"]
    ]
    meant = [
        group
        for folder in ("alerts", "recording")
        for file in sorted((ROOT / "deploy" / "prometheus" / folder).glob("*.yml"))
        for group in yaml.safe_load(file.read_text())["groups"]
    ]
    for rule in (rule for group in meant for rule in group["rules"]):
        if "dashboard" in rule.get("annotations", {}):
            rule["annotations"]["dashboard"] = "https://grafana.example" + rule["annotations"]["dashboard"]
    assert shown == meant


def test_alerts_can_be_changed_one_by_one() -> None:
    rules = [
        rule
        for o in of_kind(rendering("rules"), "PrometheusRule")
        for group in o["spec"]["groups"]
        for rule in group["rules"]
    ]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    assert "JouletraceGpuMissing" not in alerts
    lost = alerts["JouletraceGpuLost"]
    assert (lost["for"], lost["labels"]) == ("15m", {"severity": "warning", "team": "platform"})
    assert {alert["labels"]["team"] for alert in alerts.values()} == {"platform"}
    assert lost["annotations"]["runbook_url"] == "https://wiki.example/runbooks/JouletraceGpuLost.md"
    budget = [rule["expr"] for rule in rules if rule.get("record") == "jouletrace:fleet:waste_budget:ratio"]
    assert budget == ["vector(0.05)"]
    only_recording = render({"rules": {"enabled": True, "alerts": False}})
    assert {
        key
        for o in of_kind(only_recording, "PrometheusRule")
        for g in o["spec"]["groups"]
        for r in g["rules"]
        for key in r
    } <= {"record", "expr", "labels"}


def test_dashboards_are_whole() -> None:
    maps = [o for o in of_kind(rendering("rules"), "ConfigMap") if "dashboard" in o["metadata"]["name"]]
    shown = {}
    for object_ in maps:
        assert object_["metadata"]["namespace"] == "grafana"
        assert object_["metadata"]["labels"]["dashboards"] == "jouletrace"
        assert len(json.dumps(object_)) < LARGEST_APPLIED_BYTES
        shown.update(object_["data"])
    files = {file.name: file.read_text() for file in (ROOT / "dashboards" / "generated").glob("*.json")}
    assert {name: json.loads(text) for name, text in shown.items()} == {
        name: json.loads(text) for name, text in files.items()
    }


def test_no_pod_claims_a_gpu_and_every_gpu_is_seen(objects: list[Object]) -> None:
    assert "nvidia.com/gpu" not in json.dumps(
        [
            container.get("resources")
            for pod in (pod_of(objects), only(objects, "Pod")["spec"])
            for container in pod["containers"]
        ]
    )
    variables = {variable["name"]: variable["value"] for variable in container_of(objects)["env"]}
    assert {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "utility"}.items() <= variables.items()
    assert pod_of(objects)["automountServiceAccountToken"] is False


def test_the_node_is_opened_only_for_what_needs_it() -> None:
    opened = {name: restricted_problems(pod_of(rendering(name))) for name in CASES}
    assert opened == {
        "default": [],
        "kube-prometheus-stack": [],
        "tls": [],
        "rules": [],
        "bare": ["privileges", "capabilities"],
        "gke": ["volume nvidia", "privileges", "capabilities"],
        "records": ["volume sockets", "user 0", "capabilities"],
        "pods": ["hostPID", "volume pod-logs"],
        "attribution": [
            "hostPID",
            "volume state",
            "volume kubelet",
            "volume pod-logs",
            "user 0",
            "capabilities",
            "user 0",
            "capabilities",
        ],
    }
    assert [restricted_problems(only(rendering(name), "Pod")["spec"]) for name in CASES] == [[]] * len(CASES)


@pytest.mark.parametrize(
    ("attribution", "user", "folders"),
    [
        ({}, 65532, set()),
        ({"pods": True}, 65532, {"/var/log/pods"}),
        ({"pods": True, "podLogsDirectory": ""}, 65532, set()),
        ({"pods": True, "kubeletSocketDirectory": KUBELET}, 0, {KUBELET, "/var/log/pods"}),
        ({"pods": True, "kubeletSocketDirectory": KUBELET, "podLogsDirectory": ""}, 0, {KUBELET}),
        ({"kubeletSocketDirectory": KUBELET}, 65532, set()),
    ],
)
def test_pods_are_named_with_no_more_rights_than_each_source_takes(
    attribution: dict[str, Any], user: int, folders: set[str], tmp_path: Path
) -> None:
    objects = render({"attribution": attribution})
    pod, container = pod_of(objects), container_of(objects)
    assert pod.get("hostPID", False) is attribution.get("pods", False)
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (user, user != 0)
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    of_node = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] in of_node]
    assert {of_node[mount["name"]] for mount in mounts} == set(of_node.values()) == folders
    assert all(mount["readOnly"] for mount in mounts)
    workloads = daemon_config(objects, tmp_path).workloads
    assert workloads.pods is workloads.processes is attribution.get("pods", False)
    if workloads.pods:
        read = {str(Path(workloads.pod_resources_socket).parent), workloads.pod_logs_dir} - {"", "."}
        assert read == {mount["mountPath"] for mount in mounts}


def test_a_kubelet_elsewhere_is_mounted_where_the_daemon_looks() -> None:
    objects = render({"attribution": {"pods": True, "kubeletSocketDirectory": "/var/lib/k0s/kubelet/pod-resources"}})
    (volume,) = [volume for volume in pod_of(objects)["volumes"] if volume["name"] == "kubelet"]
    (mount,) = [mount for mount in container_of(objects)["volumeMounts"] if mount["name"] == "kubelet"]
    assert volume["hostPath"]["path"] == "/var/lib/k0s/kubelet/pod-resources"
    assert mount["mountPath"] == KUBELET


def test_the_daemon_takes_the_configuration(objects: list[Object], case: str, tmp_path: Path) -> None:
    config = daemon_config(objects, tmp_path)
    assert config.web.listen_address == (":9841",)
    assert config.engines.discover is (case == "attribution")
    assert config.workloads.pods is (case in {"attribution", "pods"})
    if case == "records":
        assert config.ledger.settled_requests == 1_000_000
        assert config.ingest.queue_records == 500_000
        assert config.ingest.listen_address == (":9842",)
        assert config.ingest.token_file == "/etc/jouletrace/token/token"  # noqa: S105  (a path)
        assert config.ingest.stream_socket == "/run/jouletrace/ingest.sock"
        assert config.diagnosis.parked_after == 1800
        assert [target.url for target in config.engines.targets] == [
            "http://vllm.inference.svc:8000",
            "http://sglang.inference.svc:30000",
        ]


def test_the_web_configuration_is_one(tmp_path: Path) -> None:
    found = rendering("tls")
    file = tmp_path / "web-config.yml"
    file.write_text(only(found, "Secret")["stringData"]["web-config.yml"])
    assert list(read_web_config(file).basic_auth_users) == ["prometheus"]
    assert daemon_config(found, tmp_path).web.config.file == "/etc/jouletrace/web/web-config.yml"
    (mount,) = [m for m in container_of(found)["volumeMounts"] if m["name"] == "web"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/etc/jouletrace/web", True)
    assert container_of(found)["livenessProbe"]["httpGet"]["scheme"] == "HTTPS"
    # The kubelet has no certificate to show, and nobody knows what a Secret of the operator's own asks for.
    asking = {"web": {"config": {"tls_server_config": {"client_auth_type": "RequireAndVerifyClientCert"}}}}
    for values in (asking, {"web": {"existingSecret": "mine"}}):
        assert container_of(render(values))["readinessProbe"]["tcpSocket"] == {"port": "metrics"}


def test_secrets_stay_in_secrets() -> None:
    objects = render(
        {"ingest": {"token": {"value": "hush-hush"}}, "web": {"config": {"basic_auth_users": {"a": "hush-hush"}}}}
    )
    assert [o["kind"] for o in objects if "hush-hush" in json.dumps(o)] == ["Secret", "Secret"]


def test_whoever_names_a_port_names_one_of_the_pod(objects: list[Object]) -> None:
    ports = {port["name"] for port in container_of(objects)["ports"]}
    named = {port["targetPort"] for port in only(objects, "Service")["spec"]["ports"]}
    for policy in of_kind(objects, "NetworkPolicy"):
        named |= {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    for monitor in (*of_kind(objects, "PodMonitor"), *of_kind(objects, "ServiceMonitor")):
        named |= {e["port"] for e in monitor["spec"].get("podMetricsEndpoints", ()) or monitor["spec"]["endpoints"]}
    assert named == ports


def test_every_listener_of_the_configuration_has_its_port() -> None:
    listeners = {"metrics_listen_address": ["[::]:9843"]}
    objects = render({"config": {"web": listeners}, "monitor": {"kind": "PodMonitor"}})
    ports = {port["name"]: port["containerPort"] for port in container_of(objects)["ports"]}
    assert ports == {"metrics": 9841, "metrics-only": 9843}
    (endpoint,) = only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics-only"
    on_a_socket = render({"config": {"ingest": {"listen_address": ["unix:/var/lib/jouletrace/http.sock"]}}})
    assert [port["name"] for port in container_of(on_a_socket)["ports"]] == ["metrics"]


def test_selectors_find_the_daemon_and_not_the_test(objects: list[Object]) -> None:
    daemon = only(objects, "DaemonSet")["spec"]["template"]["metadata"]["labels"].items()
    test = only(objects, "Pod")["metadata"]["labels"].items()
    selectors = [
        only(objects, "DaemonSet")["spec"]["selector"]["matchLabels"],
        only(objects, "Service")["spec"]["selector"],
    ]
    selectors += [o["spec"]["podSelector"]["matchLabels"] for o in of_kind(objects, "NetworkPolicy")]
    selectors += [o["spec"]["selector"]["matchLabels"] for o in of_kind(objects, "PodMonitor")]
    for selector in selectors:
        assert selector.items() <= daemon
        assert not selector.items() <= test
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert (
            monitor["spec"]["selector"]["matchLabels"].items() <= only(objects, "Service")["metadata"]["labels"].items()
        )


def test_targets_are_called_as_rules_and_alertmanager_expect() -> None:
    (endpoint,) = only(rendering("tls"), "ServiceMonitor")["spec"]["endpoints"]
    labels = {
        each["targetLabel"]: each.get("replacement", each.get("sourceLabels"))
        for each in endpoint["relabelings"]
        if "targetLabel" in each
    }
    node = ["__meta_kubernetes_pod_node_name"]
    assert labels == {"job": "jouletrace", "instance": node, "node": node, "cluster": "production"}


def test_the_network_is_closed_by_default() -> None:
    spec = only(rendering("default"), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == []
    assert spec["ingress"] == [{"ports": [{"port": "metrics", "protocol": "TCP"}]}]


def test_pods_follow_their_configuration() -> None:
    def checksum(values: dict[str, Any]) -> str:
        annotations = only(render(values), "DaemonSet")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    assert checksum({}) == checksum({"service": {"port": 80}})
    assert checksum({}) != checksum({"config": {"log": {"level": "debug"}}})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"atribution": {}}, "atribution"),
        ({"attribution": {"pod": True}}, "pod"),
        ({"config": {"log": {"levle": "debug"}}}, "levle"),
        ({"config": {"log": {"level": "loud"}}}, "level"),
        ({"config": {"engines": {"discover": True}}}, "discover"),
        ({"config": {"workloads": {"pods": True}}}, "workloads"),
        ({"attribution": {"podLogsDirectory": "log/pods"}}, "podLogsDirectory"),
        ({"seLinuxOptions": {"kind": "spc_t"}}, "kind"),
        # Two daemons on a node would keep one account, and give Prometheus every series twice.
        ({"updateStrategy": {"rollingUpdate": {"maxSurge": 1}}}, "maxSurge"),
        ({"config": {"web": {"config": {"file": "/x"}}}}, "config"),
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "nvidia.com/gpu"),
        ({"rules": {"overrides": {"JouletraceGpuLots": {"enabled": False}}}}, "JouletraceGpuLots"),
        ({"monitor": {"kind": "Both"}}, "kind"),
        ({"monitor": {"interval": "often"}}, "interval"),
        ({"service": {"port": "metrics"}}, "port"),
        ({"state": {"hostPath": "var/lib/jouletrace"}}, "hostPath"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"rules": {"wasteBudgetRatio": 0.2}}, "wasteBudgetRatio"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=re.escape(named)):
        render(values)


def test_the_schema_leaves_nothing_open() -> None:
    schema = values_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.Draft7Validator(schema).validate(defaults)
    open_objects = [
        path
        for path, node in schema_nodes(schema)
        if "properties" in node and node.get("additionalProperties") is not False
    ]
    assert [path for path in open_objects if not path.endswith("/properties")] == []

    def keys(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> set[str]:
        """Return the keys of the schema that have no default in values.yaml."""
        missing = set()
        for key, below in schema.get("properties", {}).items():
            if key not in values:
                missing.add(path + key)
            elif below.get("type") == "object" and values[key] and "properties" in below:
                missing |= keys(values[key], below, f"{path}{key}.")
        return missing

    theirs = {"affinity.podAffinity", "affinity.podAntiAffinity"}
    assert keys(defaults, schema) - theirs == {"global"}, "which Helm itself adds"


def test_the_readme_tells_of_every_value() -> None:
    table = re.findall(r"^\| `([A-Za-z.]+)` \| `(.*?)` \| (.+) \|$", (CHART / "README.md").read_text(), re.MULTILINE)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for value, shown, meaning in table:
        default = defaults
        for part in value.split("."):
            default = default.get(part)
        assert json.loads(shown) == default
        assert meaning.endswith((".", ")."))
    covered = {value.partition(".")[0] for value, _, _ in table}
    assert covered == set(defaults)


def test_the_package_is_complete(tmp_path: Path) -> None:
    helm_python.package(str(CHART), destination=str(tmp_path))
    (archive,) = tmp_path.glob("jouletrace-*.tgz")
    with tarfile.open(archive) as content:
        names = {name.removeprefix("jouletrace/") for name in content.getnames()}
    assert {"Chart.yaml", "values.schema.json", "README.md", "templates/daemonset.yaml"} <= names
    assert len([name for name in names if name.startswith("files/")]) == sum(
        path.is_file() for path in (CHART / "files").rglob("*")
    )
    assert not any(name.startswith("ci/") for name in names)


def test_the_release_is_named_after_itself_or_the_chart() -> None:
    assert only(rendering("default"), "DaemonSet")["metadata"]["name"] == f"{RELEASE}-jouletrace"
    assert only(rendering("bare"), "DaemonSet")["metadata"]["name"] == "energy"
    (pod_image,) = {c["image"] for c in pod_of(rendering("tls"))["containers"]}
    assert pod_image == f"registry.example/mirror/jouletrace@sha256:{'0123456789abcdef' * 4}"
