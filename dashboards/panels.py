"""The kinds of panels that the boards are made of, over grafana-foundation-sdk: one look for each kind of question."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

warnings.filterwarnings("ignore", category=DeprecationWarning, module="grafana_foundation_sdk")

from grafana_foundation_sdk.builders import (  # noqa: E402
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    text,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.cog.builder import Builder  # noqa: E402
from grafana_foundation_sdk.models import common as common_models  # noqa: E402
from grafana_foundation_sdk.models import dashboard as models  # noqa: E402
from grafana_foundation_sdk.models import heatmap as heatmap_models  # noqa: E402
from grafana_foundation_sdk.models import prometheus as prometheus_models  # noqa: E402
from grafana_foundation_sdk.models import xychart as xychart_models  # noqa: E402
from grafana_foundation_sdk.models.text import TextMode  # noqa: E402

from dashboards.queries import RECORDED, RULE_SECONDS, per  # noqa: E402

WATTS, JOULES, WATT_HOURS = "watt", "joule", "watth"
RATIO, SECONDS, CELSIUS, HERTZ = "percentunit", "s", "celsius", "hertz"
BYTES, BYTES_PER_SECOND, REQUESTS_PER_SECOND = "bytes", "Bps", "reqps"
COUNT, PER_SECOND, FACTOR = "short", "suffix:/s", "suffix:x"
TOKENS_PER_SECOND, TOKENS_PER_JOULE = "suffix:tok/s", "suffix:tok/J"

DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")

GREEN, YELLOW, ORANGE, RED = "green", "yellow", "orange", "red"
BLUE, PURPLE, GREY, LIGHT_GREY = "blue", "purple", "#8e8e8e", "#c7c7c7"
CYAN, PINK, BROWN = "#3fb6c6", "#e0559a", "#a5704b"

FULL_WIDTH = 24
"""Columns of Grafana's grid."""
WITHOUT_RULES: Final = "No data. Are the recording rules loaded?"
"""What a panel says that reads recorded series and finds none."""
MEANS_OF_A_DAY: Final = 288
"""Most points of a panel that reads recorded series, which are means of five minutes: a day loses nothing."""
LETTERS: Final = "ABCDEFGHIJKLMNOP"
"""Names of a panel's queries."""

Steps = Sequence[tuple[float | None, str]]
"""Thresholds: from which value on which colour; the first from None."""
IDLE_STEPS: Final[Steps] = ((None, GREEN), (0.2, YELLOW), (0.4, RED))
"""Idle share: from the fifth on that JouletraceGpusIdle tells of, and twice that."""
WASTED_STEPS: Final[Steps] = ((None, GREEN), (0.05, YELLOW), (0.1, RED))
"""Wasted share: red from the budget on that recording/waste.yml is shipped with."""
_AGREEMENT_STEPS: Final[Steps] = ((None, RED), (0.97, "transparent"), (1.03, RED))
"""Energy sensors agree within 3 %, as JouletraceSensorsDisagree has it."""
_AGE_STEPS: Final[Steps] = ((None, "transparent"), (10, RED))
"""Age of a sample in seconds, of which one is normal."""


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and what its series are called."""

    expression: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel without its place."""

    title: str
    description: str
    """What it says, in a sentence or two; also its row of docs/dashboards.md."""
    builder: Builder[models.Panel]
    width: int
    targets: Sequence[prometheus.Dataquery] = ()
    empty: str = ""
    """What a panel without data says, where having none is nothing to worry about."""

    def build(self) -> models.Panel:
        """Return the SDK's panel."""
        panel = self.builder.build()
        panel.title, panel.description = self.title, self.description
        if self.targets:
            targets = [target.build() for target in self.targets]
            recorded = any(_recorded(target.expr) for target in targets)
            panel.targets = list(targets)
            panel.field_config = panel.field_config or models.FieldConfigSource()
            panel.field_config.defaults.no_value = self.empty or (WITHOUT_RULES if recorded else None)
            if recorded:
                panel.max_data_points = MEANS_OF_A_DAY
        return panel


@dataclass(frozen=True, slots=True)
class Column:
    """One value column of a table."""

    name: str
    expression: str
    unit: str
    steps: Steps = ()
    """Colours of the cells."""


def timeline(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 12,
    stacked: bool = False,
    colors: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    dashed_color: str = "",
    least: float | None = 0,
    most: float | None = None,
    steps: Steps = (),
    link: dashboard.DashboardLink | None = None,
    empty: str = "",
    decimals: float | None = None,
    soft_least: float | None = None,
    soft_most: float | None = None,
    logarithmic: bool = False,
) -> Panel:
    """Return lines over time, or areas on top of each other.

    `colors` by series name; `dashed` are regular expressions of names whose lines are limits, not parts of a stack.
    `steps` draws thresholds as dashed lines; `soft_least` and `soft_most` are the ends of the axis while no value is
    beyond them.
    """
    # Areas without lines: the line of a part that is 0 would lie on the one below.
    panel = timeseries.Panel().unit(unit).datasource(DATASOURCE).line_width(0 if stacked else 1)
    panel = panel.fill_opacity(70 if stacked else 0).show_points(common_models.VisibilityMode.NEVER)
    panel = panel.legend(_legend())
    panel = panel.tooltip(
        common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    if logarithmic:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    elif least is not None:
        panel = panel.min(least)
    if soft_least is not None:
        panel = panel.axis_soft_min(soft_least)
    if soft_most is not None:
        panel = panel.axis_soft_max(soft_most)
    if most is not None:
        panel = panel.max(most)
    if decimals is not None:
        panel = panel.decimals(decimals)
    if steps:
        panel = panel.thresholds(thresholds(steps)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
        )
    for name, color in (colors or {}).items():
        panel = panel.override_by_name(name, [_fixed(color)])
    for pattern in dashed:
        panel = panel.override_by_regexp(
            f"/{pattern}/",
            [
                *([_fixed(dashed_color)] if dashed_color else []),
                models.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 6]}),
                models.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
                models.DynamicConfigValue(id_val="custom.lineWidth", value=2),
                models.DynamicConfigValue(id_val="custom.stacking", value={"mode": "none", "group": "A"}),
            ],
        )
    if link is not None:
        panel = panel.data_links([link])
    return Panel(title, description, panel, width, _targets(queries), empty)


def figure(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    steps: Steps = ((None, BLUE),),
    instant: bool = False,
    decimals: float | None = None,
    empty: str = "",
) -> Panel:
    """Return one number, with its course behind it unless it is `instant`."""
    panel = stat.Panel().unit(unit).datasource(DATASOURCE).thresholds(thresholds(steps))
    panel = panel.graph_mode(common_models.BigValueGraphMode.NONE if instant else common_models.BigValueGraphMode.AREA)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if decimals is not None:
        panel = panel.decimals(decimals)
    return Panel(title, description, panel, width, _targets([query], instant=instant), empty)


def energy(title: str, description: str, joules: str) -> Panel:
    """Return one number: an energy in the time shown, in watt-hours."""
    return figure(title, description, WATT_HOURS, Query(f"{joules} / 3600"), instant=True, decimals=1)


def share(title: str, description: str, part: str, whole: str, steps: Steps) -> Panel:
    """Return one number: an energy in the time shown as a part of another."""
    return figure(title, description, RATIO, Query(per(part, whole)), steps=steps, instant=True, decimals=1)


def agreement(title: str, description: str, *queries: Query, width: int = 8) -> Panel:
    """Return lines of how far energy sensors agree, with the band in which they should: never only the noise in it."""
    return timeline(
        title,
        description,
        RATIO,
        *queries,
        width=width,
        least=None,
        soft_least=0.96,
        soft_most=1.04,
        steps=_AGREEMENT_STEPS,
        decimals=1,
        empty="No GPU has a counter to compare with",
    )


def sample_age(title: str, description: str, query: Query, *, width: int = 8) -> Panel:
    """Return lines of how old the newest energy samples are, with the age at which something is wrong."""
    return timeline(title, description, SECONDS, query, width=width, steps=_AGE_STEPS)


def states(
    title: str,
    description: str,
    names: Mapping[str, str],
    *queries: Query,
    width: int = 12,
    first: int = 1,
    empty: str = "",
) -> Panel:
    """Return which state each row was in over time; `names` maps states, numbered from `first`, to colours."""
    mapping = models.ValueMap(
        options={
            str(number): models.ValueMappingResult(text=name, color=color, index=number - first)
            for number, (name, color) in enumerate(names.items(), first)
        }
    )
    panel = statetimeline.Panel().unit("none").datasource(DATASOURCE).mappings([mapping]).min(0)
    panel = panel.merge_values(True).row_height(0.8).fill_opacity(80).line_width(0)
    panel = panel.show_value(common_models.VisibilityMode.AUTO)
    panel = panel.legend(_legend())
    panel = panel.thresholds(thresholds([(None, "transparent")]))
    panel = panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    return Panel(title, description, panel, width, _targets(queries), empty)


def rows(
    title: str,
    description: str,
    by: Mapping[str, str],
    *columns: Column,
    width: int = FULL_WIDTH,
    link: tuple[str, dashboard.DashboardLink] | None = None,
    sort: str = "",
    empty: str = "",
) -> Panel:
    """Return a table: one row per combination of the labels `by` (label to heading), one column per expression.

    Every expression must be an aggregation by exactly these labels, or the rows do not merge.
    """
    panel = table.Panel().datasource(DATASOURCE).unit("short").min_width(80)
    # What a table says when it is empty is not what an empty cell says.
    panel = panel.override_by_regexp("/.*/", [models.DynamicConfigValue(id_val="noValue", value="-")])
    names: dict[str, str] = dict(by)
    targets = _targets([Query(column.expression) for column in columns], instant=True)
    for letter, column in zip(LETTERS, columns, strict=False):
        names[f"Value #{letter}"] = column.name
        properties = [models.DynamicConfigValue(id_val="unit", value=column.unit)]
        if column.steps:
            built = thresholds(column.steps).build()
            steps = {"mode": built.mode, "steps": [{"value": one.value, "color": one.color} for one in built.steps]}
            properties.append(models.DynamicConfigValue(id_val="thresholds", value=steps))
            properties.append(models.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"}))
        panel = panel.override_by_name(column.name, properties)
    order = [*by, *(f"Value #{letter}" for letter, _ in zip(LETTERS, columns, strict=False))]
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "indexByName": {name: place for place, name in enumerate(order)},
                "renameByName": names,
            },
        )
    )
    if sort:
        panel = panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(True)])
    if link is not None:
        on, target = link
        built_link = target.build()
        value = [{"title": built_link.title, "url": built_link.url, "targetBlank": False}]
        panel = panel.override_by_name(on, [models.DynamicConfigValue(id_val="links", value=value)])
    made = [target.format(prometheus_models.PromQueryFormat.TABLE) for target in targets]
    return Panel(title, description, panel, width, made, empty)


def heat(title: str, description: str, unit: str, query: Query, *, width: int = 12) -> Panel:
    """Return a histogram's buckets over time: the darker, the more."""
    panel = heatmap.Panel().datasource(DATASOURCE).calculate(False).unit(unit).show_legend()
    panel = panel.color(
        heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    )
    panel = panel.y_axis(heatmap.YAxisConfig().unit(unit))
    target = _target(query, "A").range().format(prometheus_models.PromQueryFormat.HEATMAP)
    return Panel(title, description, panel, width, [target])


def scatter(
    title: str,
    description: str,
    axes: tuple[tuple[str, str], tuple[str, str]],
    queries: Sequence[Query],
    pairs: Mapping[str, tuple[str, str, str]],
    *,
    width: int = 12,
    empty: str = "",
) -> Panel:
    """Return points: `axes` are (label, unit) of x and y; `pairs` maps a name to (legend of x, legend of y, colour)."""
    (x_label, x_unit), (y_label, y_unit) = axes
    panel = xychart.Panel().datasource(DATASOURCE).unit(y_unit).mapping(xychart_models.SeriesMapping.MANUAL)
    panel = panel.show(xychart_models.XYShowMode.POINTS).axis_label(y_label).min(0)
    panel = panel.legend(_legend())
    panel = panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.SINGLE))
    series: list[Builder[xychart_models.XYSeriesConfig]] = []
    for name, (x, y, color) in pairs.items():
        series.append(
            xychart.XYSeriesConfig()
            .name(xychart.XychartXYSeriesConfigName().fixed(name))
            .frame(xychart.XychartXYSeriesConfigFrame().matcher(xychart.MatcherConfig().id("byIndex").options(0)))
            .x(xychart.XychartXYSeriesConfigX().matcher(_named(x)))
            .y(xychart.XychartXYSeriesConfigY().matcher(_named(y)))
        )
        panel = panel.override_by_name(y, [_fixed(color)])
        panel = panel.override_by_name(
            x,
            [
                models.DynamicConfigValue(id_val="unit", value=x_unit),
                models.DynamicConfigValue(id_val="custom.axisLabel", value=x_label),
            ],
        )
    panel = panel.series(series)
    panel = panel.with_transformation(
        models.DataTransformerConfig(id_val="joinByField", options={"byField": "Time", "mode": "outer"})
    )
    return Panel(title, description, panel, width, _targets(queries), empty)


def words(title: str, description: str, markdown: str, *, width: int = FULL_WIDTH) -> Panel:
    """Return a text."""
    return Panel(title, description, text.Panel().mode(TextMode.MARKDOWN).content(markdown), width)


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    """Return absolute thresholds."""
    config = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
    return config.steps([models.Threshold(value=value, color=color) for value, color in steps])


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(True).display_mode(common_models.LegendDisplayMode.LIST)
    return legend.placement(common_models.LegendPlacement.BOTTOM).calcs([])


def _recorded(expression: str) -> bool:
    return RECORDED in expression


def _named(name: str) -> xychart.MatcherConfig:
    return xychart.MatcherConfig().id("byName").options(name)


def _fixed(color: str) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": color})


def _target(query: Query, letter: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expression).ref_id(letter).datasource(DATASOURCE)
    target = target.editor_mode(prometheus_models.QueryEditorMode.CODE).legend_format(query.legend)
    if _recorded(query.expression):
        # Shorter steps would show each recorded value several times, and find none in some.
        target = target.interval(f"{RULE_SECONDS}s")
    return target.exemplar(True) if query.exemplars else target


def _targets(queries: Sequence[Query], *, instant: bool = False) -> list[prometheus.Dataquery]:
    targets = [_target(query, letter) for query, letter in zip(queries, LETTERS, strict=False)]
    return [target.instant() if instant else target.range() for target in targets]
