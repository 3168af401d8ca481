"""Runs inside the booted container: installs the package and drives its service as an operator would.

Standard library only. Writes a line of JSON for each of STEPS, in their order, until one fails:
`{"step", "said", "failure"}`, of which the last is a traceback with the journal, or empty.
"""

import contextlib
import grp
import http.client
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNIT = "jouletrace.service"
DEMO = "/usr/lib/jouletrace/jouletrace/demo/recording.json.gz"
CONFIG = Path("/etc/jouletrace/jouletrace.yml")
DEFAULTS = Path("/etc/default/jouletrace")
DROP_IN = Path("/etc/systemd/system/jouletrace.service.d/test.conf")
STREAM, DATAGRAM = "/run/jouletrace/ingest.sock", "/run/jouletrace/ingest.dgram"
ENERGY = "jouletrace_gpu_energy_joules_total"
ACCOUNT = re.compile(
    r"^(jouletrace_(?:(?:attributed|allocated|idle|unattributed)_energy_joules|requests|tokens)_total{.*}) (\S+)$",
    re.MULTILINE,
)
"""Counters of the account, which outlive the process."""
FIRST_SCRAPE_SECONDS = 10.0
"""From `apt install` to the first scrape; the goal. CPU time is held against it: the clock also measures what else the
machine does, and is reported."""
NEWER, OLDER = "/opt/jouletrace.deb", "/opt/older.deb"
OLDER_VERSION = "0.0.1"
RESULT = Path("/opt/result.ndjson")


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def shown(name: str) -> str:
    return run("systemctl", "show", UNIT, "--property", name, "--value").strip()


def get(path: str, timeout: float = 30.0) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", 9841, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def until(what: str, condition: Callable[[], Any], seconds: float = 60.0) -> float:
    """Wait for something; return how long it took."""
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if condition():
                return time.monotonic() - begun
        time.sleep(0.02)
    raise AssertionError(f"in vain: {what}")


def scraped() -> bool:
    status, text = get("/metrics")
    return status == 200 and f"\n{ENERGY}{{" in text


def booked() -> bool:
    """Whether the request of this probe is in the account, with joules beside it."""
    account = {series: float(number) for series, number in ACCOUNT.findall(get("/metrics")[1])}
    requests = [number for series, number in account.items() if 'requests_total{model="m"' in series]
    return requests == [1.0] and any("energy" in series and joules > 0 for series, joules in account.items())


def answers() -> bool:
    try:
        get("/metrics")
    except ConnectionRefusedError:
        return False
    return True


def journal() -> str:
    return run("journalctl", "--unit", UNIT, "--no-pager", "--output", "cat")


def events(event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in journal().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


@dataclass
class Scrapes:
    """What scrapes saw, one after the other."""

    waits: list[float] = field(default_factory=list)
    """How many seconds each took."""
    account: dict[str, float] = field(default_factory=dict)
    """The last value of each counter."""
    steps_down: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        for series, number in ACCOUNT.findall(text):
            value = float(number)
            if value < self.account.get(series, 0.0):
                self.steps_down.append(f"{series}: {self.account[series]} -> {value}")
            self.account[series] = value

    @property
    def longest(self) -> float:
        return max(self.waits)


@contextlib.contextmanager
def scraping() -> Iterator[Scrapes]:
    """Scrape all the time meanwhile. A refused scrape, or a counter that goes down, raises at the end."""
    scrapes = Scrapes()
    failures: list[Exception] = []
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(0.05):
            begun = time.monotonic()
            try:
                status, text = get("/metrics")
                assert status == 200
                scrapes.add(text)
            except (OSError, http.client.HTTPException, AssertionError) as failure:
                failures.append(failure)
            scrapes.waits.append(time.monotonic() - begun)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield scrapes
    finally:
        stop.set()
        thread.join()
    assert not failures, f"{len(failures)} of {len(scrapes.waits)} scrapes were lost, first by {failures[0]!r}"
    assert not scrapes.steps_down, scrapes.steps_down


def as_user(groups: list[int], kind: socket.SocketKind, path: str, data: bytes) -> bool:
    """Send as user nobody with these groups; return whether it was allowed."""
    child = os.fork()
    if child == 0:
        os.setgroups(groups)
        os.setgid(65534)
        os.setuid(65534)
        try:
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.connect(path)
                sock.sendall(data)
        except PermissionError:
            os._exit(13)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 13), code
    return code == 0


def installs() -> str:
    # Instead of the driver a recording, and a watchdog for the impatient.
    DEFAULTS.write_text(f"JOULETRACE_SOURCE=replay:{DEMO}\n")
    DROP_IN.parent.mkdir(parents=True)
    DROP_IN.write_text("[Service]\nWatchdogSec=3s\nTimeoutAbortSec=2s\n")
    begun = time.monotonic()
    run("apt-get", "install", "--yes", NEWER)
    installed = time.monotonic() - begun
    until("the first scrape", lambda: get("/metrics")[0] == 200)
    first = time.monotonic() - begun
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = Path("/proc", shown("MainPID"), "stat").read_text().rpartition(")")[2].split()[11:13]
    worked = cpu.ru_utime + cpu.ru_stime + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    until("the first energy", scraped)
    energy = time.monotonic() - begun
    assert worked < FIRST_SCRAPE_SECONDS
    assert shown("ActiveState") == "active"
    until("the status", lambda: shown("StatusText") == "1 GPU sampled")
    assert run("jouletrace", "--version").startswith("jouletrace ")
    assert all(Path("/usr/share/man", page).exists() for page in ("man1/jouletrace.1.gz", "man5/jouletrace.yml.5.gz"))
    times = f"apt install {installed:.1f} s, first scrape {first:.1f} s, first energy {energy:.1f} s"
    return f"{times}; {worked:.1f} s of CPU until the first scrape"


def is_confined() -> str:
    pid = shown("MainPID")
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    user = int(fields["Uid"].split()[0])
    assert 61184 <= user <= 65519, f"{user} is not one of DynamicUser='s"
    for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
        assert int(fields[f"Cap{kind}"], 16) == 0, f"Cap{kind} is {fields[f'Cap{kind}']}"
    assert int(fields["NoNewPrivs"]) == 1
    assert int(fields["Seccomp"]) == 2, "not in filter mode"
    filters = fields["Seccomp_filters"].strip()
    exposure = run("systemd-analyze", "security", UNIT, "--no-pager").splitlines()[-1]
    state = Path("/var/lib/private/jouletrace")
    assert stat.S_IMODE(state.stat().st_mode) == 0o750
    until("saved state", lambda: any(state.rglob("*")))
    return f"user {user}, no capabilities, {filters} filters; {exposure.lstrip('→ ')}"


def takes_records() -> str:
    group = grp.getgrnam("jouletrace-ingest").gr_gid
    for path in (STREAM, DATAGRAM):
        status = Path(path).stat()
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert (status.st_uid, status.st_gid) == (0, group)
    uuid = re.search(f'{ENERGY}{{.*uuid="([^"]+)"', get("/metrics")[1])
    assert uuid is not None
    for name, kind, path in (
        ("stream", socket.SOCK_STREAM, STREAM),
        ("datagram", socket.SOCK_DGRAM, DATAGRAM),
    ):
        record = {"record": "engine", "engine_id": f"by-{name}", "kind": "vllm", "models": ["m"]}
        record |= {"gpu_uuids": [uuid[1]]} if name == "stream" else {}
        line = json.dumps(record).encode() + b"\n"
        assert not as_user([], kind, path, line), f"anybody may write to {path}"
        assert as_user([group], kind, path, line)
        taken = f'jouletrace_events_total{{source="{name}"}} 1'
        until(f"the record by {name}", lambda taken=taken: taken in get("/metrics")[1])
        assert f'jouletrace_events_dropped_total{{reason="invalid",source="{name}"}}' not in get("/metrics")[1]
    arrival_ns = time.time_ns()
    time.sleep(1.0)
    request = {
        **{"record": "request", "request_id": "r", "engine_id": "by-stream", "model": "m", "status": "finished"},
        **{"arrival_ns": arrival_ns, "first_token_ns": arrival_ns + 10**8, "end_ns": time.time_ns()},
        "usage": {"input": 100, "output": 20},
    }
    assert as_user([group], socket.SOCK_DGRAM, DATAGRAM, json.dumps(request).encode())
    until("its request in the account", booked)
    return "records by stream and datagram socket, from members of jouletrace-ingest alone"


def reloads() -> str:
    pid, original = shown("MainPID"), CONFIG.read_text()
    CONFIG.write_text("log: {level: debug}\nsampling: {state_interval: 2s}\n")
    run("systemctl", "reload", UNIT)
    until("the reload", lambda: events("the configuration was reloaded"))
    [told] = events("the configuration was reloaded")
    assert told["applied"] == ["log.level"]
    assert told["need_a_restart"] == ["sampling.state_interval"]
    CONFIG.write_text("nonsense: 1\n")
    run("systemctl", "reload", UNIT)
    until("the refusal", lambda: events("the configuration was not reloaded, the old one stays"))
    assert shown("ActiveState") == "active"
    assert shown("MainPID") == pid
    CONFIG.write_text(original)
    run("systemctl", "reload", UNIT)
    until("the second reload", lambda: len(events("the configuration was reloaded")) == 2)
    assert get("/-/ready")[0] == 200
    return "a changed file is applied, a wrong one refused"


def comes_back(what: signal.Signals, restarts: int) -> str:
    pid = int(shown("MainPID"))
    with scraping() as scrapes:
        os.kill(pid, what)
        took = until("a restart", lambda: shown("NRestarts") == str(restarts))
        up = until("service", lambda: shown("ActiveState") == "active" and shown("MainPID") not in ("0", str(pid)))
        until("the next scrape", scraped)
    return f"restarted in {took:.1f} s, up in {took + up:.1f} s; no scrape lost, longest {scrapes.longest:.1f} s"


def comes_back_after_kill() -> str:
    return comes_back(signal.SIGKILL, 1)


def comes_back_after_a_hang() -> str:
    said = comes_back(signal.SIGSTOP, 2)
    assert "Fatal Python error: Aborted" in journal(), "the watchdog's signal tells where the threads stood"
    return said


def replaced_by(package: str, version: str) -> str:
    before = shown("MainPID")
    with scraping() as scrapes:
        # As unattended upgrades do: a file that the operator has changed stays.
        run("apt-get", "install", "--yes", "--allow-downgrades", "--option=Dpkg::Options::=--force-confold", package)
        until("another process", lambda: shown("MainPID") not in ("0", before))
        until("the other version", lambda: f'version="{version}"' in get("/metrics")[1])
        until("the account", booked)
    return f"{len(scrapes.waits)} scrapes, none lost, longest {scrapes.longest:.1f} s"


def is_rolled_back_and_upgraded() -> str:
    newer_version = run("jouletrace", "--version").split()[1]
    original = CONFIG.read_text()
    CONFIG.write_text(original + "\nlog: {level: debug}\n")
    back = replaced_by(OLDER, OLDER_VERSION)
    forth = replaced_by(NEWER, newer_version)
    assert CONFIG.read_text() == original + "\nlog: {level: debug}\n"
    CONFIG.write_text(original)
    return f"back to {OLDER_VERSION}: {back}; forth to {newer_version}: {forth}; no counter of the account went down"


def mends_itself() -> str:
    original = CONFIG.read_text()
    CONFIG.write_text("nonsense: 1\n")
    subprocess.run(["systemctl", "restart", UNIT], capture_output=True, check=False)
    until("the reason", lambda: "nonsense: is not a known key" in journal())
    CONFIG.write_text(original)
    took = until("recovery", scraped)
    return f"up {took:.1f} s after a wrong configuration was mended"


def stops() -> str:
    begun = time.monotonic()
    run("systemctl", "stop", "jouletrace.socket", "jouletrace-ingest.socket", UNIT)
    took = time.monotonic() - begun
    assert shown("Result") == "success"
    assert shown("ExecMainStatus") == "0"
    assert not Path(STREAM).exists()
    assert not answers()
    assert "Traceback" not in journal()
    return f"in {took:.1f} s, with exit status 0"


def is_removed() -> str:
    run("systemctl", "start", "jouletrace.socket", "jouletrace-ingest.socket", UNIT)
    until("the service", scraped)
    pid = shown("MainPID")
    run("apt-get", "remove", "--yes", "jouletrace")
    assert not Path("/proc", pid).exists()
    assert not answers()
    kept = (CONFIG, Path("/var/lib/private/jouletrace"))
    assert all(path.exists() for path in kept)
    for made_here in (DROP_IN, DEFAULTS):
        made_here.unlink()
    DROP_IN.parent.rmdir()
    run("apt-get", "purge", "--yes", "jouletrace")
    left = run(*("find", "/", "-xdev", "-name", "*jouletrace*", "-not", "-path", "/opt/*", "-not", "-path", "/tmp/*"))
    assert not left, left
    assert "jouletrace" not in run("systemctl", "list-units", "--all", "--no-pager", "--plain")
    return "remove keeps configuration and state, purge leaves no file"


STEPS = (
    installs,
    is_confined,
    takes_records,
    reloads,
    comes_back_after_kill,
    comes_back_after_a_hang,
    is_rolled_back_and_upgraded,
    mends_itself,
    stops,
    is_removed,
)


def main() -> None:
    with RESULT.open("w") as result:
        for step in STEPS:
            said, failure = "", ""
            try:
                said = step()
            except Exception:
                failure = traceback.format_exc() + run("journalctl", "--no-pager", "--lines", "60")
            print(json.dumps({"step": step.__name__, "said": said, "failure": failure}), file=result, flush=True)
            if failure:
                break


if __name__ == "__main__":
    main()
