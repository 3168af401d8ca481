"""A recording over time as inline SVG: power, drivers, verdicts, flags and phases on one time axis.

Shapes are drawn in a picture that stretches to the page's width; text and marks stand beside it at positions in
percent, so that letters keep their size from a telephone to a wall. Nothing here needs a script.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from jouletrace.diagnosis.verdicts import Verdict
from jouletrace.gpu.readings import Float64s, Int64s
from jouletrace.trace.recording import ENERGY_COUNTER, POWER_AVERAGE, POWER_INSTANT, POWER_RING, Recording
from jouletrace.trace.report import clean, phase_labels, printable

NS = 1_000_000_000
COLUMNS = 1200
"""Points of a curve over the page: more than a screen's pixels for it, and 100 kB however long the recording."""
MARK_COLUMNS = 400
"""Places of verdicts and flags over the page: each mark takes 200 bytes, a point of a curve 8."""
LEVELS = 1000
"""Height of the stretched picture in its own units: whole numbers keep the page small."""
GAP_NS = 1 * NS
"""Power readings further apart are not joined (the ring's longest spacing on an H200: 48 ms)."""
MOST_PHASES = 300
"""Phases drawn and listed: the longest; more would be narrower than a letter."""
MOST_LANES = 3
"""Rows for phases that overlap."""
LANE_HEIGHT = 18
FLAG_HEIGHT = 26
"""A row of flags: its name, and its marks under it, pixels."""

VERDICTS: tuple[str, ...] = tuple(Verdict)
"""In the order of the legend and of the styles."""


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The time that all charts of a page span: (start_ns, end_ns]."""

    start_ns: int
    end_ns: int

    def part(self, t_ns: float) -> float:
        """Return where a time lies, 0 to 1; times outside at the edges."""
        return min(max((t_ns - self.start_ns) / (self.end_ns - self.start_ns), 0.0), 1.0)

    def percent(self, t_ns: float) -> str:
        """Return where a time lies, as an SVG length."""
        return f"{100 * self.part(t_ns):.3f}%"

    def width(self, start_ns: float, end_ns: float) -> str:
        """Return how long a span is, as an SVG length."""
        return f"{100 * max(self.part(end_ns) - self.part(start_ns), 0.0):.3f}%"

    def edges_ns(self, columns: int) -> Float64s:
        """Return the edges of equal columns, shape (columns + 1,)."""
        return np.linspace(self.start_ns, self.end_ns, columns + 1)


def node(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """Return an element; its text and attributes are escaped when it is written, whoever they are from.

    Attributes: a trailing underscore is dropped (`class_`), others stand for hyphens; None leaves one out.
    """
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    element = Element(tag, {names[key]: clean(str(one)) for key, one in attributes.items() if one is not None})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + clean(child)
        elif child is not None:
            element.text = (element.text or "") + clean(child)
    return element


# -------------------------------------------------------------------- power


@dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """The least and the greatest power of each column of time, watts, shape (columns,); NaN where none is known."""

    low_watts: Float64s
    high_watts: Float64s
    mean_watts: Float64s


def power_of(recording: Recording) -> tuple[Int64s, Float64s, bool]:
    """Return times, watts and whether a value holds until the next row, from the best sensor of the recording.

    Watts of the counter are its rise between two rows. Empty arrays without any.
    """
    for name in (POWER_RING, ENERGY_COUNTER, POWER_INSTANT, POWER_AVERAGE):
        stream = recording.streams.get(name)
        if stream is None:
            continue
        values = stream.values["mj" if name == ENERGY_COUNTER else "mw"]
        known = np.isfinite(values)
        t_ns, milli = stream.t_ns[known], values[known]
        if len(t_ns) < 2:
            continue
        if name != ENERGY_COUNTER:
            return t_ns, milli / 1e3, name != POWER_RING
        rises = np.diff(milli)
        sound = rises >= 0
        return t_ns[1:][sound], (rises / 1e3 / (np.diff(t_ns) / NS))[sound], False
    return np.empty(0, np.int64), np.empty(0), False


def envelope(t_ns: Int64s, watts: Float64s, axis: TimeAxis, *, holds: bool, columns: int = COLUMNS) -> Envelope:
    """Return power by column of the axis: no peak is lost, however many readings share a column.

    A column without a reading shows the one before it; not across a gap, unless a value `holds` until the next.
    """
    inside = (t_ns >= axis.start_ns) & (t_ns <= axis.end_ns)
    times, watts = t_ns[inside], watts[inside]
    if not len(times):
        nothing = np.full(columns, np.nan)
        return Envelope(nothing, nothing, nothing)
    edges = axis.edges_ns(columns)
    first = np.searchsorted(times, edges[:-1])
    last = np.append(first[1:], len(times))
    filled = last > first
    starts = first[filled]
    low, high, mean = (np.full(columns, np.nan) for _ in range(3))
    # The filled columns' readings follow one another without a hole: each one ends where the next begins.
    low[filled] = np.minimum.reduceat(watts, starts)
    high[filled] = np.maximum.reduceat(watts, starts)
    mean[filled] = np.add.reduceat(watts, starts) / (last - first)[filled]
    before = np.maximum(first - 1, 0)
    after = np.minimum(first, len(times) - 1)
    between = ~filled & (first > 0) & (holds | ((times[after] - times[before] <= GAP_NS) & (first < len(times))))
    for values in (low, high, mean):
        values[between] = watts[before[between]]
    return Envelope(low, high, mean)


def power_chart(found: Envelope, axis: TimeAxis, limit_watts: float | None) -> Element:
    """Return the power trace: a band from the least to the greatest of each column, and the mean as a line."""
    known = np.isfinite(found.high_watts)
    top = nice_top(max(float(found.high_watts[known].max(initial=0.0)), limit_watts or 0.0))
    columns = len(found.high_watts)
    picture = node("svg", viewBox=f"0 0 {columns} {LEVELS}", preserveAspectRatio="none", class_="shapes")
    band, line = [], []
    for start, end in runs(known):
        xs = range(start, end)
        upper = _points(xs, found.high_watts[start:end], top)
        lower = _points(xs, found.low_watts[start:end], top)
        # A column is as wide as its time: without this a lone column would have no area.
        upper.append((end, upper[-1][1]))
        lower.append((end, lower[-1][1]))
        band.append(_path([*upper, *reversed(lower)]) + "Z")
        line.append(_path([*_points(xs, found.mean_watts[start:end], top)]))
    picture.append(node("path", d="".join(band), class_="envelope"))
    picture.append(node("path", d="".join(line), class_="mean"))
    marks = [*grid(axis), picture, *scale(top)]
    if limit_watts:
        y = f"{100 * (1 - limit_watts / top):.2f}%"
        marks.append(node("line", x1="0", x2="100%", y1=y, y2=y, class_="limit"))
        marks.append(node("text", f"limit {limit_watts:.0f} W", x="100%", y=y, dx=-4, dy=-4, class_="limit over end"))
    highest = float(found.high_watts[known].max(initial=0.0))
    label = f"Power over time; the highest reading is {highest:.0f} W"
    return node("svg", *marks, class_="chart tall", role="img", aria_label=label)


# -------------------------------------------------------------------- drivers


def driver_chart(series: Mapping[str, Any], drivers: Sequence[str], axis: TimeAxis) -> Element:
    """Return the drivers' watts as areas on top of one another, the first lowest; `.driver0` is the first's style."""
    ends = np.array(series["times_ns"], np.int64)
    seconds = np.array(series["seconds"], float)
    joules = np.array([series["joules"][driver] for driver in drivers], float)
    # A span that nobody could explain is a hole in the areas, not a time without power.
    explained = np.isfinite(joules).all(axis=0)
    ends, seconds, joules = ends[explained], seconds[explained], joules[:, explained]
    columns = min(COLUMNS // 2, max(round((axis.end_ns - axis.start_ns) / NS), 1))
    watts, known = column_watts(ends, seconds, np.maximum(joules, 0.0), axis.edges_ns(columns))
    stacked = np.vstack([np.zeros(columns), np.cumsum(watts, axis=0)])
    top = nice_top(float(stacked[-1].max(initial=0.0)))
    picture = node("svg", viewBox=f"0 0 {columns} {LEVELS}", preserveAspectRatio="none", class_="shapes")
    for at, driver in enumerate(drivers):
        pieces = []
        for start, end in runs(known):
            upper = _steps(start, stacked[at + 1][start:end], top)
            lower = _steps(start, stacked[at][start:end], top)
            pieces.append(_path([*upper, *reversed(lower)]) + "Z")
        picture.append(node("path", node("title", printable(driver)), d="".join(pieces), class_=f"driver{at}"))
    label = "Power over time by driver, stacked: " + ", ".join(drivers)
    return node("svg", *grid(axis), picture, *scale(top), class_="chart tall", role="img", aria_label=label)


def column_watts(ends_ns: Int64s, seconds: Float64s, joules: Float64s, edges_ns: Float64s) -> tuple[Float64s, Any]:
    """Return the mean watts in each column, shape (drivers, columns), and which columns have any: energy is kept.

    A span's joules spread evenly over it. `joules` has the shape (drivers, spans).
    """
    begins, ends = ends_ns - seconds * NS, ends_ns.astype(float)
    order = np.stack([begins, ends], axis=1).ravel()
    covered = _integral(order, np.stack([seconds, np.zeros_like(seconds)], axis=1).ravel(), edges_ns)
    known = covered > 0
    rows = []
    for row in joules:
        parts = _integral(order, np.stack([row, np.zeros_like(row)], axis=1).ravel(), edges_ns)
        rows.append(np.divide(parts, covered, out=np.zeros_like(parts), where=known))
    return np.array(rows), known


def _integral(nodes_ns: Float64s, amounts: Float64s, edges_ns: Float64s) -> Float64s:
    """Return how much falls between the edges; `amounts[i]` lies between nodes i and i + 1."""
    if not len(nodes_ns):
        return np.zeros(len(edges_ns) - 1)
    # Rounding may put a span's begin a hair before the end of the one before it.
    times = np.maximum.accumulate(nodes_ns)
    total = np.concatenate([[0.0], np.cumsum(amounts)[:-1]])
    parts: Float64s = np.diff(np.interp(edges_ns, times, total))
    return parts


# -------------------------------------------------------------------- verdicts, flags, phases


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time with one and the same name."""

    name: str
    start_ns: int
    end_ns: int


def stretches(names: Sequence[str | None], ends_ns: Sequence[int], seconds: Sequence[float]) -> list[Stretch]:
    """Return what follows one another under one name as one stretch; None and holes in time part them."""
    found: list[Stretch] = []
    for name, end_ns, length in zip(names, ends_ns, seconds, strict=True):
        start_ns = end_ns - round(length * NS)
        if name is None:
            continue
        if found and found[-1].name == name and start_ns - found[-1].end_ns < NS // 100:
            found[-1] = Stretch(name, found[-1].start_ns, end_ns)
        else:
            found.append(Stretch(name, start_ns, end_ns))
    return found


def drawable(found: Sequence[Stretch], axis: TimeAxis) -> list[Stretch]:
    """Return one stretch of a name a column at most: what flaps faster than the page can show stays small."""
    kept: dict[tuple[int, str], Stretch] = {}
    for one in found:
        key = (int(axis.part(one.start_ns) * MARK_COLUMNS), one.name)
        kept[key] = Stretch(one.name, kept[key].start_ns, one.end_ns) if key in kept else one
    return list(kept.values())


def verdict_band(found: Sequence[Stretch], axis: TimeAxis) -> Element:
    """Return the verdicts as a coloured band."""
    band = node("svg", class_="chart band", role="img", aria_label="Verdict over time; the tables say it in words")
    for one in drawable(found, axis):
        place = {"x": axis.percent(one.start_ns), "width": axis.width(one.start_ns, one.end_ns), "height": "100%"}
        title = f"{one.name}, {span_text(one.start_ns, one.end_ns, axis)}"
        # An inner picture cuts its text off at its edge.
        box = node("svg", node("title", title), **place)
        box.append(node("rect", width="100%", height="100%", class_=verdict_class(one.name)))
        part = axis.part(one.end_ns) - axis.part(one.start_ns)
        if part > 0.02:
            box.append(node("text", one.name, x=4, y="50%", dy="0.35em", class_=_inside(part)))
        band.append(box)
    return band


def flag_rows(found: Sequence[Stretch], names: Sequence[str], axis: TimeAxis) -> Element:
    """Return a row for each flag with a mark wherever it was raised."""
    height = FLAG_HEIGHT * len(names)
    marks = node("svg", class_="chart", height=height, role="img", aria_label="Flags over time: " + ", ".join(names))
    for at, name in enumerate(names):
        marks.append(node("text", name, x=0, y=FLAG_HEIGHT * at + 11))
        y = FLAG_HEIGHT * at + 18.5
        marks.append(node("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
    for one in drawable(found, axis):
        y = FLAG_HEIGHT * names.index(one.name) + 14
        title = node("title", f"{one.name}, {span_text(one.start_ns, one.end_ns, axis)}")
        place = {"x": axis.percent(one.start_ns), "width": axis.width(one.start_ns, one.end_ns)}
        marks.append(node("rect", title, y=y, height=9, class_="flag", **place))
    return marks


def phase_rows(phases: Iterable[tuple[int, Mapping[str, Any]]], axis: TimeAxis) -> Element:
    """Return numbered phases as boxes; those that overlap stand in up to three rows, more are left out."""
    ends: list[int] = []
    boxes = []
    for number, phase in phases:
        start_ns, end_ns = phase["start_ns"], phase["end_ns"]
        lane = next((at for at, busy_until_ns in enumerate(ends) if busy_until_ns <= start_ns), len(ends))
        if lane == MOST_LANES:
            continue
        ends[lane : lane + 1] = [end_ns]
        name = f"{phase['name']} {phase_labels(phase)}".strip()
        title = node("title", printable(f"{number}. {name}, {span_text(start_ns, end_ns, axis)}"))
        part = axis.part(end_ns) - axis.part(start_ns)
        y = lane * LANE_HEIGHT
        box = node("svg", title, x=axis.percent(start_ns), width=f"{100 * part:.3f}%", y=y, height=LANE_HEIGHT - 2)
        box.append(node("rect", width="100%", height="100%", class_="phase"))
        if part > 0.006:
            box.append(node("text", f"{number} {printable(phase['name'])}", x=3, y=12, class_=_inside(part)))
        boxes.append(box)
    height = LANE_HEIGHT * max(len(ends), 1)
    label = "Phases over time, numbered as in the table"
    return node("svg", *boxes, class_="chart", height=height, role="img", aria_label=label)


def _inside(part: float) -> str:
    """Return the style of a text in a box that takes a part of the width.

    Two digits need about 16 px: on a telephone that is 5 % of the page, on a wide screen 1 %.
    """
    return "inside" if part > 0.05 else "inside middling" if part > 0.025 else "inside small"


def verdict_class(verdict: str) -> str:
    """Return the style of a verdict."""
    return f"verdict{VERDICTS.index(verdict)}" if verdict in VERDICTS else "verdict-unknown"


def share_bar(parts: Sequence[float], style: str) -> Element:
    """Return one bar that shows shares; its pieces have the styles `{style}0`, `{style}1`, ..."""
    positive = [max(part, 0.0) for part in parts]
    total = sum(positive)
    bar = node("svg", class_="share", aria_hidden="true")
    x = 0.0
    for at, part in enumerate(positive):
        share = 100 * part / total if total else 0.0
        if share:
            bar.append(node("rect", x=f"{x:.2f}%", width=f"{share:.2f}%", height="100%", class_=f"{style}{at}"))
        x += share
    return bar


# -------------------------------------------------------------------- axes and paths


def grid(axis: TimeAxis) -> list[Element]:
    """Return lines at four levels and at the time ticks; they lie behind the shapes."""
    times = [axis.percent(tick_ns) for tick_ns, _ in ticks(axis)]
    upright = [node("line", x1=x, x2=x, y1="0", y2="100%", class_="grid") for x in times]
    return upright + [node("line", x1="0", x2="100%", y1=y, y2=y, class_="grid") for y in ("0%", "25%", "50%", "75%")]


def scale(top: float) -> list[Element]:
    """Return the watts of the four levels as figures; they lie before the shapes."""
    levels = ((0, 1.0), (25, 0.75), (50, 0.5), (75, 0.25))
    return [node("text", f"{top * part:g} W", x=4, y=f"{y}%", dy=12, class_="over") for y, part in levels]


def time_axis(axis: TimeAxis) -> Element:
    """Return the time since the recording's begin as figures."""
    marks = []
    found = ticks(axis)
    for at, (tick_ns, text) in enumerate(found):
        # Every second figure gives way on a narrow screen.
        style = "over middling" if at % 2 else "over"
        marks.append(node("text", text, x=axis.percent(tick_ns), y=12, dx=2, class_=style))
    return node("svg", *marks, class_="chart", height=16, aria_hidden="true")


def ticks(axis: TimeAxis) -> list[tuple[int, str]]:
    """Return about eight round times since the begin, with their text."""
    seconds = (axis.end_ns - axis.start_ns) / NS
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)
    step = next((one for one in steps if seconds / one <= 9), 86_400 * math.ceil(seconds / 86_400 / 9))
    return [(axis.start_ns + round(at * step * NS), clock_text(at * step)) for at in range(int(seconds / step) + 1)]


def clock_text(seconds: float) -> str:
    """Return a time since the begin: `12.5 s`, `3:20`, `1:03:20`."""
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def span_text(start_ns: int, end_ns: int, axis: TimeAxis) -> str:
    """Return when, since the axis's begin, and how long."""
    return f"at {clock_text(max(start_ns - axis.start_ns, 0) / NS)} for {(end_ns - start_ns) / NS:.2f} s"


def nice_top(watts: float) -> float:
    """Return the end of a scale: the next number above that parts into four round ones."""
    if watts <= 0:
        return 4.0
    power = 10.0 ** math.floor(math.log10(watts))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= watts)


def runs(known: Any) -> list[tuple[int, int]]:
    """Return the stretches of True, as (start, end) with the end left out."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(known, np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _level(watts: float, top: float) -> int:
    return round(LEVELS * (1 - watts / top))


def _points(xs: Iterable[int], watts: Float64s, top: float) -> list[tuple[int, int]]:
    return [(x, _level(float(one), top)) for x, one in zip(xs, watts, strict=True)]


def _steps(start: int, watts: Float64s, top: float) -> list[tuple[int, int]]:
    """Return the corners of a staircase: each value is a mean over its column."""
    corners = []
    for x, one in enumerate(watts, start):
        y = _level(float(one), top)
        corners += [(x, y), (x + 1, y)]
    return corners


def _path(points: Sequence[tuple[int, int]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)
