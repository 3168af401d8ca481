"""A board: rows of panels with variables and links, laid out, numbered and written as JSON.

grafana-foundation-sdk 0.0.21 neither wraps a line of panels nor gives them ids, hides links in a menu and leaves the
variables without a value; `Board.json` does these. Ids come from titles, so that links to a panel and the differences
of two versions stay small when a panel is put between others.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import DATASOURCE, FULL_WIDTH, Panel
from dashboards.queries import RECORDED, Scope
from jouletrace.metrics import names

TAG: Final = "jouletrace"
PAGES: Final = "https://github.com/jouletrace/jouletrace/blob/main"
"""Where the documents are that texts link to."""
ALERTS: Final = 'ALERTS{alertname=~"Jouletrace.+",alertstate="firing",%s}'
"""Alerts of this project's rules, still to be narrowed."""

VARIABLES: Final[Mapping[str, tuple[str, str, tuple[str, ...]]]] = {
    "cluster": ("Cluster", f"{RECORDED}cluster:gpus:sum", ()),
    "job": ("Job", names.BUILD_INFO.name, ()),
    "instance": ("Node", names.BUILD_INFO.name, ("job",)),
    "gpu": ("GPU", names.GPU_INFO.name, ("job", "instance")),
    "model": ("Model", f"{RECORDED}cluster_model:allocated_watts:rate5m", ("cluster",)),
    "tenant": ("Tenant", f"{RECORDED}cluster_model_tenant:allocated_watts:rate5m", ("cluster", "model")),
    "engine": ("Engine", names.ENGINE_CAUSE.name, ("job", "instance")),
}
"""Label, the series whose label values are offered, and the variables that narrow them."""
MAY_BE_EMPTY: Final = ("cluster", "model", "tenant")
"""Labels that may be missing (a fleet of one cluster) or empty (work without a tenant)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of panels under a heading."""

    title: str
    height: int
    panels: tuple[Panel, ...]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    name: str
    """As in its uid and file."""
    title: str
    description: str
    rows: tuple[Row, ...]
    scope: Scope = field(default_factory=Scope)
    single: tuple[str, ...] = ()
    """Variables of which one value is chosen, not several."""

    @property
    def uid(self) -> str:
        """Return the name under which links find it."""
        return uid(self.name)

    @property
    def panels(self) -> Iterator[Panel]:
        """Return all panels, in order."""
        for row in self.rows:
            yield from row.panels

    def json(self) -> str:
        """Return the dashboard in Grafana's classic format, always the same bytes for the same board."""
        built = msgspec.json.decode(JSONEncoder(sort_keys=True).encode(self._dashboard().build()))
        _without_menu(built)
        built["panels"] = self._placed(built["panels"])
        for variable in built["templating"]["list"]:
            if variable.get("includeAll"):
                variable["current"] = {"selected": True, "text": ["All"], "value": ["$__all"]}
        return JSONEncoder(sort_keys=True, indent=2).encode(built) + "\n"

    def _dashboard(self) -> dashboard.Dashboard:
        made = dashboard.Dashboard(f"jouletrace / {self.title}").uid(self.uid).description(self.description)
        made = made.tags([TAG, "gpu", "energy"]).timezone("browser").refresh("30s").time("now-1h", "now").readonly()
        made = made.tooltip(models.DashboardCursorSync.CROSSHAIR)
        made = made.link(
            dashboard.DashboardLink("jouletrace")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        made = made.link(
            dashboard.DashboardLink("What each panel says")
            .type(models.DashboardLinkType.LINK)
            .url(f"{PAGES}/docs/dashboards.md#{self.title.lower().replace(' ', '-')}")
            .target_blank(True)
        )
        made = made.annotation(
            dashboard.AnnotationQuery()
            .name("Alerts")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color("orange")
            .expr(ALERTS % ",".join(f'{name}=~"${name}|"' for name in self.scope.base))
            .title_format("{{alertname}}")
            .text_format("{{instance}} {{gpu}} {{model}}")
            .step("30s")
        )
        made = made.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        for name in (*self.scope.base, *self.scope.variables):
            made = made.with_variable(self._variable(name))
        for row in self.rows:
            made = made.with_row(dashboard.Row(row.title))
            for panel in row.panels:
                made = made.with_panel(_Placed(panel, row.height))
        return made

    def _variable(self, name: str) -> dashboard.QueryVariable:
        label, series, narrowed = VARIABLES[name]
        selector = ",".join(f'{one}=~"${one}"' for one in narrowed)
        query = f"label_values({series}{{{selector}}}, {name})" if selector else f"label_values({series}, {name})"
        variable = dashboard.QueryVariable(name).label(label).datasource(DATASOURCE)
        variable = variable.query({"query": query, "refId": name}).definition(query)
        variable = variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        variable = variable.sort(models.VariableSort.NATURAL_ASC)
        if name in self.single:
            return variable
        return variable.multi(True).include_all(True).all_value(".*" if name in MAY_BE_EMPTY else ".+")

    def _placed(self, built: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give every panel its place and its id."""
        panels, y = iter(built), 0
        placed: list[dict[str, Any]] = []
        for row in self.rows:
            heading = next(panels)
            heading |= {"id": _number(f"row {row.title}"), "gridPos": {"x": 0, "y": y, "w": FULL_WIDTH, "h": 1}}
            heading["collapsed"] = False
            placed.append(heading)
            x, y = 0, y + 1
            for panel in row.panels:
                if x + panel.width > FULL_WIDTH:
                    x, y = 0, y + row.height
                place = {"x": x, "y": y, "w": panel.width, "h": row.height}
                placed.append(next(panels) | {"id": _number(panel.title), "gridPos": place})
                x += panel.width
            y += row.height
        return placed


@dataclass(frozen=True, slots=True)
class _Placed(Builder[models.Panel]):
    """A panel with a size, for the SDK."""

    panel: Panel
    height: int

    def build(self) -> models.Panel:
        built = self.panel.build()
        built.grid_pos = models.GridPos(h=self.height, w=self.panel.width)
        return built


def uid(name: str) -> str:
    """Return the uid of the board of this name."""
    return f"jouletrace-{name}"


def link_to(scope: Scope, name: str, title: str, **labels: str) -> dashboard.DashboardLink:
    """Return a link to a board that keeps data source, time and what the board of `scope` is narrowed by.

    `labels`: variables that are set to what was clicked on, to Grafana's expressions, as
    `instance="${__field.labels.instance}"`.
    """
    kept = "&".join(f"${{{one}:queryparam}}" for one in ("datasource", *scope.base) if one not in labels)
    chosen = "".join(f"&var-{variable}={expression}" for variable, expression in labels.items())
    return dashboard.DashboardLink(title).url(f"/d/{uid(name)}?{kept}{chosen}&${{__url_time_range}}")


def _number(title: str) -> int:
    return zlib.crc32(title.encode()) % 1_000_000 + 1


def _without_menu(node: object) -> None:
    """Delete what hides links and annotations in a menu from Grafana 12.3 on."""
    if isinstance(node, dict):
        if node.get("placement") == "inControlsMenu":
            del node["placement"]
        for value in node.values():
            _without_menu(value)
    elif isinstance(node, list):
        for value in node:
            _without_menu(value)
