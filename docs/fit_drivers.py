"""Fits the shipped power coefficients on the bundled recording of an H200 and writes the tables of docs/diagnosis.md.

`--check` writes nothing and returns 1 when the file or a table is not current. Fitted on the first half of each phase
of the demo recording (square waves apart: their clock changes faster than it is read); the clock's exponents are
those with the lowest error when each phase in turn is left out. The second halves and the recording of another H200
are looked at for the tables only.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import msgspec
import numpy as np

from jouletrace.diagnosis.drivers import (
    FORMAT,
    TERMS,
    Coefficients,
    Driver,
    ShippedCoefficients,
    Term,
    clock_ratio,
    decompose,
    static_watts,
    term_inputs,
)
from jouletrace.diagnosis.signals import DeviceSignals, merge
from jouletrace.diagnosis.verdicts import judge
from jouletrace.energy.baseline import IdleKind
from jouletrace.gpu.readings import Float64s
from jouletrace.trace.analyze import phases_of
from jouletrace.trace.diagnosis import RecordedDevice
from jouletrace.trace.metering import whole_timeline
from jouletrace.trace.recording import GPM, read

REPOSITORY = Path(__file__).parents[1]
FITTED = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
UNSEEN = REPOSITORY / "tests/data/h200-c-chunked.json.gz"
FILE = REPOSITORY / "exporter/jouletrace/diagnosis/coefficients.json"
PAGE = REPOSITORY / "docs/diagnosis.md"
SETTLE_NS = 300_000_000
"""Left out at each phase's start: GPM's counters lag behind by up to 100 ms, and its intervals straddle the edge."""
EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0)
"""Tried for pipes and SMs. Between work at a lower clock (1) and work at a lower clock and voltage (up to 3)."""
MEMORY_EXPONENTS = (0.0, 0.5, 1.0)
"""Tried for memory: DRAM has a clock of its own, what carries its bytes through the chip has the SMs'."""

MOST_OF_TERM = 0.5
"""A phase that holds more than this part of a term's mean square is never left out."""


@dataclass(frozen=True)
class PhaseHalves:
    """A phase's seconds, split in the middle of its time."""

    name: str
    first: Sequence[DeviceSignals]
    second: Sequence[DeviceSignals]
    seconds: float

    @property
    def is_steady(self) -> bool:
        """Return whether the clock can be followed."""
        return not self.name.startswith("square_wave")


def phases(path: Path, *, gpm: bool = True) -> Iterator[PhaseHalves]:
    """Yield the phases of a recording; without `gpm` as a GPU before Hopper would have given them."""
    recording = read(path)
    if not gpm:
        recording = replace(recording, streams={name: one for name, one in recording.streams.items() if name != GPM})
    device = RecordedDevice(recording, whole_timeline(recording))
    for phase in phases_of(recording)[0]:
        middle_ns = (phase.start_ns + phase.end_ns) // 2
        labels = " ".join(f"{key}={value:g}" for key, value in phase.labels.items() if isinstance(value, int | float))
        yield PhaseHalves(
            f"{phase.name} {labels}".strip(),
            device.signals(phase.start_ns + SETTLE_NS, middle_ns),
            device.signals(middle_ns, phase.end_ns),
            (phase.end_ns - phase.start_ns) / 1e9,
        )


def normal_equations(
    found: Sequence[PhaseHalves], idle: dict[IdleKind, float], exponents: dict[Term, float]
) -> tuple[Float64s, Float64s, Float64s]:
    """Return each phase's Gram matrix, moment and square, shapes (p, n, n), (p, n), (p,), of relative errors.

    Every phase weighs the same, however long it is.
    """
    pinned = Coefficients(watts={}, clock_exponent={}, idle_watts=idle, power_limit_watts=1.0)
    grams, moments, squares = [], [], []
    for phase in found:
        rows, values = [], []
        for one in phase.first:
            if one.watts is None or one.dram_ratio is None:
                continue
            clock = clock_ratio(one)
            inputs = zip(TERMS, term_inputs(one), strict=True)
            rows.append([value * clock ** exponents[term] / one.watts for term, value in inputs])
            values.append((one.watts - static_watts(one, pinned)) / one.watts)
        x, y = np.array(rows), np.array(values)
        grams.append(x.T @ x / len(y))
        moments.append(x.T @ y / len(y))
        squares.append(float(y @ y) / len(y))
    return np.array(grams), np.array(moments), np.array(squares)


def solve(gram: Float64s, moment: Float64s) -> Float64s:
    """Return the non-negative least squares coefficients: the best of all subsets of terms, as they are few."""
    # In units in which each term's mean square is 1; a term that never ran has none.
    scale = np.sqrt(np.diag(gram))
    ran = [term for term in range(len(scale)) if scale[term] > 0]
    best, least = np.zeros(len(scale)), 0.0
    for count in range(1, len(ran) + 1):
        for chosen in combinations(ran, count):
            subset = list(chosen)
            units = scale[subset]
            part = gram[np.ix_(subset, subset)] / np.outer(units, units)
            found = np.linalg.lstsq(part, moment[subset] / units, rcond=None)[0]
            error = float(-found @ (moment[subset] / units))
            if (found >= 0).all() and error < least:
                best, least = np.zeros(len(scale)), error
                best[subset] = found / units
    return best


def fit(found: Sequence[PhaseHalves]) -> tuple[Coefficients, float, list[tuple[float, dict[Term, float]]]]:
    """Return the coefficients, their error with each phase in turn left out, and the same of all exponents tried."""
    idle = {
        kind: round(float(np.median([one.watts for one in phase.first if one.watts is not None])), 1)
        for phase in found
        for kind, name in ((IdleKind.BARE, "idle_no_context"), (IdleKind.PARKED, "idle_with_weights"))
        if phase.name.startswith(name)
    }
    busy = [phase for phase in found if phase.is_steady and not phase.name.startswith("idle")]
    tried = []
    for tensor, core, memory in product(EXPONENTS, EXPONENTS, MEMORY_EXPONENTS):
        exponents = {
            Term.MEMORY: memory,
            Term.TENSOR: tensor,
            Term.SM: core,
            Term.FLOAT: core,
            Term.INTEGER: core,
            Term.LINKS: 0.0,
        }
        grams, moments, squares = normal_equations(busy, idle, exponents)
        total = np.diagonal(grams, axis1=1, axis2=2)
        left_out = []
        for at in range(len(busy)):
            if (total[at] > MOST_OF_TERM * total.sum(0)).any():
                # Without the phase that a term rests on nobody could tell the term's coefficient.
                continue
            watts = solve(grams.sum(0) - grams[at], moments.sum(0) - moments[at])
            left_out.append(watts @ grams[at] @ watts - 2 * moments[at] @ watts + squares[at])
        tried.append((float(np.sqrt(max(0.0, np.mean(left_out)))), exponents))
    error, exponents = min(tried, key=lambda one: one[0])
    grams, moments, _ = normal_equations(busy, idle, exponents)
    watts = solve(grams.sum(0), moments.sum(0))
    limit = next(one.power_limit_watts for phase in found for one in phase.first)
    assert limit is not None
    fitted = Coefficients(
        watts={term: float(f"{value:.4g}") for term, value in zip(TERMS, watts, strict=True)},
        clock_exponent=exponents,
        idle_watts=idle,
        power_limit_watts=limit,
    )
    return fitted, error, tried


def coefficient_table(fitted: Coefficients, error: float) -> str:
    """Return the coefficients as a table."""
    lines = ["| term | watts at full activity and clock | exponent of the clock |", "|---|---|---|"]
    lines += [f"| {term} | {fitted.watts[term]:g} | {fitted.clock_exponent[term]:g} |" for term in TERMS]
    return "\n".join([*lines, "", f"Error of a phase that the fit has not seen: {100 * error:.1f} % (rms)."])


def phase_table(found: Sequence[PhaseHalves], fitted: Coefficients, *, halves: bool) -> str:
    """Return verdicts, margins and drivers by phase: of the second halves, or of whole phases."""
    lines = [
        "| phase | watts | verdict | margin | confidence | flags | "
        + " | ".join(f"{driver} %" for driver in Driver)
        + " | residual % |",
        "|---" * (7 + len(Driver)) + "|",
    ]
    for phase in found:
        spans = phase.second if halves else (*phase.first, *phase.second)
        parts = [decompose(one, fitted) for one in spans]
        whole, judgement = merge(spans), judge(merge(spans))
        energy = whole.energy_joules or 0.0
        shares = (100 * sum(part.joules[driver] for part in parts) / energy for driver in Driver)
        residual = 100 * sum(part.residual_joules or 0.0 for part in parts) / energy
        lines.append(
            f"| {phase.name} | {whole.watts or 0.0:.0f} | {judgement.verdict} | "
            f"{float(judgement.evidence['margin']):.2f} | {judgement.confidence:.2f} | "
            f"{', '.join(judgement.flags)} | "
            + " | ".join(f"{share:.1f}" for share in shares)
            + f" | {residual:+.1f} |"
        )
    return "\n".join(lines)


def inferred_table(found: Sequence[PhaseHalves]) -> str:
    """Return the verdicts of second halves without GPM."""
    lines = ["| phase | verdict | margin | confidence | flags |", "|---|---|---|---|---|"]
    for phase in found:
        judgement = judge(merge(phase.second))
        margin = float(judgement.evidence["margin"])
        flags = ", ".join(judgement.flags)
        lines.append(f"| {phase.name} | {judgement.verdict} | {margin:.2f} | {judgement.confidence:.2f} | {flags} |")
    return "\n".join(lines)


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Return a page with what stands between its `<!-- begin NAME -->` and `<!-- end NAME -->` replaced."""
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, rest = page.split(begin)
        page = head + begin + table + "\n" + end + rest.split(end)[1]
    return page


def main() -> int:
    """Return 1 when `--check` finds something that differs from what would be written."""
    fitted_on, unseen = list(phases(FITTED)), list(phases(UNSEEN))
    fitted, error, _ = fit(fitted_on)
    content = msgspec.json.format(msgspec.json.encode(ShippedCoefficients(FORMAT, {"NVIDIA H200": fitted})), indent=1)
    tables = {
        "coefficients": coefficient_table(fitted, error),
        "held-out": phase_table(fitted_on, fitted, halves=True),
        "unseen": phase_table(unseen, fitted, halves=False),
        "inferred": inferred_table(list(phases(FITTED, gpm=False))),
    }
    written = {FILE: content.decode() + "\n", PAGE: with_tables(PAGE.read_text(), tables)}
    stale = [file for file, text in written.items() if not file.exists() or file.read_text() != text]
    if "--check" not in sys.argv[1:]:
        for file in stale:
            file.write_text(written[file])
        return 0
    for file in stale:
        print(f"{file.relative_to(REPOSITORY)} is not current: run `make coefficients`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
