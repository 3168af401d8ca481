"""Fits the shipped power coefficients on the bundled recording of an H200 and writes the tables of docs/diagnosis.md.

`--check` writes nothing and returns 1 when the file or a table is not current. Fitted on the first half of each phase
of the demo recording (square waves apart: their clock changes faster than it is read); the clock's exponents are
those with the lowest error when each phase in turn is left out. The thresholds of the verdicts are held against the
gaps between known loads in the first halves. The second halves and the recordings of two other H200s are looked at for
the tables only.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from jouletrace.diagnosis.verdicts import THRESHOLDS, Thresholds, Verdict, judge
from jouletrace.energy.baseline import IdleKind
from jouletrace.gpu.readings import Float64s, Pipe
from jouletrace.trace.analyze import Phase, phases_of
from jouletrace.trace.diagnosis import RecordedDevice
from jouletrace.trace.metering import whole_timeline
from jouletrace.trace.recording import GPM, read

REPOSITORY = Path(__file__).parents[1]
FITTED = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
UNSEEN = REPOSITORY / "tests/data/h200-c-chunked.json.gz"
OTHER_WORK = REPOSITORY / "tests/data/h200-d-unseen.json.gz"
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


TRUTH: Mapping[str, Verdict] = {
    "idle_no_context": Verdict.IDLE,
    "idle_with_weights": Verdict.PARKED,
    "decode": Verdict.MEMORY_BOUND,
    "prefill": Verdict.COMPUTE_BOUND,
    "gemm_bf16": Verdict.COMPUTE_BOUND,
    "gemm_fp32": Verdict.COMPUTE_BOUND,
    "device_copy": Verdict.MEMORY_BOUND,
    "elementwise_fp32": Verdict.MEMORY_BOUND,
    "host_offload": Verdict.TRANSFER_BOUND,
    "eager_host_bound": Verdict.UNDERUTILIZED,
}
"""What limits the phases of the first two recordings; the third one's say so themselves."""


def truth_of(phase: Phase) -> frozenset[str]:
    """Return the verdicts that are right for what ran, empty where nobody can say."""
    labels = phase.labels
    if "expected" in labels:
        return frozenset(labels["expected"])
    if phase.name == "decode_duty" and labels["duty"] < THRESHOLDS.active_ratio:
        return frozenset({Verdict.UNDERUTILIZED})
    if phase.name == "mixed_steps" and labels["prefill_tokens"] == 0:
        return frozenset({Verdict.MEMORY_BOUND})
    if phase.name == "decode" and labels["batch"] == 256:
        return frozenset({Verdict.MEMORY_BOUND, Verdict.BALANCED})
    return frozenset({TRUTH[phase.name]} if phase.name in TRUTH else ())


@dataclass(frozen=True)
class PhaseHalves:
    """A phase's seconds, split in the middle of its time."""

    name: str
    truth: frozenset[str]
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
            truth_of(phase),
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


# -------------------------------------------------------------------- thresholds

RESTING = frozenset({Verdict.IDLE, Verdict.PARKED})
LOADED = frozenset({Verdict.MEMORY_BOUND, Verdict.COMPUTE_BOUND, Verdict.BALANCED})
WORKING = LOADED | {Verdict.UNDERUTILIZED}
Values = Mapping[str, float]
Side = Callable[[frozenset[str], str, Values], bool | None]
"""Whether a phase (verdicts that are right, name, values) must lie above a threshold; None: it says nothing of it."""


def between(below: frozenset[Verdict], above: frozenset[Verdict]) -> Side:
    """Return the side of a phase by what is right for it."""

    def side(truth: frozenset[str], _name: str, _values: Values) -> bool | None:
        return None if not truth else True if truth <= above else False if truth <= below else None

    return side


def _is_fp32_product(name: str) -> bool:
    return "fp32" in name and ("gemm" in name or "product" in name)


def _fp32(truth: frozenset[str], name: str, values: Values) -> bool | None:
    if not truth & WORKING or values["tensor"] >= THRESHOLDS.idle_tensor_ratio:
        return None
    return _is_fp32_product(name)


def _tensor(truth: frozenset[str], name: str, _values: Values) -> bool | None:
    if _is_fp32_product(name):
        return False
    runs_a_model = name.startswith(("decode", "prefill", "mixed", "gemm_bf16", "matrix product fp16"))
    return True if runs_a_model and truth and truth <= LOADED else None


def _compute_power(truth: frozenset[str], _name: str, values: Values) -> bool | None:
    """Ask it of what NVML calls busy and not busy with memory."""
    if values["utilization"] < THRESHOLDS.active_ratio or values["memory part"] >= THRESHOLDS.inferred_memory_ratio:
        return None
    return between(frozenset({Verdict.UNDERUTILIZED}), frozenset({Verdict.COMPUTE_BOUND}))(truth, "", values)


def _copies(truth: frozenset[str], _name: str, values: Values) -> bool | None:
    """Ask it of the same."""
    if values["utilization"] < THRESHOLDS.misleading_utilization_ratio:
        return None
    if values["memory part"] >= THRESHOLDS.inferred_memory_ratio:
        return None
    return between(frozenset({Verdict.TRANSFER_BOUND}), WORKING)(truth, "", values)


NONE = frozenset[Verdict]()
BARE, PARKED, MEMORY, COMPUTE, TRANSFER = (
    frozenset({Verdict.IDLE}),
    frozenset({Verdict.PARKED}),
    frozenset({Verdict.MEMORY_BOUND}),
    frozenset({Verdict.COMPUTE_BOUND}),
    frozenset({Verdict.TRANSFER_BOUND}),
)
RULES: Sequence[tuple[str, str, str, Side]] = (
    ("quiet_ratio", "any activity", "busiest", between(RESTING, WORKING)),
    ("active_ratio", "active part", "active", between(frozenset({Verdict.UNDERUTILIZED}), LOADED)),
    ("sm_ratio", "part of the SMs", "sm", between(NONE, LOADED)),
    ("loaded_ratio", "load of the limit", "limit", between(NONE, MEMORY | COMPUTE)),
    ("dominance", "limit over the other load", "dominance", between(NONE, MEMORY | COMPUTE)),
    ("link_ratio", "links' load", "link", between(RESTING | WORKING, TRANSFER)),
    ("quiet_link_ratio", "links' load at rest", "link", between(RESTING, TRANSFER)),
    ("fp32_ratio", "FP32 pipe (flag)", "fp32", _fp32),
    ("idle_tensor_ratio", "idle tensor pipe (flag)", "tensor", _tensor),
    ("conflict_power_ratio", "power that contradicts rest", "power", between(RESTING | TRANSFER, LOADED)),
    ("bare_clock_ratio", "clock, bare or parked", "clock", between(BARE, PARKED)),
    ("inferred_memory_ratio", "no GPM: memory over GPU utilization", "memory part", between(COMPUTE, MEMORY)),
    ("inferred_compute_power_ratio", "no GPM: power of compute", "power", _compute_power),
    ("inferred_transfer_power_ratio", "no GPM: power of copies", "power", _copies),
)
"""Threshold, what it is of, which value it is held against, and the side on which a phase must lie."""


def values_of(spans: Sequence[DeviceSignals], truth: frozenset[str]) -> Values:
    """Return what the thresholds are held against; a value that is not known is missing."""
    signals = merge(spans)
    evidence = {name: value for name, value in judge(signals).evidence.items() if isinstance(value, float)}
    active = evidence.get("active_ratio", 0.0)
    divisor = active if active > THRESHOLDS.quiet_ratio else 1.0
    memory, compute = evidence.get("dram_intensity_ratio", 0.0), evidence.get("compute_intensity_ratio", 0.0)
    limit, other = (memory, compute) if truth <= MEMORY else (compute, memory)
    utilization = signals.utilization_ratio
    parked, watts, most = signals.idle_watts.get(IdleKind.PARKED), signals.watts, signals.power_limit_watts
    found = {
        "busiest": max(active, evidence.get("sm_ratio", 0.0), signals.dram_ratio or 0.0),
        "active": active,
        "sm": evidence.get("sm_ratio", 0.0),
        "limit": limit,
        "dominance": limit / other if other else math.inf,
        "link": evidence.get("link_bytes_per_second", 0.0) / THRESHOLDS.pcie_bytes_per_second,
        "fp32": min(1.0, signals.busy_ratio.get(Pipe.FP32, 0.0) / divisor),
        "tensor": min(1.0, signals.busy_ratio.get(Pipe.TENSOR, 0.0) / divisor),
        "clock": clock_ratio(signals),
        "utilization": utilization.get("gpu", 0.0),
        "memory part": utilization.get("memory", 0.0) / max(utilization.get("gpu", 0.0), 0.01),
    }
    if parked is not None and watts is not None and most is not None:
        found["power"] = max(0.0, (watts - parked) / (most - parked))
    return found


def gap(
    rule: tuple[str, str, str, Side], found: Sequence[tuple[PhaseHalves, Sequence[DeviceSignals]]]
) -> tuple[float | None, float | None]:
    """Return the highest value that must lie below a threshold, and the lowest that must lie above it."""
    _, _, name, side = rule
    below, above = [], []
    for phase, spans in found:
        values = values_of(spans, phase.truth)
        is_above = side(phase.truth, phase.name, values) if phase.is_steady and name in values else None
        if is_above is not None:
            (above if is_above else below).append(values[name])
    return max(below, default=None), min(above, default=None)


def threshold_table(
    fitted_on: Sequence[PhaseHalves], others: Mapping[str, Sequence[PhaseHalves]], thresholds: Thresholds = THRESHOLDS
) -> str:
    """Return each threshold's gap in the first halves, its place there, and the room that it has elsewhere."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2g}"

    def room(low: float | None, high: float | None, value: float) -> str:
        factors = [] if low is None else [value / max(low, 1e-4)]
        factors += [] if high is None else [high / value]
        least = min(factors, default=None)
        return "-" if least is None else f"{least:.2g}" if least < 10 else f"{min(least, 100.0):.0f}"

    samples = [
        [(phase, phase.first) for phase in fitted_on],
        [(phase, phase.second) for phase in fitted_on],
        *([(phase, [*phase.first, *phase.second]) for phase in found] for found in others.values()),
    ]
    heads = ("threshold", "value", "nearest below", "nearest above", "middle", "place")
    rooms = ("room: first halves", "second halves", *others)
    lines = ["| " + " | ".join((*heads, *rooms)) + " |", "|---" * (len(heads) + len(rooms)) + "|"]
    for rule in RULES:
        value = float(getattr(thresholds, rule[0]))
        gaps = [gap(rule, sample) for sample in samples]
        low, high = gaps[0]
        middle = place = None
        if low is not None and high is not None:
            # A resource that rests reads 0 or some ten-thousandths.
            floor = max(low, 1e-4)
            middle = math.sqrt(floor * high)
            place = 100 * math.log(value / floor) / math.log(high / floor)
        lines.append(
            f"| {rule[1]} | {value:g} | {shown(low)} | {shown(high)} | {shown(middle)} | "
            f"{'-' if place is None else f'{place:.0f} %'} | " + " | ".join(room(*one, value) for one in gaps) + " |"
        )
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
        "thresholds": threshold_table(fitted_on, {"h200-c": unseen, "h200-d": list(phases(OTHER_WORK))}),
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
