"""Contexts as the web configuration asks for them, in handshakes between two ends in memory."""

import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from tests.certificates import Authority

from jouletrace.config import ConfigError
from jouletrace.web.tls import Pems, names_of, read_pems, server_context
from jouletrace.web.web_config import ClientAuth, TlsServerConfig, TlsVersion

HOST = "node.example"


@pytest.fixture(name="authority")
def fixture_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(name="pems")
def fixture_pems(authority: Authority) -> Pems:
    cert, key = authority.issue("server", HOST)
    return Pems(cert.read_bytes(), key.read_bytes(), authority.file.read_bytes())


def client_of(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.file)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Return both ends after the handshake; raises SSLError when one of them refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=HOST),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[1], ends[0]


def test_tls_1_2_and_1_3_are_spoken_and_nothing_older(authority: Authority, pems: Pems) -> None:
    server = server_context(TlsServerConfig(), pems)
    spoken = []
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        client = client_of(authority)
        client.minimum_version = client.maximum_version = version
        spoken.append(shake_hands(server, client)[0].version())
    assert spoken == ["TLSv1.2", "TLSv1.3"]
    assert server.minimum_version is ssl.TLSVersion.TLSv1_2
    old = client_of(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="unsupported protocol"):
        shake_hands(server_context(TlsServerConfig(min_version=TlsVersion.TLS13), pems), old)


def test_the_suite_and_the_protocol_are_those_that_were_asked_for(authority: Authority, pems: Pems) -> None:
    suite = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"
    tls = TlsServerConfig(
        cipher_suites=(suite, "TLS_AES_128_GCM_SHA256"), max_version=TlsVersion.TLS12, curve_preferences=("CurveP384",)
    )
    client = client_of(authority)
    client.set_alpn_protocols(["h2", "http/1.1"])
    end, _ = shake_hands(server_context(tls, pems), client)
    cipher = end.cipher()
    assert cipher is not None
    # OpenSSL's name of RFC 7905's suite.
    assert cipher[0] == "ECDHE-ECDSA-CHACHA20-POLY1305"
    assert end.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize(
    ("asked", "shown", "comes_in"),
    [
        (ClientAuth.NONE, None, True),
        (ClientAuth.IF_GIVEN, None, True),
        (ClientAuth.IF_GIVEN, "own", True),
        (ClientAuth.IF_GIVEN, "strange", False),
        (ClientAuth.REQUIRED, None, False),
        (ClientAuth.REQUIRED, "own", True),
        (ClientAuth.REQUIRED, "strange", False),
    ],
)
def test_client_certificates(
    authority: Authority, pems: Pems, tmp_path: Path, asked: ClientAuth, shown: str | None, comes_in: bool
) -> None:
    # In TLS 1.2 the client hears of a refusal within the handshake.
    server = server_context(TlsServerConfig(client_auth_type=asked, max_version=TlsVersion.TLS12), pems)
    client = client_of(authority)
    if shown is not None:
        issuer = authority if shown == "own" else Authority(tmp_path)
        client.load_cert_chain(*issuer.issue("client", "prometheus.example", "192.0.2.7", "ops@site.example"))
    if not comes_in:
        with pytest.raises(ssl.SSLError):
            shake_hands(server, client)
        return
    end, _ = shake_hands(server, client)
    names = {"prometheus.example", "192.0.2.7", "ops@site.example"} if shown else set()
    assert names_of(end.getpeercert() or {}) == names


def test_files_and_inline_texts_are_read_alike(authority: Authority) -> None:
    cert, key = authority.issue("server", HOST)
    noted: list[Path] = []
    tls = TlsServerConfig(cert_file=str(cert), key=key.read_text(), client_ca_file=str(authority.file))
    pems = read_pems(tls, noted.append)
    assert pems == Pems(cert.read_bytes(), key.read_bytes(), authority.file.read_bytes())
    assert noted == [cert, authority.file]
    assert "PRIVATE" not in repr(pems)
    cert.unlink()
    with pytest.raises(ConfigError, match=r"^tls_server_config\.cert_file: .*server\.pem cannot be read \(No such"):
        read_pems(tls, noted.append)


def test_what_openssl_refuses_is_told_with_its_key(authority: Authority, pems: Pems, tmp_path: Path) -> None:
    _, other_key = authority.issue("other", HOST)
    secret = load_pem_private_key(pems.key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"hunter2")
    )
    asks = TlsServerConfig(client_auth_type=ClientAuth.REQUIRED)
    for tls, wrong, says in (
        (TlsServerConfig(), Pems(pems.cert, other_key.read_bytes(), b""), "cert_file: OpenSSL refuses it .key values"),
        (TlsServerConfig(), Pems(b"no certificate", pems.key, b""), "cert_file: OpenSSL refuses it"),
        (TlsServerConfig(key_file="/a.key"), Pems(pems.cert, secret, b""), "key_file: /a.key is encrypted; write it"),
        (asks, Pems(pems.cert, pems.key, b"no certificate"), "client_ca_file: OpenSSL refuses it"),
    ):
        with pytest.raises(ConfigError, match=says) as refusal:
            server_context(tls, wrong)
        assert "\n" not in str(refusal.value)


def test_keys_leave_neither_a_file_nor_a_descriptor_behind(pems: Pems) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    server_context(TlsServerConfig(client_auth_type=ClientAuth.REQUIRED), pems)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
