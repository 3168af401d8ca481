"""Rules, alerts and runbooks: names and labels are real, every alert is described, tested and linked."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from tests.promql_labels import exported, result_labels

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RUNBOOKS = DEPLOY / "runbooks"
RUNBOOK_URL = "https://github.com/jouletrace/jouletrace/blob/main/deploy/runbooks/"
SEVERITIES = ("critical", "warning", "info")
IMPLIED = {"instance": {"cluster", "job"}, "gpu": {"cluster", "job", "instance", "uuid"}}
"""Labels that a level brings along besides those in its name."""


def rules(folder: str) -> Iterator[Mapping[str, Any]]:
    files = sorted((PROMETHEUS / folder).glob("*.yml"))
    assert files
    for file in files:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def known() -> dict[str, frozenset[str]]:
    """Return the labels of all metrics, recorded ones too; raises for a rule that finds nothing."""
    found = exported()
    for rule in rules("recording"):
        labels = result_labels(rule["expr"], found)
        assert labels is not None, rule
        assert rule["record"] not in found, f"{rule['record']} is recorded twice"
        found[rule["record"]] = labels
    return found


KNOWN = known()
RECORDED = [rule["record"] for rule in rules("recording")]
ALERTS = list(rules("alerts"))
ALERT_NAMES = sorted({alert["alert"] for alert in ALERTS})


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_name_says_its_labels(name: str) -> None:
    prefix, level, _, operation = name.split(":")
    assert prefix == "jouletrace"
    assert re.fullmatch(r"rate\d+[mhd]|ratio_rate\d+[mhd]|count|sum|min|max|ratio", operation)
    labels = set() if level == "fleet" else set(level.split("_"))
    for label in tuple(labels):
        labels |= IMPLIED.get(label, set())
    assert KNOWN[name] == labels


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_can_be_true_and_says_what_it_knows(alert: Mapping[str, Any]) -> None:
    labels = result_labels(alert["expr"], KNOWN)
    assert labels is not None
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url", "dashboard"}
    for annotation in annotations.values():
        used = set(re.findall(r"\$labels\.(\w+)", annotation))
        assert used <= labels | set(alert["labels"]), annotation
    assert re.fullmatch(r"[A-Z][^{}]*\.", annotations["summary"]) or annotations["summary"].startswith("jouletrace")
    assert re.fullmatch(r"Jouletrace([A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"]["severity"] in SEVERITIES
    assert "for" in alert
    assert annotations["runbook_url"] == f"{RUNBOOK_URL}{alert['alert']}.md"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_links_to_a_board_and_its_variables(alert: Mapping[str, Any]) -> None:
    link = urlsplit(alert["annotations"]["dashboard"])
    boards = {}
    for file in (ROOT / "dashboards" / "generated").glob("*.json"):
        board = json.loads(file.read_text())
        boards[f"/d/{board['uid']}"] = {f"var-{variable['name']}" for variable in board["templating"]["list"]}
    assert set(parse_qs(link.query)) <= boards[link.path]


@pytest.mark.parametrize("name", ALERT_NAMES)
def test_an_alert_has_a_runbook(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert re.findall(r"^#+ .*$", text, re.MULTILINE) == [
        *(f"# {name}", "## Meaning", "## Impact", "## Check", "## Fix", "## Silence"),
    ]
    for link in re.findall(r"\]\((\w+\.md)\)", text):
        assert (RUNBOOKS / link).exists(), link
    for block in re.findall(r"^```promql\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            result_labels(line.partition("  #")[0], KNOWN)


def test_no_runbook_is_left_over() -> None:
    assert sorted(file.stem for file in RUNBOOKS.iterdir()) == ALERT_NAMES


def test_every_alert_is_tested_firing_and_silent() -> None:
    silent, fired = set(), set()
    for file in (PROMETHEUS / "tests").glob("*.yml"):
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test.get("alert_rule_test", ()):
                for expected in case["exp_alerts"]:
                    labels = expected["exp_labels"]
                    fired |= {(case["alertname"], *map(labels.get, ("long", "basis")))}
                if not case["exp_alerts"]:
                    silent.add(case["alertname"])
    assert silent >= set(ALERT_NAMES)
    assert fired == {(alert["alert"], *map(alert["labels"].get, ("long", "basis"))) for alert in ALERTS}


def test_every_group_has_a_file_and_a_test_of_its_own() -> None:
    groups = {}
    for folder, ending in (("recording", "rules"), ("alerts", "alerts")):
        for file in (PROMETHEUS / folder).glob("*.yml"):
            [group] = yaml.safe_load(file.read_text())["groups"]
            assert group["name"] == f"jouletrace-{file.stem}.{ending}"
            groups[f"{folder}-{file.stem}"] = group
    assert sorted(groups) == sorted(file.stem for file in (PROMETHEUS / "tests").glob("*.yml"))


def test_every_recorded_metric_is_tested() -> None:
    tested = "".join(file.read_text() for file in (PROMETHEUS / "tests").glob("recording-*.yml"))
    alerts = "".join(alert["expr"] for alert in ALERTS)
    recorded = {rule["record"]: rule["expr"] for rule in rules("recording")}
    # A level in between is tested by the one that is computed from it.
    used = alerts + "".join(recorded.values())
    assert [name for name in recorded if name not in tested and name not in used] == []


def test_burn_rates_can_be_reached() -> None:
    [budget] = [rule["expr"] for rule in rules("recording") if rule["record"] == "jouletrace:fleet:waste_budget:ratio"]
    share = float(budget.removeprefix("vector(").removesuffix(")"))
    factors = [
        float(factor)
        for alert in ALERTS
        for factor in re.findall(r"> (\d+) \* scalar\(jouletrace:fleet:waste_budget:ratio\)", alert["expr"])
    ]
    assert len(factors) == 8
    assert max(factors) * share < 1
    # What recording/waste.yml promises.
    assert max(factors) * 0.16 < 1 < max(factors) * 0.17


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(jouletrace_gpu_energy_joule_total[5m])", "there is no metric"),
        ('jouletrace_idle_energy_joules_total{kin="bare"}', "no label kin"),
        ('jouletrace_idle_energy_joules_total{kind="bar"}', "is never bar"),
        ("sum by (model) (jouletrace_gpu_power_watts)", "no label model"),
        ("jouletrace_up > jouletrace_account_age_seconds", "match nothing"),
        ("jouletrace_gpu_power_watts and on (gpu) jouletrace_up", "no label gpu"),
        (
            "sum by (gpu) (jouletrace_gpu_power_watts) * on (gpu) group_left (model) jouletrace_gpu_info",
            "no label model",
        ),
    ],
)
def test_an_expression_that_finds_nothing_is_found(expression: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        result_labels(expression, KNOWN)
