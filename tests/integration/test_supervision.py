"""The whole daemon under a supervisor: notifications, watchdog, passed sockets, reload."""

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.daemon_process import DaemonProcess, simulated
from tests.nvml_shim import Constant, Device, Fault, Scenario, write_control

pytestmark = pytest.mark.timeout(60)

QUICK = ("--sampling.ring-interval", "200ms", "--readiness.stale-after", "1s")
TAKE_OVER = """
import os, sys
*numbers, end = [int(n) for n in sys.argv[1].split(",")] + [None]
for place, number in enumerate(numbers, 3):
    os.dup2(number, place, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""
"""What systemd does between fork and exec: sockets from number 3 on, and for whom they are."""


class Supervisor:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.heard: list[tuple[float, dict[str, str]]] = []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.address)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self.sock.recv(4096).decode():
            self.heard.append((time.monotonic(), dict(line.split("=", 1) for line in message.splitlines())))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.address)
        self._thread.join()
        self.sock.close()

    def said(self, line: str) -> list[float]:
        """Return when a line was said."""
        name, value = line.split("=")
        return [at for at, fields in self.heard if fields.get(name) == value]

    @property
    def status(self) -> str:
        """The last status that was told."""
        return next((fields["STATUS"] for _, fields in reversed(self.heard) if "STATUS" in fields), "")


@pytest.fixture(name="supervisor")
def fixture_supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.close()


def test_a_hang_in_the_driver_starves_the_watchdog_late(library: Path, tmp_path: Path, supervisor: Supervisor) -> None:
    control = tmp_path / "control"
    variables = simulated(library, tmp_path, Scenario([Device(power=Constant(300))], control=control))
    variables |= {"NOTIFY_SOCKET": supervisor.address, "WATCHDOG_USEC": "600000"}
    with DaemonProcess(tmp_path, *QUICK, "--driver.give-up-after", "2s", variables=variables) as daemon:
        daemon.until("READY", lambda: supervisor.said("READY=1"))
        assert daemon.get("/-/healthy")[0] == 200, "what is said to be up answers"
        daemon.until("signs of life", lambda: len(supervisor.said("WATCHDOG=1")) >= 3)
        daemon.until("the status", lambda: supervisor.status == "1 GPU sampled")
        write_control(control, [Fault.hang("nvmlDeviceGetSamples")])
        hung = time.monotonic()
        daemon.until("the reason", lambda: "nvmlDeviceGetSamples on GPU 0 hangs" in supervisor.status)
        assert supervisor.said("WATCHDOG=1")[-1] > hung + 0.8, "pages still answer, so it is kept alive"
        # The heartbeat gets as old as the driver is waited for, and no sign of life follows, but the status does.
        time.sleep(max(0.0, hung + 2.8 - time.monotonic()))
        last = supervisor.said("WATCHDOG=1")[-1]
        assert hung + 1.2 < last < hung + 2.6
        told = len(supervisor.heard)
        time.sleep(0.5)
        assert supervisor.said("WATCHDOG=1")[-1] == last
        assert len(supervisor.heard) > told
        # The driver answers again, and all is well.
        write_control(control)
        daemon.until("life", lambda: supervisor.said("WATCHDOG=1")[-1] > last)
        daemon.process.terminate()
        assert daemon.ends() == 0
        assert supervisor.said("STOPPING=1")


def test_passed_sockets_outlive_the_process(library: Path, tmp_path: Path) -> None:
    variables = simulated(library, tmp_path, Scenario([Device(power=Constant(300))]))
    stream, datagram = tmp_path / "stream", tmp_path / "datagram"
    sockets = [
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    ]
    sockets[1].bind(str(stream))
    sockets[1].listen()
    sockets[2].bind(str(datagram))
    port = sockets[0].getsockname()[1]
    numbers = [sock.fileno() for sock in sockets]
    launcher = [sys.executable, "-c", TAKE_OVER, ",".join(map(str, numbers)), "metrics:ingest:ingest"]
    record = json.dumps({"record": "engine", "engine_id": "e", "kind": "vllm", "models": ["m"]}).encode() + b"\n"
    with contextlib.ExitStack() as stack:
        for sock in sockets:
            stack.enter_context(sock)
        # Whoever comes before the daemon waits in the kernel.
        early = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        early.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(record, str(datagram))
        for turn in range(2):
            with DaemonProcess(tmp_path, variables=variables, launcher=launcher, pass_fds=numbers) as daemon:
                daemon.until("the log", lambda daemon=daemon: daemon.url)
                assert daemon.url == f"http://127.0.0.1:{port}"
                assert "web.listen_address is not used" in daemon.text()
                if turn == 0:
                    assert early.recv(64).startswith(b"HTTP/1.1 200")
                else:
                    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
                        sender.connect(str(stream))
                        sender.sendall(record)
                source = ("datagram", "stream")[turn]
                taken = f'jouletrace_events_total{{source="{source}"}} 1'
                daemon.until(f"the {source}", lambda daemon=daemon, taken=taken: taken in daemon.get("/metrics")[1])
                daemon.process.terminate()
                assert daemon.ends() == 0
            assert stream.exists()
            assert datagram.exists()


def test_a_reload_applies_what_it_can_and_refuses_what_is_wrong(
    library: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    def events(daemon: DaemonProcess, event: str) -> list[dict[str, object]]:
        return [line for line in daemon.events() if line["event"].startswith(event)]

    file, laws = tmp_path / "jouletrace.yml", tmp_path / "laws.yml"
    file.write_text("log: {level: info}\n")
    variables = simulated(library, tmp_path, Scenario([Device(power=Constant(300))]))
    variables |= {"NOTIFY_SOCKET": supervisor.address}
    with DaemonProcess(tmp_path, "--config.file", str(file), variables=variables) as daemon:
        daemon.until("READY", lambda: supervisor.said("READY=1"))
        laws.write_text("models: {m: {fixed_joules: 1.0, prefill_token_joules: 0.01, decode_sequence_joules: 0.05}}\n")
        file.write_text(f"log: {{level: warning}}\nledger: {{laws_file: {laws}, settled_requests: 99}}\n")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.until("the reload", lambda: len(supervisor.said("READY=1")) == 2)
        assert len(supervisor.said("RELOADING=1")) == 1
        # Of level info, so no longer written; the next one is.
        file.write_text(f"log: {{level: info}}\nledger: {{laws_file: {laws}, settled_requests: 99}}\n")
        daemon.process.send_signal(signal.SIGHUP)
        [told] = daemon.until("the second reload", lambda: events(daemon, "the configuration was reloaded"))
        assert told["applied"] == ["log.level"]
        assert told["need_a_restart"] == ["ledger.settled_requests"], "as long as it is not in force"
        for what, wrong, words in (
            (file, "log: {level: loud}\n", "log.level"),
            (file, f"ledger: {{laws_file: {laws}}}\n", "fixed"),
        ):
            what.write_text(wrong)
            laws.write_text("models: {m: {fixed: 1}}\n")
            before = len(events(daemon, "the configuration was not reloaded"))
            daemon.process.send_signal(signal.SIGHUP)
            refused = daemon.until(
                "the refusal",
                lambda before=before: events(daemon, "the configuration was not reloaded")[before:],
            )
            assert words in str(refused[0]["problem"])
        assert daemon.get("/-/healthy")[0] == 200
        assert daemon.process.poll() is None
