from pathlib import Path

import pytest

from jouletrace.config import ConfigError
from jouletrace.web.web_config import ClientAuth, TlsVersion, read_web_config

# The example of exporter-toolkit's documentation, but for what it says of Go alone.
WHOLE = """\
tls_server_config:
  cert_file: server.crt
  key_file: /keys/server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ca.crt
  client_allowed_sans: [prometheus.example]
  min_version: TLS13
  cipher_suites: [TLS_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]
  curve_preferences: [X25519]
  prefer_server_cipher_suites: false
http_server_config:
  http2: true
  headers:
    X-Frame-Options: deny
basic_auth_users:
  alice: $2y$10$mDwo.lAisC94iLAyP81MCesa29IzH37oigHC/42V2pdJlUprsJPze
rate_limit:
  interval: 500ms
  burst: 20
"""
HASH = "$2y$10$mDwo.lAisC94iLAyP81MCesa29IzH37oigHC/42V2pdJlUprsJPze"
PAIR = "  cert_file: a\n  key_file: b\n"


def refusal(folder: Path, text: str) -> str:
    file = folder / "web.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_web_config(file)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(file)).removeprefix(":")


def test_everything(tmp_path: Path) -> None:
    file = tmp_path / "web.yml"
    file.write_text(WHOLE)
    config = read_web_config(file)
    tls = config.tls_server_config
    assert tls is not None
    assert (tls.cert_file, tls.key_file) == (str(tmp_path / "server.crt"), "/keys/server.key")
    assert tls.client_auth_type is ClientAuth.REQUIRED
    assert tls.min_version is TlsVersion.TLS13
    assert dict(config.http_server_config.headers.items()) == {"X-Frame-Options": "deny"}
    assert config.basic_auth_users == {"alice": HASH}
    assert (config.rate_limit.interval_seconds, config.rate_limit.burst) == (0.5, 20)


def test_an_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "web.yml"
    file.write_text("# nothing yet\n")
    config = read_web_config(file)
    assert config.tls_server_config is None
    assert config.basic_auth_users == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tls_server_confg: {}", "1: tls_server_confg: is not a known key; did you mean tls_server_config?"),
        ("tls_server_config:\n  certfile: a", "2: tls_server_config.certfile: is not a known key; did you mean"),
        ("rate_limit: {burst: 1, burst: 2}", "rate_limit.burst: stands there twice; remove one"),
        (f"tls_server_config:\n{PAIR}  min_version: TLS11", "4: tls_server_config.min_version: invalid enum value"),
        (f"tls_server_config:\n{PAIR}  client_auth_type: RequireAnyClientCert", "proves nothing"),
        (f"tls_server_config:\n{PAIR}  client_ca_file: c", "tls_server_config.client_auth_type: asks for no client"),
        (f"tls_server_config:\n{PAIR}  client_auth_type: RequireAndVerifyClientCert", "client_ca_file: is missing"),
        ("tls_server_config:\n  cert_file: a", "tls_server_config.key_file: is missing; name the file"),
        (f"tls_server_config:\n{PAIR}  cipher_suites: [RC4]", "RC4 is not known; known are TLS_ECDHE"),
        (f"tls_server_config:\n{PAIR}  curve_preferences: [CurveP256, X25519]", "write one of CurveP256"),
        ("http_server_config: {headers: {X-Other: a}}", "X-Other: is not a known key; known here: Content-Security"),
        ("http_server_config: {headers: {X-Frame-Options: 'a\u00e9'}}", "is not the value of a header"),
        ("basic_auth_users: {a: hunter2}", "1: basic_auth_users.a: is not a bcrypt hash; make one with `htpasswd"),
        (f"basic_auth_users: {{a: {HASH.replace('$10$', '$20$')}}}", "cost 20, of which 4 to 16 are taken"),
        (f"basic_auth_users: {{'a:b': {HASH}}}", "is not a user name"),
        ("rate_limit: {interval: 5}", "rate_limit.interval: expected `str`, got `int`; write text"),
        ("rate_limit: {interval: often}", "rate_limit.interval: is not a duration; write one such as 1s"),
        ("rate_limit: {burst: 0}", "rate_limit: is out of range"),
        ("[a]", "holds no keys; write keys such as"),
        ("a: [", "is not valid YAML"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert says in message
    assert "hunter2" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"web\.config\.file: .*none\.yml cannot be read \(No such file"):
        read_web_config(tmp_path / "none.yml")
