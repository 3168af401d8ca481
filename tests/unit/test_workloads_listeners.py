"""Listening ports of real processes."""

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jouletrace.workloads.listeners import Listener, NoPermissionError, listeners

LISTEN = """
import socket, sys, time
sock = socket.create_server(("0.0.0.0", 0))
print(sock.getsockname()[1], flush=True)
time.sleep(60)
"""


def test_own_ports_on_both_families() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as other,
        socket.create_server(("::", 0), family=socket.AF_INET6) as everywhere,
        socket.socket() as silent,
    ):
        silent.bind(("127.0.0.1", 0))
        found = listeners([os.getpid()])
        ports = {(one.host, one.port) for one in found}
        assert ("127.0.0.1", one.getsockname()[1]) in ports
        assert ("::1", other.getsockname()[1]) in ports
        assert ("127.0.0.1", everywhere.getsockname()[1]) in ports
        assert silent.getsockname()[1] not in {port for _, port in ports}
        assert {one.pid for one in found} == {os.getpid()}


def test_another_process_and_one_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert Listener(child.pid, "127.0.0.1", port) in listeners([child.pid])
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert listeners([child.pid]) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_another_network_namespace_is_reached_over_its_own_address() -> None:
    script = "ip link set lo up 2>/dev/null; ip addr add 192.0.2.7/32 dev lo 2>/dev/null || exit 3; exec " + (
        f"{sys.executable} -c '{LISTEN}'"
    )
    child = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            pytest.skip("no network namespaces here")
        assert listeners([child.pid]) == [Listener(child.pid, "192.0.2.7", int(line))]
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def process(proc: Path, pid: str, namespace: str) -> Path:
    folder = proc / pid
    (folder / "ns").mkdir(parents=True)
    (folder / "ns" / "net").symlink_to(f"net:[{namespace}]")
    (folder / "fd").mkdir()
    (folder / "net").mkdir()
    return folder


def test_a_container_as_the_kernel_shows_it(tmp_path: Path) -> None:
    process(tmp_path, "self", "1")
    engine = process(tmp_path, "7", "2")
    (engine / "fd" / "3").symlink_to("socket:[901]")
    (engine / "fd" / "4").symlink_to("socket:[902]")
    (engine / "fd" / "5").symlink_to("/dev/null")
    loopback = "".join(f"{part:02X}" for part in reversed(ipaddress.ip_address("127.0.0.1").packed))
    rest = "00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0"
    (engine / "net" / "tcp").write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        f"   0: 00000000:1F40 {rest} 901 1 0 100 0 0 10 0\n"
        f"   1: {loopback}:1F41 {rest} 902 1 0 100 0 0 10 0\n"
    )
    own = "".join(f"     |-- {address}\n        /32 host LOCAL\n" for address in ("10.42.0.9", "127.0.0.1"))
    (engine / "net" / "fib_trie").write_text(f"Main:\n  +-- 0.0.0.0/0 3 0 5\n{own}")
    # What listens on its loopback alone cannot be reached from here.
    assert listeners([7], tmp_path) == [Listener(7, "10.42.0.9", 8000)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_without_permission() -> None:
    with pytest.raises(NoPermissionError):
        listeners([1])
