"""Who may read and write: real clients (curl, openssl, Prometheus) against the whole daemon."""

import base64
import contextlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import bcrypt
import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from tests.benchmarks.failed_logins import measure
from tests.certificates import Authority, tls_section, write_anew
from tests.daemon_process import DaemonProcess, run_command

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        shutil.which("curl") is None or shutil.which("openssl") is None, reason="needs curl and openssl"
    ),
]

WORD = "correct horse battery"


def users(password: str = WORD, cost: int = 10) -> str:
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode().replace("$2b$", "$2y$")
    return f"basic_auth_users:\n  prometheus: {hashed}\n"


@pytest.fixture(name="authority")
def fixture_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def served(tmp_path: Path, web_config: str, *arguments: str) -> DaemonProcess:
    file = tmp_path / "web.yml"
    file.write_text(web_config)
    return DaemonProcess(tmp_path, "--demo", "--web.config.file", str(file), *arguments)


def curl(url: str, *options: str) -> tuple[int, str]:
    """Return curl's view: HTTP status (0 when there was no answer) and body."""
    done = subprocess.run(
        ["curl", "--silent", "--max-time", "5", "--write-out", "\n%{http_code}", *options, url],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def handshake(url: str, *options: str) -> str:
    address = url.removeprefix("https://")
    done = subprocess.run(
        ["openssl", "s_client", "-connect", address, *options],
        input="", capture_output=True, text=True, errors="replace", timeout=10, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_tls_and_passwords(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    headers = "http_server_config:\n  headers:\n    Strict-Transport-Security: max-age=60\n"
    with served(tmp_path, tls_section(cert, key) + headers + users()) as daemon:
        url = daemon.url
        assert url.startswith("https://")
        ca = ("--cacert", str(authority.file))
        assert curl(url + "/metrics")[0] == 0
        assert curl(url + "/metrics", *ca)[0] == 401
        assert curl(url + "/metrics", *ca, "-u", "prometheus:wrong")[0] == 401
        assert curl(url + "/metrics", *ca, "-u", f"nobody:{WORD}")[0] == 401
        status, body = curl(url + "/metrics", *ca, "-u", f"prometheus:{WORD}")
        assert status == 200
        assert "jouletrace_up" in body
        for path in ("/", "/v1/live", "/no/such/page", "/-/live/live.js"):
            assert curl(url + path, *ca)[0] == 401, path
        for path in ("/-/healthy", "/v1/openapi.json", "/v1/schema", "/v1/ledger"):
            assert curl(url + path, *ca)[0] == 200, path
        status, answer = curl(url + "/-/healthy", *ca, "--include")
        assert "strict-transport-security: max-age=60" in answer.lower()
        status, answer = curl(url + "/metrics", *ca, "--include")
        assert 'www-authenticate: basic realm="jouletrace"' in answer.lower()
        assert "TLSv1.2" in handshake(url, "-tls1_2")
        assert "TLSv1.3" in handshake(url, "-tls1_3")
        assert "Cipher is (NONE)" in handshake(url, "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0")
        assert WORD not in daemon.text()
        assert "$2y$" not in daemon.text()
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.ends() == 0


def grpc_export(
    port: int, authority: Authority | None = None, identity: tuple[Path, Path] | None = None, **metadata: str
) -> str:
    """Export no spans over gRPC; return the status."""
    address = f"127.0.0.1:{port}"
    if authority is None:
        channel = grpc.insecure_channel(address)
    else:
        cert, key = (None, None) if identity is None else (file.read_bytes() for file in identity)
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.file.read_bytes(), key, cert))
    with channel:
        try:
            TraceServiceStub(channel).Export(
                ExportTraceServiceRequest(),
                timeout=5,
                metadata=[(name.replace("_", "-"), value) for name, value in metadata.items()],
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def spans_served(tmp_path: Path, web_config: str, *arguments: str) -> tuple[DaemonProcess, Callable[[], int]]:
    """Return a daemon with listeners of their own for spans, and what says the port of gRPC."""
    options = ("--otlp.grpc-listen-address", "127.0.0.1:0", "--otlp.listen-address", "127.0.0.1:0", *arguments)
    daemon = served(tmp_path, web_config, *options)

    def port() -> int:
        ports = lambda: [e["port"] for e in daemon.events() if "port" in e and "over gRPC" in e["event"]]  # noqa: E731
        return int(daemon.until("the port of gRPC", ports)[-1])

    return daemon, port


def test_spans_come_in_over_the_same_tls(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    daemon, port = spans_served(tmp_path, tls_section(cert, key))
    with daemon:
        assert grpc_export(port()) == "UNAVAILABLE"
        assert grpc_export(port(), authority) == "OK"
        [endpoint] = [e["endpoint"] for e in daemon.events() if e["event"] == "receiving spans"]
        assert endpoint.startswith("https://")
        export = ("-d", "", "-H", "Content-Type: application/x-protobuf")
        assert curl(endpoint, *export)[0] == 0
        assert curl(endpoint, *export, "--cacert", str(authority.file))[0] == 200
        for url in (f"https://127.0.0.1:{port()}", endpoint.removesuffix("/v1/traces")):
            alpn = ("-alpn", "h2") if str(port()) in url else ()
            assert "Cipher is (NONE)" in handshake(url, "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0", *alpn)
        # A certificate that is half written changes nothing; a whole one counts for the next connection.
        write_anew(cert, cert.read_bytes()[:400])
        daemon.until("the complaint", lambda: "the old one stays" in daemon.text())
        assert grpc_export(port(), authority) == "OK"
        authority.issue("server", "127.0.0.1")
        address = f"https://127.0.0.1:{port()}"
        daemon.until("the new certificate", lambda: served_serial(address, "-alpn", "h2") == serial(cert))
        assert grpc_export(port(), authority) == "OK"
        assert "Handshake failed" not in daemon.text()
        daemon.assert_calm()


def test_spans_and_client_certificates(tmp_path: Path, authority: Authority) -> None:
    """They are asked for from a reload on, and spans stay out when gRPC cannot do what is asked."""
    cert, key = authority.issue("server", "127.0.0.1")
    known, other = authority.issue("known", "gateway.example"), authority.issue("other", "somebody.example")
    daemon, port = spans_served(tmp_path, "{}")
    with daemon:
        daemon.until("readiness", daemon.ready)
        assert grpc_export(port()) == "OK"
        assert grpc_export(port(), x_forwarded_for="10.0.0.7") == "PERMISSION_DENIED"

        def becomes(web_config: str) -> None:
            told = len(daemon.events())
            write_anew(tmp_path / "web.yml", web_config.encode())
            daemon.process.send_signal(signal.SIGHUP)
            done = lambda: any("over gRPC" in e["event"] for e in daemon.events()[told:])  # noqa: E731
            daemon.until("another listener", done)

        def asks(*more: str) -> None:
            becomes(tls_section(cert, key, *more))

        asks(
            f"client_ca_file: {authority.file}", "client_auth_type: RequireAndVerifyClientCert",
            "client_allowed_sans: [gateway.example]",
        )  # fmt: skip
        assert grpc_export(port(), authority) == "UNAVAILABLE"
        assert grpc_export(port(), authority, other) == "PERMISSION_DENIED"
        assert grpc_export(port(), authority, known) == "OK"
        asks("min_version: TLS13")
        assert grpc_export(port(), authority) == "UNAVAILABLE"
        assert "gRPC cannot be held to min_version" in daemon.text()
        asks()
        assert grpc_export(port(), authority) == "OK"
        asks("min_version: TLS13")
        becomes("{}")
        assert grpc_export(port()) == "OK"
        daemon.assert_calm()


def test_a_token_is_read_again(tmp_path: Path) -> None:
    """A Secret's volume as Kubernetes updates it; a broken one keeps the old token, in the log and the metrics."""
    versions = {"a": "first-token", "b": "", "c": "first-token\nthird-token\n", "d": "third-token\n"}
    for name, token in versions.items():
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "token").write_text(token)
    (tmp_path / "..data").symlink_to("..a")
    (tmp_path / "token").symlink_to("..data/token")

    def swap(version: str) -> None:
        (tmp_path / "..new").symlink_to(f"..{version}")
        (tmp_path / "..new").replace(tmp_path / "..data")

    daemon, port = spans_served(tmp_path, "{}", "--ingest.token-file", str(tmp_path / "token"))
    with daemon:

        def status(token: str) -> int:
            return curl(daemon.url + "/v1/ledger", "-H", f"Authorization: Bearer {token}")[0]

        daemon.until("readiness", daemon.ready)
        in_force = lambda: daemon.metric("jouletrace_file_reload_success", key="ingest.token_file")  # noqa: E731
        assert (status("first-token"), status("third-token"), in_force()) == (200, 401, {"": 1.0})
        swap("b")
        daemon.until("the complaint", lambda: "ingest.token_file was not reloaded" in daemon.text())
        assert (status("first-token"), status(""), in_force()) == (200, 401, {"": 0.0})
        swap("c")
        daemon.until("the new token", lambda: status("third-token") == 200)
        assert (status("first-token"), in_force()) == (200, {"": 1.0})
        with standing(daemon.url + "/v1/live", Authorization="Bearer first-token") as stream:
            assert b'requests_refused":null' in stream.readline() + stream.readline()
            swap("d")
            assert stream.read()
        assert (status("first-token"), status("third-token"), in_force()) == (401, 200, {"": 1.0})
        assert grpc_export(port(), authorization="Bearer first-token") == "UNAUTHENTICATED"
        assert grpc_export(port(), authorization="Bearer third-token", x_forwarded_for="10.0.0.7") == "OK"
        for token in ("first-token", "third-token"):
            assert token not in daemon.text()
        daemon.assert_calm()


def standing(url: str, **headers: str) -> contextlib.closing[http.client.HTTPResponse]:
    """Return an answer that has begun."""
    return contextlib.closing(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10))


def test_what_stands_ends_when_it_changes_who_is_let_in(tmp_path: Path, authority: Authority) -> None:
    """Streams, idle connections and those of gRPC, when the authority of their certificates is replaced."""
    other = Authority(tmp_path)
    cert, key = authority.issue("server", "127.0.0.1")
    old, new = authority.issue("old", "gateway.example"), other.issue("new", "gateway.example")
    authorities = tmp_path / "clients.pem"
    authorities.write_bytes(authority.file.read_bytes())
    asks = tls_section(
        cert, key, f"client_ca_file: {authorities}", "client_auth_type: RequireAndVerifyClientCert"
    )  # fmt: skip
    daemon, port = spans_served(tmp_path, asks)
    context = ssl.create_default_context(cafile=authority.file)
    context.load_cert_chain(*old)
    with daemon, contextlib.ExitStack() as open_ones:

        def ask(path: str) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
            address = daemon.url.removeprefix("https://")
            connection = http.client.HTTPSConnection(address, context=context, timeout=10)
            open_ones.callback(connection.close)
            connection.request("GET", path)
            return connection, connection.getresponse()

        (_, stream), (idle, scrape) = ask("/v1/live"), ask("/metrics")
        assert stream.readline() == b"event: hello\n"
        assert b"jouletrace_up" in scrape.read()
        identity = grpc.ssl_channel_credentials(authority.file.read_bytes(), old[1].read_bytes(), old[0].read_bytes())
        channel = open_ones.enter_context(grpc.secure_channel(f"127.0.0.1:{port()}", identity))
        stub = TraceServiceStub(channel)
        stub.Export(ExportTraceServiceRequest(), timeout=5)
        write_anew(authorities, other.file.read_bytes())
        assert stream.read()  # To its end.
        assert idle.sock.recv(1) == b""
        metrics = daemon.url + "/metrics", "--cacert", str(authority.file)
        daemon.until(
            "the other authority", lambda: curl(*metrics, "--cert", str(new[0]), "--key", str(new[1]))[0] == 200
        )
        assert curl(*metrics, "--cert", str(old[0]), "--key", str(old[1]))[0] == 0
        with pytest.raises((http.client.HTTPException, OSError)):
            ask("/metrics")
        with pytest.raises(grpc.RpcError) as failure:
            stub.Export(ExportTraceServiceRequest(), timeout=5)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert grpc_export(port(), authority, new) == "OK"
        daemon.assert_calm()


def test_client_certificates(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    known, known_key = authority.issue("known", "prometheus.example")
    other, other_key = authority.issue("other", "somebody.example")
    stranger, stranger_key = Authority(tmp_path).issue("stranger", "prometheus.example")
    section = tls_section(
        cert, key, f"client_ca_file: {authority.file}", "client_auth_type: RequireAndVerifyClientCert",
        "client_allowed_sans: [prometheus.example]",
    )  # fmt: skip
    with served(tmp_path, section) as daemon:
        url = daemon.url + "/metrics"
        ca = ("--cacert", str(authority.file))
        assert curl(url, *ca)[0] == 0
        assert curl(url, *ca, "--cert", str(stranger), "--key", str(stranger_key))[0] == 0
        assert curl(url, *ca, "--cert", str(other), "--key", str(other_key))[0] == 403
        assert curl(url, *ca, "--cert", str(known), "--key", str(known_key))[0] == 200
        daemon.assert_calm()


def serial(pem: Path) -> str:
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-serial", "-in", str(pem)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def served_serial(url: str, *options: str) -> str:
    shown = handshake(url, *options)
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-serial"], input=shown, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_rotation_loses_no_scrape(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    with served(tmp_path, tls_section(cert, key)) as daemon:
        url = daemon.url
        failed: list[tuple[str, int]] = []
        scrapes = 0
        over = threading.Event()

        def scrape() -> None:
            nonlocal scrapes
            while not over.is_set():
                # Two on one connection: the second may find that it is of the old certificate.
                ca = ("--cacert", str(authority.file))
                status, codes = curl(url + "/metrics", *ca, "-o", "/dev/null", "-o", "/dev/null", url + "/-/healthy")
                scrapes += 1
                if (codes.strip(), status) != ("200", 200):
                    failed.append((codes, status))

        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            for turn in range(5):
                before = served_serial(url)
                if turn == 2:  # half-written, and long enough for it to be seen
                    write_anew(cert, cert.read_bytes()[:400])
                    daemon.until("the complaint", lambda: "was not reloaded" in daemon.text())
                authority.issue("server", "127.0.0.1")
                assert serial(cert) != before
                daemon.until("the new certificate", lambda: served_serial(url) == serial(cert))
        finally:
            over.set()
            scraper.join(10)
        assert scrapes > 20
        assert failed == []
        # A broken file changes nothing, and is said once a time.
        good = served_serial(url)
        kept = "the old one stays"
        before = daemon.text().count(kept)
        write_anew(cert, b"no certificate")
        daemon.until("the complaint", lambda: daemon.text().count(kept) == before + 1)
        time.sleep(2.5)
        assert daemon.text().count(kept) == before + 1
        assert served_serial(url) == good
        authority.issue("server", "127.0.0.1")
        daemon.until("the new certificate", lambda: served_serial(url) == serial(cert))
        daemon.assert_calm()


def test_a_reload_changes_passwords_at_once(tmp_path: Path) -> None:
    with served(tmp_path, users("old", 4)) as daemon:
        metrics = daemon.url + "/metrics"
        assert curl(metrics, "-u", "prometheus:old")[0] == 200
        write_anew(tmp_path / "web.yml", users("new", 4).encode())
        daemon.process.send_signal(signal.SIGHUP)
        daemon.until("the new password", lambda: curl(metrics, "-u", "prometheus:new")[0] == 200)
        assert curl(metrics, "-u", "prometheus:old")[0] == 401
        login = base64.b64encode(b"prometheus:new").decode()
        with standing(daemon.url + "/v1/live", Authorization=f"Basic {login}") as stream:
            assert stream.readline() == b"event: hello\n"
            write_anew(tmp_path / "web.yml", users("newest", 4).encode())
            assert stream.read()  # To its end.
        assert curl(daemon.url + "/v1/live", "-u", "prometheus:new")[0] == 401


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tls_server_confg: {}\n", "tls_server_confg: is not a known key; did you mean tls_server_config?"),
        ("basic_auth_users:\n  a: hunter2\n", "web.yml:2: basic_auth_users.a: is not a bcrypt hash"),
        ("tls_server_config:\n  cert_file: no.pem\n  key_file: no.key\n", "no.pem cannot be read"),
        ("rate_limit: [\n", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "web.yml"
    file.write_text(text)
    for command in ("check-config", "run"):
        arguments = ["--demo", "--state-dir", str(tmp_path)] if command == "run" else []
        done = run_command(command, "--web.config.file", str(file), *arguments)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert says in line
        assert "hunter2" not in line


def test_records_have_their_own_door(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "--demo", "--ingest.listen-address", "127.0.0.1:0") as daemon:
        [door] = daemon.until(
            "the second listener", lambda: [e["endpoint"] for e in daemon.events() if e["event"] == "taking records"]
        )
        post = ("-d", '{"request_id": "a"}')
        assert curl(daemon.url + "/v1/requests", *post)[0] == 405
        assert curl(daemon.url + "/v1/engines", *post)[0] == 404
        assert curl(door + "requests", *post)[0] == 200
        assert curl(door + "ledger")[0] == 200
        assert curl(daemon.url + "/v1/ledger")[0] == 200
        assert curl(door.removesuffix("/v1/") + "/metrics")[0] == 404


def test_a_unix_socket_needs_no_certificate(tmp_path: Path, authority: Authority) -> None:
    """Its mode says who may connect; passwords and the token count there as well."""
    cert, key = authority.issue("server", "127.0.0.1")
    section = tls_section(
        cert, key, f"client_ca_file: {authority.file}", "client_auth_type: RequireAndVerifyClientCert",
        "client_allowed_sans: [prometheus.example]",
    )  # fmt: skip
    path = tmp_path / "web.sock"
    with served(tmp_path, section + users(cost=4), "--web.listen-address", f"unix:{path}") as daemon:
        daemon.until("the socket", path.exists)
        unix = ("--unix-socket", str(path))
        assert curl("http://localhost/-/healthy", *unix)[0] == 200
        assert curl("http://localhost/metrics", *unix)[0] == 401
        assert curl("http://localhost/metrics", *unix, "-u", f"prometheus:{WORD}")[0] == 200
        status, answer = curl("http://localhost/v1/ledger", *unix, "--include")
        assert (status, "connection: close" in answer.lower()) == (200, False)
        assert curl("http://localhost/v1/ledger", *unix, "-H", "X-Forwarded-For: 10.0.0.7")[0] == 403


def test_metrics_alone_on_the_network(tmp_path: Path) -> None:
    """The node's address has metrics and health; the live page, answers and records stay on loopback."""
    node = "127.0.0.2"  # stands for the node's address: another than the main listener's
    with DaemonProcess(tmp_path, "--demo", "--web.metrics-listen-address", f"{node}:0") as daemon:
        alone = "serving metrics alone"
        [metrics] = daemon.until("the listener", lambda: [e["metrics"] for e in daemon.events() if e["event"] == alone])
        assert metrics.startswith(f"http://{node}:")
        status, page = curl(metrics)
        assert (status, "jouletrace_up" in page) == (200, True)
        base = metrics.removesuffix("/metrics")
        assert curl(base + "/-/healthy")[0] == 200
        for path in ("/", "/v1/live", "/-/live/live.js", "/v1/ledger", "/v1/requests", "/v1/openapi.json"):
            assert curl(base + path)[0] == 404, path
        for path in ("/v1/requests", "/v1/engines", "/v1/traces", "/v1/requests/a/finish"):
            assert curl(base + path, "-d", "{}")[0] == 404, path
        assert curl(daemon.url + "/")[0] == curl(daemon.url + "/v1/ledger")[0] == 200


@pytest.fixture(name="prometheus")
def fixture_prometheus(tmp_path: Path) -> tuple[Path, int]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = int(sock.getsockname()[1])
    return tmp_path / "prometheus.yml", port


@pytest.mark.prometheus
def test_prometheus_scrapes_with_tls_and_password(
    tmp_path: Path, authority: Authority, prometheus: tuple[Path, int]
) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    file, port = prometheus
    web_config = tls_section(cert, key) + users()
    with served(tmp_path, web_config) as daemon:
        checked = subprocess.run(
            ["promtool", "check", "web-config", str(tmp_path / "web.yml")], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        target = daemon.url.removeprefix("https://")
        job = (
            "  - job_name: {name}\n    scheme: https\n    tls_config: {{ca_file: {ca}}}\n"
            "    basic_auth: {{username: prometheus, password: {password}}}\n"
            "    static_configs: [{{targets: ['{target}']}}]\n"
        )
        jobs = [("right", WORD), ("wrong", "guess")]
        file.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 900ms}\nscrape_configs:\n"
            + "".join(job.format(name=n, ca=authority.file, password=p, target=target) for n, p in jobs)
        )
        running = subprocess.Popen(
            [
                "prometheus", f"--config.file={file}", f"--web.listen-address=127.0.0.1:{port}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}", "--log.level=error",
            ],
        )  # fmt: skip
        try:

            def up() -> dict[str, str] | None:
                url = f"http://127.0.0.1:{port}/api/v1/query?query=up"
                with urllib.request.urlopen(url, timeout=2) as response:
                    rows = json.load(response)["data"]["result"]
                return {row["metric"]["job"]: row["value"][1] for row in rows}

            daemon.until("both jobs", lambda: up() == {"right": "1", "wrong": "0"}, seconds=30)
        finally:
            running.terminate()
            running.wait(15)
        daemon.assert_calm()


def test_failed_logins_do_not_slow_scrapes(tmp_path: Path) -> None:
    felt = measure(tmp_path, addresses=1, logins=1000)
    assert "'429': " in felt.answers
    assert felt.quantile(0.99) < 0.05
