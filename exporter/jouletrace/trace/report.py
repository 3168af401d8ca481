"""What `jouletrace analyze` found, as a report for a terminal."""

import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

NS = 1_000_000_000
BAR_CELLS = 24
"""Length of a phase's bar: a cell is 4 % of the phase's joules, less than a driver's error."""
NARROWEST = 60
"""Below this many columns the report is not squeezed further: the terminal wraps it."""
MOST_REQUESTS = 3
"""Requests that are named: those of the most joules."""
LONGEST_TEXT = 300
"""Characters shown of a text that a recording brings: a label of a megabyte must not bury the report."""

_WORDS, _PARTS = (re.compile(f"[^{marks}]*[{marks}]+|[^{marks}]+") for marks in (r"\s|=,", r"\s|=,_/-"))
"""What is not broken between two lines, and where a word is longer than a line: letters with the marks behind them."""
_BOLD, _RED, _YELLOW = "1", "31", "33"
_DRIVER_COLOURS = ("90", "34", "33", "32", "35", "36", "31")
"""Foreground colours (ECMA-48) by the driver's place in the legend; `unexplained` comes last and is red."""


@dataclass(frozen=True, slots=True)
class Terminal:
    """What the reader's terminal can show."""

    width: int = 80
    """Columns."""
    unicode: bool = False
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] = os.environ) -> "Terminal":
        """Return what a stream can show: colour on a terminal only, and not with NO_COLOR (no-color.org)."""
        try:
            "█±…".encode(stream.encoding or "ascii")
            unicode = True
        except (UnicodeEncodeError, LookupError):
            unicode = False
        colour = stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        return cls(max(shutil.get_terminal_size().columns, NARROWEST), unicode, colour)

    def paint(self, text: str, colour: str) -> str:
        """Return the text in a colour, where there is colour."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and text else text

    def text(self, value: object) -> str:
        """Return somebody else's text fit for this terminal: no control characters, no letters it lacks."""
        text = printable(value)
        return text if self.unicode else text.encode("ascii", "replace").decode()


def printable(value: object) -> str:
    """Return text without control, bidirectional and surrogate characters, cut off where it is too long.

    A recording is anybody's input: it must not drive the terminal that shows it.
    """
    text = str(value)
    return clean(text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…")


def clean(text: str) -> str:
    """Return text with a mark in the place of each control, bidirectional and surrogate character."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "�" for letter in text)


def phase_labels(phase: Mapping[str, Any]) -> str:
    """Return a phase's labels as `key=value key=value|value`."""
    return " ".join(
        f"{key}={'|'.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in phase["labels"].items()
    )


def joules_by_driver(phases: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return each driver's joules over the phases, in the phases' order; empty without a diagnosis."""
    joules: dict[str, float] = {}
    for phase in phases:
        for driver, part in (phase.get("drivers") or {}).items():
            joules[driver] = joules.get(driver, 0.0) + part
    return joules


def joules_by_verdict(phases: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """Return verdict, number of phases and their joules, the most joules first."""
    counts: Counter[str] = Counter()
    joules: dict[str, float] = {}
    for phase in phases:
        verdict = phase.get("verdict")
        if verdict is not None:
            counts[verdict] += 1
            joules[verdict] = joules.get(verdict, 0.0) + (phase["energy_joules"] or 0.0)
    return sorted(((verdict, counts[verdict], joules[verdict]) for verdict in counts), key=lambda one: -one[2])


def ledger_rows(ledger: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return who had the joules, in an operator's words; the rows add up to the device's joules."""
    return [
        ("requests", ledger["attributed_joules"]),
        ("parked: held, no work", ledger["idle_joules"]["parked"]),
        ("bare idle: nobody there", ledger["idle_joules"]["bare"]),
        ("work of no known request", ledger["unattributed_joules"]),
    ]


def agreement(result: Mapping[str, Any]) -> float | None:
    """Return by which part of it the energy differs from the hardware counter's; None without a counter."""
    counter = result["counter_joules"]
    return result["energy_joules"] / counter - 1 if counter else None


def cells(parts: Sequence[float], length: int) -> list[int]:
    """Return how many of `length` cells each part gets: whole numbers that add up, nearest to the shares.

    By largest remainder. A negative part gets none; without any joules all are 0.
    """
    positive = [max(part, 0.0) for part in parts]
    total = sum(positive)
    if not total:
        return [0] * len(parts)
    exact = [length * part / total for part in positive]
    found = [int(one) for one in exact]
    by_remainder = sorted(range(len(parts)), key=lambda at: found[at] - exact[at])
    for at in by_remainder[: length - sum(found)]:
        found[at] += 1
    return found


def render(result: Mapping[str, Any], terminal: Terminal) -> str:
    """Return the result of `analyze` as lines: the phases first, then the whole, what needs a look last.

    Works on results without a diagnosis too. What matters most stands at the end, where the prompt is.
    """
    legend = _letters(list(joules_by_driver(result["phases"])))
    blocks = [
        _phase_lines(result["phases"], legend, terminal),
        _legend_lines(result["phases"], legend, terminal),
        _whole_lines(result, terminal),
        _ledger_lines(result["ledger"], terminal),
        _request_lines(result["requests"], terminal),
        _verdict_lines(result["phases"], terminal),
        _warning_lines(result["warnings"], terminal),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


# -------------------------------------------------------------------- phases


def _letters(drivers: Sequence[str]) -> dict[str, str]:
    """Return a letter for each driver: the first of its own that is free."""
    letters: dict[str, str] = {}
    for driver in drivers:
        wanted = [letter.upper() for letter in driver if letter.isascii() and letter.isalpha()]
        letters[driver] = next((letter for letter in wanted if letter not in letters.values()), "#")
    return letters


def _phase_lines(phases: Sequence[Mapping[str, Any]], legend: Mapping[str, str], terminal: Terminal) -> list[str]:
    """Return one block of lines a phase: on a wide terminal one line, on a narrow one two or three."""
    diagnosed = any(phase.get("verdict") is not None for phase in phases)
    head = ["seconds", "watts", "joules", "low/high %"] + (["verdict"] if diagnosed else [])
    rows = [_figures(phase, diagnosed, terminal) for phase in phases]
    # One phase that lasts a month must not widen a table of seconds; its own row sticks out instead.
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    figures_width = sum(widths) + 2 * (len(widths) - 1)
    names = [terminal.text(phase["name"]) for phase in phases]
    labels = [terminal.text(phase_labels(phase)) for phase in phases]
    flags = [", ".join(map(terminal.text, phase.get("flags") or ())) for phase in phases]
    bar_width = BAR_CELLS + 2 if legend else 0
    longest = max(_columns(f"{name} {label}".strip()) for name, label in zip(names, labels, strict=True))
    after = max(map(len, flags)) + (bar_width + 4 if legend else 2)
    one_line = longest + 2 + figures_width + (after if legend or any(flags) else 0) <= terminal.width
    name_width = max(longest if one_line else min(longest, terminal.width - figures_width - 2), len("phase"))

    def row(cells: Sequence[str]) -> str:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells[:4], widths[:4], strict=True)]
        return "  ".join([*padded, *(f"{cell:<{width}}" for cell, width in zip(cells[4:], widths[4:], strict=True))])

    title = _pad("phase", name_width) + "  " + row(head)
    if one_line and legend:
        title += "  " + _pad("drivers", bar_width) + "  flags"
    lines = [terminal.paint(title.rstrip(), _BOLD)]
    for phase, name, label, figures, raised in zip(phases, names, labels, rows, flags, strict=True):
        bar = _bar(phase, legend, terminal) if legend else ""
        marks = terminal.paint(raised, _YELLOW)
        if one_line:
            line = "  ".join([_pad(f"{name} {label}".strip(), name_width), row(figures), *filter(None, [bar, marks])])
            lines.append(line.rstrip())
            continue
        left = _wrap(name, name_width) + _wrap(label, name_width)
        right = [row(figures)]
        beside = bar and marks and bar_width + 2 + len(raised) <= figures_width
        right += [f"{bar}  {marks}"] if beside else [part for part in (bar, marks) if part]
        for at in range(max(len(left), len(right))):
            cell = left[at] if at < len(left) else ""
            lines.append((_pad(cell, name_width) + "  " + (right[at] if at < len(right) else "")).rstrip())
    return lines


def _figures(phase: Mapping[str, Any], diagnosed: bool, terminal: Terminal) -> list[str]:
    joules, watts = phase["energy_joules"], phase["average_watts"]
    bounds = [f"{100 * (phase[edge] / joules - 1):+.1f}" if joules else "-" for edge in ("low", "high")]
    found = [
        f"{(phase['end_ns'] - phase['start_ns']) / NS:.2f}",
        "-" if watts is None else f"{watts:.1f}",
        "-" if joules is None else f"{joules:,.1f}",
        " ".join(bounds),
    ]
    return [*found, _verdict(phase, terminal)] if diagnosed else found


def _verdict(phase: Mapping[str, Any], terminal: Terminal) -> str:
    verdict, confidence = phase.get("verdict"), phase.get("confidence")
    if verdict is None:
        return "-"
    return terminal.text(verdict) + ("" if confidence is None else f" {100 * confidence:.0f}%")


def _bar(phase: Mapping[str, Any], legend: Mapping[str, str], terminal: Terminal) -> str:
    drivers = phase.get("drivers") or {}
    counts = cells([drivers.get(driver, 0.0) for driver in legend], BAR_CELLS)
    parts = zip(legend.values(), counts, range(len(legend)), strict=True)
    bar = "".join(terminal.paint(letter * count, _colour(at, len(legend))) for letter, count, at in parts)
    return f"[{bar or ' ' * BAR_CELLS}]"


def _colour(at: int, count: int) -> str:
    return _DRIVER_COLOURS[-1] if at == count - 1 else _DRIVER_COLOURS[at % (len(_DRIVER_COLOURS) - 1)]


def _legend_lines(phases: Sequence[Mapping[str, Any]], legend: Mapping[str, str], terminal: Terminal) -> list[str]:
    """Return what the bars' letters mean, with each driver's joules over all phases."""
    if not legend:
        return []
    totals = joules_by_driver(phases)
    whole = sum(totals.values())
    lines = [terminal.paint("drivers", _BOLD) + "  a bar shows their shares of a phase's joules; over all phases:"]
    for at, (driver, letter) in enumerate(legend.items()):
        share = totals[driver] / whole if whole else 0.0
        drawn = terminal.paint(letter, _colour(at, len(legend)))
        lines.append(f"  {drawn} {terminal.text(driver):<22} {totals[driver]:>14,.1f} J  {100 * share:5.1f} %")
    return lines


# -------------------------------------------------------------------- the whole


def _whole_lines(result: Mapping[str, Any], terminal: Terminal) -> list[str]:
    gpu, off = result["gpu"], agreement(result)
    driver = gpu["driver_version"] or "unknown"
    total = f"energy {result['energy_joules']:,.1f} J from {result['energy_source']}; "
    total += "no hardware counter" if off is None else f"hardware counter {result['counter_joules']:,.1f} J "
    return [
        terminal.paint(f"{terminal.text(gpu['name'])}  {terminal.text(gpu['uuid'])}", _BOLD)
        + f"  driver {terminal.text(driver)}",
        total + ("" if off is None else f"({100 * off:+.3f} %)"),
    ]


def _ledger_lines(ledger: Mapping[str, Any], terminal: Terminal) -> list[str]:
    lines = [terminal.paint("where the joules went", _BOLD)]
    device = ledger["device_joules"]
    for name, joules in ledger_rows(ledger):
        share = joules / device if device else 0.0
        bar = ("█" if terminal.unicode else "#") * round(BAR_CELLS * share)
        lines.append(f"  {name:<24} {joules:>14,.1f} J  {100 * share:5.1f} %  {bar}".rstrip())
    lines.append(f"  {'the GPU':<24} {device:>14,.1f} J")
    if abs(ledger["residual_joules"]) > 1e-6 * max(device, 1.0):
        lost = f"  {'not accounted for':<24} {ledger['residual_joules']:>14,.1f} J: please report this as a bug"
        lines.append(terminal.paint(lost, _RED))
    return lines


def _request_lines(requests: Sequence[Mapping[str, Any]], terminal: Terminal) -> list[str]:
    if not requests:
        return []
    middle, high, most = np.percentile([one["energy_joules"] for one in requests], [50, 95, 100])
    methods = Counter(one["method"] for one in requests)
    split = ", ".join(f"{count} by {terminal.text(method)}" for method, count in methods.most_common())
    lines = [
        terminal.paint("requests", _BOLD) + f"  {len(requests)} ({split})",
        f"  joules each: median {middle:,.1f}, 95 % under {high:,.1f}, most {most:,.1f}",
    ]
    costliest = sorted(requests, key=lambda one: -one["energy_joules"])[:MOST_REQUESTS]
    plus_minus = "±" if terminal.unicode else "+-"
    for one in costliest:
        error = (one["high"] - one["low"]) / 2
        who = f"{terminal.text(one['id'])}  {terminal.text(one['tenant'] or '')}".rstrip()
        lines.append(f"  {one['energy_joules']:>10,.1f} J {plus_minus} {error:,.1f}  {who}")
    return lines


def _verdict_lines(phases: Sequence[Mapping[str, Any]], terminal: Terminal) -> list[str]:
    found = joules_by_verdict(phases)
    if not found:
        return []
    lines = [terminal.paint("what limited the GPU", _BOLD) + "  by phases"]
    for verdict, count, joules in found:
        lines.append(f"  {terminal.text(verdict):<24} {joules:>14,.1f} J  in {count} phase{'s' * (count != 1)}")
    flagged = Counter(flag for phase in phases for flag in phase.get("flags") or ())
    for flag, count in flagged.most_common():
        text = f"  {terminal.text(flag):<24} flagged in {count} phase{'s' * (count != 1)}"
        lines.append(terminal.paint(text, _YELLOW))
    return lines


def _warning_lines(warnings: Sequence[str], terminal: Terminal) -> list[str]:
    return [terminal.paint(f"warning: {terminal.text(warning)}", _YELLOW) for warning in warnings]


# -------------------------------------------------------------------- text


def _columns(text: str) -> int:
    """Return how many columns a text takes; East Asian wide letters take two (Unicode TR11)."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _wrap(text: str, width: int) -> list[str]:
    """Return text as lines of so many columns, broken at spaces or after `| = ,`; a word that is too long, anywhere."""
    lines = [""]
    words = _WORDS.findall(text)
    for piece in [part for word in words for part in ([word] if _columns(word) <= width else _PARTS.findall(word))]:
        if lines[-1] and _columns(lines[-1] + piece.rstrip()) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        for letter in piece:
            if _columns(lines[-1] + letter) > width and not letter.isspace():
                lines.append("")
            lines[-1] += letter
    return [line.rstrip() for line in lines if line.strip()]


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))
