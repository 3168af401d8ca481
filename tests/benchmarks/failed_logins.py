"""What scrapes feel of 10,000 failed logins: from one address, and from 500 of them.

A daemon with bcrypt of cost 10 replays the demo. A process of its own tries wrong passwords over 250 connections as
fast as it is answered, each connection from an address of 127.0.0.0/8; meanwhile the right password scrapes on a
connection of its own. Prints one line for no attack and one for each attack.
"""

import asyncio
import base64
import collections
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import bcrypt

from tests.daemon_process import DaemonProcess

LOGINS = 10_000
CONNECTIONS = 250
SCRAPE_SECONDS = 0.02
WORD = "correct horse battery"


@dataclass(frozen=True)
class Felt:
    """What scrapes took during an attack."""

    seconds: Sequence[float]
    attack_seconds: float
    answers: str
    """The attacker's statuses with their counts."""

    def quantile(self, ratio: float) -> float:
        """Return a quantile of the scrapes' times, in seconds."""
        return sorted(self.seconds)[int(ratio * (len(self.seconds) - 1))]


async def attack(port: int, logins: int, addresses: int) -> None:
    """Try wrong passwords; print the statuses of the answers."""
    statuses: collections.Counter[str] = collections.Counter()
    left = iter(range(logins))

    async def one() -> None:
        for number in left:
            host = f"127.1.{number % addresses // 200}.{number % addresses % 200 + 1}"
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
            login = base64.b64encode(f"prometheus:guess-{number}".encode()).decode()
            head = f"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Basic {login}\r\n\r\n"
            writer.write(head.encode())
            statuses[(await reader.read(12))[9:12].decode()] += 1
            writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    print(dict(statuses))


async def _scrape(url: str, until: "subprocess.Popen[str] | None", seconds: float) -> list[float]:
    taken: list[float] = []
    ends = time.monotonic() + seconds
    login = base64.b64encode(f"prometheus:{WORD}".encode()).decode()
    async with aiohttp.ClientSession(headers={"Authorization": f"Basic {login}"}) as session:
        while time.monotonic() < ends and (until is None or until.poll() is None):
            started = time.perf_counter()
            async with session.get(url) as response:
                await response.read()
                assert response.status == 200
            taken.append(time.perf_counter() - started)
            await asyncio.sleep(SCRAPE_SECONDS)
    return taken[1:]  # The first pays bcrypt.


def measure(folder: Path, addresses: int, logins: int = LOGINS) -> Felt:
    """Return what scrapes take while so many addresses try to log in; 0 addresses for no attack, of 5 s."""
    file = folder / "web.yml"
    hashed = bcrypt.hashpw(WORD.encode(), bcrypt.gensalt(10)).decode()
    file.write_text(f"basic_auth_users: {{prometheus: '{hashed}'}}\n")
    with DaemonProcess(folder, "--demo", "--web.config.file", str(file)) as daemon:
        daemon.until("readiness", daemon.ready)
        metrics = daemon.url + "/metrics"
        if not addresses:
            return Felt(asyncio.run(_scrape(metrics, None, 5.0)), 5.0, "none")
        port = daemon.url.rpartition(":")[2]
        command = [sys.executable, "-m", "tests.benchmarks.failed_logins", port, str(logins), str(addresses)]
        started = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
            try:
                seconds = asyncio.run(_scrape(metrics, attacker, 120.0))
                answers = attacker.communicate(timeout=10)[0].strip()
            finally:
                attacker.kill()
        daemon.assert_calm()
        return Felt(seconds, time.monotonic() - started, answers)


def main() -> None:
    """Print the figures."""
    for addresses in (0, 1, 500):
        with tempfile.TemporaryDirectory() as folder:
            felt = measure(Path(folder), addresses)
        times = ", ".join(f"{name} {felt.quantile(q) * 1000:.1f} ms" for name, q in (("p50", 0.5), ("p99", 0.99)))
        print(
            f"{addresses} addresses, {felt.attack_seconds:.1f} s, answers {felt.answers}: {len(felt.seconds)} scrapes, "
            f"{times}, worst {max(felt.seconds) * 1000:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(attack(*map(int, sys.argv[1:])))
    else:
        main()
