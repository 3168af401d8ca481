"""`jouletrace proxy` as a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.daemon_process import DaemonProcess


class ProxyProcess(DaemonProcess):
    """A running proxy on a free port; a context manager that ends it by its own pid."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "proxy.log"
        self.started = time.monotonic()
        options = ["--listen", "127.0.0.1:0", "--log.format", "json"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jouletrace", "proxy", *options, *arguments],
                stdout=output,
                stderr=output,
                env=dict(os.environ),
            )
        self._url = ""
