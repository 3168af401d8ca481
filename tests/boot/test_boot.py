"""Boots Debian 12's systemd in a container without network; probe.py installs the package there and judges its service.

Takes two minutes, half of them for the package; the root filesystem is made once and kept in build/boot. What the probe
says with its figures is printed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.boot.probe import NEWER, OLDER, OLDER_VERSION, RESULT, STEPS
from tests.debian_root import ROOT, make_root, require, run

BUILD = ROOT / "build" / "boot"
BOOT_SECONDS = 400.0
"""Limit for all that the probe does; it takes 60 s on two idle cores."""
CGROUPS = Path("/sys/fs/cgroup")

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", name="package")
def fixture_package() -> Path:
    """Return the Debian package of this source."""
    require("dpkg-buildpackage", "dh")
    run("deploy/deb/build.sh", variables={"PYTHON": sys.executable}, seconds=300)
    return max((ROOT / "dist").glob("jouletrace_*.deb"), key=lambda file: file.stat().st_mtime)


def older(package: Path, folder: Path) -> Path:
    """Return the same package under an older version, with another text of the configuration file."""
    run("dpkg-deb", "--raw-extract", package, folder)
    control = folder / "DEBIAN" / "control"
    control.write_text(re.sub("^Version: .*$", f"Version: {OLDER_VERSION}-1", control.read_text(), flags=re.MULTILINE))
    module = folder / "usr/lib/jouletrace/jouletrace/__init__.py"
    text = re.sub("^__version__ = .*$", f'__version__ = "{OLDER_VERSION}"', module.read_text(), flags=re.MULTILINE)
    module.write_text(text)
    for compiled in (module.parent / "__pycache__").glob("__init__.*.pyc"):
        compiled.unlink()
    with (folder / "etc/jouletrace/jouletrace.yml").open("a") as file:
        file.write("# As the older version had it.\n")
    archive = folder.with_suffix(".deb")
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", folder, archive)
    return archive


@contextlib.contextmanager
def control_groups(name: str) -> Iterator[list[Path]]:
    """Groups of our own in the hierarchies that systemd uses, with v1, v2 or both; nspawn divides them further.

    Without them nspawn would have to divide the group in which this process is, which belongs to others.
    """
    unified = (CGROUPS / "cgroup.controllers").exists()
    hierarchies = [CGROUPS] if unified else [CGROUPS / each for each in ("unified", "systemd")]
    groups = [hierarchy / name for hierarchy in hierarchies if hierarchy.is_dir()]
    try:
        for group in groups:
            group.mkdir()
        yield groups
    except OSError as failure:
        if failure.filename not in map(str, groups):
            raise
        problem = f"{failure.filename} cannot be made ({failure.strerror})"
        pytest.fail(f"{problem}: systemd boots only where root may make control groups", pytrace=False)
    finally:
        for group in groups:
            end_group(group)


def end_group(group: Path) -> None:
    """Kill what is left in a control group and remove it with those below."""
    deadline = time.monotonic() + 10
    while group.is_dir() and time.monotonic() < deadline:
        for below in sorted(group.rglob("cgroup.procs"), reverse=True, key=lambda file: len(file.parts)):
            with contextlib.suppress(OSError):
                for pid in below.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                below.parent.rmdir()
        time.sleep(0.05)


@pytest.fixture(scope="module", name="verdict")
def fixture_verdict(package: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Return what the probe says of each step that it came to."""
    require("mmdebstrap", "systemd-nspawn", "systemctl")
    archive = make_root(BUILD / "root.tar", "--variant=minbase", "--include=systemd,systemd-sysv,dbus,python3")
    console = BUILD / "console.log"
    name = f"jouletrace-boot-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="root.", dir=BUILD) as folder, control_groups(name) as groups:
        root = Path(folder, "root")
        root.mkdir()
        run("tar", "--extract", "--file", archive, "--directory", root, "--exclude", "./dev/*")
        for source, target in (
            (package, NEWER),
            (older(package, Path(folder, "older")), OLDER),
            (ROOT / "tests/boot/probe.py", "/opt/probe.py"),
            (ROOT / "tests/boot/probe.service", "/etc/systemd/system/probe.service"),
        ):
            run("install", "-D", "--mode=644", source, f"{root}{target}")
        run("systemctl", f"--root={root}", "enable", "--quiet", "probe.service")
        os.sync()  # what was unpacked here must not be waited for by the installation, which is timed
        enter = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
        nspawn = ["systemd-nspawn", f"--directory={root}", f"--machine={name}", "--register=no", "--keep-unit"]
        # Without a journal of the host, whose machine may have no id.
        nspawn += ["--private-network", "--link-journal=no", "--console=read-only", "--boot"]
        with console.open("wb") as output, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["sh", "-c", enter, "sh", *groups, "--", *nspawn],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=BOOT_SECONDS,
                check=False,
            )
        result = Path(f"{root}{RESULT}")
        if not result.exists():
            said = console.read_text(errors="replace")[-2000:]
            pytest.fail(f"the probe has not begun; systemd-nspawn says:\n{said}", pytrace=False)
        steps = [json.loads(line) for line in result.read_text().splitlines()]
    yield {step["step"]: step for step in steps}


@pytest.mark.parametrize("step", [step.__name__ for step in STEPS])
def test_the_service(step: str, verdict: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    if step not in verdict:
        if any(done["failure"] for done in verdict.values()):
            pytest.skip("a step before it has failed")
        pytest.fail(f"it did not end within {BOOT_SECONDS:g} s; build/boot/console.log says more", pytrace=False)
    if verdict[step]["failure"]:
        pytest.fail(verdict[step]["failure"], pytrace=False)
    with capsys.disabled():
        print(f"\n{step}: {verdict[step]['said']}")
