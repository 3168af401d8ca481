"""The units as systemd itself reads them; tests/boot runs them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
EXPOSURE = 1.5
"""Highest exposure of the service that `systemd-analyze security` may see; 10 is the worst."""

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=30, check=False, env={"LC_ALL": "C"}
    )


@pytest.fixture(name="units")
def fixture_units(tmp_path: Path) -> list[Path]:
    """Return copies whose program is there."""
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.socket")):
        text = re.sub("^ExecStart=.*$", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    return sorted(tmp_path.iterdir())


def test_systemd_finds_nothing_to_say(units: list[Path]) -> None:
    assert len(units) == 3
    done = analyze("verify", "--man=no", *map(str, units))
    # It ends with 0 for a key that it does not know, and says so.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_misspelt_key_would_be_found(units: list[Path]) -> None:
    service = next(unit for unit in units if unit.suffix == ".service")
    service.write_text(service.read_text().replace("ProtectSystem=", "ProtectSystm="))
    assert "ProtectSystm" in analyze("verify", "--man=no", *map(str, units)).stderr


def test_the_sandbox_leaves_little_open(units: list[Path]) -> None:
    service = next(unit for unit in units if unit.suffix == ".service")
    done = analyze("security", "--offline=true", "--no-pager", str(service))
    exposure = re.search(r"Overall exposure level for jouletrace.service: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    assert float(exposure[1]) <= EXPOSURE
