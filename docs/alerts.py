"""Writes docs/alerts.md from the rule files of deploy/prometheus and the runbooks."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"

ALERTS = {
    "exporter": "The exporter itself",
    "gpu": "GPU faults",
    "throttling": "Throttling and power limits",
    "waste": "Wasted energy",
    "budget": "The waste budget",
    "cost": "Cost of a token",
}
"""Headings by file, in the order of the page."""
RECORDING = {
    "power": "Power and use",
    "waste": "Idle and wasted energy",
    "requests": "Requests and tokens",
    "exporter": "The exporters",
}

_PREAMBLE = """\
# Alerts and recording rules

<!-- Generated from deploy/ by docs/alerts.py. Change it there. -->

Prometheus 2.42 or later. Copy `deploy/prometheus/recording/` and `alerts/` to where `rule_files` looks;
`deploy/prometheus/prometheus.yml` and `deploy/alertmanager/alertmanager.yml` are examples to start from. `make rules`
checks and tests all of it.

## Set up

- **The scrape job is called `jouletrace`.** The first four rules of `alerts/exporter.yml` and one of
  `recording/exporter.yml` look for it; change it there when yours has another name.
- **The cluster** is the label `cluster` of the target (`labels:` of the scrape job, or a relabelling), as in
  `prometheus.yml`. An external label does not do: rules do not see it. Without the label everything is one cluster.
- **The waste budget**, the part of all GPU energy that may be wasted, is one line in `recording/waste.yml`:
  `vector(0.10)` under `jouletrace:fleet:waste_budget:ratio`. At most 0.16: the fastest alert waits for six times the
  budget. What counts as waste is in [diagnosis-engines.md](diagnosis-engines.md); how long a GPU may be parked before
  it counts is `diagnosis.parked_after`.
- **Severity**: `critical` wakes somebody, `warning` is work for the day, `info` is for dashboards; the example of
  Alertmanager routes them so. `dashboard` is a path: your templates put Grafana's address before it.
- **Requests are not needed**: alerts on the exporter, GPUs, throttling, parked, idle and underutilized GPUs and the
  budget work with the metrics of GPUs alone. Those that need engines stay silent without them.

A node that leaves the service discovery raises nothing. One that does not answer raises `JouletraceExporterDown` alone,
and many at once `JouletraceManyExportersDown` instead of one each.

"""

_RECORDED = """\
## Recording rules

`jouletrace:LEVEL:METRIC:OPERATION`. The level names the labels that are left: `cluster_model` is `cluster` and `model`;
`instance` has `job`, and `gpu` has `job`, `instance` and `uuid` besides. The boards Fleet, Requests and Waste and
parts of Diagnosis read these: of 10,000 GPUs a cluster has one series of each `cluster` rule, and long ranges are means
of those.
The six-hour and budget ratios weigh by energy, not by time.

10,000 GPUs on 1,250 nodes with 20 models and 50 tenants of each make 40,000 recorded series by GPU, 50,000 by
node, engine and model, 32,500 by node, 6,000 by model and tenant and under 1,300 for all the rest.

"""


def reference_markdown() -> str:
    """Return docs/alerts.md."""
    parts = [_PREAMBLE]
    for name, title in ALERTS.items():
        parts += [f"## {title}\n\n", "| alert | severity | after | means |\n|---|---|---|---|\n"]
        parts += [_alert(rule) for rule in _rules(f"alerts/{name}.yml")]
        parts.append("\n")
    parts.append(_RECORDED)
    for name, title in RECORDING.items():
        parts += [f"### {title}\n\n", "| metric | is |\n|---|---|\n"]
        parts += [f"| `{rule['record']}` | {_code(rule['expr'])} |\n" for rule in _rules(f"recording/{name}.yml")]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _rules(file: str) -> Iterable[Mapping[str, Any]]:
    for group in yaml.safe_load((DEPLOY / "prometheus" / file).read_text())["groups"]:
        yield from group["rules"]


def _alert(rule: Mapping[str, Any]) -> str:
    name, labels = rule["alert"], dict(rule["labels"])
    severity = labels.pop("severity")
    variant = "".join(f", {label} {value}" for label, value in labels.items())
    wait = "at once" if rule["for"] == "0m" else rule["for"]
    link = f"[{name}](../deploy/runbooks/{name}.md){variant}"
    return f"| {link} | {severity} | {wait} | {_meaning(name)} |\n"


def _meaning(alert: str) -> str:
    """Return the runbook's first section in one line."""
    text = (DEPLOY / "runbooks" / f"{alert}.md").read_text()
    return " ".join(text.partition("## Meaning\n")[2].partition("\n## ")[0].split())


def _code(expression: str) -> str:
    """Return an expression as code in one line of a table."""
    line = re.sub(r"\s+", " ", expression)
    line = re.sub(r"\( | \)", lambda found: found[0].strip(), line)
    return "`" + line.replace("|", "\\|") + "`"
