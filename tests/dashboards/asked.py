"""What Grafana would ask Prometheus for a dashboard: panels, and their queries with the variables filled in."""

import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """One query of a panel."""

    board: str
    panel: str
    expression: str
    instant: bool
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Shown:
    """How a dashboard is looked at."""

    seconds: float
    """The time shown."""
    scrape_seconds: float
    """The scrape interval that the data source is told."""
    points: int = 1440
    """As wide as a panel is in pixels, unless it wants fewer."""


def panels(dashboard: Json) -> list[Json]:
    """Return the panels without the rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def values(dashboard: Json, **chosen: str) -> dict[str, str]:
    """Return what every variable stands for: everything, or what is chosen."""
    result = {}
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        result[name] = variable.get("allValue") or chosen.get(name) or str(variable.get("current", {}).get("value", ""))
    return result


def filled(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with its variables replaced."""
    return re.sub(r"\$\{?(\w+)(?::\w+)?\}?", lambda found: variables.get(found[1], found[0]), text)


def queries(dashboard: Json, variables: Mapping[str, str], shown: Shown) -> Iterator[Asked]:
    """Return every query of every panel, with the step and the intervals that Grafana's Prometheus plug-in makes."""
    for panel in panels(dashboard):
        points = panel.get("maxDataPoints", shown.points)
        for target in panel.get("targets", ()):
            least = float(target.get("interval", f"{shown.scrape_seconds}s").removesuffix("s"))
            step = max(least, math.ceil(shown.seconds / points))
            windows = {"__interval": step, "__rate_interval": max(step + least, 4 * least), "__range": shown.seconds}
            made = {**variables, **{name: f"{seconds:.0f}s" for name, seconds in windows.items()}}
            expression = filled(target["expr"], made)
            yield Asked(dashboard["uid"], panel["title"], expression, bool(target["instant"]), step)


def ask(url: str, query: Asked, *, end: float, seconds: float) -> list[Json]:
    """Return the series that a Prometheus answers with; raises HTTPError when it does not take the query."""
    parameters: dict[str, object] = {"query": query.expression}
    if query.instant:
        parameters |= {"time": end}
    else:
        parameters |= {"start": end - seconds, "end": end, "step": query.step_seconds}
    kind = "query" if query.instant else "query_range"
    with urllib.request.urlopen(f"{url}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        result: list[Json] = json.load(answer)["data"]["result"]
    return result


def numbers(series: list[Json]) -> list[str]:
    """Return all values of an answer."""
    return [value for one in series for _, value in (one["values"] if "values" in one else [one["value"]])]
