"""Fit the step-energy law to measured steps: steady phases, or all steps of windows of a second or more.

The caller must have measured each sample's energy over a time in which nothing but those steps ran. Samples shorter
than a second are refused, because the edges' uncertainty (a 20 ms sensor sample each) would exceed 4 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.law import Law, Provenance

SHORTEST_NS = 1_000_000_000
"""Shortest sample: two edges within 20 ms sensor samples are at most 4 % of it."""
FEWEST_SAMPLES = 5
"""Three coefficients, and two more samples that can contradict them."""
VARIATION = 3.0
"""Each of batch and prefill must differ by this factor between samples: below it a public cost harness refuses its
fits too, because the fixed and the marginal part cannot be told apart."""
MOST_CONDITION = 100.0
"""Largest condition number of the scaled samples: beyond it batch and prefill moved together, and a 1 % error of
measurement could become an error of the order of the coefficients."""
MOST_RESIDUAL = 0.15
"""Largest mean relative residual of a law worth using: the prior's own error is about this."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Steps that were measured together, totals over all of them."""

    duration_ns: int
    joules: float
    steps: float
    prefill_tokens: float
    decode_sequences: float
    """Sum over the steps of the decoding sequences in each."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted law and how well it fits, relative errors of the samples."""

    law: Law
    samples: int
    mean_error: float
    worst_error: float


class CalibrationRefusedError(ValueError):
    """The samples cannot tell the coefficients apart; the message says what must vary."""


def fit(samples: Sequence[Sample]) -> Calibration:
    """Return the non-negative law with the least squared relative error over the samples.

    Raises CalibrationRefusedError when there are too few samples, when decoding sequences per step or prefill
    tokens per step vary by less than a factor of three, when both moved together, or when no law fits within 15 %.
    """
    usable = [one for one in samples if one.duration_ns >= SHORTEST_NS and one.joules > 0 and one.steps > 0]
    if len(usable) < FEWEST_SAMPLES:
        raise CalibrationRefusedError(
            f"{len(usable)} samples of a second or more with steps in them are too few for a law: "
            f"run steady load at {FEWEST_SAMPLES} or more different batch sizes and prefill rates"
        )
    columns = np.array([[one.steps, one.prefill_tokens, one.decode_sequences] for one in usable], np.float64)
    _require_variation(columns[:, 2] / columns[:, 0], "decoding sequences per step", "batch sizes")
    _require_variation(columns[:, 1] / columns[:, 0], "prefill tokens per step", "prompt rates")
    relative = columns / np.array([one.joules for one in usable])[:, None]
    scale = np.linalg.norm(relative, axis=0)
    condition = float(np.linalg.cond(relative / scale))
    if condition > MOST_CONDITION:
        raise CalibrationRefusedError(
            "prefill tokens and decoding sequences rose and fell together, so their costs cannot be told apart: "
            "add phases of decode alone and of prefill alone"
        )
    coefficients = _non_negative(relative / scale, np.ones(len(usable))) / scale
    if coefficients[0] + coefficients[2] <= 0:
        raise CalibrationRefusedError("the samples show no cost of decoding at all: check their energies and counts")
    errors = np.abs(relative @ coefficients - 1.0)
    if errors.mean() > MOST_RESIDUAL:
        raise CalibrationRefusedError(
            f"no law fits: its mean error is {100 * errors.mean():.0f} % over {len(usable)} samples; "
            "check that nothing else ran on the GPU and that all steps were counted"
        )
    law = Law(
        fixed_joules=float(coefficients[0]),
        prefill_token_joules=float(coefficients[1]),
        decode_sequence_joules=float(coefficients[2]),
        provenance=Provenance.CALIBRATED,
        error=float(errors.max()),
    )
    return Calibration(law, len(usable), float(errors.mean()), float(errors.max()))


def _require_variation(per_step: NDArray[np.float64], what: str, mend: str) -> None:
    low, high = float(per_step.min()), float(per_step.max())
    if high <= 0 or (low > 0 and high < VARIATION * low):
        raise CalibrationRefusedError(
            f"{what} ran from {low:.3g} to {high:.3g} only, and a law needs a factor of {VARIATION:g}: "
            f"add phases with other {mend}"
        )


def _non_negative(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the least-squares solution without negative entries: the best over all sets of columns (there are 7)."""
    count = matrix.shape[1]
    best, least = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = matrix[:, chosen]
            solution = np.linalg.lstsq(part, target, rcond=None)[0]
            left = target - part @ solution
            if np.all(solution >= 0) and float(left @ left) < least:
                best = np.zeros(count)
                best[list(chosen)] = solution
                least = float(left @ left)
    return best
