"""What Grafana would ask Prometheus for a dashboard: panels, and their queries with the variables filled in."""

import json
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


def panels(dashboard: Json) -> list[Json]:
    """Return the panels without the rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def values(dashboard: Json, *, rate_interval: str, time_range: str, **chosen: str) -> dict[str, str]:
    """Return what every variable stands for: everything, or what is chosen."""
    result = {"__rate_interval": rate_interval, "__range": time_range}
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        result[name] = variable.get("allValue") or chosen.get(name) or str(variable.get("current", {}).get("value", ""))
    return result


def filled(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with its variables replaced."""
    return re.sub(r"\$\{?(\w+)(?::\w+)?\}?", lambda found: variables.get(found[1], found[0]), text)


def queries(dashboard: Json, variables: Mapping[str, str]) -> Iterator[Asked]:
    """Return every query of every panel."""
    for panel in panels(dashboard):
        for target in panel.get("targets", ()):
            expression = filled(target["expr"], variables)
            yield Asked(dashboard["uid"], panel["title"], expression, bool(target["instant"]))


def ask(url: str, query: Asked, *, end: float, seconds: float, step: float) -> list[Json]:
    """Return the series that a Prometheus answers with; raises HTTPError when it does not take the query."""
    parameters: dict[str, object] = {"query": query.expression}
    parameters |= {"time": end} if query.instant else {"start": end - seconds, "end": end, "step": step}
    kind = "query" if query.instant else "query_range"
    with urllib.request.urlopen(f"{url}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        result: list[Json] = json.load(answer)["data"]["result"]
    return result


def numbers(series: list[Json]) -> list[str]:
    """Return all values of an answer."""
    return [value for one in series for _, value in (one["values"] if "values" in one else [one["value"]])]
