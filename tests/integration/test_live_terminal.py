"""`jouletrace top` as a process of its own, over every way that leads to the daemon."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import bcrypt
import pytest
from tests.certificates import Authority, tls_section
from tests.daemon_process import DaemonProcess, run_command

pytestmark = pytest.mark.timeout(60)

WORD = "correct horse battery"


def seen(*arguments: str) -> dict[str, dict[str, object]]:
    """Return the first round that `top` is told."""
    done = run_command("top", *arguments, "--once", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content: dict[str, dict[str, object]] = json.loads(done.stdout)
    return content


def problem(*arguments: str) -> str:
    """Return what `top` complains of."""
    done = run_command("top", *arguments, "--once")
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_a_unix_socket_serves_what_the_loopback_serves(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with DaemonProcess(tmp_path, "--demo", "--web.listen-address", f"unix:{path}") as daemon:
        daemon.until("readiness", daemon.ready)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        told = seen(f"unix:{path}")
        assert told["node"]["source"] == "replay"
        # Its clients are of this machine: they see requests.
        assert told["hello"]["requests_refused"] is None
        assert told["requests"].keys() == seen(daemon.url)["requests"].keys()
        assert [event["socket"] for event in daemon.events() if "socket" in event] == [str(path)]
        if shutil.which("curl"):
            asked = ["curl", "--silent", "--unix-socket", str(path), "http://localhost/metrics"]
            page = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
            assert "jouletrace_gpu_energy_joules_total{" in page
        # The document tells of the stream: its type, and every event by name.
        [stream] = json.loads(daemon.get("/v1/openapi.json")[1])["paths"]["/v1/live"].values()
        assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]
        assert all(f"`{event}`" in stream["responses"]["200"]["description"] for event in told)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.ends() == 0
    assert not path.exists()
    assert "cannot be reached (No such file or directory)" in problem(f"unix:{path}")


def test_a_socket_may_be_the_only_listener(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    config = tmp_path / "jouletrace.yml"
    config.write_text(f"web: {{listen_address: ['unix:{path}']}}\ningest: {{socket_access: owner}}\n")
    arguments = ["run", "--demo", "--config.file", str(config), "--state-dir", str(tmp_path / "state")]
    process = subprocess.Popen(
        [sys.executable, "-m", "jouletrace", *arguments], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stderr is not None
        assert f'"socket": "{path}"' in process.stderr.readline()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert seen(f"unix:{path}")["node"]["source"] == "replay"
    finally:
        process.terminate()
        process.communicate(timeout=15)
    assert process.returncode == 0


def test_tls_passwords_and_client_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", "127.0.0.1")
    known, known_key = authority.issue("known", "ops.example")
    hashed = bcrypt.hashpw(WORD.encode(), bcrypt.gensalt(4)).decode()
    web_config, path, word = tmp_path / "web.yml", tmp_path / "web.sock", tmp_path / "word"
    section = tls_section(
        cert, key, f"client_ca_file: {authority.file}", "client_auth_type: RequireAndVerifyClientCert"
    )
    web_config.write_text(f"{section}basic_auth_users:\n  ops: {hashed}\n")
    word.write_text(f"{WORD}\n")
    login = ("--user", "ops", "--password-file", str(word))
    shown = ("--cert-file", str(known), "--key-file", str(known_key))
    options = ("--demo", "--web.config.file", str(web_config), "--web.listen-address", f"unix:{path}")
    with DaemonProcess(tmp_path, *options) as daemon:
        url, ca = daemon.url, ("--ca-file", str(authority.file))
        assert url.startswith("https://")
        daemon.until("the socket", path.exists)
        assert seen(url, *ca, *shown, *login)["node"]["source"] == "replay"
        assert "is not trusted (self-signed certificate in certificate chain)" in problem(url, *shown, *login)
        assert "a client certificate (--cert-file)?" in problem(url, *ca, *login)
        assert "password" in problem(url, *ca, *shown)
        # Nobody encrypts a Unix socket, but its clients need the password, too.
        assert "password" in problem(f"unix:{path}")
        assert seen(f"unix:{path}", *login)["node"]["source"] == "replay"
        daemon.assert_calm()
