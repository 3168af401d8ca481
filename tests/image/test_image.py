"""Builds the container image, starts it as user 65532 on a read-only root without capabilities, and looks at it.

Nothing is pulled: Debian root filesystems of the same Python stand in for the two public bases, of which the one for
the run has no shell either. They are made once and kept in build/image; the rest takes half a minute.
"""

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jouletrace import __version__
from tests.debian_root import ROOT, make_root, require, run

BUILD = ROOT / "build" / "image"
BUILDAH = ("buildah", "--root", f"{BUILD}/storage", "--runroot", f"{BUILD}/state", "--storage-driver", "vfs")
TAG = "localhost/jouletrace:test"
LARGEST_BYTES = 200_000_000
"""The goal for what the image takes unpacked."""
USER = 65532
HOST_FILES = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
"""What this machine needs to reach its package index."""
START = """
set -e
root=$1 port=$2
mount --bind "$root" "$root"
mkdir -p "$root/proc"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=700,uid=65532,gid=65532 tmpfs "$root/var/lib/jouletrace"
mount -o remount,bind,ro "$root"
exec env -i PATH=/usr/sbin:/usr/bin JOULETRACE_STATE_DIR=/var/lib/jouletrace chroot "$root" /usr/bin/python3 -c '
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
os.setgroups([]); os.setresgid(65532, 65532, 65532); os.setresuid(65532, 65532, 65532)
os.execv("/usr/bin/jouletrace", sys.argv[1:])' jouletrace run --demo --web.listen-address=127.0.0.1:$port
"""
"""What a container engine does with the image, in the mount namespace that it is run in."""

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def stand_in(name: str, *options: str) -> str:
    """Return the tag of a base image made of Debian's packages; it is made once."""
    tag = f"localhost/{name}"
    if tag in run(*BUILDAH, "images", "--format", "{{.Name}}").split():
        return tag
    with tempfile.TemporaryDirectory(prefix="context.", dir=BUILD) as context:
        make_root(Path(context, "root.tar"), *options)
        Path(context, "Containerfile").write_text("FROM scratch\nADD root.tar /\n")
        run(*BUILDAH, "bud", "--quiet", "--isolation", "chroot", "--tag", tag, context, seconds=200)
    return tag


@pytest.fixture(scope="module", name="image")
def fixture_image() -> str:
    """Return the tag of the image, built of this source."""
    require("buildah", "mmdebstrap")
    BUILD.mkdir(parents=True, exist_ok=True)
    build = stand_in("base-to-build", "--variant=minbase", "--include=python3,python3-pip")
    base = stand_in(
        "base-to-run",
        "--variant=extract",
        "--include=python3.11,ca-certificates,netbase,tzdata,libstdc++6",
        '--extract-hook=ln -s python3.11 "$1/usr/bin/python3"',
    )
    mounts = [f"--volume {file}:{file}:ro" for file in HOST_FILES if Path(file).exists()]
    variables = {"BUILDAH": " ".join(BUILDAH), "BUILD_IMAGE": build, "BASE_IMAGE": base, "TAG": TAG}
    variables["BUILDAH_OPTIONS"] = " ".join(["--quiet", "--pull-never", *mounts])
    run("deploy/container/build.sh", variables=variables, seconds=400)
    return TAG


@pytest.fixture(scope="module", name="root")
def fixture_root(image: str) -> Iterator[Path]:
    """Return the files of a container of the image."""
    container = run(*BUILDAH, "from", "--pull-never", image).strip()
    try:
        yield Path(run(*BUILDAH, "mount", container).strip())
    finally:
        run(*BUILDAH, "umount", container)
        run(*BUILDAH, "rm", container)


def test_it_is_small(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = int(run("du", "--summarize", "--bytes", root).split()[0])
    with capsys.disabled():
        print(f"\nimage: {size / 1e6:.0f} MB unpacked")
    assert size < LARGEST_BYTES


def test_it_has_no_shell(root: Path) -> None:
    assert (root / "usr/bin/python3").exists()
    assert [name for name in ("sh", "bash", "dash", "busybox") for _ in root.glob(f"**/bin/{name}")] == []


def test_it_says_what_it_is_and_how_to_start_it(image: str) -> None:
    config: dict[str, Any] = json.loads(run(*BUILDAH, "inspect", "--type", "image", image))["OCIv1"]["config"]
    assert config["User"] == f"{USER}:{USER}"
    assert (config["Entrypoint"], config["Cmd"]) == (["/usr/bin/jouletrace"], ["run"])
    assert [port.removesuffix("/tcp") for port in config["ExposedPorts"]] == ["9841"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in config["Env"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def first_energy(port: int, daemon: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the daemon has measured something."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and daemon.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                if b"\njouletrace_gpu_energy_joules_total{" in answer.read():
                    return
        except urllib.error.URLError:
            pass
        time.sleep(0.05)
    pytest.fail(f"no energy in /metrics; the daemon says:\n{log.read_text()[-4000:]}", pytrace=False)


def test_it_runs_as_nobody_without_rights_on_a_read_only_root(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "daemon.log"
    begun = time.monotonic()
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", START, "sh", root, str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        first_energy(port, daemon, log)
        took = time.monotonic() - begun
        process = Path("/proc", str(daemon.pid))
        status = process.joinpath("status").read_text()
        assert f"\nUid:\t{USER}\t{USER}\t{USER}\t{USER}\n" in status
        assert set(re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\t(\w+)$", status, re.MULTILINE)) == {"0" * 16}
        mounted = [line.split() for line in process.joinpath("mountinfo").read_text().splitlines()]
        assert [fields[5].split(",")[0] for fields in mounted if fields[4] == "/"][-1:] == ["ro"]
        (resident,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == os.EX_OK
    finally:
        daemon.kill()
        daemon.wait(20)
    assert "Traceback" not in log.read_text()
    with capsys.disabled():
        print(f"\nimage: first energy after {took:.1f} s, {int(resident) // 1024} MiB resident")
