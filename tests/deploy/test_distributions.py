"""The wheel and the source distribution: built, and the wheel run in a clean environment far from this repository."""

import json
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from jouletrace import __version__
from tests.debian_root import run
from tests.deploy.chart import ROOT

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

PACKAGE = ROOT / "exporter" / "jouletrace"


@pytest.fixture(scope="module", name="distributions")
def fixture_distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both; the wheel is built from the source distribution."""
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--outdir", folder, ".", seconds=300)
    return folder


def test_every_file_of_the_package_is_in_both(distributions: Path) -> None:
    files = {f"jouletrace/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert files - set(archive.namelist()) == set()
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"exporter/{file}" for file in files} - names == set()
    assert {"systemd/jouletrace.service", "tests/conftest.py", "Makefile", "helm/generate.py"} - names == set()
    assert not any("node_modules" in name or "__pycache__" in name for name in names)


def test_the_demo_runs_from_the_wheel(distributions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (wheel,) = distributions.glob("*.whl")
    programs = tmp_path / "environment" / "bin"
    run(sys.executable, "-m", "venv", programs.parent)
    run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, seconds=300)
    run(programs / "python", "-m", "pip", "check")
    assert run(programs / "jouletrace", "--version") == f"jouletrace {__version__}\n"
    log = tmp_path / "daemon.log"
    begun = time.monotonic()
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [programs / "jouletrace", "run", "--demo", "--web.listen-address=127.0.0.1:0", "--log.format=json"],
            cwd=tmp_path,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        url = ""
        while time.monotonic() < begun + 60 and daemon.poll() is None:
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            url = next((line["url"] for line in lines if line["event"] == "serving"), "")
            if url and b"\njouletrace_gpu_energy_joules_total{" in _read(f"{url}metrics"):
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"no energy in /metrics; the daemon says:\n{log.read_text()[-4000:]}", pytrace=False)
        took = time.monotonic() - begun
        assert b"<html" in _read(url)
        daemon.terminate()
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.wait(20)
    with capsys.disabled():
        print(f"\nwheel: {wheel.stat().st_size / 1e6:.1f} MB; first energy of the demo after {took:.1f} s")


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())
