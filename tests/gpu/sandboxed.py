"""Tries the service's sandbox against the real driver without systemd: what of it a process can do to itself.

On a machine with systemd (its list of system calls) and the kernel's headers:

    python3 tests/gpu/sandboxed.py expand build/sandbox.json

On the GPU node, as root, with jouletrace importable (PYTHONPATH), standard library only:

    python3 tests/gpu/sandboxed.py try build/sandbox.json

Step by step the sandbox gets tighter; in each `jouletrace doctor` has to find what it finds without, and in the last
the daemon runs for 20 s. Device policy, read-only files and IP lists are control groups' and mount namespaces' and stay
untried; the device nodes that the daemon holds open are printed instead, with their names in /proc/devices.
"""

import argparse
import ctypes
import errno
import json
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNIT = Path(__file__).parents[2] / "systemd" / "jouletrace.service"
NUMBERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h")
DYNAMIC_USER = 61184
"""The first of systemd's dynamic users."""
RUN_SECONDS = 20.0

# linux/prctl.h, linux/seccomp.h, linux/audit.h, linux/bpf_common.h, linux/sched.h
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MDWE = 4, 24, 38, 22, 65
SECCOMP_MODE_FILTER, ALLOW, ERRNO, KILL = 2, 0x7FFF0000, 0x00050000, 0x80000000
AUDIT_ARCH_X86_64 = 0xC000003E
LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
ARCH_AT, NUMBER_AT = 4, 0
NAMESPACES = 0x7E020080
CLONE_NEWUSER = 0x10000000
PROT_WRITE, PROT_EXEC, SHM_EXEC = 2, 4, 0o100000
MMAP, MPROTECT, SHMAT, SOCKET, CLONE, PERSONALITY, PKEY_MPROTECT, CLONE3 = 9, 10, 30, 41, 56, 135, 329, 435
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}

libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int = 0, pointer: object = 0) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# --- what the unit says ---


def settings(name: str) -> list[str]:
    """Return the values that the unit gives a key."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def members(group: str) -> set[str]:
    """Return the system calls of one of systemd's groups."""
    text = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", group], capture_output=True, text=True, check=True
    ).stdout
    found: set[str] = set()
    for word in (line.strip() for line in text.splitlines()[1:]):
        if word.startswith("@"):
            found |= members(word)
        elif word and not word.startswith("#"):
            found.add(word)
    return found


def expand(file: Path) -> None:
    """Write the numbers of the system calls that the unit allows, and the address families."""
    allowed: set[str] = set()
    for value in settings("SystemCallFilter"):
        names: set[str] = set()
        for word in value.removeprefix("~").split():
            names |= members(word) if word.startswith("@") else {word}
        allowed = allowed - names if value.startswith("~") else allowed | names
    # systemd lets these through in every allow list: without them nothing can be started or ended.
    allowed |= members("@default") | {"execve", "exit", "exit_group", "rt_sigreturn", "sigreturn"}
    header = next(Path(one) for one in NUMBERS if Path(one).exists()).read_text()
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", header)}
    families = " ".join(settings("RestrictAddressFamilies")).split()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"syscalls": sorted(numbers[name] for name in allowed & numbers.keys()), "families": families})
    )
    print(f"{len(allowed & numbers.keys())} of {len(numbers)} system calls are allowed; written to {file}")


# --- the filter ---


def statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def refuse(number: int = errno.EPERM) -> bytes:
    return statement(RETURN, ERRNO | number)


def argument(index: int) -> bytes:
    """Load the lower half of an argument of the system call."""
    return statement(LOAD, 16 + 8 * index)


def when(call: int, *body: bytes) -> list[bytes]:
    """Run `body` for one system call, then load the number again."""
    return [statement(EQUAL, call, 0, len(body) + 1), *body, statement(LOAD, NUMBER_AT)]


def write_xor_execute() -> list[bytes]:
    """What MemoryDenyWriteExecute= refuses."""
    both = PROT_WRITE | PROT_EXEC
    program = when(MMAP, argument(2), statement(AND, both), statement(EQUAL, both, 0, 1), refuse())
    for call, bit in ((MPROTECT, PROT_EXEC), (PKEY_MPROTECT, PROT_EXEC), (SHMAT, SHM_EXEC)):
        program += when(call, argument(2), statement(AND, bit), statement(EQUAL, bit, 0, 1), refuse())
    return program


def restrictions(families: Sequence[str]) -> list[bytes]:
    """What RestrictAddressFamilies=, RestrictNamespaces= and LockPersonality= refuse."""
    known = [FAMILIES[name] for name in families]
    body = [argument(0)]
    for place, family in enumerate(known):
        body.append(statement(EQUAL, family, len(known) - place, 0))
    body.append(refuse(errno.EAFNOSUPPORT))
    program = when(SOCKET, *body)
    program += when(CLONE, argument(0), statement(AND, NAMESPACES), statement(EQUAL, 0, 1, 0), refuse())
    # Its flags are behind a pointer, which a filter cannot follow: the C library then takes clone.
    program += when(CLONE3, refuse(errno.ENOSYS))
    return program + when(PERSONALITY, argument(0), statement(EQUAL, 0, 1, 0), refuse())


def allow_list(calls: Sequence[int]) -> list[bytes]:
    program = []
    for call in calls:
        program += [statement(EQUAL, call, 0, 1), statement(RETURN, ALLOW)]
    return [*program, refuse()]


def install(program: Sequence[bytes]) -> None:
    """Install a filter; what it does not refuse is allowed."""
    whole = [
        statement(LOAD, ARCH_AT),
        statement(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        statement(RETURN, KILL),
        statement(LOAD, NUMBER_AT),
        *program,
        statement(RETURN, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(whole))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    packed = Program(len(whole), ctypes.cast(code, ctypes.c_void_p))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(packed))


# --- the steps ---


def unprivileged(user: int) -> None:
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as failure:
            if failure.errno == errno.EINVAL:
                break
            raise
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    os.umask(0o077)


def private_users(user: int) -> None:
    """Move into a user namespace that knows this user alone, as PrivateUsers= does (which knows root, too)."""
    if libc.unshare(CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # One that has changed its user may not write its own maps otherwise.
    prctl(PR_SET_DUMPABLE, 1)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{user} {user} 1")


def kernel_write_xor_execute() -> None:
    """Ask the kernel itself (6.3 and later), as systemd 254 and later does; stricter than a filter."""
    prctl(PR_SET_MDWE, 1)


def steps(sandbox: Mapping[str, Any], user: int) -> dict[str, Callable[[], None]]:
    """Return the parts of the sandbox in the order in which they can be put on."""
    return {
        f"user {user} without capabilities, no new privileges": lambda: unprivileged(user),
        "PrivateUsers": lambda: private_users(user),
        "RestrictAddressFamilies, RestrictNamespaces, LockPersonality": lambda: install(
            restrictions(sandbox["families"])
        ),
        "MemoryDenyWriteExecute by filter": lambda: install(write_xor_execute()),
        "MemoryDenyWriteExecute by the kernel": kernel_write_xor_execute,
        # Last, as it may refuse what puts on the others.
        "SystemCallFilter": lambda: install(allow_list(sandbox["syscalls"])),
    }


def confine(parts: Sequence[Callable[[], None]]) -> None:
    for part in parts:
        part()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jouletrace", *arguments]


def examine(parts: Sequence[Callable[[], None]]) -> tuple[str, Any]:
    """Return why `doctor` failed, or nothing and what it found: each GPU's sensors and sources."""
    try:
        done = subprocess.run(
            command("doctor", "--json"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=lambda: confine(parts),
        )
    except (OSError, subprocess.SubprocessError) as failure:
        return f"it cannot be started ({failure}); where Python is root's alone, try --user 0", None
    if done.returncode != 0:
        return f"exit code {done.returncode}: {(done.stderr.strip() or '-').splitlines()[-1]}", None
    return "", sources(json.loads(done.stdout))


def sources(report: Any) -> Any:
    """Return of doctor's report what must not depend on the sandbox: no measured times and values."""
    if isinstance(report, dict):
        return {
            key: sources(value)
            for key, value in report.items()
            # A time that one look could measure and another could not is null there.
            if not key.endswith("_seconds") and (not isinstance(value, int | float) or value is True)
        }
    return [sources(item) for item in report] if isinstance(report, list) else report


def applicable(parts: Sequence[Callable[[], None]]) -> str:
    """Return why parts cannot be put on here; empty when they can."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confine(parts)
        except OSError as failure:
            os.write(writing, f"{failure.strerror}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


def open_ends(parts: Sequence[Callable[[], None]]) -> str:
    """Return which forbidden things can still be done inside, as a check of the sandbox itself."""

    def trace() -> None:
        if libc.ptrace(0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    forbidden: dict[str, Callable[[], object]] = {
        "memory that is written and executed": lambda: mmap.mmap(-1, 4096, prot=7),
        "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "tracing": trace,
        "another user": lambda: os.setuid(1),
    }

    def look() -> None:
        confine(parts)
        done = []
        for name, what in forbidden.items():
            try:
                what()
            except OSError:
                continue
            done.append(name)
        if done:
            raise OSError(0, ", ".join(done))

    return applicable([look])


def drivers() -> dict[int, str]:
    """Return the names of character devices by their major number."""
    text = Path("/proc/devices").read_text().partition("Block devices:")[0]
    return {int(major): name for major, name in re.findall(r"^\s*(\d+) (\S+)$", text, re.MULTILINE)}


def nodes(pid: int) -> list[str]:
    """Return the device nodes that a process holds open, with the drivers' names."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        target = file.readlink()
        if target.is_relative_to("/dev") and target.is_char_device():
            found.add(f"{target} (char-{drivers().get(os.major(target.stat().st_rdev), '?')})")
    return sorted(found)


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def run_daemon(parts: Sequence[Callable[[], None]], folder: Path) -> bool:
    """Run the daemon in the whole sandbox; print what it measured and return whether all is as it should be."""
    log = folder / "daemon.log"
    arguments = ("--state-dir", str(folder / "state"), "--web.listen-address", "127.0.0.1:0", "--log.format", "json")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("run", *arguments),
            stdout=output,
            stderr=output,
            preexec_fn=lambda: confine(parts),  # noqa: PLW1509
        )
    try:
        url, deadline = "", time.monotonic() + 15
        while not url and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
            found = re.search(r'"url": "([^"]+)/"', log.read_text())
            url = found[1] if found else ""
        if not url:
            print(f"the daemon did not start:\n{log.read_text()}")
            return False
        time.sleep(3)
        before, begun = scrape(url), time.monotonic()
        held = nodes(process.pid)
        time.sleep(RUN_SECONDS)
        after, seconds = scrape(url), time.monotonic() - begun
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    print(f"the daemon holds open: {', '.join(held)}")
    energies = [key for key in after if key.startswith("jouletrace_gpu_energy_joules_total")]
    for key in energies:
        print(f"{key}: {(after[key] - before.get(key, 0)) / seconds:.1f} W over {seconds:.0f} s")
    for key in sorted(after):
        if key.startswith(("jouletrace_energy_agreement_ratio", "jouletrace_driver_errors_total")):
            print(f"{key} {after[key]:g}")
    for line in log.read_text().splitlines():
        if '"level": "info"' not in line:
            print(f"log: {line}")
    grew = bool(energies) and all(after[key] > before.get(key, 0) for key in energies)
    foreign = [one for one in held if "/dev/nvidia" in one and "(char-nvidia" not in one]
    print(f"exit code {code}; energy grew: {grew}; nodes outside of DeviceAllow=char-nvidia*: {foreign or 'none'}")
    return code == 0 and grew and not foreign


def attempt(file: Path, user: int) -> int:
    """Try the sandbox; return 0 when all that could be put on was borne."""
    sandbox = json.loads(file.read_text())
    print(f"Linux {os.uname().release}, Python {sys.version.split()[0]}", flush=True)
    problem, expected = examine([])
    if problem:
        print(f"without a sandbox: {problem}")
        return 1
    worn: list[Callable[[], None]] = []
    failed = False
    for name, part in steps(sandbox, user).items():
        reason = applicable([*worn, part])
        if reason:
            print(f"cannot be tried here: {name} ({reason})")
            continue
        problem, found = examine([*worn, part])
        if not problem and found != expected:
            problem = f"doctor finds something else: {json.dumps(found)} instead of {json.dumps(expected)}"
        print(f"{'FAILS' if problem else 'works'}: {name}" + (f": {problem}" if problem else ""), flush=True)
        if problem:
            failed = True
        else:
            worn.append(part)
    left = open_ends(worn)
    print(f"inside it is still possible: {left or 'none of what was tried'}")
    failed |= bool(left)
    folder = Path(tempfile.mkdtemp(prefix="jouletrace-sandbox-"))
    os.chown(folder, user, user)
    try:
        failed |= not run_daemon(worn, folder)
    finally:
        shutil.rmtree(folder)
    print("some of it does not work" if failed else "all that could be tried works")
    return 1 if failed else 0


def main() -> int:
    """Expand or try, as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("expand", "try"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--user", type=int, default=DYNAMIC_USER, help="who runs it (default: %(default)s)")
    options = parser.parse_args()
    if options.what == "expand":
        expand(options.file)
        return 0
    return attempt(options.file, options.user)


if __name__ == "__main__":
    raise SystemExit(main())
