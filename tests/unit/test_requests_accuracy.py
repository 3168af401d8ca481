"""Joules per request on real recordings against step truth; the figures stand in docs/accuracy.md."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.request_truth import README_GRID, Truth, errors, truth

from jouletrace.requests.calibrate import CalibrationRefusedError
from jouletrace.requests.law import Law
from jouletrace.requests.roofline import ModelDescription, peak_of, prior
from jouletrace.trace.analyze import analyze, calibrate
from jouletrace.trace.events import Fidelity
from jouletrace.trace.recording import Recording, read

REPOSITORY = Path(__file__).parents[2]
EXCLUSIVE = REPOSITORY / "exporter/jouletrace/demo/recording.json.gz"
CHUNKED = REPOSITORY / "tests/data/h200-c-chunked.json.gz"
MODEL = ModelDescription(parameters=8.03e9, layers=32, kv_heads=8, head_dim=128)
"""The recordings' model (their README): Llama-shaped, 8 billion parameters, bf16."""


@cache
def recording(path: Path) -> Recording:
    return read(path)


@cache
def true_joules(path: Path) -> Truth:
    return truth(recording(path), README_GRID if path == CHUNKED else None)


@cache
def analyzed(path: Path, fidelity: Fidelity, law: Law | None = None) -> dict[str, Any]:
    return analyze(recording(path), fidelity=fidelity, law=law)


def joules(result: dict[str, Any]) -> dict[str, float]:
    return {one["id"]: one["energy_joules"] for one in result["requests"]}


@pytest.mark.parametrize(
    ("path", "fidelity", "method", "median", "p95"),
    [
        (EXCLUSIVE, Fidelity.STEPS, "steps", 0.005, 0.02),
        (EXCLUSIVE, Fidelity.BOUNDARIES, "boundaries_exclusive", 0.01, 0.03),
        (CHUNKED, Fidelity.STEPS, "steps", 0.005, 0.02),
        (CHUNKED, Fidelity.BOUNDARIES, "boundaries_calibrated", 0.02, 0.06),
    ],
)
def test_requests_meet_step_truth(path: Path, fidelity: Fidelity, method: str, median: float, p95: float) -> None:
    result, true = analyzed(path, fidelity), true_joules(path)
    found = joules(result)
    assert set(found) == set(true.joules)
    for rate in set(true.phase.values()):
        off = errors(found, true, rate)
        assert off[0] <= median, rate
        assert off[1] <= p95, rate
    assert {one["method"] for one in result["requests"]} == {method}
    for one in result["requests"]:
        assert one["low"] <= true.joules[one["id"]] <= one["high"], one["id"]


def test_chunked_boundaries_with_a_roofline_prior_alone() -> None:
    peak = peak_of("NVIDIA H200")
    assert peak is not None
    result = analyzed(CHUNKED, Fidelity.BOUNDARIES, prior(MODEL, peak))
    median, p95 = errors(joules(result), true_joules(CHUNKED))
    assert median <= 0.10
    assert p95 <= 0.25
    assert {one["method"] for one in result["requests"]} == {"boundaries_prior"}


@pytest.mark.parametrize("size", [0.1, 0.7, 1.4, 8.0])
def test_a_prior_of_the_wrong_size_is_put_right_by_finished_requests(size: float) -> None:
    peak = peak_of("NVIDIA H200")
    assert peak is not None
    result = analyzed(CHUNKED, Fidelity.BOUNDARIES, prior(MODEL, peak).scaled(size))
    median, p95 = errors(joules(result), true_joules(CHUNKED))
    assert median <= 0.10
    assert p95 <= 0.25


@pytest.mark.parametrize("path", [EXCLUSIVE, CHUNKED])
def test_the_usual_ways_of_sharing_are_far_off(path: Path) -> None:
    true = true_joules(path)
    assert errors(true.token_share, true)[0] > 0.2
    assert errors(true.time_share, true)[0] > 0.1
    assert errors(true.window, true)[0] > 5


@pytest.mark.parametrize("path", [EXCLUSIVE, CHUNKED])
@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_every_joule_is_in_the_account(path: Path, fidelity: Fidelity) -> None:
    result = analyzed(path, fidelity)
    ledger = result["ledger"]
    assert ledger["device_joules"] == pytest.approx(result["energy_joules"], rel=1e-9)
    assert abs(ledger["residual_joules"]) < 1e-6 * ledger["device_joules"]
    parts = ledger["attributed_joules"] + sum(ledger["idle_joules"].values()) + ledger["unattributed_joules"]
    assert parts + ledger["residual_joules"] == pytest.approx(ledger["device_joules"], rel=1e-12)
    # The requests' steps, and at most half a percent of host time between them.
    assert sum(true_joules(path).joules.values()) <= ledger["attributed_joules"]
    assert ledger["attributed_joules"] <= 1.005 * sum(true_joules(path).joules.values())
    assert sum(joules(result).values()) == pytest.approx(ledger["attributed_joules"], rel=1e-9)


def test_the_recordings_own_phases_tell_idle_from_work_without_requests() -> None:
    result = analyzed(EXCLUSIVE, Fidelity.STEPS)
    idle_phases = sum(one["energy_joules"] for one in result["phases"] if one["name"].startswith("idle"))
    # Between the phases, too, the GPU rests for a second or two (20 pauses at about 120 W and some cooling down).
    assert idle_phases <= sum(result["ledger"]["idle_joules"].values()) <= idle_phases + 9_000
    worked = sum(
        one["energy_joules"]
        for one in result["phases"]
        if one["name"] not in ("serve", "square_wave", "decode_duty") and not one["name"].startswith("idle")
    )
    assert result["ledger"]["unattributed_joules"] >= worked * 0.99


def test_calibration_on_the_steady_grid_meets_the_published_law() -> None:
    found = calibrate(recording(CHUNKED))
    a, c_p, c_d = README_GRID
    assert found.law.fixed_joules == pytest.approx(a, rel=0.01)
    assert found.law.prefill_token_joules == pytest.approx(c_p, rel=0.01)
    assert found.law.decode_sequence_joules == pytest.approx(c_d, rel=0.01)
    assert found.samples == 15
    assert found.mean_error == pytest.approx(0.020, abs=0.002)
    assert found.worst_error == pytest.approx(0.064, abs=0.002)


def test_the_prior_comes_near_the_calibration() -> None:
    peak = peak_of("NVIDIA H200")
    assert peak is not None
    law, (a, c_p, c_d) = prior(MODEL, peak), README_GRID
    assert law.fixed_joules == pytest.approx(a, rel=0.1)
    assert law.prefill_token_joules == pytest.approx(c_p, rel=0.1)
    assert law.decode_sequence_joules == pytest.approx(c_d, rel=0.1)


def test_calibration_from_the_steps_of_serving_alone() -> None:
    whole = recording(CHUNKED)
    serving = replace(whole, events=tuple(event for event in whole.events if event["kind"] != "work"))
    found = calibrate(serving)
    a, c_p, c_d = README_GRID
    # Windows of two seconds of mixed load; the steady grid of the same recording is the reference. There a decode
    # batch is what it says; in serving it is padded to 1, 4, 16 or 64, so that a sequence costs up to four.
    assert found.law.fixed_joules == pytest.approx(a, rel=0.1)
    assert found.law.prefill_token_joules == pytest.approx(c_p, rel=0.1)
    assert c_d < found.law.decode_sequence_joules < 4 * c_d
    assert found.mean_error < 0.03
    with pytest.raises(CalibrationRefusedError):
        calibrate(serving, Fidelity.BOUNDARIES)
