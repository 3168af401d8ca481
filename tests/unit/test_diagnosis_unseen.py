"""Verdicts and drivers on work that no coefficient was fitted to and no threshold chosen on (docs/diagnosis.md)."""

from pathlib import Path
from typing import Any

import pytest

from jouletrace.trace.analyze import analyze
from jouletrace.trace.recording import read

RECORDING = Path(__file__).parents[1] / "data/h200-d-unseen.json.gz"


@pytest.fixture(scope="module")
def phases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = analyze(read(RECORDING))["phases"]
    return found


def test_every_phase_gets_a_verdict_that_its_work_allows(phases: list[dict[str, Any]]) -> None:
    assert len(phases) == 20
    assert {one["name"]: one["verdict"] for one in phases if one["verdict"] not in one["labels"]["expected"]} == {}


def test_what_the_other_card_and_model_leave_unexplained_is_under_a_tenth(phases: list[dict[str, Any]]) -> None:
    for one in phases:
        assert sum(one["drivers"].values()) == pytest.approx(one["energy_joules"], rel=1e-6)
        assert one["drivers"]["unexplained"] <= 0.10 * one["energy_joules"], one["name"]


def test_flags_say_what_was_done(phases: list[dict[str, Any]]) -> None:
    flags = {one["name"]: set(one["flags"]) for one in phases}
    assert "utilization_misleading" in flags["host to device"] & flags["device to host"]
    assert "fp32_pipe" in flags["matrix product fp32"]
    assert "power_capped" in flags["prefill 4096"] & flags["matrix product fp16"]
    assert not flags["decode 1 x 512"] | flags["idle"] | flags["decode 48 x 4096"]
    # These began within 0.1 s of other work, whose flags are not theirs.
    assert not flags["parked again"] | flags["decode 16, duty 30 % of 100 ms"]
    assert flags["matrix product fp32"] == {"fp32_pipe"}
