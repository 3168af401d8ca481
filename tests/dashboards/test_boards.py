"""The dashboards as files: current, valid, laid out, and made of metrics that exist."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dashboards.boards import GENERATED, boards, stale
from dashboards.reference import reference_markdown
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards import queries as outside
from dashboards import words
from jouletrace.diagnosis.causes import Cause
from jouletrace.diagnosis.drivers import Driver
from jouletrace.diagnosis.verdicts import Flag, Verdict
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.gpu.readings import ThrottleReason
from jouletrace.metrics import names
from tests.dashboards.asked import Json, Shown, filled, panels, queries, values
from tests.promql_labels import result_labels
from tests.unit.test_deploy_prometheus import KNOWN, rules

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests" / "data" / "grafana-schema"
SCHEMA_OF = {"state-timeline": "statetimeline"}
WITHOUT_SCHEMA = ("xychart",)
"""Checked by the round trip alone."""
BOARDS = {file.stem: json.loads(file.read_text()) for file in sorted(GENERATED.glob("*.json"))}
NOT_SHOWN = {
    names.GPU_POWER_WATTS: "one sample of a fast signal; the boards show the rate of joules",
    names.GPU_DRAM_BYTES: "the bandwidth ratio says it without the peak of each GPU",
}
WINDOWS = ("$__rate_interval", "$__interval", "$__range", "5m")
"""What functions over time are taken over: Grafana's, and the smoothing of quotients."""
RECORDED = {rule["record"]: rule["expr"] for rule in rules("recording")}
FLEET_BOARDS = ("jouletrace-fleet", "jouletrace-requests")


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest) -> Json:
    return BOARDS[request.param]


def base(dashboard: Json) -> tuple[str, ...]:
    """Return what the board is narrowed by before anything else."""
    return ("cluster",) if dashboard["uid"] in FLEET_BOARDS else ("job", "instance")


def expressions(dashboard: Json) -> Iterator[tuple[str, str]]:
    for panel in panels(dashboard):
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def test_the_committed_files_are_what_the_boards_write() -> None:
    assert stale(GENERATED) == [], "run `make dashboards`"
    assert len(BOARDS) == len(boards()) == 6


def test_the_sdk_reads_back_every_key(board: Json) -> None:
    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    # What `Board.json` corrects is added by the SDK again.
    for panel in again["panels"]:
        for link in panel.get("fieldConfig", {}).get("defaults", {}).get("links", ()):
            link.pop("placement", None)
    for link in [*again["links"], *again["annotations"]["list"]]:
        link.pop("placement", None)
    assert again == board


def relaxed(node: Any) -> Any:
    """The schemas write "any" as an object without properties; make it any."""
    if isinstance(node, dict):
        if node.get("type") == "object" and node.get("additionalProperties") == {} and "properties" not in node:
            return {}
        return {key: relaxed(value) for key, value in node.items()}
    return [relaxed(one) for one in node] if isinstance(node, list) else node


def assert_valid(name: str, instance: Any, definition: str = "") -> None:
    schema = relaxed(json.loads((SCHEMAS / f"{name}.jsonschema.json").read_text()))
    if definition:
        if definition not in schema["definitions"]:
            assert not instance
            return
        schema["$ref"] = f"#/definitions/{definition}"
    found = [f"{list(e.absolute_path)}: {e.message}" for e in jsonschema.Draft7Validator(schema).iter_errors(instance)]
    assert not found, f"{name} {definition}"


def test_grafanas_schemas(board: Json) -> None:
    assert_valid("dashboard", board)
    for panel in panels(board):
        for target in panel.get("targets", ()):
            assert_valid("prometheus", target)
        kind = SCHEMA_OF.get(panel["type"], panel["type"])
        if kind not in WITHOUT_SCHEMA:
            assert_valid(kind, panel["options"], "Options")
            assert_valid(kind, panel.get("fieldConfig", {}).get("defaults", {}).get("custom", {}), "FieldConfig")


def test_places_and_ids(board: Json) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(ids)) == len(ids)
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    assert len({y for _, y in taken}) == max(y for _, y in taken) + 1, "a gap between rows"


def test_every_panel_says_what_it_shows_in_which_unit(board: Json) -> None:
    for panel in panels(board):
        assert panel["title"]
        assert re.search(r"[.:)] ?$|\.\)?$", panel["description"]), panel["description"]
        if panel["type"] != "text":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["targets"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
            assert all(target["instant"] != target["range"] for target in panel["targets"])


def test_variables(board: Json) -> None:
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert list(variables)[: 1 + len(base(board))] == ["datasource", *base(board)]
    asked = " ".join(expression for _, expression in expressions(board))
    for name, variable in variables.items():
        assert variable["label"]
        if variable["type"] == "query":
            assert variable["refresh"] == 2
            assert variable["datasource"]["uid"] == "${datasource}"
            assert re.fullmatch(r"label_values\(jouletrace[\w:]+(\{.+\})?, \w+\)", variable["definition"])
        assert variable["type"] == "datasource" or f"${name}" in asked, f"{name} narrows nothing"
    # Numbers are groups of label_replace.
    used = set(re.findall(r"\$([a-z_]\w*)", asked)) - {"__rate_interval", "__interval", "__range"}
    assert used <= variables.keys()


def test_every_query_is_narrowed_and_takes_a_window_that_fits(board: Json) -> None:
    for title, expression in expressions(board):
        selectors = re.findall(r"\b([a-z][\w:]*)\{([^}]*)\}", expression)
        assert selectors, title
        for name, matchers in selectors:
            # Prometheus' own series about a scrape are not in the list.
            narrowing = [one for one in base(board) if one in KNOWN.get(name, base(board))]
            assert all(f'{one}=~"${one}"' in matchers for one in narrowing), (title, name)
        assert set(re.findall(r"\[([^\]]+)\]", expression)) <= set(WINDOWS), title
        for counter in re.findall(r"\b\w+_total\{[^}]*\}(?!\[)", expression):
            assert f"unless {counter} offset" in expression or f"{counter} unless" in expression, (title, counter)


def test_no_link_leads_nowhere(board: Json) -> None:
    text = json.dumps(board)
    assert {uid.removeprefix("/d/") for uid in re.findall(r"/d/[a-z-]+", text)} <= BOARDS.keys()
    for page, anchor in re.findall(r"blob/main/([\w./-]+)(?:#([\w-]+))?", text):
        # The page of the dashboards is made from them.
        content = reference_markdown() if page == "docs/dashboards.md" else ""
        if not content:
            assert (ROOT / page).exists(), page
            content = (ROOT / page).read_text() if (ROOT / page).is_file() else ""
        headings = {
            re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
            for h in re.findall(r"^#+ (.+)$", content, re.MULTILINE)
        }
        assert not anchor or anchor in headings, f"{page}#{anchor}"


def test_alerts_lead_to_boards_that_exist() -> None:
    found = [
        uid
        for file in (ROOT / "deploy" / "prometheus" / "alerts").glob("*.yml")
        for uid in re.findall(r"/d/([a-z-]+)", file.read_text())
    ]
    assert set(found) <= BOARDS.keys()


def recorded_from(expression: str) -> Iterator[str]:
    """Return the expressions of the rules that an expression rests on."""
    for name in re.findall(r"jouletrace:[\w:]+", expression):
        yield RECORDED[name]
        yield from recorded_from(RECORDED[name])


def test_the_fleet_is_read_from_sums_of_clusters_and_nodes() -> None:
    for title, expression in expressions(BOARDS["jouletrace-fleet"]):
        found = re.findall(r"\b([a-z][\w:]*)\{", expression)
        assert found, title
        assert all(re.match(r"jouletrace:(cluster|instance)", name) for name in found), title


def test_what_a_recorded_value_stands_for() -> None:
    files = (ROOT / "deploy" / "prometheus" / "recording").glob("*.yml")
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert {group["interval"] for group in groups} == {f"{outside.RULE_SECONDS // 60}m"}


def test_labels_of_every_query_are_there(board: Json) -> None:
    # An empty value is one of every label.
    variables = dict.fromkeys(("cluster", "job", "instance", "gpu", "model", "tenant", "engine"), "")
    variables |= {"__rate_interval": "1m", "__interval": "1m", "__range": "1h"}
    scraped = dict.fromkeys(("scrape_duration_seconds", "scrape_samples_scraped"), KNOWN["up"])
    for title, expression in expressions(board):
        try:
            result_labels(filled(expression, variables), KNOWN | scraped)
        except ValueError as error:
            pytest.fail(f"{title}: {error}")


def test_only_metrics_that_there_are_and_each_of_them() -> None:
    direct = [expression for board in BOARDS.values() for _, expression in expressions(board)]
    asked = " ".join(direct)
    found = set(re.findall(r"(?<![\w\":])([a-z_]+)\{", asked))
    assert set(re.findall(r"jouletrace:[\w:]+", asked)) <= RECORDED.keys()
    for expression in direct:
        found |= set(re.findall(r"\bjouletrace_\w+", " ".join(recorded_from(expression))))
    known = {metric.name for metric in names.ALL}
    parts = {m.name + suffix for m in names.ALL if m.type != "gauge" for suffix in ("_bucket", "_sum", "_count")}
    foreign = {one.name for one in vars(outside).values() if isinstance(one, names.Metric)}
    assert found <= known | parts | foreign
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in found} | found
    missing = known - shown - {metric.name for metric in NOT_SHOWN}
    assert missing == set()
    assert not shown & {metric.name for metric in NOT_SHOWN}, "shown after all"


def test_words_for_every_member() -> None:
    for wording, members in (
        (words.DRIVER_COLORS, Driver),
        (words.VERDICT_COLORS, Verdict),
        (words.FLAG_COLORS, Flag),
        (words.THROTTLE_COLORS, ThrottleReason),
        (words.CAUSE_COLORS, Cause),
        (words.WASTE_COLORS, WasteCause),
        (words.CAUSE_ADVICE, Cause),
        (words.PART_COLORS, names.ENGINE_UNIT_ENERGY_JOULES.values),
    ):
        # In the same order: states are numbered by it.
        assert list(wording) == list(members)


@pytest.mark.prometheus
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    rules = []
    for board in BOARDS.values():
        variables = values(board, engine="vllm-0")
        rules += [one.expression for one in queries(board, variables, Shown(3600, 15))]
        rules += [filled(annotation["expr"], variables) for annotation in board["annotations"]["list"]]
    groups = [{"name": "boards", "rules": [{"record": f"board:{i}", "expr": e} for i, e in enumerate(rules)]}]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": groups}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
