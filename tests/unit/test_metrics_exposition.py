import math
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tests.snapshots import (
    NOW_NS,
    diagnosis_snapshot,
    events,
    full_device,
    ledger_snapshot,
    node_snapshot,
    workload_snapshot,
)

from jouletrace.engines.otlp.tee import Drop, TeeCounts
from jouletrace.metrics import names
from jouletrace.metrics.device import device_collectors
from jouletrace.metrics.diagnosis import diagnosis_collectors
from jouletrace.metrics.exporter import BuildCollector, Exporter, ReloadCollector, SamplerCollector, SourceCollector
from jouletrace.metrics.exposition import render
from jouletrace.metrics.ledger import ledger_collectors
from jouletrace.metrics.otlp import TeeCollector
from jouletrace.metrics.workloads import WorkloadCollector

GOLDEN = Path("tests/golden")
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
# What the two big generations of Prometheus send.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def parse_openmetrics(text: str) -> Iterable[Metric]:
    """Parse strictly; the library forgot to annotate this one."""
    families: Iterable[Metric] = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return families


@dataclass(frozen=True, eq=False)
class Families:
    """A collector of what it is given."""

    families: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.families


@pytest.fixture(name="registry")
def fixture_registry() -> CollectorRegistry:
    """Everything but the process's own metrics, whose values nobody can fix."""
    registry = CollectorRegistry(auto_describe=True)
    collectors = (
        BuildCollector("0.1.0", "3.11.2"),
        *device_collectors(),
        *ledger_collectors(ledger_snapshot, events),
        TeeCollector(lambda: TeeCounts(120, dict(zip(Drop, (7, 2, 1, 3), strict=True)), 4096)),
        *diagnosis_collectors(diagnosis_snapshot, ledger_snapshot),
        WorkloadCollector(workload_snapshot),
        SourceCollector(),
        SamplerCollector(),
        ReloadCollector(lambda: {"web.config.file": True, "ingest.token_file": False, "engines.targets": True}),
    )
    exporter = Exporter(
        node_snapshot,
        collectors,
        now_ns=lambda: NOW_NS,
        heartbeat_age_seconds=lambda: 0.5,
        stale_after_seconds=5.0,
    )
    registry.register(exporter)
    return registry


@pytest.mark.parametrize(("accept", "file"), [("", "metrics.txt"), (OPENMETRICS, "metrics.openmetrics.txt")])
def test_the_whole_exposition_is_the_golden_one(registry: CollectorRegistry, accept: str, file: str) -> None:
    """Names are frozen. JOULETRACE_UPDATE_GOLDEN=1 rewrites the files; read the difference then."""
    body, _ = render(registry, accept)
    if os.environ.get("JOULETRACE_UPDATE_GOLDEN") == "1":
        (GOLDEN / file).write_bytes(body)
    assert body.decode() == (GOLDEN / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("accept", ["", OPENMETRICS, PROMETHEUS_3, f"{OPENMETRICS};escaping=dots"])
def test_lines_are_those_of_prometheus_client(registry: CollectorRegistry, accept: str) -> None:
    odd = GaugeMetricFamily("odd", 'Help with a \\, a "quote"\nand a line.', labels=("b", "a"))
    for number, value in enumerate((0.0, -0.0, 1e15, 123456789.5, 5e-324, math.inf, -math.inf, math.nan, 7)):
        odd.add_metric((f'\\ "{number}"\nü', ""), value)
    examples = CounterMetricFamily("examples", "With exemplars.")
    examples.add_metric((), 1, exemplar=Exemplar({"trace_id": 'a"b'}, 0.5))
    examples.add_metric((), 2, exemplar=Exemplar({}, 1e9, 1_700_000_000.25))
    registry.register(Families((odd, examples)))
    encode, content_type = choose_encoder(accept)
    assert render(registry, accept) == (encode(registry), content_type)


@pytest.mark.parametrize("metric", names.ALL, ids=lambda metric: metric.name)
def test_every_name_is_in_the_golden_exposition_with_help_and_type(metric: names.Metric) -> None:
    text = (GOLDEN / "metrics.txt").read_text(encoding="utf-8")
    assert f"# HELP {metric.name} {metric.help}\n" in text
    assert f"# TYPE {metric.name} {metric.type}\n" in text
    suffix = "_count" if metric.type in ("summary", "histogram") else ""
    lines = [
        line for line in text.splitlines() if line.startswith((metric.name + suffix + "{", metric.name + suffix + " "))
    ]
    assert lines
    for kind in metric.values:
        assert any(f'{metric.labels[-1]}="{kind}"' in line for line in lines), kind


def test_both_formats_parse_and_agree(registry: CollectorRegistry) -> None:
    text = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in parse_text(render(registry, "")[0].decode())
        for s in family.samples
    }
    openmetrics = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in parse_openmetrics(render(registry, OPENMETRICS)[0].decode())
        for s in family.samples
    }
    assert text == openmetrics
    assert len(text) > 70
    assert not [name for name, _ in text if name.endswith("_created")]


def test_quarrelsome_device_names_survive(registry: CollectorRegistry) -> None:
    for accept, parse in (("", parse_text), (OPENMETRICS, parse_openmetrics)):
        body = render(registry, accept)[0].decode()
        assert r'name="Board \"A\\B\"\n<b>&"' in body
        found = [s.labels["name"] for f in parse(body) for s in f.samples if s.name == "jouletrace_gpu_info"]
        assert found == ["NVIDIA H200", 'Board "A\\B"\n<b>&']


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html, */*;q=0.8", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=0.0.4", "text/plain; version=0.0.4; charset=utf-8"),
        ("nonsense;;;=,=;", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;version=0.0.1", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;version=9.9.9", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;version=x", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;version=1.0.0;q=0", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (
            PROMETHEUS_2,
            "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores",
        ),
        (
            PROMETHEUS_3,
            "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
        ),
    ],
)
def test_content_type_follows_accept(registry: CollectorRegistry, accept: str, content_type: str) -> None:
    body, answered = render(registry, accept)
    assert answered == content_type
    assert body.endswith(b"# EOF\n") == content_type.startswith("application/openmetrics-text")


def test_names_filter(registry: CollectorRegistry) -> None:
    body, _ = render(registry, "", ["jouletrace_gpu_power_watts", "jouletrace_driver_call_seconds_count"])
    found = {s.name for family in parse_text(body.decode()) for s in family.samples}
    assert found == {"jouletrace_gpu_power_watts", "jouletrace_driver_call_seconds_count"}
    assert render(registry, "", ["nothing"])[0] == b""


@pytest.mark.prometheus
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say() -> None:
    check = subprocess.run(
        ["promtool", "check", "metrics"],
        input=(GOLDEN / "metrics.txt").read_bytes(),
        capture_output=True,
        check=False,
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, b"")


def test_a_device_costs_ninety_series() -> None:
    text = (GOLDEN / "metrics.txt").read_text(encoding="utf-8")
    on_demand = tuple(metric.name for metric in names.WORKLOADS)
    series = [
        line
        for line in text.splitlines()
        if f'uuid="{full_device(0).info.uuid}"' in line and not line.startswith(on_demand)
    ]
    assert len(series) == 90
