"""Runs inside the booted container: installs the package and drives its service as an operator would.

Standard library only. The last line is "all is well" or there is a traceback.
"""

import contextlib
import grp
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

UNIT = "jouletrace.service"
DEMO = "/usr/lib/jouletrace/jouletrace/demo/recording.json.gz"
CONFIG = Path("/etc/jouletrace/jouletrace.yml")
STREAM, DATAGRAM = "/run/jouletrace/ingest.sock", "/run/jouletrace/ingest.dgram"
ENERGY = "jouletrace_gpu_energy_joules_total"
FIRST_SCRAPE_SECONDS = 10.0
"""From `apt install` to the first scrape; the goal."""


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def shown(name: str) -> str:
    return run("systemctl", "show", UNIT, "--property", name, "--value").strip()


def get(path: str, timeout: float = 15.0) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", 9841, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def until(what: str, condition: Callable[[], Any], seconds: float = 15.0) -> float:
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


def journal() -> str:
    return run("journalctl", "--unit", UNIT, "--no-pager", "--output", "cat")


def events(event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in journal().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


def report(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def scraping() -> Iterator[list[float]]:
    """Scrape all the time meanwhile; yields how long each scrape took. A refused one raises at the end."""
    waits: list[float] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(0.05):
            begun = time.monotonic()
            try:
                assert get("/metrics")[0] == 200
            except (OSError, http.client.HTTPException, AssertionError) as failure:
                failures.append(failure)
            waits.append(time.monotonic() - begun)

    thread = threading.Thread(target=scrape)
    thread.start()
    yield waits
    stop.set()
    thread.join()
    assert not failures, f"{len(failures)} of {len(waits)} scrapes were lost, first by {failures[0]!r}"


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


def installs() -> None:
    # Instead of the driver a recording, and a watchdog for the impatient.
    Path("/etc/default/jouletrace").write_text(f"JOULETRACE_SOURCE=replay:{DEMO}\n")
    drop_in = Path("/etc/systemd/system/jouletrace.service.d/test.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=3s\nTimeoutAbortSec=2s\n")
    begun = time.monotonic()
    run("apt-get", "install", "--yes", "/opt/jouletrace.deb")
    installed = time.monotonic() - begun
    until("the first scrape", lambda: get("/metrics")[0] == 200)
    first = time.monotonic() - begun
    until("the first energy", scraped)
    report(f"apt install: {installed:.1f} s, first scrape {first:.1f} s, first energy {time.monotonic() - begun:.1f} s")
    assert first < FIRST_SCRAPE_SECONDS
    assert shown("ActiveState") == "active"
    until("the status", lambda: shown("StatusText") == "1 GPU sampled")
    assert run("jouletrace", "--version").startswith("jouletrace ")


def is_confined() -> None:
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
    report(f"user {user}, no capabilities, {filters} filters; {exposure.lstrip('→ ')}")
    state = Path("/var/lib/private/jouletrace")
    assert stat.S_IMODE(state.stat().st_mode) == 0o750
    until("saved state", lambda: any(state.rglob("*")))


def takes_records() -> None:
    group = grp.getgrnam("jouletrace-ingest").gr_gid
    for path in (STREAM, DATAGRAM):
        status = Path(path).stat()
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert (status.st_uid, status.st_gid) == (0, group)
    for name, kind, path in (
        ("stream", socket.SOCK_STREAM, STREAM),
        ("datagram", socket.SOCK_DGRAM, DATAGRAM),
    ):
        record = {"record": "engine", "engine_id": f"by-{name}", "kind": "vllm", "models": ["m"]}
        line = json.dumps(record).encode() + b"\n"
        assert not as_user([], kind, path, line), f"anybody may write to {path}"
        assert as_user([group], kind, path, line)
        taken = f'jouletrace_events_total{{source="{name}"}} 1'
        until(f"the record by {name}", lambda taken=taken: taken in get("/metrics")[1])
        assert f'jouletrace_events_dropped_total{{reason="invalid",source="{name}"}}' not in get("/metrics")[1]
    report("records by stream and datagram socket, from members of jouletrace-ingest alone")


def reloads() -> None:
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
    report("reloads, and refuses a wrong configuration")


def comes_back(name: str, what: signal.Signals, number: int) -> None:
    pid = int(shown("MainPID"))
    with scraping() as waits:
        os.kill(pid, what)
        took = until(f"a restart after {name}", lambda: shown("NRestarts") == str(number), 20)
        up = until("service", lambda: shown("ActiveState") == "active" and shown("MainPID") not in ("0", str(pid)))
        until("the next scrape", scraped)
    report(f"after {name}: restarted in {took:.1f} s, up in {took + up:.1f} s; longest scrape {max(waits):.1f} s")


def restarts_without_a_lost_scrape() -> None:
    before = shown("MainPID")
    with scraping() as waits:
        run("apt-get", "install", "--yes", "--reinstall", "/opt/jouletrace.deb")
        until("another process", lambda: shown("MainPID") not in ("0", before) and scraped())
    report(f"reinstalled under {len(waits)} scrapes, none lost; longest {max(waits):.1f} s")


def mends_itself() -> None:
    original = CONFIG.read_text()
    CONFIG.write_text("nonsense: 1\n")
    subprocess.run(["systemctl", "restart", UNIT], capture_output=True, check=False)
    until("the reason", lambda: "nonsense: is not a known key" in journal())
    CONFIG.write_text(original)
    took = until("recovery", scraped, 20)
    report(f"after a wrong configuration was mended: up in {took:.1f} s")


def stops() -> None:
    begun = time.monotonic()
    run("systemctl", "stop", "jouletrace.socket", "jouletrace-ingest.socket", UNIT)
    took = time.monotonic() - begun
    assert shown("Result") == "success"
    assert shown("ExecMainStatus") == "0"
    assert not Path(STREAM).exists()
    try:
        get("/metrics")
    except ConnectionRefusedError:
        report(f"stops in {took:.1f} s with exit status 0")
    else:
        raise AssertionError("something answers after the stop")
    assert "Traceback" not in journal()


def is_removed() -> None:
    run("apt-get", "purge", "--yes", "jouletrace")
    left = [
        path
        for path in ("/etc/jouletrace", "/var/lib/jouletrace", "/var/lib/private/jouletrace", "/usr/lib/jouletrace")
        if Path(path).exists()
    ]
    assert not left, left
    assert "jouletrace" not in run("systemctl", "list-unit-files", "--no-pager")
    report("purged without a trace")


def main() -> None:
    try:
        installs()
        is_confined()
        takes_records()
        reloads()
        comes_back("kill -9", signal.SIGKILL, 1)
        comes_back("a hang", signal.SIGSTOP, 2)
        assert "Fatal Python error: Aborted" in journal(), "the watchdog's signal tells where the threads stood"
        restarts_without_a_lost_scrape()
        mends_itself()
        stops()
        is_removed()
    except Exception:
        subprocess.run(["journalctl", "--no-pager", "--lines", "60"], check=False)
        raise
    report("all is well")


if __name__ == "__main__":
    main()
