"""What `jouletrace analyze` found, as one web page that needs nothing else: no script, no request to anywhere.

The page is built as a tree, so that every text is escaped when it is written: names, labels and ids come with the
recording, which may be anybody's.
"""

import base64
import datetime
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

import jouletrace
from jouletrace.energy.meter import EnergySource
from jouletrace.trace import charts
from jouletrace.trace.charts import MOST_PHASES, VERDICTS, Stretch, TimeAxis, node
from jouletrace.trace.recording import GPM, Recording, RecordingError
from jouletrace.trace.report import (
    agreement,
    joules_by_driver,
    joules_by_verdict,
    ledger_rows,
    phase_labels,
    printable,
)

NS = 1_000_000_000
MOST_REQUESTS = 20
"""Requests listed: those of the most joules; `--json` has all."""
MOST_TENANTS = 20
MOST_EVIDENCE = 32
"""Figures shown for a verdict: twice as many as it has."""
MOST_WARNINGS = 50
ABSENT = "–"

SOURCES: Mapping[str, str] = {
    EnergySource.POWER_RING: "the driver's ring of 20 ms mean powers, added up without a gap",
    EnergySource.ENERGY_COUNTER: "the ticks of the hardware energy counter, shaped by power readings between them",
    EnergySource.POWER_POLLING: "power readings added up; the sensor sees a part of the time, so bounds are wide",
    EnergySource.POWER_AVERAGE: "the one-second average power added up: the last resort, edges are blurred",
}
"""How energy was measured, by source (design section 4)."""


def render(result: Mapping[str, Any], recording: Recording, series: Mapping[str, Any]) -> str:
    """Return the page for a result of `analyze`, its recording and its `series` over time (may be empty)."""
    phases = _numbered(result["phases"])
    axis = _axis(result, recording)
    drivers = list(joules_by_driver(result["phases"])) or list(series.get("joules") or ())
    body = node(
        "body",
        _header(result, recording, axis),
        node(
            "main",
            _warnings(result["warnings"]),
            _figures(result),
            _over_time(result, recording, series, drivers, phases, axis),
            _phases(phases, len(result["phases"]), drivers),
            node(
                "div",
                _ledger(result["ledger"]),
                _verdicts(result["phases"]),
                _drivers(result["phases"]),
                class_="columns",
            ),
            _requests(result["requests"]),
            _measured(result, recording),
        ),
    )
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # A page from a file cannot have headers; frame-ancestors would be ignored here.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = node("head", node("meta", charset="utf-8"))
    sheet = Element("style")
    sheet.text = style
    head.extend(
        [
            node("meta", http_equiv="Content-Security-Policy", content=policy),
            node("meta", name="viewport", content="width=device-width, initial-scale=1"),
            node("title", _text(f"{recording.name}: where the joules went")),
            node("link", rel="icon", href="data:,"),
            sheet,
        ]
    )
    html = node("html", head, body, lang="en")
    return "<!doctype html>\n" + ElementTree.tostring(html, encoding="unicode", method="html") + "\n"


def write(path: Path, html: str) -> None:
    """Write the page; RecordingError, as for every other file of a recording, when the disk refuses."""
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise RecordingError(
            f"{path}: the report could not be written ({error.strerror or error}); "
            "give a file in a folder that exists, may be written to and has space left"
        ) from error


def _numbered(phases: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the phases that are shown, with their numbers: all, or the longest in their order."""
    numbered = list(enumerate(phases, 1))
    longest = sorted(numbered, key=lambda one: one[1]["start_ns"] - one[1]["end_ns"])[:MOST_PHASES]
    return sorted(longest, key=lambda one: one[0])


def _axis(result: Mapping[str, Any], recording: Recording) -> TimeAxis:
    """Return the time of all power readings and phases."""
    t_ns, _, _ = charts.power_of(recording)
    times = [int(t_ns[0]), int(t_ns[-1])] if len(t_ns) else []
    times += [phase[edge] for phase in result["phases"] for edge in ("start_ns", "end_ns")]
    first_ns = min(times)
    return TimeAxis(first_ns, max(*times, first_ns + 1))


# -------------------------------------------------------------------- the whole


def _header(result: Mapping[str, Any], recording: Recording, axis: TimeAxis) -> Element:
    begin = datetime.datetime.fromtimestamp(axis.start_ns // NS, datetime.UTC)
    gpu = result["gpu"]
    about = f"{gpu['name']} · {gpu['uuid']} · driver {gpu['driver_version'] or 'unknown'}"
    when = f"{begin:%Y-%m-%d %H:%M:%S} UTC, {charts.clock_text((axis.end_ns - axis.start_ns) / NS)} long"
    return node(
        "header",
        node("h1", _text(recording.name or "recording")),
        node("p", _text(about), class_="quiet"),
        node("p", when, class_="quiet"),
    )


def _warnings(warnings: Sequence[str]) -> Element | None:
    if not warnings:
        return None
    items = [node("li", _text(warning)) for warning in warnings[:MOST_WARNINGS]]
    if len(warnings) > MOST_WARNINGS:
        items.append(node("li", f"and {len(warnings) - MOST_WARNINGS} more, in --json"))
    return node("section", node("h2", "Warnings"), node("ul", *items), class_="problem")


def _figures(result: Mapping[str, Any]) -> Element:
    energy, off, ledger = result["energy_joules"], agreement(result), result["ledger"]
    requests = len(result["requests"])
    device = ledger["device_joules"]
    found = [
        ("Energy", _joules(energy), f"{energy / 3600:,.2f} Wh"),
        (
            "Against the hardware counter",
            ABSENT if off is None else f"{100 * off:+.3f} %",
            "no counter in this recording" if off is None else f"it says {_joules(result['counter_joules'])}",
        ),
        (
            "Went to requests",
            f"{100 * ledger['attributed_joules'] / device:.1f} %" if device else ABSENT,
            f"{requests:,} request{'s' * (requests != 1)}",
        ),
    ]
    verdicts = joules_by_verdict(result["phases"])
    if verdicts:
        verdict, count, joules = verdicts[0]
        note = f"{_joules(joules)} in {count} phase{'s' * (count != 1)}"
        found.append(("Most joules while", _text(verdict), note))
    cards = [node("div", node("dt", name), node("dd", value, node("small", note))) for name, value, note in found]
    return node("dl", *cards, class_="figures")


def _over_time(
    result: Mapping[str, Any],
    recording: Recording,
    series: Mapping[str, Any],
    drivers: Sequence[str],
    phases: Sequence[tuple[int, Mapping[str, Any]]],
    axis: TimeAxis,
) -> Element:
    t_ns, watts, holds = charts.power_of(recording)
    found = charts.envelope(t_ns, watts, axis, holds=holds)
    parts: list[Element | None] = [
        node("h2", "Over time"),
        node("p", "The table below says the same in figures.", class_="quiet"),
        node("h3", "Power: mean, and from the least to the greatest reading"),
        charts.power_chart(found, axis, result["gpu"]["power_limit_watts"]),
        charts.time_axis(axis),
        node("h3", "Phases"),
        charts.phase_rows(phases, axis),
    ]
    verdicts, flags = _diagnosed(series)
    charted = [driver for driver in drivers if driver in (series.get("joules") or {})]
    if verdicts:
        present = list(dict.fromkeys([*VERDICTS, *(one.name for one in verdicts)]))
        parts += [
            node("h3", "Verdict, as the daemon would have given it second by second"),
            charts.verdict_band(verdicts, axis),
            _legend([(verdict, charts.verdict_class(verdict)) for verdict in present]),
        ]
    if flags:
        names = sorted({one.name for one in flags})
        parts += [node("h3", "Flags"), charts.flag_rows(flags, names, axis)]
    if charted:
        parts += [
            node("h3", "Drivers: where the power went"),
            charts.driver_chart(series, charted, axis),
            charts.time_axis(axis),
            _legend([(driver, f"driver{at}") for at, driver in enumerate(charted)]),
        ]
    if not verdicts and not charted:
        parts.append(node("p", "Drivers and verdicts are not known for this recording.", class_="quiet"))
    return node("section", *parts)


def _diagnosed(series: Mapping[str, Any]) -> tuple[list[Stretch], list[Stretch]]:
    """Return the verdicts and the flags as stretches of time."""
    if not series.get("times_ns"):
        return [], []
    ends_ns, seconds = series["times_ns"], series["seconds"]
    verdicts = charts.stretches(series.get("verdict") or [None] * len(ends_ns), ends_ns, seconds)
    raised = series.get("flags") or [()] * len(ends_ns)
    flags = [
        one
        for flag in sorted({flag for now in raised for flag in now})
        for one in charts.stretches([flag if flag in now else None for now in raised], ends_ns, seconds)
    ]
    return verdicts, flags


def _legend(entries: Sequence[tuple[str, str]]) -> Element:
    items = [node("li", _swatch(style), _text(name)) for name, style in entries]
    return node("ul", *items, class_="legend")


def _swatch(style: str) -> Element:
    rect = node("rect", width="100%", height="100%", class_=style)
    return node("svg", rect, class_="swatch", aria_hidden="true")


# -------------------------------------------------------------------- tables


def _phases(phases: Sequence[tuple[int, Mapping[str, Any]]], count: int, drivers: Sequence[str]) -> Element:
    diagnosed = any(phase.get("verdict") is not None for _, phase in phases)
    names = ["#", "Phase", "Seconds", "Watts", "Joules"]
    heads = [node("th", name, scope="col", class_="number" if at > 1 else None) for at, name in enumerate(names)]
    if diagnosed:
        heads += [node("th", name, scope="col") for name in ("Verdict", "Drivers", "Evidence")]
    rows = [_phase_row(number, phase, drivers if diagnosed else None) for number, phase in phases]
    parts = [node("h2", "Phases"), _table("Phases", heads, rows, cards=True)]
    if count > len(phases):
        parts.append(node("p", f"The {len(phases)} longest of {count:,} phases; --json has all.", class_="quiet"))
    return node("section", *parts)


def _phase_row(number: int, phase: Mapping[str, Any], drivers: Sequence[str] | None) -> Element:
    joules, watts = phase["energy_joules"], phase["average_watts"]
    labels = phase_labels(phase)
    small = node("small", _text(labels)) if labels else None
    bounds = None if joules is None else f"{phase['low']:,.1f} to {phase['high']:,.1f}"
    row = [
        node("td", str(number), class_="quiet place"),
        node("th", _text(phase["name"]), small, scope="row", class_="whole", data_place=f"{number}. "),
        _number(f"{(phase['end_ns'] - phase['start_ns']) / NS:.2f}", "Seconds"),
        _number(ABSENT if watts is None else f"{watts:.1f}", "Watts"),
        _number(ABSENT if joules is None else f"{joules:,.1f}", "Joules", bounds),
    ]
    if drivers is not None:
        row += [_verdict_cell(phase), _driver_cell(phase, drivers), _evidence_cell(phase)]
    # Cells lose their meaning for screen readers where the style shows them as cards: the roles keep it.
    for cell in row:
        cell.set("role", "rowheader" if cell.tag == "th" else "cell")
    return node("tr", *row, role="row")


def _verdict_cell(phase: Mapping[str, Any]) -> Element:
    verdict, confidence = phase.get("verdict"), phase.get("confidence")
    if verdict is None:
        return node("td", ABSENT, class_="whole verdict", data_label="Verdict")
    sure = None if confidence is None else node("small", f"confidence {100 * confidence:.0f} %")
    cell = node(
        "td", _swatch(charts.verdict_class(verdict)), _text(verdict), sure, data_label="Verdict", class_="whole verdict"
    )
    cell.extend([node("div", _text(flag), class_="raised") for flag in phase.get("flags") or ()])
    return cell


def _driver_cell(phase: Mapping[str, Any], drivers: Sequence[str]) -> Element:
    found = phase.get("drivers") or {}
    if not found:
        return node("td", ABSENT, class_="whole", data_label="Drivers")
    parts = [found.get(driver) or 0.0 for driver in drivers]
    whole = phase["energy_joules"] or 0.0
    items = [
        node("li", _swatch(f"driver{at}"), _text(f"{driver} {_joules(part)}{_share(part, whole)}"))
        for at, (driver, part) in enumerate(zip(drivers, parts, strict=True))
        if abs(part) >= 0.005 * abs(whole)
    ]
    bar = charts.share_bar(parts, "driver")
    return node("td", bar, node("ul", *items, class_="parts"), class_="whole", data_label="Drivers")


def _evidence_cell(phase: Mapping[str, Any]) -> Element:
    """Return what the verdict rests on, folded up: a dozen figures a phase would hide the phases."""
    evidence = list((phase.get("evidence") or {}).items())[:MOST_EVIDENCE]
    if not evidence:
        return node("td", ABSENT, class_="whole", data_label="Evidence")
    items = [node("li", _text(f"{name} {_evidence(value)}")) for name, value in evidence]
    summary = node("summary", f"{len(items)} figure{'s' * (len(items) != 1)}")
    return node("td", node("details", summary, node("ul", *items)), class_="whole", data_label="Evidence")


def _evidence(value: object) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        # Ratios below a thousandth are rounding, not evidence.
        return f"{value:,.0f}" if abs(value) >= 1000 else "0" if abs(value) < 0.001 else f"{value:.3g}"
    return str(value)


def _ledger(ledger: Mapping[str, Any]) -> Element:
    device = ledger["device_joules"]
    found = ledger_rows(ledger)
    rows = [
        node("tr", node("th", _swatch(f"account{at}"), name, scope="row"), _number(_joules(part)), _part(part, device))
        for at, (name, part) in enumerate(found)
    ]
    if abs(ledger["residual_joules"]) > 1e-6 * max(device, 1.0):
        lost = ledger["residual_joules"]
        rows.append(
            node("tr", node("th", "not accounted for", scope="row"), _number(_joules(lost)), _part(lost, device))
        )
    rows.append(node("tr", node("th", "the GPU", scope="row"), _number(_joules(device)), _part(device, device)))
    heads = _heads(("Who", "Joules", "Share"))
    bar = charts.share_bar([part for _, part in found], "account")
    return node("section", node("h2", "Where the joules went"), bar, _table("Ledger", heads, rows))


def _verdicts(phases: Sequence[Mapping[str, Any]]) -> Element | None:
    found = joules_by_verdict(phases)
    if not found:
        return None
    whole = sum(joules for _, _, joules in found)
    rows = [
        node(
            "tr",
            node("th", _swatch(charts.verdict_class(verdict)), _text(verdict), scope="row"),
            _number(str(count)),
            _number(_joules(joules)),
            _part(joules, whole),
        )
        for verdict, count, joules in found
    ]
    heads = _heads(("Verdict", "Phases", "Joules", "Share"))
    return node("section", node("h2", "What limited the GPU"), _table("Verdicts by phase", heads, rows))


def _drivers(phases: Sequence[Mapping[str, Any]]) -> Element | None:
    found = joules_by_driver(phases)
    if not found:
        return None
    whole = sum(found.values())
    rows = [
        node(
            "tr",
            node("th", _swatch(f"driver{at}"), _text(driver), scope="row"),
            _number(_joules(part)),
            _part(part, whole),
        )
        for at, (driver, part) in enumerate(found.items())
    ]
    heads = _heads(("Driver", "Joules", "Share"))
    return node(
        "section",
        node("h2", "Drivers"),
        node("p", "What the joules of all phases were used by.", class_="quiet"),
        charts.share_bar(list(found.values()), "driver"),
        _table("Drivers", heads, rows),
    )


def _requests(requests: Sequence[Mapping[str, Any]]) -> Element | None:
    if not requests:
        return None
    middle, high, most = np.percentile([one["energy_joules"] for one in requests], [50, 95, 100])
    costliest = sorted(requests, key=lambda one: -one["energy_joules"])[:MOST_REQUESTS]
    rows = [
        node(
            "tr",
            node("th", _text(one["id"]), scope="row"),
            node("td", _text(one["tenant"] or ABSENT)),
            _number(f"{one['energy_joules']:,.1f}", note=f"{one['low']:,.1f} to {one['high']:,.1f}"),
            _number(f"{one['prefill_joules']:,.1f}"),
            _number(f"{one['decode_joules']:,.1f}"),
            node("td", _text(one["method"])),
        )
        for one in costliest
    ]
    heads = _heads(("Request", "Tenant", "Joules", "Prefill", "Decode", "Split by"), numbers=(2, 3, 4))
    summary = (
        f"{len(requests):,} requests. Joules each: median {middle:,.1f}, 95 % under {high:,.1f}, most {most:,.1f}. "
        f"Listed are the {len(costliest)} of the most joules."
    )
    return node(
        "section",
        node("h2", "Requests"),
        node("p", summary),
        _table("Requests of the most joules", heads, rows),
        _tenants(requests),
    )


def _tenants(requests: Sequence[Mapping[str, Any]]) -> Element | None:
    counts: Counter[str] = Counter()
    joules: Counter[str] = Counter()
    for one in requests:
        counts[one["tenant"] or ABSENT] += 1
        joules[one["tenant"] or ABSENT] += one["energy_joules"]
    if len(counts) < 2:
        return None
    whole = sum(joules.values())
    found = [(tenant, counts[tenant], part) for tenant, part in joules.most_common(MOST_TENANTS)]
    rest = len(counts) - len(found)
    if rest:
        listed = sum(count for _, count, _ in found)
        found.append((f"{rest:,} others", len(requests) - listed, whole - sum(part for _, _, part in found)))
    rows = [
        node(
            "tr",
            node("th", _text(tenant), scope="row"),
            _number(f"{count:,}"),
            _number(_joules(part)),
            _part(part, whole),
        )
        for tenant, count, part in found
    ]
    return _table("Tenants", _heads(("Tenant", "Requests", "Joules", "Share")), rows, caption=True)


def _measured(result: Mapping[str, Any], recording: Recording) -> Element:
    source, gpu = result["energy_source"], result["gpu"]
    rows = [
        node(
            "tr",
            node("th", _text(name), scope="row"),
            _number(f"{len(stream):,}"),
            _number(f"{float(np.median(np.diff(stream.t_ns))) / 1e6:,.0f}" if len(stream) > 1 else ABSENT),
        )
        for name, stream in sorted(recording.streams.items())[:MOST_WARNINGS]
    ]
    limit, memory = gpu["power_limit_watts"], gpu["memory_total_bytes"]
    facts = [
        f"Energy source {source}: {SOURCES.get(source, 'unknown')}.",
        f"Power limit {ABSENT if limit is None else f'{limit:.0f} W'}, "
        f"memory {ABSENT if memory is None else f'{memory / 2**30:.0f} GiB'}.",
        "Low and high say how much a phase's or a request's joules may differ because its edges fall inside a sample.",
        f"jouletrace {jouletrace.__version__}, recording format {result['format']}.",
    ]
    if GPM not in recording.streams:
        facts.append(
            "The recording has no GPM readings: what used the power above idle is unexplained, "
            "and verdicts are inferred from NVML's utilization, with low confidence."
        )
    heads = _heads(("Stream", "Readings", "Median spacing, ms"))
    return node(
        "section",
        node("h2", "How it was measured"),
        *[node("p", _text(fact)) for fact in facts],
        _table("Streams of the recording", heads, rows),
    )


# -------------------------------------------------------------------- pieces


def _table(
    name: str, heads: Sequence[Element], rows: Sequence[Element], *, cards: bool = False, caption: bool = False
) -> Element:
    """Return a table that scrolls by itself; with `cards` it becomes a list of cards on a narrow screen."""
    head, body = node("thead", node("tr", *heads)), node("tbody", *rows)
    table = node("table", node("caption", name) if caption else None, head, body)
    if cards:
        table.set("class", "cards")
        table.set("role", "table")
        for group in (head, body):
            group.set("role", "rowgroup")
    return node("div", table, class_="table", role="region", aria_label=name, tabindex=0)


def _heads(names: Sequence[str], numbers: Sequence[int] | None = None) -> list[Element]:
    """Return column heads; all but the first are over numbers unless told otherwise."""
    over = range(1, len(names)) if numbers is None else numbers
    return [node("th", name, scope="col", class_="number" if at in over else None) for at, name in enumerate(names)]


def _number(text: str, label: str | None = None, note: str | None = None) -> Element:
    return node("td", text, None if note is None else node("small", note), class_="number", data_label=label)


def _part(part: float, whole: float) -> Element:
    return _number(_share(part, whole).strip() or ABSENT)


def _share(part: float, whole: float) -> str:
    return f" {100 * part / whole:.1f} %" if whole else ""


def _joules(joules: float) -> str:
    return f"{joules:,.1f} J" if abs(joules) < 1e6 else f"{joules / 1e6:,.3f} MJ"


def _text(value: object) -> str:
    return printable(value)
