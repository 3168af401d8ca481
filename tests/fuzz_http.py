"""Schemathesis against a whole daemon: what its OpenAPI document says, and what it does not."""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.daemon_process import DaemonProcess

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main(arguments: list[str]) -> int:
    """Return Schemathesis's exit code, or 1 when the daemon's log has a traceback; `arguments` are passed on."""
    with tempfile.TemporaryDirectory() as folder, DaemonProcess(Path(folder), "--demo") as daemon:
        daemon.until("readiness", daemon.ready)
        # The live stream never ends, so no call of it would; tests/unit/test_web_live_stream.py has its answers.
        command = [
            "schemathesis", "run", f"{daemon.url}/v1/openapi.json", "--checks", CHECKS, "--exclude-path", "/v1/live",
            "--phases", "coverage,fuzzing", "--request-timeout", "10", *arguments,
        ]  # fmt: skip
        code = subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=False).returncode
        daemon.assert_calm()
        return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
