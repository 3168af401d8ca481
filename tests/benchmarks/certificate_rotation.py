"""Scrapes while certificates are rotated: a real Prometheus each second, and curl as fast as it is answered.

A daemon replays the demo with TLS. Its certificate is replaced eight times, every third time after it has stood there
half-written; after each the new one must be served. Prints how many scrapes there were and how many were lost.
"""

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

from tests.certificates import Authority, tls_section, write_anew
from tests.daemon_process import DaemonProcess

ROTATIONS = 8
SECONDS_BETWEEN = 4.0


def _curl(url: str, authority: Authority, over: threading.Event, codes: list[int]) -> None:
    while not over.is_set():
        command = ["curl", "-s", "-m", "5", "-o", "/dev/null", "--cacert", str(authority.file), url]
        codes.append(subprocess.run(command, check=False).returncode)


def _asked(port: int, query: str) -> float:
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    with urllib.request.urlopen(url, timeout=5) as response:
        return float(json.load(response)["data"]["result"][0]["value"][1])


def _served(address: str, cert: Path) -> bool:
    shown = subprocess.run(
        ["openssl", "s_client", "-connect", address], input="", capture_output=True, text=True, check=False
    ).stdout
    return cert.read_text().splitlines()[1] in shown


def main() -> None:
    """Print the figures."""
    if shutil.which("prometheus") is None:
        raise SystemExit("Prometheus is not installed: apt install prometheus")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority(folder)
        cert, key = authority.issue("server", "127.0.0.1")
        web, config = folder / "web.yml", folder / "prometheus.yml"
        web.write_text(tls_section(cert, key))
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = int(sock.getsockname()[1])
        with DaemonProcess(folder, "--demo", "--web.config.file", str(web)) as daemon:
            address = daemon.url.removeprefix("https://")
            config.write_text(
                "global: {scrape_interval: 1s, scrape_timeout: 900ms}\nscrape_configs:\n"
                f"  - {{job_name: node, scheme: https, tls_config: {{ca_file: {authority.file}}}, "
                f"static_configs: [{{targets: ['{address}']}}]}}\n"
            )
            command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
            command += [f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=error"]
            codes: list[int] = []
            over = threading.Event()
            client = threading.Thread(target=_curl, args=(daemon.url + "/metrics", authority, over, codes))
            with subprocess.Popen(command) as prometheus:
                try:
                    time.sleep(3)
                    client.start()
                    started = time.monotonic()
                    for turn in range(ROTATIONS):
                        if turn % 3 == 2:
                            write_anew(cert, cert.read_bytes()[:400])
                            time.sleep(SECONDS_BETWEEN)
                        authority.issue("server", "127.0.0.1")
                        time.sleep(SECONDS_BETWEEN)
                        assert _served(address, cert)
                    seconds = time.monotonic() - started
                    scrapes, taken = (_asked(port, f"{f}_over_time(up[{seconds:.0f}s])") for f in ("count", "sum"))
                finally:
                    over.set()
                    client.join()
                    prometheus.terminate()
            daemon.assert_calm()
        print(
            f"{ROTATIONS} rotations in {seconds:.0f} s: Prometheus made {scrapes:.0f} scrapes, {scrapes - taken:.0f} "
            f"failed; curl made {len(codes)}, {sum(map(bool, codes))} failed"
        )


if __name__ == "__main__":
    main()
