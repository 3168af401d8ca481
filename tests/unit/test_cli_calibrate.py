import json
from dataclasses import replace
from pathlib import Path

import pytest

from jouletrace.cli import main
from jouletrace.trace.recording import read, write

REPOSITORY = Path(__file__).parents[2]
CHUNKED = REPOSITORY / "tests/data/h200-c-chunked.json.gz"


def test_calibrate_prints_the_law(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(CHUNKED)]) == 0
    found = json.loads(capsys.readouterr().out)
    # The traces' own description: 2.48 J + 15.4 mJ + 40.5 mJ, mean error 2.0 %, worst 6.4 %.
    assert found["law"]["fixed_joules"] == pytest.approx(2.48, rel=0.01)
    assert found["law"]["provenance"] == "calibrated"
    assert found["half_fixed_batch"] == pytest.approx(61, abs=1)
    assert found["mean_error"] == pytest.approx(0.02, abs=0.002)


def test_a_recording_that_cannot_tell_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idle = tmp_path / "idle.json.gz"
    write(idle, replace(read(CHUNKED), events=()))
    assert main(["calibrate", str(idle)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "0 samples of a second or more" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("fidelity", ["steps", "boundaries"])
def test_analyze_takes_the_fidelity(fidelity: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "--json", "--fidelity", fidelity, str(CHUNKED)]) == 0
    methods = {one["method"] for one in json.loads(capsys.readouterr().out)["requests"]}
    assert methods == {"steps" if fidelity == "steps" else "boundaries_calibrated"}
