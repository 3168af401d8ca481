"""The Containerfile and its launcher as files; tests/image builds and runs them."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from jouletrace import __version__
from tests.deploy.chart import ROOT

CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run(
        [program, "--failure-threshold", "info", file], capture_output=True, text=True, timeout=30, check=False
    )


def test_the_linter_has_nothing_to_say() -> None:
    done = lint(CONTAINERFILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_careless_line_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "Containerfile"
    file.write_text(CONTAINERFILE.read_text().replace("USER 65532:65532", "RUN cd /tmp && sudo true"))
    assert lint(file).returncode == 1


def test_whatever_is_copied_goes_to_the_build_and_is_there() -> None:
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", CONTAINERFILE.read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    }
    ignore = (ROOT / "deploy" / "container" / "Containerfile.containerignore").read_text()
    assert copied == set(re.findall("^!(.+)$", ignore, re.MULTILINE))
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_launcher_takes_nothing_from_the_environment(tmp_path: Path) -> None:
    """PYTHONPATH and the folder it lies in could put modules before Python's own."""
    package = tmp_path / "tree" / "jouletrace"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text("import json\n\ndef main():\n    print(json.dumps('ours'))\n    return 5\n")
    for folder in ("variable", "beside"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text("raise RuntimeError('somebody else is imported')")
    source = (ROOT / "deploy" / "container" / "launcher.py").read_text()
    options = re.match("#!/usr/bin/python3 (-[A-Z]+)\n", source)
    assert options is not None
    launcher = tmp_path / "beside" / "jouletrace"
    launcher.write_text(source.replace("/usr/lib/jouletrace", str(package.parent)))
    done = subprocess.run(
        [sys.executable, options[1], launcher],
        env={"PYTHONPATH": str(tmp_path / "variable")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, '"ours"\n', "")


def test_compose_names_the_image_of_this_version() -> None:
    compose = (ROOT / "deploy" / "compose" / "compose.yaml").read_text()
    assert f"image: ghcr.io/jouletrace/jouletrace:{__version__}\n" in compose
