"""What a step of an engine costs, learnt while it serves: joules = a + b * decoding sequences + c_p * prefill tokens.

From differences of an engine's totals over a second of steps or more. The law is linear in totals, so a window in
which the batch changed is as good as a steady one. Each step's members are counted exactly, which makes an online fit
sound here where one on request boundaries is biased by 25-40 % (`docs/accuracy-requests.md`).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.account import EngineTotals
from jouletrace.requests.calibrate import (
    FEWEST_SAMPLES,
    MOST_CONDITION,
    MOST_RESIDUAL,
    SHORTEST_NS,
    VARIATION,
)
from jouletrace.requests.law import Law, Provenance

FORGETTING_NS: Final = 600 * 10**9
"""A sample's weight falls to 1/e in this time: contexts and traffic drift over tens of minutes, and within ten of
them an engine under load changes its batch."""
OLDEST_NS: Final = 3 * FORGETTING_NS
"""Older samples are dropped: their weight is under 5 %."""
REFIT_NS: Final = 10 * 10**9
"""Least time between two fits."""
SURE_REFIT_NS: Final = 60 * 10**9
"""The same while what is known explains all new samples."""
CELLS: Final = 48
SAMPLES_PER_CELL: Final = 6
"""Samples are kept by cell: half an octave of batch times an octave of prefill and of context. So rare loads are not
pushed out by common ones, and memory is bounded."""
ROBUST_ROUNDS: Final = 4
ROBUST_WIDTH: Final = 1.345
"""Huber's constant: residuals beyond this many standard deviations lose weight; 95 % efficient on clean data."""
LEAST_SPREAD: Final = 0.005
"""Relative residuals are not judged finer than the sensor's own 0.5 % per phase (`docs/accuracy.md`)."""
MOST_UNCERTAINTY: Final = 0.25
"""Largest standard error of a or b, as a part of it: four of them from zero."""


class Known(StrEnum):
    """How a step's law is known; the better one first."""

    FITTED = "fitted"
    """From this engine's own steps."""
    CALIBRATED = "calibrated"
    """From a calibration that the operator gave."""
    CONFIGURED = "configured"
    """Given by the operator as it is."""
    PRIOR = "prior"
    """A roofline estimate or another model's law: it may be off by half."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class StepLaw:
    """What a step costs, joules of all the engine's devices together, and how well that is known."""

    known: Known = Known.UNKNOWN
    fixed_joules: float = 0.0
    """a: per step, however many take part."""
    sequence_joules: float = 0.0
    """b: per decoding sequence and step."""
    prefill_token_joules: float = 0.0
    """c_p; 0 when prefill cannot be told apart: a and b then hold its part."""
    kv_token_joules: float = 0.0
    """c_kv: per context token read; 0 when it cannot be told apart: b then holds its part."""
    batch_low: float | None = None
    batch_high: float | None = None
    """Range of mean batches in which the law was fitted or has been checked; None when it has not been."""
    residual: float | None = None
    """Mean relative error over the engine's own windows."""
    samples: int = 0
    refusal: str = ""
    """Why there is no fit of the engine's own steps; empty when there is one."""

    def marginal_joules(self, context_tokens: float = 0.0) -> float:
        """Return the joules of one more sequence in a step, with `context_tokens` to read."""
        return self.sequence_joules + self.kv_token_joules * context_tokens

    def half_fixed_batch(self, context_tokens: float = 0.0) -> float:
        """Return B* = a/b: the batch at which the fixed and the marginal part of a decode step are equal."""
        marginal = self.marginal_joules(context_tokens)
        return self.fixed_joules / marginal if marginal > 0 else math.inf

    def joules_per_token(self, batch: float, context_tokens: float = 0.0) -> float | None:
        """Return a/batch + b, or None outside the range of batches in which the law was fitted or checked."""
        if self.batch_low is None or self.batch_high is None or not self.batch_low <= batch <= self.batch_high:
            return None
        return self.fixed_joules / batch + self.marginal_joules(context_tokens)


@dataclass(frozen=True, slots=True)
class _Sample:
    t_ns: int
    joules: float
    steps: float
    decode_sequences: float
    prefill_tokens: float
    kv_tokens: float

    @property
    def batch(self) -> float:
        return self.decode_sequences / self.steps


class _RefusedError(Exception):
    pass


class StepEnergy:
    """One engine's law, kept current. One evaluation costs microseconds; a fit, each ten seconds at most, 0.3 ms."""

    def __init__(self) -> None:
        self._last: EngineTotals | None = None
        self._cells: dict[tuple[int, int, int], deque[_Sample]] = {}
        self._base: Law | None = None
        self._fitted: StepLaw | None = None
        self._law = StepLaw(refusal="no steps have been reported")
        self._next_fit_ns = 0
        self._surprised = True

    @property
    def law(self) -> StepLaw:
        """The law as it is known now."""
        return self._law

    def observe(self, totals: EngineTotals, base: Law | None = None) -> StepLaw:
        """Take the engine's totals and return the law as it is known now.

        `base` is the law of the configuration, calibration or prior: used while the engine's own steps do not give
        one, and to tell prefill from decode when both rise and fall together.
        """
        if base != self._base:
            self._base, self._next_fit_ns = base, 0
            self._law = self._without_fit(self._law.refusal, ()) if self._fitted is None else self._law
        sample = self._sample(totals)
        if sample is not None:
            self._keep(sample)
        elif not self._cells:
            return self._law
        if totals.settled_ns >= self._next_fit_ns and (sample is not None or self._stale(totals.settled_ns)):
            self._fit(totals.settled_ns)
        return self._law

    def _stale(self, now_ns: int) -> bool:
        """Whether there is anything to forget though nothing new comes: asked once per refit interval."""
        self._next_fit_ns = now_ns + REFIT_NS
        return any(cell[0].t_ns < now_ns - OLDEST_NS for cell in self._cells.values())

    def _sample(self, totals: EngineTotals) -> _Sample | None:
        """Return what happened since the last sample, when that is a second of steps or more and makes sense."""
        last = self._last
        if last is None or not _follows(last, totals):
            # The first totals, or the account began anew: differences across that mean nothing.
            self._last = totals if _follows(_NOTHING, totals) else None
            return None
        if (totals.step_seconds - last.step_seconds) * 1e9 < SHORTEST_NS:
            return None
        self._last = totals
        sample = _Sample(
            totals.settled_ns,
            totals.step_joules - last.step_joules,
            totals.steps - last.steps,
            totals.step_decode_sequences - last.step_decode_sequences,
            totals.step_prefill_tokens - last.step_prefill_tokens,
            totals.step_kv_tokens - last.step_kv_tokens,
        )
        work = sample.decode_sequences + sample.prefill_tokens
        # Steps that did nothing although they took energy: the engine's counts are wrong.
        return sample if sample.joules > 0 and sample.steps > 0 and work > 0 else None

    def _keep(self, sample: _Sample) -> None:
        context = sample.kv_tokens / sample.decode_sequences if sample.decode_sequences else 0.0
        key = (_octave(sample.batch, 2), _octave(sample.prefill_tokens / sample.steps, 1), _octave(context, 1))
        cell = self._cells.pop(key, None)
        if cell is None:
            cell = deque(maxlen=SAMPLES_PER_CELL)
            if len(self._cells) >= CELLS:
                # Cells are in the order of their newest sample.
                del self._cells[next(iter(self._cells))]
        cell.append(sample)
        self._cells[key] = cell
        law = self._fitted
        if (
            law is None
            or law.residual is None
            or law.joules_per_token(sample.batch) is None
            or abs(_predicted(law, sample) / sample.joules - 1) > 3 * max(law.residual, LEAST_SPREAD)
        ):
            self._surprised = True

    def _fit(self, now_ns: int) -> None:
        for key in [key for key, cell in self._cells.items() if cell[-1].t_ns < now_ns - OLDEST_NS]:
            del self._cells[key]
        samples = [one for cell in self._cells.values() for one in cell if one.t_ns >= now_ns - OLDEST_NS]
        try:
            self._fitted = self._law = _fitted(samples, now_ns, self._base)
        except _RefusedError as refused:
            # A load that has become steady does not unmake what was learnt before, as long as it still holds.
            recent = [one for one in samples if one.t_ns >= now_ns - FORGETTING_NS]
            if self._fitted is None or not samples or (recent and _error(self._fitted, recent) > MOST_RESIDUAL):
                self._fitted = None
                self._law = self._without_fit(str(refused), samples)
        wait = SURE_REFIT_NS if self._fitted is not None and not self._surprised else REFIT_NS
        self._next_fit_ns, self._surprised = now_ns + wait, False

    def _without_fit(self, refusal: str, samples: Sequence[_Sample]) -> StepLaw:
        base = self._base
        if base is None:
            return StepLaw(refusal=refusal, samples=len(samples))
        known = {
            Provenance.CALIBRATED: Known.CALIBRATED,
            Provenance.CONFIGURED: Known.CONFIGURED,
            Provenance.PRIOR: Known.PRIOR,
        }[base.provenance]
        law = StepLaw(
            known=known,
            fixed_joules=base.fixed_joules,
            sequence_joules=base.decode_sequence_joules,
            prefill_token_joules=base.prefill_token_joules,
            kv_token_joules=base.kv_token_joules,
            samples=len(samples),
            refusal=refusal,
        )
        if not samples:
            return law
        residual = _error(law, samples)
        low, high = _range(samples) if residual <= MOST_RESIDUAL and len(samples) >= FEWEST_SAMPLES else (None, None)
        return replace(law, batch_low=low, batch_high=high, residual=residual)


def _follows(before: EngineTotals, after: EngineTotals) -> bool:
    """Whether nothing went backward between the two; false for anything that is not a number."""
    return (
        after.settled_ns >= before.settled_ns
        and after.step_joules >= before.step_joules
        and after.step_seconds >= before.step_seconds
        and after.steps >= before.steps
        and after.step_decode_sequences >= before.step_decode_sequences
        and after.step_prefill_tokens >= before.step_prefill_tokens
        and after.step_kv_tokens >= before.step_kv_tokens
        and math.isfinite(after.step_joules + after.steps + after.step_decode_sequences)
        and math.isfinite(after.step_prefill_tokens + after.step_kv_tokens + after.step_seconds)
    )


_NOTHING: Final = EngineTotals()


def _octave(value: float, parts: int) -> int:
    return round(parts * math.log2(value)) if value >= 0.5 else -parts


def _predicted(law: StepLaw, sample: _Sample) -> float:
    return (
        law.fixed_joules * sample.steps
        + law.sequence_joules * sample.decode_sequences
        + law.prefill_token_joules * sample.prefill_tokens
        + law.kv_token_joules * sample.kv_tokens
    )


def _error(law: StepLaw, samples: Sequence[_Sample]) -> float:
    return sum(abs(_predicted(law, one) / one.joules - 1) for one in samples) / len(samples)


def _range(samples: Sequence[_Sample]) -> tuple[float, float]:
    """Return the second smallest and second largest batch: one odd window shall not vouch for a range."""
    batches = sorted(one.batch for one in samples)
    return batches[1], batches[-2]


def _fitted(samples: Sequence[_Sample], now_ns: int, base: Law | None) -> StepLaw:
    """Return the robust, age-weighted least-squares law of the samples; raise _RefusedError with the reason."""
    if len(samples) < FEWEST_SAMPLES:
        raise _RefusedError(
            f"{len(samples)} of the {FEWEST_SAMPLES} windows that a law needs have been seen, each of a second of "
            "steps or more"
        )
    low, high = _range(samples)
    if low <= 0 or high < VARIATION * low:
        raise _RefusedError(
            f"the batch ran from {low:.3g} to {high:.3g} only; a law needs a factor of {VARIATION:g} "
            f"within {OLDEST_NS / 60e9:.0f} minutes"
        )
    rows = np.array(
        [(one.steps, one.decode_sequences, one.prefill_tokens, one.kv_tokens, one.joules, one.t_ns) for one in samples],
        np.float64,
    )
    weights = np.sqrt(np.exp((rows[:, 5] - now_ns) / FORGETTING_NS))
    scaled = rows[:, :4] / rows[:, 4:5]
    ratio = base.prefill_token_joules / base.decode_sequence_joules if base and base.decode_sequence_joules else 0.0
    tied = scaled[:, 1] + ratio * scaled[:, 2]
    prefills, contexts = rows[:, 2] > 0, rows[:, 3] > 0
    # The richest law that the samples can tell apart. Prefill that cannot be told from decode is priced by the base
    # law's ratio of the two (both are mostly the same arithmetic per token), or stays inside a and b without one.
    for kv in (True, False) if contexts.any() else (False,):
        for prefill in (True, False) if prefills.any() else (False,):
            columns = [scaled[:, 0], scaled[:, 1] if prefill else tied]
            columns += [scaled[:, 2]] if prefill else []
            columns += [scaled[:, 3]] if kv else []
            matrix = np.stack(columns, axis=1)
            if _condition(matrix * weights[:, None]) > MOST_CONDITION:
                continue
            coefficients, uncertainty, residual = _robust(matrix, weights)
            if (kv or prefill) and coefficients.min() <= 0:
                continue
            if coefficients[0] <= 0 or coefficients[1] <= 0:
                raise _RefusedError("the windows show no positive cost of a step and of a sequence: check the counts")
            if residual > MOST_RESIDUAL:
                raise _RefusedError(f"no law fits: the mean error is {100 * residual:.0f} %")
            if uncertainty[:2].max() > MOST_UNCERTAINTY:
                continue
            return StepLaw(
                known=Known.FITTED,
                fixed_joules=float(coefficients[0]),
                sequence_joules=float(coefficients[1]),
                prefill_token_joules=float(coefficients[2] if prefill else ratio * coefficients[1]),
                kv_token_joules=float(coefficients[-1]) if kv else 0.0,
                batch_low=low,
                batch_high=high,
                residual=residual,
                samples=len(samples),
            )
    raise _RefusedError("the windows do not tell the cost of a step from that of a sequence")


def _condition(matrix: NDArray[np.float64]) -> float:
    """Return the condition number of the matrix with columns of length one."""
    normal = matrix.T @ matrix
    scale = np.sqrt(normal.diagonal())
    if not scale.min() > 0:
        return math.inf
    values = np.linalg.eigvalsh(normal / np.outer(scale, scale))
    return math.sqrt(values[-1] / values[0]) if values[0] > 0 else math.inf


def _robust(
    matrix: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return Huber's solution of matrix @ x = 1, its relative standard errors and the mean error of what it trusts."""
    trust = weights
    for _ in range(ROBUST_ROUNDS):
        part = matrix * trust[:, None]
        inverse = np.linalg.inv(part.T @ part)
        solution = inverse @ (part.T @ trust)
        off = np.abs(matrix @ solution - 1.0)
        spread = max(1.4826 * float(np.median(off)), LEAST_SPREAD)
        trust = weights * np.sqrt(np.minimum(1.0, ROBUST_WIDTH * spread / np.maximum(off, 1e-12)))
    errors = spread * np.sqrt(inverse.diagonal()) / np.maximum(np.abs(solution), 1e-300)
    return solution, errors, float((off * trust).sum() / trust.sum())
