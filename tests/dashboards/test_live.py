"""Every panel's query against a real Prometheus that scrapes the demo and a simulated node."""

import json
import shutil
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from dashboards.boards import boards, files

from tests.dashboards.asked import Json, Shown, ask, filled, numbers, panels, queries, values
from tests.dashboards.small_fleet import FIXED_JOULES, SEQUENCE_JOULES, TENANTS, small_fleet

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("gcc") is None, reason="prometheus or gcc is not installed"
    ),
    pytest.mark.timeout(180),
]

PATIENCE_SECONDS = 90.0
SHOWN = Shown(120, scrape_seconds=4, points=60)
"""The last two minutes; rates over 16 s."""
STAYS_EMPTY = {
    "Other products per second",
    "Records dropped",
    "Records that were dropped",
    "Rejected samples and counter resets",
    "Parts of the page that are missing",
    "Calls that failed",
    "Power by pod",
    "Age of the kubelet's last answer",
    "Questions that the kubelet did not answer",
    "Changed files that were refused",
    "Spans passed on",
    "Spans waiting",
}
"""Nothing of this happens in the small fleet; each of them must say so in a text of its own."""


def empty_panels(url: str, dashboards: list[Json]) -> set[str]:
    """Return the panels none of whose queries finds a number."""
    end, found = time.time(), set()
    for dashboard in dashboards:
        answers: dict[str, int] = {panel["title"]: 0 for panel in panels(dashboard) if panel["type"] != "text"}
        for query in queries(dashboard, values(dashboard, engine="vllm-0"), SHOWN):
            series = ask(url, query, end=end, seconds=SHOWN.seconds)
            answers[query.panel] += sum(value != "NaN" for value in numbers(series))
        found |= {title for title, count in answers.items() if not count}
    return found


def test_no_panel_is_empty_that_should_not_be(tmp_path: Path) -> None:
    dashboards = [json.loads(text) for text in files().values()]
    said = {panel.title for board in boards() for panel in board.panels if panel.empty}
    assert said >= STAYS_EMPTY
    with small_fleet(tmp_path, level_seconds=5, replay_speed=10, scrape_seconds=1, rule_seconds=1) as url:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (empty := empty_panels(url, dashboards)) - STAYS_EMPTY and time.monotonic() < deadline:
            time.sleep(3)
        assert empty == STAYS_EMPTY

        [diagnosis] = [one for one in dashboards if one["uid"] == "jouletrace-diagnosis"]
        variables = values(diagnosis, engine="vllm-0")
        [law] = [panel for panel in panels(diagnosis) if panel["title"] == "Law of a step"]
        # What the simulated engine was built to cost is what the panel says.
        for target, joules in zip(law["targets"], (FIXED_JOULES, SEQUENCE_JOULES), strict=True):
            query = urllib.parse.urlencode({"query": filled(target["expr"], variables)})
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
                [found] = json.load(answer)["data"]["result"]
            assert float(found["value"][1]) == pytest.approx(joules, rel=0.05)

        [requests] = [one for one in dashboards if one["uid"] == "jouletrace-requests"]
        [percentiles] = [p for p in panels(requests) if p["title"] == "Percentiles of joules per request"]
        [exemplars] = [target for target in percentiles["targets"] if target.get("exemplar")]
        variables = values(requests)
        asked = {
            "query": filled(exemplars["expr"], {**variables, "__interval": "60s"}),
            "start": time.time() - 120,
            "end": time.time(),
        }
        with urllib.request.urlopen(
            f"{url}/api/v1/query_exemplars?{urllib.parse.urlencode(asked)}", timeout=10
        ) as page:
            traces = [e["labels"]["trace_id"] for one in json.load(page)["data"] for e in one["exemplars"]]
        assert traces
        assert all(len(trace) == 32 for trace in traces)

        [tenants] = [v for v in requests["templating"]["list"] if v["name"] == "tenant"]
        metric = tenants["definition"].removeprefix("label_values(").partition("{")[0]
        with urllib.request.urlopen(f"{url}/api/v1/label/tenant/values?match[]={metric}", timeout=10) as page:
            assert set(TENANTS) <= set(json.load(page)["data"])
