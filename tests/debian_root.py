"""Debian root filesystems for the tests that boot one or build an image on one. They need root, and say so if not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def require(*programs: str) -> None:
    """Fail in one line when this is not root, a program is missing or the machine forbids mounts.

    Not a skip: these tests run when somebody asks for them, and that somebody must hear that they did not.
    """
    if os.geteuid() != 0:
        pytest.fail("this test mounts and changes root: run it as root", pytrace=False)
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"missing: {', '.join(missing)}; `make test-all` installs what these tests need", pytrace=False)
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"this machine does not let root mount: {done.stderr.strip()}", pytrace=False)


def run(*command: str | Path, seconds: float = 120.0, variables: dict[str, str] | None = None) -> str:
    """Return what a command prints; fail with the end of its output when it fails or takes longer."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = (late.output or b"").decode(errors="replace")
        pytest.fail(f"`{command[0]}` took longer than {seconds:g} s:\n{said[-4000:]}", pytrace=False)
    if done.returncode != 0:
        pytest.fail(f"`{command[0]}` ended with {done.returncode}:\n{done.stdout[-4000:]}", pytrace=False)
    return done.stdout


def make_root(archive: Path, *options: str) -> Path:
    """Return an archive of Debian 12 as mmdebstrap makes it with these options; a second call finds it there."""
    if not archive.is_file():
        mirror = run(
            *("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Codename: bookworm")
        ).split()
        archive.parent.mkdir(parents=True, exist_ok=True)
        # Its suffix says what is to be made.
        unfinished = archive.with_name(f"unfinished-{archive.name}")
        run("mmdebstrap", "--quiet", *options, "bookworm", unfinished, *mirror[:1], seconds=400)
        unfinished.replace(archive)
    return archive
