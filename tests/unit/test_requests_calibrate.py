import numpy as np
import pytest

from jouletrace.requests.calibrate import CalibrationRefusedError, Sample, fit
from jouletrace.requests.law import Provenance

S = 1_000_000_000
A, C_P, C_D = 2.5, 15e-3, 40e-3


def sample(prefill: float, decode: float, *, steps: int = 200, noise: float = 1.0, seconds: float = 4) -> Sample:
    joules = noise * steps * (A + C_P * prefill + C_D * decode)
    return Sample(round(seconds * S), joules, steps, steps * prefill, steps * decode)


GRID = [(0, 8), (0, 64), (128, 0), (256, 32), (512, 8), (512, 64)]


def test_an_exact_law_is_found_exactly() -> None:
    found = fit([sample(*one) for one in GRID])
    law = found.law
    assert (law.fixed_joules, law.prefill_token_joules, law.decode_sequence_joules) == pytest.approx((A, C_P, C_D))
    assert law.provenance is Provenance.CALIBRATED
    assert found.mean_error == pytest.approx(0, abs=1e-9)
    assert law.half_fixed_batch == pytest.approx(62.5)


def test_noise_shows_as_residual() -> None:
    rng = np.random.default_rng(1)
    found = fit([sample(*one, noise=1 + 0.03 * rng.standard_normal()) for one in GRID * 20])
    assert found.law.decode_sequence_joules == pytest.approx(C_D, rel=0.05)
    # The mean of |x| is 0.8 standard deviations.
    assert found.mean_error == pytest.approx(0.024, rel=0.2)
    assert found.worst_error == found.law.error


def test_a_part_that_would_be_negative_is_zero() -> None:
    cheap = [Sample(4 * S, 200 * C_D * n + 200 * C_P * p + 1e-3 * (n == 64), 200, 200 * p, 200 * n) for p, n in GRID]
    law = fit([sample(0, 8), *cheap][1:]).law
    assert law.fixed_joules >= 0
    assert law.fixed_joules == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([sample(*one) for one in GRID[:4]], "4 samples"),
        ([sample(*one, seconds=0.5) for one in GRID], "0 samples"),
        ([sample(p, 32 + n) for n, p in enumerate((0, 128, 256, 384, 512))], "decoding sequences per step ran from"),
        ([sample(0, n) for n in (1, 2, 8, 32, 64)], "prefill tokens per step ran from 0 to 0"),
        ([sample(8 * n, n) for n in (1, 2, 8, 32, 64)], "rose and fell together"),
    ],
)
def test_samples_that_cannot_tell_are_refused(samples: list[Sample], words: str) -> None:
    with pytest.raises(CalibrationRefusedError, match=words):
        fit(samples)


def test_energy_that_follows_no_law_is_refused() -> None:
    samples = [sample(*one, noise=noise) for one, noise in zip(GRID, (0.3, 3, 1, 4, 0.2, 1), strict=True)]
    with pytest.raises(CalibrationRefusedError, match="no law fits"):
        fit(samples)
