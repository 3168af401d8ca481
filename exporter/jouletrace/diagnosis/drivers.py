"""Where a device's power goes: static, memory traffic, tensor pipes, other compute, links, and what nobody explains.

    watts = static + sum over terms of k(term) * activity(term) * (SM clock / highest SM clock) ** exponent(term)

GPM's ratios count cycles, so work per second falls with the clock, and the voltage with it: hence the exponents.
Coefficients are fitted per GPU model by `docs/fit_drivers.py`, shipped in `coefficients.json`, and refined per device
while it runs. Static power is pinned to the learnt idle level of the device itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources

import msgspec
import numpy as np

from jouletrace.diagnosis.signals import DeviceSignals, sound
from jouletrace.energy.baseline import QUIET_ACTIVITY, IdleKind
from jouletrace.gpu.readings import Float64s, Link, Pipe

FORMAT = 1


class Driver(StrEnum):
    """What power goes to."""

    STATIC = "static"
    """Paid whatever runs: leakage, clocks, refresh."""
    MEMORY = "memory"
    TENSOR = "tensor"
    OTHER_COMPUTE = "other_compute"
    """Floating-point and integer pipes, and SMs at work whatever they do."""
    LINKS = "links"
    UNEXPLAINED = "unexplained"


class Term(StrEnum):
    """What a coefficient multiplies."""

    MEMORY = "memory"
    """Ratio of the theoretical DRAM bandwidth."""
    TENSOR = "tensor"
    """Busy ratio of the tensor pipes."""
    SM = "sm"
    """Busy ratio of the SMs."""
    FLOAT = "float"
    """Busy ratios of the FP16, FP32 and FP64 pipes, added up."""
    INTEGER = "integer"
    """Busy ratio of the integer pipe."""
    LINKS = "links"
    """PCIe and NVLink traffic both ways, GB/s."""


DRIVER_OF: Mapping[Term, Driver] = {
    Term.MEMORY: Driver.MEMORY,
    Term.TENSOR: Driver.TENSOR,
    Term.SM: Driver.OTHER_COMPUTE,
    Term.FLOAT: Driver.OTHER_COMPUTE,
    Term.INTEGER: Driver.OTHER_COMPUTE,
    Term.LINKS: Driver.LINKS,
}
TERMS, DRIVERS, LINKS = tuple(Term), tuple(Driver), tuple(Link)
_SM, _TENSOR, _INTEGER = Pipe.SM, Pipe.TENSOR, Pipe.INTEGER
_FP16, _FP32, _FP64 = Pipe.FP16, Pipe.FP32, Pipe.FP64
"""Looked up here once: in Python 3.11 a member of an enumeration takes five times a dict's look-up."""

GENERIC_MODEL = "NVIDIA H200"
"""Whose coefficients stand in for a model without its own, scaled by the board's power limit: the only one measured."""
GENERIC_CONFIDENCE = 0.5
"""Of coefficients that are another model's."""
NO_ACTIVITY_CONFIDENCE = 0.3
"""Without GPM only the static part is known, and the rest is called unexplained."""
MISSING_TERM_CONFIDENCE = 0.6
"""When memory, tensor or SM activity is absent: its power turns up as unexplained."""

HALF_LIFE_SECONDS = 3600.0
"""Refinement forgets what it saw by half in an hour of observed time: cards age slowly, coolant does not."""
LEAST_SECONDS = 120.0
"""Observed time before any coefficient moves: the shipped fit rests on 93 s of 17 half phases."""
LEAST_OWN_WATTS = 10.0
"""A coefficient may move once the root mean square of its term's watts that no other term can mimic is above this:
1.4 % of an H200's limit, about the model's own error there."""
MOST_FACTOR, MOST_GENERIC_FACTOR = 1.5, 4.0
"""How far refinement may take a coefficient from the shipped one, either way: the coefficients of one
H200 predict another within 5 %; of a model without its own coefficients hardly anything is known."""
PRIOR_WATTS = 20.0
"""How strongly a coefficient holds on to the shipped one: as if its term had been seen at this many watts there."""
MOST_SWING = 0.1
"""A span in which the SM clock swung by more than this part tells nothing of coefficients."""


class Coefficients(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a GPU model's power is made of."""

    watts: dict[Term, float]
    """At full activity (links: at 1 GB/s) and the highest SM clock."""
    clock_exponent: dict[Term, float]
    """Power of (SM clock / highest SM clock) by which a term's watts scale."""
    idle_watts: dict[IdleKind, float]
    """Where the device's own levels are not learnt yet."""
    power_limit_watts: float

    def scaled(self, power_limit_watts: float) -> "Coefficients":
        """Return them for a device of another power limit."""
        part = power_limit_watts / self.power_limit_watts
        return msgspec.structs.replace(
            self,
            watts={term: watts * part for term, watts in self.watts.items()},
            idle_watts={kind: watts * part for kind, watts in self.idle_watts.items()},
            power_limit_watts=power_limit_watts,
        )


class ShippedCoefficients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: coefficients by the GPU model's name as the driver gives it."""

    format: int
    models: dict[str, Coefficients]


@dataclass(frozen=True, slots=True)
class Model:
    """Coefficients for a device, and how far to trust them."""

    coefficients: Coefficients
    confidence: float
    """1 when they were fitted on this GPU model."""
    generic: bool = False


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A span's joules by driver."""

    joules: Mapping[Driver, float]
    """Every driver; adds up to the span's energy, none is negative. Empty without an energy."""
    residual_joules: float | None
    """Energy less what the model says: above 0 it is the unexplained part, below 0 the parts were scaled down."""
    confidence: float
    """0 to 1: whose coefficients, and whether all of their inputs were there."""


@cache
def shipped() -> Mapping[str, Coefficients]:
    """Return the shipped coefficients by GPU model."""
    content = resources.files("jouletrace.diagnosis").joinpath("coefficients.json").read_bytes()
    return msgspec.json.decode(content, type=ShippedCoefficients).models


def model_of(gpu_name: str, board_limit_watts: float | None) -> Model:
    """Return the coefficients of a GPU: its model's own, or the generic ones scaled by what its board was made for.

    Give `DeviceInfo.board_limit_watts`, not the enforced limit: a lower limit makes the same work slower (which the
    clock shows), and does not make a byte or a floating-point operation cheaper.
    """
    own = shipped().get(gpu_name)
    if own is not None:
        return Model(own, 1.0)
    generic = shipped()[GENERIC_MODEL]
    if board_limit_watts is None or not 0 < board_limit_watts < float("inf"):
        return Model(generic, GENERIC_CONFIDENCE / 2, generic=True)
    return Model(generic.scaled(board_limit_watts), GENERIC_CONFIDENCE, generic=True)


def decompose(signals: DeviceSignals, coefficients: Coefficients, confidence: float = 1.0) -> Decomposition:
    """Return a span's joules by driver; `confidence` is the coefficients' own.

    What is measured wins: when the parts come to more than the span's energy they are scaled down (static first
    takes its level, the rest share what is left), when to less the remainder is unexplained.
    """
    signals, _ = sound(signals)
    energy, seconds = signals.energy_joules, signals.seconds
    if energy is None or seconds <= 0:
        return Decomposition({}, None, 0.0)
    static = static_watts(signals, coefficients) * seconds
    joules = dict.fromkeys(DRIVERS, 0.0)
    dynamic = 0.0
    for term, watts in zip(TERMS, term_watts(signals, coefficients), strict=True):
        joules[DRIVER_OF[term]] += watts * seconds
        dynamic += watts * seconds
    residual = energy - static - dynamic
    joules[Driver.STATIC] = min(static, energy)
    left = energy - joules[Driver.STATIC]
    if dynamic > left:
        part = left / dynamic
        for driver in (Driver.MEMORY, Driver.TENSOR, Driver.OTHER_COMPUTE, Driver.LINKS):
            joules[driver] *= part
    else:
        joules[Driver.UNEXPLAINED] = left - dynamic
    if not signals.has_activity:
        confidence *= NO_ACTIVITY_CONFIDENCE
    elif signals.dram_ratio is None or _TENSOR not in signals.busy_ratio or _SM not in signals.busy_ratio:
        confidence *= MISSING_TERM_CONFIDENCE
    return Decomposition(joules, residual, confidence)


def static_watts(signals: DeviceSignals, coefficients: Coefficients) -> float:
    """Return the idle level that a span's static power is pinned to: bare when nobody holds the device.

    Where nobody can tell, work means that somebody does, and without work the nearer level is taken.
    """
    bare = signals.idle_watts.get(IdleKind.BARE, coefficients.idle_watts[IdleKind.BARE])
    parked = signals.idle_watts.get(IdleKind.PARKED, max(bare, coefficients.idle_watts[IdleKind.PARKED]))
    busiest = max(signals.busy_ratio.get(_SM, 0.0), signals.dram_ratio or 0.0)
    if signals.held or busiest > QUIET_ACTIVITY:
        return parked
    if signals.held is None and (signals.watts or 0.0) > (bare + parked) / 2:
        return parked
    return bare


def term_inputs(signals: DeviceSignals) -> list[float]:
    """Return each term's activity over a span, in the order of `TERMS`; 0 where it is absent."""
    busy = signals.busy_ratio
    return [
        signals.dram_ratio or 0.0,
        busy.get(_TENSOR, 0.0),
        busy.get(_SM, 0.0),
        busy.get(_FP16, 0.0) + busy.get(_FP32, 0.0) + busy.get(_FP64, 0.0),
        busy.get(_INTEGER, 0.0),
        sum(signals.bytes_per_second.get(link, 0.0) for link in LINKS) / 1e9,
    ]


def clock_ratio(signals: DeviceSignals) -> float:
    """Return the SM clock as a part of the highest, 1 where it is not known."""
    clock, top = signals.sm_clock_hertz, signals.max_sm_clock_hertz
    return 1.0 if clock is None or top is None else min(1.0, clock / top)


def term_watts(signals: DeviceSignals, coefficients: Coefficients) -> list[float]:
    """Return each term's mean power over a span, in the order of `TERMS`."""
    clock = clock_ratio(signals)
    return [
        coefficients.watts[term] * value * clock ** coefficients.clock_exponent[term]
        for term, value in zip(TERMS, term_inputs(signals), strict=True)
    ]


def bounded_least_squares(gram: Float64s, moment: Float64s, low: float, high: float) -> Float64s:
    """Return x in [low, high] that minimizes x'Gx - 2m'x, by coordinate descent.

    gram: (n, n), positive semidefinite; moment: (n,). Non-negative least squares with low = 0, high = infinity.
    The problem is convex and its box separable, so that the descent ends at the minimum.
    """
    found = np.clip(np.ones(len(moment)), low, high)
    for _ in range(100_000):
        worst = 0.0
        for at in range(len(moment)):
            if gram[at, at] <= 0:
                continue
            step = float((moment[at] - gram[at] @ found) / gram[at, at])
            new = min(max(found[at] + step, low), high)
            worst = max(worst, abs(new - found[at]) / max(1.0, abs(new)))
            found[at] = new
        if worst < 1e-10:
            break
    return found


class Refinement:
    """Learns one device's own coefficients while it runs.

    Terms are held as watts that the shipped coefficients predict, so that what is learnt is a factor near 1 for
    each. Without enough observed time, or for a term that never ran apart from the others, the factor stays 1.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._most_factor = MOST_GENERIC_FACTOR if model.generic else MOST_FACTOR
        self._gram = [[0.0] * len(TERMS) for _ in TERMS]
        self._moment = [0.0] * len(TERMS)
        self._seconds = 0.0
        self._factors: Sequence[float] = (1.0,) * len(TERMS)
        self._coefficients = model.coefficients

    @property
    def coefficients(self) -> Coefficients:
        """The coefficients as far as they are learnt."""
        return self._coefficients

    @property
    def confidence(self) -> float:
        """The shipped coefficients' confidence; half of what generic ones lack comes with learning."""
        learnt = sum(factor != 1.0 for factor in self._factors) / len(TERMS)
        return self._model.confidence + (1.0 - self._model.confidence) * learnt / 2

    @property
    def factors(self) -> Mapping[Term, float]:
        """What each shipped coefficient is multiplied by."""
        return dict(zip(TERMS, self._factors, strict=True))

    def observe(self, signals: DeviceSignals) -> None:
        """Take in a span; one that lacks an input, or in which the clock swung, is passed over."""
        signals, dropped = sound(signals)
        watts, busy = signals.watts, signals.busy_ratio
        if dropped or watts is None or signals.sm_clock_hertz is None or (signals.sm_clock_swing or 0.0) > MOST_SWING:
            return
        if signals.dram_ratio is None or _SM not in busy or _TENSOR not in busy or signals.mig_enabled:
            return
        predicted = term_watts(signals, self._model.coefficients)
        above = watts - static_watts(signals, self._model.coefficients)
        kept = 0.5 ** (signals.seconds / HALF_LIFE_SECONDS)
        weight = signals.seconds
        for at, row in enumerate(self._gram):
            scale = weight * predicted[at]
            self._gram[at] = [old * kept + scale * other for old, other in zip(row, predicted, strict=True)]
            self._moment[at] = self._moment[at] * kept + scale * above
        self._seconds = self._seconds * kept + weight

    def solve(self) -> None:
        """Fit the factors to what was observed; cheap enough for once a minute."""
        if self._seconds < LEAST_SECONDS:
            return
        gram = np.array(self._gram) / self._seconds
        moment = np.array(self._moment) / self._seconds
        free = _tells_apart(gram)
        factors = np.ones(len(TERMS))
        if free.any():
            # Terms that stay as they are leave the rest to be explained by the free ones.
            rest = moment[free] - gram[np.ix_(free, ~free)].sum(axis=1)
            prior = PRIOR_WATTS**2
            inner = gram[np.ix_(free, free)] + prior * np.eye(int(free.sum()))
            factors[free] = bounded_least_squares(inner, rest + prior, 1 / self._most_factor, self._most_factor)
        self._factors = tuple(factors.tolist())
        shipped_watts = self._model.coefficients.watts
        self._coefficients = msgspec.structs.replace(
            self._model.coefficients,
            watts={term: shipped_watts[term] * factor for term, factor in self.factors.items()},
        )


def _tells_apart(gram: Float64s) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which terms ran enough apart from all others, shape (n,): the variance that the others leave.

    The reciprocal of the inverse Gram matrix's diagonal is what is left of a term's mean square once the others have
    explained as much of it as they can (the denominator of the variance inflation factor).
    """
    inverse = np.linalg.inv(gram + 1e-6 * np.eye(len(gram)))
    apart: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.diag(inverse) < LEAST_OWN_WATTS**-2
    return apart
